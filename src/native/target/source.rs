//! A target stream that has sources: the entry of a feed among them, how it is added and removed.
//!
//! An update replaces the whole configuration, and of two at the same time the later one wins. So every change is read again, and
//! made again where it was lost.

use nats_lane::{
    Dial, Error, ErrorKind, Lane,
    jetstream::{Api, StreamInfo},
};
use serde_json::{Value, json};

use super::{ADDED_AGAIN, Fit};
use crate::{
    config::Replication,
    copy::{
        Job,
        target::{join, mark, stream::pause},
    },
    names,
    native::FeedSubjects,
};

/// The origin below the prefixes of a feed, as a mirror or a source has it. A server that can, asks for a durable consumer:
/// it listens on the subject of that also after a long time without a feed, which can make it ask again at once.
pub(super) fn entry(origin: &str, subjects: &FeedSubjects, is_durable: bool) -> Value {
    let mut entry = json!({ "name": origin, "external": { "api": subjects.api(), "deliver": subjects.deliver() } });
    if is_durable {
        entry["consumer"] = json!({ "name": DURABLE, "deliver_subject": subjects.durable() });
    }
    entry
}

/// Name of the durable consumer; there is none of this name anywhere.
const DURABLE: &str = "SR";
/// Servers from this version on listen for a durable consumer while no feed is there. 2.14 has them, and does not.
const DURABLE_SINCE: (u32, u32) = (2, 15);

/// Whether a server of this version asks again at once for a durable consumer.
pub(super) fn can_be_durable(version: &str) -> bool {
    let mut parts = version.split(['.', '-']).map(|part| part.parse().unwrap_or(0));
    let mut next = || parts.next().unwrap_or(0);
    (next(), next()) >= DURABLE_SINCE
}

fn is_ours(source: &Value, subjects: &FeedSubjects) -> bool {
    source["external"]["api"].as_str() == Some(subjects.api().as_str())
}

fn sources(config: &Value) -> impl Iterator<Item = &Value> {
    config["sources"].as_array().into_iter().flatten()
}

/// Whether the stream has the source of this feed; an error if that was changed, or if it cannot have one.
pub(in crate::native) fn check(
    name: &str,
    info: &StreamInfo,
    origin: &str,
    subjects: &FeedSubjects,
) -> Result<Fit, Error> {
    if info.has("mirror") {
        return Err(Error::hold(format!("target stream `{name}` is a mirror, which can have no sources")));
    }
    if info.flag("discard_new_per_subject") && info.number("num_replicas") > 1 {
        return Err(Error::hold(format!(
            "target stream `{name}` has {} replicas and refuses new messages of a subject (`discard_new_per_subject`): its leader does \
             that after it has confirmed them, and they would be lost; switch that off, or use a replication of kind `copy`",
            info.number("num_replicas")
        )));
    }
    let mut ours = sources(&info.config).filter(|source| is_ours(source, subjects));
    let Some(source) = ours.next() else { return Ok(Fit::Lacks) };
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (is, deliver) = (text(&source["name"]), text(&source["external"]["deliver"]));
    let wrong = if ours.next().is_some() {
        format!("has several sources with the API prefix `{}`", subjects.api())
    } else if is != origin {
        format!("has a source `{is}` with the API prefix of this replication, whose source is `{origin}`")
    } else if deliver != subjects.deliver() {
        format!("has the source of this replication with the delivery prefix `{deliver}`, not `{}`", subjects.deliver())
    } else {
        return Ok(Fit::Asks);
    };
    Err(Error::hold(format!("target stream `{name}` {wrong}: the source was changed; remove it, or put it right")))
}

