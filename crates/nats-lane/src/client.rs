//! An async-nats connection for what is not the copy path: the control service, the buckets and events.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_nats::{Auth as Login, AuthError, Client, ConnectOptions, Event, ServerAddr};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use futures_util::future::join_all;
use tokio::{net::lookup_host, time::timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::{Lane, auth, context, tls};
use crate::{
    backoff::Backoff,
    config::{Connection, Endpoint, Place},
};

/// A dead server is noticed after about two of these.
const PING_INTERVAL: Duration = Duration::from_secs(5);

/// Time limit of one request whose caller names none.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Makes a client that connects in the background, and again whenever the connection is lost, for as long as it
/// lives. `name` is what the server shows. Connection events are logged, each distinct error once.
///
/// Identity and TLS files are read again for every connection, those of a context by what it says then. Its servers
/// and prefixes are those of now; they come back with the client.
pub async fn connect(place: &Place, name: &str) -> Result<(Client, Connection), super::Error> {
    let connection = context::resolve(place)?;
    if connection.endpoint.tls.insecure {
        warn!("the certificate of `{}` is not verified", connection.endpoint);
    }
    let log = Arc::new(EventLog { place: place.clone(), name: name.to_owned(), told: Told::default() });
    let client = options(place, &connection, name)?
        .retry_on_initial_connect()
        .event_callback(move |event| {
            log.tell(&event);
            std::future::ready(())
        })
        .connect(servers(&connection.endpoint)?)
        .await
        .map_err(|error| super::Error::hold(format!("control connection: {error}")))?;
    Ok((client, connection))
}

/// Makes a client for a command: an error comes at once and in full, at the latest after `within`, of which every
/// address of every server gets its part. Later the connection is made again when it is lost. `tell` hears of everything that happens
/// to it.
pub async fn connect_once(
    place: &Place,
    name: &str,
    within: Duration,
    tell: impl Fn(Event) + Send + Sync + 'static,
) -> Result<(Client, Connection), super::Error> {
    let mut connection = context::resolve(place)?;
    let late = format!("cannot connect to `{}`: no answer within {within:?}", connection.endpoint);
    let connected = async {
        let endpoint = &mut connection.endpoint;
        let part = within / u32::try_from(addresses(endpoint).await).unwrap_or(u32::MAX).max(1);
        endpoint.connect_timeout = endpoint.connect_timeout.min(part);
        connect_or_explain(place, connection, name, tell).await
    };
    timeout(within, connected).await.unwrap_or_else(|_| Err(super::Error::retry(late)))
}

/// How many addresses the servers have together: the client tries one after the other.
async fn addresses(endpoint: &Endpoint) -> usize {
    let looked_up = endpoint.hosts.iter().map(|host| lookup_host((host.host.as_str(), host.port)));
    join_all(looked_up).await.into_iter().map(|found| found.map_or(1, |found| found.count())).sum()
}

/// A connection that is not made again when it is lost, so that whoever holds it begins with what files and contexts say
/// then.
#[derive(Debug)]
pub struct Session {
    /// The client; of no use when the connection is lost.
    pub client: Client,
    lost: CancellationToken,
    refusal: Arc<Mutex<String>>,
}

impl Session {
    /// Connects to the first server that lets us in; every host gets its `connect_timeout`.
    pub async fn open(place: &Place, connection: &Connection, name: &str) -> Result<Self, super::Error> {
        let lost = CancellationToken::new();
        let refusal = Arc::new(Mutex::new(String::new()));
        let (ended, refused) = (lost.clone(), refusal.clone());
        let tell = move |event| match event {
            Event::Disconnected | Event::Closed => ended.cancel(),
            Event::ServerError(error) => *refused.lock().unwrap_or_else(PoisonError::into_inner) = error.to_string(),
            _ => {}
        };
        let hosts = connection.endpoint.hosts.len();
        let options = options(place, connection, name)?.max_reconnects(hosts);
        let client = connect_with(options, connection, name, tell).await?;
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
    place: &Place,
    connection: Connection,
    name: &str,
    tell: impl Fn(Event) + Send + Sync + 'static,
) -> Result<(Client, Connection), super::Error> {
    let client = connect_with(options(place, &connection, name)?, &connection, name, tell).await?;
    Ok((client, connection))
}

async fn connect_with(
    options: ConnectOptions,
    connection: &Connection,
    name: &str,
    tell: impl Fn(Event) + Send + Sync + 'static,
) -> Result<Client, super::Error> {
    let options = options.event_callback(move |event| {
        tell(event);
        std::future::ready(())
    });
    let failed = match options.connect(servers(&connection.endpoint)?).await {
        Ok(client) => return Ok(client),
        Err(error) => error,
    };
    // The client's words leave out server and cause; a lane to the same place has them.
    match Lane::connect(connection, name).await {
        Err(error) => Err(error),
        Ok(_) => Err(super::Error::retry(format!("cannot connect to `{}`: {failed}", connection.endpoint))),
    }
}

fn options(place: &Place, connection: &Connection, name: &str) -> Result<ConnectOptions, super::Error> {
    let endpoint = &connection.endpoint;
    let mut options = authenticate(place.clone())
        .name(name)
        .custom_inbox_prefix(auth::inbox_prefix(connection)?)
        .connection_timeout(endpoint.connect_timeout)
        .request_timeout(Some(REQUEST_TIMEOUT))
        .ping_interval(PING_INTERVAL)
        .max_reconnects(None)
        .reconnect_delay_callback(reconnect_delay)
        .require_tls(endpoint.requires_tls())
        .tls_client_config(secure(place.clone()))
        // What a server says of other servers is no reason to show them an identity.
        .ignore_discovered_servers();
    if endpoint.tls.handshake_first {
        options = options.tls_first();
    }
    Ok(options)
}

fn servers(endpoint: &Endpoint) -> Result<Vec<ServerAddr>, super::Error> {
    let server = |host| {
        let server = endpoint.server(host);
        server.parse().map_err(|error| super::Error::hold(format!("server `{server}`: {error}")))
    };
    endpoint.hosts.iter().map(server).collect()
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
fn authenticate(place: Place) -> ConnectOptions {
    let told = Told::default();
    ConnectOptions::with_auth_callback(move |nonce| {
        let login = login(&place, &nonce);
        match &login {
            Ok(_) => told.forget(),
            // The client reports no more than "authentication error".
            Err(reason) if told.is_news(reason) => warn!("cannot log in: {reason}"),
            Err(_) => {}
        }
        std::future::ready(login.map_err(AuthError::new))
    })
}

fn login(place: &Place, nonce: &[u8]) -> Result<Login, String> {
    let nonce = str::from_utf8(nonce).ok().filter(|nonce| !nonce.is_empty());
    let connection = context::resolve(place).map_err(|error| error.to_string())?;
    let identity = auth::identity(&connection.endpoint.auth, nonce).map_err(|error| error.to_string())?;
    let mut login = Login::new();
    login.username = identity.user;
    login.password = identity.pass;
    login.token = identity.auth_token;
    login.jwt = identity.jwt;
    login.nkey = identity.nkey;
    // The client encodes it again.
    login.signature = identity.sig.map(|sig| URL_SAFE_NO_PAD.decode(sig)).transpose().map_err(|e| e.to_string())?;
    Ok(login)
}

fn secure(place: Place) -> rustls::ClientConfig {
    tls::rereading_config(move || Ok(context::resolve(&place)?.endpoint.tls))
}

/// The last thing that was told, so that it is told once.
#[derive(Debug, Default)]
struct Told(Mutex<String>);

impl Told {
    fn is_news(&self, what: &str) -> bool {
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let news = *told != what;
        what.clone_into(&mut told);
        news
    }

    fn forget(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// Logs connection events; an error that repeats while a server is away is told once.
struct EventLog {
    place: Place,
    name: String,
    told: Told,
}

impl EventLog {
    fn tell(&self, event: &Event) {
        let server = &self.place;
        match event {
            Event::Connected => {
                self.told.forget();
                info!(%server, "control connection is up");
            }
            Event::Disconnected => warn!(%server, "control connection is down"),
            Event::LameDuckMode => info!(%server, "control server is about to shut down"),
            Event::Draining | Event::Closed => debug!(%server, "control connection: {event}"),
            Event::ClientError(_) if self.told.is_news(&event.to_string()) => {
                tokio::spawn(explain(self.place.clone(), self.name.clone(), event.to_string()));
            }
            Event::SlowConsumer(_) | Event::ServerError(_) if self.told.is_news(&event.to_string()) => {
                warn!(%server, "control connection: {event}");
            }
            Event::SlowConsumer(_) | Event::ServerError(_) | Event::ClientError(_) => {
                debug!(%server, "control connection: {event}");
            }
        }
    }
}

/// The client's words for what went wrong leave out server and cause; a lane to the same place has them.
async fn explain(place: Place, name: String, event: String) {
    let tried = match context::resolve(&place) {
        Ok(connection) => Lane::connect(&connection, &name).await.map(drop),
        Err(error) => Err(error),
    };
    match tried {
        Err(error) => warn!(server = %place, "control connection: {error}"),
        Ok(()) => warn!(server = %place, "control connection: {event}"),
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
        let login = login(&Place::Known(Box::new(Connection::to(endpoint))), b"nonce").unwrap();
        assert_eq!(login.nkey, Some(key.public_key()));
        assert!(key.verify(b"nonce", &login.signature.unwrap()).is_ok());
    }

    #[test]
    fn files_of_an_identity_are_read_again_at_every_login() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str| dir.path().join(name);
        let place =
            |options: String| Place::Known(Box::new(Connection::to(Endpoint::parse(&format!("h?{options}")).unwrap())));
        let creds = place(format!("credentials={}", file("creds").display()));
        let pair = place(format!("nkey={}&jwt={}", file("seed").display(), file("jwt").display()));
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
            for place in [&creds, &pair] {
                let login = login(place, b"nonce").unwrap();
                assert_eq!(login.jwt.as_deref(), Some(jwt));
                assert!(key.verify(b"nonce", &login.signature.unwrap()).is_ok());
            }
        }
    }
}
