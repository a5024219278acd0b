//! Checks both sides of a replication before it runs, over short-lived lanes. Nothing is changed: all requests only
//! read. Where an API prefix is the subject of a stream that stores requests, the first answer shows that, and no other
//! request follows.
//!
//! [`look`] asks, [`judge`] judges the answers.

mod judge;
mod limits;
mod look;
mod native;
mod permissions;
mod returned;
mod ring;
mod subjects;

use std::collections::BTreeSet;

use tokio::time::{Duration, Instant};

use self::{
    judge::Pair,
    look::{Answer, Look, Role},
    subjects::Flow,
};
use nats_lane::jetstream::StreamState;

use crate::{
    allow::AllowList,
    config::{OnReject, Replication},
    copy::{
        source::durable::Owner,
        target::{
            bridge,
            stream::{self, Extent, Maker, Update},
        },
    },
    sampling,
    store::OwnStreams,
};

/// Time kept for the questions to the target that need the answers of the source.
const SECOND_LOOK: Duration = Duration::from_millis(300);

/// A replication that is there already; the new one may close a replication loop with it.
#[derive(Debug, Clone)]
pub struct Known {
    /// What it copies.
    pub replication: Replication,
    /// Name of the server that it reads from; empty if it never connected.
    pub source_server: String,
    /// Name of the server that it writes to; empty if it never connected.
    pub target_server: String,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// At the source.
    pub source: SideReport,
    /// At the target.
    pub target: SideReport,
}

/// What was found at one side.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SideReport {
    /// Name of the server that let us in; empty if none did.
    pub server: String,
    /// Version of that server; empty if none let us in.
    pub version: String,
    /// The stream, if it was seen.
    pub stream: Option<StreamState>,
    /// The checks, in order.
    pub findings: Vec<Finding>,
}

/// Why nothing is said of a stream at the source that would store the copies again.
const NO_BRIDGE_CHECK: &str = "whether both sides are one account could not be checked, because the login of the target may not \
     publish to the inbox of the source connection, or there was no time for it: if they are, streams at the source that \
     listen on the subjects of the copies store them again";

/// What the service that checks a document is.
#[derive(Debug, Clone, Copy)]
pub struct Own<'a> {
    /// The name by which it marks the streams that it creates.
    pub site: &'a str,
    /// What identifies its installation.
    pub installation: &'a str,
    /// The streams of its buckets.
    pub streams: &'a OwnStreams,
}

/// One check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Name of the check, in a word.
    pub name: &'static str,
    /// Result.
    pub outcome: Outcome,
    /// In words, side and server named; empty where there is nothing to say.
    pub message: String,
    /// JSON pointer to the field of the document that it is about.
    pub path: &'static str,
}

/// Result of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// As it should be.
    Ok,
    /// May be meant so.
    Warning,
    /// The copy would not work.
    Failed,
    /// Could not be determined; without a message where a check before it has the reason.
    Unknown,
}

/// Checks both sides at once and is done at `until`; checks that were not reached by then are unknown.
pub async fn run(
    rules: &AllowList,
    own: &Own<'_>,
    replication: &Replication,
    known: &[Known],
    until: Instant,
) -> Report {
    if let Some(native) = &replication.native {
        return native::run(rules, own, replication, native, until).await;
    }
    let site = own.site;
    let early = until - SECOND_LOOK;
    let (mut source, mut target) = tokio::join!(
        Look::at(rules, Role::Source, replication, early), //
        Look::at(rules, Role::Target, replication, early)
    );
    let learned = std::mem::take(&mut source.facts.learned);
    let flow = Flow::of(replication, source.facts.stream.there(), &learned.origins);
    let (mut planned, mut update) = (None, None);
    if let (Some(source), Some(server)) = (source.facts.stream.there(), target.facts.connect.got()) {
        let api_prefix = target.facts.connection.as_ref().map_or("", |connection| connection.api_prefix.as_str());
        let maker = Maker::of(server, api_prefix);
        match target.facts.stream.got() {
            Some(None) if replication.create_target => {
                let replicas = source.number("num_replicas").max(1);
                planned = Some(stream::new_config(replication, source, &learned, maker, replicas));
            }
            Some(Some(target)) => {
                let of = |extent| Update::of(replication, source, &learned, target, Maker::of_leader(target), extent);
                update = Extent::of(replication, target, site).and_then(|extent| of(extent).transpose());
            }
            _ => {}
        }
    }
    let mut wanted = flow.to.clone();
    if let Some(Ok(update)) = &update {
        wanted.extend(update.subjects.iter().cloned());
    }
    if let Some(Ok(config)) = &planned {
        wanted.extend(judge::subjects_of(config));
    }
    let target_asks = source.facts.stream.there().is_some();
    let at_target = async {
        if target_asks {
            target.facts.listeners = target.ask_who_listens(wanted, until).await;
        }
    };
    let told = told_at_source(replication);
    let at_source = async {
        if !told.is_empty() {
            source.facts.listeners = source.ask_who_listens(told, until).await;
        }
    };
    tokio::join!(at_target, at_source);
    // Two domains may be one account: then a stream at the source takes what is copied, too.
    if let (Some(from), Some(server), Some(_)) =
        (source.facts.stream.there(), target.facts.connect.got(), target.facts.stream.got())
    {
        let api_prefix = target.facts.connection.as_ref().map_or("", |connection| connection.api_prefix.as_str());
        let apart = !bridge::same_jetstream(from, server, api_prefix);
        if apart {
            source.facts.beside = match target.reaches(&mut source, until).await {
                Some(true) => source.ask_who_listens(flow.to.clone(), until).await,
                Some(false) => Answer::NotAsked,
                None => Answer::Unclear(NO_BRIDGE_CHECK.to_owned()),
            };
        }
    }
    // Last, because messages may be large.
    let returned = returned::find(replication, &mut source, &mut target, until).await;
    let pair = Pair {
        replication,
        source: &source.facts,
        target: &target.facts,
        flow: &flow,
        learned: &learned,
        planned: &planned,
        update: &update,
        own: own.streams,
        owner: Owner { site: own.site, installation: own.installation },
        returned: &returned,
    };
    Report { source: pair.judge_source(known), target: pair.judge_target(known) }
}

/// Subjects that a copy publishes to at the source side.
fn told_at_source(replication: &Replication) -> BTreeSet<String> {
    let mut told = BTreeSet::new();
    if let OnReject::DeadLetter { subject } = &replication.on_reject {
        told.insert(subject.clone());
    }
    if let Some(advisory) = replication.advisory() {
        told.extend(sampling::advisory_patterns(&advisory.subject));
    }
    told
}
