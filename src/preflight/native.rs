//! Checks of a document of kind `mirror` or `source`: both sides, and the leafnode port of the target.

use nats_lane::{Dial, Error, ErrorKind, ServerInfo, entropy, jetstream::StreamInfo, leafnode::LeafLogin};
use tokio::time::{Instant, timeout_at};

use super::{
    CheckOutcome, Judgement, OtherReplication, Own, PreflightReport, SideReport,
    judge::{SideFindings, list},
    loops,
    side_checks::{CheckAnswer, NO_CONSUMER, SideChecks, SideFacts, SideRole, calls},
    subjects::{Flow, Share},
};
use crate::{
    allow::AllowList,
    config::{NativeFeed, Replication},
    copy::{
        source::clock,
        target::{mark, stream},
    },
    native::{FeedSubjects, Fit, check_target, lacks, refuse_source},
};

/// JSON pointer to the field about the leafnode port.
const LEAF_PATH: &str = "/target_leaf_url";
/// What moves consumers at the target.
const CONSUMER_CALLS: [&str; 4] = ["CONSUMER.LIST", "CONSUMER.INFO", "CONSUMER.CREATE", "CONSUMER.DELETE"];
/// The first servers of each line of versions that check what a leaf publishes; earlier lines never do.
const CHECKS_LEAVES: [(u32, u32, u32); 3] = [(2, 11, 16), (2, 12, 7), (2, 14, 0)];

/// Checks both sides and the leafnode port at once, and is done at `until`.
pub(super) async fn run(
    rules: &AllowList,
    own: &Own<'_>,
    (replication, native): (&Replication, &NativeFeed),
    known: &[OtherReplication],
    until: Instant,
) -> PreflightReport {
    let subjects = FeedSubjects::of(own.site, &replication.id);
    let (source, target, leaf) = tokio::join!(
        SideChecks::at(rules, SideRole::Source, replication, until),
        SideChecks::at(rules, SideRole::Target, replication, until),
        ask_leaf(rules, native, &subjects, until),
    );
    let cycle = judge_cycle(replication, (&source.facts, &target.facts), known);
    PreflightReport {
        source: judge_source(own, replication, &source.facts),
        target: judge_target(own, replication, &target.facts, cycle, &subjects, (native, &leaf)),
    }
}

/// Logs in as a leaf of another name, so that the one of a running feed stays, and does what a feed does.
async fn ask_leaf(
    rules: &AllowList,
    native: &NativeFeed,
    subjects: &FeedSubjects,
    until: Instant,
) -> CheckAnswer<ServerInfo> {
    let name = format!("sr-preflight-{}", entropy::name());
    let login = LeafLogin { account: name.clone(), name, subscriptions: subjects.subscriptions() };
    let asked = async {
        let mut leaf = rules.dial_leaf(&native.leaf, &login).await?;
        // Nobody listens there. A server that does not permit it says so before it answers.
        leaf.send(format!("{}.preflight", subjects.deliver()).as_bytes(), b"", b"", b"");
        leaf.round_trip().await?;
        Ok::<_, Error>(leaf.info().clone())
    };
    match timeout_at(until, asked).await {
        Ok(Ok(info)) => CheckAnswer::Got(info),
        Ok(Err(error)) if error.kind == ErrorKind::Hold => CheckAnswer::Failed(error.message),
        Ok(Err(error)) => CheckAnswer::Unclear(error.message),
        Err(_) => CheckAnswer::Unclear("no answer in time".to_owned()),
    }
}

fn judge_source(own: &Own<'_>, replication: &Replication, facts: &SideFacts) -> SideReport {
    let mut findings = SideFindings::new("source", facts);
    findings.add_answer("connect", facts.path, &facts.connect);
    findings.add_answer("jetstream", facts.path, &facts.jetstream);
    let name = &replication.source.stream;
    match &facts.stream {
        CheckAnswer::Got(None) => {
            findings.add("stream", CheckOutcome::Failed, "/stream", &format!("source stream `{name}` does not exist"));
        }
        CheckAnswer::Got(Some(stream)) => {
            let refused = refuse_source(replication, stream).or_else(|| own.streams.refuse(name, &stream.created));
            findings.add_any("stream", "/stream", refused.map(|text| (CheckOutcome::Failed, text)));
        }
        answer => findings.add_answer("stream", facts.path, answer),
    }
    match facts.clock.got() {
        Some(offset) => {
            findings.add_any("clock", facts.path, clock::apart(*offset).map(|text| (CheckOutcome::Warning, text)));
        }
        None => findings.unknown("clock"),
    }
    let needed = facts.connection.as_ref().map(|connection| {
        let calls = calls(SideRole::Source, replication, None, &connection.api_prefix).into_iter();
        calls.map(|(subject, _)| subject).filter(|subject| !subject.contains(".CONSUMER.INFO.")).collect()
    });
    judge_calls(facts, needed.unwrap_or_default(), &mut findings);
    findings.report(facts)
}

