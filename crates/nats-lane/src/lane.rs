//! A connection with one owner: raw bytes, no reconnect. Its owner drives it: commands are
//! put into the output buffer, [`Lane::turn`] writes and reads until something arrived or everything was
//! written. Dropping the lane resets the connection, and nothing of it reaches the server any more: whoever has to know that
//! the last commands arrived asks for an answer first ([`Lane::round_trip`]).

mod requests;

use std::{
    fmt, io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes, BytesMut};
use chrono::DateTime;
use futures_util::{
    future::BoxFuture,
    stream::{FuturesUnordered, StreamExt},
};
use rustls_pki_types::ServerName;
use serde::Deserialize;
use serde_json::json;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    net::{TcpStream, lookup_host},
    time::{Instant, Interval, MissedTickBehavior, interval_at, timeout, timeout_at},
};
use tokio_util::io::poll_read_buf;

use self::requests::Patience;
use crate::{
    Connection, Endpoint, Error, ErrorKind, Host, Scheme, ServerRef,
    auth::{connect_fields, inbox_prefix, jwt_expires},
    entropy,
    error::CLOSED,
    parser::{self, Control, Frame},
    socket::Socket,
    tls::client_config,
    websocket::WebSocket,
};

/// Smallest and largest piece read at once. A lane that is busy reads large, an idle one holds little memory.
const READ_MIN: usize = 4 * 1024;
const READ_MAX: usize = 512 * 1024;
/// How often a silent connection is looked at: a PING at the first look, given up at the third.
const KEEPALIVE: Duration = Duration::from_secs(5);
/// A server that has not let us in after this time gets company: the next one is tried as well.
const HEAD_START: Duration = Duration::from_secs(1);
/// How often the system is asked what it has delivered of a lane, at most.
pub(crate) const DELIVERY_EVERY: Duration = Duration::from_millis(500);
/// The same for the addresses of one server.
pub(crate) const NEXT_ADDRESS: Duration = Duration::from_millis(250);
/// An answer that has not arrived when nothing came for this long is given up.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// A request without an answer is sent again when nothing came for this long: what meets no leader gets none, whoever
/// leads then. While bytes of messages arrive, the answer may be among them or queued after them.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// The bytes under a lane.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Makes lanes. A test implements it to put another transport below them.
pub trait Dial: fmt::Debug + Send + Sync {
    /// Connects to a server; `name` is what the server shows.
    fn dial<'a>(&'a self, server: &'a ServerRef, name: &'a str) -> BoxFuture<'a, Result<Lane, Error>>;

    /// When a login with the credentials of now would end, in seconds since the Unix epoch; `None` for never.
    fn login_expires(&self, _server: &ServerRef) -> Option<i64> {
        None
    }
}

/// What the server said of itself in INFO.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct ServerInfo {
    /// Id of the server, another one after each start.
    pub server_id: String,
    /// Name of the server.
    pub server_name: String,
    /// Version, such as `2.14.6`.
    pub version: String,
    /// Largest message it takes, headers included.
    pub max_payload: usize,
    /// Whether it takes headers.
    pub headers: bool,
    /// Its JetStream domain, if it has one.
    pub domain: Option<String>,
    tls_required: bool,
    tls_available: bool,
    nonce: Option<String>,
}

/// One message in a [`Batch`].
#[derive(Debug, Clone, Copy)]
pub struct Message<'a> {
    /// Subscription it came for.
    pub sid: u64,
    /// Subject.
    pub subject: &'a [u8],
    /// Reply subject; empty for none.
    pub reply: &'a [u8],
    /// Header block; empty for none.
    pub header: &'a [u8],
    /// Payload.
    pub payload: &'a [u8],
}

/// Messages that arrived together, still lying in the buffer they were read into.
#[derive(Debug, Clone)]
pub struct Batch {
    data: Bytes,
    frames: Vec<Frame>,
}

