//! Determines which messages of a durable consumer may be pending, as few as possible: each of them costs two commands
//! to the server when its queue of redeliveries is sorted.

use std::{collections::HashMap, ops::RangeInclusive};

use nats_lane::{Error, Lane, jetstream::decode_message};
use serde_json::{Value, json};

use crate::copy::source::durable;

/// Most sequences that all count as pending: a request which of them match would cost as much.
const DENSE: u64 = 50_000;
/// The same for each pending message, if that is more.
const DENSE_FOR_EACH: u64 = 8;
/// Parts of a range that are searched at the same time.
const PARTS: u64 = 64;
/// Most pending messages: more than any consumer has.
const MOST: usize = 2_000_000;

/// Whether a range with this many pending messages is short enough for all of its sequences to count as pending.
pub(super) fn is_dense(range: &RangeInclusive<u64>, pending: u64) -> bool {
    let sequences = (range.end() + 1).saturating_sub(*range.start());
    sequences <= DENSE.max(pending.saturating_mul(DENSE_FOR_EACH))
}

/// Sequences in `range`, ascending, that contain every pending message of the consumer. With a filter, or where other
/// consumers remove most messages, pending messages are far apart: then the stream is asked for their sequences, and each
/// answer has the payload.
pub(super) async fn candidates(
    lane: &mut Lane,
    stream: &str,
    config: &Value,
    range: RangeInclusive<u64>,
    pending: u64,
) -> Result<Vec<u64>, Error> {
    if is_dense(&range, pending) {
        return Ok(range.collect());
    }
    let filters = durable::filters(config);
    let filters = if filters.is_empty() { vec![">"] } else { filters };
    let mut found = Vec::new();
    for filter in filters {
        matching(lane, stream, filter, &range, &mut found).await?;
    }
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

/// Sequences in a range that match one filter.
async fn matching(
    lane: &mut Lane,
    stream: &str,
    filter: &str,
    range: &RangeInclusive<u64>,
    found: &mut Vec<u64>,
) -> Result<(), Error> {
    let subject = format!("{}.STREAM.MSG.GET.{stream}", lane.api_prefix());
    let ask = |lane: &mut Lane, from: u64| {
        let body = json!({ "seq": from, "next_by_subj": filter }).to_string();
        lane.send_request(&subject, body.as_bytes()).into_bytes()
    };
    // Last sequence of a part, by the request that continues the search in it.
    let mut asked: HashMap<Vec<u8>, u64> = HashMap::new();
    let step = ((range.end() - range.start()) / PARTS).max(1);
    let mut from = *range.start();
    while from <= *range.end() {
        let to = from.saturating_add(step).min(*range.end());
        asked.insert(ask(lane, from), to);
        from = to + 1;
    }
    while !asked.is_empty() {
        for (reply, answer) in lane.answers().await? {
            let Some(to) = asked.remove(&reply) else { continue };
            let Some(message) = decode_message(&answer)?.filter(|message| message.sequence <= to) else { continue };
            found.push(message.sequence);
            if found.len() > MOST {
                let text =
                    format!("stream `{stream}` has more than {MOST} messages that its consumer may have pending");
                return Err(Error::retry(text));
            }
            if message.sequence < to {
                asked.insert(ask(lane, message.sequence + 1), to);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wide_range_with_few_pending_messages_is_not_dense() {
        let check = |from: u64, to: u64, pending: u64, expect: bool| {
            assert_eq!(is_dense(&(from..=to), pending), expect, "{from}..={to} {pending}");
        };
        check(1, 50_000, 1, true);
        check(1, 50_001, 1, false);
        check(1, 160_000, 20_000, true);
        check(1, 160_001, 20_000, false);
        check(1, u64::MAX - 1, u64::MAX, true);
        check(9, 8, 0, true);
    }
}
