//! `config.validate`: checks a document, and both clusters for it.

use tokio::time::{Duration, Instant};

use super::{RequestContext, checked_document};
use crate::{
    config::{Problem, Replication},
    control::{
        api::{Check, CheckResult, Failure, Preflight, PreflightSide, PreflightStream, Validation},
        service::Request,
    },
    preflight::{self, CheckOutcome, Finding, OtherReplication, SideReport},
};

/// From the request to the answer, with both sides asked. The service gives up on an answer a little later.
const ANSWER_WITHIN: Duration = Duration::from_millis(2_200);

pub(super) async fn config_validate(context: &RequestContext, request: Request) -> Result<Validation, Failure> {
    let until = Instant::now() + ANSWER_WITHIN;
    let replication = match checked_document(context, &request.body).await {
        Ok(checked) => checked.replication,
        Err(refused) if refused.code == 400 => {
            return Ok(Validation { problems: refused.problems, ..Validation::default() });
        }
        Err(failure) => return Err(failure),
    };
    let (exists, known) = others(context, &replication).await;
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
        let id = &replication.id;
        let message = format!("replication `{id}` exists at revision {revision}: it can be updated, not added");
        validation.warnings.push(Problem::new("", message));
    }
    Ok(validation)
}

/// The revision of the document that this one replaces, and the other replications.
async fn others(context: &RequestContext, replication: &Replication) -> (Option<u64>, Vec<OtherReplication>) {
    let (mut exists, mut known) = (None, Vec::new());
    for entry in context.documents.all().await {
        if entry.key == replication.id {
            exists = Some(entry.revision);
        } else if let Ok(other) = context.rules.parse(&entry.value, &context.site) {
            let row = context.supervisor.row(&entry.key);
            let (source_server, target_server) =
                row.map(|row| (row.copy.source.server, row.copy.target.server)).unwrap_or_default();
            known.push(OtherReplication { replication: other, source_server, target_server });
        }
    }
    (exists, known)
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
