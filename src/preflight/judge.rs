//! What the answers of both sides mean for a replication. Pure.

use std::collections::BTreeMap;

use nats_lane::{
    Connection, Error,
    jetstream::{ConsumerInfo, StreamInfo},
};
use serde_json::{Value, json};

use super::{
    CheckOutcome, Finding, Judgement, OtherReplication, SideReport, limits, loops,
    returned::Returned,
    side_checks::{CheckAnswer, SideFacts, SideRole, calls},
    subjects::{Flow, Share, share},
};
use crate::{
    config::{AdvisorySettings, OnReject, Replication, Scope, Sharing, Start, patterns},
    copy::{
        source::{
            clock,
            durable::{self, Durable, Owner},
        },
        target::{
            dead_letter, dedup_window, mode,
            stream::{self, Abilities, Update},
            subjects::{self, Learned},
            target_limits,
        },
    },
    sampling::{self, PER_SENDER},
    status::{TargetMode, Transport},
    store::OwnStreams,
};

/// Subjects that one message shows at most.
const MAX_SHOWN: usize = 8;

/// The answers of both sides.
pub(super) struct Pair<'a> {
    pub(super) replication: &'a Replication,
    pub(super) source: &'a SideFacts,
    pub(super) target: &'a SideFacts,
    pub(super) flow: &'a Flow,
    /// Subjects that the source stores although its configuration does not list them.
    pub(super) learned: &'a Learned,
    /// The configuration that a missing target would be created with.
    pub(super) planned: &'a Option<Result<Value, Error>>,
    /// The update that an existing target would get.
    pub(super) update: &'a Option<Result<Update, Error>>,
    pub(super) own: &'a OwnStreams,
    /// The owner that our durable consumers name.
    pub(super) owner: Owner<'a>,
    /// A message of the source that was copied from the target.
    pub(super) returned: &'a Option<Returned>,
}

/// Findings about one side.
pub(super) struct SideFindings {
    side: &'static str,
    address: String,
    list: Vec<Finding>,
}

impl SideFindings {
    pub(super) fn new(side: &'static str, facts: &SideFacts) -> Self {
        Self { side, address: facts.address.clone(), list: Vec::new() }
    }

    pub(super) fn add(&mut self, name: &'static str, outcome: CheckOutcome, path: &'static str, text: &str) {
        let message = if text.is_empty() { String::new() } else { format!("{} `{}`: {text}", self.side, self.address) };
        self.list.push(Finding { name, outcome, message, path });
    }

    pub(super) fn ok(&mut self, name: &'static str) {
        self.add(name, CheckOutcome::Ok, "", "");
    }

    pub(super) fn unknown(&mut self, name: &'static str) {
        self.add(name, CheckOutcome::Unknown, "", "");
    }

    /// Adds a finding, or that all is well.
    pub(super) fn add_any(&mut self, name: &'static str, path: &'static str, said: Option<(CheckOutcome, String)>) {
        match said {
            Some((outcome, text)) => self.add(name, outcome, path, &text),
            None => self.ok(name),
        }
    }

    pub(super) fn add_answer<T>(&mut self, name: &'static str, path: &'static str, answer: &CheckAnswer<T>) {
        match answer {
            CheckAnswer::Got(_) => self.ok(name),
            CheckAnswer::Failed(text) => self.add(name, CheckOutcome::Failed, path, text),
            CheckAnswer::Unclear(text) => self.add(name, CheckOutcome::Unknown, path, text),
            CheckAnswer::NotAsked => self.unknown(name),
        }
    }

    pub(super) fn report(self, facts: &SideFacts) -> SideReport {
        let info = facts.connect.got();
        SideReport {
            server: info.map(|info| info.server_name.clone()).unwrap_or_default(),
            version: info.map(|info| info.version.clone()).unwrap_or_default(),
            stream: facts.stream.there().map(|stream| stream.state.clone()),
            findings: self.list,
        }
    }
}

