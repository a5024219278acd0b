//! A TCP proxy between a client and a server: cuts, stalls, half-open connections, latency and throttling, each
//! direction on its own.

use std::net::{Ipv4Addr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Result;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

use super::clock::{Clock, Rewriter};

/// Largest piece that is forwarded at once.
const PIECE: usize = 64 * 1024;
/// A throttled direction passes on its bytes in so many pieces a second.
const PIECES_PER_SECOND: u64 = 100;
/// So late a piece may be for the next ones to come earlier.
const CATCH_UP: Duration = Duration::from_millis(200);
/// Pieces on their way through a direction with latency: beyond it the sender has to wait.
const ON_THE_WAY: usize = 4096;

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the client that connected to the server behind the proxy.
    ToServer,
    /// What the server sends.
    ToClient,
}

/// Both directions, for what takes several.
pub const BOTH: &[Direction] = &[Direction::ToServer, Direction::ToClient];

/// What happens to connections that are made while others are half-open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Newcomers {
    /// They work: a way round was found, or a firewall only forgot what it knew.
    Work,
    /// They are taken and then nothing moves either, until [`Proxy::resume`] and after it.
    Hang,
}

#[derive(Debug, Clone, Default)]
struct State {
    mode: Mode,
    to_server: Flow,
    to_client: Flow,
    /// What the clock of the server shows.
    clock: Clock,
    /// Connections of an older generation are closed.
    generation: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Mode {
    #[default]
    Open,
    Cut,
}

/// One direction of all connections.
#[derive(Debug, Clone, Default)]
struct Flow {
    /// Nothing is read and nothing passed on, until it continues.
    stalled: bool,
    latency: Duration,
    /// Bytes a second of each connection; `None` for no limit.
    rate: Option<u64>,
    /// What connections with a lower number send is thrown away, for good.
    lost_below: u64,
    /// The connection that passes this many bytes on from now on ends there.
    cut_after: Option<Arc<AtomicU64>>,
}

impl State {
    fn flow(&self, direction: Direction) -> &Flow {
        match direction {
            Direction::ToServer => &self.to_server,
            Direction::ToClient => &self.to_client,
        }
    }

    fn flow_mut(&mut self, direction: Direction) -> &mut Flow {
        match direction {
            Direction::ToServer => &mut self.to_server,
            Direction::ToClient => &mut self.to_client,
        }
    }
}

/// A running proxy; connections through it end when it is dropped.
#[derive(Debug)]
pub struct Proxy {
    port: u16,
    state: watch::Sender<State>,
    accept: JoinHandle<()>,
    accepted: Arc<AtomicU64>,
    open: Arc<()>,
}

impl Proxy {
    /// Listens on a loopback port and forwards to `127.0.0.1:<port>`.
    pub async fn start(to: u16) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let port = listener.local_addr()?.port();
        let (state, watch) = watch::channel(State::default());
        let accepted = Arc::new(AtomicU64::new(0));
        let open = Arc::new(());
        let to = (Ipv4Addr::LOCALHOST, to).into();
        let accept = tokio::spawn(accept(listener, to, watch, accepted.clone(), open.clone()));
        Ok(Self { port, state, accept, accepted, open })
    }

    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Connections that were made through it so far.
    pub fn accepted(&self) -> u64 {
        self.accepted.load(Ordering::SeqCst)
    }

    /// Connections that it still has something to pass on for, or whose ends are both open.
    pub fn open(&self) -> usize {
        // Two are of this and of the task that takes new ones.
        Arc::strong_count(&self.open) - 2
    }

    /// Closes all connections and lets nobody in until [`Self::resume`].
    pub fn cut(&self) {
        self.set(|s| s.mode = Mode::Cut);
    }

    /// Closes the connections of now; new ones work.
    pub fn drop_connections(&self) {
        self.set(|s| s.generation += 1);
    }