impl Batch {
    /// The complete messages at the front of some bytes.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let mut frames = Vec::new();
        parser::parse(bytes, &mut frames, &mut Vec::new())?;
        Ok(Self { data: Bytes::copy_from_slice(bytes), frames })
    }

    /// Number of messages.
    pub fn len(&self) -> usize {
        self.frames.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Bytes of buffer that this batch keeps.
    pub fn bytes(&self) -> usize {
        self.data.len()
    }

    /// The message at an index below [`Batch::len`].
    pub fn get(&self, index: usize) -> Message<'_> {
        let frame = &self.frames[index];
        Message {
            sid: frame.sid,
            subject: frame.subject.of(&self.data),
            reply: frame.reply.of(&self.data),
            header: frame.header.of(&self.data),
            payload: frame.payload.of(&self.data),
        }
    }

    /// All messages in order.
    pub fn iter(&self) -> impl Iterator<Item = Message<'_>> {
        (0..self.len()).map(|index| self.get(index))
    }
}

/// Why [`Lane::turn`] returned.
#[derive(Debug)]
pub enum Turn {
    /// Messages arrived.
    Received(Batch),
    /// All output was handed to the system.
    Flushed,
}

/// A connection that its owner drives; see the [crate](crate).
pub struct Lane {
    io: Box<dyn Stream>,
    /// The connection below `io`, where it is one of the system's.
    socket: Option<Socket>,
    address: String,
    info: ServerInfo,
    input: BytesMut,
    need: usize,
    read_size: usize,
    controls: Vec<Control>,
    pings: u64,
    pongs: u64,
    /// The oldest PING that is not answered.
    question: Option<UnansweredPing>,
    /// Bytes of commands that the server has read for certain: it answered a PING behind them.
    proven: u64,
    /// Refused publishes, if they are kept instead of ending the lane.
    refused: Option<Vec<String>>,
    output: BytesMut,
    unflushed: bool,
    inbox: String,
    api_prefix: String,
    next_sid: u64,
    next_request: u64,
    keepalive: Interval,
    /// When the keepalive was checked last.
    checked: Instant,
    heard_at: Instant,
    /// When bytes of a message arrived last.
    arrived_at: Instant,
    /// When bytes of a message arrived last that was not complete with them.
    partial_at: Instant,
    written: u64,
    busy: bool,
    silent: u32,
    /// When the other end gave the last sign of life.
    alive: Instant,
    /// When it last took some of what was waiting in our buffers or the system's.
    drained: Instant,
    /// What the system had delivered at the last check since the question, and when that was.
    delivered: Option<(u64, Instant)>,
    /// The system took no more output.
    blocked: bool,
    /// When the login ends, in seconds since the Unix epoch; `None` for never.
    expires: Option<i64>,
}

/// A PING that is not answered.
#[derive(Debug, Clone, Copy)]
struct UnansweredPing {
    /// Its number.
    number: u64,
    /// Bytes of commands up to and with it.
    end: u64,
    /// Bytes that the system had taken when it was handed over.
    handed_over: Option<u64>,
    /// Something else is before it of which it is not known that it arrived.
    follows: bool,
}

impl std::fmt::Debug for Lane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lane").field("address", &self.address).field("server", &self.info.server_name).finish()
    }
}

impl Lane {
    /// Connects to the first server of the endpoint that lets us in: the next one is tried as soon as the one before
    /// refuses, and beside it when that takes long. Every host gets `connect_timeout`; the error tells what each of
    /// them said.
    pub async fn connect(connection: &Connection, name: &str) -> Result<Self, Error> {
        let hosts = connection.endpoint.hosts.iter();
        race(hosts, HEAD_START, |host| Self::try_host(connection, host, name)).await
    }

    async fn try_host(connection: &Connection, host: &Host, name: &str) -> Result<Self, Error> {
        let within = connection.endpoint.connect_timeout;
        let lane = match timeout(within, lookup_host((host.host.as_str(), host.port))).await {
            Ok(Ok(addresses)) => Self::try_addresses(connection, host, addresses, name).await,
            Ok(Err(error)) => Err(Error::retry(format!("cannot be resolved: {error}"))),
            Err(_) => Err(Error::retry(format!("cannot be resolved within {within:?}"))),
        };
        lane.map_err(|error| error.context(format!("cannot connect to `{}`", shown(&connection.endpoint, host))))
    }

