//! What the limits of an account and of a stream mean for a replication. Pure.

use nats_lane::jetstream::StreamInfo;
use serde_json::Value;

use super::{CheckOutcome, Judgement};
use crate::{copy::source::durable::Durable, nats::account::AccountInfo};

fn reached(used: i64, limit: i64) -> bool {
    limit > 0 && used >= limit
}

/// Whether a target stream that would be created fits into its account. `source_bytes` is the bound of the source, which
/// the copy may need a multiple of.
pub(super) fn planned(account: &AccountInfo, config: &Value, source_bytes: i64) -> Judgement {
    let failed = |text: String| Some((CheckOutcome::Failed, text));
    let replicas = config["num_replicas"].as_i64().unwrap_or(1);
    let Some(usage) = account.of_replicas(replicas) else {
        return failed(format!(
            "the account may not have streams of {replicas} replicas: it has no limits for `R{replicas}`"
        ));
    };
    let limits = &usage.limits;
    if reached(usage.streams, limits.max_streams) {
        return failed(format!(
            "the account has {} of at most {} streams, and the target stream would be one more: remove one that is not \
             needed, or raise the limit",
            usage.streams, limits.max_streams
        ));
    }
    let wanted = config["max_bytes"].as_i64().filter(|bytes| *bytes > 0);
    if limits.max_bytes_required && wanted.is_none() && source_bytes <= 0 {
        return failed(
            "the account requires `max_bytes` of each stream, and the source stream has none to derive it from: create the \
             target stream by hand with a `max_bytes`"
                .to_owned(),
        );
    }
    let (used, most, of_stream) = usage.bytes(config["storage"] == "memory");
    match wanted {
        Some(bytes) if of_stream > 0 && bytes > of_stream => failed(format!(
            "the target stream would be created with `max_bytes` {bytes}, and the account allows {of_stream}: create it by \
             hand with a smaller one, or raise the limit"
        )),
        Some(bytes) if most > 0 && bytes > most - used => failed(format!(
            "the target stream would be created with `max_bytes` {bytes}, and the account has {} of {most} bytes left: create \
             it by hand with a smaller one, or raise the limit",
            (most - used).max(0)
        )),
        _ => room(account, replicas, config["storage"] == "memory"),
    }
}

/// Whether the account has room for a message.
pub(super) fn room(account: &AccountInfo, replicas: i64, in_memory: bool) -> Judgement {
    let (used, most, _) = account.of_replicas(replicas)?.bytes(in_memory);
    reached(used, most).then(|| {
        let text = format!("the account uses {used} of {most} bytes: nothing can be stored before it has room again");
        (CheckOutcome::Warning, text)
    })
}

/// Whether the consumer that reads the source fits, and stays. One of them may be our own already, so these are warnings.
pub(super) fn source(account: Option<&AccountInfo>, name: &str, stream: &StreamInfo, begun: bool) -> Judgement {
    let warning = |text: String| Some((CheckOutcome::Warning, text));
    let inactive = stream.config.pointer("/consumer_limits/inactive_threshold").and_then(Value::as_u64);
    if let Some(nanos) = inactive.filter(|nanos| *nanos > 0 && Durable::is_needed(stream)) {
        let kept = std::time::Duration::from_nanos(nanos);
        return warning(format!(
            "stream `{name}` removes each consumer that is idle for {kept:?} (`consumer_limits`): a work queue or an \
             interest stream then removes messages that were not copied yet, or redelivers them"
        ));
    }
    if begun {
        return None;
    }
    let most = stream.number("max_consumers");
    if reached(stream.state.consumers, most) {
        return warning(format!(
            "stream `{name}` has {} of at most {most} consumers (`max_consumers`), and the copy needs one: remove one that is \
             not needed, or raise the limit",
            stream.state.consumers
        ));
    }
    let usage = account?.of_replicas(1)?;
    let most = usage.limits.max_consumers;
    reached(usage.consumers, most).then(|| {
        let text = format!(
            "the account has {} of at most {most} consumers, and the copy needs one: remove one that is not needed, or raise \
             the limit",
            usage.consumers
        );
        (CheckOutcome::Warning, text)
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn account(fields: Value) -> AccountInfo {
        serde_json::from_value(fields).unwrap()
    }

    #[track_caller]
    fn is(said: Judgement, expect: Option<(CheckOutcome, &str)>) {
        match (&said, expect) {
            (None, None) => {}
            (Some((outcome, text)), Some((wanted, part))) if *outcome == wanted && text.contains(part) => {}
            (said, expect) => panic!("{said:?} is not {expect:?}"),
        }
    }

    #[test]
    fn a_planned_stream_within_the_limits_of_the_account() {
        let failed = |part| Some((CheckOutcome::Failed, part));
        let config = json!({"num_replicas": 1, "storage": "file", "max_bytes": 1000});
        let check = |limits: Value, config: &Value, source_bytes, expect| {
            let used = json!({"streams": 2, "storage": 500, "limits": limits});
            is(planned(&account(used), config, source_bytes), expect);
        };
        check(json!({"max_streams": -1, "max_storage": -1}), &config, 0, None);
        check(json!({"max_streams": 2}), &config, 0, failed("2 of at most 2 streams"));
        check(json!({"max_storage": 1500}), &config, 0, None);
        check(json!({"max_storage": 1400}), &config, 0, failed("900 of 1400 bytes left"));
        check(json!({"storage_max_stream_bytes": 999}), &config, 0, failed("the account allows 999"));
        let unbounded = json!({"num_replicas": 1, "storage": "file"});
        check(json!({"max_bytes_required": true}), &unbounded, 0, failed("requires `max_bytes`"));
        check(json!({"max_bytes_required": true}), &unbounded, 5, None);
        check(json!({"max_storage": 500}), &unbounded, 0, Some((CheckOutcome::Warning, "500 of 500 bytes")));
        let tiered = account(json!({"tiers": {"R1": {}}}));
        is(planned(&tiered, &json!({"num_replicas": 3}), 0), failed("`R3`"));
    }

    #[test]
    fn a_consumer_of_the_source_within_its_limits() {
        let stream = |config: Value| -> StreamInfo {
            serde_json::from_value(json!({"config": config, "state": {"consumer_count": 2}})).unwrap()
        };
        let warning = |part| Some((CheckOutcome::Warning, part));
        is(source(None, "S", &stream(json!({"max_consumers": 3})), false), None);
        is(source(None, "S", &stream(json!({"max_consumers": 2})), false), warning("2 of at most 2 consumers"));
        is(source(None, "S", &stream(json!({"max_consumers": 2})), true), None);
        let limits = json!({"inactive_threshold": 5_000_000_000u64});
        is(source(None, "S", &stream(json!({"consumer_limits": limits})), false), None);
        let forgets = json!({"consumer_limits": limits, "retention": "interest"});
        is(source(None, "S", &stream(forgets), false), warning("is idle for 5s"));
        let full = account(json!({"consumers": 4, "limits": {"max_consumers": 4}}));
        is(source(Some(&full), "S", &stream(json!({})), false), warning("4 of at most 4 consumers"));
    }
}
