//! A server in memory that speaks the client protocol over pipes, with the faults that real servers and networks have.
//! Its reactions are in `jetstream`.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::{Arc, Mutex, MutexGuard},
};

use futures_util::{FutureExt, future::BoxFuture};
use nats_lane::{
    Connection as Connected, Dial, Error, Lane, ServerRef,
    leafnode::{Leaf, LeafLogin, LeafServer},
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
    time::{Duration, Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{
    history::History,
    ingest::Ingest,
    jetstream::{Consumer, FastBatch},
    plan::Way,
    process::{Hands, Meter},
    stream::Stream,
    world::{Host, World},
};

const PIPE: usize = 64 * 1024;
const TICK: Duration = Duration::from_millis(250);
pub struct Server {
    world: World,
    name: &'static str,
    host: Host,
    state: Mutex<State>,
}

pub struct State {
    pub(super) world: World,
    pub(super) host: Host,
    max_payload: usize,
    /// Who judges what comes.
    pub(super) history: Arc<Mutex<History>>,
    pub(super) down: bool,
    pub(super) frozen: Option<Instant>,
    pub(super) leaderless: Option<Instant>,
    /// Up to this time consumers have the streams only up to this sequence.
    pub(super) behind: Option<(Instant, u64)>,
    pub(super) streams: BTreeMap<String, Stream>,
    pub(super) consumers: BTreeMap<String, Consumer>,
    pub(super) batches: HashMap<String, FastBatch>,
    /// A stream that its own server fills from a feed.
    pub(super) ingest: Option<Ingest>,
    /// Of how many servers this is the sum, and which of them leads the stream that is filled from a feed.
    pub(super) nodes: usize,
    pub(super) leader: usize,
    /// The one that is down, and until when.
    node_down: Option<(usize, Instant)>,
    /// The connection over which a leaf sent something last.
    fed_over: Option<u64>,
    connections: BTreeMap<u64, Connection>,
    next_connection: u64,
    /// Instances that cannot reach it, and until when.
    apart: BTreeMap<&'static str, Instant>,
    /// What happens to a frame for a subscriber after so many others: lost, or sent twice.
    tampers: Vec<(u64, Tamper)>,
    /// Messages that are refused, each after so many others.
    pub(super) refusals: Vec<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tamper {
    Lose,
    Twice,
}

/// All servers are connected.
struct NoOther;

struct Connection {
    node: usize,
    subscriptions: Vec<(u64, String)>,
    /// The name of a leafnode, and what it subscribed to.
    leaf: Option<(String, Vec<String>)>,
    out: UnboundedSender<(Instant, Vec<u8>)>,
    cut: CancellationToken,
    latency: Duration,
    opened: Duration,
    who: Who,
    to: Path,
    from: Path,
}

/// Who connects: an instance, and the epoch that it copies with.
#[derive(Debug, Default, Clone, Copy)]
pub struct Who {
    pub instance: &'static str,
    pub epoch: u64,
}

/// One direction of a connection.
#[derive(Debug, Default, Clone, Copy)]
struct Path {
    dead: bool,
    slower: Duration,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Server({})", self.name)
    }
}

impl Server {
    pub fn start(world: &World, name: &'static str, max_payload: usize, history: Arc<Mutex<History>>) -> Arc<Self> {
        let host = if name == "source" { Host::Source } else { Host::Target };
        let state = State {
            world: world.clone(),
            host,
            max_payload,
            history,
            down: false,
            frozen: None,
            leaderless: None,
            behind: None,
            streams: BTreeMap::new(),
            consumers: BTreeMap::new(),
            batches: HashMap::new(),
            ingest: None,
            nodes: 1,
            leader: 0,
            node_down: None,
            fed_over: None,
            connections: BTreeMap::new(),
            next_connection: 0,
            apart: BTreeMap::new(),
            tampers: Vec::new(),
            refusals: Vec::new(),
        };
        let server = Arc::new(Self { world: world.clone(), name, host, state: Mutex::new(state) });
        let ticking = Arc::downgrade(&server);
        tokio::spawn(async move {
            loop {
                sleep(TICK).await;
                let Some(server) = ticking.upgrade() else { return };
                server.lock().tick();
            }
        });
        server
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("server")
    }

    /// Does something to a stream, and delivers what became due.
    pub fn with<T>(&self, stream: &str, work: impl FnOnce(&mut Stream) -> T) -> T {
        let mut state = self.lock();
        let result = work(state.streams.get_mut(stream).expect("a stream"));
        state.drop_uninteresting();
        state.drop_purged(stream);
        state.deliver_all();
        result
    }

    /// A stream loses its end; the last sequence that is left.
    pub fn lose_end(&self, stream: &str, count: u64) -> u64 {
        let mut state = self.lock();
        let last = state.streams.get_mut(stream).expect("a stream").lose_end(count);
        state.lost_end(stream, last);
        last
    }

    /// Creates a stream, or recreates it: its consumers are gone.
    pub fn make(&self, stream: Stream) {
        let mut state = self.lock();
        state.consumers.retain(|_, consumer| consumer.stream != stream.name);
        state.batches.clear();
        state.streams.insert(stream.name.clone(), stream);
    }

    /// Fills a stream from a feed from now on.
    pub fn ingest(&self, ingest: Ingest) {
        let mut state = self.lock();
        state.streams.get_mut(&ingest.stream).expect("a stream").origin = Some(ingest.config());
        state.ingest = Some(ingest);
    }

    /// From now on it is a cluster of so many servers. They share what they have; their connections are their own.
    pub fn cluster(&self, nodes: usize) {
        self.lock().nodes = nodes;
    }

    /// Another server of the cluster leads the stream that is filled from a feed.
    pub fn move_leader(&self) {
        self.lock().move_leader();
    }

    /// A server of the cluster is down for a while, unless another one is: then the others would have no majority.
    pub fn node_down(&self, node: usize, time: Duration) {
        let mut state = self.lock();
        if state.node_down.is_some_and(|(_, until)| until > Instant::now()) {
            return;
        }
        state.node_down = Some((node, Instant::now() + time));
        let gone: Vec<u64> =
            state.connections.iter().filter(|(_, connection)| connection.node == node).map(|(id, _)| *id).collect();
        gone.iter().for_each(|id| state.cut_one(*id));
        if state.leader == node {
            state.move_leader();
        }
    }

    /// The leafnode connection breaks over which the stream is filled.
    pub fn cut_fed(&self) {
        let mut state = self.lock();
        if let Some(id) = state.fed_over.take() {
            state.cut_one(id);
        }
    }

    /// All connections break; what was on its way is lost.
    pub fn cut(&self) {
        let mut state = self.lock();
        for connection in std::mem::take(&mut state.connections).into_values() {
            connection.cut.cancel();
        }
    }

    /// The process is gone: so is all that it had in memory only.
    pub fn kill(&self) {
        self.cut();
        let mut state = self.lock();
        state.down = true;
        state.consumers.retain(|_, consumer| consumer.is_durable());
        state.consumers.values_mut().for_each(Consumer::restart);
        state.batches.clear();
        state.frozen = None;
    }

    pub fn revive(&self) {
        let mut state = self.lock();
        if std::mem::take(&mut state.down) {
            let now_ns = self.world.now_ns(self.host);
            state.streams.values_mut().for_each(|stream| stream.restart(now_ns));
            state.restart_ingest();
        }
    }

    /// Nothing is read, done or sent for a while.
    pub fn freeze(&self, time: Duration) {
        self.lock().frozen = Some(Instant::now() + time);
    }

    /// Names of the consumers that exist but for durable ones.
    pub fn consumers(&self) -> Vec<String> {
        let state = self.lock();
        let own = state.consumers.iter().filter(|(_, consumer)| !consumer.is_durable());
        own.map(|(name, _)| name.clone()).collect()
    }

    /// The consumers of now deliver nothing more: heartbeats and the ends of pulls are all that comes. Durable ones are
    /// never recreated, and no server does that to them.
    pub fn mute(&self) {
        let mut state = self.lock();
        let consumers = state.consumers.values_mut().filter(|consumer| !consumer.is_durable());
        consumers.for_each(|consumer| consumer.mute = true);
    }

    /// Streams have no leader for a while: nobody takes messages or answers.
    pub fn leaderless(&self, time: Duration) {
        self.lock().leaderless = Some(Instant::now() + time);
    }

    /// Connections break, and consumers live for a while on a server that lacks the end of the stream.
    pub fn behind(&self, time: Duration) {
        {
            let mut state = self.lock();
            let last = state.streams.values().map(|stream| stream.last).max().unwrap_or_default();
            let lacking = state.world.between(1, 200);
            state.behind = Some((Instant::now() + time, last.saturating_sub(lacking)));
        }
        self.cut();
    }

    /// A frame for a subscriber, after so many others, is lost or comes twice.
    pub fn tamper(&self, after: u64, what: Tamper) {
        self.lock().tampers.push((after, what));
    }

    /// A message, after so many others, is refused for a reason that does not last.
    pub fn refuse(&self, after: u64) {
        self.lock().refusals.push(after);
    }

    /// Connections that are open are dead in one direction, without a sign.
    pub fn half_open(&self, way: Way) {
        self.lock().paths(way).for_each(|path| path.dead = true);
    }

    /// Nothing gets through between an instance and this server for a while: what is open stays dead.
    pub fn apart(&self, instance: &'static str, time: Duration) {
        let mut state = self.lock();
        state.apart.insert(instance, Instant::now() + time);
        for connection in state.connections.values_mut().filter(|connection| connection.who.instance == instance) {
            (connection.to.dead, connection.from.dead) = (true, true);
        }
    }

    fn is_apart(&self, instance: &str) -> bool {
        self.lock().apart.get(instance).is_some_and(|until| *until > Instant::now())
    }

    /// Connections that are open are slower in one direction.
    pub fn slow(&self, way: Way, by: Duration) {
        self.lock().paths(way).for_each(|path| path.slower = by);
    }

    /// No more faults; what is dead stays so, and what is on its way takes its time.
    pub fn heal(&self) {
        let mut state = self.lock();
        (state.frozen, state.leaderless, state.behind, state.node_down) = (None, None, None, None);
        state.tampers.clear();
        state.refusals.clear();
        state.apart.clear();
        for way in [Way::To, Way::From] {
            state.paths(way).for_each(|path| path.slower = Duration::ZERO);
        }
        state.streams.values_mut().for_each(|stream| stream.max_messages = None);
    }

    /// A connection to one of its servers other than these; `None` if that is down, and where there is no other one.
    fn connect(self: &Arc<Self>, who: Who, others: &[LeafServer]) -> Result<Option<DuplexStream>, NoOther> {
        let mut state = self.lock();
        let is_other = |node: &usize| !others.iter().any(|other| other.id == state.node_name(*node));
        let nodes: Vec<usize> = (0..state.nodes).filter(is_other).collect();
        let is_up = |node: &usize| state.node_down.is_none_or(|(down, until)| down != *node || until <= Instant::now());
        let up: Vec<usize> = nodes.iter().copied().filter(is_up).collect();
        let node = match up[..] {
            _ if nodes.is_empty() => return Err(NoOther),
            _ if state.down => return Ok(None),
            [] => return Ok(None),
            [one] => one,
            _ => up[self.world.between(1, up.len() as u64) as usize - 1],
        };
        let (theirs, ours) = duplex(PIPE);
        let (out, sending) = unbounded_channel();
        let cut = CancellationToken::new();
        let latency = self.world.millis(0, if self.world.once_in(3) { 300 } else { 20 });
        let max_payload = state.max_payload;
        let name = state.node_name(node);
        let info = json!({"server_name": name, "server_id": name, "version": "2.15.1", "max_payload": max_payload, "headers": true});
        let _ = out.send((Instant::now() + latency, format!("INFO {info}\r\n").into_bytes()));
        state.next_connection += 1;
        let id = state.next_connection;
        let connection = Connection {
            node,
            subscriptions: Vec::new(),
            leaf: None,
            out,
            cut: cut.clone(),
            latency,
            opened: self.world.elapsed(),
            who,
            to: Path::default(),
            from: Path::default(),
        };
        state.connections.insert(id, connection);
        drop(state);
        let server = self.clone();
        tokio::spawn(async move {
            let (reading, writing) = tokio::io::split(ours);
            let work = server.clone().work(id, reading, latency);
            let send = server.clone().send(id, sending, writing);
            tokio::select! {
                biased;
                () = cut.cancelled() => {}
                // The other side is gone, and all that it had sent is done.
                () = work => {}
                () = send => {}
            }
            server.lock().connections.remove(&id);
        });
        Ok(Some(theirs))
    }

    /// Takes commands, each piece after its way through the network.
    async fn work(
        self: Arc<Self>,
        id: u64,
        mut reading: impl tokio::io::AsyncRead + Unpin + Send + 'static,
        latency: Duration,
    ) {
        let (arriving, mut arrived) = unbounded_channel();
        let server = self.clone();
        let reader = async move {
            let mut buffer = vec![0; PIPE];
            while let Ok(read @ 1..) = reading.read(&mut buffer).await {
                server.world.note(server.name, &buffer[..read]);
                let path = server.lock().connections.get(&id).map(|connection| connection.to).unwrap_or_default();
                let due = Instant::now() + latency + path.slower;
                if !path.dead && arriving.send((due, buffer[..read].to_vec())).is_err() {
                    return;
                }
            }
        };
        let worker = async {
            let mut input = Vec::new();
            while let Some((due, bytes)) = arrived.recv().await {
                sleep_until(due).await;
                self.thawed().await;
                input.extend_from_slice(&bytes);
                let mut state = self.lock();
                let used = state.commands(id, &input);
                drop(state);
                input.drain(..used);
            }
        };
        tokio::join!(reader, worker);
    }

    async fn send(
        self: Arc<Self>,
        id: u64,
        mut sending: UnboundedReceiver<(Instant, Vec<u8>)>,
        mut writing: impl tokio::io::AsyncWrite + Unpin,
    ) {
        while let Some((due, bytes)) = sending.recv().await {
            let path = self.lock().connections.get(&id).map(|connection| connection.from).unwrap_or_default();
            sleep_until(due + path.slower).await;
            self.thawed().await;
            if path.dead {
                continue;
            }
            self.world.note(self.name, &bytes);
            // Whoever is gone hears nothing; what it sent before is worked on all the same.
            let _ = writing.write_all(&bytes).await;
        }
    }

    async fn thawed(&self) {
        loop {
            let Some(until) = self.lock().frozen.filter(|until| *until > Instant::now()) else { return };
            sleep_until(until.min(Instant::now() + TICK)).await;
        }
    }
}

impl State {
    /// Works on all complete commands; returns the bytes used.
    fn commands(&mut self, id: u64, input: &[u8]) -> usize {
        let mut at = 0;
        while let Some(end) = input[at..].windows(2).position(|pair| pair == b"\r\n") {
            let line = String::from_utf8_lossy(&input[at..at + end]).into_owned();
            let body = at + end + 2;
            let words: Vec<&str> = line.split_whitespace().collect();
            let (size, header_size) = match words.as_slice() {
                ["PUB" | "LMSG", .., size] => (size.parse::<usize>().expect("a size"), 0),
                ["HPUB" | "HMSG", .., header, size] => {
                    (size.parse::<usize>().expect("a size"), header.parse::<usize>().expect("a size"))
                }
                ["CONNECT", ..] => {
                    self.logs_in(id, &line["CONNECT ".len()..]);
                    at = body;
                    continue;
                }
                _ => {
                    self.control(id, &words);
                    at = body;
                    continue;
                }
            };
            if input.len() < body + size + 2 {
                break;
            }
            let (header, payload) = input[body..body + size].split_at(header_size);
            let reply = match (words[0], words.len()) {
                ("PUB" | "LMSG", 4) | ("HPUB" | "HMSG", 5) => words[2],
                _ => "",
            };
            if matches!(words[0], "LMSG" | "HMSG") {
                if self.connections.contains_key(&id) {
                    self.fed_over = Some(id);
                    self.leaf_sends(words[1], reply, header, payload);
                }
                at = body + size + 2;
                continue;
            }
            let connection = self.connections.get(&id);
            let sender = connection.map(|connection| (connection.opened, connection.who.epoch)).unwrap_or_default();
            self.publish(sender, words[1], reply, header, payload);
            at = body + size + 2;
        }
        at
    }

    fn control(&mut self, id: u64, words: &[&str]) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        match words {
            ["PING"] => {
                let _ = connection.out.send((Instant::now() + connection.latency, b"PONG\r\n".to_vec()));
            }
            ["SUB", subject, sid] => {
                connection.subscriptions.push((sid.parse().expect("a sid"), (*subject).to_owned()));
            }
            ["LS+", subject] => {
                if let Some((_, subscriptions)) = &mut connection.leaf {
                    subscriptions.push((*subject).to_owned());
                }
            }
            ["UNSUB", sid] => connection.subscriptions.retain(|(known, _)| known.to_string() != *sid),
            _ => {}
        }
    }

    /// A login: one without a language is that of a leafnode.
    fn logs_in(&mut self, id: u64, login: &str) {
        let login: Value = serde_json::from_str(login).expect("a login");
        let Some(connection) = self.connections.get_mut(&id).filter(|_| login["lang"].is_null()) else { return };
        connection.leaf = Some((login["name"].as_str().expect("a name").to_owned(), Vec::new()));
        self.leaf_connected(id);
    }

    /// The name of one of its servers.
    pub(super) fn node_name(&self, node: usize) -> String {
        let name = if self.host == Host::Source { "source" } else { "target" };
        if self.nodes == 1 { name.to_owned() } else { format!("{name}-{node}") }
    }

    pub(super) fn node_of(&self, id: u64) -> usize {
        self.connections.get(&id).map_or(0, |connection| connection.node)
    }

    fn cut_one(&mut self, id: u64) {
        if let Some(connection) = self.connections.remove(&id) {
            connection.cut.cancel();
        }
    }

    /// Another server leads the stream that is filled from a feed, after an election.
    pub(super) fn move_leader(&mut self) {
        let down = self.node_down.filter(|(_, until)| *until > Instant::now()).map(|(node, _)| node);
        let others: Vec<usize> = (0..self.nodes).filter(|node| *node != self.leader && Some(*node) != down).collect();
        if others.is_empty() {
            return;
        }
        self.leader = others[self.world.between(1, others.len() as u64) as usize - 1];
        let elected = Instant::now() + self.world.millis(0, 500);
        self.leaderless = Some(elected);
        self.leads_anew(elected, elected + self.world.millis(0, 600));
    }

    pub(super) fn leafs(&self) -> impl Iterator<Item = (u64, &str)> {
        self.connections.iter().filter_map(|(id, connection)| Some((*id, connection.leaf.as_ref()?.0.as_str())))
    }

    pub(super) fn leaf_name(&self, id: u64) -> String {
        self.leafs().find(|(of, _)| *of == id).map(|(_, name)| name.to_owned()).unwrap_or_default()
    }

    /// Says why, and closes a connection; what it sends from now on is not read.
    pub(super) fn evict(&mut self, id: u64, why: &[u8]) {
        let Some(connection) = self.connections.remove(&id) else { return };
        let _ = connection.out.send((Instant::now() + connection.latency, why.to_vec()));
        tokio::spawn(async move {
            sleep(connection.latency + TICK).await;
            connection.cut.cancel();
        });
    }

    /// Sends a frame to a leaf, or to all that subscribed to a subject; `None` for any.
    pub(super) fn send_to_leafs(&mut self, only: Option<u64>, subject: Option<&str>, frame: &[u8]) {
        for (id, connection) in &self.connections {
            let Some((_, subscriptions)) = &connection.leaf else { continue };
            let takes = |subject: &str| subscriptions.iter().any(|own| subject.starts_with(own.trim_end_matches('>')));
            if only.is_none_or(|only| only == *id) && subject.is_none_or(takes) {
                let _ = connection.out.send((Instant::now() + connection.latency, frame.to_vec()));
            }
        }
    }

    /// How often the next frame arrives.
    pub(super) fn times(&mut self) -> usize {
        let mut times = 1;
        self.tampers.retain_mut(|(after, what)| {
            if *after == 0 {
                times = if *what == Tamper::Lose { 0 } else { 2 };
                return false;
            }
            *after -= 1;
            true
        });
        times
    }

    fn paths(&mut self, way: Way) -> impl Iterator<Item = &mut Path> {
        self.connections.values_mut().map(move |connection| match way {
            Way::To => &mut connection.to,
            Way::From => &mut connection.from,
        })
    }

    /// What connections have subscribed to.
    pub(super) fn patterns(&self) -> impl Iterator<Item = &str> {
        let subscriptions = self.connections.values().flat_map(|connection| &connection.subscriptions);
        subscriptions.map(|(_, pattern)| pattern.as_str())
    }

    pub(super) fn answer(&mut self, reply: &str, json: &Value) {
        self.answer_raw(reply, b"", json.to_string().as_bytes());
    }

    pub(super) fn answer_raw(&mut self, reply: &str, header: &[u8], payload: &[u8]) {
        if !reply.is_empty() {
            self.route(reply, reply, "", header, payload);
        }
    }

    /// Sends to whoever subscribed to `to`, shown under `subject`.
    pub(super) fn route(&mut self, to: &str, subject: &str, reply: &str, header: &[u8], payload: &[u8]) {
        let times = self.times();
        for connection in self.connections.values() {
            for (sid, pattern) in &connection.subscriptions {
                let prefix = pattern.trim_end_matches(['*', '>']);
                if !to.starts_with(prefix) {
                    continue;
                }
                let reply = if reply.is_empty() { String::new() } else { format!(" {reply}") };
                let mut frame = if header.is_empty() {
                    format!("MSG {subject} {sid}{reply} {}\r\n", payload.len()).into_bytes()
                } else {
                    let total = header.len() + payload.len();
                    format!("HMSG {subject} {sid}{reply} {} {total}\r\n", header.len()).into_bytes()
                };
                frame.extend_from_slice(header);
                frame.extend_from_slice(payload);
                frame.extend_from_slice(b"\r\n");
                for _ in 0..times {
                    let _ = connection.out.send((Instant::now() + connection.latency, frame.clone()));
                }
            }
        }
    }
}

/// Connects one process to the servers of a simulation by the names of their hosts.
#[derive(Debug, Clone)]
pub struct Network {
    pub servers: Vec<Arc<Server>>,
    pub who: Who,
    /// Counts what goes to the target.
    pub hands: Arc<Hands>,
}

impl Network {
    /// A pipe to a server other than these; `None` where there is no other one.
    async fn reach<'a>(
        &self,
        place: &'a ServerRef,
        others: &[LeafServer],
    ) -> Result<Option<(&'a Connected, &'a str, Meter)>, Error> {
        let ServerRef::Known(connection) = place else { panic!("the simulation has no contexts") };
        let endpoint = &connection.endpoint;
        let host = endpoint.hosts[0].host.as_str();
        let server = self.servers.iter().find(|server| server.name == host).expect("a known server");
        sleep(server.world.millis(0, 20)).await;
        let limit = endpoint.connect_timeout;
        if server.is_apart(self.who.instance) {
            sleep(limit).await;
            return Err(Error::retry(format!("`{host}`: no answer within {limit:?}")));
        }
        let Ok(pipe) = server.connect(self.who, others) else { return Ok(None) };
        let pipe = pipe.ok_or_else(|| Error::retry(format!("`{host}`: connection refused")))?;
        Ok(Some((connection, host, Meter { pipe, hands: (host == "target").then(|| self.hands.clone()) })))
    }

    async fn leaf(&self, place: &ServerRef, login: &LeafLogin, others: &[LeafServer]) -> Result<Option<Leaf>, Error> {
        let Some((connection, host, pipe)) = self.reach(place, others).await? else { return Ok(None) };
        let limit = connection.endpoint.connect_timeout;
        tokio::time::timeout(limit, Leaf::greet(Box::new(pipe), host, connection, login))
            .await
            .map_err(|_| Error::retry(format!("`{host}`: no answer within {limit:?}")))?
            .map(Some)
    }
}

impl Dial for Network {
    fn dial<'a>(&'a self, place: &'a ServerRef, name: &'a str) -> BoxFuture<'a, Result<Lane, Error>> {
        async move {
            let (connection, host, pipe) = self.reach(place, &[]).await?.expect("a server");
            let limit = connection.endpoint.connect_timeout;
            tokio::time::timeout(limit, Lane::greet(Box::new(pipe), host, connection, name))
                .await
                .map_err(|_| Error::retry(format!("`{host}`: no answer within {limit:?}")))?
        }
        .boxed()
    }

    fn dial_leaf<'a>(&'a self, place: &'a ServerRef, login: &'a LeafLogin) -> BoxFuture<'a, Result<Leaf, Error>> {
        async move { Ok(self.leaf(place, login, &[]).await?.expect("a server")) }.boxed()
    }

    fn dial_other_leaf<'a>(
        &'a self,
        place: &'a ServerRef,
        login: &'a LeafLogin,
        connected: &'a [LeafServer],
    ) -> BoxFuture<'a, Result<Option<Leaf>, Error>> {
        self.leaf(place, login, connected).boxed()
    }
}