    /// Connects to the first address of a host where a server lets us in: the next one is tried as soon as the one before
    /// refuses, and beside it when that takes long. Each of them gets `connect_timeout`, so that one which swallows
    /// everything, or accepts a connection and says nothing, costs no other its time.
    pub async fn try_addresses(
        connection: &Connection,
        host: &Host,
        addresses: impl Iterator<Item = SocketAddr>,
        name: &str,
    ) -> Result<Self, Error> {
        let addresses: Vec<_> = addresses.collect();
        if addresses.is_empty() {
            return Err(Error::retry("it has no address"));
        }
        let (within, several) = (connection.endpoint.connect_timeout, addresses.len() > 1);
        let attempt = async |address: SocketAddr| {
            let lane = match timeout(within, Self::connect_to(connection, host, address, name)).await {
                Ok(lane) => lane,
                Err(_) => Err(Error::retry(format!("no answer within {within:?}"))),
            };
            // Which of them it was says nothing new where there is only one.
            lane.map_err(|error| if several { error.context(address.ip().to_string()) } else { error })
        };
        race(addresses.into_iter(), NEXT_ADDRESS, attempt).await
    }

    async fn connect_to(connection: &Connection, host: &Host, address: SocketAddr, name: &str) -> Result<Self, Error> {
        let endpoint = &connection.endpoint;
        let mut lane = Self::greeted(connection, host, address).await?;
        // A websocket has its TLS below it.
        if !endpoint.tls.handshake_first && !endpoint.scheme.is_websocket() {
            lane.upgrade(endpoint, host).await?;
        }
        lane.handshake(endpoint, name).await?;
        Ok(lane)
    }

    /// Connects to an address until the server there has said INFO.
    pub(crate) async fn greeted(connection: &Connection, host: &Host, address: SocketAddr) -> Result<Self, Error> {
        let endpoint = &connection.endpoint;
        let tcp = TcpStream::connect(address).await.map_err(|e| Error::retry(e.to_string()))?;
        let socket = Socket::new(tcp).map_err(|e| Error::retry(e.to_string()))?;
        let mut io: Box<dyn Stream> = Box::new(socket.clone());
        if endpoint.scheme == Scheme::Wss || (endpoint.tls.handshake_first && !endpoint.scheme.is_websocket()) {
            io = start_tls(endpoint, host, io).await?;
        }
        if endpoint.scheme.is_websocket() {
            let socket = WebSocket::open(io, &endpoint.server(host)).await;
            io = Box::new(socket.map_err(|error| Error::retry(format!("no websocket: {error}")))?);
        }
        let mut lane = Self::over(io, shown(endpoint, host), connection)?;
        lane.socket = Some(socket);
        lane.read_info().await?;
        Ok(lane)
    }

    /// A lane over bytes that flow already: greets the server at the other end.
    pub async fn greet(io: Box<dyn Stream>, address: &str, connection: &Connection, name: &str) -> Result<Self, Error> {
        let mut lane = Self::over(io, address.to_owned(), connection)?;
        lane.read_info().await?;
        lane.handshake(&connection.endpoint, name).await?;
        Ok(lane)
    }

    /// A lane without a server whose inbox is known, for tests: its commands stay in its output.
    pub fn alone(connection: &Connection, inbox: &str) -> Result<Self, Error> {
        let info = ServerInfo { max_payload: 1 << 20, headers: true, ..ServerInfo::default() };
        let lane = Self::over(Box::new(tokio::io::empty()), "nowhere".to_owned(), connection)?;
        Ok(Self { info, inbox: inbox.to_owned(), next_sid: Self::REQUEST_SID + 1, ..lane })
    }

    /// Goes over to TLS if the server or we ask for it.
    async fn upgrade(&mut self, endpoint: &Endpoint, host: &Host) -> Result<(), Error> {
        let wanted = endpoint.requires_tls();
        if wanted && !self.info.tls_required && !self.info.tls_available {
            return Err(Error::hold("TLS is asked for, and the server offers none"));
        }
        if wanted || self.info.tls_required {
            if !self.input.is_empty() {
                return Err(Error::retry("the server continued in plain text where TLS was due"));
            }
            let io = std::mem::replace(&mut self.io, Box::new(tokio::io::empty()));
            self.io = start_tls(endpoint, host, io).await?;
        }
        Ok(())
    }

