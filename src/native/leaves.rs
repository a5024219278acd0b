//! The leafnode connections of a feed: one to each server of the target that the document names. A request of the target arrives over
//! each of them, and a consumer is fed over one. If that one is lost, another one can have the target ask again at once.

use std::{
    collections::{BTreeSet, VecDeque},
    future::poll_fn,
    sync::Arc,
    task::{Context, Poll},
};

use futures_util::{FutureExt, future::BoxFuture};
use nats_lane::{
    Batch, Dial, ErrorKind, ServerRef, Turn,
    leafnode::{Leaf, LeafLogin},
};
use tokio::time::{Duration, Instant, timeout_at};
use tracing::{debug, warn};

use super::of_leaf;
use crate::copy::Error;

/// How long the first connection waits for the others before the target stream is touched.
const TOGETHER: Duration = Duration::from_secs(1);
/// Pause before servers are tried again that do not answer, or refuse the login; each is twice as long as the one before.
const TRIED_AGAIN: Duration = Duration::from_secs(5);
/// The longest of them.
const TRIED_AT_LEAST: Duration = Duration::from_secs(60);
/// Requests that are remembered, to know those that arrive over another connection too.
const REMEMBERED: usize = 32;

/// Which connection it is; never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LeafKey(u64);

/// One connection.
#[derive(Debug)]
struct NodeLeaf {
    key: LeafKey,
    leaf: Leaf,
    /// Subjects of deliveries that the target listens on, as its server announces them.
    listens: BTreeSet<String>,
}

/// What happened on the connections.
#[derive(Debug)]
pub(super) enum LeafTurn {
    /// Messages, or interest.
    Received(LeafKey, Batch),
    /// All output of one of them was written.
    Flushed,
    /// One of several ended, in a way that is no reason to stop.
    Lost(LeafKey),
}

/// All connections, of which there is at least one.
pub(super) struct Leaves {
    dial: Arc<dyn Dial>,
    server: ServerRef,
    login: LeafLogin,
    all: Vec<NodeLeaf>,
    next_key: u64,
    /// Where the next turn begins, so that no connection waits for another one.
    turn: usize,
    /// An attempt to connect to one more server.
    joining: Option<BoxFuture<'static, Result<Option<Leaf>, nats_lane::Error>>>,
    /// When the next attempt is due; `None` where every server is connected.
    joins_at: Option<Instant>,
    /// Pause before the attempt after that.
    pause: Duration,
    /// What was logged last of an attempt that was refused.
    refusal: String,
    /// Reply subjects of requests that were read, newest last, and over which connections they came: with `allow_responses`, a
    /// leaf user may answer over these only.
    replies: VecDeque<(String, Vec<LeafKey>)>,
}

impl Leaves {
    /// Connects to one server, and to the others as far as they answer soon.
    pub async fn connect(dial: Arc<dyn Dial>, server: &ServerRef, login: LeafLogin) -> Result<Self, Error> {
        let of_target = |error: nats_lane::Error| of_leaf(error);
        let first = dial.dial_leaf(server, &login).await.map_err(of_target)?;
        let mut leaves = Self {
            dial,
            server: server.clone(),
            login,
            all: Vec::new(),
            next_key: 0,
            turn: 0,
            joining: None,
            joins_at: Some(Instant::now()),
            pause: TRIED_AGAIN,
            refusal: String::new(),
            replies: VecDeque::new(),
        };
        leaves.add(first);
        let until = Instant::now() + TOGETHER;
        while leaves.joins_at.is_some_and(|at| at <= Instant::now()) {
            leaves.join(Instant::now());
            let Some(joining) = &mut leaves.joining else { break };
            let Ok(joined) = timeout_at(until, joining).await else { break };
            leaves.joining = None;
            leaves.joined(joined);
        }
        Ok(leaves)
    }

    fn add(&mut self, leaf: Leaf) {
        let key = LeafKey(self.next_key);
        self.next_key += 1;
        self.all.push(NodeLeaf { key, leaf, listens: BTreeSet::new() });
    }

    /// Begins an attempt to connect to one more server, where one is due.
    pub fn join(&mut self, now: Instant) {
        if self.joining.is_some() || self.joins_at.is_none_or(|at| now < at) {
            return;
        }
        let (dial, server, login) = (self.dial.clone(), self.server.clone(), self.login.clone());
        let connected: Vec<_> = self.all.iter().map(|node| node.leaf.server()).collect();
        self.joining = Some(async move { dial.dial_other_leaf(&server, &login, &connected).await }.boxed());
    }

    fn joined(&mut self, joined: Result<Option<Leaf>, nats_lane::Error>) {
        let now = Instant::now();
        match joined {
            Ok(Some(leaf)) => {
                debug!(leaf = self.login.name, server = leaf.address(), "one more leafnode connection");
                self.add(leaf);
                self.refusal.clear();
                self.joins_at = Some(now);
            }
            Ok(None) => self.joins_at = None,
            Err(error) => {
                if error.kind == ErrorKind::Hold && self.refusal != error.message {
                    warn!(leaf = self.login.name, "a server of the target takes no leafnode connection: {error}");
                    self.refusal.clone_from(&error.message);
                }
                self.joins_at = Some(now + self.pause);
                self.pause = (2 * self.pause).min(TRIED_AT_LEAST);
            }
        }
    }

