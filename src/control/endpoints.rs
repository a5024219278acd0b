//! The endpoints: one function per request.

mod adapter;
mod consumers;
mod dlq;
mod drift;
pub(super) mod drift_watch;
mod durable;
mod family;
mod heartbeat;
mod instances;
mod link;
mod pause;
mod position;
mod promote;
mod release;
mod report;
mod schema;
mod senders;
mod stepdown;
mod stream_answers;
mod validate;
mod verify;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use chrono::{SecondsFormat, Utc};
use futures_util::FutureExt;
use nats_lane::endpoint::nearest;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json as value};
use tokio::{
    sync::Semaphore,
    time::{sleep, timeout},
};
use tracing::{info, warn};

use self::{
    adapter::{
        adapter_add, adapter_delete, adapter_get, adapter_list, adapter_pause, adapter_resume, adapter_status,
        adapter_update, adapter_validate,
    },
    consumers::{consumers_export, consumers_import},
    dlq::{dlq_drop, dlq_list, dlq_replay, dlq_show},
    drift::drift,
    durable::Leaving,
    family::{Members, delete_member},
    heartbeat::{heartbeat_get, heartbeat_set},
    instances::instances,
    link::{link_add, link_delete, link_get, link_list, link_update, link_validate},
    pause::{pause, resume},
    position::position,
    promote::promote,
    release::{retry, skip},
    report::report,
    schema::schema,
    senders::senders,
    stepdown::stepdown,
    validate::config_validate,
    verify::{verify, verify_cancel, verify_status},
};
use super::{
    api::{
        Changed, DeleteRequest, Failure, GetRequest, List, ListRequest, ListRow, Status, StatusRequest, StoredDocument,
    },
    documents::Documents,
    service::{Data, EndpointKind, Handler, Request, Route},
};
use crate::{
    adapter::AdapterHandle,
    allow::AllowList,
    config::{self, Json, MAX_DOCUMENT, Problem, Problems, Replication},
    events::Events,
    heartbeat as heartbeats,
    lease::Leases,
    names::{DEADLINE_HEADER, EXPECTED_REVISION_HEADER, HEARTBEATS_KEY, SITE_KEY},
    preflight::Own,
    status,
    store::{ConfigEntry, ConfigStore, MarkKind, OwnStreams, PositionStore, SenderStore, WriteError},
    supervisor::Handle,
};

/// How often a document with `***` is completed again because the stored one changed meanwhile.
pub(super) const UNMASK_TRIES: usize = 5;
/// Rows of one page where the request does not say.
const DEFAULT_LIMIT: usize = 1_000;
/// How long a deletion waits for the copy to stop before it removes the position all the same. A copy that stops later
/// may write it again: then it resumes there when it is added again.
const STOP_WITHIN: Duration = Duration::from_secs(60);

/// How often a record is polled that another instance will write.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// What the endpoints work with.
#[derive(Debug)]
pub(super) struct RequestContext {
    pub(super) client: async_nats::Client,
    pub(super) site: String,
    pub(super) instance: String,
    pub(super) installation: String,
    pub(super) own_streams: OwnStreams,
    pub(super) rules: AllowList,
    /// Requests change nothing and make no connections.
    pub(super) read_only: bool,
    pub(super) config: ConfigStore,
    pub(super) documents: Documents,
    pub(super) positions: PositionStore,
    pub(super) leases: Leases,
    pub(super) senders: SenderStore,
    pub(super) supervisor: Handle,
    pub(super) heartbeats: heartbeats::HeartbeatHandle,
    pub(super) adapters: AdapterHandle,
    pub(super) events: Events,
    /// Reports that may be made at once: each asks all servers.
    pub(super) reports: Semaphore,
}