    fn over(io: Box<dyn Stream>, address: String, connection: &Connection) -> Result<Self, Error> {
        let mut keepalive = interval_at(Instant::now() + KEEPALIVE, KEEPALIVE);
        keepalive.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let now = Instant::now();
        Ok(Self {
            io,
            socket: None,
            address,
            info: ServerInfo::default(),
            input: BytesMut::new(),
            need: 0,
            read_size: READ_MIN,
            controls: Vec::new(),
            pings: 0,
            pongs: 0,
            question: None,
            proven: 0,
            refused: None,
            output: BytesMut::new(),
            unflushed: false,
            inbox: format!("{}.{}", inbox_prefix(connection)?, entropy::name()),
            api_prefix: connection.api_prefix.clone(),
            next_sid: 1,
            next_request: 0,
            keepalive,
            checked: now,
            heard_at: now,
            arrived_at: now,
            partial_at: now,
            written: 0,
            busy: false,
            silent: 0,
            alive: now,
            drained: now,
            delivered: None,
            blocked: false,
            expires: None,
        })
    }

    async fn read_info(&mut self) -> Result<(), Error> {
        while self.info.version.is_empty() {
            self.read_more().await?;
        }
        if !self.info.headers {
            return Err(Error::hold(format!("server version {} takes no headers", self.info.version)));
        }
        Ok(())
    }

    async fn handshake(&mut self, endpoint: &Endpoint, name: &str) -> Result<(), Error> {
        let identity = connect_fields(&endpoint.auth, self.info.nonce.as_deref())?;
        self.expires = identity.jwt.as_deref().and_then(jwt_expires);
        let mut connect = json!({
            "verbose": false,
            "pedantic": false,
            "lang": "rust",
            "version": env!("CARGO_PKG_VERSION"),
            "name": name,
            "protocol": 1,
            "headers": true,
            "no_responders": true,
            "echo": false,
            "tls_required": endpoint.requires_tls(),
        });
        if let (Some(connect), Ok(serde_json::Value::Object(fields))) =
            (connect.as_object_mut(), serde_json::to_value(&identity))
        {
            connect.extend(fields);
        }
        self.output.extend_from_slice(format!("CONNECT {connect}\r\nPING\r\n").as_bytes());
        self.pings += 1;
        self.io.write_all(&self.output).await.map_err(|e| Error::retry(e.to_string()))?;
        self.io.flush().await.map_err(|e| Error::retry(e.to_string()))?;
        self.output.clear();
        // The PONG proves that we were let in; an -ERR comes out as an error.
        while self.pongs == 0 {
            self.read_more().await.map_err(|error| self.expired(error))?;
        }
        let subscription = format!("SUB {}.r.* {}\r\n", self.inbox, self.next_sid);
        self.output.extend_from_slice(subscription.as_bytes());
        self.next_sid += 1;
        Ok(())
    }

    /// A server does not say that it refuses a login because it has ended.
    fn expired(&self, error: Error) -> Error {
        let ended = self.expires.filter(|at| error.kind == ErrorKind::Hold && *at <= entropy::now().timestamp());
        let Some(time) = ended.and_then(|at| DateTime::from_timestamp(at, 0)) else { return error };
        let message = format!("{}: the user JWT expired at {}: renew it", error.message, time.format("%FT%TZ"));
        Error { message, ..error }
    }

    /// Reads and handles control lines while no subscription is there.
    async fn read_more(&mut self) -> Result<(), Error> {
        std::future::poll_fn(|cx| self.poll_read(cx)).await?;
        self.take().map(|_| ())
    }

    /// When the login ends, in seconds since the Unix epoch; `None` for never.
    pub fn login_expires(&self) -> Option<i64> {
        self.expires
    }

    /// What the server said of itself.
    pub fn info(&self) -> &ServerInfo {
        &self.info
    }

