//! Slow lines: messages of 1 kB to 16 MB over lines of 100 kB/s to 10 MB/s, with and without delay, to either side and slow in
//! both directions. Each row takes hardly longer than its bytes need, on the connections that it began with.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use futures_util::{StreamExt, stream};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::harness::client::wait_value;
use crate::harness::proxy::{BOTH, Direction, Proxy};
use crate::harness::{LIMIT, Outgoing, Role, Server, Site};

const KB: u64 = 1_000;
const MB: u64 = 1_000_000;
const MIB: u64 = 1 << 20;
/// What a copy may take beside the time that its bytes need: connections, the position to resume from, the last confirmation.
const BESIDE: Duration = Duration::from_secs(5);
/// Headers that a copy adds, and the protocol line.
const OVERHEAD: u64 = 250;
const NO_DELAY: Duration = Duration::ZERO;
const DELAY: Duration = Duration::from_millis(300);

/// The slow end of a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SlowEnd {
    Source,
    Target,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SlowTransport {
    /// Fast-ingest where the target has it.
    Best,
    Pipelined,
}

/// One row of the table.
#[derive(Debug, Clone, Copy)]
struct SlowRow {
    end: SlowEnd,
    transport: SlowTransport,
    retention: &'static str,
    /// Bytes a second.
    rate: u64,
    /// Of one message.
    size: u64,
    messages: u64,
    delay: Duration,
}

/// A stream with limits, by the best transport.
const fn row(end: SlowEnd, rate: u64, size: u64, messages: u64, delay: Duration) -> SlowRow {
    SlowRow { end, transport: SlowTransport::Best, retention: "limits", rate, size, messages, delay }
}

impl SlowRow {
    const fn pipelined(self) -> Self {
        Self { transport: SlowTransport::Pipelined, ..self }
    }

    const fn of(self, retention: &'static str) -> Self {
        Self { retention, ..self }
    }

    fn bytes(&self) -> u64 {
        self.messages * (self.size + OVERHEAD)
    }

    /// The time that the bytes need on this line.
    fn ideal(&self) -> Duration {
        Duration::from_secs_f64(self.bytes() as f64 / self.rate as f64)
    }

    fn throttle(&self, proxy: &Proxy) {
        proxy.throttle(BOTH, Some(self.rate));
        proxy.latency(BOTH, self.delay);
    }

    fn shown(&self) -> String {
        let Self { end, transport, retention, rate, size, messages, delay } = self;
        format!(
            "{:<7} {:<10} {retention:<10} {:>6} kB/s {:>6} kB x {messages:>5} {:>4} ms",
            format!("{end:?}"),
            format!("{transport:?}"),
            rate / KB,
            size / KB,
            delay.as_millis()
        )
    }
}

/// What a row took.
#[derive(Debug)]
struct SlowOutcome {
    took: Duration,
    /// The same bytes over the same kind of line at the same time, without any NATS.
    bare: Duration,
    wrong: Vec<String>,
}

impl SlowOutcome {
    /// A busy machine makes the line itself late: what is allowed grows with it.
    fn allowed(&self, row: &SlowRow) -> Duration {
        let late = (self.bare.as_secs_f64() / row.ideal().as_secs_f64()).max(1.0);
        (row.ideal().max(self.bare)).mul_f64(1.3) + BESIDE.mul_f64(late)
    }
}

/// Sends so many bytes through a proxy of this row; returns how long that takes.
async fn bare(row: &SlowRow) -> Result<Duration> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    let proxy = Proxy::start(listener.local_addr()?.port()).await?;
    row.throttle(&proxy);
    let client = TcpStream::connect(("127.0.0.1", proxy.port())).await?;
    let (server, _) = listener.accept().await?;
    let (mut from, mut to) = if row.end == SlowEnd::Target { (client, server) } else { (server, client) };
    let began = Instant::now();
    let sent = async {
        let piece = vec![b'x'; 64 * 1024];
        let mut left = row.bytes() as usize;
        while left > 0 {
            let count = left.min(piece.len());
            from.write_all(&piece[..count]).await?;
            left -= count;
        }
        anyhow::Ok(())
    };
    let received = async {
        let (mut left, mut buffer) = (row.bytes() as usize, vec![0; 64 * 1024]);
        while left > 0 {
            let count = to.read(&mut buffer).await?;
            ensure!(count > 0, "the line broke");
            left = left.saturating_sub(count);
        }
        anyhow::Ok(began.elapsed())
    };
    let ((), took) = tokio::try_join!(sent, received)?;
    Ok(took)
}

/// Servers that take the largest messages, and send them however long that takes: by default a server closes a connection to
/// which it cannot write everything within 10 s.
async fn site() -> Result<Site> {
    let config = "max_payload: 17825792\nwrite_deadline: \"10m\"";
    let (source, target) = tokio::try_join!(
        Server::builder(Role::Source).config(config).start(),
        Server::builder(Role::Target).config(config).start()
    )?;
    Site::builder().on(source, target).start().await
}

