//! `config.validate`: checks a document, and both clusters for it.

use nats_lane::{Dial, jetstream::Api};
use serde_json::Value;
use tokio::time::{Duration, Instant, timeout_at};

use super::{RequestContext, checked_document};
use crate::{
    config::{self, Json, Problem, Replication, StreamPatterns, member_document},
    control::{
        api::{Check, CheckResult, Failure, Preflight, PreflightSide, PreflightStream, Validation},
        service::Request,
    },
    names,
    preflight::{self, CheckOutcome, Finding, OtherReplication, SideReport},
};

/// From the request to the answer, with both sides asked. The service gives up on an answer a little later.
const ANSWER_WITHIN: Duration = Duration::from_millis(2_200);
/// Of it, what is kept for the check of one stream after the streams were listed.
const FOR_PREFLIGHT: Duration = Duration::from_millis(1_200);

pub(super) async fn config_validate(context: &RequestContext, request: Request) -> Result<Validation, Failure> {
    let until = Instant::now() + ANSWER_WITHIN;
    let (mut replication, document) = match checked_document(context, &request.body).await {
        Ok(checked) => (checked.replication, checked.document),
        Err(refused) if refused.code == 400 => {
            return Ok(Validation { problems: refused.problems, ..Validation::default() });
        }
        Err(failure) => return Err(failure),
    };
    let id = replication.id.clone();
    if let Some(patterns) = replication.patterns.clone()
        && !context.read_only
    {
        match example(context, &replication, &patterns, &document, until).await {
            Ok(member) => replication = member,
            Err(validation) => return Ok(validation),
        }
    }
    let (exists, known) = others(context, &id, &replication).await;
    // As its run does.
    let installation = context.supervisor.installation(&replication.id);
    let mut own = context.own();
    own.installation = installation.as_deref().unwrap_or(own.installation);
    let mut validation = if context.read_only {
        Validation { valid: true, ..Validation::default() }
    } else {
        validation(&preflight::run(&context.rules, &own, &replication, &known, until).await)
    };
    if let Some(revision) = exists {
        let message = format!("replication `{id}` exists at revision {revision}: it can be updated, not added");
        validation.warnings.push(Problem::new("", message));
    }
    Ok(validation)
}

/// The revision of the document that this one replaces, and the other replications.
async fn others(context: &RequestContext, id: &str, replication: &Replication) -> (Option<u64>, Vec<OtherReplication>) {
    let (mut exists, mut known) = (None, Vec::new());
    for entry in context.documents.all().await {
        if entry.key == id {
            exists = Some(entry.revision);
        } else if entry.key == replication.id {
            // What this document makes is replaced with it.
        } else if let Ok(other) = entry.replication(&context.rules, &context.site)
            && other.patterns.is_none()
        {
            let row = context.supervisor.row(&entry.key);
            let (source_server, target_server) =
                row.map(|row| (row.copy.source.server, row.copy.target.server)).unwrap_or_default();
            known.push(OtherReplication { replication: other, source_server, target_server });
        }
    }
    (exists, known)
}

/// What a document with patterns makes of the first stream that matches: both clusters are checked for that one. Without one, the
/// answer.
async fn example(
    context: &RequestContext,
    family: &Replication,
    patterns: &StreamPatterns,
    document: &[u8],
    until: Instant,
) -> Result<Replication, Validation> {
    let warning = |message: String| Validation {
        valid: true,
        warnings: vec![Problem::new("/streams", message)],
        ..Validation::default()
    };
    let problem =
        |message: String| Validation { problems: vec![Problem::new("/streams", message)], ..Validation::default() };
    let listed = timeout_at(until - FOR_PREFLIGHT, async {
        let mut lane = context.rules.dial(&family.source.place, names::PROGRAM).await?;
        Api::new(&mut lane).all_stream_names().await
    });
    let listed = match listed.await {
        Ok(Ok(listed)) => listed,
        Ok(Err(error)) => return Err(problem(format!("the streams of the source cannot be listed: {error}"))),
        Err(_) => return Err(warning("the streams of the source could not be listed in time".to_owned())),
    };
    let streams = listed.into_iter().filter(|stream| !context.own_streams.has_name(stream));
    let Some(first) = patterns.select(streams, false).into_iter().next() else {
        return Err(warning("no stream of the source matches now: those that appear later are replicated".to_owned()));
    };
    let document = Json::read(document).map(|json| json.value).unwrap_or_default();
    let fields = document.as_object().cloned().unwrap_or_default();
    let member = Value::Object(member_document(&family.id, &fields, &first));
    let link = context.documents.link_of(&member).await;
    let parsed = config::resolve(&member, link.as_ref());
    let parsed = parsed.and_then(|resolved| context.rules.parse_value(&resolved, &context.site));
    parsed.map_err(|problems| Validation { problems: problems.0, ..Validation::default() })
}

fn validation(report: &preflight::PreflightReport) -> Validation {
    let mut validation = Validation::default();
    for finding in report.source.findings.iter().chain(&report.target.findings) {
        let list = match finding.outcome {
            CheckOutcome::Failed => &mut validation.problems,
            CheckOutcome::Warning | CheckOutcome::Unknown => &mut validation.warnings,
            CheckOutcome::Ok => continue,
        };
        if !finding.message.is_empty() {
            list.push(Problem::new(finding.path, finding.message.as_str()));
        }
    }
    validation.valid = validation.problems.is_empty();
    validation.preflight = Some(Preflight { source: side(&report.source), target: side(&report.target) });
    validation
}

fn side(report: &SideReport) -> PreflightSide {
    PreflightSide {
        server: report.server.clone(),
        version: report.version.clone(),
        stream: report.stream.as_ref().map(|state| PreflightStream {
            messages: state.messages,
            first_seq: state.first_seq,
            last_seq: state.last_seq,
        }),
        checks: report.findings.iter().map(check).collect(),
    }
}

fn check(finding: &Finding) -> Check {
    let result = match finding.outcome {
        CheckOutcome::Ok => CheckResult::Ok,
        CheckOutcome::Warning => CheckResult::Warning,
        CheckOutcome::Failed => CheckResult::Failed,
        CheckOutcome::Unknown => CheckResult::Unknown,
    };
    Check { name: finding.name.to_owned(), result, message: finding.message.clone() }
}
