//! A TCP proxy between a client and a server that can be cut, stalled and slowed down.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::Result;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct State {
    mode: Mode,
    /// Added to each chunk, in each direction.
    delay: Duration,
    /// Connections of an older generation are closed.
    generation: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Open,
    Stalled,
    Cut,
}

/// A running proxy; connections through it end when it is dropped.
#[derive(Debug)]
pub struct Proxy {
    port: u16,
    state: watch::Sender<State>,
    accept: JoinHandle<()>,
}

impl Proxy {
    /// Listens on a loopback port and forwards to `127.0.0.1:<port>`.
    pub async fn start(to: u16) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let port = listener.local_addr()?.port();
        let (state, watch) = watch::channel(State { mode: Mode::Open, delay: Duration::ZERO, generation: 0 });
        let accept = tokio::spawn(accept(listener, (Ipv4Addr::LOCALHOST, to).into(), watch));
        Ok(Self { port, state, accept })
    }

    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Closes all connections and lets nobody in until [`Self::resume`].
    pub fn cut(&self) {
        self.set(|s| s.mode = Mode::Cut);
    }

    /// Closes the connections of now; new ones work.
    pub fn drop_connections(&self) {
        self.set(|s| s.generation += 1);
    }

    /// Connections stay open and nothing moves, in either direction.
    pub fn stall(&self) {
        self.set(|s| s.mode = Mode::Stalled);
    }

    /// After [`Self::cut`] or [`Self::stall`].
    pub fn resume(&self) {
        self.set(|s| s.mode = Mode::Open);
    }

    /// Holds each chunk back for `delay`, in each direction.
    pub fn delay(&self, delay: Duration) {
        self.set(|s| s.delay = delay);
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

async fn accept(listener: TcpListener, to: SocketAddr, state: watch::Receiver<State>) {
    while let Ok((client, _)) = listener.accept().await {
        if state.borrow().mode != Mode::Cut {
            tokio::spawn(connection(client, to, state.clone()));
        }
    }
}

async fn connection(client: TcpStream, to: SocketAddr, state: watch::Receiver<State>) {
    let Ok(server) = TcpStream::connect(to).await else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let generation = state.borrow().generation;
    let mut ended = state.clone();
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    // The first to end takes the other direction with it: a half-open connection helps no test.
    tokio::select! {
        () = pump(from_client, to_server, state.clone()) => {}
        () = pump(from_server, to_client, state) => {}
        _ = ended.wait_for(|s| s.mode == Mode::Cut || s.generation != generation) => {}
    }
}

async fn pump(
    mut from: impl AsyncReadExt + Unpin,
    mut to: impl AsyncWriteExt + Unpin,
    mut state: watch::Receiver<State>,
) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        // Stalled before the read, so that the sender feels it, and again before the write.
        if open(&mut state).await.is_none() {
            return;
        }
        let Ok(count @ 1..) = from.read(&mut buffer).await else { return };
        let Some(delay) = open(&mut state).await else { return };
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        if to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}

/// Waits until data may move; `None` when the proxy is gone.
async fn open(state: &mut watch::Receiver<State>) -> Option<Duration> {
    state.wait_for(|s| s.mode == Mode::Open).await.ok().map(|s| s.delay)
}
