//! The target stream of a feed: it is a mirror, or has a source, whose origin is below the API prefix of the feed.

pub(super) mod mirror;
pub(super) mod source;

use nats_lane::{
    Error, Lane,
    jetstream::{Api, SourceProgress, StreamInfo},
};
use serde_json::{Value, json};

use super::FeedSubjects;
use crate::{
    config::{NativeKind, Replication},
    copy::{
        Job,
        source::durable::start_refused,
        target::{mark, stream::pause},
    },
};

/// Settings of the source that a new stream takes over, where they are set: it can hold what the source holds, and takes
/// the messages that the source takes.
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
/// Fields that servers before 2.11 and 2.12 ignore: the messages stay, and do not expire or add up.
const NEWER_FIELDS: [&str; 2] = ["allow_msg_ttl", "allow_msg_counter"];
/// How often the source is added while others change the stream.
const ADDED_AGAIN: usize = 20;

/// A source that cannot be fed, and why.
pub(crate) fn refuse_source(replication: &Replication, source: &StreamInfo) -> Option<String> {
    if source.flag("allow_msg_schedules") {
        let name = &replication.source.stream;
        return Some(format!(
            "source stream `{name}` schedules messages, which the kinds `mirror` and `source` do not support: use kind `copy`"
        ));
    }
    start_refused(replication, source)
}

/// What the target stream is for a feed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fit {
    /// It asks this feed.
    Asks,
    /// It has no source of this feed.
    Lacks,
}

/// What a target with a durable consumer holds of the source: its last sequence there; and where it listens.
pub(super) fn durable_state(kind: NativeKind, info: &StreamInfo, subjects: &FeedSubjects) -> Option<(u64, String)> {
    let api = subjects.api();
    let is_ours = |origin: &&Value| origin["external"]["api"] == api.as_str();
    let mut all = match kind {
        NativeKind::Mirror => info.config.get("mirror").into_iter().collect::<Vec<_>>(),
        NativeKind::Source => info.config["sources"].as_array().into_iter().flatten().collect(),
    };
    all.retain(|origin| is_ours(origin));
    let deliver = all.first()?["consumer"]["deliver_subject"].as_str()?.to_owned();
    let last = match kind {
        NativeKind::Mirror => info.state.last_seq,
        NativeKind::Source => taken(info, subjects).unwrap_or_default(),
    };
    Some((last, deliver))
}

/// The last sequence of the source that a target with sources has, where its server says that; `None` too where it has none.
pub(super) fn taken(info: &StreamInfo, subjects: &FeedSubjects) -> Option<u64> {
    let api = subjects.api();
    let is_ours = |progress: &&SourceProgress| progress.external.as_ref().is_some_and(|external| external.api == api);
    info.sources.iter().find(is_ours).map(|progress| progress.seq).filter(|seq| *seq > 0)
}

/// Whether a stream asks this feed; an error if it cannot be fed.
pub(crate) fn check(
    kind: NativeKind,
    replication: &Replication,
    info: &StreamInfo,
    subjects: &FeedSubjects,
) -> Result<Fit, Error> {
    let (name, origin) = (replication.target.stream.as_str(), replication.source.stream.as_str());
    match kind {
        NativeKind::Mirror => mirror::check(name, info, origin, subjects).map(|()| Fit::Asks),
        NativeKind::Source => source::check(name, info, origin, subjects),
    }
}

/// Reads the target stream, creates it or adds the source where that is missing and allowed, and refuses one that this feed
/// cannot feed. Returns what was done, for the log.
pub(super) async fn open(
    job: &Job,
    kind: NativeKind,
    lane: &mut Lane,
    source: &StreamInfo,
    subjects: &FeedSubjects,
) -> Result<(StreamInfo, Option<&'static str>), Error> {
    let (replication, mut done) = (&job.replication, None);
    let name = &replication.target.stream;
    for _ in 0..ADDED_AGAIN {
        let Some(info) = Api::new(lane).stream_info(name).await? else {
            if !replication.create_target {
                return Err(Error::hold(missing(kind, replication, subjects)));
            }
            if create(job, kind, lane, source, subjects).await? {
                done = Some("target stream created");
            }
            continue;
        };
        if let Some(why) = job.own_streams.refuse(name, &info.created) {
            return Err(Error::hold(why));
        }
        if check(kind, replication, &info, subjects)? == Fit::Asks {
            return Ok((info, done));
        }
        source::add(job, lane, &info, &config(kind, replication, source, subjects, false), subjects).await?;
        done = Some("source added to the target stream");
        // Others may change the stream at the same time, and the last one wins.
        pause().await;
    }
    Err(Error::retry(format!("target stream `{name}` is changed by others all the time")))
}

fn missing(kind: NativeKind, replication: &Replication, subjects: &FeedSubjects) -> String {
    let as_what = match kind {
        NativeKind::Mirror => "as a mirror of",
        NativeKind::Source => "with a source",
    };
    format!(
        "target stream `{}` does not exist: create it {as_what} `{}` with the API prefix `{}` and the delivery prefix `{}`",
        replication.target.stream,
        replication.source.stream,
        subjects.api(),
        subjects.deliver()
    )
}

