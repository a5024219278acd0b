//! An async-nats client with the servers, identities and TLS of this crate: for everything that needs a reconnect, such as
//! a service, key-value buckets and ordinary publishing.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_nats::{AuthError, Client, ConnectOptions, Event, ReconnectToServer, ServerAddr};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use futures_util::future::join_all;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::{
    Connection, Endpoint, Error, Lane, ServerRef, auth,
    backoff::Backoff,
    context,
    resolver::resolve,
    routes::{RESOLVE, Routes, server_addr},
    tls,
};

/// A dead server is noticed after about two of these.
const PING_INTERVAL: Duration = Duration::from_secs(5);

/// Time limit of one request whose caller names none.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Makes a client that connects in the background, and reconnects whenever the connection is lost. `name` is what the
/// server shows, `label` what log lines call the connection. Connection events are logged, each distinct error once.
///
/// Identity and TLS files are read again for every connection, those of a context by what it says then. Its servers
/// and prefixes are those of now; they come back with the client.
pub async fn connect(server: &ServerRef, name: &str, label: &'static str) -> Result<(Client, Connection), Error> {
    let connection = context::resolve(server)?;
    if connection.endpoint.tls.insecure {
        warn!("the certificate of `{}` is not verified", connection.endpoint);
    }
    let log =
        Arc::new(EventLog { server: server.clone(), name: name.to_owned(), label, reported: LastReported::default() });
    let routes = Routes::find(&connection).await?.map(Arc::new);
    let mut options = options(server, &connection, name, routes.clone())?;
    let mut pool = servers(&connection.endpoint)?;
    if let Some(routes) = routes {
        pool = routes.pool();
        options = options.reconnect_to_server_callback(move |pool, _| {
            let routes = routes.clone();
            // A task of its own: the client asks for a future that is `Sync`.
            let next = tokio::spawn(async move { routes.next(&pool).await });
            async move { Some(ReconnectToServer { addr: next.await.ok()?, delay: None }) }
        });
    }
    let client = options
        .retry_on_initial_connect()
        .event_callback(move |event| {
            log.tell(&event);
            std::future::ready(())
        })
        .connect(pool)
        .await
        .map_err(|error| Error::hold(format!("{label}: {error}")))?;
    Ok((client, connection))
}

/// Makes a client for a command: an error comes at once and in full, at the latest after `within`, of which every
/// address of every server gets its part. Later the connection is made again when it is lost. `tell` hears of everything that happens
/// to it.
pub async fn connect_once(
    server: &ServerRef,
    name: &str,
    within: Duration,
    tell: impl Fn(Event) + Send + Sync + 'static,
) -> Result<(Client, Connection), Error> {
    let mut connection = context::resolve(server)?;
    let late = format!("cannot connect to `{}`: no answer within {within:?}", connection.endpoint);
    let connected = async {
        let endpoint = &mut connection.endpoint;
        let part = within / u32::try_from(addresses(endpoint).await).unwrap_or(u32::MAX).max(1);
        endpoint.connect_timeout = endpoint.connect_timeout.min(part);
        connect_or_explain(server, connection, name, tell).await
    };
    timeout(within, connected).await.unwrap_or_else(|_| Err(Error::retry(late)))
}

/// How many addresses the servers have together: the client tries one after the other.
async fn addresses(endpoint: &Endpoint) -> usize {
    let resolved = endpoint.hosts.iter().map(|host| resolve(host, RESOLVE));
    join_all(resolved).await.into_iter().map(|found| found.map_or(1, |found| found.len())).sum()
}

/// A connection that does not reconnect when it is lost: its owner connects again, by the files and contexts of that time.
#[derive(Debug)]
pub struct ClientSession {
    /// The client; of no use when the connection is lost.
    pub client: Client,
    lost: CancellationToken,
    refusal: Arc<Mutex<String>>,
}

impl ClientSession {
    /// Connects to the first server that lets us in; every host gets its `connect_timeout`.
    pub async fn open(server: &ServerRef, connection: &Connection, name: &str) -> Result<Self, Error> {
        let lost = CancellationToken::new();
        let refusal = Arc::new(Mutex::new(String::new()));
        let (ended, refused) = (lost.clone(), refusal.clone());
        let tell = move |event| match event {
            Event::Disconnected | Event::Closed => ended.cancel(),
            Event::ServerError(error) => *refused.lock().unwrap_or_else(PoisonError::into_inner) = error.to_string(),
            _ => {}
        };
        // Each of them, and the address that comes first where a name has several.
        let attempts = connection.endpoint.hosts.len() + 1;
        let client = connect_with(server, connection, name, Some(attempts), tell).await?;
        Ok(Self { client, lost, refusal })
    }