    /// Closes the connection that passes on this many more bytes in a direction, right after them: in the middle of
    /// a message as likely as not. Then new ones work.
    pub fn cut_after(&self, direction: Direction, bytes: u64) {
        self.set(|s| s.flow_mut(direction).cut_after = Some(Arc::new(AtomicU64::new(bytes))));
    }

    /// Whether [`Self::cut_after`] still waits for its bytes.
    pub fn cut_pending(&self, direction: Direction) -> bool {
        let left = self.state.borrow().flow(direction).cut_after.clone();
        left.is_some_and(|left| left.load(Ordering::SeqCst) != u64::MAX)
    }

    /// Connections stay open and nothing moves, in either direction; bytes on their way continue afterwards.
    pub fn stall(&self) {
        self.set_flows(BOTH, |flow| flow.stalled = true);
    }

    /// Bytes that connections send in these directions are thrown away from now on, without a sign to the sender, not even when
    /// it closes. They never recover.
    pub fn half_open(&self, directions: &[Direction], newcomers: Newcomers) {
        let below = match newcomers {
            Newcomers::Work => self.accepted(),
            Newcomers::Hang => u64::MAX,
        };
        self.set_flows(directions, |flow| flow.lost_below = below);
    }

    /// The end of what was cut, stalled or half-open: connections that are made from now on work.
    pub fn resume(&self) {
        let accepted = self.accepted();
        self.set(|s| {
            s.mode = Mode::Open;
            for direction in BOTH {
                let flow = s.flow_mut(*direction);
                flow.stalled = false;
                flow.lost_below = flow.lost_below.min(accepted);
            }
        });
    }

    /// [`Self::latency`] in each direction.
    pub fn delay(&self, delay: Duration) {
        self.latency(BOTH, delay);
    }

    /// Everything arrives this much later. Throughput stays: what follows is under way meanwhile.
    pub fn latency(&self, directions: &[Direction], latency: Duration) {
        self.set_flows(directions, |flow| flow.latency = latency);
    }

    /// Each connection passes on so many bytes a second at most; `None` for no limit.
    pub fn throttle(&self, directions: &[Direction], bytes_per_second: Option<u64>) {
        self.set_flows(directions, |flow| flow.rate = bytes_per_second);
    }

    /// What the clock of the server shows to clients from now on.
    pub fn clock(&self, clock: Clock) {
        self.set(|s| s.clock = clock);
    }

    fn set_flows(&self, directions: &[Direction], change: impl Fn(&mut Flow)) {
        self.set(|s| directions.iter().for_each(|direction| change(s.flow_mut(*direction))));
    }

    fn set(&self, change: impl FnOnce(&mut State)) {
        self.state.send_modify(change);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // The connections end by themselves: their watch channel closes with this.
        self.accept.abort();
    }
}

async fn accept(
    listener: TcpListener,
    to: SocketAddr,
    state: watch::Receiver<State>,
    accepted: Arc<AtomicU64>,
    open: Arc<()>,
) {
    while let Ok((client, _)) = listener.accept().await {
        if state.borrow().mode != Mode::Cut {
            let number = accepted.fetch_add(1, Ordering::SeqCst);
            let (open, state) = (open.clone(), state.clone());
            tokio::spawn(async move {
                connection(client, to, state, number).await;
                drop(open);
            });
        }
    }
}

async fn connection(client: TcpStream, to: SocketAddr, state: watch::Receiver<State>, number: u64) {
    let generation = state.borrow().generation;
    let mut ended = state.clone();
    let Ok(server) = TcpStream::connect(to).await else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let there = Passage { direction: Direction::ToServer, state: state.clone(), number };
    let back = Passage { direction: Direction::ToClient, state, number };
    // The first to end takes the other direction with it, unless its end is lost on the way too.
    tokio::select! {
        () = there.pass(from_client, to_server) => {}
        () = back.pass(from_server, to_client) => {}
        _ = ended.wait_for(|s| s.mode == Mode::Cut || s.generation != generation) => {}
    }
}

