//! Checks both sides of a replication before it runs, over short-lived lanes. Nothing is changed: all requests only
//! read. Where an API prefix is the subject of a stream that stores requests, the first answer shows that, and no other
//! request follows.
//!
//! [`side_checks`] asks each side, [`judge`] judges the answers.

mod judge;
mod limits;
mod loops;
mod native;
mod permissions;
mod returned;
mod side_checks;
mod subjects;

use std::collections::BTreeSet;

use nats_lane::{Error, jetstream::StreamState};
use serde_json::Value;
use tokio::time::{Duration, Instant};

use self::{
    judge::Pair,
    side_checks::{CheckAnswer, SideChecks, SideFacts, SideRole},
    subjects::Flow,
};
use crate::{
    allow::AllowList,
    config::{OnReject, Replication},
    copy::{
        source::durable::Owner,
        target::{
            bridge,
            stream::{self, Extent, Maker, Update},
            subjects::Learned,
        },
    },
    sampling,
    store::OwnStreams,
};

pub(crate) use self::{permissions::Permissions, subjects::Share};

/// Time reserved for requests to the target that need the answers of the source.
const SECOND_ROUND: Duration = Duration::from_millis(300);

/// An existing replication; the new one may form a replication loop with it.
#[derive(Debug, Clone)]
pub struct OtherReplication {
    /// Its configuration.
    pub replication: Replication,
    /// Name of the server that it reads from; empty if it never connected.
    pub source_server: String,
    /// Name of the server that it writes to; empty if it never connected.
    pub target_server: String,
}

/// The findings at both sides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PreflightReport {
    /// At the source.
    pub source: SideReport,
    /// At the target.
    pub target: SideReport,
}

/// The findings at one side.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SideReport {
    /// Name of the server that accepted the login; empty if none did.
    pub server: String,
    /// Version of that server; empty if none accepted the login.
    pub version: String,
    /// The stream, if it was seen.
    pub stream: Option<StreamState>,
    /// The checks, in order.
    pub findings: Vec<Finding>,
}

/// Why streams at the source that would store the copies again were not looked for.
const NO_BRIDGE_CHECK: &str = "whether both sides are one account could not be checked, because the login of the target may not \
     publish to the inbox of the source connection, or there was no time for it: if they are, streams at the source that \
     listen on the subjects of the copies store them again";

/// The service that checks a document.
#[derive(Debug, Clone, Copy)]
pub struct Own<'a> {
    /// The site's name; it marks the streams that the service creates.
    pub site: &'a str,
    /// Identifies its installation.
    pub installation: &'a str,
    /// The streams of its buckets.
    pub streams: &'a OwnStreams,
}

/// One check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Name of the check, one word.
    pub name: &'static str,
    /// Result.
    pub outcome: CheckOutcome,
    /// Description that names the side and the server; empty where there is nothing to report.
    pub message: String,
    /// JSON pointer to the field of the document that it is about.
    pub path: &'static str,
}

/// What a rule found: nothing to report, or the outcome and a message.
type Judgement = Option<(CheckOutcome, String)>;

/// Result of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CheckOutcome {
    /// All is well.
    Ok,
    /// May be intended.
    Warning,
    /// The copy would not work.
    Failed,
    /// Could not be determined; without a message if an earlier check has the reason.
    Unknown,
}

/// Checks both sides at once and is done at `until`; checks that were not reached by then are unknown.
pub async fn run(
    rules: &AllowList,
    own: &Own<'_>,
    replication: &Replication,
    known: &[OtherReplication],
    until: Instant,
) -> PreflightReport {
    if let Some(native) = &replication.native {
        return native::run(rules, own, (replication, native), known, until).await;
    }
    let early = until - SECOND_ROUND;
    let (mut source, mut target) = tokio::join!(
        SideChecks::at(rules, SideRole::Source, replication, early), //
        SideChecks::at(rules, SideRole::Target, replication, early)
    );
    let learned = std::mem::take(&mut source.facts.learned);
    let flow = Flow::of(replication, source.facts.stream.there(), &learned.origins);
    let TargetChanges { planned, update } =
        target_changes(replication, own.site, &source.facts, &target.facts, &learned);
    let mut wanted = flow.to.clone();
    if let Some(Ok(update)) = &update {
        wanted.extend(update.subjects.iter().cloned());
    }
    if let Some(Ok(config)) = &planned {
        wanted.extend(judge::subjects_of(config));
    }
    find_listeners(replication, &mut source, &mut target, wanted, until).await;
    find_bridge(&flow, &mut source, &mut target, until).await;
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
    PreflightReport { source: pair.judge_source(known), target: pair.judge_target(known) }
}

/// What a run would do to the target stream before it copies.
#[derive(Default)]
struct TargetChanges {
    /// The configuration of a stream that it would create.
    planned: Option<Result<Value, Error>>,
    /// The update that it would make to an existing stream.
    update: Option<Result<Update, Error>>,
}

fn target_changes(
    replication: &Replication,
    site: &str,
    source: &SideFacts,
    target: &SideFacts,
    learned: &Learned,
) -> TargetChanges {
    let (Some(source), Some(server)) = (source.stream.there(), target.connect.got()) else {
        return TargetChanges::default();
    };
    match target.stream.got() {
        Some(None) if replication.create_target => {
            let replicas = source.number("num_replicas").max(1);
            let maker = Maker::of(server, target.api_prefix());
            let planned = Some(stream::new_config(replication, source, learned, maker, replicas));
            TargetChanges { planned, update: None }
        }
        Some(Some(target)) => {
            let of = |extent| Update::of(replication, source, learned, target, Maker::of_leader(target), extent);
            let update = Extent::of(replication, target, site).and_then(|extent| of(extent).transpose());
            TargetChanges { planned: None, update }
        }
        _ => TargetChanges::default(),
    }
}

/// Asks both sides which streams listen on the subjects that the copy publishes to.
async fn find_listeners(
    replication: &Replication,
    source: &mut SideChecks,
    target: &mut SideChecks,
    wanted: BTreeSet<String>,
    until: Instant,
) {
    let target_asks = source.facts.stream.there().is_some();
    let at_target = async {
        if target_asks {
            target.facts.listeners = target.ask_who_listens(wanted, until).await;
        }
    };
    let published = published_at_source(replication);
    let at_source = async {
        if !published.is_empty() {
            source.facts.listeners = source.ask_who_listens(published, until).await;
        }
    };
    tokio::join!(at_target, at_source);
}

/// Finds streams at the source that would take what the copy writes to the target: two domains may be one account.
async fn find_bridge(flow: &Flow, source: &mut SideChecks, target: &mut SideChecks, until: Instant) {
    let (Some(from), Some(server), Some(_)) =
        (source.facts.stream.there(), target.facts.connect.got(), target.facts.stream.got())
    else {
        return;
    };
    if bridge::same_jetstream(from, server, target.facts.api_prefix()) {
        return;
    }
    source.facts.beside = match target.reaches(source, until).await {
        Some(true) => source.ask_who_listens(flow.to.clone(), until).await,
        Some(false) => CheckAnswer::NotAsked,
        None => CheckAnswer::Unclear(NO_BRIDGE_CHECK.to_owned()),
    };
}

/// Subjects that a copy publishes to at the source side.
fn published_at_source(replication: &Replication) -> BTreeSet<String> {
    let mut subjects = BTreeSet::new();
    if let OnReject::DeadLetter { subject } = &replication.on_reject {
        subjects.insert(subject.clone());
    }
    if let Some(advisory) = replication.advisory() {
        subjects.extend(sampling::advisory_patterns(&advisory.subject));
    }
    subjects
}
