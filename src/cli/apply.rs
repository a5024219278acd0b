//! `stream-replicator config apply`: what is stored becomes what files say.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::PathBuf,
};

use futures_util::{StreamExt, TryStreamExt, stream};
use nats_lane::MASK;
use serde::Serialize;
use serde_json::Value;

use super::{
    client::Client,
    diff::{diff, show_diff},
    document::{link_as_document, site, stored, stored_link},
    error::{CommandVerdict, Error, problem},
    files::{self, FoundDocuments, FoundFiles},
    global::Global,
    output::{self, Output, clean},
    reply::Reply,
};
use crate::{
    config::{self, Problem, URLS, document_id, link_name, mask_document},
    control::api::{Changed, DeleteRequest, Failure, LinkChanged, List, StoredDocument},
};

/// Documents that are asked for at once.
const PARALLEL: usize = 16;

/// Make the stored documents equal to files: add and update those that differ
///
/// A file holds one document, an array of documents, or several one after another, in JSON or YAML; a folder stands for its
/// *.json, *.yaml and *.yml, and everything else in it is skipped and named. `$schema` in a document is for editors. A document
/// with a `name` and without `stream` and `streams` is a link; links come first, and `--prune` leaves them alone.
/// Everything is read and checked before anything is changed. Each change is shown, secrets as `***`, and is made only
/// to the revision that it was compared with.
///
/// Stored secrets are never shown, so a document with a secret that looks equal is sent all the same: the
/// service compares the secret and leaves an equal document alone. A dry run cannot know and says so. A `***` in a URL
/// keeps the stored secret.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Files or folders; `-` for stdin
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,

    /// Remove replications that are in none of the files, with position and state; asks first
    #[arg(long)]
    prune: bool,

    /// With `--prune`: do not ask; required without a terminal
    #[arg(long, requires = "prune")]
    force: bool,

    /// Only show the changes
    #[arg(long)]
    dry_run: bool,

    #[command(flatten)]
    pub(super) global: Global,
}

/// Output of `--json`.
#[derive(Debug, Default, Serialize)]
struct ApplyReport {
    dry_run: bool,
    /// Files that were not read.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    skipped: Vec<String>,
    results: Vec<ApplyOutcome>,
}

/// ApplyOutcome for one replication or link, also of a dry run.
#[derive(Debug, Serialize)]
struct ApplyOutcome {
    #[serde(flatten)]
    named: DocumentKey,
    action: ApplyAction,
    /// Revision that it has now.
    #[serde(skip_serializing_if = "Option::is_none")]
    revision: Option<u64>,
    /// Unified, secrets masked.
    #[serde(skip_serializing_if = "Option::is_none")]
    diff: Option<String>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<Failure>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum ApplyAction {
    Added,
    Updated,
    Unchanged,
    /// It looks equal, and only the service can compare its secrets.
    Unknown,
    Removed,
    Failed,
}

/// What a document is, and its id or name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum DocumentKey {
    // Links are applied first.
    Link(String),
    Replication(String),
}

impl DocumentKey {
    /// That of a document; a replication that has no id has a problem, which is reported with the others.
    fn of(document: &Value, site: &str) -> Self {
        let copies = ["stream", "streams"].iter().any(|field| document.get(*field).is_some());
        match link_name(document).filter(|_| !copies) {
            Some(name) => Self::Link(name),
            None => Self::Replication(document_id(document, site).unwrap_or_default()),
        }
    }

    fn name(&self) -> &str {
        match self {
            Self::Link(name) | Self::Replication(name) => name,
        }
    }
}

impl fmt::Display for DocumentKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Link(name) => write!(f, "link {name}"),
            Self::Replication(id) => f.write_str(id),
        }
    }
}

/// A document of a file beside the stored one.
struct ApplyStep {
    key: DocumentKey,
    place: String,
    document: Value,
    stored: Option<StoredDocument>,
}

/// How a document differs from the stored one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Difference {
    New,
    Visible,
    /// None that can be seen, but it has a secret.
    Secret,
    None,
}

