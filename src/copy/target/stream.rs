//! The target stream: its abilities, and its creation where it is missing.
//!
//! * `STREAM.UPDATE` has no compare-and-swap. So a change is read again after 100 to 200 ms, until it lasts; a create
//!   that lost the race (error 10058) reads the stream too.
//! * From 2.12 the API refuses a request with a field that its server does not know (error 10025); older servers ignore
//!   the field. A create or update is handled by the metadata leader, which may be older than the stream's leader. So
//!   settings of new versions are sent only to servers that know them.
//! * An update sends the whole configuration. It is the JSON of `STREAM.INFO` with changes, so that no unknown field is
//!   lost.

use nats_lane::{
    DEFAULT_API_PREFIX, Error, ErrorKind, Lane, ServerInfo,
    backoff::jitter,
    entropy as chance,
    jetstream::{Api, StreamInfo},
};
use serde_json::{Map, Value, json};
use tokio::time::{Duration, sleep};

use crate::{
    config::{Replication, patterns},
    copy::{
        Job,
        source::learn,
        target::{
            headers::Allowed,
            join, mark, mode,
            subjects::{self, Learned},
            target_limits::{self, Room},
        },
    },
    status::{TargetMode, Transport},
};

/// Source settings that a created target takes over. Everything else (placement, mirrors, sources,
/// republish, transforms) belongs to the stream it was written for. A created target always has limits retention:
/// its consumers are not known yet.
const TAKEN_OVER: [&str; 8] = [
    "storage",
    "max_age",
    "duplicate_window",
    "compression",
    "deny_delete",
    "deny_purge",
    "allow_rollup_hdrs",
    "allow_direct",
];

/// Source settings that an existing target gets where it lacks them, if it may be changed: no stored message is
/// affected.
const SWITCHED_ON: [&str; 3] = ["allow_rollup_hdrs", "allow_msg_ttl", "allow_direct"];

/// Server version from which fast-ingest batches exist.
const FAST_INGEST_SINCE: (u32, u32) = (2, 14);
/// API level of the leader that goes with it (ADR-44).
pub(crate) const API_LEVEL_2_14: u32 = 4;
/// The same for messages that carry a time to live; older servers report no level.
const API_LEVEL_2_11: u32 = 1;
/// Server version from which messages may carry a time to live.
const TTL_SINCE: (u32, u32) = (2, 11);
/// Error of the API from 2.12 on for a field that its server does not know; older servers ignore the field.
const INVALID_JSON: u32 = 10025;
/// Error of a create: a stream of this name exists, with another configuration.
const NAME_IN_USE: u32 = 10058;
const SUBJECTS_OVERLAP: u32 = 10065;

/// How often the stream is read until nothing has to be changed.
const ATTEMPTS: u32 = 10;
/// Time between a change and the check whether it lasted, and between two attempts.
const PAUSE: Duration = Duration::from_millis(200);
/// Most subjects in one message, and most subjects for which other streams are searched.
const MOST_SHOWN: usize = 8;
const MOST_ASKED: usize = 64;

/// How to write to the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Abilities {
    /// How messages are published.
    pub transport: Transport,
    /// Whether there may be other writers, by the configuration of the stream.
    pub mode: TargetMode,
    /// Which headers it accepts.
    pub allowed: Allowed,
}

impl Abilities {
    /// Takes over that another writer was detected.
    pub fn share(&mut self, mode: TargetMode) {
        if mode == TargetMode::Shared {
            self.mode = mode;
            self.allowed.rollup_all = false;
        }
    }

    /// Each message gets an ack of its own.
    pub fn ack_singly(&mut self) {
        self.transport = Transport::Pipelined;
    }
}

/// Determines the abilities of an existing target; refuses pairs of streams that need rules of their own.
pub(in crate::copy) fn abilities(
    replication: &Replication,
    site: &str,
    source: &StreamInfo,
    target: &StreamInfo,
) -> Result<Abilities, Error> {
    readable(&replication.source.stream, source)?;
    writable(&replication.target.stream, target)?;
    mode::mode(replication, target).map_err(Error::hold)?;
    Ok(abilities_of(replication, site, source, target))
}