/// All endpoints below `prefix`.
pub(super) fn routes(context: &Arc<RequestContext>, prefix: &str) -> Vec<Route> {
    let route = |name: &'static str, kind: EndpointKind, handler: Handler| {
        let subject = format!("{prefix}.{}", name.replace('-', "."));
        Route { name, subject, kind, metadata: schema::metadata(name), handler, data: None }
    };
    macro_rules! handler {
        ($function:ident) => {{
            let context = context.clone();
            Arc::new(move |request| {
                let context = context.clone();
                async move { reply(&$function(&context, request).await?) }.boxed()
            })
        }};
    }
    vec![
        route("config-add", EndpointKind::Mutation, handler!(config_add)),
        route("config-update", EndpointKind::Mutation, handler!(config_update)),
        route("config-delete", EndpointKind::Mutation, handler!(config_delete)),
        route("config-validate", EndpointKind::Inquiry, handler!(config_validate)),
        route("config-get", EndpointKind::Query, handler!(config_get)),
        route("config-list", EndpointKind::Query, handler!(config_list)),
        route("config-schema", EndpointKind::Query, handler!(config_schema)),
        Route { data: Some(states(context.clone())), ..route("status", EndpointKind::Query, handler!(status)) },
        route("report", EndpointKind::Inquiry, handler!(report)),
        route("drift", EndpointKind::Inquiry, handler!(drift)),
        route("instances", EndpointKind::Query, handler!(instances)),
        route("senders", EndpointKind::Query, handler!(senders)),
        route("pause", EndpointKind::Mutation, handler!(pause)),
        route("resume", EndpointKind::Mutation, handler!(resume)),
        route("position", EndpointKind::Mutation, handler!(position)),
        route("promote", EndpointKind::Mutation, handler!(promote)),
        route("stepdown", EndpointKind::Mutation, handler!(stepdown)),
        route("retry", EndpointKind::Mutation, handler!(retry)),
        route("skip", EndpointKind::Mutation, handler!(skip)),
        route("consumers-export", EndpointKind::Inquiry, handler!(consumers_export)),
        route("consumers-import", EndpointKind::Mutation, handler!(consumers_import)),
        route("dlq-list", EndpointKind::Inquiry, handler!(dlq_list)),
        route("dlq-show", EndpointKind::Inquiry, handler!(dlq_show)),
        route("dlq-replay", EndpointKind::Mutation, handler!(dlq_replay)),
        route("dlq-drop", EndpointKind::Mutation, handler!(dlq_drop)),
        route("verify", EndpointKind::Mutation, handler!(verify)),
        route("verify-status", EndpointKind::Query, handler!(verify_status)),
        route("verify-cancel", EndpointKind::Mutation, handler!(verify_cancel)),
        route("schema", EndpointKind::Query, handler!(schema)),
        route("adapter-add", EndpointKind::Mutation, handler!(adapter_add)),
        route("adapter-update", EndpointKind::Mutation, handler!(adapter_update)),
        route("adapter-validate", EndpointKind::Inquiry, handler!(adapter_validate)),
        route("adapter-get", EndpointKind::Query, handler!(adapter_get)),
        route("adapter-list", EndpointKind::Query, handler!(adapter_list)),
        route("adapter-delete", EndpointKind::Mutation, handler!(adapter_delete)),
        route("adapter-status", EndpointKind::Query, handler!(adapter_status)),
        route("adapter-pause", EndpointKind::Mutation, handler!(adapter_pause)),
        route("adapter-resume", EndpointKind::Mutation, handler!(adapter_resume)),
        route("link-add", EndpointKind::Mutation, handler!(link_add)),
        route("link-update", EndpointKind::Mutation, handler!(link_update)),
        route("link-validate", EndpointKind::Inquiry, handler!(link_validate)),
        route("link-get", EndpointKind::Query, handler!(link_get)),
        route("link-list", EndpointKind::Query, handler!(link_list)),
        route("link-delete", EndpointKind::Mutation, handler!(link_delete)),
        route("heartbeat-get", EndpointKind::Query, handler!(heartbeat_get)),
        route("heartbeat-set", EndpointKind::Mutation, handler!(heartbeat_set)),
    ]
}

/// How many replications are in each state: the same fields, however many there are. And the time of this instance, which
/// others can be compared with.
fn states(context: Arc<RequestContext>) -> Data {
    let time = || Utc::now().to_rfc3339_opts(SecondsFormat::Millis, true);
    Arc::new(move || value!({"replications": context.supervisor.states(), "time": time()}))
}

async fn config_add(context: &RequestContext, request: Request) -> Result<Changed, Failure> {
    in_time(&request)?;
    let CheckedDocument { replication: Replication { id, .. }, document, unmasked } =
        checked_document(context, &request.body).await?;
    let written = match unmasked {
        // The document that a secret was taken from exists, even if it is being deleted at this moment.
        Some(revision) => Err(WriteError::Exists { revision }),
        None => context.config.create(&id, document).await,
    };
    changed(id, written, "added")
}

