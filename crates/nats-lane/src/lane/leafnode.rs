//! A leafnode connection: what a nats-server speaks to a leaf server, from the leaf's side. A leaf may do what a client may
//! not, such as publish with a reply subject below `$JS.ACK`; and in its messages, the part of a reply subject after `@`
//! becomes the subject of the message at delivery (`processMsgResults` of nats-server).
//!
//! The connection subscribes with `LS+`. With `LS+` and `LS-` the server announces the subscriptions of its account, as far as
//! the leaf user may publish to them. Compression is not offered, so nothing is compressed.

use std::{
    collections::{HashMap, VecDeque},
    fmt::Write as _,
    future::poll_fn,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::BytesMut;
use serde_json::{Value, json};
use tokio::{
    io::AsyncWriteExt,
    time::{Instant, sleep, timeout},
};

use super::{
    Batch, Lane, NEXT_ADDRESS, Stream, Turn,
    connect::{HEAD_START, shown},
    race,
};
pub use crate::parser::Interest;
use crate::{
    Connection, Endpoint, Error, Host, ServerInfo,
    auth::{connect_fields, jwt_expires},
    entropy,
    resolver::resolve,
};

/// Where servers take websockets of leafnodes.
const WEBSOCKET_PATH: &str = "/leafnode";

/// The names that a leaf logs in with, beside the identity of its URL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeafLogin {
    /// Name of the leaf server. A server closes an older leafnode connection of the same name and `account`.
    pub name: String,
    /// Name of the leaf's own account, in any words.
    pub account: String,
    /// Subjects that are subscribed to with the login; never empty.
    pub subscriptions: Vec<String>,
}

/// A server that a leaf is connected to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeafServer {
    /// Id of the server, which it has under each of its addresses.
    pub id: String,
    /// Where the connection ends; `None` where there is no address.
    pub address: Option<SocketAddr>,
}

/// A leafnode connection that its owner drives, like a [`Lane`].
#[derive(Debug)]
pub struct Leaf {
    lane: Lane,
    peer: Option<SocketAddr>,
    /// Messages that arrived during the login: a mirror that waits for a leaf asks at once.
    early: VecDeque<Batch>,
    login_took: Duration,
}

impl Leaf {
    /// Connects to the first server of the endpoint that lets us in, as [`Lane::connect`] does.
    pub async fn connect(connection: &Connection, login: &LeafLogin) -> Result<Self, Error> {
        match Self::connect_other(connection, login, &[]).await? {
            Some(leaf) => Ok(leaf),
            None => Err(Error::retry("the URL names no server")),
        }
    }