/// Kinds of streams that need rules of their own.
const OWN_RULES: [(&str, &str); 2] = [
    ("allow_msg_counter", "is a counter stream, which needs rules of its own"),
    ("allow_msg_schedules", "schedules messages, which needs rules of its own"),
];

/// Refuses a source that cannot be copied.
pub(crate) fn readable(name: &str, source: &StreamInfo) -> Result<(), Error> {
    if let Some((_, what)) = OWN_RULES.iter().find(|(flag, _)| source.flag(flag)) {
        return Err(Error::hold(format!("source stream `{name}` {what}")));
    }
    Ok(())
}

/// Refuses a target that cannot be written.
pub(crate) fn writable(name: &str, target: &StreamInfo) -> Result<(), Error> {
    let kinds = [("sealed", "is sealed"), ("no_ack", "does not acknowledge messages")];
    if let Some((_, what)) = kinds.iter().chain(&OWN_RULES).find(|(flag, _)| target.flag(flag)) {
        return Err(Error::hold(format!("target stream `{name}` {what}")));
    }
    if target.has("mirror") {
        return Err(Error::hold(format!("target stream `{name}` is a mirror: only its origin writes to it")));
    }
    Ok(())
}

/// Whether a source acts on the same headers as it did.
pub(in crate::copy) fn acts_alike(one: &StreamInfo, other: &StreamInfo) -> bool {
    ["allow_msg_ttl", "allow_rollup_hdrs"].iter().all(|flag| one.flag(flag) == other.flag(flag))
}

/// The abilities of a target that is [`writable`].
pub(crate) fn abilities_of(
    replication: &Replication,
    site: &str,
    source: &StreamInfo,
    target: &StreamInfo,
) -> Abilities {
    let fast = target.flag("allow_batched") && target.api_level() >= API_LEVEL_2_14;
    // Anything else that moves the last sequence of the stream would break the chain again and again.
    let mode = mode::mode(replication, target).unwrap_or(TargetMode::Shared);
    let both = |flag: &str| source.flag(flag) && target.flag(flag);
    let rollup = both("allow_rollup_hdrs");
    Abilities {
        transport: if fast { Transport::FastIngest } else { Transport::Pipelined },
        mode,
        allowed: Allowed {
            ttl: both("allow_msg_ttl"),
            rollup_subject: rollup && subjects::stay_apart(replication, source),
            // It removes everything: also what others stored in a stream that was there before.
            rollup_all: rollup
                && mode == TargetMode::Exclusive
                && replication.scope.is_whole()
                && mark::is_of(target, site, replication),
        },
    }
}

/// How the target stream was found before a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::copy) enum Opened {
    /// It is unchanged.
    Found,
    /// It was missing.
    Made,
    /// It lacked the listed settings.
    Updated(String),
}

/// Opens the target stream: creates it if it is missing and may be created, changes it if it lacks something and may be
/// changed. Several replications, of several instances, may do that at the same time: the later one reads the
/// stream again, and after each change it is checked whether the change lasted.
pub(in crate::copy) struct Opening<'a> {
    job: &'a Job,
    /// To the source, and to the target.
    from: &'a mut Lane,
    to: &'a mut Lane,
    source: &'a StreamInfo,
    learned: Option<Learned>,
    /// The target's earlier answer about the stream; `None` inside where there is none.
    known: Option<Option<StreamInfo>>,
    /// The metadata leader is older than the stream's leader.
    old_leader: bool,
}

impl<'a> Opening<'a> {
    pub(in crate::copy) fn new(
        job: &'a Job,
        from: &'a mut Lane,
        to: &'a mut Lane,
        source: &'a StreamInfo,
        learned: Option<Learned>,
    ) -> Self {
        Self { job, from, to, source, learned, known: None, old_leader: false }
    }

    /// Uses an answer of the target about the stream that the caller has already.
    pub(in crate::copy) fn with_answer(mut self, info: Option<StreamInfo>) -> Self {
        self.known = Some(info);
        self
    }