/// Adds the source of a feed to a stream that we created, or may change.
pub(super) async fn add(
    job: &Job,
    lane: &mut Lane,
    info: &StreamInfo,
    wanted: &Value,
    subjects: &FeedSubjects,
) -> Result<(), Error> {
    let replication = &job.replication;
    let (name, origin) = (&replication.target.stream, &replication.source.stream);
    let is_created = mark::is_ours(&info.config, &job.site, &replication.former);
    if !is_created && !replication.update_target {
        return Err(Error::hold(lacks(replication, subjects)));
    }
    let mut config = info.config.clone();
    if is_created {
        if !mark::names(info, &replication.id) {
            join::room(&mut config, wanted);
        }
        mark::put(&mut config, &job.site, &replication.id);
    }
    let mut all: Vec<Value> = sources(&config).cloned().collect();
    all.push(entry(origin, subjects, can_be_durable(&lane.info().version)));
    config["sources"] = all.into();
    Api::new(lane).update_stream(name, &config).await.map(drop).map_err(|error| {
        let lasting = error.kind == ErrorKind::Retry && error.api.as_ref().is_some_and(|api| api.code < 500);
        let kind = if lasting { ErrorKind::Hold } else { error.kind };
        Error { kind, ..error.context(format!("target stream `{name}` cannot be given the source `{origin}`")) }
    })
}

/// What to do about a stream without the source of a feed, which may not be changed.
pub(crate) fn lacks(replication: &Replication, subjects: &FeedSubjects) -> String {
    format!(
        "target stream `{}` has no source of this replication, and was created by others: set `target_update`, or give it a \
         source `{}` with the API prefix `{}` and the delivery prefix `{}`",
        replication.target.stream,
        replication.source.stream,
        subjects.api(),
        subjects.deliver()
    )
}

/// Removes the source of a replication of this site that is deleted from its target, where that may be changed; returns
/// whether there was one.
pub(crate) async fn remove(dial: &dyn Dial, replication: &Replication, site: &str) -> Result<bool, Error> {
    let connection = format!("{} {}", names::PROGRAM, replication.id);
    let mut lane = dial.dial(&replication.target.place, &connection).await?;
    let (subjects, name) = (FeedSubjects::of(site, &replication.id), &replication.target.stream);
    let mut removed = false;
    for _ in 0..ADDED_AGAIN {
        let Some(info) = Api::new(&mut lane).stream_info(name).await? else { return Ok(removed) };
        let mut config = info.config;
        if !sources(&config).any(|source| is_ours(source, &subjects)) {
            return Ok(removed);
        }
        if !mark::is_ours(&config, site, &replication.former) && !replication.update_target {
            return Ok(removed);
        }
        let others: Vec<Value> = sources(&config).filter(|source| !is_ours(source, &subjects)).cloned().collect();
        config["sources"] = others.into();
        Api::new(&mut lane).update_stream(name, &config).await?;
        removed = true;
        pause().await;
    }
    Err(Error::retry("the stream is changed by others all the time"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subjects() -> FeedSubjects {
        FeedSubjects::of("EAST", "S")
    }

    fn fit(config: Value) -> Result<Fit, String> {
        let stream: StreamInfo = serde_json::from_value(json!({"config": config, "state": {}})).unwrap();
        check("T", &stream, "S", &subjects()).map_err(|error| error.message)
    }

    #[test]
    fn the_source_of_a_feed_is_found_among_others() {
        let other = json!({"name": "S", "external": {"api": "$JS.hub.API", "deliver": "x"}});
        assert_eq!(fit(json!({"subjects": ["t.>"]})), Ok(Fit::Lacks));
        assert_eq!(fit(json!({ "sources": [other] })), Ok(Fit::Lacks));
        assert_eq!(fit(json!({ "sources": [other, entry("S", &subjects(), false)] })), Ok(Fit::Asks));
        let mut filtered = entry("S", &subjects(), false);
        filtered["filter_subject"] = "s.a".into();
        assert_eq!(fit(json!({ "sources": [filtered] })), Ok(Fit::Asks));
    }

    #[test]
    fn a_source_that_was_changed_is_named() {
        let check = |fields: Value, expect: &str| {
            let error = fit(fields).unwrap_err();
            assert!(error.contains(expect), "{error}");
        };
        check(json!({"mirror": {"name": "S"}}), "is a mirror");
        check(json!({"discard_new_per_subject": true, "num_replicas": 3}), "has 3 replicas and refuses new messages");
        check(json!({"sources": [entry("O", &subjects(), false)]}), "a source `O`");
        check(json!({"sources": [entry("S", &subjects(), false), entry("S", &subjects(), false)]}), "several sources");
        let mut elsewhere = entry("S", &subjects(), false);
        elsewhere["external"]["deliver"] = "x".into();
        check(json!({ "sources": [elsewhere] }), "delivery prefix `x`");
    }
}
