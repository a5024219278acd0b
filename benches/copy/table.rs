//! What is printed: markdown tables.

use crate::pair::Load;
use crate::ways::{Sample, Way};

const MIB: f64 = 1_048_576.0;

/// The samples of one row: what was copied, in which way, from where.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    pub(crate) load: Load,
    pub(crate) way: Way,
    /// What else tells this row from others of its table.
    pub(crate) note: String,
    pub(crate) samples: Vec<Sample>,
}

/// What was measured on what.
pub(crate) fn head(version: &str, rounds: usize) {
    println!("nats-server {version} on both sides, file storage; all servers and the copier share {} cores;", cores());
    println!(
        "medians of {rounds} round(s). CPU is in microseconds per message. The last columns compare within rounds."
    );
}

/// One table: each row, and its rate against the rows of the ways that it is to be held against.
pub(crate) fn print(title: &str, rows: &[Row], against: &[Way]) {
    println!("\n### {title}\n");
    let mut columns = "payload | streams | replicas | way | msg/s | least - most | MiB/s | CPU source server | \
        CPU target servers | CPU copier | copier peak MiB"
        .to_owned();
    for way in against {
        columns += &format!(" | x {way}");
    }
    println!("| {columns} |");
    println!("|--:|--:|--:|---{}|", "|--:".repeat(columns.matches(" | ").count() - 3));
    for row in rows {
        println!("{}", line(row, rows, against));
    }
}

fn line(row: &Row, rows: &[Row], against: &[Way]) -> String {
    let Row { load, way, note, samples } = row;
    let median_of = |value: &dyn Fn(&Sample) -> f64| median(samples.iter().map(value).collect());
    let rate = median_of(&Sample::rate);
    let (least, most) = range(samples.iter().map(Sample::rate));
    let memory = median_of(&|s| s.memory as f64) / MIB;
    let native = matches!(way, Way::Source | Way::Mirror);
    let mut line = format!(
        "| {} | {} | {} | {way}{note} | {rate:.0} | {least:.0} - {most:.0} | {:.1} | {:.1} | {:.1} | {} | {}",
        load.payload,
        load.streams,
        load.replicas,
        rate * load.payload as f64 / MIB,
        median_of(&|s| s.per_message(s.source_cpu)),
        median_of(&|s| s.per_message(s.target_cpu)),
        or_dash(!native, median_of(&|s| s.per_message(s.copier_cpu))),
        or_dash(memory > 0.0, memory),
    );
    for other in against {
        // The same load and the same distance first; else the same load as it was measured without any.
        let same = |other_row: &&Row| other_row.load == *load && other_row.way == *other;
        let found = rows.iter().filter(same).find(|r| r.note == *note).or_else(|| rows.iter().find(same));
        line += &format!(
            " | {}",
            found.map_or_else(|| "-".to_owned(), |found| format!("{:.2}", ratio(samples, &found.samples)))
        );
    }
    line + " |"
}

/// Whether the machine was ours: what others take, the copies do not get.
pub(crate) fn foot(rows: &[Row]) {
    if rows.is_empty() {
        return;
    }
    let others = || rows.iter().flat_map(|row| &row.samples).map(|sample| sample.others);
    let (_, most) = range(others());
    let middle = median(others().collect());
    println!("\nOther processes kept {middle:.1} of {} cores busy meanwhile (most: {most:.1}).", cores());
    if most > 0.3 {
        println!("That is too much for msg/s to be compared with other runs; the CPU columns hold.");
    }
}

/// Round by round, because what disturbs the machine disturbs a whole round.
pub(crate) fn ratio(mine: &[Sample], theirs: &[Sample]) -> f64 {
    median(mine.iter().zip(theirs).map(|(a, b)| a.rate() / b.rate()).collect())
}

fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    values.fold((f64::INFINITY, 0.0), |(least, most), v| (f64::min(least, v), f64::max(most, v)))
}

/// The middle one; of an even number, the upper of the two.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn or_dash(there: bool, value: f64) -> String {
    if there { format!("{value:.1}") } else { "-".to_owned() }
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(0, usize::from)
}