    pub(in crate::copy) async fn open(mut self) -> Result<(StreamInfo, Opened), Error> {
        let replication = &self.job.replication;
        let name = &replication.target.stream;
        let mut opened = Opened::Found;
        for _ in 0..ATTEMPTS {
            let info = match self.known.take() {
                Some(info) => info,
                None => Api::new(self.to).stream_info(name).await?,
            };
            let Some(info) = info else {
                if !replication.create_target {
                    return Err(Error::hold(missing(name)));
                }
                match self.create().await? {
                    true => opened = Opened::Made,
                    false => pause().await,
                }
                continue;
            };
            if let Some(why) = self.job.own_streams.refuse(name, &info.created) {
                return Err(Error::hold(why));
            }
            let lacks = self.lacks(&info).await?;
            // A setting other than subjects that a server accepts and does not keep is not sent twice. A stream that
            // lacks our mark again was changed by another replication, which read it before our change.
            let lost = mark::is_ours(&info.config, &self.job.site, &replication.former)
                && !mark::names(&info, &replication.id);
            let again = |update: &Update| lost || !update.subjects.is_empty();
            let lacks = lacks.filter(|update| !matches!(opened, Opened::Updated(_)) || again(update));
            let Some(update) = lacks else { return Ok((info, opened)) };
            if self.update(&update).await? {
                opened = Opened::Updated(update.what);
                pause().await;
            }
        }
        Err(Error::retry(format!("target stream `{name}` is changed by others again and again")))
    }

    async fn learn(&mut self) -> Result<Learned, Error> {
        if self.learned.is_none() {
            let Job { dial, replication, .. } = self.job;
            let learned = learn::all(&**dial, self.from, replication, self.source, None).await;
            self.learned = Some(learned.map_err(|error| error.context("source"))?);
        }
        Ok(self.learned.clone().unwrap_or_default())
    }

    /// The missing settings of the stream, if it may get them.
    async fn lacks(&mut self, info: &StreamInfo) -> Result<Option<Update>, Error> {
        let Job { replication, site, .. } = self.job;
        let Some(extent) = Extent::of(replication, info, site) else { return Ok(None) };
        writable(&replication.target.stream, info)?;
        let leader = Maker { batches: Maker::of_leader(info).batches && !self.old_leader, ..Maker::of_leader(info) };
        let known = self.learned.clone();
        let of = |learned: &Learned| Update::of(replication, self.source, learned, info, leader, extent);
        let update = of(&known.clone().unwrap_or_default())?;
        if update.is_none() || known.is_some() {
            return Ok(update);
        }
        let learned = self.learn().await?;
        Update::of(replication, self.source, &learned, info, leader, extent)
    }

    /// Creates the stream; `false` if another instance was faster.
    async fn create(&mut self) -> Result<bool, Error> {
        let learned = self.learn().await?;
        let Job { replication, site, .. } = self.job;
        let name = &replication.target.stream;
        let mut replicas = self.source.number("num_replicas").max(1);
        let mut maker = Maker::of(self.to.info(), self.to.api_prefix());
        let mut room = Some(Room::Copies);
        let mut like_source = replication.target_like_source;
        loop {
            let mut config = new_config(replication, self.source, &learned, maker, replicas)?;
            if like_source && let Some(subjects) = subjects::of_whole_source(replication, self.source, &learned) {
                config["subjects"] = json!(subjects);
            }
            if let Some(room) = room {
                room.reserve(&mut config, self.source);
            }
            mark::put(&mut config, site, &replication.id);
            mark::put_source(&mut config, self.source, &replication.source.stream);
            match Api::new(self.to).create_stream(name, &config).await {
                Ok(made) => {
                    self.known = is_whole(&made, self.to, maker).then_some(Some(made));
                    return Ok(true);
                }
                Err(error) if error.is_api(NAME_IN_USE) => return Ok(false),
                Err(error) if like_source && error.is_api(SUBJECTS_OVERLAP) => like_source = false,
                // Not clustered, or not enough servers: the target can only have fewer replicas.
                Err(error) if replicas > 1 && (error.is_api(10074) || error.is_api(10005)) => {
                    replicas = if replicas > 3 { 3 } else { 1 };
                }
                // The API refuses a field that its server does not know.
                Err(error) if maker.batches && error.is_api(INVALID_JSON) => maker.batches = false,
                Err(error) => {
                    room =
                        room.filter(|_| target_limits::is_about_room(&error)).and_then(|room| room.next(self.source));
                    if room.is_some() {
                        continue;
                    }
                    let subjects = subjects_of(&config);
                    let doing = format!("cannot create target stream `{name}` with subjects {}", quoted(&subjects));
                    return Err(self.refused(error, doing, &subjects).await);
                }
            }
        }
    }

