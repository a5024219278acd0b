//! The way back to Choria's replicator. It resumes at its durable consumer at the source, and does not read the
//! target: a consumer that keeps its position has everything copied again. So the consumer is moved along with the copy.

use nats_lane::{
    Error, Lane,
    jetstream::{Api, ConsumerInfo},
};
use serde_json::{Value, json};

/// API level of servers that reset consumers: 2.14.
const RESETS: u32 = 4;

/// The durable consumer that Choria's replicator reads one stream through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GoConsumer {
    /// The source stream.
    pub stream: String,
    /// Name of the consumer, `SR_<name>`.
    pub name: String,
    /// Name of the entry in its file, for the description.
    pub entry: String,
    /// Only matching subjects are copied.
    pub filter: Option<String>,
}

impl GoConsumer {
    /// Has the consumer continue after `position`, and creates it if there is none. Everything up to there counts as
    /// acknowledged, and what was delivered and not acknowledged is forgotten.
    ///
    /// Servers before 2.14 cannot move a consumer: it is deleted and created again. After an error it is where it was, or it
    /// is gone until the next call. A stream that removes what is acknowledged is left alone: there the copy itself reads
    /// through this consumer.
    pub async fn move_to(&self, lane: &mut Lane, position: u64) -> Result<(), Error> {
        let Self { stream, name, .. } = self;
        let info = Api::new(lane).stream_info(stream).await?;
        let Some(info) = info else { return Err(Error::retry(format!("stream `{stream}` does not exist"))) };
        if info.text("retention") != "limits" {
            return Ok(());
        }
        let there = Api::new(lane).consumer_info(stream, name).await?;
        if there.as_ref().is_some_and(|there| is_at(there, position)) {
            return Ok(());
        }
        if there.is_some() && info.api_level() >= RESETS {
            // Refused for consumers that do not begin at a sequence or with the first message.
            let reset = Api::new(lane).reset_consumer(stream, name, Some(position + 1)).await;
            if reset.is_ok_and(|reset| is_at(&reset, position)) {
                return Ok(());
            }
        }
        let config = self.config(there.as_ref().map(|there| &there.config), position);
        if there.is_some() {
            Api::new(lane).delete_consumer(stream, name).await?;
        }
        Api::new(lane).create_consumer(stream, name, &config).await.map(|_| ())
    }

    /// The consumer as Choria's replicator makes it, or as it was, but for where it begins.
    fn config(&self, old: Option<&Value>, position: u64) -> Value {
        let Self { name, entry, filter, .. } = self;
        let mut config = old.cloned().unwrap_or_else(|| {
            json!({
                "name": name,
                "durable_name": name,
                "description": format!("Choria Stream Replicator {entry}"),
                "ack_policy": "explicit",
                "ack_wait": 30_000_000_000u64,
                "max_ack_pending": 1,
                "max_deliver": -1,
                "replay_policy": "instant",
            })
        });
        if let (None, Some(filter)) = (old, filter) {
            config["filter_subject"] = filter.as_str().into();
        }
        config["deliver_policy"] = "by_start_sequence".into();
        config["opt_start_seq"] = (position + 1).into();
        if let Some(config) = config.as_object_mut() {
            config.remove("opt_start_time");
        }
        config
    }
}

/// Whether a consumer continues after a position, with nothing left to be acknowledged. The ack floor of one that begins at a
/// sequence is 0 on some servers until the first ack.
fn is_at(info: &ConsumerInfo, position: u64) -> bool {
    info.num_ack_pending == 0 && info.delivered.stream_seq == position
}

#[cfg(test)]
mod tests {
    use super::*;

    fn consumer(filter: Option<&str>) -> GoConsumer {
        let name = |text: &str| text.to_owned();
        GoConsumer { stream: name("S"), name: name("SR_A"), entry: name("A"), filter: filter.map(str::to_owned) }
    }

    #[test]
    fn a_new_consumer_is_as_the_go_program_makes_it() {
        let config = consumer(Some("s.>")).config(None, 41);
        let expect = json!({"name": "SR_A", "durable_name": "SR_A", "description": "Choria Stream Replicator A",
            "ack_policy": "explicit", "ack_wait": 30_000_000_000u64, "max_ack_pending": 1, "max_deliver": -1,
            "replay_policy": "instant", "filter_subject": "s.>", "deliver_policy": "by_start_sequence", "opt_start_seq": 42});
        assert_eq!(config, expect);
    }

    #[test]
    fn one_that_was_there_keeps_everything_but_its_place() {
        let old = json!({"durable_name": "SR_A", "deliver_policy": "by_start_time", "opt_start_time": "2026-01-01T00:00:00Z",
            "ack_policy": "explicit", "max_waiting": 512});
        let expect = json!({"durable_name": "SR_A", "deliver_policy": "by_start_sequence", "opt_start_seq": 6,
            "ack_policy": "explicit", "max_waiting": 512});
        assert_eq!(consumer(None).config(Some(&old), 5), expect);
    }
}