    /// Waits until the connection is lost.
    pub async fn lost(&self) {
        self.lost.cancelled().await;
    }

    /// What the server refused last, if it names `what`.
    pub fn refusal_of(&self, what: &str) -> Option<String> {
        let refusal = self.refusal.lock().unwrap_or_else(PoisonError::into_inner);
        refusal.contains(what).then(|| refusal.clone())
    }
}

async fn connect_or_explain(
    server: &ServerRef,
    connection: Connection,
    name: &str,
    tell: impl Fn(Event) + Send + Sync + 'static,
) -> Result<(Client, Connection), Error> {
    let client = connect_with(server, &connection, name, None, tell).await?;
    Ok((client, connection))
}

async fn connect_with(
    server: &ServerRef,
    connection: &Connection,
    name: &str,
    max_reconnects: Option<usize>,
    tell: impl Fn(Event) + Send + Sync + 'static,
) -> Result<Client, Error> {
    let routes = Routes::find(connection).await?.map(Arc::new);
    let mut options = options(server, connection, name, routes.clone())?.max_reconnects(max_reconnects);
    let mut pool = servers(&connection.endpoint)?;
    if let Some(routes) = routes {
        pool = routes.in_order().await;
        options = options.retain_servers_order();
    }
    let options = options.event_callback(move |event| {
        tell(event);
        std::future::ready(())
    });
    let failed = match options.connect(pool).await {
        Ok(client) => return Ok(client),
        Err(error) => error,
    };
    // The client's errors name neither server nor cause; a lane to the same server has them.
    match Lane::connect(connection, name).await {
        Err(error) => Err(error),
        Ok(_) => Err(Error::retry(format!("cannot connect to `{}`: {failed}", connection.endpoint))),
    }
}

fn options(
    server: &ServerRef,
    connection: &Connection,
    name: &str,
    routes: Option<Arc<Routes>>,
) -> Result<ConnectOptions, Error> {
    let endpoint = &connection.endpoint;
    let mut options = authenticate(server.clone())
        .name(name)
        .custom_inbox_prefix(auth::inbox_prefix(connection)?)
        .connection_timeout(endpoint.connect_timeout)
        .request_timeout(Some(REQUEST_TIMEOUT))
        .ping_interval(PING_INTERVAL)
        .max_reconnects(None)
        .reconnect_delay_callback(reconnect_delay)
        .require_tls(endpoint.requires_tls())
        .tls_client_config(secure(server.clone(), routes))
        // What a server says of other servers is no reason to show them an identity.
        .ignore_discovered_servers();
    if endpoint.tls.handshake_first {
        options = options.tls_first();
    }
    Ok(options)
}

fn servers(endpoint: &Endpoint) -> Result<Vec<ServerAddr>, Error> {
    endpoint.hosts.iter().map(|host| server_addr(endpoint, host)).collect()
}

/// The first attempt is made at once; `attempts` counts from 1 since the last connection.
fn reconnect_delay(attempts: usize) -> Duration {
    if attempts <= 1 {
        return Duration::ZERO;
    }
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(4));
    (2..attempts.min(10)).for_each(|_| _ = backoff.next(0.0));
    backoff.next(rand::random())
}

/// Files are read at every attempt: credentials are rotated under a running process.
fn authenticate(server: ServerRef) -> ConnectOptions {
    let reported = LastReported::default();
    ConnectOptions::with_auth_callback(move |nonce| {
        let login = login(&server, &nonce);
        match &login {
            Ok(_) => reported.forget(),
            // The client reports no more than "authentication error".
            Err(reason) if reported.is_news(reason) => warn!("cannot log in: {reason}"),
            Err(_) => {}
        }
        std::future::ready(login.map_err(AuthError::new))
    })
}

fn login(server: &ServerRef, nonce: &[u8]) -> Result<async_nats::Auth, String> {
    let nonce = str::from_utf8(nonce).ok().filter(|nonce| !nonce.is_empty());
    let connection = context::resolve(server).map_err(|error| error.to_string())?;
    let identity = auth::connect_fields(&connection.endpoint.auth, nonce).map_err(|error| error.to_string())?;
    let mut login = async_nats::Auth::new();
    login.username = identity.user;
    login.password = identity.pass;
    login.token = identity.auth_token;
    login.jwt = identity.jwt;
    login.nkey = identity.nkey;
    // The client encodes it again.
    login.signature = identity.sig.map(|sig| URL_SAFE_NO_PAD.decode(sig)).transpose().map_err(|e| e.to_string())?;
    Ok(login)
}