    /// What subjects of the JetStream API begin with on this connection.
    pub fn api_prefix(&self) -> &str {
        &self.api_prefix
    }

    /// Server that this lane is connected to: `host:port`, or the URL of its websocket.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// When something was received last, whatever it was.
    pub fn heard_at(&self) -> Instant {
        self.heard_at
    }

    /// Whether a message has begun to arrive and is not complete: nothing else can come before it is.
    pub fn is_receiving(&self) -> bool {
        !self.input.is_empty()
    }

    /// When bytes of a message arrived last, complete or not. Signs of life alone do not count.
    pub fn arrived_at(&self) -> Instant {
        self.arrived_at
    }

    /// When bytes arrived last that did not complete a message: until then, nothing else could arrive.
    pub fn partial_at(&self) -> Instant {
        self.partial_at
    }

    /// Bytes that the system has taken from this lane.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Bytes of commands that it has not taken yet.
    pub fn unwritten(&self) -> usize {
        self.output.len()
    }

    /// A subject of this lane's inbox: what is published to it is received with sid [`Lane::REQUEST_SID`].
    pub fn inbox_subject(&self, token: &str) -> String {
        format!("{}.r.{token}", self.inbox)
    }

    /// Where commands are put; [`Lane::turn`] writes them.
    pub fn output(&mut self) -> &mut BytesMut {
        &mut self.output
    }

    /// Subscribes to a new inbox of this lane. Returns its sid and its subject up to, and without, the last
    /// token: anything published to `<subject>.<token>[.<token>]*` comes back for the sid.
    pub fn open_inbox(&mut self) -> (u64, String) {
        let (sid, inbox) = self.reserve_inbox();
        self.listen(sid, &format!("{inbox}.>"));
        (sid, inbox)
    }

    /// The same without subscribing: nothing comes back before [`Lane::listen`].
    pub fn reserve_inbox(&mut self) -> (u64, String) {
        let sid = self.next_sid;
        self.next_sid += 1;
        (sid, format!("{}.{sid}", self.inbox))
    }

    /// Subscribes to a subject below an inbox that was reserved.
    pub fn listen(&mut self, sid: u64, subject: &str) {
        self.output.extend_from_slice(format!("SUB {subject} {sid}\r\n").as_bytes());
    }

    /// Ends a subscription.
    pub fn close_inbox(&mut self, sid: u64) {
        self.output.extend_from_slice(format!("UNSUB {sid}\r\n").as_bytes());
    }

    /// When the other end gave the last sign of life: something came, or full buffers on the way there emptied.
    pub fn alive(&self) -> Instant {
        self.alive
    }

    /// When the other end last took some of what was waiting in buffers on the way there.
    pub fn drained(&self) -> Instant {
        self.drained
    }

    /// Asks the server for a sign of life.
    pub fn ping(&mut self) {
        let before = self.written + self.output.len() as u64;
        self.output.extend_from_slice(b"PING\r\n");
        self.pings += 1;
        if self.question.is_none() {
            let end = self.written + self.output.len() as u64;
            let follows = before > self.proven;
            self.question = Some(UnansweredPing { number: self.pings, end, handed_over: None, follows });
            self.delivered = None;
        }
    }

    /// While a PING is on its way behind other bytes, each of them that the other end takes is a sign of life. For lanes on
    /// which nothing comes: it asks the system, but not while nothing but the PING is on its way.
    pub fn check_delivery(&mut self) {
        let Some(question) = self.question.as_mut().filter(|question| question.follows) else { return };
        let now = Instant::now();
        if self.delivered.is_some_and(|(_, at)| now.duration_since(at) < DELIVERY_EVERY) {
            return;
        }
        let Some(delivered) = self.socket.as_ref().and_then(Socket::delivered) else { return };
        let before = self.delivered.replace((delivered, now));
        // Once it was delivered, nothing but its answer counts.
        question.follows = question.handed_over.is_none_or(|end| delivered < end);
        if question.follows && before.is_some_and(|(before, _)| delivered > before) {
            (self.alive, self.drained) = (now, now);
        }
    }

