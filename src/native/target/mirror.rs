//! A target stream that is a mirror. Pure.

use nats_lane::{Error, jetstream::StreamInfo};
use serde_json::Value;

use crate::native::FeedSubjects;

/// Refuses a stream that is no mirror of this feed.
pub(in crate::native) fn check(
    name: &str,
    info: &StreamInfo,
    source: &str,
    subjects: &FeedSubjects,
) -> Result<(), Error> {
    let mirror = info.config.get("mirror").unwrap_or(&Value::Null);
    let external = |field: &str| mirror["external"][field].as_str().unwrap_or_default();
    let is = match (mirror["name"].as_str(), external("api")) {
        (None, _) => {
            return Err(Error::hold(format!(
                "target stream `{name}` is not a mirror: it was promoted, or created in another way; delete the \
                 replication, or the stream"
            )));
        }
        (Some(origin), _) if origin != source => format!("is a mirror of `{origin}`, not of `{source}`"),
        (_, "") => "is a mirror without an external API prefix".to_owned(),
        (_, api) if api != subjects.api() => format!("is a mirror with the API prefix `{api}`"),
        _ if external("deliver") != subjects.deliver() => {
            format!("is a mirror with the delivery prefix `{}`", external("deliver"))
        }
        _ => return Ok(()),
    };
    Err(Error::hold(format!(
        "target stream `{name}` {is}: this replication feeds a mirror of `{source}` with the API prefix `{}` and the \
         delivery prefix `{}`",
        subjects.api(),
        subjects.deliver()
    )))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn stream(config: &Value) -> StreamInfo {
        serde_json::from_value(json!({"config": config, "state": {}})).unwrap()
    }

    fn subjects() -> FeedSubjects {
        FeedSubjects::of("EAST", "S")
    }

    #[test]
    fn other_streams_are_refused_and_named() {
        let of = |mirror: Value| {
            let error = check("T", &stream(&json!({"name": "T", "mirror": mirror})), "S", &subjects());
            error.unwrap_err().message
        };
        assert!(of(Value::Null).contains("is not a mirror"));
        assert!(of(json!({"name": "O"})).contains("of `O`"));
        assert!(of(json!({"name": "S"})).contains("without an external"));
        assert!(of(json!({"name": "S", "external": {"api": "$JS.hub.API"}})).contains("`$JS.hub.API`"));
        assert!(of(json!({"name": "S", "external": {"api": subjects().api()}})).contains("delivery prefix ``"));
    }
}
