//! `link.*`: links are documents beside those of replications, which name them. A change of a link reaches everything that uses
//! it, so it is refused if one of these could not run with it.

use bytes::Bytes;
use serde_json::Value;
use tracing::info;

use super::{
    super::{
        api::{Failure, LinkChanged, LinkList, LinkListRow, LinkNamed, LinkShown, LinkValidation, ListRequest},
        service::Request,
    },
    Page, RequestContext, UNMASK_TRIES, check_size, expected_revision, in_time, json, options, page, refused, valid,
};
use crate::{
    config::{self, Json, LinkUse, Problem, link_name, wrong_link_name},
    names::LINKS_PREFIX,
    store::{ConfigEntry, Error, WriteError},
};

/// Ids that a text names.
const SHOWN: usize = 5;
/// Ids that an answer has.
const LISTED: usize = 1_000;

pub(super) async fn link_add(context: &RequestContext, request: Request) -> Result<LinkChanged, Failure> {
    in_time(&request)?;
    let CheckedLink { name, document, unmasked, .. } = checked(context, &request.body).await?;
    let written = match unmasked {
        Some(revision) => Err(WriteError::Exists { revision }),
        None => context.config.create(&link_key(&name), document).await,
    };
    changed(context, name, written, "added").await
}

pub(super) async fn link_update(context: &RequestContext, request: Request) -> Result<LinkChanged, Failure> {
    in_time(&request)?;
    let expected = expected_revision(&request)?;
    for _ in 0..UNMASK_TRIES {
        let CheckedLink { name, document, unmasked, .. } = checked(context, &request.body).await?;
        let key = link_key(&name);
        let stored = context.config.get(&key).await.map_err(unavailable)?;
        let same = stored.filter(|stored| expected.is_none_or(|expected| expected == stored.revision));
        if let Some(stored) =
            same.filter(|stored| Json::read(&stored.value).is_ok_and(|stored| Json::read(&document) == Ok(stored)))
        {
            return changed(context, name, Ok(stored.revision), "kept").await;
        }
        match context.config.update(&key, document, expected.or(unmasked)).await {
            // The secret that `***` stands for may have changed.
            Err(WriteError::Conflict { .. }) if expected.is_none() => {}
            written => return changed(context, name, written, "updated").await,
        }
    }
    Err(Failure::new(503, "the document cannot be updated: it is changed all the time"))
}

pub(super) async fn link_validate(context: &RequestContext, request: Request) -> Result<LinkValidation, Failure> {
    match checked(context, &request.body).await {
        Ok(CheckedLink { used_by, .. }) => Ok(LinkValidation { valid: true, problems: Vec::new(), used_by }),
        Err(refused) if refused.code == 400 => {
            let name = Json::read(&request.body).ok().and_then(|json| link_name(&json.value));
            let used_by = match name {
                Some(name) => users(context, &name).await,
                None => Vec::new(),
            };
            Ok(LinkValidation { valid: false, problems: refused.problems, used_by })
        }
        Err(failure) => Err(failure),
    }
}

pub(super) async fn link_get(context: &RequestContext, request: Request) -> Result<LinkShown, Failure> {
    let link = name_of(&request.body)?;
    let entry = context.documents.link(&link).await.ok_or_else(|| not_found(&link))?;
    let json = Json::read(&entry.value);
    let problems = match &json {
        Ok(json) => json.clone().checked(context.rules.parse_link(&json.value, Some(&link))).err(),
        Err(problems) => Some(problems.clone()),
    };
    let problems = problems.map(|problems| problems.bounded().0).unwrap_or_default();
    let config = json.map_or(Value::Null, |json| config::mask_link(&json.value));
    let mut used_by = users(context, &link).await;
    used_by.truncate(LISTED);
    Ok(LinkShown { link, revision: entry.revision, config, problems, used_by })
}

pub(super) async fn link_list(context: &RequestContext, request: Request) -> Result<LinkList, Failure> {
    let ListRequest { offset, limit } = options(&request.body)?;
    let documents = context.documents.all().await;
    let rows = context.documents.links().await.into_iter().map(|entry| {
        let link = entry.key[LINKS_PREFIX.len()..].to_owned();
        let parsed = Json::read(&entry.value).and_then(|json| {
            let parsed = context.rules.parse_link(&json.value, Some(&link));
            json.checked(parsed)
        });
        let used_by = documents.iter().filter(|document| uses(document, &link)).count();
        LinkListRow { revision: entry.revision, valid: parsed.is_ok(), used_by, link }
    });
    let Page { rows: links, limit, total } = page(rows.collect(), offset, limit, context.room());
    Ok(LinkList { links, offset, limit, total })
}

pub(super) async fn link_delete(context: &RequestContext, request: Request) -> Result<LinkChanged, Failure> {
    in_time(&request)?;
    let expected = expected_revision(&request)?;
    let name = name_of(&request.body)?;
    let used_by = users(context, &name).await;
    if !used_by.is_empty() && context.documents.link(&name).await.is_some() {
        let mut shown: Vec<_> = used_by.iter().take(SHOWN).map(|id| format!("`{id}`")).collect();
        if used_by.len() > SHOWN {
            shown.push(format!("{} more", used_by.len() - SHOWN));
        }
        let message = format!("link `{name}` is used by {}: change or delete these first", shown.join(", "));
        return Err(Failure::new(409, message));
    }
    let deleted = context.config.delete(&link_key(&name), expected).await;
    changed(context, name, deleted, "deleted").await
}