fn payload(i: u64, size: u64) -> Vec<u8> {
    let mut payload = format!("{i} ").into_bytes();
    payload.resize(size as usize, b'x');
    payload
}

/// Copies the messages of a row and judges the copy.
async fn copy(site: &Site, id: &str, row: &SlowRow) -> Result<SlowOutcome> {
    let subject = format!("{}.a", id.to_lowercase());
    let mut raw = site.source_stream(id, json!({"retention": row.retention})).await?;
    if row.retention == "interest" {
        // Nothing is kept without it.
        let config = json!({"durable_name": "KEEP", "ack_policy": "explicit"});
        let body = json!({"stream_name": id, "config": config});
        raw.api(&format!("CONSUMER.DURABLE.CREATE.{id}.KEEP"), body).await?;
    }
    raw.publish_all((1..=row.messages).map(|i| Outgoing::new(&subject, payload(i, row.size)))).await?;
    if row.transport == SlowTransport::Pipelined {
        site.target_stream(id, json!({})).await?;
    }
    let port = if row.end == SlowEnd::Source { site.source.port() } else { site.target.port() };
    let proxy = Proxy::start(port).await?;
    row.throttle(&proxy);
    let field = if row.end == SlowEnd::Source { "source_url" } else { "target_url" };
    let began = Instant::now();
    site.add(id, json!({field: proxy.url()})).await?;
    let (took, bare) = tokio::join!(follow(site, id, row, &proxy, began), bare(row));
    let (took, mut wrong) = took?;
    if let Err(error) = judge(site, id, row).await {
        wrong.push(format!("{error:#}"));
    }
    let mut outcome = SlowOutcome { took, bare: bare?, wrong };
    let allowed = outcome.allowed(row);
    if outcome.took > allowed {
        outcome.wrong.push(format!("took {:.1?}, allowed are {allowed:.1?}", outcome.took));
    }
    site.send("config.delete", json!({"replication": id})).await?;
    for mut raw in [site.source().await?, site.target().await?] {
        raw.api(&format!("STREAM.DELETE.{id}"), Value::Null).await?;
    }
    Ok(outcome)
}

/// Waits until everything is settled; returns how long that took, and what went wrong on the way.
async fn follow(
    site: &Site,
    id: &str,
    row: &SlowRow,
    proxy: &Proxy,
    began: Instant,
) -> Result<(Duration, Vec<String>)> {
    let limit = 4 * row.ideal() + Duration::from_secs(90);
    let mut begun_with: Option<(u64, Duration)> = None;
    let mut last = Value::Null;
    let settled = async || {
        last = site.row(id).await?;
        if last["state"] == "running" {
            begun_with.get_or_insert_with(|| (proxy.accepted(), began.elapsed()));
        }
        (last["position"]["source_seq"] == row.messages).then(|| began.elapsed())
    };
    let settled = wait_value(&format!("`{id}` to settle"), limit, settled).await;
    let mut wrong = Vec::new();
    let took = settled.unwrap_or_else(|error| {
        wrong.push(format!("{error:#}"));
        began.elapsed()
    });
    let connections = proxy.accepted();
    println!("{id} runs after {:.1?}", begun_with.map(|(_, after)| after));
    if begun_with.is_none_or(|(begun, _)| begun != connections) {
        wrong.push(format!("{connections} connections, {begun_with:?} when it began"));
    }
    let counters = &last["counters"];
    if counters["errors"] != 0 || counters["repairs"] != json!({"consumer": 0, "connections": 0, "everything": 0}) {
        wrong.push(format!("errors or repairs, the last error is {}: {counters}", last["last_error"]["message"]));
    }
    for kind in ["held", "stalled", "target-shared", "gap"] {
        let told = site.events.told(kind).into_iter().filter(|event| event["replication"] == id);
        wrong.extend(told.map(|event| format!("event {event}")));
    }
    Ok((took, wrong))
}

/// The copy is complete and in order.
async fn judge(site: &Site, id: &str, row: &SlowRow) -> Result<()> {
    let stored = site.target().await?.read_stream(id).await?;
    let number = |payload: &[u8]| -> Option<u64> {
        let digits = payload.split(|byte| *byte == b' ').next()?;
        std::str::from_utf8(digits).ok()?.parse().ok()
    };
    let numbers: Vec<_> = stored.iter().map(|message| number(&message.payload)).collect();
    let expect: Vec<_> = (1..=row.messages).map(Some).collect();
    ensure!(numbers == expect, "{} of {} messages, or out of order", stored.len(), row.messages);
    ensure!(stored.iter().all(|message| message.payload.len() as u64 == row.size), "a message is cut");
    Ok(())
}

