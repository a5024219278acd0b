//! Which documents should run: the changes of the configuration bucket, and the newest valid document of one key.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{
    Stream, StreamExt,
    stream::{self, BoxStream},
};
use tokio::{sync::watch, time::sleep};

use super::Deps;
use crate::{
    allow::AllowList,
    config::{Problem, Problems, Replication},
    store::{CONFIG_HISTORY, ConfigChange, ConfigEntry, ConfigStore, Error, MarkKind, Trouble},
};

/// Pause after a change: further edits within it become one change.
const SETTLE: Duration = Duration::from_millis(100);

/// What the watch of the bucket reports.
#[derive(Debug)]
pub(super) enum Signal {
    /// A watch starts: it delivers everything again.
    Began,
    /// Something changed.
    Change(ConfigChange),
}

/// All changes, forever: a watch that ends is opened again. Nothing is lost when a `next` is dropped.
pub(super) fn changes(store: ConfigStore) -> impl Stream<Item = Signal> + Send {
    let watcher = Watcher { store, watch: None, trouble: Trouble::new("the configuration is not watched") };
    stream::unfold(watcher, |mut watcher| async move { Some((watcher.next().await, watcher)) })
}

struct Watcher {
    store: ConfigStore,
    watch: Option<BoxStream<'static, Result<ConfigChange, Error>>>,
    trouble: Trouble,
}

impl Watcher {
    async fn next(&mut self) -> Signal {
        loop {
            let Some(watch) = &mut self.watch else {
                match self.store.watch("supervisor").await {
                    Ok(watch) => self.watch = Some(watch),
                    Err(error) => {
                        self.trouble.wait(&error.to_string()).await;
                        continue;
                    }
                }
                return Signal::Began;
            };
            match watch.next().await {
                Some(Ok(change)) => {
                    self.trouble.over();
                    return Signal::Change(change);
                }
                // The watch continues, and knows what it has to write into a bucket that is recreated.
                Some(Err(error)) => self.trouble.log(&error.to_string()),
                None => {
                    self.watch = None;
                    self.trouble.wait("the watch ended").await;
                }
            }
        }
    }
}

/// What to run for one key.
#[derive(Debug)]
pub(super) struct Plan {
    /// The newest revision that can run.
    pub(super) work: Option<RunnableDocument>,
    /// The newest revision, if it cannot.
    pub(super) rejected: Option<RejectedDocument>,
}

/// A document that can run.
#[derive(Debug)]
pub(super) struct RunnableDocument {
    pub(super) replication: Replication,
    pub(super) revision: u64,
    /// The document as written.
    pub(super) document: Bytes,
}

/// A document that cannot.
#[derive(Debug)]
pub(super) struct RejectedDocument {
    pub(super) revision: u64,
    pub(super) problems: Problems,
}

impl RejectedDocument {
    /// All problems in one line.
    pub(super) fn message(&self) -> String {
        let list: Vec<_> = self.problems.0.iter().map(one_line).collect();
        format!("revision {} cannot run: {}", self.revision, list.join("; "))
    }
}

fn one_line(problem: &Problem) -> String {
    if problem.path.is_empty() { problem.message.clone() } else { format!("{}: {}", problem.path, problem.message) }
}

/// Turns the newest document of one key into a plan.
#[derive(Debug)]
pub(super) struct Planner {
    store: ConfigStore,
    site: String,
    rules: AllowList,
    wanted: watch::Receiver<ConfigEntry>,
    trouble: Trouble,
}

impl Planner {
    pub(super) fn new(deps: &Deps, wanted: watch::Receiver<ConfigEntry>) -> Self {
        let (store, site, rules) = (deps.config.clone(), deps.site.clone(), deps.rules.clone());
        Self { store, site, rules, wanted, trouble: Trouble::new("older revisions cannot be read") }
    }

    /// The plan for the newest document.
    pub(super) async fn current(&mut self) -> Plan {
        loop {
            let entry = self.wanted.borrow_and_update().clone();
            let mut newer = self.wanted.clone();
            tokio::select! {
                biased;
                plan = self.plan(entry) => return plan,
                Ok(()) = newer.changed() => {}
            }
        }
    }

    /// The plan for the next newer document. Dropping the future may lose a document: then call [`Self::current`].
    pub(super) async fn next(&mut self) -> Plan {
        if self.wanted.changed().await.is_err() {
            // The supervisor is gone: the stop follows.
            std::future::pending::<()>().await;
        }
        sleep(SETTLE).await;
        self.current().await
    }

    /// Whether there is a newer document than the last plan's.
    pub(super) fn is_outdated(&self) -> bool {
        self.wanted.has_changed().unwrap_or(false)
    }

    async fn plan(&mut self, entry: ConfigEntry) -> Plan {
        let revision = entry.revision;
        let problems = match accept(&entry, &self.site, &self.rules) {
            Ok(replication) => {
                let work = RunnableDocument { replication, revision, document: entry.value };
                return Plan { work: Some(work), rejected: None };
            }
            Err(problems) => problems,
        };
        Plan { work: self.newest_valid(&entry).await, rejected: Some(RejectedDocument { revision, problems }) }
    }

    async fn newest_valid(&mut self, entry: &ConfigEntry) -> Option<RunnableDocument> {
        let history = loop {
            match self.store.history(&entry.key).await {
                Ok(history) => break history,
                Err(error) => self.trouble.wait(&format!("{}: {error}", entry.key)).await,
            }
        };
        // The history may have nothing but the last edits, all of them invalid.
        let kept = if history.len() >= CONFIG_HISTORY { self.kept(&entry.key).await } else { None };
        self.trouble.over();
        history.iter().chain(&kept).find_map(|old| {
            let replication = accept(old, &self.site, &self.rules).ok()?;
            Some(RunnableDocument { replication, revision: old.revision, document: old.value.clone() })
        })
    }

    /// The newest valid document, as a task kept it.
    async fn kept(&mut self, key: &str) -> Option<ConfigEntry> {
        loop {
            match self.store.marked(key, MarkKind::Valid).await {
                Ok(kept) => {
                    let (revision, value) = kept?;
                    return Some(ConfigEntry { key: key.to_owned(), revision, value });
                }
                Err(error) => self.trouble.wait(&format!("{key}: {error}")).await,
            }
        }
    }
}

/// Accepts a document that is valid, connects only to allowed servers and is stored at the key of its own id.
fn accept(entry: &ConfigEntry, site: &str, rules: &AllowList) -> Result<Replication, Problems> {
    let replication = rules.parse(&entry.value, site)?;
    if replication.id == entry.key {
        return Ok(replication);
    }
    let message = format!("the document is that of replication `{}`, but its key is `{}`", replication.id, entry.key);
    Err(Problems(vec![Problem { path: String::new(), message }]))
}