async fn config_update(context: &RequestContext, request: Request) -> Result<Changed, Failure> {
    in_time(&request)?;
    let expected = expected_revision(&request)?;
    for _ in 0..UNMASK_TRIES {
        let CheckedDocument { replication: Replication { id, .. }, document, unmasked } =
            checked_document(context, &request.body).await?;
        not_only_in_file(context, &id).await?;
        if let Some(revision) = stored_already(context, &id, &document, expected).await? {
            return Ok(Changed { replication: id, revision });
        }
        match context.config.update(&id, document, expected.or(unmasked)).await {
            // The secret that `***` stands for may have changed.
            Err(WriteError::Conflict { .. }) if expected.is_none() => {}
            written => return changed(id, written, "updated"),
        }
    }
    Err(Failure::new(503, "the document cannot be updated: it is changed all the time"))
}

/// Revision of the stored document if it equals the sent one, regardless of formatting. Then nothing is written: clients
/// that send the same document again and again neither use up the history nor disturb the running copy.
async fn stored_already(
    context: &RequestContext,
    id: &str,
    document: &Bytes,
    expected: Option<u64>,
) -> Result<Option<u64>, Failure> {
    let stored = context.config.get(id).await.map_err(|error| Failure::new(503, error.to_string()))?;
    let Some(stored) = stored.filter(|stored| expected.is_none_or(|expected| expected == stored.revision)) else {
        return Ok(None);
    };
    let equal = Json::read(&stored.value).is_ok_and(|stored| Json::read(document) == Ok(stored));
    Ok(equal.then_some(stored.revision))
}

/// What is in the file of this instance and not in the bucket is changed in the file.
async fn not_only_in_file(context: &RequestContext, id: &str) -> Result<(), Failure> {
    let stored = async || context.config.get(id).await.map_err(|error| Failure::new(503, error.to_string()));
    if !context.config.is_in_file(id) || stored().await?.is_some() {
        return Ok(());
    }
    let message = format!(
        "replication `{id}` is configured in the file of instance `{}`: change it there, or add a document of the same id, which takes \
         precedence over the file's",
        context.instance
    );
    Err(Failure::new(409, message))
}

async fn config_delete(context: &RequestContext, request: Request) -> Result<Changed, Failure> {
    in_time(&request)?;
    let expected = expected_revision(&request)?;
    let DeleteRequest { replication, keep } =
        named(&request.body, |replication| DeleteRequest { replication, keep: false })?;
    check_id(&replication)?;
    if MarkKind::of_key(&replication).is_some() || [HEARTBEATS_KEY, SITE_KEY].contains(&replication.as_str()) {
        return Err(not_found(&replication));
    }
    if let Some(entry) = context.documents.get(&replication).await
        && let Some(family) = entry.family.clone()
    {
        return delete_member(context, entry, family, keep).await;
    }
    not_only_in_file(context, &replication).await?;
    context.delete(replication, expected, keep).await
}

/// Removes the records of a replication whose document was deleted at `revision`. It may have been added again meanwhile:
/// records that were written since belong to the new one and stay.
async fn forget(
    context: &RequestContext,
    id: &str,
    revision: u64,
    leaving: Leaving,
) -> Result<(), crate::store::Error> {
    // Read before the document is: if there is none then, these records were written for the deleted one.
    let mut lease = context.leases.revision(id).await?;
    let position = context.positions.revision(id).await?;
    let senders = context.senders.newest(id).await?;
    if context.config.get(id).await?.is_none() {
        leaving.remove_source(context, id).await;
        leaving.remove_durable(context, id).await;
        context.positions.remove(id, position).await?;
        context.positions.remove_verification(id).await?;
        context.senders.remove(id, senders).await?;
        context.leases.forget(id, lease).await?;
        // Its last holder may have released it just now.
        lease = context.leases.revision(id).await?;
        if lease > 0 && context.config.get(id).await?.is_none() {
            context.leases.forget(id, lease).await?;
        }
    } else {
        info!(replication = id, "was added again while it was deleted: it keeps its position and its lease");
    }
    // The saved copy of the document is removed with it.
    for kind in [MarkKind::Paused, MarkKind::Release, MarkKind::Verify] {
        if let Some((marked, _)) = context.config.marked(id, kind).await?
            && marked < revision
        {
            // A conflict means that it was put again, or is already gone.
            if let Err(WriteError::Store(error)) = context.config.unmark(id, kind, Some(marked)).await {
                return Err(error);
            }
        }
    }
    Ok(())
}