pub(super) async fn run(args: &Args, out: &mut Output) -> Result<CommandVerdict, Error> {
    let FoundDocuments { documents, skipped } =
        files::documents(&args.files).map_err(|problems| refuse(&problems, out))?;
    skipped
        .iter()
        .for_each(|file| out.note(&format!("skipped `{file}`: its name does not end with .json, .yaml or .yml")));
    if documents.is_empty() {
        return Err(Error::Failed("the files hold no document, nothing was changed".to_owned()));
    }
    let prune = match (args.prune, args.force || args.dry_run) {
        (false, _) => Prune::Nothing,
        (true, true) => Prune::Others,
        (true, false) if output::can_ask() => Prune::AfterAsking,
        (true, false) => {
            let message = "no terminal to ask on: `--prune --force` removes without asking, `--prune --dry-run` shows";
            return Err(Error::Usage(message.to_owned()));
        }
    };
    let client = Client::connect(&args.global).await?;
    let report = ApplyReport { dry_run: args.dry_run, skipped, results: Vec::new() };
    apply(client, documents, prune, report, out).await
}

/// What becomes of replications that are in none of the files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Prune {
    Nothing,
    Others,
    AfterAsking,
}

/// Makes what is stored equal to what was found, and leaves everything else alone.
pub(super) async fn apply_found(
    client: Client,
    found: Vec<FoundFiles>,
    dry_run: bool,
    out: &mut Output,
) -> Result<CommandVerdict, Error> {
    apply(client, found, Prune::Nothing, ApplyReport { dry_run, ..ApplyReport::default() }, out).await
}

async fn apply(
    client: Client,
    found: Vec<FoundFiles>,
    prune: Prune,
    report: ApplyReport,
    out: &mut Output,
) -> Result<CommandVerdict, Error> {
    let site = site(&client).await?;
    let list: Reply<List> = client.pages("config.list").await?;
    let stored = list.value.replications.into_iter().filter(|row| row.origin == "kv");
    let revisions: BTreeMap<_, _> = stored.map(|row| (row.replication, row.revision)).collect();
    let mut steps = plan(&client, found, &site, &revisions).await?;
    steps.sort_by_key(|step| matches!(step.key, DocumentKey::Replication(_)));
    let problems: Vec<_> = steps.iter().flat_map(|step| step.problems(&site)).chain(twice(&steps)).collect();
    if !problems.is_empty() {
        return Err(refuse(&problems, out));
    }
    let mut apply = Apply { client, dry_run: report.dry_run, report };
    for step in &steps {
        apply.document(step, out).await;
    }
    if prune != Prune::Nothing {
        let replications = steps.iter().filter(|step| matches!(step.key, DocumentKey::Replication(_)));
        let wanted: BTreeSet<_> = replications.map(|step| step.key.name()).collect();
        let others: Vec<_> = revisions.iter().filter(|(id, _)| !wanted.contains(id.as_str())).collect();
        if !apply.prune(&others, prune, out).await {
            apply.summary(out);
            return Err(Error::Failed("nothing was removed".to_owned()));
        }
    }
    Ok(apply.summary(out))
}

/// Says everything that is wrong with the files.
fn refuse(problems: &[String], out: &Output) -> Error {
    for problem in problems {
        out.note(problem);
    }
    Error::Failed("the files cannot be applied, nothing was changed".to_owned())
}

/// Puts the stored documents beside those of the files.
async fn plan(
    client: &Client,
    found: Vec<FoundFiles>,
    site: &str,
    revisions: &BTreeMap<String, u64>,
) -> Result<Vec<ApplyStep>, Error> {
    let steps = found.into_iter().map(|FoundFiles { place, document }| async move {
        let key = DocumentKey::of(&document, site);
        let shown = match &key {
            DocumentKey::Replication(id) if !revisions.contains_key(id) => {
                return Ok(ApplyStep { key, place, document, stored: None });
            }
            DocumentKey::Replication(id) => stored(client, id).await.map(|reply| reply.value),
            DocumentKey::Link(name) => stored_link(client, name).await.map(|reply| link_as_document(reply.value)),
        };
        let stored = match shown {
            Ok(shown) => Some(shown),
            Err(error) if error.code() == Some(404) => None,
            Err(error) => return Err(error),
        };
        Ok(ApplyStep { key, place, document, stored })
    });
    stream::iter(steps).buffered(PARALLEL).try_collect().await
}

