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
    config::{self, Json, Problem, Problems, Replication},
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
    /// The document as it runs, with the fields of its link.
    pub(super) document: Bytes,
    /// Whether the source no longer has the stream.
    pub(super) gone: bool,
}

/// A document that could run, as a planner remembers it.
#[derive(Debug, Clone)]
struct AcceptedDocument {
    revision: u64,
    document: Bytes,
    linked: bool,
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
    /// The newest document that could run, with the fields of its link.
    accepted: Option<AcceptedDocument>,
    trouble: Trouble,
}

impl Planner {
    pub(super) fn new(deps: &Deps, wanted: watch::Receiver<ConfigEntry>) -> Self {
        let (store, site, rules) = (deps.config.clone(), deps.site.clone(), deps.rules.clone());
        Self { store, site, rules, wanted, accepted: None, trouble: Trouble::new("older revisions cannot be read") }
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
        let problems = match self.runnable(&entry) {
            Ok(work) => {
                let (document, linked) = (work.document.clone(), work.replication.linked);
                self.accepted = Some(AcceptedDocument { revision, document, linked });
                return Plan { work: Some(work), rejected: None };
            }
            Err(problems) => problems,
        };
        Plan { work: self.newest_valid(&entry).await, rejected: Some(RejectedDocument { revision, problems }) }
    }

    fn runnable(&self, entry: &ConfigEntry) -> Result<RunnableDocument, Problems> {
        let replication = entry.accept(&self.rules, &self.site)?;
        let document = match &entry.link {
            Some(_) => entry.resolved().map(|json| config::compact_document(&json.value).into())?,
            None => entry.value.clone(),
        };
        Ok(RunnableDocument { replication, revision: entry.revision, document, gone: entry.is_gone() })
    }

    async fn newest_valid(&mut self, entry: &ConfigEntry) -> Option<RunnableDocument> {
        let history = loop {
            match self.store.history(&entry.key).await {
                Ok(history) => break history,
                Err(error) => self.trouble.wait(&format!("{}: {error}", entry.key)).await,
            }
        };
        let mut depends = entry.family.is_some();
        for old in &history {
            // With its link as it is now. If that cannot be used, it is not known what an older document was.
            let names = Json::read(&old.value).ok().and_then(|json| config::named_link(&json.value).map(str::to_owned));
            let link = names.as_ref().and_then(|name| entry.link.clone().filter(|link| link.name == *name));
            if names.is_some() && link.as_ref().is_none_or(|link| link.fields.is_err()) {
                depends = true;
                break;
            }
            if let Ok(work) = self.runnable(&ConfigEntry { link, ..old.clone() }) {
                self.trouble.over();
                return Some(work);
            }
        }
        // The history may have nothing but the last edits, all of them invalid.
        let known = self.accepted.clone().filter(|_| depends);
        let kept = match known {
            None if depends || history.len() >= CONFIG_HISTORY => self.kept(entry).await,
            known => known,
        };
        self.trouble.over();
        let AcceptedDocument { revision, document, linked } = kept?;
        let mut work = self.runnable(&ConfigEntry::new(&*entry.key, revision, document)).ok()?;
        work.replication.linked = linked;
        work.gone = entry.is_gone();
        Some(work)
    }

    /// The newest valid document, as a task kept it.
    async fn kept(&mut self, entry: &ConfigEntry) -> Option<AcceptedDocument> {
        loop {
            match self.store.marked(&entry.key, MarkKind::Valid).await {
                Ok(kept) => {
                    let (revision, document) = kept?;
                    return Some(AcceptedDocument { revision, document, linked: entry.link.is_some() });
                }
                Err(error) => self.trouble.wait(&format!("{}: {error}", entry.key)).await,
            }
        }
    }
}