    /// Changes the stream; `false` if another attempt is necessary.
    async fn update(&mut self, update: &Update) -> Result<bool, Error> {
        let Job { replication, site, .. } = self.job;
        let name = &replication.target.stream;
        let Update { config, what, subjects, .. } = update;
        let mut config = config.clone();
        if mark::is_ours(&config, site, &replication.former) {
            mark::put(&mut config, site, &replication.id);
        }
        let mut updated = Api::new(self.to).update_stream(name, &config).await;
        if let (Err(error), Some(limits)) = (&updated, &update.limits)
            && target_limits::is_about_room(error)
        {
            // There is no room for another source beside the first: copies that the target drops for that are reported.
            limits.iter().for_each(|(limit, value)| config[limit] = value.clone());
            updated = Api::new(self.to).update_stream(name, &config).await;
        }
        match updated {
            Ok(_) => Ok(true),
            // The metadata leader handles updates, not the stream's leader, and it may be older.
            Err(error) if !self.old_leader && error.is_api(INVALID_JSON) => {
                self.old_leader = true;
                Ok(false)
            }
            Err(error) => {
                let by = if replication.update_target { "; `target_update`" } else { "" };
                let doing = format!("target stream `{name}` cannot be given what it lacks ({what}{by})");
                Err(self.refused(error, doing, subjects).await)
            }
        }
    }

    /// The error of a refused create or update, with the streams that have the requested subjects.
    async fn refused(&mut self, error: Error, doing: String, subjects: &[String]) -> Error {
        let overlaps = error.is_api(SUBJECTS_OVERLAP);
        let mut error = refused(error, doing);
        if overlaps && let Some(others) = others(self.to, &self.job.replication.target.stream, subjects).await {
            error.message = format!("{}: {others}", error.message);
        }
        error
    }
}

/// Whether the answer to a creation says the same as `STREAM.INFO` would. It may lack the domain, which acks name (2.12),
/// and in a cluster it may not come from the stream's leader.
fn is_whole(made: &StreamInfo, to: &Lane, maker: Maker) -> bool {
    let alone = made.cluster.is_none() && to.api_prefix() == DEFAULT_API_PREFIX && to.info().domain.is_none();
    alone && (Maker::of_leader(made).batches || !maker.batches)
}

/// Waits until changes of others to the same stream are visible.
pub(crate) async fn pause() {
    let random = (chance::random() >> 11) as f64 / (1u64 << 53) as f64;
    sleep(jitter(PAUSE, random)).await;
}

/// Which other streams listen on subjects, in words; `None` if that cannot be determined.
async fn others(lane: &mut Lane, name: &str, subjects: &[String]) -> Option<String> {
    let mut found = Vec::new();
    for subject in subjects.iter().take(MOST_ASKED) {
        let mut streams = Api::new(lane).stream_names(subject).await.ok()?;
        streams.retain(|stream| stream != name);
        if !streams.is_empty() {
            found.push(format!("`{subject}` overlaps with stream {}", quoted(&streams)));
        }
    }
    (!found.is_empty()).then(|| found.join(", "))
}

fn subjects_of(config: &Value) -> Vec<String> {
    let subjects = config["subjects"].as_array().into_iter().flatten();
    subjects.filter_map(|subject| subject.as_str().map(str::to_owned)).collect()
}

/// A refusal by the API is permanent until an operator changes a setting.
fn refused(error: Error, doing: String) -> Error {
    let lasting = error.kind == ErrorKind::Retry && error.api.as_ref().is_some_and(|api| api.code < 500);
    let kind = if lasting { ErrorKind::Hold } else { error.kind };
    Error { kind, ..error.context(doing) }
}