    /// How often the system was asked what it has delivered.
    #[cfg(test)]
    pub(crate) fn asked(&self) -> u64 {
        self.socket.as_ref().map_or(0, Socket::asked)
    }

    /// Whether it is asked until a PING and what is before it have arrived.
    #[cfg(test)]
    pub(crate) fn waits_for_delivery(&self) -> bool {
        self.question.is_some_and(|question| question.follows)
    }

    /// How many PINGs were sent, the one of the login included.
    pub fn pings(&self) -> u64 {
        self.pings
    }

    /// How many of them the server has answered. It answers in order, after everything that was sent before.
    pub fn answered_pings(&self) -> u64 {
        self.pongs
    }

    /// From now on a refused publish does not end the lane: [`Lane::take_refused`] returns what the server said. A
    /// [`Turn::Received`] without messages may announce it.
    pub fn keep_refused(&mut self) {
        self.refused = Some(Vec::new());
    }

    /// What the server said of refused publishes, oldest first.
    pub fn take_refused(&mut self) -> Vec<String> {
        self.refused.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Writes everything and waits until the server has read it. Messages that arrive meanwhile are lost.
    pub async fn round_trip(&mut self) -> Result<(), Error> {
        self.ping();
        // An earlier one may not be answered yet.
        let own = self.pings;
        let mut patience = Patience::begin(self, REQUEST_TIMEOUT);
        while self.pongs < own {
            let until = patience.until(self).min(Instant::now() + ASK_AGAIN);
            let answered = async {
                if !self.output.is_empty() || self.unflushed {
                    return self.turn().await.map(drop);
                }
                self.read_more().await
            };
            match timeout_at(until, answered).await {
                Ok(answered) => answered?,
                Err(_) => {
                    self.check_delivery();
                    if patience.is_over(self) {
                        return Err(self.silent("PING"));
                    }
                }
            }
        }
        Ok(())
    }

    /// Publishes without headers.
    pub fn publish(&mut self, subject: &str, reply: &str, payload: &[u8]) {
        self.output.extend_from_slice(format!("PUB {subject} {reply} {}\r\n", payload.len()).as_bytes());
        self.output.extend_from_slice(payload);
        self.output.extend_from_slice(b"\r\n");
    }

    /// Sends a request whose answer will be received by [`Lane::turn`] as a message with sid
    /// [`Lane::REQUEST_SID`] and the returned subject.
    pub fn send_request(&mut self, subject: &str, payload: &[u8]) -> String {
        self.next_request += 1;
        let reply = format!("{}.r.{}", self.inbox, self.next_request);
        self.publish(subject, &reply, payload);
        reply
    }

    /// The same with a header block.
    pub fn send_request_with(&mut self, subject: &str, header: &[u8], payload: &[u8]) -> String {
        self.next_request += 1;
        let reply = format!("{}.r.{}", self.inbox, self.next_request);
        let (header_size, size) = (header.len(), header.len() + payload.len());
        self.output.extend_from_slice(format!("HPUB {subject} {reply} {header_size} {size}\r\n").as_bytes());
        for part in [header, payload, b"\r\n"] {
            self.output.extend_from_slice(part);
        }
        reply
    }

    /// Subscription that answers to requests come for.
    pub const REQUEST_SID: u64 = 1;

    /// Writes and reads until messages arrived or all output was written. Answers PINGs, and pings a silent
    /// server itself. Cancel-safe: nothing is lost when the future is dropped. An error ends the lane's life.
    pub async fn turn(&mut self) -> Result<Turn, Error> {
        std::future::poll_fn(|cx| self.poll_turn(cx)).await
    }

    fn poll_turn(&mut self, cx: &mut Context<'_>) -> Poll<Result<Turn, Error>> {
        let flushed = self.poll_write(cx)?;
        while let Poll::Ready(read) = self.poll_read(cx) {
            read?;
            if let Some(batch) = self.take()? {
                return Poll::Ready(Ok(Turn::Received(batch)));
            }
        }
        self.poll_keepalive(cx)?;
        // A PONG or PING of our own may have joined the output.
        let flushed = self.poll_write(cx)? || flushed;
        if flushed { Poll::Ready(Ok(Turn::Flushed)) } else { Poll::Pending }
    }

    /// Writes what there is; whether that emptied the output.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> Result<bool, Error> {
        let had = !self.output.is_empty() || self.unflushed;
        while !self.output.is_empty() {
            match Pin::new(&mut self.io).poll_write(cx, &self.output) {
                Poll::Ready(Ok(0)) => return Err(self.closed()),
                Poll::Ready(Ok(n)) => {
                    self.output.advance(n);
                    self.written += n as u64;
                    // There is room again: the other end took something.
                    if std::mem::take(&mut self.blocked) {
                        self.alive = Instant::now();
                        self.drained = self.alive;
                    }
                    self.busy |= n >= READ_MIN;
                    self.unflushed = true;
                }
                Poll::Ready(Err(error)) => return Err(self.failed(&error)),
                Poll::Pending => {
                    self.blocked = true;
                    return Ok(false);
                }
            }
        }
        if self.unflushed {
            match Pin::new(&mut self.io).poll_flush(cx) {
                Poll::Ready(Ok(())) => {
                    self.unflushed = false;
                    self.hand_over_question();
                }
                Poll::Ready(Err(error)) => return Err(self.failed(&error)),
                Poll::Pending => return Ok(false),
            }
        }
        Ok(had)
    }

