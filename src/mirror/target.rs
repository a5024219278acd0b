//! The target stream of a feed: a mirror whose origin is below the API prefix of the feed.

use nats_lane::{
    Error, Lane,
    jetstream::{Api, StreamInfo},
};
use serde_json::{Value, json};

use super::FeedSubjects;
use crate::copy::{Job, target::mark};

/// Settings of the source that a mirror takes over when it is created, where they are set: it can hold what the source
/// holds, and takes the messages that the source takes.
const TAKEN_OVER: [&str; 8] = [
    "storage",
    "compression",
    "max_age",
    "max_msgs",
    "max_bytes",
    "max_msgs_per_subject",
    "allow_rollup_hdrs",
    "allow_msg_ttl",
];
/// Another one has created the stream.
const NAME_IN_USE: u32 = 10058;
/// Not clustered, or not enough servers for the replicas.
const TOO_MANY_REPLICAS: [u32; 2] = [10074, 10005];
/// A field that the server does not know (from 2.12 on).
const INVALID_JSON: u32 = 10025;

/// A source that cannot be fed, and why.
pub(crate) fn refuse_source(name: &str, source: &StreamInfo) -> Option<String> {
    let retention = source.text("retention");
    if matches!(retention, "workqueue" | "interest") {
        return Some(format!(
            "source stream `{name}` has retention `{retention}`, which kind `mirror` does not support: use kind `copy`"
        ));
    }
    if source.flag("allow_msg_schedules") {
        return Some(format!("source stream `{name}` schedules messages, which kind `mirror` does not support"));
    }
    None
}

/// Reads the target stream, creates it if it is missing and may be created, and refuses one that is no mirror of this feed.
/// Returns whether it was created.
pub(super) async fn open(
    job: &Job,
    lane: &mut Lane,
    source: &StreamInfo,
    subjects: &FeedSubjects,
) -> Result<(StreamInfo, bool), Error> {
    let (replication, mut created) = (&job.replication, false);
    let name = &replication.target.stream;
    loop {
        if let Some(info) = Api::new(lane).stream_info(name).await? {
            if let Some(why) = job.own_streams.refuse(name, &info.created) {
                return Err(Error::hold(why));
            }
            check(name, &info, &replication.source.stream, subjects)?;
            return Ok((info, created));
        }
        if !replication.create_target {
            return Err(Error::hold(format!(
                "target stream `{name}` does not exist: create it as a mirror of `{}` with the API prefix `{}` and the \
                 delivery prefix `{}`",
                replication.source.stream,
                subjects.api(),
                subjects.deliver()
            )));
        }
        created = create(job, lane, source, subjects).await?;
    }
}

/// Refuses a stream that is no mirror of this feed.
pub(crate) fn check(name: &str, info: &StreamInfo, source: &str, subjects: &FeedSubjects) -> Result<(), Error> {
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

/// Creates the mirror; `false` if another one was faster.
async fn create(job: &Job, lane: &mut Lane, source: &StreamInfo, subjects: &FeedSubjects) -> Result<bool, Error> {
    let replication = &job.replication;
    let mut config = config(&replication.target.stream, &replication.source.stream, source, subjects);
    mark::put(&mut config, &job.site, &replication.id);
    loop {
        match Api::new(lane).create_stream(&replication.target.stream, &config).await {
            Ok(_) => return Ok(true),
            Err(error) if error.is_api(NAME_IN_USE) => return Ok(false),
            Err(error) => {
                let replicas = config["num_replicas"].as_i64().unwrap_or(1);
                if replicas > 1 && TOO_MANY_REPLICAS.iter().any(|code| error.is_api(*code)) {
                    config["num_replicas"] = if replicas > 3 { 3 } else { 1 }.into();
                } else if error.is_api(INVALID_JSON) && config["allow_msg_ttl"] == true {
                    // As on servers before 2.11, which leave it out: the messages stay, and do not expire.
                    if let Some(fields) = config.as_object_mut() {
                        fields.remove("allow_msg_ttl");
                    }
                } else {
                    let name = &replication.target.stream;
                    return Err(error.context(format!("cannot create target stream `{name}` as a mirror")));
                }
            }
        }
    }
}

/// The configuration of a new mirror.
fn config(name: &str, origin: &str, source: &StreamInfo, subjects: &FeedSubjects) -> Value {
    let mut config = json!({
        "name": name,
        "retention": "limits",
        "discard": "old",
        "num_replicas": source.number("num_replicas").max(1),
        "mirror": { "name": origin, "external": { "api": subjects.api(), "deliver": subjects.deliver() } },
    });
    for field in TAKEN_OVER {
        if let Some(value) = source.config.get(field).filter(|value| !value.is_null() && **value != false) {
            config[field] = value.clone();
        }
    }
    if source.flag("allow_direct") {
        config["mirror_direct"] = true.into();
    }
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(config: &Value) -> StreamInfo {
        serde_json::from_value(json!({"config": config, "state": {}})).unwrap()
    }

    fn subjects() -> FeedSubjects {
        FeedSubjects::of("EAST", "S")
    }

    #[test]
    fn a_new_mirror_can_hold_what_the_source_holds() {
        let source = json!({"name": "S", "subjects": ["s.>"], "storage": "file", "max_age": 5, "max_msgs": -1,
            "num_replicas": 3, "discard": "new", "allow_direct": true, "allow_rollup_hdrs": true, "deny_delete": true,
            "duplicate_window": 7, "allow_msg_ttl": false});
        let config = config("T", "S", &stream(&source), &subjects());
        let expect = json!({"name": "T", "storage": "file", "retention": "limits", "discard": "old", "num_replicas": 3,
            "max_age": 5, "max_msgs": -1, "allow_rollup_hdrs": true, "mirror_direct": true,
            "mirror": {"name": "S", "external": {"api": subjects().api(), "deliver": subjects().deliver()}}});
        assert_eq!(config, expect);
        assert!(check("T", &stream(&config), "S", &subjects()).is_ok());
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

    #[test]
    fn sources_that_are_not_supported_are_refused() {
        for config in
            [json!({"retention": "workqueue"}), json!({"retention": "interest"}), json!({"allow_msg_schedules": true})]
        {
            assert!(refuse_source("S", &stream(&config)).is_some(), "{config}");
        }
        assert_eq!(refuse_source("S", &stream(&json!({"retention": "limits"}))), None);
    }
}