/// Waits until no other instance leads the replication, according to the record itself.
async fn stopped_elsewhere(context: &RequestContext, id: &str) {
    while let Ok((record, _)) = context.positions.read(id).await
        && record.leader().is_some_and(|leader| context.supervisor.is_other(leader))
    {
        sleep(LOOK_AGAIN).await;
    }
}

async fn config_get(context: &RequestContext, request: Request) -> Result<StoredDocument, Failure> {
    let GetRequest { replication, resolved } =
        named(&request.body, |replication| GetRequest { replication, resolved: false })?;
    let entry = context.existing(&replication).await?;
    let problems =
        entry.replication(&context.rules, &context.site).err().map(|problems| problems.0).unwrap_or_default();
    let document = if resolved { entry.resolved() } else { Json::read(&entry.value) };
    let config = document.map_or(Value::Null, |json| config::mask_document(&json.value));
    Ok(StoredDocument { replication, revision: entry.revision, config, problems })
}

async fn config_list(context: &RequestContext, request: Request) -> Result<List, Failure> {
    let ListRequest { offset, limit } = options(&request.body)?;
    let all = context.documents.list().await.into_iter();
    let all = all.map(|(replication, revision)| {
        let state = context.supervisor.row(&replication).map(|row| row.state);
        ListRow { replication, revision, origin: status::origin(revision).to_owned(), state }
    });
    let Page { rows: replications, limit, total } = page(all.collect(), offset, limit, context.room());
    Ok(List { replications, offset, limit, total })
}

async fn config_schema(_: &RequestContext, _: Request) -> Result<&'static Value, Failure> {
    Ok(config::replication_schema())
}

async fn status(context: &RequestContext, request: Request) -> Result<Status, Failure> {
    let request = match request.body.trim_ascii() {
        [] | [b'{', ..] => options(&request.body)?,
        _ => named(&request.body, |id| StatusRequest { replication: Some(id), ..StatusRequest::default() })?,
    };
    let rows = match &request.replication {
        Some(id) => {
            check_id(id)?;
            match context.supervisor.row(id) {
                Some(row) => vec![row],
                None => return Err(context.not_found(id).await),
            }
        }
        None => context.supervisor.rows(),
    };
    let Page { rows: replications, limit, total } = page(rows, request.offset, request.limit, context.room());
    Ok(Status { site: context.site.clone(), replications, offset: request.offset, limit, total })
}

impl RequestContext {
    /// Deletes a document, waits until nothing runs of it, and removes its records unless they are kept.
    async fn delete(&self, replication: String, expected: Option<u64>, keep: bool) -> Result<Changed, Failure> {
        let leaving = Leaving::of(self, &replication).await;
        let members = Members::of(self, &replication).await;
        let written = self.config.delete(&replication, expected).await;
        let deleted = changed(replication, written, "deleted")?;
        let id = deleted.replication.as_str();
        if !keep {
            members.forget(self, id, deleted.revision).await?;
        }
        if self.config.is_in_file(id) {
            // The file's document runs from now on, from where this one stopped.
            return Ok(deleted);
        }
        let stopped = async {
            self.supervisor.stopped_since(id, deleted.revision).await;
            stopped_elsewhere(self, id).await;
        };
        if timeout(STOP_WITHIN, stopped).await.is_err() {
            warn!(replication = id, "was deleted and did not stop within {STOP_WITHIN:?}");
        }
        if !keep {
            let failed = |error: crate::store::Error| Failure::new(503, error.to_string());
            forget(self, id, deleted.revision, leaving).await.map_err(failed)?;
        }
        Ok(deleted)
    }

    /// The document of a replication that a request names.
    async fn existing(&self, id: &str) -> Result<ConfigEntry, Failure> {
        check_id(id)?;
        match self.documents.get(id).await {
            Some(entry) => Ok(entry),
            None => Err(self.not_found(id).await),
        }
    }

    /// The refusal for an id that does not exist, with the one that is probably meant.
    async fn not_found(&self, id: &str) -> Failure {
        let all = self.documents.list().await;
        let failure = not_found(id);
        match nearest(id, all.iter().map(|(id, _)| id.as_str())) {
            Some(near) => Failure::new(failure.code, format!("{}, did you mean `{near}`?", failure.description)),
            None => failure,
        }
    }