impl Pair<'_> {
    pub(super) fn judge_source(&self, known: &[OtherReplication]) -> SideReport {
        let (facts, mut findings) = (self.source, SideFindings::new("source", self.source));
        findings.add_answer("connect", facts.path, &facts.connect);
        findings.add_answer("jetstream", facts.path, &facts.jetstream);
        let name = &self.replication.source.stream;
        match &facts.stream {
            CheckAnswer::Got(None) => {
                let text = format!("source stream `{name}` does not exist");
                findings.add("stream", CheckOutcome::Failed, "/stream", &text);
            }
            CheckAnswer::Got(Some(stream)) => {
                let refused = stream::readable(name, stream).map_err(|error| error.message);
                let refused = refused.and_then(|()| self.own.refuse(name, &stream.created).map_or(Ok(()), Err));
                let refused = refused.and_then(|()| self.consumers(stream)).err();
                findings.add_any("stream", "/stream", refused.map(|text| (CheckOutcome::Failed, text)));
            }
            answer => findings.add_answer("stream", facts.path, answer),
        }
        match facts.clock.got() {
            Some(offset) => {
                let said = clock::apart(*offset).map(|text| (CheckOutcome::Warning, text));
                findings.add_any("clock", facts.path, said);
            }
            None => findings.unknown("clock"),
        }
        self.judge_calls(SideRole::Source, &mut findings);
        match facts.stream.there() {
            Some(stream) => {
                let (path, said) = self.filter(stream);
                findings.add_any("filter", path, said);
                findings.add_any("start", self.start_path(), self.start(stream));
                findings.add_any("limits", facts.path, self.source_limits(known, stream));
            }
            None => {
                for name in ["filter", "start", "limits"] {
                    findings.unknown(name);
                }
            }
        }
        if let OnReject::DeadLetter { subject } = &self.replication.on_reject {
            findings.add_any("dead_letter", "/dead_letter/subject", self.dead_letter(subject));
        }
        if let Some(advisory) = self.replication.advisory() {
            findings.add_any("advisory", "/advisory/subject", self.advisory(advisory));
        }
        findings.report(facts)
    }

    /// Whether a dead letter would be stored, and neither by the source nor by the target.
    fn dead_letter(&self, subject: &String) -> Judgement {
        let facts = self.source;
        let (source, target) = (&self.replication.source.stream, &self.replication.target.stream);
        if let Some(stream) = facts.stream.there()
            && let Err(error) = dead_letter::not_into_source(source, stream, subject)
        {
            return Some((CheckOutcome::Failed, error.message));
        }
        if facts.permissions.got().is_some_and(|permissions| permissions.publish(subject) != Share::All) {
            return Some((CheckOutcome::Failed, format!("no permission to publish dead letters to `{subject}`")));
        }
        let streams = match &facts.listeners {
            CheckAnswer::Got(listeners) => listeners.get(subject).map(Vec::as_slice).unwrap_or_default(),
            CheckAnswer::Failed(text) | CheckAnswer::Unclear(text) => {
                let text = format!("whether a stream stores dead letters to `{subject}` is not known: {text}");
                return Some((CheckOutcome::Unknown, text));
            }
            CheckAnswer::NotAsked => return Some((CheckOutcome::Unknown, String::new())),
        };
        if streams.contains(target) && self.same_server() && self.same_login() {
            let text =
                format!("`{subject}` is a subject of target stream `{target}`: choose one that another stream stores");
            return Some((CheckOutcome::Failed, text));
        }
        streams.is_empty().then(|| {
            let text = format!("no stream stores dead letters to `{subject}`: the copy stops at the first one");
            (CheckOutcome::Warning, text)
        })
    }

    /// Whether advisories can be published, else they are refused while the copy continues, and where they end up.
    fn advisory(&self, advisory: &AdvisorySettings) -> Judgement {
        let facts = self.source;
        let subjects: Vec<_> = sampling::advisory_patterns(&advisory.subject).into_iter().collect();
        if let Some(permissions) = facts.permissions.got() {
            let of = |wanted: Share| -> Vec<_> {
                subjects.iter().filter(|subject| permissions.publish(subject) == wanted).collect()
            };
            let (none, part) = (of(Share::None), of(Share::Part));
            if !none.is_empty() {
                return Some((CheckOutcome::Failed, format!("no permission to publish advisories to {}", list(&none))));
            }
            if !part.is_empty() {
                let text = format!("permission to publish advisories to a part of {} only", list(&part));
                return Some((CheckOutcome::Warning, text));
            }
        }
        let is_own = |one: &&String| self.flow.from.iter().any(|subject| patterns::overlap(subject, one));
        let own: Vec<_> = subjects.iter().filter(is_own).collect();
        match &facts.listeners {
            CheckAnswer::Got(listeners) if advisory.reliable => {
                let nowhere = |one: &&String| listeners.get(*one).is_none_or(Vec::is_empty);
                let nowhere: Vec<_> = subjects.iter().filter(nowhere).collect();
                if !nowhere.is_empty() {
                    let text = format!(
                        "no stream stores reliable advisories to {}: they wait, at most {PER_SENDER} of each sender, until one does",
                        list(&nowhere)
                    );
                    return Some((CheckOutcome::Warning, text));
                }
            }
            CheckAnswer::Failed(text) | CheckAnswer::Unclear(text) if advisory.reliable => {
                let text = format!("whether a stream stores advisories to {} is not known: {text}", list(&subjects));
                return Some((CheckOutcome::Unknown, text));
            }
            CheckAnswer::NotAsked => return Some((CheckOutcome::Unknown, String::new())),
            _ => {}
        }
        (!own.is_empty() && !self.flow.vague).then(|| {
            let text = format!(
                "source stream `{}` stores advisories to {} itself: they are copied as messages without a sender",
                self.replication.source.stream,
                list(&own)
            );
            (CheckOutcome::Warning, text)
        })
    }

    /// Whether the same server accepted the login of both sides.
    fn same_server(&self) -> bool {
        let name = |facts: &SideFacts| facts.connect.got().map(|info| info.server_name.clone());
        name(self.source).is_some_and(|source| Some(source) == name(self.target))
    }

    pub(super) fn judge_target(&self, known: &[OtherReplication]) -> SideReport {
        let (facts, mut findings) = (self.target, SideFindings::new("target", self.target));
        findings.add_answer("connect", facts.path, &facts.connect);
        findings.add_answer("jetstream", facts.path, &facts.jetstream);
        let stream = self.judge_target_stream(&mut findings);
        self.judge_calls(SideRole::Target, &mut findings);
        self.judge_publish(&mut findings);
        match (self.source.stream.there(), &stream) {
            (Some(source), Some(stream)) => {
                self.judge_subjects(stream, &mut findings);
                self.judge_sizes(source, stream, &mut findings);
                self.judge_limits(source, stream, &mut findings);
                let abilities = stream::abilities_of(self.replication, self.owner.site, source, stream);
                findings.add_any("target_mode", "/target_mode", self.sharing(stream, known));
                findings.add_any("headers", "/target_stream", self.headers(source, stream, &abilities));
                findings.add_any("duplicates", "/target_stream", remembered(stream, &abilities));
            }
            _ => {
                for name in ["subjects", "max_payload", "limits", "target_mode", "headers", "duplicates"] {
                    findings.unknown(name);
                }
            }
        }
        findings.add_any("cycle", facts.path, self.cycle(known));
        findings.report(facts)
    }

    /// The calls of a copy: judged by the permissions, or by the result of trying them.
    fn judge_calls(&self, role: SideRole, findings: &mut SideFindings) {
        let facts = match role {
            SideRole::Source => self.source,
            SideRole::Target => self.target,
        };
        let path = facts.path;
        match (&facts.permissions, &facts.stream, &facts.connection) {
            (
                CheckAnswer::Got(permissions),
                CheckAnswer::Got(stream),
                Some(Connection { api_prefix, inbox_prefix, .. }),
            ) => {
                let calls = calls(role, self.replication, stream.as_ref(), api_prefix).into_iter();
                // A target that the service created is updated without `target_update`.
                let update = matches!((role, self.update), (SideRole::Target, Some(Ok(_))));
                let update = update.then(|| format!("{api_prefix}.STREAM.UPDATE.{}", self.replication.target.stream));
                let calls = calls.map(|(subject, _)| subject).chain(update.filter(|_| !self.replication.update_target));
                let missing: Vec<_> = calls.filter(|subject| permissions.publish(subject) != Share::All).collect();
                let said = if !missing.is_empty() {
                    Some(format!("no permission to publish to {}", list(&missing)))
                } else if !permissions.may_listen(inbox_prefix) {
                    Some(format!("no permission to subscribe to `{inbox_prefix}.>`"))
                } else {
                    None
                };
                findings.add_any("calls", path, said.map(|text| (CheckOutcome::Failed, text)));
            }
            (_, CheckAnswer::Got(_), _) => findings.add_answer("calls", path, &facts.calls),
            _ => findings.unknown("calls"),
        }
    }

    /// An existing target stream, with the changes that `target_update` would make; `None` if the copy cannot write to it.
    fn judge_existing_target(&self, stream: &StreamInfo, findings: &mut SideFindings) -> Option<StreamInfo> {
        let name = &self.replication.target.stream;
        let mut said = |outcome, path, text: &str| findings.add("stream", outcome, path, text);
        let path = self.target.path;
        let is_source = self.is_source(stream);
        if is_source && self.same_login() {
            let text = format!("stream `{name}` is the source stream itself, by another address");
            said(CheckOutcome::Failed, path, &text);
            return None;
        }
        if let Some(why) = self.own.refuse(name, &stream.created) {
            said(CheckOutcome::Failed, "/target_stream", &why);
            return None;
        }
        match stream::writable(name, stream) {
            Ok(()) if is_source => {
                let text = format!(
                    "stream `{name}` was made in the same moment on the same server as the source stream: it is \
                     that stream itself, or restored from its backup"
                );
                said(CheckOutcome::Warning, path, &text);
            }
            Ok(()) => match self.update {
                Some(Err(error)) => said(CheckOutcome::Failed, "/target_stream", &error.message),
                Some(Ok(update)) => {
                    let (outcome, path, text) = self.change(update);
                    said(outcome, path, &text);
                    return as_stream(&update.config)
                        .map(|changed| StreamInfo { config: changed.config, ..stream.clone() });
                }
                None => findings.ok("stream"),
            },
            Err(error) => said(CheckOutcome::Failed, "/target_stream", &error.message),
        }
        Some(stream.clone())
    }

    /// The target as it is, or as it would be created; `None` if that is not possible or not known.
    fn judge_target_stream(&self, findings: &mut SideFindings) -> Option<StreamInfo> {
        let name = &self.replication.target.stream;
        let mut said = |outcome, path, text: &str| findings.add("stream", outcome, path, text);
        match (&self.target.stream, self.planned) {
            (CheckAnswer::Got(Some(stream)), _) => self.judge_existing_target(stream, findings),
            (CheckAnswer::Got(None), _) if !self.replication.create_target => {
                said(CheckOutcome::Failed, "/target_stream", &stream::missing(name));
                None
            }
            (CheckAnswer::Got(None), Some(Ok(config))) => {
                let (outcome, path, text) = self.plan(config);
                said(outcome, path, &text);
                (outcome == CheckOutcome::Ok).then(|| as_stream(config)).flatten()
            }
            (CheckAnswer::Got(None), Some(Err(error))) => {
                said(CheckOutcome::Failed, "/target_stream", &error.message);
                None
            }
            (CheckAnswer::Got(None), None) => {
                said(CheckOutcome::Unknown, "", "");
                None
            }
            (answer, _) => {
                findings.add_answer("stream", self.target.path, answer);
                None
            }
        }
    }

    /// Whether the stream is the source: no two streams are created in the same nanosecond and led by the same server. A
    /// restored backup keeps the time, but is led by another server or is in another account.
    fn is_source(&self, stream: &StreamInfo) -> bool {
        let Some(source) = self.source.stream.there() else { return false };
        fn leader<'a>(stream: &'a StreamInfo, facts: &'a SideFacts) -> &'a str {
            let leader = stream.cluster.as_ref().map(|cluster| cluster.leader.as_str()).filter(|name| !name.is_empty());
            leader.or_else(|| Some(&facts.connect.got()?.server_name)).unwrap_or_default()
        }
        self.replication.source.stream == self.replication.target.stream
            && source.created == stream.created
            && leader(source, self.source) == leader(stream, self.target)
    }

    /// Whether both sides log in as the same user to the same API; otherwise they may be different accounts.
    fn same_login(&self) -> bool {
        let seen = |facts: &SideFacts| {
            facts.connection.as_ref().map(|there| (there.endpoint.auth.clone(), there.api_prefix.clone()))
        };
        seen(self.source) == seen(self.target)
    }

    /// Describes a target that would be created.
    fn plan(&self, config: &Value) -> (CheckOutcome, &'static str, String) {
        let name = &self.replication.target.stream;
        let path = self.mapping_path();
        let subjects = subjects_of(config);
        let would =
            format!("target stream `{name}` does not exist and would be created with subjects {}", list(&subjects));
        let clash = subjects.iter().enumerate().find_map(|(index, one)| {
            let other = subjects[index + 1..].iter().find(|other| patterns::overlap(one, other))?;
            Some(format!("{would}: `{one}` and `{other}` overlap"))
        });
        if let Some(text) = clash {
            return (CheckOutcome::Failed, path, text);
        }
        if let Some(bad) = subjects.iter().find(|subject| matches!(subject.as_str(), "" | ">")) {
            return (CheckOutcome::Failed, path, format!("{would}: no stream can have the subject `{bad}`"));
        }
        self.free(&subjects, path, would)
    }

    /// Describes a target that would be changed.
    fn change(&self, update: &Update) -> (CheckOutcome, &'static str, String) {
        let would = format!("target stream `{}` would be given {}", self.replication.target.stream, update.what);
        if update.subjects.is_empty() {
            return (CheckOutcome::Ok, "", would);
        }
        self.free(&update.subjects, self.mapping_path(), would)
    }

    /// Whether no other stream has the subjects that the target would have.
    fn free(&self, subjects: &[String], path: &'static str, would: String) -> (CheckOutcome, &'static str, String) {
        let name = &self.replication.target.stream;
        match &self.target.listeners {
            CheckAnswer::Got(listeners) => match others(listeners, name, subjects.iter()) {
                Some((subject, streams)) => {
                    let text = format!("{would}: `{subject}` overlaps with stream {} there", list(&streams));
                    (CheckOutcome::Failed, path, text)
                }
                None => (CheckOutcome::Ok, path, would),
            },
            CheckAnswer::Failed(text) | CheckAnswer::Unclear(text) => {
                (CheckOutcome::Unknown, path, format!("{would}; whether another stream has them is not known: {text}"))
            }
            CheckAnswer::NotAsked => (CheckOutcome::Unknown, "", String::new()),
        }
    }

    fn judge_publish(&self, findings: &mut SideFindings) {
        let path = self.target.path;
        let subjects: Vec<_> = self.flow.to.iter().filter(|subject| !subject.is_empty()).collect();
        match &self.target.permissions {
            CheckAnswer::Got(permissions) => {
                let of = |wanted: Share| -> Vec<&String> {
                    let subjects = subjects.iter().copied();
                    subjects.filter(|subject| permissions.publish(subject) == wanted).collect()
                };
                let (none, part) = (of(Share::None), of(Share::Part));
                let said = if !none.is_empty() {
                    let outcome = if self.flow.vague { CheckOutcome::Warning } else { CheckOutcome::Failed };
                    Some((outcome, format!("no permission to publish to {}", list(&none))))
                } else if !part.is_empty() && !self.flow.vague {
                    let text = format!("permission to publish to a part of {} only", list(&part));
                    Some((CheckOutcome::Warning, text))
                } else {
                    None
                };
                findings.add_any("publish", path, said);
            }
            CheckAnswer::Failed(text) | CheckAnswer::Unclear(text) => {
                let text = format!("whether {} may be published is not known: {text}", list(&subjects));
                findings.add("publish", CheckOutcome::Unknown, path, &text);
            }
            CheckAnswer::NotAsked => findings.unknown("publish"),
        }
    }

    /// Whether copies arrive in the target stream, and not in another stream or in none.
    fn judge_subjects(&self, stream: &StreamInfo, findings: &mut SideFindings) {
        let (name, path) = (&self.replication.target.stream, self.mapping_path());
        let listens = stream.subjects();
        let elsewhere = |subject: &String| match &self.target.listeners {
            CheckAnswer::Got(listeners) => {
                others(listeners, name, std::iter::once(subject)).map(|(_, streams)| streams)
            }
            _ => None,
        };
        let said = self.flow.to.iter().filter_map(|subject| {
            if subject.is_empty() {
                return Some((CheckOutcome::Failed, "a subject is empty after the mapping".to_owned()));
            }
            let bound = elsewhere(subject);
            match share(&listens, subject) {
                Share::All => None,
                Share::Part if self.flow.vague => None,
                Share::Part => {
                    let rest = bound.map(|streams| format!(", the rest goes to stream {}", list(&streams)));
                    let text = format!(
                        "target stream `{name}` listens on {} only, a part of `{subject}`{}: the copy stops at the first message beside it",
                        list(&listens),
                        rest.unwrap_or_default()
                    );
                    Some((CheckOutcome::Warning, text))
                }
                Share::None => {
                    let outcome = if self.flow.vague { CheckOutcome::Warning } else { CheckOutcome::Failed };
                    let text = match bound {
                        Some(streams) => {
                            format!("`{subject}` belongs to stream {} there, not to `{name}`", list(&streams))
                        }
                        None => format!(
                            "target stream `{name}` does not listen on `{subject}`, only on {}{}",
                            list(&listens),
                            self.help()
                        ),
                    };
                    Some((outcome, text))
                }
            }
        });
        let mut said: Vec<Judgement> = said.map(Some).collect();
        said.extend(self.strays(&listens).map(|text| Some((CheckOutcome::Warning, text))));
        let second = self.second_stream();
        // A warning that it is not known is added to all others.
        if let Some((CheckOutcome::Unknown, text)) = second.as_ref().filter(|_| !said.is_empty()) {
            findings.add("bridge", CheckOutcome::Unknown, path, text);
        } else {
            said.extend(second.map(Some));
        }
        // The worst is reported for all: they have one cause.
        let worst = said.iter().position(|said| matches!(said, Some((CheckOutcome::Failed, _)))).unwrap_or(0);
        let said = if said.is_empty() { None } else { said.swap_remove(worst) };
        findings.add_any("subjects", path, said);
    }

    /// The option that makes a target listen on further subjects.
    fn help(&self) -> &'static str {
        let exists = self.target.stream.there().is_some() && !self.replication.update_target;
        if exists { ": add it to the stream, or set `target_update`" } else { "" }
    }

    /// Stored messages whose subjects are not those of the configuration, and that the target does not take.
    fn strays(&self, listens: &[&str]) -> Option<String> {
        let (example, from) = self.learned.example.as_ref()?;
        let stored = self.learned.stored.patterns().unwrap_or_else(|| [example.clone()].into());
        let stray = stored.iter().find(|subject| share(listens, subject) != Share::All)?;
        Some(format!(
            "source stream `{}` stores messages on subjects that are not in its configuration, `{from}` for example, and target \
             stream `{}` does not listen on `{stray}`{}: the copy stops at the first one",
            self.replication.source.stream,
            self.replication.target.stream,
            self.help()
        ))
    }

    /// A stream beside the source that would also store the copies.
    fn second_stream(&self) -> Option<(CheckOutcome, String)> {
        if let CheckAnswer::Unclear(text) = &self.source.beside {
            return Some((CheckOutcome::Unknown, text.clone()));
        }
        let (subject, streams) = self.source.beside.got()?.iter().find(|(_, streams)| !streams.is_empty())?;
        let text = format!(
            "stream {} beside the source listens on `{subject}` too, in the same account by way of leafnodes: it would \
             store the copies as well, and the copy stops; map them to other subjects, with `target_subject_prefix` for \
             example",
            list(streams)
        );
        Some((CheckOutcome::Warning, text))
    }

    /// Whether the source has room for the consumer of the copy.
    fn source_limits(&self, known: &[OtherReplication], stream: &StreamInfo) -> Judgement {
        // A running replication already has its consumer.
        let begun = known.iter().any(|known| known.replication.id == self.replication.id);
        limits::source(self.source.account.got(), &self.replication.source.stream, stream, begun)
    }

    /// Whether the account of the target has room for what is created and stored there.
    fn target_limits(&self, source: &StreamInfo) -> Judgement {
        let account = self.target.account.got()?;
        match (self.target.stream.there(), self.planned) {
            (Some(stream), _) => {
                limits::room(account, stream.number("num_replicas"), stream.text("storage") == "memory")
            }
            (None, Some(Ok(config))) => limits::planned(account, config, source.number("max_bytes")),
            _ => None,
        }
    }

    /// The copy stops (`held`) at a message that is too large, and there may never be one: a warning.
    fn judge_sizes(&self, source: &StreamInfo, stream: &StreamInfo, findings: &mut SideFindings) {
        let (Some(from), Some(to)) = (self.source.connect.got(), self.target.connect.got()) else {
            return findings.unknown("max_payload");
        };
        let bytes = |limit: i64| usize::try_from(limit).ok().filter(|limit| *limit > 0);
        let largest =
            bytes(source.number("max_msg_size")).map_or(from.max_payload, |limit| limit.min(from.max_payload));
        // Where the source has no limit, few messages are as large as its server allows.
        let copy = match bytes(source.number("max_msg_size")) {
            Some(_) => target_limits::largest_copy(self.replication, largest),
            None => largest,
        };
        let (path, what, limit) = match bytes(stream.number("max_msg_size")) {
            Some(limit) if limit < to.max_payload => ("/target_stream", "`max_msg_size` of the stream", limit),
            _ => (self.target.path, "`max_payload` of the server", to.max_payload),
        };
        let said = (limit < copy).then(|| {
            let larger = target_limits::fate_of_too_large(&self.replication.on_reject);
            let added = if copy > largest { format!(" (copies up to {copy})") } else { String::new() };
            let text =
                format!("{what} is {limit} bytes and the source has messages of up to {largest}{added}: {larger}");
            (CheckOutcome::Warning, text)
        });
        findings.add_any("max_payload", path, said);
    }

    /// Limits of the account that the copy would reach, and limits of the stream below those of the source.
    fn judge_limits(&self, source: &StreamInfo, stream: &StreamInfo, findings: &mut SideFindings) {
        match (self.target_limits(source), self.kept(source, stream)) {
            (Some((outcome, room)), kept) => {
                let texts = [Some(room), kept.map(|(_, kept)| kept)];
                let text = texts.into_iter().flatten().collect::<Vec<_>>().join("; ");
                findings.add("limits", outcome, self.target.path, &text);
            }
            (None, kept) => findings.add_any("limits", "/target_stream", kept),
        }
    }

    /// Limits of an existing target that remove or refuse copies while the source keeps the messages.
    fn kept(&self, source: &StreamInfo, stream: &StreamInfo) -> Judgement {
        self.target.stream.there()?;
        let found = target_limits::too_small(self.replication, source, stream);
        (!found.is_empty()).then(|| {
            let name = &self.replication.target.stream;
            (CheckOutcome::Warning, format!("target stream `{name}` keeps less than the source: {}", found.join("; ")))
        })
    }

    /// Whether the target can be used as `target_mode` says.
    fn sharing(&self, stream: &StreamInfo, known: &[OtherReplication]) -> Judgement {
        if let Err(refused) = mode::mode(self.replication, stream) {
            return Some((CheckOutcome::Failed, refused));
        }
        let name = self.target.connect.got().map(|info| info.server_name.as_str()).unwrap_or_default();
        let others = loops::into_same_target(self.replication, name, known);
        (self.replication.target_mode == Sharing::Exclusive && !others.is_empty()).then(|| {
            let text = format!(
                "replication {} writes to target stream `{}` too, which is exclusive by `target_mode`: the copy stops \
                 while it does",
                list(&others),
                self.replication.target.stream
            );
            (CheckOutcome::Warning, text)
        })
    }

    /// Whether every filter and transform matches something, with the field of one that does not.
    fn filter(&self, source: &StreamInfo) -> (&'static str, Judgement) {
        let Replication { scope, mapping, .. } = self.replication;
        let (stream, subjects) = (&self.replication.source.stream, list(&source.subjects()));
        let in_vain = |what: &str| {
            Some((CheckOutcome::Warning, format!("{what} no subject of source stream `{stream}`: {subjects}")))
        };
        let (path, name) = match scope.filters() {
            [_] => ("/filter_subject", "`filter_subject`"),
            _ => ("/filter_subjects", "of `filter_subjects`,"),
        };
        let all = Scope::default().of(if self.flow.vague { vec![">"] } else { source.subjects() });
        let unused = |pattern: &&str| !all.iter().any(|subject| patterns::overlap(subject, pattern));
        let filters: Vec<&str> = scope.filters().iter().map(String::as_str).filter(unused).collect();
        if !filters.is_empty() {
            return (path, in_vain(&format!("{name} {} matches", list(&filters))));
        }
        if self.flow.from.is_empty() {
            return ("/exclude_subjects", in_vain("`exclude_subjects` leaves"));
        }
        let used = |src: &str| self.flow.from.iter().any(|subject| patterns::overlap(subject, src));
        let transforms: Vec<&str> = mapping.transforms.iter().map(|t| t.src()).filter(|src| !used(src)).collect();
        if !transforms.is_empty() {
            let what = format!("of `subject_transforms`, {} matches, of the copied subjects,", list(&transforms));
            return ("/subject_transforms", in_vain(&what));
        }
        ("/filter_subject", None)
    }

    /// The copy removes headers that the target does not allow and copies the message: nothing is lost, but the
    /// header's effect.
    fn headers(&self, source: &StreamInfo, target: &StreamInfo, abilities: &Abilities) -> Judgement {
        let mut said = Vec::new();
        if source.flag("allow_rollup_hdrs") && !target.flag("allow_rollup_hdrs") {
            said.push(
                "does not allow rollups (`allow_rollup_hdrs`) and the source does: messages are copied without \
                 `Nats-Rollup`, and the messages that they replace at the source stay",
            );
        }
        if source.flag("allow_msg_ttl") && !abilities.allowed.ttl {
            said.push(
                "does not allow a time to live (`allow_msg_ttl`) and the source does: messages are copied without \
                 `Nats-TTL` and do not expire by it",
            );
        }
        let replaces = source.flag("allow_rollup_hdrs") || source.number("max_msgs_per_subject") > 0;
        if replaces && !subjects::stay_apart(self.replication, source) {
            said.push(
                "gets several subjects of the source as one (`subject_transforms`), and messages of the source replace \
                 older ones of their subject: messages are copied without `Nats-Rollup`, and at the target nothing is \
                 replaced unless the stream says so",
            );
        }
        (!said.is_empty()).then(|| (CheckOutcome::Warning, format!("the stream {}", said.join("; it "))))
    }

    /// Whether the durable consumer of the copy can be used or created, given the existing ones.
    fn consumers(&self, source: &StreamInfo) -> Result<(), String> {
        let names: Vec<String> = Durable::names(self.replication).collect();
        let mut others = self.source.consumers.got().into_iter().flatten();
        let replication = self.replication;
        let wanted = replication.scope.of([">"]);
        others.try_for_each(|consumer| match consumer.config["name"].as_str().unwrap_or_default() {
            ours if names.iter().any(|name| name == ours) => {
                durable::judge(replication, self.owner, ours, &consumer.config).map(drop).map_err(|e| e.message)
            }
            other if source.text("retention") == "workqueue" => {
                let taken = durable::filters(&consumer.config);
                let all = taken.is_empty().then_some(">");
                match taken.into_iter().chain(all).find(|taken| wanted.iter().any(|wanted| patterns::overlap(taken, wanted))) {
                    Some(taken) => Err(format!(
                        "work-queue stream `{}` gives each message to one consumer, and consumer `{other}` takes `{taken}` \
                         already",
                        replication.source.stream
                    )),
                    None => Ok(()),
                }
            }
            _ => Ok(()),
        })
    }

    fn start_path(&self) -> &'static str {
        match self.replication.start {
            Start::All | Start::Sequence(_) => "/start_sequence",
            Start::AtEnd => "/start_at_end",
            Start::Delta(_) => "/start_delta",
            Start::Time(_) => "/start_time",
        }
    }

    fn start(&self, source: &StreamInfo) -> Judgement {
        let last = source.state.last_seq;
        let is_there = |consumer: &ConsumerInfo| {
            let name = consumer.config["name"].as_str().unwrap_or_default();
            Durable::names(self.replication).any(|ours| ours == name)
        };
        let began = self.source.consumers.got().is_some_and(|consumers| consumers.iter().any(is_there));
        if let Some(text) = durable::start_refused(self.replication, source).filter(|_| !began) {
            return Some((CheckOutcome::Failed, text));
        }
        match self.replication.start {
            Start::Sequence(start) if start > last + 1 => {
                let name = &self.replication.source.stream;
                let text =
                    format!("`start_sequence` {start} is beyond the end of source stream `{name}`, which is at {last}");
                Some((CheckOutcome::Warning, text))
            }
            _ => None,
        }
    }

    /// A replication loop works: what returns is skipped. Where it is not recognised at once, it is stored twice before, which
    /// may be intended.
    fn cycle(&self, known: &[OtherReplication]) -> Judgement {
        let name = |facts: &SideFacts| facts.connect.got().map(|info| info.server_name.clone()).unwrap_or_default();
        let (source, target) = (name(self.source), name(self.target));
        let stream = &self.replication.source.stream;
        let mirror = self.source.stream.there().filter(|_| self.replication.loop_protection.is_some());
        if let Some(feed) = mirror.and_then(|info| loops::mirrored(self.replication, info, known, self.owner.site)) {
            let text = format!(
                "closes a replication loop: source stream `{stream}` is a mirror that replication `{feed}` feeds from target stream \
                 `{}`, where everything in it would be stored a second time: feed it with kind `source`, or promote it before",
                self.replication.target.stream
            );
            return Some((CheckOutcome::Failed, text));
        }
        let Some(way) = loops::find(self.replication, (&source, &target), self.flow, known) else {
            let Returned { seq, site, name, from } = self.returned.as_ref()?;
            let text = format!(
                "closes a replication loop: message {seq} of source stream `{stream}` was copied by site `{site}` from message \
                 {from} of target stream `{}`, where it would be stored a second time: add `{site} {name}` to \
                 `target_origin`",
                self.replication.target.stream
            );
            return Some((CheckOutcome::Warning, text));
        };
        let way_back = list(&way);
        Some(match loops::unprotected(self.replication, &way, known, self.owner.site) {
            None => {
                let text = format!(
                    "closes a replication loop with replication {way_back}: each message of source stream `{stream}` that comes \
                     back there is skipped (`loop_protection`)"
                );
                (CheckOutcome::Ok, text)
            }
            Some(why) => {
                let text = format!(
                    "closes a replication loop with replication {way_back}: each message comes back once to source stream \
                     `{stream}`, where it is stored a second time, and goes no further: {why}"
                );
                (CheckOutcome::Warning, text)
            }
        })
    }

    /// The field that subjects at the target depend on most.
    fn mapping_path(&self) -> &'static str {
        let mapping = &self.replication.mapping;
        match (mapping.transforms.is_empty(), mapping.prefix.is_empty(), mapping.remove.is_empty()) {
            (false, ..) => "/subject_transforms",
            (true, false, _) => "/target_subject_prefix",
            (true, true, false) => "/target_subject_remove",
            (true, true, true) => "/target_stream",
        }
    }
}