/// Ids and names that more than one document has.
fn twice(steps: &[ApplyStep]) -> Vec<String> {
    let mut places = BTreeMap::<&DocumentKey, Vec<&str>>::new();
    for step in steps.iter().filter(|step| !step.key.name().is_empty()) {
        places.entry(&step.key).or_default().push(&step.place);
    }
    let several = places.into_iter().filter(|(_, places)| places.len() > 1);
    several.map(|(key, places)| clean(&format!("`{key}` is there more than once: {}", places.join("; ")))).collect()
}

impl ApplyStep {
    /// Problems of the document, in lines that begin with their location.
    fn problems(&self, site: &str) -> Vec<String> {
        let checked = match &self.key {
            DocumentKey::Link(_) => check_link(&self.document),
            DocumentKey::Replication(_) => check(&self.document, self.stored.as_ref(), site),
        };
        let found = match checked {
            Ok(()) => return Vec::new(),
            Err(found) => found,
        };
        found.iter().map(|one| format!("{}: {}", self.place, problem(one))).collect()
    }

    fn diff(&self) -> String {
        diff(self.stored.as_ref(), &self.key.to_string(), &self.place, &self.document)
    }

    fn difference(&self) -> Difference {
        let Some(stored) = &self.stored else { return Difference::New };
        let shown = mask_document(&self.document);
        match () {
            () if shown != stored.config => Difference::Visible,
            () if shown != self.document => Difference::Secret,
            () => Difference::None,
        }
    }
}

/// Checks a document as the service does. For a `***` that stands for a stored secret, some secret is put in.
fn check(document: &Value, stored: Option<&StoredDocument>, site: &str) -> Result<(), Vec<Problem>> {
    if config::named_link(document).is_some() {
        // The service knows the link.
        return Ok(());
    }
    let mut document = document.clone();
    if let (Value::Object(fields), Some(stored)) = (&mut document, stored)
        && config::has_mask(fields)
    {
        let mut stored = stored.config.clone();
        for url in URLS {
            if let Some(Value::String(url)) = stored.get_mut(url) {
                *url = url.replace(MASK, "x");
            }
        }
        config::unmask_document(fields, Some(&stored))?;
    }
    config::parse_value(&document, site).map(drop).map_err(|problems| problems.0)
}

/// The same for a link. Whether a `***` stands for a stored secret is left to the service.
fn check_link(document: &Value) -> Result<(), Vec<Problem>> {
    let mut document = document.clone();
    for url in URLS {
        if let Some(Value::String(url)) = document.get_mut(url) {
            *url = url.replace(MASK, "x");
        }
    }
    config::parse_link(&document, None, |_, _| Vec::new()).map(drop).map_err(|problems| problems.0)
}

/// One after the other; a failure does not stop those that follow.
struct Apply {
    client: Client,
    dry_run: bool,
    report: ApplyReport,
}

impl Apply {
    async fn document(&mut self, step: &ApplyStep, out: &mut Output) {
        let difference = step.difference();
        let before = step.stored.as_ref().map(|stored| stored.revision);
        let diff = matches!(difference, Difference::New | Difference::Visible).then(|| step.diff());
        if let Some(diff) = &diff {
            show_diff(diff, out);
        }
        let (action, sent) = match difference {
            Difference::None => (ApplyAction::Unchanged, Ok(before)),
            Difference::New if self.dry_run => (ApplyAction::Added, Ok(None)),
            Difference::Visible if self.dry_run => (ApplyAction::Updated, Ok(None)),
            Difference::Secret if self.dry_run => (ApplyAction::Unknown, Ok(before)),
            Difference::New => (ApplyAction::Added, self.send("add", step, None).await),
            Difference::Visible | Difference::Secret => {
                let sent = self.send("update", step, before).await;
                let unchanged = matches!(sent, Ok(after) if after == before);
                (if unchanged { ApplyAction::Unchanged } else { ApplyAction::Updated }, sent)
            }
        };
        let words = match (action, difference) {
            (ApplyAction::Unknown, _) => "looks equal; only the service can compare its secrets",
            (ApplyAction::Updated, Difference::Secret) => "updated: a secret differs",
            (ApplyAction::Updated, _) => "updated",
            (ApplyAction::Added, _) => "added",
            _ => "unchanged",
        };
        self.report(&step.key, action, words, sent, diff, out);
    }