    fn hand_over_question(&mut self) {
        if let (Some(question), Some(socket)) = (&mut self.question, &self.socket)
            && question.handed_over.is_none()
            && self.written >= question.end
        {
            question.handed_over = Some(socket.written());
        }
    }

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let room = self.input.capacity() - self.input.len();
        let missing = self.need.saturating_sub(self.input.len());
        if room < READ_MIN || room < missing {
            self.input.reserve(self.read_size.max(missing));
        }
        let before = self.input.len();
        match ready!(poll_read_buf(Pin::new(&mut self.io), cx, &mut self.input)) {
            Ok(0) => Poll::Ready(Err(self.closed())),
            Ok(n) => {
                self.heard_at = Instant::now();
                self.alive = self.heard_at;
                // Read more at once while the buffer fills up, less again when it does not.
                if self.input.capacity() == self.input.len() {
                    self.read_size = (self.read_size * 2).min(READ_MAX);
                    self.busy = true;
                } else if n < self.read_size / 8 && before == 0 {
                    self.read_size = (self.read_size / 2).max(READ_MIN);
                }
                Poll::Ready(Ok(()))
            }
            Err(error) => Poll::Ready(Err(self.failed(&error))),
        }
    }

    /// Takes what is complete out of the input and handles the control lines in it.
    fn take(&mut self) -> Result<Option<Batch>, Error> {
        if self.input.len() < self.need {
            (self.arrived_at, self.partial_at) = (self.heard_at, self.heard_at);
            return Ok(None);
        }
        let mut frames = Vec::new();
        let parsed = parser::parse(&self.input, &mut frames, &mut self.controls)?;
        self.need = parsed.need;
        let data = self.input.split_to(parsed.consumed);
        let controls = std::mem::take(&mut self.controls);
        for control in &controls {
            self.control(control)?;
        }
        self.controls = controls;
        self.controls.clear();
        if !self.input.is_empty() {
            self.partial_at = self.heard_at;
        }
        if !self.input.is_empty() || !frames.is_empty() {
            self.arrived_at = self.heard_at;
        }
        let is_refused = self.refused.as_ref().is_some_and(|refused| !refused.is_empty());
        Ok((!frames.is_empty() || is_refused).then(|| Batch { data: data.freeze(), frames }))
    }

    fn control(&mut self, control: &Control) -> Result<(), Error> {
        match control {
            Control::Ping => self.output.extend_from_slice(b"PONG\r\n"),
            Control::Pong => {
                self.pongs += 1;
                if let Some(question) = self.question.take_if(|question| question.number <= self.pongs) {
                    self.proven = question.end;
                }
            }
            Control::Info(json) => {
                self.info = serde_json::from_slice(json).map_err(|error| {
                    Error::retry(format!("`{}` sent an INFO that is not valid: {error}", self.address))
                })?;
            }
            Control::Err(text) if self.refused.is_some() && is_refused_publish(text) => {
                self.refused.get_or_insert_default().push(text.clone());
            }
            Control::Err(text) => return Err(Error::of_err_line(&self.address, text, self.pongs > 0)),
        }
        Ok(())
    }

    /// Counts the looks at a silent connection; sends a PING at the first and gives up at the third.
    fn poll_keepalive(&mut self, cx: &mut Context<'_>) -> Result<(), Error> {
        while self.keepalive.poll_tick(cx).is_ready() {
            self.release_memory();
            self.check_delivery();
            let checked = std::mem::replace(&mut self.checked, Instant::now());
            if self.alive > checked {
                self.silent = 0;
                continue;
            }
            self.silent += 1;
            match self.silent {
                1 => self.ping(),
                2 => {}
                _ => {
                    return Err(Error::retry(format!(
                        "`{}` is silent for {:?}",
                        self.address,
                        KEEPALIVE * self.silent
                    )));
                }
            }
        }
        Ok(())
    }

    /// Lets buffers go that were only needed while the lane was busy.
    fn release_memory(&mut self) {
        let busy = std::mem::replace(&mut self.busy, false);
        if !busy && self.output.is_empty() && self.output.capacity() > READ_MIN {
            self.output = BytesMut::new();
        }
        if !busy && self.input.is_empty() && self.input.capacity() > READ_MIN {
            self.input = BytesMut::new();
            self.read_size = READ_MIN;
        }
    }

    fn closed(&self) -> Error {
        Error::retry(format!("`{}` {CLOSED}", self.address))
    }

    fn failed(&self, error: &io::Error) -> Error {
        Error::retry(format!("connection to `{}` failed: {error}", self.address))
    }
}

