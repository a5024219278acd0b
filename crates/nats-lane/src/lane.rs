//! A connection with one owner: raw bytes, no reconnect. Its owner drives it: commands are appended to the output buffer, and
//! [`Lane::turn`] writes and reads until something arrived or everything was written. Dropping the lane resets the connection,
//! and nothing more of it reaches the server. To make sure that the last commands arrived, call [`Lane::round_trip`] first.

mod batch;
mod connect;
pub mod leafnode;
mod request;

use std::{
    fmt, io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, BytesMut};
use futures_util::future::BoxFuture;
use serde::Deserialize;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{Instant, Interval, MissedTickBehavior, interval_at},
};
use tokio_util::io::poll_read_buf;

pub use self::batch::{Batch, Message};
pub(crate) use self::connect::{NEXT_ADDRESS, race};
use self::leafnode::{Interest, Leaf, LeafLogin, LeafServer};
use crate::{
    Connection, Error, ServerRef,
    auth::inbox_prefix,
    entropy,
    error::CLOSED,
    headers,
    parser::{self, Control},
    socket::Socket,
};

/// Smallest and largest piece read at once. A lane that is busy reads large, an idle one holds little memory.
const READ_MIN: usize = 4 * 1024;
const READ_MAX: usize = 512 * 1024;
/// Buffers that a message made larger than this are given back once they are empty, also on a busy lane.
const LARGE: usize = 4 << 20;
/// How often a silent connection is checked: the first check sends a PING, the third gives the connection up.
const KEEPALIVE: Duration = Duration::from_secs(5);
/// How often the system is asked what it has delivered of a lane, at most.
pub(crate) const DELIVERY_EVERY: Duration = Duration::from_millis(500);

/// The bytes under a lane.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Makes lanes. A test implements it to put another transport below them.
pub trait Dial: fmt::Debug + Send + Sync {
    /// Connects to a server; `name` is what the server shows.
    fn dial<'a>(&'a self, server: &'a ServerRef, name: &'a str) -> BoxFuture<'a, Result<Lane, Error>>;

    /// Connects to the leafnode port of a server with the identity of `login`. Without an implementation of its own, every call
    /// is an error that is not retried.
    fn dial_leaf<'a>(&'a self, _server: &'a ServerRef, _login: &'a LeafLogin) -> BoxFuture<'a, Result<Leaf, Error>> {
        Box::pin(async { Err(Error::hold("there are no leafnode connections here")) })
    }

    /// The same with another server than these, see [`Leaf::connect_other`]. Without an implementation of its own there is none.
    fn dial_other_leaf<'a>(
        &'a self,
        _server: &'a ServerRef,
        _login: &'a LeafLogin,
        _connected: &'a [LeafServer],
    ) -> BoxFuture<'a, Result<Option<Leaf>, Error>> {
        Box::pin(async { Ok(None) })
    }

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
    /// Bytes of commands that the server has read for certain: it answered a PING that was sent after them.
    proven: u64,
    /// Refused publishes, if they are kept instead of ending the lane.
    refused: Option<Vec<String>>,
    /// Subscriptions that the other end announced, if this is a leafnode connection.
    interest: Option<Vec<Interest>>,
    output: BytesMut,
    /// The most that the output held since it was empty.
    output_peak: usize,
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
    /// A lane without a server whose inbox is known, for tests: its commands stay in its output.
    pub fn alone(connection: &Connection, inbox: &str) -> Result<Self, Error> {
        let info = ServerInfo { max_payload: 1 << 20, headers: true, ..ServerInfo::default() };
        let lane = Self::over(Box::new(tokio::io::empty()), "nowhere".to_owned(), connection)?;
        Ok(Self { info, inbox: inbox.to_owned(), next_sid: Self::REQUEST_SID + 1, ..lane })
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
            interest: None,
            output: BytesMut::new(),
            output_peak: 0,
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

    /// When bytes arrived last that did not complete a message: before that time, nothing else could arrive.
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

    /// While a PING is in flight after other bytes, each of these bytes that the other end takes is a sign of life. For lanes
    /// on which nothing arrives: it asks the system, but not while only the PING is in flight.
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

    /// Publishes without headers.
    pub fn publish(&mut self, subject: &str, reply: &str, payload: &[u8]) {
        headers::publish(&mut self.output, subject.as_bytes(), reply.as_bytes(), b"", payload);
    }

    /// Writes and reads until messages arrived or all output was written. Answers PINGs, and pings a silent
    /// server itself. Cancel-safe: nothing is lost when the future is dropped. No call succeeds after an error: drop the lane.
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
        self.output_peak = self.output_peak.max(self.output.len());
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
        if std::mem::take(&mut self.output_peak) > LARGE {
            self.output = BytesMut::new();
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
        let parse = if self.interest.is_some() { parser::parse_leaf } else { parser::parse };
        let parsed = parse(&self.input, &mut frames, &mut self.controls)?;
        self.need = parsed.need;
        let data = self.input.split_to(parsed.consumed);
        if self.input.is_empty() && data.len() > LARGE {
            // Else the memory of the message stays until the next one is read.
            self.input = BytesMut::new();
        }
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
        let is_news = is_refused || self.interest.as_ref().is_some_and(|interest| !interest.is_empty());
        Ok((!frames.is_empty() || is_news).then(|| Batch::new(data.freeze(), frames)))
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
            Control::Interest(interest) => self.interest.get_or_insert_default().push(interest.clone()),
            Control::Err(text) => return Err(Error::of_err_line(&self.address, text, self.pongs > 0)),
        }
        Ok(())
    }

    /// Counts the checks of a silent connection; sends a PING at the first and gives up at the third.
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

    /// Lets buffers go that were only needed while the lane was busy. Their capacity does not show their size: it is what is
    /// left after the bytes that were taken out.
    fn release_memory(&mut self) {
        let busy = std::mem::replace(&mut self.busy, false);
        if !busy && self.output.is_empty() {
            self.output = BytesMut::new();
        }
        if !busy && self.input.is_empty() {
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
