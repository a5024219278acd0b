//! What a mirror or a source asks its origin for, and the answer. Pure. As seen at nats-server 2.10.26 to 2.15.1
//! (`setupMirrorConsumer`, `trySetupSourceConsumer`).
//!
//! The answer has no header `Nats-Stream-Identity`. Servers from 2.15 on copy everything again when the identity of an origin
//! changes, and a stream that was restored from a backup has another one: whether the origin is another stream is for
//! [`witness`](super::witness) to say.

use chrono::{DateTime, Utc};
use serde::Deserialize;
use serde_json::{Map, Value, json};

const RESPONSE: &str = "io.nats.jetstream.api.v1.consumer_create_response";
const RESET_RESPONSE: &str = "io.nats.jetstream.api.v1.consumer_reset_response";
/// Error code of an API that is not available: the target tries again later.
const UNAVAILABLE: u32 = 10008;

/// Where the target wants to begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FeedStart {
    /// It holds nothing, and takes what its origin has.
    All,
    /// With this sequence of the source, at least 1: it holds everything before it.
    From(u64),
    /// It holds nothing, and takes what was stored from this time on (`opt_start_time` of a stream made by hand).
    Time(DateTime<Utc>),
    /// It does not say: a durable consumer knows. What the target holds is to be read there.
    AfterItsLast,
}

/// One request for a consumer.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ConsumerRequest {
    /// Where the answer goes.
    pub reply: String,
    /// The stream that is asked for.
    pub stream: String,
    pub wanted: FeedStart,
    /// The subjects that the target wants, where its configuration names them; empty for all.
    pub filters: Vec<String>,
    /// The subject that the target offers to listen on; empty for the one of its configuration.
    pub deliver: String,
    /// Whether the target listens on the subject of the answer instead (2.14 and later).
    pub takes_subject: bool,
    /// It has a durable consumer, which begins again.
    is_reset: bool,
    config: Map<String, Value>,
}

#[derive(Deserialize)]
struct Body {
    #[serde(default)]
    stream_name: String,
    config: Map<String, Value>,
}

/// A request that cannot be served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Unserved {
    /// Where the answer goes.
    pub reply: String,
    pub why: String,
}

/// Reads a message to the API prefix: `None` if it is no request for a consumer, an error if it is one that cannot be served.
pub(super) fn read(
    api: &str,
    subject: &[u8],
    reply: &[u8],
    payload: &[u8],
) -> Option<Result<ConsumerRequest, Unserved>> {
    let subject = str::from_utf8(subject).ok()?;
    let call = subject.strip_prefix(api)?;
    let reply = str::from_utf8(reply).ok().filter(|reply| !reply.is_empty())?.to_owned();
    if let Some(rest) = call.strip_prefix(".CONSUMER.RESET.") {
        return Some(Ok(ConsumerRequest::reset(rest.split('.').next().unwrap_or_default(), reply)));
    }
    let rest = call.strip_prefix(".CONSUMER.CREATE.")?;
    let stream = rest.split('.').next().unwrap_or_default();
    Some(parse(stream, &reply, payload).map_err(|why| Unserved { reply, why }))
}

fn parse(stream: &str, reply: &str, payload: &[u8]) -> Result<ConsumerRequest, String> {
    let body: Body = serde_json::from_slice(payload).map_err(|error| format!("it cannot be read: {error}"))?;
    let text = |field: &str| body.config.get(field).and_then(Value::as_str).unwrap_or_default();
    let one = Some(text("filter_subject")).filter(|filter| !filter.is_empty() && *filter != ">");
    let many = body.config.get("filter_subjects").and_then(Value::as_array).into_iter().flatten();
    let filters: Vec<String> = one.into_iter().chain(many.filter_map(Value::as_str)).map(str::to_owned).collect();
    let wanted = match text("deliver_policy") {
        "" | "all" => FeedStart::All,
        "by_start_sequence" => match body.config.get("opt_start_seq").and_then(Value::as_u64) {
            Some(0) | None => FeedStart::All,
            Some(seq) => FeedStart::From(seq),
        },
        "by_start_time" => match DateTime::parse_from_rfc3339(text("opt_start_time")) {
            Ok(time) => FeedStart::Time(time.with_timezone(&Utc)),
            Err(error) => return Err(format!("it wants to start at a time that cannot be read: {error}")),
        },
        other => return Err(format!("it wants to start by `{other}`, which a feed does not serve")),
    };
    let deliver = text("deliver_subject").to_owned();
    if deliver.is_empty() || deliver.contains(|c: char| c.is_whitespace() || "*>".contains(c)) {
        return Err("it names no subject to deliver to".to_owned());
    }
    let takes_subject = body.config.get("sourcing").and_then(Value::as_bool).unwrap_or_default();
    let stream = if body.stream_name.is_empty() { stream.to_owned() } else { body.stream_name };
    Ok(ConsumerRequest {
        reply: reply.to_owned(),
        stream,
        wanted,
        filters,
        deliver,
        takes_subject,
        is_reset: false,
        config: body.config,
    })
}