/// Runs the rows, so many at a time, and prints the table. A row that fails runs once more on its own: on a busy machine a
/// line, or whoever is at its end, may stand still for seconds.
async fn table(rows: &[SlowRow], at_a_time: usize) -> Result<()> {
    let site = site().await?;
    let run = async |index: usize, row: &SlowRow, again: &str| {
        let outcome = copy(&site, &format!("ROW{index}{again}"), row).await;
        let outcome = outcome.with_context(|| row.shown())?;
        println!(
            "{} took {:>6.1} s, bare {:>6.1} s, allowed {:>6.1} s {}",
            row.shown(),
            outcome.took.as_secs_f64(),
            outcome.bare.as_secs_f64(),
            outcome.allowed(row).as_secs_f64(),
            outcome.wrong.join("; ")
        );
        anyhow::Ok(!outcome.wrong.is_empty())
    };
    let results = stream::iter(rows.iter().enumerate()).map(|(index, row)| run(index, row, ""));
    let results: Vec<_> = results.buffered(at_a_time).collect().await;
    let mut failed = Vec::new();
    for ((index, row), wrong) in rows.iter().enumerate().zip(results) {
        if wrong? && run(index, row, "AGAIN").await? {
            failed.push(row.shown());
        }
    }
    let peak = site.service.usage().rss_peak;
    println!("the service took {} MiB at the most", peak / MIB);
    if !failed.is_empty() {
        bail!("{} rows failed:\n{}\n{}", failed.len(), failed.join("\n"), site.service.log());
    }
    ensure!(peak < 256 * MIB, "{} MiB", peak / MIB);
    Ok(())
}

use SlowEnd::{Source, Target};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_targets_are_copied_to_at_the_rate_of_their_lines() -> Result<()> {
    let rows = [
        row(Target, 200 * KB, 100 * KB, 30, NO_DELAY),
        row(Target, 100 * KB, KB, 1_000, DELAY),
        row(Target, MB, 8 * MB, 2, NO_DELAY),
        row(Target, 10 * MB, MB, 60, DELAY),
        row(Target, 200 * KB, 100 * KB, 30, DELAY).pipelined(),
        row(Target, MB, MB, 12, NO_DELAY).pipelined(),
    ];
    table(&rows, rows.len()).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_sources_are_copied_from_at_the_rate_of_their_lines() -> Result<()> {
    let rows = [
        row(Source, 200 * KB, 100 * KB, 30, NO_DELAY),
        row(Source, 100 * KB, KB, 1_000, DELAY),
        row(Source, 10 * MB, MB, 60, NO_DELAY),
        row(Source, 200 * KB, 100 * KB, 30, DELAY).of("workqueue"),
        row(Source, MB, MB, 12, NO_DELAY).of("interest"),
    ];
    table(&rows, rows.len()).await
}

/// Every rate with every size, so that a row takes half a minute or one message.
fn every_row() -> Vec<SlowRow> {
    let mut rows = vec![row(Source, MB, 8 * MB, 2, NO_DELAY), row(Source, 220 * KB, MB, 4, NO_DELAY)];
    for end in [Source, Target] {
        for rate in [100 * KB, MB, 10 * MB] {
            for size in [KB, 100 * KB, MB, 16 * MB] {
                let messages = (20 * rate / size).clamp(1, 5_000);
                for delay in [NO_DELAY, DELAY] {
                    let row = row(end, rate, size, messages, delay);
                    rows.push(row);
                    match end {
                        Source => rows.extend([row.of("workqueue"), row.of("interest")]),
                        Target => rows.push(row.pipelined()),
                    }
                }
            }
        }
    }
    rows
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes half an hour: make check-long"]
async fn the_whole_table_of_slow_lines() -> Result<()> {
    // `ROWS='10000 kB/s,300 ms'` runs only the rows whose line has all of these.
    let words = std::env::var("ROWS").unwrap_or_default();
    let wanted = |row: &SlowRow| words.split(',').all(|words| row.shown().contains(words));
    let rows = every_row().into_iter().filter(wanted);
    let (large, others): (Vec<_>, Vec<_>) = rows.partition(|row| row.size > MB);
    let others = table(&others, 8).await;
    table(&large, 4).await?;
    others
}

/// The line to the source takes longer for a large dead letter than an ack may take.
#[tokio::test]
async fn a_large_dead_letter_crosses_a_slow_line() -> Result<()> {
    const SIZE: usize = 2_700_000;
    let source = Server::builder(Role::Source).config("max_payload: 8MB").start().await?;
    let site = Site::builder().on(source, Server::start(Role::Target).await?).control_at_source().start().await?;
    let mut raw = site.source_stream("S", json!({})).await?;
    let mut dead = site.source_stream("DEAD", json!({"subjects": ["dead.>"]})).await?;
    let proxy = Proxy::start(site.source.port()).await?;
    raw.publish(&Outgoing::new("s.a", vec![b'x'; SIZE])).await?;
    raw.publish(&Outgoing::new("s.a", "small")).await?;
    proxy.throttle(&[Direction::ToServer], Some(100_000));
    let fields =
        json!({"source_url": proxy.url(), "on_reject": "dead_letter", "dead_letter": {"subject": "dead.letters"}});
    site.add("S", fields).await?;
    let row = site.settled_within("S", 2, 4 * LIMIT).await?;
    assert_eq!((site.at_target("S").await?, &row["counters"]["errors"]), (1, &json!(0)), "{row}");
    assert_eq!(dead.stream_state("DEAD").await?["messages"], 1);
    site.events.quiet(&["held", "stalled"])
}