    /// This service, as the preflight needs it.
    pub(super) fn own(&self) -> Own<'_> {
        Own { site: &self.site, installation: &self.installation, streams: &self.own_streams }
    }

    /// Bytes that the rows of a reply may have.
    fn room(&self) -> usize {
        self.client.server_info().max_payload.saturating_sub(self.site.len() + 1024)
    }
}

/// A valid document.
#[derive(Debug)]
pub(super) struct CheckedDocument {
    pub(super) replication: Replication,
    /// The document to store: in one line, fields in the order of the schema, stored secrets in place of `***`.
    pub(super) document: Bytes,
    /// The stored revision that its secrets are from: the document may be written only while that revision is stored.
    unmasked: Option<u64>,
}

/// Reads a document; one with problems is refused with code 400.
pub(super) async fn checked_document(context: &RequestContext, body: &Bytes) -> Result<CheckedDocument, Failure> {
    let Json { value: mut document, mut problems } = Json::read(body).map_err(refused)?;
    let unmasked = unmask(context, &mut document).await?.unwrap_or_else(|found| {
        problems.extend(found);
        None
    });
    let link = context.documents.link_of(&document).await;
    let resolved = config::resolve(&document, link.as_ref());
    let parsed = resolved.and_then(|resolved| context.rules.parse_value(&resolved, &context.site));
    let replication = valid(parsed, problems)?;
    let document = Bytes::from(config::compact_document(&document));
    check_size(&document)?;
    Ok(CheckedDocument { replication, document, unmasked })
}

/// What was parsed, if there were no problems. Those that were found before are better than others about the same field, such as
/// the words about a secret that is not stored than those about one that is missing.
fn valid<T>(parsed: Result<T, Problems>, mut problems: Vec<Problem>) -> Result<T, Failure> {
    let others = match parsed {
        Ok(parsed) if problems.is_empty() => return Ok(parsed),
        Ok(_) => Vec::new(),
        Err(others) => others.0,
    };
    let others = others.into_iter().filter(|other| problems.iter().all(|problem| problem.path != other.path));
    let others: Vec<_> = others.collect();
    problems.extend(others);
    Err(refused(Problems(problems)))
}

fn check_size(document: &Bytes) -> Result<(), Failure> {
    if document.len() > MAX_DOCUMENT {
        let message = format!("the document has {} bytes, {MAX_DOCUMENT} are possible", document.len());
        return Err(refused(Problems(vec![Problem::new("", message)])));
    }
    Ok(())
}

/// Replaces `***` by stored secrets. Returns the revision that they are from, if there were any, or the problems.
async fn unmask(context: &RequestContext, document: &mut Value) -> Result<Result<Option<u64>, Vec<Problem>>, Failure> {
    let id = config::document_id(document, &context.site);
    let Value::Object(fields) = document else { return Ok(Ok(None)) };
    if !config::has_mask(fields) {
        return Ok(Ok(None));
    }
    let stored = match id.filter(|id| check_id(id).is_ok()) {
        Some(id) => context.config.get(&id).await.map_err(|error| Failure::new(503, error.to_string()))?,
        None => None,
    };
    let revision = stored.as_ref().map(|entry| entry.revision);
    let stored = stored.and_then(|entry| Json::read(&entry.value).ok()).map(|json| json.value);
    Ok(config::unmask_document(fields, stored.as_ref()).map(|()| revision))
}

fn changed(replication: String, written: Result<u64, WriteError>, how: &str) -> Result<Changed, Failure> {
    match written {
        Ok(revision) => {
            info!(replication, revision, "document {how} by request");
            Ok(Changed { replication, revision })
        }
        Err(WriteError::Missing) => Err(not_found(&replication)),
        Err(WriteError::Exists { revision }) => {
            Err(Failure::new(409, format!("replication `{replication}` exists at revision {revision}, update it")))
        }
        Err(WriteError::Conflict { revision }) => {
            Err(Failure::new(409, format!("replication `{replication}` is at revision {revision}")))
        }
        Err(WriteError::Store(error)) => Err(Failure::new(503, error.to_string())),
    }
}

/// The revision of a mark that was written or removed.
fn written(id: &str, result: Result<u64, WriteError>) -> Result<u64, Failure> {
    result.map_err(|error| match error {
        WriteError::Store(error) => Failure::new(503, error.to_string()),
        error => Failure::new(409, format!("replication `{id}`: {error}")),
    })
}

