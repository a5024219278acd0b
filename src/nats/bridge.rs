//! Whether two connections belong to one account, by way of leafnodes or gateways.

use nats_lane::{Error, Lane, Turn};
use tokio::time::{Duration, Instant, sleep_until};

/// A subscription spreads with delay: the message is published again after this time.
const AGAIN: Duration = Duration::from_millis(50);
/// Last token of the subject.
const TOKEN: &str = "bridge";

/// Whether what is published on one lane reaches the other, which must be unused meanwhile: a message to the inbox of the other
/// one tells.
pub async fn reaches(from: &mut Lane, to: &mut Lane, within: Duration) -> Result<bool, Error> {
    let subject = to.inbox_subject(TOKEN);
    let publish = format!("PUB {subject} 0\r\n\r\n");
    let end = Instant::now() + within;
    let mut again = Instant::now();
    loop {
        let now = Instant::now();
        if now >= end {
            return Ok(false);
        }
        if now >= again {
            from.output().extend_from_slice(publish.as_bytes());
            again = now + AGAIN;
        }
        let turn = tokio::select! {
            turn = to.turn() => turn?,
            sent = from.turn() => {
                sent?;
                continue;
            }
            () = sleep_until(again.min(end)) => continue,
        };
        if let Turn::Received(batch) = turn
            && batch.iter().any(|message| message.subject == subject.as_bytes())
        {
            return Ok(true);
        }
    }
}
