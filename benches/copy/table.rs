//! What is printed: a markdown table.

use crate::pair::Pair;
use crate::ways::{Sample, Way};

const MIB: f64 = 1_048_576.0;

/// What was measured on what.
pub(crate) fn head(pair: &Pair, rounds: usize) {
    println!("nats-server {} to {}, file storage, one replica;", pair.source.version(), pair.target.version());
    println!("two servers and the copier share {} cores; medians of {rounds} round(s).", cores());
    println!("CPU is in seconds per million messages. The last columns compare within each round.\n");
    let columns = "payload | way | messages | msg/s | least - most | MiB/s | CPU source server | CPU target server | \
        CPU copier | copier peak MiB | x native | x stop-and-wait";
    println!("| {columns} |");
    println!("|--:|---{}|", "|--:".repeat(columns.matches('|').count() - 1));
}

/// The lines of one payload size.
pub(crate) fn rows(payload: usize, ways: &[Way], samples: &[(Way, Sample)]) {
    for way in ways {
        let mine = of(*way, samples);
        let median_of = |value: &dyn Fn(&Sample) -> f64| median(mine.iter().map(value).collect());
        let rate = median_of(&Sample::rate);
        let (least, most) = range(mine.iter().map(Sample::rate));
        let memory = median_of(&|s| s.memory as f64) / MIB;
        println!(
            "| {payload} | {way} | {} | {rate:.0} | {least:.0} - {most:.0} | {:.1} | {:.1} | {:.1} | {} | {} | {:.2} | {:.1} |",
            mine.first().map_or(0, |s| s.messages),
            rate * payload as f64 / MIB,
            median_of(&|s| s.per_million(s.source_cpu)),
            median_of(&|s| s.per_million(s.target_cpu)),
            or_dash(*way != Way::Native, median_of(&|s| s.per_million(s.copier_cpu))),
            or_dash(memory > 0.0, memory),
            ratio(&mine, &of(Way::Native, samples)),
            ratio(&mine, &of(Way::StopAndWait, samples)),
        );
    }
}

/// Whether the machine was ours: what others take, the copies do not get.
pub(crate) fn foot(samples: &[(Way, Sample)]) {
    let (_, most) = range(samples.iter().map(|(_, s)| s.others));
    let middle = median(samples.iter().map(|(_, s)| s.others).collect());
    println!("\nOther processes kept {middle:.1} of {} cores busy meanwhile (most: {most:.1}).", cores());
    if most > 0.3 {
        println!("That is too much for msg/s to be compared with other runs; the CPU columns hold.");
    }
}

fn of(way: Way, samples: &[(Way, Sample)]) -> Vec<Sample> {
    samples.iter().filter(|(w, _)| *w == way).map(|(_, s)| *s).collect()
}

/// Round by round, because what disturbs the machine disturbs a whole round.
fn ratio(mine: &[Sample], theirs: &[Sample]) -> f64 {
    median(mine.iter().zip(theirs).map(|(a, b)| a.rate() / b.rate()).collect())
}

fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    values.fold((f64::INFINITY, 0.0), |(least, most), v| (f64::min(least, v), f64::max(most, v)))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn or_dash(there: bool, value: f64) -> String {
    if there { format!("{value:.1}") } else { "-".to_owned() }
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(0, usize::from)
}