fn not_found(id: &str) -> Failure {
    let id: String = id.chars().take(80).collect();
    Failure::new(404, format!("replication `{id}` does not exist"))
}

fn refused(problems: Problems) -> Failure {
    Failure { problems: problems.0, ..Failure::new(400, "the document is not valid") }
}

/// A change that arrives after its client gave up is not made.
fn in_time(request: &Request) -> Result<(), Failure> {
    match number(request, DEADLINE_HEADER)? {
        Some(deadline) if i64::try_from(deadline).is_ok_and(|deadline| deadline < Utc::now().timestamp_millis()) => {
            Err(Failure::new(408, "the request came after its deadline"))
        }
        _ => Ok(()),
    }
}

fn expected_revision(request: &Request) -> Result<Option<u64>, Failure> {
    number(request, EXPECTED_REVISION_HEADER)
}

fn number(request: &Request, header: &str) -> Result<Option<u64>, Failure> {
    let Some(value) = request.headers.get(header) else { return Ok(None) };
    let number = value.as_str().trim().parse();
    number.map(Some).map_err(|_| Failure::new(400, format!("header `{header}` is not a number")))
}

/// Reads a request that names a replication: JSON, or the plain id.
fn named<T: DeserializeOwned>(body: &[u8], plain: impl FnOnce(String) -> T) -> Result<T, Failure> {
    match body.trim_ascii() {
        [] => Err(Failure::new(400, "the request names no replication: send its id")),
        body @ [b'{', ..] => json(body),
        body => match std::str::from_utf8(body) {
            Ok(id) if check_id(id).is_ok() => Ok(plain(id.to_owned())),
            _ => Err(Failure::new(400, "the request is neither the id of a replication nor JSON")),
        },
    }
}

/// Reads a request that may be empty.
fn options<T: DeserializeOwned + Default>(body: &[u8]) -> Result<T, Failure> {
    match body.trim_ascii() {
        [] => Ok(T::default()),
        body @ [b'{', ..] => json(body),
        _ => Err(Failure::new(400, "the request is neither empty nor a JSON object")),
    }
}

fn json<T: DeserializeOwned>(body: &[u8]) -> Result<T, Failure> {
    if let Ok(Json { problems, .. }) = Json::read(body)
        && !problems.is_empty()
    {
        return Err(Failure { problems, ..Failure::new(400, "the request is not valid") });
    }
    serde_json::from_slice(body)
        .map_err(|error| Failure::new(400, format!("the request is not valid: {}", without_values(&error.to_string()))))
}

/// The text of a parse error without its quotes from the request: the text is counted and shown to other clients, and the
/// request may contain a URL with a password in the wrong place.
fn without_values(error: &str) -> String {
    let mut text = match (error.find('"'), error.rfind('"')) {
        (Some(from), Some(to)) if from < to => format!("{}\"...\"{}", &error[..from], &error[to + 1..]),
        _ => error.to_owned(),
    };
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    // Of flattened fields the text names none that is expected, and has a position.
    if let Some((start, rest)) = error.split_once("unknown field `")
        && let Some((field, rest)) = rest.split_once("`, expected").or_else(|| rest.rsplit_once('`'))
        && !field.bytes().all(is_name)
    {
        let expected = if error.contains("`, expected") { ", expected" } else { "" };
        text = format!("{start}unknown field{expected}{rest}");
    }
    text
}

fn check_id(id: &str) -> Result<(), Failure> {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"-/_=.".contains(&byte);
    let tokens = id.split('.').all(|token| !token.is_empty());
    if tokens && id.len() <= 512 && id.bytes().all(legal) {
        return Ok(());
    }
    Err(Failure::new(400, "the request does not name a replication: an id has letters, digits, - _ = and ."))
}

fn reply<T: Serialize>(reply: &T) -> Result<Vec<u8>, Failure> {
    serde_json::to_vec(reply).map_err(|error| Failure::new(500, error.to_string()))
}

struct Page<T> {
    rows: Vec<T>,
    limit: usize,
    total: usize,
}

