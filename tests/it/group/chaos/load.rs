//! Publishers that know what the source has: each message is sent again, under the same id, until it is confirmed.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::task::JoinHandle;

use crate::harness::raw::header_values;
use crate::harness::{LIMIT, Outgoing, Raw, Stored, wait_for};

/// Messages at once, at the most, and the time between two bursts in ms.
const BURST: u64 = 20;
const PAUSE: std::ops::Range<u64> = 200..800;
/// A server that is silent for this time is left for the next one.
const SILENCE: Duration = Duration::from_secs(2);

/// By sequence in the stream.
pub type Confirmed = BTreeMap<u64, Outgoing>;

/// All publishers.
pub struct Load {
    stop: Arc<AtomicBool>,
    publishers: Vec<(String, JoinHandle<Result<Confirmed>>)>,
}

impl Load {
    pub fn new() -> Self {
        Self { stop: Arc::default(), publishers: Vec::new() }
    }

    /// One more publisher, to `stream` on `<stream in lower case>.<n>`, through one of these servers.
    pub fn publish(&mut self, stream: &str, servers: Vec<String>, seed: u64) {
        let publisher = Publisher {
            subject: stream.to_lowercase(),
            servers,
            at: self.publishers.len(),
            connection: None,
            stop: self.stop.clone(),
        };
        self.publishers.push((stream.to_owned(), tokio::spawn(publisher.run(seed))));
    }

    /// Ends the load: what each stream holds.
    pub async fn stop(&mut self) -> Result<HashMap<String, Confirmed>> {
        self.stop.store(true, Ordering::SeqCst);
        let mut all = HashMap::new();
        for (stream, task) in &mut self.publishers {
            let done = async || task.is_finished();
            wait_for(&format!("all messages of `{stream}` to be confirmed"), 2 * LIMIT, done).await?;
            all.insert(stream.clone(), task.await?.with_context(|| format!("source stream `{stream}`"))?);
        }
        Ok(all)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.publishers.iter().for_each(|(_, task)| task.abort());
    }
}

struct Publisher {
    subject: String,
    servers: Vec<String>,
    /// Which of them is used, modulo their number.
    at: usize,
    connection: Option<Raw>,
    stop: Arc<AtomicBool>,
}

impl Publisher {
    async fn run(mut self, seed: u64) -> Result<Confirmed> {
        let mut random = StdRng::seed_from_u64(seed);
        let (mut confirmed, mut waiting, mut next) = (Confirmed::new(), Vec::new(), 1);
        loop {
            let stop = self.stop.load(Ordering::SeqCst);
            if stop && waiting.is_empty() {
                return Ok(confirmed);
            }
            if !stop && (waiting.len() as u64) < BURST {
                let more = random.random_range(1..=BURST);
                waiting.extend((next..next + more).map(|number| self.message(number)));
                next += more;
            }
            let mut sequences = self.send(&waiting).await.into_iter();
            let mut unknown = Vec::new();
            for message in waiting.drain(..) {
                match sequences.next().flatten() {
                    None => unknown.push(message),
                    Some(sequence) => {
                        let before = confirmed.insert(sequence, message);
                        ensure!(before.is_none(), "sequence {sequence} was given to two messages: {before:?}");
                    }
                }
            }
            waiting = unknown;
            let pause = if waiting.is_empty() { random.random_range(PAUSE) } else { 100 };
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
    }

    fn message(&self, number: u64) -> Outgoing {
        let Self { subject, .. } = self;
        let message = Outgoing::new(format!("{subject}.{}", number % 7), format!("{subject} {number:0>200}"));
        message.with_lines(&[&format!("Nats-Msg-Id: {subject}-{number}"), "Some: header"])
    }

    async fn send(&mut self, messages: &[Outgoing]) -> Vec<Option<u64>> {
        if self.connection.is_none() {
            let connect = Raw::connect(&self.servers[self.at % self.servers.len()]);
            self.connection = tokio::time::timeout(SILENCE, connect).await.ok().and_then(Result::ok);
        }
        let sequences = match &mut self.connection {
            Some(connection) => connection.publish_each(messages, SILENCE).await,
            None => Vec::new(),
        };
        if sequences.len() < messages.len() || sequences.contains(&None) {
            self.connection = None;
            self.at += 1;
        }
        sequences
    }
}

/// What the source held of a stream that forgets what was acknowledged. The times of its messages are those that its copies
/// name: nobody else knows them any more.
pub fn remembered(confirmed: &Confirmed, copies: &[Stored]) -> Vec<Stored> {
    let origin = |copy: &Stored| {
        let value = header_values(&copy.header, "Choria-SR-Source").pop()?;
        let mut words = value.split(' ');
        Some((words.nth(1)?.parse().ok()?, words.nth(2)?.parse::<u64>().ok()? * 1_000_000))
    };
    let times: HashMap<u64, u64> = copies.iter().filter_map(origin).collect();
    let stored = |(seq, message): (&u64, &Outgoing)| Stored {
        seq: *seq,
        time: times.get(seq).copied().unwrap_or_default(),
        subject: message.subject.clone(),
        header: message.header.clone().unwrap_or_default(),
        payload: message.payload.clone(),
    };
    confirmed.iter().map(stored).collect()
}

/// The source still has all that it confirmed: otherwise its servers, not the copies, are to blame.
pub fn kept(confirmed: &Confirmed, source: &[Stored]) -> Result<()> {
    let there: HashMap<u64, &Stored> = source.iter().map(|message| (message.seq, message)).collect();
    for (sequence, message) in confirmed {
        let found = there.get(sequence).with_context(|| format!("the source lost message {sequence}"))?;
        ensure!(found.payload == message.payload, "the source has another message at {sequence}");
    }
    Ok(())
}
