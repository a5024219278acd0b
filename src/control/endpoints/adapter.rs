//! `adapter.*`: documents and state of Choria's adapters.

use bytes::Bytes;
use serde_json::Value;
use tokio::time::{Duration, timeout};
use tracing::info;

use super::{
    super::{
        api::{
            AdapterChanged, AdapterList, AdapterListRow, AdapterNamed, AdapterShown, AdapterStatus,
            AdapterStatusRequest, AdapterValidation, Failure, ListRequest,
        },
        service::Request,
    },
    Page, RequestContext, UNMASK_TRIES, check_size, expected_revision, in_time, json, options, page, refused, reply,
    valid,
};
use crate::{
    adapter::{AdapterView, adapter_key, pause_key},
    config::{self, Json, Problem},
    status,
    store::{Error, FILE_REVISION, PauseMark, WriteError},
};

/// How long a request waits until a document that was just stored is applied.
const CONSIDER: Duration = Duration::from_millis(200);

pub(super) async fn adapter_add(context: &RequestContext, request: Request) -> Result<AdapterChanged, Failure> {
    in_time(&request)?;
    let CheckedAdapter { name, document, unmasked } = checked(context, &request.body).await?;
    let written = match unmasked {
        Some(revision) => Err(WriteError::Exists { revision }),
        None => context.config.create(&adapter_key(&name), document).await,
    };
    changed(context, name, written, "added").await
}

pub(super) async fn adapter_update(context: &RequestContext, request: Request) -> Result<AdapterChanged, Failure> {
    in_time(&request)?;
    let expected = expected_revision(&request)?;
    for _ in 0..UNMASK_TRIES {
        let CheckedAdapter { name, document, unmasked } = checked(context, &request.body).await?;
        let key = adapter_key(&name);
        not_only_in_file(context, &name).await?;
        let stored = context.config.get(&key).await.map_err(unavailable)?;
        let same = stored.filter(|stored| expected.is_none_or(|expected| expected == stored.revision));
        if let Some(stored) =
            same.filter(|stored| Json::read(&stored.value).is_ok_and(|stored| Json::read(&document) == Ok(stored)))
        {
            return Ok(AdapterChanged { adapter: name, revision: stored.revision });
        }
        match context.config.update(&key, document, expected.or(unmasked)).await {
            // The secret that `***` stands for may have changed.
            Err(WriteError::Conflict { .. }) if expected.is_none() => {}
            written => return changed(context, name, written, "updated").await,
        }
    }
    Err(Failure::new(503, "the document cannot be updated: it is changed all the time"))
}

pub(super) async fn adapter_validate(context: &RequestContext, request: Request) -> Result<AdapterValidation, Failure> {
    match checked(context, &request.body).await {
        Ok(_) => Ok(AdapterValidation { valid: true, problems: Vec::new() }),
        Err(refused) if refused.code == 400 => Ok(AdapterValidation { valid: false, problems: refused.problems }),
        Err(failure) => Err(failure),
    }
}

pub(super) async fn adapter_delete(context: &RequestContext, request: Request) -> Result<AdapterChanged, Failure> {
    in_time(&request)?;
    let expected = expected_revision(&request)?;
    let name = name_of(&request.body)?;
    not_only_in_file(context, &name).await?;
    let deleted = context.config.delete(&adapter_key(&name), expected).await;
    if deleted.is_ok() {
        // Another one of this name is not paused.
        match context.config.delete(&pause_key(&name), None).await {
            Ok(_) | Err(WriteError::Missing) => {}
            Err(error) => return Err(Failure::new(503, format!("the document is deleted, its pause is not: {error}"))),
        }
    }
    changed(context, name, deleted, "deleted").await
}

pub(super) async fn adapter_get(context: &RequestContext, request: Request) -> Result<AdapterShown, Failure> {
    let name = name_of(&request.body)?;
    consider(context).await;
    let AdapterView { revision, document, problems, .. } = existing(context, &name)?;
    let origin = status::origin(revision).to_owned();
    Ok(AdapterShown { adapter: name, revision, origin, config: config::mask_adapter(&document), problems })
}

pub(super) async fn adapter_list(context: &RequestContext, request: Request) -> Result<AdapterList, Failure> {
    let ListRequest { offset, limit } = options(&request.body)?;
    consider(context).await;
    let all = context.adapters.all().into_iter().map(|view| AdapterListRow {
        adapter: view.row.adapter,
        revision: view.revision,
        origin: status::origin(view.revision).to_owned(),
        state: view.row.state,
    });
    let Page { rows: adapters, limit, total } = page(all.collect(), offset, limit, context.room());
    Ok(AdapterList { adapters, offset, limit, total })
}

pub(super) async fn adapter_status(context: &RequestContext, request: Request) -> Result<AdapterStatus, Failure> {
    let request = match request.body.trim_ascii() {
        [] | [b'{', ..] => options(&request.body)?,
        _ => AdapterStatusRequest { adapter: Some(name_of(&request.body)?), ..AdapterStatusRequest::default() },
    };
    let rows = match &request.adapter {
        Some(name) => vec![existing(context, name)?.row],
        None => context.adapters.all().into_iter().map(|view| view.row).collect(),
    };
    let Page { rows: adapters, limit, total } = page(rows, request.offset, request.limit, context.room());
    let (site, instance) = (context.site.clone(), context.instance.clone());
    Ok(AdapterStatus { site, instance, adapters, offset: request.offset, limit, total })
}