    async fn send(&self, verb: &str, step: &ApplyStep, expected: Option<u64>) -> Result<Option<u64>, Error> {
        let document = step.document.to_string().into();
        let revision = match &step.key {
            DocumentKey::Link(_) => {
                let changed: Reply<LinkChanged> =
                    self.client.change_at(&format!("link.{verb}"), document, expected).await?;
                changed.value.revision
            }
            DocumentKey::Replication(_) => {
                let changed: Reply<Changed> =
                    self.client.change_at(&format!("config.{verb}"), document, expected).await?;
                changed.value.revision
            }
        };
        Ok(Some(revision))
    }

    /// Removes the others; `false` if the user does not want that.
    async fn prune(&mut self, others: &[(&String, &u64)], prune: Prune, out: &mut Output) -> bool {
        if self.report.results.iter().any(|outcome| outcome.action == ApplyAction::Failed) {
            out.note("nothing is removed, because something failed");
            return true;
        }
        let ids = others.iter().map(|(id, _)| id.as_str()).collect::<Vec<_>>().join(", ");
        if !out.json() && !others.is_empty() {
            out.line(&format!("in none of the files: {ids}"));
        }
        if prune == Prune::AfterAsking && !others.is_empty() {
            let question = format!("remove {} of them with position and state: {ids}? [y/N]", others.len());
            if output::confirm(&question) != Some(true) {
                return false;
            }
        }
        for (id, revision) in others {
            let request = DeleteRequest { replication: (*id).clone(), keep: false };
            let removed = if self.dry_run { Ok(None) } else { self.remove(&request, **revision).await };
            let key = DocumentKey::Replication((*id).clone());
            self.report(&key, ApplyAction::Removed, "removed", removed, None, out);
        }
        true
    }

    async fn remove(&self, request: &DeleteRequest, revision: u64) -> Result<Option<u64>, Error> {
        let body = serde_json::to_vec(request).map_err(|error| Error::Failed(error.to_string()))?;
        let changed: Reply<Changed> = self.client.change_at("config.delete", body.into(), Some(revision)).await?;
        Ok(Some(changed.value.revision))
    }

    fn report(
        &mut self,
        key: &DocumentKey,
        action: ApplyAction,
        words: &str,
        result: Result<Option<u64>, Error>,
        diff: Option<String>,
        out: &mut Output,
    ) {
        let named = key.clone();
        let outcome = match result {
            Ok(revision) => {
                if !out.json() {
                    let would = if self.dry_run && action != ApplyAction::Unchanged { " (dry run)" } else { "" };
                    let at = revision.filter(|_| action != ApplyAction::Removed);
                    let at = at.map_or_else(String::new, |revision| format!(", revision {revision}"));
                    out.line(&format!("{key}: {words}{at}{would}"));
                }
                ApplyOutcome { named, action, revision, diff, error: None }
            }
            Err(error) => {
                out.note(&format!("{key}:"));
                if out.json() {
                    // stdout holds the report alone
                    out.note(&format!("error: {error}"));
                } else {
                    error.print(out);
                }
                let error = match error {
                    Error::Refused(failure) => failure,
                    other => Failure::new(503, other.to_string()),
                };
                ApplyOutcome { named, action: ApplyAction::Failed, revision: None, diff, error: Some(error) }
            }
        };
        self.report.results.push(outcome);
    }

