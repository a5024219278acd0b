//! `make demo`: two throw-away NATS servers that know nothing of each other, Choria registration data on one,
//! a replication to the other, a crash of the service in the middle, and a comparison of both streams message
//! by message. Needs about 20 seconds and leaves nothing behind.

#[path = "demo/inventory.rs"]
mod inventory;
#[path = "demo/registration.rs"]
mod registration;

#[path = "../tests/harness/mod.rs"]
mod harness;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval};

use harness::checker::compare_streams;
use harness::client::status;
use harness::{Expect, Outgoing, Raw, Role, Server, Service, connect, request, wait_for};
use registration::Fleet;

const STREAM: &str = "CHORIA_REGISTRATION";
const SITE: &str = "DEMO";
const SENDERS: usize = 500;

/// How long the fleet publishes.
const PUBLISH: Duration = Duration::from_secs(9);
/// When the service is killed, and how long it stays away.
const KILL_AFTER: Duration = Duration::from_secs(3);
const DOWN: Duration = Duration::from_secs(1);
const CATCH_UP: Duration = Duration::from_secs(20);

#[tokio::main]
async fn main() -> ExitCode {
    // Leaving through here drops, and so ends, the servers and the service.
    let outcome = tokio::select! {
        outcome = demo() => outcome,
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("\nthe demo failed: {e:#}");
            ExitCode::FAILURE
        }
    }
}

async fn demo() -> Result<()> {
    title("Two independent clusters");
    let source = Server::builder(Role::Source).name("factory").start().await?;
    let target = Server::builder(Role::Target).name("headquarters").start().await?;
    for server in [&source, &target] {
        println!("  nats-server {} `{}` at {}", server.version(), server.name(), server.url());
    }
    let mut raw = Raw::connect(&source.url()).await?;
    raw.create_stream(STREAM, json!({"subjects": ["choria.stream.input.registration.>"]})).await?;
    println!("  stream {STREAM} at the factory; headquarters has no stream yet");

    title("The replicator");
    println!("  $ stream-replicator serve --server {} --name {SITE} --instance demo", source.url());
    let mut service = Service::builder(&source.url(), SITE).instance("demo").start().await?;
    println!("  pid {} is a NATS service on the factory's server; that server also holds its buckets", pid(&service));

    title("A replication, with one request");
    let client = connect(&source.url()).await?;
    let document = json!({"stream": STREAM, "source_url": source.url(), "target_url": target.url()});
    println!("  $ nats --server {} req replicator.config.add '{document}'", source.url());
    println!("  {}", request(&client, "replicator.config.add", document).await?);

    title(&format!("{SENDERS} nodes publish registration data for {} seconds", PUBLISH.as_secs()));
    let publisher = tokio::spawn(publish(raw));
    let published = watch(&client, &mut service, publisher).await?;

    title("Catching up");
    let done = async || {
        let row = status(&client, STREAM).await.unwrap_or_default();
        row["position"]["source_seq"].as_u64() == Some(published)
    };
    let begin = Instant::now();
    wait_for("the position to reach the end of the source", CATCH_UP, done).await?;
    println!("  caught up {:.1} s after the last message was published", begin.elapsed().as_secs_f64());

    title("Comparison, message by message");
    prove(&source, &target, published).await?;
    ensure!(service.stop().await?.success(), "the service did not stop cleanly:\n{}", service.log());
    println!("  the service stopped cleanly; servers and data are removed now");
    next_steps();
    Ok(())
}

/// Publishes until the time is over; returns the last sequence.
async fn publish(mut raw: Raw) -> Result<u64> {
    let mut fleet = Fleet::new(SENDERS);
    let mut last = 0;
    let end = Instant::now() + PUBLISH;
    let mut tick = interval(Duration::from_millis(50));
    // After a slow batch, continue at the same pace instead of catching up.
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while Instant::now() < end {
        tick.tick().await;
        let batch: Vec<Outgoing> = fleet.by_ref().take(200).map(|m| Outgoing::new(m.subject, m.body)).collect();
        last = raw.publish_all(batch).await?;
    }
    Ok(last)
}