impl ConsumerRequest {
    /// A request for the durable consumer of the configuration, to begin after what the target holds. It has no body.
    fn reset(stream: &str, reply: String) -> Self {
        let config = json!({
            "ack_policy": "flow_control",
            "ack_wait": 79_200_000_000_000_u64,
            "deliver_policy": "all",
            "flow_control": true,
            "idle_heartbeat": 1_000_000_000,
            "max_ack_pending": 100_000,
            "replay_policy": "instant",
        });
        Self {
            reply,
            stream: stream.to_owned(),
            wanted: FeedStart::AfterItsLast,
            filters: Vec::new(),
            deliver: String::new(),
            takes_subject: false,
            is_reset: true,
            config: config.as_object().cloned().unwrap_or_default(),
        }
    }

    /// Adds what a request for a durable consumer does not say: the last sequence that the target holds, and where it listens.
    pub fn begins_after(&mut self, last: u64, deliver: String) {
        self.wanted = if last == 0 { FeedStart::All } else { FeedStart::From(last + 1) };
        self.deliver = deliver;
    }

    /// The consumer that the target is given. A mirror skips to `before` at once, for good: that is the sequence before the
    /// first one that will be delivered, and never more.
    pub fn answer(&self, consumer: &str, deliver: &str, before: u64, pending: u64) -> String {
        let mut config = self.config.clone();
        config.insert("name".to_owned(), consumer.into());
        config.insert("deliver_subject".to_owned(), deliver.into());
        let mut answer = json!({
            "type": if self.is_reset { RESET_RESPONSE } else { RESPONSE },
            "stream_name": self.stream,
            "name": consumer,
            "config": config,
            "delivered": { "consumer_seq": 0, "stream_seq": before },
            "ack_floor": { "consumer_seq": 0, "stream_seq": 0 },
            "num_ack_pending": 0,
            "num_redelivered": 0,
            "num_waiting": 0,
            "num_pending": pending,
        });
        if self.is_reset {
            answer["reset_seq"] = (before + 1).into();
        }
        answer.to_string()
    }
}