/// How far an existing target may be changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Extent {
    /// Subjects only: it had all else when it was created, and a setting that is off now was switched off by intention.
    Subjects,
    /// All missing settings.
    Everything,
    /// The same, and room for another source: it was created for other sources.
    Join,
}

impl Extent {
    /// `None` for a stream that is neither ours nor may be changed by the document.
    pub(crate) fn of(replication: &Replication, target: &StreamInfo, site: &str) -> Option<Self> {
        let joins = !mark::names(target, &replication.id);
        match (replication.update_target, mark::is_ours(&target.config, site, &replication.former)) {
            (_, true) if joins => Some(Self::Join),
            (true, _) => Some(Self::Everything),
            (false, true) => Some(Self::Subjects),
            (false, false) => None,
        }
    }
}

/// The settings that an existing target lacks for this copy. None is switched off, removed or limited by it: the
/// limits, replicas and placement of a stream belong to its creator.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Update {
    /// The whole configuration, changed.
    pub(crate) config: Value,
    /// The changes, in words.
    pub(crate) what: String,
    /// Subjects that it does not listen on yet.
    pub(crate) subjects: Vec<String>,
    /// Its limits as they are, where the configuration has larger ones.
    pub(crate) limits: Option<Map<String, Value>>,
}

impl Update {
    /// `None` if the target lacks nothing; an error if it would have to listen on more subjects than were configured.
    pub(crate) fn of(
        replication: &Replication,
        source: &StreamInfo,
        learned: &Learned,
        target: &StreamInfo,
        leader: Maker,
        extent: Extent,
    ) -> Result<Option<Self>, Error> {
        let (mut config, mut what) = (target.config.clone(), Vec::new());
        // If the source's subjects are not known, none is known to be missing.
        let wanted = subjects::of_target(replication, source, learned).unwrap_or_default();
        let there = target.subjects();
        let lacks = |subject: &&String| !there.iter().any(|pattern| patterns::holds(pattern, subject));
        let missing: Vec<String> = wanted.iter().filter(lacks).cloned().collect();
        if !missing.is_empty() {
            let all = || there.iter().copied().chain(wanted.iter().map(String::as_str));
            let listens = patterns::disjoint(all().map(str::to_owned));
            if let Some(wide) = listens.iter().find(|subject| !all().any(|known| known == subject.as_str())) {
                return Err(too_wide(&replication.target.stream, &missing, &there, wide));
            }
            config["subjects"] = json!(listens);
            what.push(format!("subjects {}", quoted(&missing)));
        }
        let mut switch_on = |flag: &str| {
            config[flag] = true.into();
            what.push(format!("`{flag}`"));
        };
        let settings = extent != Extent::Subjects;
        if settings && leader.batches && !target.flag("allow_batched") {
            switch_on("allow_batched");
        }
        for flag in SWITCHED_ON.into_iter().filter(|_| settings) {
            let possible = match flag {
                "allow_rollup_hdrs" => !target.flag("deny_purge"),
                "allow_msg_ttl" => leader.ttl,
                _ => true,
            };
            if source.flag(flag) && !target.flag(flag) && possible {
                switch_on(flag);
            }
        }
        let mut limits = None;
        if extent == Extent::Join
            && let Ok(own) = new_config(replication, source, learned, leader, 1)
        {
            let larger = join::room(&mut config, &own);
            limits = (!larger.is_empty())
                .then(|| larger.iter().map(|limit| ((*limit).to_owned(), target.config[*limit].clone())).collect());
            what.extend(larger.into_iter().map(|limit| format!("a larger `{limit}`")));
        }
        Ok((!what.is_empty()).then(|| Self { config, what: what.join(", "), subjects: missing, limits }))
    }
}

/// The error of a wildcard that overlaps present subjects: a stream has no overlapping subjects, and the wildcard alone
/// would also capture subjects that are not copied.
fn too_wide(name: &str, missing: &[String], there: &[&str], wide: &str) -> Error {
    Error::hold(format!(
        "target stream `{name}` cannot be given subjects {}: it listens on {}, and only `{wide}` would hold \
         both, which is more than is copied: change its subjects by hand, or what is copied with `filter_subject` or \
         `subject_transforms`",
        quoted(missing),
        quoted(there)
    ))
}