/// Creates the stream; `false` if another one was faster.
async fn create(
    job: &Job,
    kind: NativeKind,
    lane: &mut Lane,
    source: &StreamInfo,
    subjects: &FeedSubjects,
) -> Result<bool, Error> {
    let replication = &job.replication;
    let is_durable = source::can_be_durable(&lane.info().version);
    let mut config = config(kind, replication, source, subjects, is_durable);
    mark::put(&mut config, &job.site, &replication.id);
    loop {
        match Api::new(lane).create_stream(&replication.target.stream, &config).await {
            Ok(_) => return Ok(true),
            Err(error) if error.is_api(NAME_IN_USE) => return Ok(false),
            Err(error) => {
                let replicas = config["num_replicas"].as_i64().unwrap_or(1);
                if replicas > 1 && TOO_MANY_REPLICAS.iter().any(|code| error.is_api(*code)) {
                    config["num_replicas"] = if replicas > 3 { 3 } else { 1 }.into();
                } else if error.is_api(INVALID_JSON) && NEWER_FIELDS.iter().any(|field| config[*field] == true) {
                    if let Some(fields) = config.as_object_mut() {
                        fields.retain(|field, _| !NEWER_FIELDS.contains(&field.as_str()));
                    }
                } else {
                    let name = &replication.target.stream;
                    return Err(error.context(format!("cannot create target stream `{name}` for kind `{kind}`")));
                }
            }
        }
    }
}

/// The settings of a new stream, whatever its server can.
pub(crate) fn settings(kind: NativeKind, replication: &Replication, source: &StreamInfo, site: &str) -> Value {
    config(kind, replication, source, &FeedSubjects::of(site, &replication.id), false)
}

/// The configuration of a new stream.
fn config(
    kind: NativeKind,
    replication: &Replication,
    source: &StreamInfo,
    subjects: &FeedSubjects,
    is_durable: bool,
) -> Value {
    let mut config = json!({
        "name": replication.target.stream,
        "retention": "limits",
        "discard": "old",
        "num_replicas": source.number("num_replicas").max(1),
    });
    let origin = source::entry(&replication.source.stream, subjects, is_durable);
    match kind {
        NativeKind::Mirror => config["mirror"] = origin,
        NativeKind::Source => config["sources"] = json!([origin]),
    }
    let counter = (kind == NativeKind::Source).then_some("allow_msg_counter");
    for field in TAKEN_OVER.into_iter().chain(counter) {
        if let Some(value) = source.config.get(field).filter(|value| !value.is_null() && **value != false) {
            config[field] = value.clone();
        }
    }
    if source.flag("allow_direct") {
        let direct = if kind == NativeKind::Mirror { "mirror_direct" } else { "allow_direct" };
        config[direct] = true.into();
    }
    config
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::parse;

    fn stream(config: &Value) -> StreamInfo {
        serde_json::from_value(json!({"config": config, "state": {}})).unwrap()
    }

    fn subjects() -> FeedSubjects {
        FeedSubjects::of("EAST", "S")
    }

    fn replication() -> Replication {
        let document = json!({"stream": "S", "source_url": "nats://a", "target_url": "nats://b", "target_stream": "T"});
        parse(document.to_string().as_bytes(), "EAST").unwrap()
    }

    #[test]
    fn a_new_target_can_hold_what_the_source_holds() {
        let source = json!({"name": "S", "subjects": ["s.>"], "storage": "file", "max_age": 5, "max_msgs": -1,
            "num_replicas": 3, "discard": "new", "allow_direct": true, "allow_rollup_hdrs": true, "deny_delete": true,
            "duplicate_window": 7, "allow_msg_ttl": false, "allow_msg_counter": true});
        let origin = json!({"name": "S", "external": {"api": subjects().api(), "deliver": subjects().deliver()}});
        let both = json!({"name": "T", "storage": "file", "retention": "limits", "discard": "old", "num_replicas": 3,
            "max_age": 5, "max_msgs": -1, "allow_rollup_hdrs": true});
        for (kind, fields) in [
            (NativeKind::Mirror, json!({"mirror": origin, "mirror_direct": true})),
            (NativeKind::Source, json!({"sources": [origin], "allow_direct": true, "allow_msg_counter": true})),
        ] {
            let config = config(kind, &replication(), &stream(&source), &subjects(), false);
            let mut expect = both.clone();
            expect.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
            assert_eq!(config, expect);
            assert_eq!(check(kind, &replication(), &stream(&config), &subjects()).unwrap(), Fit::Asks);
        }
    }

    #[test]
    fn sources_that_are_not_supported_are_refused() {
        assert!(refuse_source(&replication(), &stream(&json!({"allow_msg_schedules": true}))).is_some());
        for retention in ["limits", "workqueue", "interest"] {
            assert_eq!(refuse_source(&replication(), &stream(&json!({ "retention": retention }))), None);
        }
    }
}