/// One direction of one connection.
struct Passage {
    direction: Direction,
    state: watch::Receiver<State>,
    number: u64,
}

impl Passage {
    /// Until the sender closes, the receiver does, or the proxy is gone.
    async fn pass(self, from: impl AsyncReadExt + Unpin, to: impl AsyncWriteExt + Unpin) {
        let (send, receive) = mpsc::channel(ON_THE_WAY);
        let state = self.state.clone();
        let mut deliver = pin!(self.deliver(receive, to));
        tokio::select! {
            () = &mut deliver => {}
            () = self.collect(from, send, state) => deliver.await,
        }
    }

    /// Reads pieces and notes when each of them is due at the other end.
    async fn collect(
        &self,
        mut from: impl AsyncReadExt + Unpin,
        send: mpsc::Sender<(Instant, Vec<u8>)>,
        mut state: watch::Receiver<State>,
    ) {
        let mut buffer = vec![0; PIECE];
        let mut free = Instant::now();
        let mut rewriter = Rewriter::new(self.direction);
        loop {
            // Stalled before the read, so that the sender feels it.
            let Some(flow) = self.open(&mut state).await else { return };
            let piece = flow.rate.map_or(PIECE, |rate| (rate / PIECES_PER_SECOND).clamp(1, PIECE as u64) as usize);
            let count = from.read(&mut buffer[..piece]).await.unwrap_or(0);
            let now = Instant::now();
            let Some(flow) = self.now(&state) else { return };
            if self.number < flow.lost_below {
                if count == 0 {
                    // The end is lost like everything else.
                    let _ = state.wait_for(|_| false).await;
                    return;
                }
                continue;
            }
            if count == 0 {
                return;
            }
            if let Some(rate) = flow.rate {
                // A timer that was late is caught up with.
                free = free.max(now.checked_sub(CATCH_UP).unwrap_or(now))
                    + Duration::from_secs_f64(count as f64 / rate as f64);
                sleep_until(free).await;
            }
            let clock = state.borrow().clock;
            let bytes = rewriter.pass(&buffer[..count], clock);
            if send.send((free.max(now) + flow.latency, bytes)).await.is_err() {
                return;
            }
        }
    }

    /// Passes each piece on when it is due.
    async fn deliver(&self, mut pieces: mpsc::Receiver<(Instant, Vec<u8>)>, mut to: impl AsyncWriteExt + Unpin) {
        let mut state = self.state.clone();
        while let Some((due, piece)) = pieces.recv().await {
            if due > Instant::now() {
                sleep_until(due).await;
            }
            let Some(flow) = self.open(&mut state).await else { return };
            if self.number < flow.lost_below {
                continue;
            }
            let left = flow.cut_after.map_or(u64::MAX, |left| take(&left, piece.len() as u64));
            let passed = piece.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            if to.write_all(&piece[..passed]).await.is_err() || passed < piece.len() {
                return;
            }
        }
    }

    /// Waits until data may move; `None` when the proxy is gone.
    async fn open(&self, state: &mut watch::Receiver<State>) -> Option<Flow> {
        let moves = |s: &State| s.mode == Mode::Open && !s.flow(self.direction).stalled;
        state.wait_for(moves).await.ok().map(|s| s.flow(self.direction).clone())
    }

    fn now(&self, state: &watch::Receiver<State>) -> Option<Flow> {
        state.has_changed().ok().map(|_| state.borrow().flow(self.direction).clone())
    }
}

/// How many of `bytes` may still pass; once that is used up, everything may.
fn take(left: &AtomicU64, bytes: u64) -> u64 {
    let next = |left: u64| match left {
        u64::MAX => None,
        left if left < bytes => Some(u64::MAX),
        left => Some(left - bytes),
    };
    left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, next).unwrap_or(u64::MAX)
}