/// Whether an `-ERR` line refuses one publish and leaves the connection open.
fn is_refused_publish(text: &str) -> bool {
    text.to_ascii_lowercase().starts_with("permissions violation for publish to ")
}

/// Begins one attempt after the other, each as soon as the one before has failed or takes longer than `head_start`, until
/// one succeeds. The error says what each of them said, in their order.
pub(crate) async fn race<T, R, F: Future<Output = Result<R, Error>>>(
    targets: impl Iterator<Item = T>,
    head_start: Duration,
    attempt: impl Fn(T) -> F,
) -> Result<R, Error> {
    let mut targets = targets.enumerate();
    let mut attempts = FuturesUnordered::new();
    let mut errors: Vec<(usize, Error)> = Vec::new();
    loop {
        if let Some((index, target)) = targets.next() {
            let attempt = attempt(target);
            attempts.push(async move { (index, attempt.await) });
        }
        match timeout(head_start, attempts.next()).await {
            Ok(Some((_, Ok(result)))) => return Ok(result),
            Ok(Some((index, Err(error)))) => errors.push((index, error)),
            Ok(None) => break,
            Err(_) => {}
        }
    }
    errors.sort_by_key(|(index, _)| *index);
    // One server that may let us in later is enough to try again soon.
    let kind = errors.iter().map(|(_, e)| e.kind).find(|k| *k == ErrorKind::Retry);
    let message = errors.iter().map(|(_, e)| e.message.as_str()).collect::<Vec<_>>().join("; ");
    Err(Error { kind: kind.unwrap_or(ErrorKind::Hold), message, api: None })
}

/// How a server is named in errors.
fn shown(endpoint: &Endpoint, host: &Host) -> String {
    if endpoint.scheme.is_websocket() { endpoint.server(host) } else { host.to_string() }
}

async fn start_tls(endpoint: &Endpoint, host: &Host, io: Box<dyn Stream>) -> Result<Box<dyn Stream>, Error> {
    let config = Arc::new(client_config(&endpoint.tls)?);
    let name = ServerName::try_from(host.host.clone())
        .map_err(|_| Error::hold(format!("`{}` is no name that TLS can verify", host.host)))?;
    match tokio_rustls::TlsConnector::from(config).connect(name, io).await {
        Ok(stream) => Ok(Box::new(stream)),
        Err(error) => Err(Error::of_tls(&error)),
    }
}