    /// Writes and reads on all connections until something happened on one of them. The loss of one of several is no error, unless
    /// its reason is one for all of them.
    pub async fn turn(&mut self) -> Result<LeafTurn, Error> {
        poll_fn(|cx| self.poll_turn(cx)).await
    }

    fn poll_turn(&mut self, cx: &mut Context<'_>) -> Poll<Result<LeafTurn, Error>> {
        while let Some(Poll::Ready(joined)) = self.joining.as_mut().map(|joining| joining.poll_unpin(cx)) {
            self.joining = None;
            self.joined(joined);
            self.join(Instant::now());
        }
        let count = self.all.len();
        self.turn = (self.turn + 1) % count.max(1);
        for index in (0..count).map(|index| (index + self.turn) % count) {
            let node = &mut self.all[index];
            let Poll::Ready(turn) = node.leaf.poll_turn(cx) else { continue };
            return Poll::Ready(match turn {
                Ok(Turn::Received(batch)) => Ok(LeafTurn::Received(node.key, batch)),
                Ok(Turn::Flushed) => Ok(LeafTurn::Flushed),
                Err(error) => self.lost(index, error),
            });
        }
        Poll::Pending
    }

    fn lost(&mut self, index: usize, error: nats_lane::Error) -> Result<LeafTurn, Error> {
        let error = of_leaf(error);
        // Another feed, a permission, a login that ended: so it is with the others.
        if self.all.len() == 1 || error.kind != crate::copy::ErrorKind::Retry || error.login_ended {
            return Err(error);
        }
        let node = self.all.remove(index);
        debug!(leaf = self.login.name, "a leafnode connection was lost: {error}");
        (self.joins_at, self.pause) = (Some(Instant::now()), TRIED_AGAIN);
        Ok(LeafTurn::Lost(node.key))
    }

    /// Takes over what the server of a connection announced of deliveries, and returns it.
    pub fn hear(&mut self, key: LeafKey, prefix: &str) -> Vec<(String, bool)> {
        let Some(node) = self.all.iter_mut().find(|node| node.key == key) else { return Vec::new() };
        let mut heard = Vec::new();
        for interest in node.leaf.take_interest() {
            if !interest.subject.starts_with(prefix) || !interest.queue.is_empty() {
                continue;
            }
            if interest.begins {
                node.listens.insert(interest.subject.clone());
            } else {
                node.listens.remove(&interest.subject);
            }
            heard.push((interest.subject, interest.begins));
        }
        heard
    }

    /// Whether a request, known by its reply subject, arrives for the first time.
    pub fn is_new(&mut self, reply: &str, over: LeafKey) -> bool {
        if let Some((_, came_over)) = self.replies.iter_mut().find(|(known, _)| known == reply) {
            came_over.push(over);
            return false;
        }
        if self.replies.len() == REMEMBERED {
            self.replies.pop_front();
        }
        self.replies.push_back((reply.to_owned(), vec![over]));
        true
    }

    /// The connection to use for the consumer of a request: that of the server that leads the target stream, where no other
    /// server is in between, if the request came over it, too; else that over which it came first.
    pub fn nearest(&self, leader: Option<&str>, reply: &str, asked: LeafKey) -> LeafKey {
        let came_over = self.replies.iter().find(|(known, _)| known == reply).map(|(_, came_over)| came_over);
        let is_leader = |node: &&NodeLeaf| {
            leader.is_some_and(|leader| node.leaf.info().server_name == leader)
                && came_over.is_some_and(|came_over| came_over.contains(&node.key))
        };
        let there = self.all.iter().find(is_leader).or_else(|| self.all.iter().find(|node| node.key == asked));
        there.or(self.all.first()).map_or(asked, |node| node.key)
    }

    /// A connection; the first one if it is lost.
    pub fn leaf(&mut self, key: LeafKey) -> &mut Leaf {
        let index = self.all.iter().position(|node| node.key == key).unwrap_or(0);
        &mut self.all[index].leaf
    }

    /// What the target listens on, by a connection.
    pub fn listens(&self, key: LeafKey) -> impl Iterator<Item = &String> {
        self.all.iter().filter(move |node| node.key == key).flat_map(|node| &node.listens)
    }

    /// Sends a header to every subject that the target listens on, over the first connection that knows it.
    pub fn send_to_listened(&mut self, header: &[u8]) {
        let mut sent = BTreeSet::new();
        for NodeLeaf { leaf, listens, .. } in &mut self.all {
            for subject in listens.iter().filter(|subject| !sent.contains(*subject)).cloned().collect::<Vec<_>>() {
                leaf.send(subject.as_bytes(), b"", header, b"");
                sent.insert(subject);
            }
        }
    }

    /// Whether the target listens to anything.
    pub fn any_listens(&self) -> bool {
        self.all.iter().any(|node| !node.listens.is_empty())
    }

    /// Versions of the servers.
    pub fn versions(&self) -> impl Iterator<Item = &str> {
        self.all.iter().map(|node| node.leaf.info().version.as_str())
    }

    /// When the first of the logins ends, in seconds since the Unix epoch; `None` for never.
    pub fn login_expires(&self) -> Option<i64> {
        self.all.iter().filter_map(|node| node.leaf.login_expires()).min()
    }

    /// Writes what there is, for no longer than `within`.
    pub async fn flush(&mut self, within: Duration) {
        futures_util::future::join_all(self.all.iter_mut().map(|node| node.leaf.flush(within))).await;
    }
}
