//! The way to a lane: names, addresses, TLS, websocket and login. Every step has a deadline, and no server waits for another.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use chrono::DateTime;
use futures_util::stream::{FuturesUnordered, StreamExt};
use rustls_pki_types::ServerName;
use serde_json::json;
use tokio::{io::AsyncWriteExt, net::TcpStream, time::timeout};

use super::{Lane, Stream};
use crate::{
    Connection, Endpoint, Error, ErrorKind, Host, Scheme,
    auth::{connect_fields, jwt_expires},
    entropy,
    resolver::resolve,
    socket::Socket,
    tls::client_config,
    websocket::WebSocket,
};

/// If a server has not let us in after this time, the next one is tried as well.
pub(super) const HEAD_START: Duration = Duration::from_secs(1);
/// The same for the addresses of one server.
pub(crate) const NEXT_ADDRESS: Duration = Duration::from_millis(250);

impl Lane {
    /// Connects to the servers of a URL, with everything else as it is by default; see [`Self::connect`].
    pub async fn open(url: &str, name: &str) -> Result<Self, Error> {
        Self::connect(&Connection::to(Endpoint::parse(url).map_err(Error::hold)?), name).await
    }

    /// Connects to the first server of the endpoint that lets us in: the next server is tried as soon as the one before
    /// refuses, and beside it when that takes long. Every host gets `connect_timeout` to be resolved, and then each of its
    /// addresses gets it; the error lists the answer of each host.
    pub async fn connect(connection: &Connection, name: &str) -> Result<Self, Error> {
        let hosts = connection.endpoint.hosts.iter();
        race(hosts, HEAD_START, |host| Self::try_host(connection, host, name)).await
    }

    async fn try_host(connection: &Connection, host: &Host, name: &str) -> Result<Self, Error> {
        let within = connection.endpoint.connect_timeout;
        let lane = match resolve(host, within).await {
            Ok(addresses) => Self::try_addresses(connection, host, addresses.into_iter(), name).await,
            Err(error) => Err(error),
        };
        lane.map_err(|error| error.context(format!("cannot connect to `{}`", shown(&connection.endpoint, host))))
    }

    /// Connects to the first address of a host where a server lets us in: the next address is tried as soon as the one before
    /// refuses, and beside it when that takes long. Each address gets `connect_timeout`: an address that swallows everything,
    /// or accepts a connection and stays silent, takes no time from the others.
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

    /// Goes over to TLS if the server or we ask for it.
    pub(super) async fn upgrade(&mut self, endpoint: &Endpoint, host: &Host) -> Result<(), Error> {
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

    pub(super) async fn read_info(&mut self) -> Result<(), Error> {
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
    pub(super) fn expired(&self, error: Error) -> Error {
        let ended = self.expires.filter(|at| error.kind == ErrorKind::Hold && *at <= entropy::now().timestamp());
        let Some(time) = ended.and_then(|at| DateTime::from_timestamp(at, 0)) else { return error };
        let message = format!("{}: the user JWT expired at {}: renew it", error.message, time.format("%FT%TZ"));
        Error { message, ..error }
    }
}

/// Begins one attempt after the other, each as soon as the one before has failed or takes longer than `head_start`, until
/// one succeeds. The error has the errors of all attempts, in their order.
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
pub(super) fn shown(endpoint: &Endpoint, host: &Host) -> String {
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
