//! Nodes that publish registrations at a steady rate.

use std::time::Duration;

use anyhow::Result;
use chrono::Utc;
use serde_json::Value;
use tokio::time::{Instant, sleep_until};

use crate::harness::{Outgoing, REGISTRATION, Raw, Registration};

pub(crate) const SENDERS: u64 = 50_000;
/// Between two writes.
const TICK: Duration = Duration::from_millis(5);
/// Bytes of the data of a registration: the message becomes 1 to 4 kB.
const DATA: [usize; 4] = [300, 600, 900, 1_250];

pub(crate) struct Fleet {
    raw: Raw,
    /// As of compressed inventories, one of each size.
    data: Vec<String>,
    next: u64,
}

impl Fleet {
    pub(crate) async fn connect(url: &str) -> Result<Self> {
        let letter = |_| char::from(rand::random_range(b'a'..=b'z'));
        let data = DATA.map(|size| {
            let content: String = (0..size).map(letter).collect();
            format!(r#"{{"protocol":"choria:registration:inventorycontent:1","zcontent":"{content}"}}"#)
        });
        Ok(Self { raw: Raw::connect(url).await?, data: data.into(), next: 0 })
    }

    /// Publishes `count` registrations, `rate` a second, and returns how many there have been in all. If the machine is too
    /// slow, it takes longer.
    pub(crate) async fn publish(&mut self, rate: u64, count: u64) -> Result<u64> {
        let begun = Instant::now();
        let mut done = 0;
        while done < count {
            let due = (begun.elapsed().as_secs_f64() * rate as f64) as u64;
            let batch: Vec<Outgoing> = (done..due.min(count)).map(|_| self.next()).collect();
            done += batch.len() as u64;
            self.raw.send_all(&batch).await?;
            sleep_until(Instant::now() + TICK).await;
        }
        // The server has read everything before this.
        self.raw.api("INFO", Value::Null).await?;
        Ok(self.next)
    }

    fn next(&mut self) -> Outgoing {
        let number = self.next;
        self.next += 1;
        let (id, sender) = (format!("{number:032}"), format!("n{}.example.net", number % SENDERS));
        // Senders have both sizes and versions in all combinations.
        let data = &self.data[(number / 2 % DATA.len() as u64) as usize];
        let time = Utc::now().timestamp_nanos_opt().unwrap_or_default();
        let registration = Registration { id: &id, sender: &sender, data, time };
        let body = if number.is_multiple_of(2) { registration.v1() } else { registration.v2() };
        Outgoing::new(REGISTRATION, body)
    }
}