pub(in crate::copy) fn quoted(subjects: &[impl AsRef<str>]) -> String {
    let mut quoted: Vec<_> =
        subjects.iter().take(MOST_SHOWN).map(|subject| format!("`{}`", subject.as_ref())).collect();
    if subjects.len() > MOST_SHOWN {
        quoted.push(format!("{} more", subjects.len() - MOST_SHOWN));
    }
    quoted.join(", ")
}

/// The features of the server that creates or changes a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Maker {
    /// Fast-ingest batches.
    batches: bool,
    /// Messages with a time to live.
    ttl: bool,
}

impl Maker {
    /// By the server of the connection. Another API prefix may lead to another server, of an unknown
    /// version: it counts as a new one.
    pub(crate) fn of(server: &ServerInfo, api_prefix: &str) -> Self {
        let knows = |version| api_prefix != DEFAULT_API_PREFIX || since(&server.version, version);
        Self { batches: knows(FAST_INGEST_SINCE), ttl: knows(TTL_SINCE) }
    }

    /// By the leader of an existing stream.
    pub(crate) fn of_leader(stream: &StreamInfo) -> Self {
        let level = stream.api_level();
        Self { batches: level >= API_LEVEL_2_14, ttl: level >= API_LEVEL_2_11 }
    }
}

/// The error of a target that is missing and must not be created.
pub(crate) fn missing(name: &str) -> String {
    format!("target stream `{name}` does not exist and `no_target_create` is set")
}

/// The configuration of a created target.
pub(crate) fn new_config(
    replication: &Replication,
    source: &StreamInfo,
    learned: &Learned,
    maker: Maker,
    replicas: i64,
) -> Result<Value, Error> {
    let subjects = subjects::of_target(replication, source, learned)?;
    let mut config = settings(replication, source, maker, replicas);
    config.insert("subjects".into(), json!(subjects));
    Ok(Value::Object(config))
}

/// The same without the subjects, which are not always known.
pub(crate) fn settings(
    replication: &Replication,
    source: &StreamInfo,
    maker: Maker,
    replicas: i64,
) -> Map<String, Value> {
    let apart = subjects::stay_apart(replication, source);
    let mut config = Map::new();
    for name in TAKEN_OVER {
        if let Some(value) = source.config.get(name) {
            config.insert(name.to_owned(), value.clone());
        }
    }
    target_limits::take_over(&mut config, replication, source, apart);
    config.insert("name".into(), replication.target.stream.clone().into());
    config.insert("retention".into(), "limits".into());
    config.insert("num_replicas".into(), replicas.into());
    config.insert("description".into(), format!("copy of stream {}", replication.source.stream).into());
    if replication.target_like_source {
        config.extend(descriptive(source));
    }
    if maker.batches {
        config.insert("allow_batched".into(), true.into());
    }
    if maker.ttl && source.flag("allow_msg_ttl") {
        config.insert("allow_msg_ttl".into(), true.into());
    }
    config
}

/// What a source says of itself to people and tools: its description and its metadata, without what belongs to the server
/// or to the service that created it.
fn descriptive(source: &StreamInfo) -> Map<String, Value> {
    let mut said = Map::new();
    let description = source.text("description");
    if !description.is_empty() {
        said.insert("description".into(), description.into());
    }
    if let Some(Value::Object(metadata)) = source.config.get("metadata") {
        let own = |key: &str| key.starts_with("_nats.") || key.starts_with(mark::PREFIX);
        let kept: Map<_, _> =
            metadata.iter().filter(|(key, _)| !own(key)).map(|(k, v)| (k.clone(), v.clone())).collect();
        if !kept.is_empty() {
            said.insert("metadata".into(), kept.into());
        }
    }
    said
}

