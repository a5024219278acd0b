//! What a mirror asks its origin for, and the answer. Pure. As seen at nats-server 2.10.26 to 2.15.1 (`setupMirrorConsumer`).

use serde::Deserialize;
use serde_json::{Map, Value, json};

const RESPONSE: &str = "io.nats.jetstream.api.v1.consumer_create_response";
/// Error code of an API that is not available: the target tries again later.
const UNAVAILABLE: u32 = 10008;

/// Where the mirror wants to begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MirrorStart {
    /// It holds nothing, and takes what its origin has.
    All,
    /// With this sequence of the source, at least 1: it holds everything before it.
    From(u64),
}

/// One request for a consumer.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ConsumerRequest {
    /// Where the answer goes.
    pub reply: String,
    /// The stream that is asked for.
    pub stream: String,
    pub wanted: MirrorStart,
    /// The subject that the target offers to listen on.
    pub deliver: String,
    /// Whether the target listens on the subject of the answer instead (2.14 and later).
    pub takes_subject: bool,
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
    let rest = subject.strip_prefix(api)?.strip_prefix(".CONSUMER.CREATE.")?;
    let reply = str::from_utf8(reply).ok().filter(|reply| !reply.is_empty())?.to_owned();
    let stream = rest.split('.').next().unwrap_or_default();
    Some(parse(stream, &reply, payload).map_err(|why| Unserved { reply, why }))
}

fn parse(stream: &str, reply: &str, payload: &[u8]) -> Result<ConsumerRequest, String> {
    let body: Body = serde_json::from_slice(payload).map_err(|error| format!("it cannot be read: {error}"))?;
    let text = |field: &str| body.config.get(field).and_then(Value::as_str).unwrap_or_default();
    let filtered = !text("filter_subject").is_empty()
        || body.config.get("filter_subjects").and_then(Value::as_array).is_some_and(|filters| !filters.is_empty());
    if filtered {
        return Err(
            "the mirror has a filter or subject transforms, which a feed does not serve: create it without".to_owned()
        );
    }
    let wanted = match text("deliver_policy") {
        "" | "all" => MirrorStart::All,
        "by_start_sequence" => match body.config.get("opt_start_seq").and_then(Value::as_u64) {
            Some(0) | None => MirrorStart::All,
            Some(seq) => MirrorStart::From(seq),
        },
        other => {
            return Err(format!(
                "the mirror wants to start by `{other}`, which a feed does not serve: create it without `opt_start_time`, \
                 and set `start_time` in the document"
            ));
        }
    };
    let deliver = text("deliver_subject").to_owned();
    if deliver.is_empty() || deliver.contains(|c: char| c.is_whitespace() || "*>".contains(c)) {
        return Err("it names no subject to deliver to".to_owned());
    }
    let takes_subject = body.config.get("sourcing").and_then(Value::as_bool).unwrap_or_default();
    let stream = if body.stream_name.is_empty() { stream.to_owned() } else { body.stream_name };
    Ok(ConsumerRequest { reply: reply.to_owned(), stream, wanted, deliver, takes_subject, config: body.config })
}

impl ConsumerRequest {
    /// The consumer that the mirror is given. It skips to `before` at once, for good: that is the sequence before the first
    /// one that will be delivered, and never more.
    pub fn answer(&self, consumer: &str, deliver: &str, before: u64, pending: u64) -> String {
        let mut config = self.config.clone();
        config.insert("name".to_owned(), consumer.into());
        config.insert("deliver_subject".to_owned(), deliver.into());
        json!({
            "type": RESPONSE,
            "stream_name": self.stream,
            "name": consumer,
            "config": config,
            "delivered": { "consumer_seq": 0, "stream_seq": before },
            "ack_floor": { "consumer_seq": 0, "stream_seq": 0 },
            "num_ack_pending": 0,
            "num_redelivered": 0,
            "num_waiting": 0,
            "num_pending": pending,
        })
        .to_string()
    }
}

/// The answer to a request that is not served: the target shows the text in `mirror.error` of its stream.
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
        assert_eq!(asked.wanted, MirrorStart::From(18));
        assert_eq!((asked.stream.as_str(), asked.deliver.as_str()), ("ORDERS", "$SR.1.D.M.abc"));
        assert!(asked.takes_subject);
        let named = request("$SR.1.API.CONSUMER.CREATE.ORDERS.JS_MIRROR_x", SEEN).unwrap().unwrap();
        assert_eq!(named.stream, "ORDERS");
        let all = SEEN
            .replace(r#""by_start_sequence","opt_start_seq":18"#, r#""all""#)
            .replace(r#""sourcing":true"#, r#""sourcing":false"#);
        let all = request("$SR.1.API.CONSUMER.CREATE.ORDERS", &all).unwrap().unwrap();
        assert!(all.wanted == MirrorStart::All && !all.takes_subject);
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
        check("by_start_sequence", "by_start_time", "start_time");
        check(r#""sourcing":true"#, r#""filter_subject":"a.>""#, "filter");
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
}