fn judge_target(
    own: &Own<'_>,
    replication: &Replication,
    facts: &SideFacts,
    cycle: Judgement,
    subjects: &FeedSubjects,
    (native, leaf): (&NativeFeed, &CheckAnswer<ServerInfo>),
) -> SideReport {
    let mut findings = SideFindings::new("target", facts);
    findings.add_answer("connect", facts.path, &facts.connect);
    findings.add_answer("jetstream", facts.path, &facts.jetstream);
    let name = &replication.target.stream;
    match &facts.stream {
        CheckAnswer::Got(None) if !replication.create_target => {
            findings.add("stream", CheckOutcome::Failed, "/target_stream", &stream::missing(name));
        }
        CheckAnswer::Got(None) => findings.ok("stream"),
        CheckAnswer::Got(Some(stream)) => {
            let refused = match check_target(native.kind, replication, stream, subjects) {
                Err(error) => Some(error.message),
                Ok(Fit::Lacks) if !may_change(own, replication, stream) => Some(lacks(replication, subjects)),
                Ok(_) => own.streams.refuse(name, &stream.created),
            };
            findings.add_any("stream", "/target_stream", refused.map(|text| (CheckOutcome::Failed, text)));
        }
        answer => findings.add_answer("stream", facts.path, answer),
    }
    let needed = facts.connection.as_ref().map(|connection| {
        let prefix = &connection.api_prefix;
        let call = |call: &str| format!("{prefix}.{call}.{name}");
        let fit = facts
            .stream
            .got()
            .map(|stream| stream.as_ref().map(|stream| check_target(native.kind, replication, stream, subjects)));
        let changes = match fit {
            Some(None) => Some(call("STREAM.CREATE")),
            Some(Some(Ok(Fit::Lacks))) => Some(call("STREAM.UPDATE")),
            _ => None,
        };
        let reads = Some(call("STREAM.MSG.GET"));
        let consumers = CONSUMER_CALLS.into_iter().filter(|_| !replication.consumers.is_empty());
        let consumers = consumers.map(|what| match what {
            "CONSUMER.LIST" => call(what),
            _ => format!("{}.{NO_CONSUMER}", call(what)),
        });
        changes.into_iter().chain(reads).chain(consumers).collect()
    });
    judge_calls(facts, needed.unwrap_or_default(), &mut findings);
    findings.add_any("cycle", facts.path, cycle);
    judge_leaf(&mut findings, subjects, native, leaf);
    findings.report(facts)
}

/// Whether the source may be added to the stream.
fn may_change(own: &Own<'_>, replication: &Replication, stream: &StreamInfo) -> bool {
    replication.update_target || mark::is_ours(&stream.config, own.site, &replication.former)
}

/// Whether another replication copies the messages of the target back to its source.
fn judge_cycle(
    replication: &Replication,
    (source, target): (&SideFacts, &SideFacts),
    known: &[OtherReplication],
) -> Judgement {
    let name = |facts: &SideFacts| facts.connect.got().map(|info| info.server_name.clone()).unwrap_or_default();
    let flow = Flow::of(replication, source.stream.there(), &source.learned.origins);
    let way = loops::find(replication, (&name(source), &name(target)), &flow, known)?;
    let text = format!(
        "closes a replication loop with replication {}: source stream `{}` gets its messages back",
        list(&way),
        replication.source.stream
    );
    Some((CheckOutcome::Warning, text))
}

fn judge_calls(facts: &SideFacts, needed: Vec<String>, findings: &mut SideFindings) {
    let Some(permissions) = facts.permissions.got() else { return findings.unknown("calls") };
    let missing: Vec<_> = needed.into_iter().filter(|subject| permissions.publish(subject) != Share::All).collect();
    let inbox = facts.connection.as_ref().map(|connection| connection.inbox_prefix.as_str()).unwrap_or_default();
    let said = if !missing.is_empty() {
        Some(format!("no permission to publish to {}", list(&missing)))
    } else if !permissions.may_listen(inbox) {
        Some(format!("no permission to subscribe to `{inbox}.>`"))
    } else {
        None
    };
    findings.add_any("calls", facts.path, said.map(|text| (CheckOutcome::Failed, text)));
}

/// The leafnode port; whatever came of it, with what the leaf user needs.
fn judge_leaf(
    findings: &mut SideFindings,
    subjects: &FeedSubjects,
    native: &NativeFeed,
    leaf: &CheckAnswer<ServerInfo>,
) {
    let needs = format!(
        "the feed answers the API prefix `{}` and delivers to `{}.>`; the least permissions of its leaf user are {}",
        subjects.api(),
        subjects.deliver(),
        subjects.permissions()
    );
    let (outcome, text) = match leaf {
        CheckAnswer::Got(info) if !checks_leaves(&info.version) => (
            CheckOutcome::Warning,
            format!(
                "leafnode port `{}`: server version {} does not check what a leaf publishes, so its leaf user can publish \
                 to every subject of the account: {needs}",
                native.leaf, info.version
            ),
        ),
        CheckAnswer::Got(_) => (CheckOutcome::Ok, needs),
        CheckAnswer::Failed(why) => (CheckOutcome::Failed, format!("{why}: {needs}")),
        CheckAnswer::Unclear(why) => (CheckOutcome::Unknown, format!("{why}: {needs}")),
        CheckAnswer::NotAsked => (CheckOutcome::Unknown, needs),
    };
    findings.add("leafnode", outcome, LEAF_PATH, &text);
}

fn checks_leaves(version: &str) -> bool {
    let mut parts = version.split(['.', '-']).map(|part| part.parse().unwrap_or(0));
    let mut next = || parts.next().unwrap_or(0);
    let version: (u32, u32, u32) = (next(), next(), next());
    let newest = CHECKS_LEAVES[CHECKS_LEAVES.len() - 1];
    version >= newest
        || CHECKS_LEAVES.iter().any(|first| (version.0, version.1) == (first.0, first.1) && version >= *first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_that_check_what_a_leaf_publishes() {
        for version in ["2.11.16", "2.12.7", "2.12.8", "2.14.0", "2.15.1", "3.0.0", "2.15.0-dev"] {
            assert!(checks_leaves(version), "{version}");
        }
        for version in ["2.10.26", "2.11.15", "2.12.6", ""] {
            assert!(!checks_leaves(version), "{version}");
        }
    }
}