/// The subjects in the configuration of a stream.
pub(super) fn subjects_of(config: &Value) -> Vec<String> {
    let subjects = config["subjects"].as_array().into_iter().flatten();
    subjects.filter_map(|subject| subject.as_str().map(str::to_owned)).collect()
}

/// The stream that a configuration results in.
fn as_stream(config: &Value) -> Option<StreamInfo> {
    let mut config = config.clone();
    if config["allow_batched"] == true {
        // A stream is created with this only where the server knows it.
        config["metadata"] = json!({"_nats.level": "4"});
    }
    serde_json::from_value(json!({ "config": config, "state": {} })).ok()
}

/// The first of the subjects that another stream than `name` listens on, with these streams.
fn others<'a>(
    listeners: &BTreeMap<String, Vec<String>>,
    name: &str,
    mut subjects: impl Iterator<Item = &'a String>,
) -> Option<(&'a String, Vec<String>)> {
    subjects.find_map(|subject| {
        let streams = listeners.get(subject)?.iter().filter(|stream| *stream != name);
        let streams: Vec<_> = streams.cloned().collect();
        (!streams.is_empty()).then_some((subject, streams))
    })
}

fn remembered(stream: &StreamInfo, abilities: &Abilities) -> Judgement {
    let by_id = abilities.transport == Transport::Pipelined || abilities.mode == TargetMode::Shared;
    let window = std::time::Duration::from_nanos(stream.number("duplicate_window").unsigned_abs());
    let short = dedup_window::too_short(window).filter(|_| by_id);
    short.map(|text| (CheckOutcome::Warning, text))
}

/// Names for a message: the first few.
pub(super) fn list(names: &[impl AsRef<str>]) -> String {
    let mut shown: Vec<_> = names.iter().take(MAX_SHOWN).map(|name| format!("`{}`", name.as_ref())).collect();
    if names.len() > MAX_SHOWN {
        shown.push(format!("{} more", names.len() - MAX_SHOWN));
    }
    if shown.is_empty() { "nothing".to_owned() } else { shown.join(", ") }
}