    /// The same with the first server that is not among these, which have a connection of this login already: a server
    /// closes the older of two. `None` if there are no others. Only servers of the endpoint count, never those that a server
    /// names.
    pub async fn connect_other(
        connection: &Connection,
        login: &LeafLogin,
        connected: &[LeafServer],
    ) -> Result<Option<Self>, Error> {
        let hosts = connection.endpoint.hosts.iter();
        let others = Others { connected, failed: AtomicUsize::new(0), logins: Mutex::default() };
        match race(hosts, HEAD_START, |host| Self::try_host(connection, host, login, &others)).await {
            Ok(leaf) => Ok(Some(leaf)),
            Err(_) if others.failed.load(Ordering::Relaxed) == 0 => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Logs in over any transport, as [`Lane::greet`] does.
    pub async fn greet(
        io: Box<dyn Stream>,
        address: &str,
        connection: &Connection,
        login: &LeafLogin,
    ) -> Result<Self, Error> {
        let mut lane = Lane::over(io, address.to_owned(), connection)?;
        lane.read_info().await?;
        lane.interest = Some(Vec::new());
        let mut leaf = Self { lane, peer: None, early: VecDeque::new(), login_took: Duration::ZERO };
        leaf.handshake(&connection.endpoint, login).await.map_err(no_leafnode_port)?;
        Ok(leaf)
    }

    async fn try_host(
        connection: &Connection,
        host: &Host,
        login: &LeafLogin,
        others: &Others<'_>,
    ) -> Result<Self, Error> {
        let within = connection.endpoint.connect_timeout;
        let leaf = match resolve(host, within).await {
            Ok(addresses) => {
                let attempt = async |address| {
                    if others.connected.iter().any(|server| server.address == Some(address)) {
                        return Err(connected());
                    }
                    let leaf = match timeout(within, Self::log_in(connection, host, address, login, others)).await {
                        Ok(Ok(Some(leaf))) => return Ok(leaf),
                        Ok(Ok(None)) => return Err(connected()),
                        Ok(Err(error)) => Err(error),
                        Err(_) => Err(Error::retry(format!("no answer within {within:?}"))),
                    };
                    others.failed.fetch_add(1, Ordering::Relaxed);
                    leaf
                };
                race(addresses.into_iter(), NEXT_ADDRESS, attempt).await
            }
            Err(error) => {
                others.failed.fetch_add(1, Ordering::Relaxed);
                Err(error)
            }
        };
        leaf.map_err(|error| error.context(format!("leafnode `{}`", shown(&connection.endpoint, host))))
    }

    async fn log_in(
        connection: &Connection,
        host: &Host,
        address: SocketAddr,
        login: &LeafLogin,
        others: &Others<'_>,
    ) -> Result<Option<Self>, Error> {
        let mut connection = connection.clone();
        let endpoint = &mut connection.endpoint;
        if endpoint.scheme.is_websocket() && endpoint.path.is_empty() {
            WEBSOCKET_PATH.clone_into(&mut endpoint.path);
        }
        let endpoint = &connection.endpoint;
        let mut lane = Lane::greeted(&connection, host, address).await?;
        if others.connected.iter().any(|server| server.id == lane.info.server_id) {
            return Ok(None);
        }
        let turn = others.turn(&lane.info.server_id);
        // Held until the login is over, whatever becomes of it.
        let _turn = match turn.try_lock() {
            Ok(turn) => turn,
            Err(_) => {
                // The server would close the first of two connections for the second one.
                drop(lane);
                let turn = turn.lock().await;
                // The first one failed, so this address may lead there better.
                lane = Lane::greeted(&connection, host, address).await?;
                turn
            }
        };
        if !endpoint.tls.handshake_first && !endpoint.scheme.is_websocket() {
            lane.upgrade(endpoint, host).await?;
        }
        lane.interest = Some(Vec::new());
        let mut leaf = Self { lane, peer: Some(address), early: VecDeque::new(), login_took: Duration::ZERO };
        leaf.handshake(endpoint, login).await.map_err(no_leafnode_port)?;
        Ok(Some(leaf))
    }

    /// Sends login and subscriptions in one piece: mirrors of the account ask as soon as the server has accepted the leaf.
    async fn handshake(&mut self, endpoint: &Endpoint, login: &LeafLogin) -> Result<(), Error> {
        let lane = &mut self.lane;
        let identity = connect_fields(&endpoint.auth, lane.info.nonce.as_deref())?;
        lane.expires = identity.jwt.as_deref().and_then(jwt_expires);
        // Without `lang`: that is what marks a client. The version has to reach the server's `min_version`.
        let mut connect = json!({
            "version": lane.info.version,
            "name": login.name,
            "server_id": entropy::name(),
            "remote_account": login.account,
            "headers": true,
            "protocol": 1,
            "tls_required": endpoint.requires_tls(),
        });
        if let (Some(connect), Ok(Value::Object(fields))) = (connect.as_object_mut(), serde_json::to_value(&identity)) {
            connect.extend(fields);
        }
        let mut hello = format!("CONNECT {connect}\r\n");
        for subject in &login.subscriptions {
            let _ = write!(hello, "LS+ {subject}\r\n");
        }
        hello += "PING\r\n";
        lane.pings += 1;
        let sent = Instant::now();
        lane.io.write_all(hello.as_bytes()).await.map_err(|e| Error::retry(e.to_string()))?;
        lane.io.flush().await.map_err(|e| Error::retry(e.to_string()))?;
        // The PONG proves that login and subscriptions were accepted; an -ERR comes out as an error.
        while lane.pongs == 0 {
            let read = poll_fn(|cx| lane.poll_read(cx)).await.and_then(|()| lane.take());
            self.early.extend(read.map_err(|error| lane.expired(error))?);
        }
        self.login_took = sent.elapsed();
        Ok(())
    }

    /// What the server said of itself.
    pub fn info(&self) -> &ServerInfo {
        self.lane.info()
    }

    /// Which server this leaf is connected to, for [`Leaf::connect_other`].
    pub fn server(&self) -> LeafServer {
        LeafServer { id: self.lane.info().server_id.clone(), address: self.peer }
    }

    /// Server that this leaf is connected to: `host:port`, or the URL of its websocket.
    pub fn address(&self) -> &str {
        self.lane.address()
    }

    /// Time from the login to its answer: a round trip of the line, and what the server took to check the login.
    pub fn login_took(&self) -> Duration {
        self.login_took
    }

    /// Bytes of commands that the system has not taken yet.
    pub fn unwritten(&self) -> usize {
        self.lane.unwritten()
    }

    /// When the login ends, in seconds since the Unix epoch; `None` for never.
    pub fn login_expires(&self) -> Option<i64> {
        self.lane.login_expires()
    }

    /// Subscribes to a subject.
    pub fn subscribe(&mut self, subject: &str) {
        let _ = write!(self.lane.output, "LS+ {subject}\r\n");
    }

    /// Ends a subscription.
    pub fn unsubscribe(&mut self, subject: &str) {
        let _ = write!(self.lane.output, "LS- {subject}\r\n");
    }

    /// Puts a message into the output; an empty `reply` or `header` is none. The header is a whole block, from `NATS/1.0`
    /// to the empty line.
    pub fn send(&mut self, subject: &[u8], reply: &[u8], header: &[u8], payload: &[u8]) {
        let output = &mut self.lane.output;
        output.reserve(subject.len() + reply.len() + header.len() + payload.len() + 48);
        output.extend_from_slice(if header.is_empty() { b"LMSG " } else { b"HMSG " });
        output.extend_from_slice(subject);
        if !reply.is_empty() {
            output.extend_from_slice(b" ");
            output.extend_from_slice(reply);
        }
        write_sizes(output, header.len(), header.len() + payload.len());
        output.extend_from_slice(header);
        output.extend_from_slice(payload);
        output.extend_from_slice(b"\r\n");
    }

    /// Writes and reads until something arrived or all output was written, see [`Lane::turn`]. A [`Turn::Received`] without
    /// messages may announce interest ([`Leaf::take_interest`]).
    pub async fn turn(&mut self) -> Result<Turn, Error> {
        poll_fn(|cx| self.poll_turn(cx)).await
    }

    /// [`Leaf::turn`] for an owner that drives several leafs.
    pub fn poll_turn(&mut self, cx: &mut Context<'_>) -> Poll<Result<Turn, Error>> {
        match self.early.pop_front() {
            Some(batch) => Poll::Ready(Ok(Turn::Received(batch))),
            None => self.lane.poll_turn(cx),
        }
    }

    /// Subscriptions of the server's account that began or ended, oldest first.
    pub fn take_interest(&mut self) -> Vec<Interest> {
        self.lane.interest.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Writes everything and waits until the server has read it, see [`Lane::round_trip`].
    pub async fn round_trip(&mut self) -> Result<(), Error> {
        self.lane.round_trip().await
    }

    /// Writes what there is, for no longer than `within`: before a leaf is dropped.
    pub async fn flush(&mut self, within: Duration) {
        let written = async { while self.lane.unwritten() > 0 && self.lane.turn().await.is_ok() {} };
        tokio::select! {
            () = written => {}
            () = sleep(within) => {}
        }
    }
}

/// The servers that are connected already, how many others failed, and where a login is under way.
struct Others<'a> {
    connected: &'a [LeafServer],
    failed: AtomicUsize,
    /// One login at a time for each id of a server.
    logins: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
}

impl Others<'_> {
    /// What is locked during a login at a server, over whichever of its addresses.
    fn turn(&self, server: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut logins = self.logins.lock().unwrap_or_else(PoisonError::into_inner);
        logins.entry(server.to_owned()).or_default().clone()
    }
}

/// No failure: it only ends the attempt.
fn connected() -> Error {
    Error::hold("is connected already")
}

fn write_sizes(output: &mut BytesMut, header: usize, total: usize) {
    let mut number = itoa::Buffer::new();
    for size in [header, total].into_iter().skip(usize::from(header == 0)) {
        output.extend_from_slice(b" ");
        output.extend_from_slice(number.format(size).as_bytes());
    }
    output.extend_from_slice(b"\r\n");
}

/// A port for clients answers the first subscription with this.
fn no_leafnode_port(error: Error) -> Error {
    if !error.message.to_ascii_lowercase().contains("unknown protocol operation") {
        return error;
    }
    Error::hold(format!(
        "{}: that is not a leafnode port: name the port under `leafnodes` of the server, 7422 by default",
        error.message
    ))
}