fn secure(server: ServerRef, routes: Option<Arc<Routes>>) -> rustls::ClientConfig {
    tls::rereading_config(
        move || Ok(context::resolve(&server)?.endpoint.tls),
        move |address| routes.as_ref().map_or_else(Vec::new, |routes| routes.names(address)),
    )
}

/// The last error that was logged, so that it is logged once.
#[derive(Debug, Default)]
struct LastReported(Mutex<String>);

impl LastReported {
    fn is_news(&self, what: &str) -> bool {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let news = *last != what;
        what.clone_into(&mut last);
        news
    }

    fn forget(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// Logs connection events; an error that repeats while a server is away is logged once.
struct EventLog {
    server: ServerRef,
    name: String,
    label: &'static str,
    reported: LastReported,
}

impl EventLog {
    fn tell(&self, event: &Event) {
        let (server, label) = (&self.server, self.label);
        match event {
            Event::Connected => {
                self.reported.forget();
                info!(%server, "{label} is up");
            }
            Event::Disconnected => warn!(%server, "{label} is down"),
            Event::LameDuckMode => info!(%server, "{label}: the server is about to shut down"),
            Event::Draining | Event::Closed => debug!(%server, "{label}: {event}"),
            Event::ClientError(_) if self.reported.is_news(&event.to_string()) => {
                tokio::spawn(explain(self.server.clone(), self.name.clone(), label, event.to_string()));
            }
            Event::SlowConsumer(_) | Event::ServerError(_) if self.reported.is_news(&event.to_string()) => {
                warn!(%server, "{label}: {event}");
            }
            Event::SlowConsumer(_) | Event::ServerError(_) | Event::ClientError(_) => {
                debug!(%server, "{label}: {event}");
            }
        }
    }
}

/// The client's errors name neither server nor cause; a lane to the same server has them.
async fn explain(server: ServerRef, name: String, label: &str, event: String) {
    let tried = match context::resolve(&server) {
        Ok(connection) => Lane::connect(&connection, &name).await.map(drop),
        Err(error) => Err(error),
    };
    match tried {
        Err(error) => warn!(%server, "{label}: {error}"),
        Ok(()) => warn!(%server, "{label}: {event}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ipv6_hosts_keep_their_brackets_and_websockets_their_path() {
        let servers = |url: &str| servers(&Endpoint::parse(url).unwrap()).unwrap();
        assert_eq!(servers("tls://[::1]:4333")[0].as_url_str(), "tls://[::1]:4333");
        assert!(servers("tls://[::1]:4333")[0].tls_required());
        assert_eq!(servers("ws://a/nats,b:1/nats")[1].as_url_str(), "ws://b:1/nats");
        assert_eq!(servers("wss://a")[0].port(), 443);
    }

    #[test]
    fn the_first_reconnect_is_immediate_and_later_ones_are_bounded() {
        assert_eq!(reconnect_delay(1), Duration::ZERO);
        assert!(reconnect_delay(2) <= Duration::from_millis(100));
        let late = reconnect_delay(1_000_000);
        assert!((Duration::from_secs(2)..=Duration::from_secs(4)).contains(&late), "{late:?}");
    }

    #[test]
    fn a_login_carries_the_raw_signature_of_the_nonce() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("seed");
        let key = nkeys::KeyPair::new_user();
        std::fs::write(&path, format!("{}\n", key.seed().unwrap())).unwrap();
        let endpoint = Endpoint::parse(&format!("h?nkey={}", path.display())).unwrap();
        let login = login(&ServerRef::Known(Box::new(Connection::to(endpoint))), b"nonce").unwrap();
        assert_eq!(login.nkey, Some(key.public_key()));
        assert!(key.verify(b"nonce", &login.signature.unwrap()).is_ok());
    }

    #[test]
    fn files_of_an_identity_are_read_again_at_every_login() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str| dir.path().join(name);
        let server = |options: String| {
            ServerRef::Known(Box::new(Connection::to(Endpoint::parse(&format!("h?{options}")).unwrap())))
        };
        let creds = server(format!("credentials={}", file("creds").display()));
        let pair = server(format!("nkey={}&jwt={}", file("seed").display(), file("jwt").display()));
        for jwt in ["one", "two"] {
            let key = nkeys::KeyPair::new_user();
            let seed = key.seed().unwrap();
            let text = format!(
                "-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n\
                 -----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
            );
            std::fs::write(file("creds"), text).unwrap();
            std::fs::write(file("seed"), seed).unwrap();
            std::fs::write(file("jwt"), jwt).unwrap();
            for server in [&creds, &pair] {
                let login = login(server, b"nonce").unwrap();
                assert_eq!(login.jwt.as_deref(), Some(jwt));
                assert!(key.verify(b"nonce", &login.signature.unwrap()).is_ok());
            }
        }
    }
}