/// The rows from `offset` on, as many as are requested and fit into `room` bytes.
fn page<T: Serialize>(all: Vec<T>, offset: usize, limit: Option<usize>, room: usize) -> Page<T> {
    let (total, limit) = (all.len(), limit.unwrap_or(DEFAULT_LIMIT));
    let mut used = 0;
    let fits = |row: &T| {
        used += serde_json::to_vec(row).map_or(0, |json| json.len() + 1);
        used <= room
    };
    let rows = all.into_iter().skip(offset).take(limit).take_while(fits).collect();
    Page { rows, limit, total }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(replication: String) -> DeleteRequest {
        DeleteRequest { replication, keep: false }
    }

    #[test]
    fn a_replication_is_named_by_json_or_by_plain_text() {
        let check = |body: &str, replication: &str, keep: bool| {
            let expect = DeleteRequest { replication: replication.to_owned(), keep };
            assert_eq!(named(body.as_bytes(), plain), Ok(expect), "{body}");
        };
        check("ORDERS", "ORDERS", false);
        check(" ORDERS.EAST\n", "ORDERS.EAST", false);
        check(r#"{"replication":"ORDERS"}"#, "ORDERS", false);
        check(r#" {"replication":"ORDERS","keep":true}"#, "ORDERS", true);
    }

    #[test]
    fn what_names_no_replication_is_refused() {
        let check = |body: &[u8], expect: &str| {
            let failure = named(body, plain).unwrap_err();
            assert_eq!(failure.code, 400);
            assert!(failure.description.contains(expect), "{failure}");
        };
        check(b"", "names no replication");
        check(b" \n", "names no replication");
        check(b"a b", "neither");
        check(b"\"A\"", "neither");
        check(b"\xff\xfe", "neither");
        check(b"{", "not valid");
        check(br#"{"replication":5}"#, "expected a string");
        check(br#"{"replication":"A","keep":"yes"}"#, "expected a boolean");
        check(br#"{"replicaton":"A"}"#, "unknown field `replicaton`");
        check(br#"{"nats://u:p@h":"A"}"#, "unknown field, expected `replication` or `keep`");
        check(br#"{"replication":"A","keep":"nats://\"u\":p@h"}"#, "string \"...\", expected a boolean");
        check(b"{}", "missing field `replication`");
    }

    #[test]
    fn an_error_quotes_no_unknown_field_that_is_no_name() {
        let check = |error: &str, expect: &str| assert_eq!(without_values(error), expect);
        check("unknown field `nats://u:p@h` at line 1 column 36", "unknown field at line 1 column 36");
        check("unknown field `a`b:p` at line 1 column 36", "unknown field at line 1 column 36");
        check("unknown field `a b`, expected `c` or `d` at line 1", "unknown field, expected `c` or `d` at line 1");
        check("unknown field `replicaton` at line 1 column 4", "unknown field `replicaton` at line 1 column 4");
    }

    #[test]
    fn a_request_that_may_be_empty_is_an_object_otherwise() {
        let check = |body: &[u8], expect: Option<usize>| {
            let request: Result<ListRequest, _> = options(body);
            assert_eq!(request.ok().map(|request| request.offset), expect, "{body:?}");
        };
        check(b" ", Some(0));
        check(b" {}", Some(0));
        check(br#"{"offset":7}"#, Some(7));
        check(b"[7, 1]", None);
        check(b"7", None);
        check(b"ORDERS", None);
    }

    #[test]
    fn a_page_ends_with_the_rows_the_limit_or_the_room() {
        let check = |offset: usize, limit: Option<usize>, room: usize, expect: &[u64]| {
            let page = page(vec![10_u64, 11, 12, 13], offset, limit, room);
            assert_eq!((page.rows.as_slice(), page.total), (expect, 4));
        };
        check(0, None, 100, &[10, 11, 12, 13]);
        check(1, Some(2), 100, &[11, 12]);
        check(0, None, 6, &[10, 11]);
        check(4, None, 100, &[]);
        check(usize::MAX, Some(usize::MAX), 100, &[]);
    }

    #[test]
    fn a_change_after_its_deadline_is_refused() {
        let check = |value: &str, expect: Option<u16>| {
            let mut headers = async_nats::HeaderMap::new();
            headers.insert(DEADLINE_HEADER, value);
            let result = in_time(&Request { body: Bytes::new(), headers });
            assert_eq!(result.err().map(|failure| failure.code), expect, "{value}");
        };
        check("1", Some(408));
        check("x", Some(400));
        check("99999999999999", None);
        check("18446744073709551615", None);
    }
}