fn link_key(name: &str) -> String {
    format!("{LINKS_PREFIX}{name}")
}

/// Whether a document that is in the bucket names the link.
fn uses(entry: &ConfigEntry, link: &str) -> bool {
    entry.family.is_none() && entry.link.as_ref().is_some_and(|used| used.name == link)
}

/// Ids of the documents that use a link, sorted.
async fn users(context: &RequestContext, link: &str) -> Vec<String> {
    let all = context.documents.all().await.into_iter();
    all.filter(|entry| uses(entry, link)).map(|entry| entry.key).collect()
}

/// The link that a request names: JSON, or the plain name.
fn name_of(body: &[u8]) -> Result<String, Failure> {
    let name = match body.trim_ascii() {
        [] => return Err(Failure::new(400, "the request names no link: send its name")),
        body @ [b'{', ..] => json::<LinkNamed>(body)?.link,
        body => String::from_utf8_lossy(body).into_owned(),
    };
    match wrong_link_name(&name) {
        None => Ok(name),
        Some(wrong) => Err(Failure::new(400, format!("the request does not name a link: {wrong}"))),
    }
}

fn not_found(name: &str) -> Failure {
    Failure::new(404, format!("link `{name}` does not exist"))
}

/// A link that can be stored.
struct CheckedLink {
    name: String,
    /// In one line, with stored secrets in place of `***`.
    document: Bytes,
    /// The stored revision that its secrets are from.
    unmasked: Option<u64>,
    /// Documents that use it.
    used_by: Vec<String>,
}

/// Reads a document; one with problems is refused with code 400, and so is one that documents which run now could not run with.
async fn checked(context: &RequestContext, body: &Bytes) -> Result<CheckedLink, Failure> {
    let Json { value: mut document, mut problems } = Json::read(body).map_err(refused)?;
    let unmasked = unmask(context, &mut document).await?.unwrap_or_else(|found| {
        problems.extend(found);
        None
    });
    let link = valid(context.rules.parse_link(&document, None), problems)?;
    let document = Bytes::from(config::compact_document(&document));
    check_size(&document)?;
    let (mut used_by, mut problems) = (Vec::new(), Vec::new());
    for entry in context.documents.all().await {
        if !uses(&entry, &link.name) {
            continue;
        }
        used_by.push(entry.key.clone());
        let parses = |entry: &ConfigEntry| entry.replication(&context.rules, &context.site);
        let new = LinkUse { name: link.name.clone(), fields: Ok(link.fields.clone()) };
        let with_new = ConfigEntry { link: Some(new), ..entry.clone() };
        if let Err(found) = parses(&with_new)
            && parses(&entry).is_ok()
        {
            let id = &entry.key;
            problems.extend(found.0.into_iter().map(|problem| {
                let message = format!("`{id}` uses this link: {}", problem.message);
                Problem::new(format!("/used_by/{id}{}", problem.path), message)
            }));
        }
    }
    if !problems.is_empty() {
        return Err(refused(config::Problems(problems).bounded()));
    }
    Ok(CheckedLink { name: link.name, document, unmasked, used_by })
}

/// Replaces `***` by stored secrets. Returns the revision that they are from, if there were any, or the problems.
async fn unmask(context: &RequestContext, document: &mut Value) -> Result<Result<Option<u64>, Vec<Problem>>, Failure> {
    let name = link_name(document);
    let Value::Object(fields) = document else { return Ok(Ok(None)) };
    if !config::has_mask(fields) {
        return Ok(Ok(None));
    }
    let stored = match name {
        Some(name) => context.config.get(&link_key(&name)).await.map_err(unavailable)?,
        None => None,
    };
    let revision = stored.as_ref().map(|entry| entry.revision);
    let stored = stored.and_then(|entry| Json::read(&entry.value).ok()).map(|json| json.value);
    Ok(config::unmask_link(fields, stored.as_ref()).map(|()| revision))
}

async fn changed(
    context: &RequestContext,
    link: String,
    written: Result<u64, WriteError>,
    how: &str,
) -> Result<LinkChanged, Failure> {
    match written {
        Ok(revision) => {
            let used_by = users(context, &link).await.len();
            info!(link, revision, used_by, "link {how} by request");
            Ok(LinkChanged { link, revision, used_by })
        }
        Err(WriteError::Missing) => Err(not_found(&link)),
        Err(WriteError::Exists { revision }) => {
            Err(Failure::new(409, format!("link `{link}` exists at revision {revision}, update it")))
        }
        Err(WriteError::Conflict { revision }) => {
            Err(Failure::new(409, format!("link `{link}` is at revision {revision}")))
        }
        Err(WriteError::Store(error)) => Err(unavailable(error)),
    }
}

fn unavailable(error: Error) -> Failure {
    Failure::new(503, error.to_string())
}