pub(super) async fn adapter_pause(context: &RequestContext, request: Request) -> Result<AdapterChanged, Failure> {
    in_time(&request)?;
    let name = name_of(&request.body)?;
    consider(context).await;
    existing(context, &name)?;
    let mark = Bytes::from(reply(&PauseMark::now(&context.instance))?);
    let written = match context.config.create(&pause_key(&name), mark).await {
        Err(WriteError::Exists { revision }) => Ok(revision),
        written => written,
    };
    changed(context, name, written, "paused").await
}

pub(super) async fn adapter_resume(context: &RequestContext, request: Request) -> Result<AdapterChanged, Failure> {
    in_time(&request)?;
    let name = name_of(&request.body)?;
    consider(context).await;
    let revision = existing(context, &name)?.revision;
    let written = match context.config.delete(&pause_key(&name), None).await {
        Err(WriteError::Missing) => Ok(revision),
        written => written,
    };
    changed(context, name, written, "resumed").await
}

/// Waits until what is stored now is known.
async fn consider(context: &RequestContext) {
    let known = async {
        if let Ok(newest) = context.config.last_revision().await {
            context.adapters.considered(newest).await;
        }
    };
    let _ = timeout(CONSIDER, known).await;
}

/// The adapter that a request names: JSON, or the plain name.
fn name_of(body: &[u8]) -> Result<String, Failure> {
    let name = match body.trim_ascii() {
        [] => return Err(Failure::new(400, "the request names no adapter: send its name")),
        body @ [b'{', ..] => json::<AdapterNamed>(body)?.adapter,
        body => String::from_utf8_lossy(body).into_owned(),
    };
    match config::wrong_adapter_name(&name) {
        None => Ok(name),
        Some(wrong) => Err(Failure::new(400, format!("the request does not name an adapter: {wrong}"))),
    }
}

fn existing(context: &RequestContext, name: &str) -> Result<AdapterView, Failure> {
    context.adapters.get(name).ok_or_else(|| not_found(name))
}

fn not_found(name: &str) -> Failure {
    Failure::new(404, format!("adapter `{name}` does not exist"))
}

/// What is in the file of this instance and not in the bucket is changed in the file.
async fn not_only_in_file(context: &RequestContext, name: &str) -> Result<(), Failure> {
    let key = adapter_key(name);
    if !context.config.is_in_file(&key) || context.config.get(&key).await.map_err(unavailable)?.is_some() {
        return Ok(());
    }
    let message = format!(
        "adapter `{name}` is configured in the file of instance `{}`: change it there, or add a document of the same name, which \
         takes precedence over the file's",
        context.instance
    );
    Err(Failure::new(409, message))
}

/// A valid document.
struct CheckedAdapter {
    name: String,
    /// As it was sent, with stored secrets in place of `***`.
    document: Bytes,
    /// The stored revision that its secrets are from.
    unmasked: Option<u64>,
}

/// Reads a document; one with problems is refused with code 400.
async fn checked(context: &RequestContext, body: &Bytes) -> Result<CheckedAdapter, Failure> {
    let Json { value: mut document, mut problems } = Json::read(body).map_err(refused)?;
    let unmasked = unmask(context, &mut document).await?.unwrap_or_else(|found| {
        problems.extend(found);
        None
    });
    let adapter = valid(context.rules.parse_adapter(&document), problems)?;
    let document = if unmasked.is_some() { Bytes::from(document.to_string()) } else { body.clone() };
    check_size(&document)?;
    Ok(CheckedAdapter { name: adapter.name, document, unmasked })
}

/// Replaces `***` by stored secrets. Returns the revision that they are from, if there were any, or the problems.
async fn unmask(context: &RequestContext, document: &mut Value) -> Result<Result<Option<u64>, Vec<Problem>>, Failure> {
    let name = config::adapter_name(document);
    let Value::Object(fields) = document else { return Ok(Ok(None)) };
    if !config::has_adapter_mask(fields) {
        return Ok(Ok(None));
    }
    let stored = match name {
        Some(name) => context.config.get(&adapter_key(&name)).await.map_err(unavailable)?,
        None => None,
    };
    let revision = stored.as_ref().map(|entry| entry.revision);
    let stored = stored.and_then(|entry| Json::read(&entry.value).ok()).map(|json| json.value);
    Ok(config::unmask_adapter(fields, stored.as_ref()).map(|()| revision))
}

async fn changed(
    context: &RequestContext,
    adapter: String,
    written: Result<u64, WriteError>,
    how: &str,
) -> Result<AdapterChanged, Failure> {
    match written {
        Ok(revision) => {
            info!(adapter, revision, "adapter {how} by request");
            if revision != FILE_REVISION {
                let _ = timeout(CONSIDER, context.adapters.considered(revision)).await;
            }
            Ok(AdapterChanged { adapter, revision })
        }
        Err(WriteError::Missing) => Err(not_found(&adapter)),
        Err(WriteError::Exists { revision }) => {
            Err(Failure::new(409, format!("adapter `{adapter}` exists at revision {revision}, update it")))
        }
        Err(WriteError::Conflict { revision }) => {
            Err(Failure::new(409, format!("adapter `{adapter}` is at revision {revision}")))
        }
        Err(WriteError::Store(error)) => Err(unavailable(error)),
    }
}

fn unavailable(error: Error) -> Failure {
    Failure::new(503, error.to_string())
}