/// The answer to a request that is not served: the target shows the text in `error` of the mirror or the source.
pub(super) fn refusal(why: &str) -> String {
    json!({
        "type": RESPONSE,
        "error": { "code": 503, "err_code": UNAVAILABLE, "description": why },
    })
    .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    const API: &str = "$SR.1.API";

    /// As 2.15.1 asks.
    const SEEN: &str = r#"{"stream_name":"ORDERS","config":{"name":"JS_MIRROR_x","deliver_subject":"$SR.1.D.M.abc",
        "deliver_policy":"by_start_sequence","opt_start_seq":18,"ack_policy":"none","ack_wait":79200000000000,
        "max_deliver":1,"replay_policy":"instant","flow_control":true,"idle_heartbeat":1000000000,"direct":true,
        "sourcing":true},"action":""}"#;

    fn request(subject: &str, payload: &str) -> Option<Result<ConsumerRequest, Unserved>> {
        read(API, subject.as_bytes(), b"$JSC.R.x", payload.as_bytes())
    }

    #[test]
    fn what_a_mirror_asks_for_is_read() {
        let asked = request("$SR.1.API.CONSUMER.CREATE.ORDERS", SEEN).unwrap().unwrap();
        assert_eq!(asked.wanted, FeedStart::From(18));
        assert_eq!((asked.stream.as_str(), asked.deliver.as_str()), ("ORDERS", "$SR.1.D.M.abc"));
        assert!(asked.takes_subject);
        let named = request("$SR.1.API.CONSUMER.CREATE.ORDERS.JS_MIRROR_x", SEEN).unwrap().unwrap();
        assert_eq!(named.stream, "ORDERS");
        let all = SEEN
            .replace(r#""by_start_sequence","opt_start_seq":18"#, r#""all""#)
            .replace(r#""sourcing":true"#, r#""sourcing":false"#);
        let all = request("$SR.1.API.CONSUMER.CREATE.ORDERS", &all).unwrap().unwrap();
        assert!(all.wanted == FeedStart::All && !all.takes_subject);
    }

    #[test]
    fn a_durable_consumer_begins_where_the_target_is() {
        let asked = request("$SR.1.API.CONSUMER.RESET.ORDERS.SR", "").unwrap().unwrap();
        assert_eq!((asked.wanted, asked.stream.as_str()), (FeedStart::AfterItsLast, "ORDERS"));
        assert!(asked.deliver.is_empty() && !asked.takes_subject);
        let answer: Value = serde_json::from_str(&asked.answer("SR1", "$SR.1.D.S", 17, 3)).unwrap();
        assert_eq!((&answer["reset_seq"], &answer["delivered"]["stream_seq"]), (&json!(18), &json!(17)));
        assert_eq!((&answer["name"], &answer["config"]["deliver_subject"]), (&json!("SR1"), &json!("$SR.1.D.S")));
    }

    #[test]
    fn filters_and_a_start_time_are_read() {
        let with = |from: &str, to: &str| {
            request("$SR.1.API.CONSUMER.CREATE.ORDERS", &SEEN.replace(from, to)).unwrap().unwrap()
        };
        let filters = |fields: &str| with(r#""sourcing":true"#, fields).filters;
        assert_eq!(filters(r#""filter_subject":"a.>""#), ["a.>"]);
        assert_eq!(filters(r#""filter_subjects":["a","b.*"]"#), ["a", "b.*"]);
        assert!(filters(r#""filter_subject":"""#).is_empty() && filters(r#""filter_subject":">""#).is_empty());
        let time = r#""by_start_time","opt_start_time":"2026-11-30T00:00:01Z""#;
        let asked = with(r#""by_start_sequence","opt_start_seq":18"#, time);
        assert_eq!(asked.wanted, FeedStart::Time(DateTime::from_timestamp(1_795_996_801, 0).unwrap()));
    }

    #[test]
    fn what_is_no_request_for_a_consumer_is_left_alone() {
        for subject in
            ["$SR.1.API.CONSUMER.DELETE.ORDERS.x", "$SR.1.API.STREAM.INFO.ORDERS", "$SR.2.API.CONSUMER.CREATE.O"]
        {
            assert!(request(subject, SEEN).is_none(), "{subject}");
        }
        assert!(read(API, b"$SR.1.API.CONSUMER.CREATE.ORDERS", b"", SEEN.as_bytes()).is_none(), "no reply");
    }

    #[test]
    fn what_cannot_be_served_says_why() {
        let check = |from: &str, to: &str, expect: &str| {
            let error = request("$SR.1.API.CONSUMER.CREATE.ORDERS", &SEEN.replace(from, to)).unwrap().unwrap_err();
            assert!(error.why.contains(expect) && error.reply == "$JSC.R.x", "{error:?}");
        };
        check("by_start_sequence", "by_start_time", "cannot be read");
        check("by_start_sequence", "last", "`last`");
        check("$SR.1.D.M.abc", "", "no subject");
        check("$SR.1.D.M.abc", "$SR.1.D.>", "no subject");
        check("{\"stream_name\"", "[\"stream_name\"", "cannot be read");
    }

    /// A mirror skips to `delivered` at once and ignores what comes before it.
    #[test]
    fn the_answer_names_the_sequence_before_the_first() {
        let asked = request("$SR.1.API.CONSUMER.CREATE.ORDERS", SEEN).unwrap().unwrap();
        let answer: Value = serde_json::from_str(&asked.answer("SR1", "$SR.1.D.SR1", 17, 3)).unwrap();
        assert_eq!(answer["delivered"], json!({"consumer_seq": 0, "stream_seq": 17}));
        assert_eq!(answer["name"], "SR1");
        assert_eq!(answer["config"]["deliver_subject"], "$SR.1.D.SR1");
        assert_eq!(answer["config"]["flow_control"], true);
    }

    /// The same bytes in every run: a request is cut, changed and lengthened at any place.
    #[test]
    fn any_bytes_are_a_request_or_refused() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = move |below: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % below as u64) as usize
        };
        let mut read_again = 0;
        for _ in 0..20_000 {
            let mut payload = SEEN.as_bytes().to_vec();
            for _ in 0..random(4) {
                let at = random(payload.len() + 1);
                match random(4) {
                    0 if at > 0 => payload.truncate(at),
                    1 if at < payload.len() => payload[at] = random(256) as u8,
                    2 if at < payload.len() => drop(payload.remove(at)),
                    _ => payload.insert(at, b"{}[]\",:0.*> \xff"[random(13)]),
                }
            }
            let mut subject = b"$SR.1.API.CONSUMER.CREATE.ORDERS".to_vec();
            if random(4) == 0 {
                let at = random(subject.len());
                subject[at] = random(256) as u8;
            }
            if let Some(Ok(asked)) = read(API, &subject, b"r", &payload) {
                assert!(!asked.deliver.is_empty() && !asked.deliver.contains([' ', '*', '>', '\r', '\n']), "{asked:?}");
                let answer: Value = serde_json::from_str(&asked.answer("C", "D.C", 7, 1)).unwrap();
                assert_eq!(answer["delivered"]["stream_seq"], 7);
                read_again += 1;
            }
        }
        assert!(read_again > 1_000, "{read_again} of them");
    }
}