    fn summary(self, out: &mut Output) -> CommandVerdict {
        let mut counts = BTreeMap::<ApplyAction, usize>::new();
        for outcome in &self.report.results {
            *counts.entry(outcome.action).or_default() += 1;
        }
        if out.json() {
            out.value(&self.report);
        } else {
            let count = |action: ApplyAction| counts.get(&action).copied().unwrap_or_default();
            let mut words: Vec<_> = [
                (ApplyAction::Added, "added"),
                (ApplyAction::Updated, "updated"),
                (ApplyAction::Unchanged, "unchanged"),
                (ApplyAction::Removed, "removed"),
            ]
            .map(|(action, word)| format!("{} {word}", count(action)))
            .into();
            for (action, word) in [(ApplyAction::Unknown, "unknown"), (ApplyAction::Failed, "failed")] {
                if count(action) > 0 {
                    words.push(format!("{} {word}", count(action)));
                }
            }
            let dry = if self.dry_run { "dry run, nothing was changed: " } else { "" };
            out.line(&format!("{dry}{}", words.join(", ")));
        }
        if counts.contains_key(&ApplyAction::Failed) { CommandVerdict::Bad } else { CommandVerdict::Good }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn step(document: Value, stored: Option<Value>) -> ApplyStep {
        let stored =
            stored.map(|config| StoredDocument { replication: "S".into(), revision: 3, config, problems: vec![] });
        ApplyStep { key: DocumentKey::Replication("S".into()), place: "s.json".into(), document, stored }
    }

    fn with_urls(source: &str, target: &str) -> Value {
        json!({"stream": "S", "source_url": source, "target_url": target})
    }

    #[test]
    fn a_secret_that_looks_equal_is_not_taken_for_equal() {
        let check = |source: &str, stored: Option<&str>, expect: Difference| {
            let stored = stored.map(|stored| with_urls(stored, "nats://t"));
            assert_eq!(step(with_urls(source, "nats://t"), stored).difference(), expect, "{source}");
        };
        check("nats://s", None, Difference::New);
        check("nats://s", Some("nats://s"), Difference::None);
        check("nats://s", Some("nats://other"), Difference::Visible);
        check("nats://u:p@s", Some("nats://u:***@s"), Difference::Secret);
        check("nats://u:p@s", Some("nats://v:***@s"), Difference::Visible);
        check("nats://u:***@s", Some("nats://u:***@s"), Difference::None);
    }

    #[test]
    fn a_diff_shows_no_secret_of_either_side() {
        let step = step(with_urls("nats://u:new-secret@s", "nats://t"), Some(with_urls("nats://u:***@r", "nats://t")));
        let diff = step.diff();
        assert!(diff.starts_with("--- S (revision 3)\n+++ S (s.json)\n@@"), "{diff}");
        assert!(
            diff.contains("\n-  \"source_url\": \"nats://u:***@r\",\n+  \"source_url\": \"nats://u:***@s\","),
            "{diff}"
        );
        assert!(!diff.contains("new-secret"), "{diff}");
    }

    #[test]
    fn a_mask_is_fine_where_a_secret_is_stored() {
        let check = |source: &str, stored: Option<&str>, expect: bool| {
            let stored = stored.map(|stored| with_urls(stored, "nats://t"));
            let problems = step(with_urls(source, "nats://t"), stored).problems("SITE");
            assert_eq!(problems.is_empty(), expect, "{source}: {problems:?}");
        };
        check("nats://u:***@s", Some("nats://u:***@s"), true);
        check("nats://***@s", Some("nats://***@s"), true);
        check("nats://u:***@s", Some("nats://s"), false);
        check("nats://u:***@s", None, false);
        check("nats://u:p@s", None, true);
        check("http://s", None, false);
    }

    #[test]
    fn a_link_is_known_by_its_name_and_what_it_lacks() {
        let check = |document: Value, expect: DocumentKey| {
            assert_eq!(DocumentKey::of(&document, "SITE"), expect, "{document}");
        };
        let link = || DocumentKey::Link("eu".to_owned());
        let replication = |id: &str| DocumentKey::Replication(id.to_owned());
        check(json!({"name": "eu", "source_url": "nats://s"}), link());
        check(json!({"name": "eu", "stream": "S"}), replication("S.eu"));
        check(json!({"link": "eu", "streams": ["S*"]}), replication("eu"));
        check(json!({"source_url": "nats://s"}), replication(""));
    }

    #[test]
    fn the_same_id_twice_is_told_with_both_places() {
        let steps = [step(json!({}), None), step(json!({}), None)];
        assert_eq!(twice(&steps), ["`S` is there more than once: s.json; s.json"]);
        assert!(twice(&steps[..1]).is_empty());
    }
}