/// Shows progress while the fleet publishes, and kills the service in the middle.
async fn watch(
    client: &async_nats::Client,
    service: &mut Service,
    mut publisher: JoinHandle<Result<u64>>,
) -> Result<u64> {
    let mut progress = Progress::new();
    let mut tick = interval(Duration::from_millis(500));
    let mut killed = None;
    let mut restarted = false;
    loop {
        tokio::select! {
            published = &mut publisher => return published.context("the publisher")?,
            _ = tick.tick() => {}
        }
        progress.show(status(client, STREAM).await);
        match killed {
            None if progress.begin.elapsed() > KILL_AFTER => {
                println!("  >>> kill -9 {}", pid(service));
                service.kill()?;
                killed = Some(Instant::now());
            }
            Some(at) if !restarted && at.elapsed() > DOWN => {
                service.restart().await?;
                println!(
                    "  >>> started again, pid {}; it resumes from its position record and the target",
                    pid(service)
                );
                restarted = true;
            }
            _ => {}
        }
    }
}

/// One line for each poll of `replicator.status`.
struct Progress {
    begin: Instant,
    /// When the position moved last, where to, and how fast. The status moves once a second, we look twice.
    moved: Option<(Instant, u64, f64)>,
}

impl Progress {
    fn new() -> Self {
        println!("    time  state      source at   position      lag   msg/s  transport");
        Self { begin: Instant::now(), moved: None }
    }

    fn show(&mut self, row: Option<Value>) {
        let time = self.begin.elapsed().as_secs_f64();
        let Some(row) = row else {
            println!("  {time:5.1}s  (no responders for replicator.status)");
            self.moved = None;
            return;
        };
        let number = |value: &Value| value.as_u64().unwrap_or(0);
        let position = number(&row["position"]["source_seq"]);
        let rate = match self.moved {
            Some((_, was, rate)) if was == position => rate,
            Some((at, was, _)) => position.saturating_sub(was) as f64 / at.elapsed().as_secs_f64(),
            None => 0.0,
        };
        if self.moved.is_none_or(|(_, was, _)| was != position) {
            self.moved = Some((Instant::now(), position, rate));
        }
        println!(
            "  {time:5.1}s  {:<9} {:>10} {position:>10} {:>8} {:>7.0}  {}",
            row["state"].as_str().unwrap_or("?"),
            number(&row["source"]["last_seq"]),
            number(&row["lag"]["messages"]),
            rate,
            row["transport"].as_str().unwrap_or("?"),
        );
    }
}

async fn prove(source: &Server, target: &Server, published: u64) -> Result<()> {
    let mut from = Raw::connect(&source.url()).await?;
    let mut to = Raw::connect(&target.url()).await?;
    let report = compare_streams(&mut from, &mut to, STREAM, &Expect::copy_of(STREAM).site(SITE)).await?;
    report.verify()?;
    ensure!(report.expected as u64 == published, "{published} were published, {} are at the source", report.expected);
    println!("  published {published}, copied {}", report.copied);
    println!("  lost 0, duplicated 0, out of order 0, altered 0: subjects, payloads and headers are the same,");
    println!("  and each copy names the message that it was made from, over a kill -9 in the middle");
    Ok(())
}

fn next_steps() {
    title("What to try next, with a NATS of your own");
    println!("  stream-replicator serve --server nats://localhost:4222 --name MYSITE");
    println!(
        "  nats req replicator.config.add '{{\"stream\":\"ORDERS\",\"source_url\":\"...\",\"target_url\":\"...\"}}'"
    );
    println!("  nats req replicator.status ''          where each replication is");
    println!("  nats sub 'replicator.event.>'          what happens to them");
    println!("  nats kv get REPLICATOR_CONFIG ORDERS   the configuration, yours to read and edit");
    println!("  make bench                             speed beside a native JetStream source");
}

fn title(text: &str) {
    println!("\n== {text}");
}

fn pid(service: &Service) -> u32 {
    service.pid().unwrap_or_default()
}