/// Whether a server version is at least this one.
fn since(version: &str, (major, minor): (u32, u32)) -> bool {
    let mut parts = version.split('.').map(|part| part.parse::<u32>().unwrap_or_default());
    (parts.next().unwrap_or_default(), parts.next().unwrap_or_default()) >= (major, minor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        for (version, expect) in [("2.14.0", true), ("2.15.1", true), ("3.0.0", true), ("2.12.8", false), ("", false)] {
            assert_eq!(since(version, FAST_INGEST_SINCE), expect, "{version}");
        }
        assert!(since("2.14.0-preview.1", FAST_INGEST_SINCE));
    }

    #[test]
    fn a_target_is_given_what_it_lacks_and_loses_nothing() {
        let stream =
            |config: Value| -> StreamInfo { serde_json::from_value(json!({"config": config, "state": {}})).unwrap() };
        let source =
            stream(json!({"subjects": ["a.>", "b"], "allow_rollup_hdrs": true, "allow_msg_ttl": true, "max_msgs": 5}));
        let document = json!({"stream": "S", "source_url": "nats://a", "target_url": "nats://b"});
        let replication = crate::config::parse_value(&document, "SITE").unwrap();
        let check = |leader: Maker, target: Value, expect: Option<(Value, &str, &[&str])>| {
            let found = Update::of(
                &replication,
                &source,
                &Learned::default(),
                &stream(target.clone()),
                leader,
                Extent::Everything,
            );
            let expect = expect.map(|(config, what, subjects)| Update {
                config,
                what: what.to_owned(),
                subjects: subjects.iter().map(|subject| (*subject).to_owned()).collect(),
                limits: None,
            });
            assert_eq!(found, Ok(expect), "{target}");
        };
        let (new, old) = (Maker { batches: true, ttl: true }, Maker { batches: false, ttl: false });
        let lacking = json!({"subjects": ["a.x", "c"], "max_msgs": 9, "deny_delete": true});
        let given = json!({
            "subjects": ["a.>", "b", "c"], "max_msgs": 9, "deny_delete": true, "allow_batched": true,
            "allow_rollup_hdrs": true, "allow_msg_ttl": true
        });
        let what = "subjects `a.>`, `b`, `allow_batched`, `allow_rollup_hdrs`, `allow_msg_ttl`";
        check(new, lacking, Some((given.clone(), what, &["a.>", "b"])));
        check(new, given, None);
        let wide = json!({"subjects": [">"], "deny_purge": true});
        check(old, wide.clone(), None);
        let batched = json!({"subjects": [">"], "deny_purge": true, "allow_batched": true, "allow_msg_ttl": true});
        check(new, wide, Some((batched, "`allow_batched`, `allow_msg_ttl`", &[])));

        // `*.>` would take what nobody asked for.
        let across = stream(json!({"subjects": ["*.x", "b"]}));
        let error = Update::of(&replication, &source, &Learned::default(), &across, new, Extent::Everything);
        let error = error.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Hold);
        assert!(error.message.contains("cannot be given subjects `a.>`"), "{error}");
        assert!(error.message.contains("listens on `*.x`, `b`, and only `*.>` would hold both"), "{error}");
    }

    #[test]
    fn the_leader_of_a_stream_says_what_it_knows() {
        let check = |metadata: Value, expect: (bool, bool)| {
            let config = json!({"config": {"metadata": metadata.clone()}, "state": {}});
            let Maker { batches, ttl } = Maker::of_leader(&serde_json::from_value(config).unwrap());
            assert_eq!((batches, ttl), expect, "{metadata}");
        };
        check(json!({"_nats.level": "4"}), (true, true));
        check(json!({"_nats.level": "2"}), (false, true));
        check(json!({"_nats.level": "1"}), (false, true));
        check(json!({}), (false, false));
    }

    #[test]
    fn another_prefix_may_lead_to_another_version() {
        let maker = |version: &str, prefix: &str| {
            let mut server = ServerInfo::default();
            version.clone_into(&mut server.version);
            let Maker { batches, ttl } = Maker::of(&server, prefix);
            (batches, ttl)
        };
        assert_eq!(maker("2.14.6", "$JS.API"), (true, true));
        assert_eq!(maker("2.12.8", "$JS.API"), (false, true));
        assert_eq!(maker("2.10.26", "$JS.API"), (false, false));
        assert_eq!(maker("2.10.26", "$JS.hub.API"), (true, true));
    }
}
