//! An async-nats connection for what is not the copy path: the control service, the buckets and events.

use std::{
    error::Error as _,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use async_nats::{Auth as Login, AuthError, Client, ConnectErrorKind, ConnectOptions, Event, ServerAddr};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use tracing::{debug, info, warn};

use super::{auth, tls};
use crate::{
    backoff::Backoff,
    config::{Auth, Endpoint, Scheme},
};

/// A dead server is noticed after about two of these.
const PING_INTERVAL: Duration = Duration::from_secs(5);

/// Time limit of one request whose caller names none.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a client could not be made. A server that is away is no error: the client goes on trying.
#[derive(Debug, thiserror::Error)]
#[error("control connection to `{endpoint}`: {message}")]
pub struct Error {
    /// Where to, without secrets.
    pub endpoint: String,
    /// What happened, without secrets.
    pub message: String,
}

/// Makes a client that connects in the background, and again whenever the connection is lost, for as long as it
/// lives. `name` is what the server shows. Connection events are logged, each distinct error once.
pub async fn connect(endpoint: &Endpoint, name: &str) -> Result<Client, Error> {
    let log = EventLog { endpoint: endpoint.to_string(), told: Told::default() };
    let options = options(endpoint, name, move |event| log.tell(&event))?.retry_on_initial_connect();
    made(endpoint, options).await
}

/// Makes a client that is connected, for who asks one thing and goes: each server is tried once, and the error says
/// why none let us in. A connection that is lost later comes back by itself. `tell` hears what happens to it.
pub async fn connect_now(
    endpoint: &Endpoint,
    name: &str,
    tell: impl Fn(Event) + Send + Sync + 'static,
) -> Result<Client, Error> {
    made(endpoint, options(endpoint, name, tell)?).await
}

async fn made(endpoint: &Endpoint, options: ConnectOptions) -> Result<Client, Error> {
    let fail = |message: String| Error { endpoint: endpoint.to_string(), message };
    let servers = servers(endpoint).map_err(fail)?;
    options.connect(servers).await.map_err(|error| match (error.kind(), error.source()) {
        // the reason says more than that it was about logging in
        (ConnectErrorKind::Authentication, Some(reason)) => fail(reason.to_string()),
        _ => fail(error.to_string()),
    })
}

fn options(
    endpoint: &Endpoint,
    name: &str,
    tell: impl Fn(Event) + Send + Sync + 'static,
) -> Result<ConnectOptions, Error> {
    let fail = |message: String| Error { endpoint: endpoint.to_string(), message };
    let options = secure(authenticate(&endpoint.auth), endpoint).map_err(fail)?;
    Ok(options
        .name(name)
        .connection_timeout(endpoint.connect_timeout)
        .request_timeout(Some(REQUEST_TIMEOUT))
        .ping_interval(PING_INTERVAL)
        .max_reconnects(None)
        .reconnect_delay_callback(reconnect_delay)
        .event_callback(move |event| {
            tell(event);
            std::future::ready(())
        }))
}

fn servers(endpoint: &Endpoint) -> Result<Vec<ServerAddr>, String> {
    let scheme = match endpoint.scheme {
        Scheme::Nats => "nats",
        Scheme::Tls => "tls",
    };
    let addr = |host: &str, port: u16| {
        let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
        format!("{scheme}://{host}:{port}").parse::<ServerAddr>()
    };
    endpoint
        .hosts
        .iter()
        .map(|h| addr(&h.host, h.port).map_err(|error| format!("host `{}`: {error}", h.host)))
        .collect()
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
fn authenticate(auth: &Auth) -> ConnectOptions {
    let auth = auth.clone();
    let told = Told::default();
    ConnectOptions::with_auth_callback(move |nonce| {
        let login = login(&auth, &nonce);
        match &login {
            Ok(_) => told.forget(),
            // The client reports no more than "authentication error".
            Err(reason) if told.is_news(reason) => warn!("cannot log in: {reason}"),
            Err(_) => {}
        }
        std::future::ready(login.map_err(AuthError::new))
    })
}

fn login(auth: &Auth, nonce: &[u8]) -> Result<Login, String> {
    let nonce = str::from_utf8(nonce).ok().filter(|nonce| !nonce.is_empty());
    let identity = auth::identity(auth, nonce).map_err(|error| error.to_string())?;
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

/// Certificate files, too, are read at every attempt, but for `insecure`.
fn secure(mut options: ConnectOptions, endpoint: &Endpoint) -> Result<ConnectOptions, String> {
    let settings = &endpoint.tls;
    options = options.require_tls(endpoint.scheme == Scheme::Tls || settings.handshake_first);
    if settings.handshake_first {
        options = options.tls_first();
    }
    if settings.insecure {
        warn!("the certificate of `{endpoint}` is not verified");
        let config = tls::client_config(settings).map_err(|error| error.to_string())?;
        return Ok(options.tls_client_config(config));
    }
    if let Some(ca) = &settings.ca {
        options = options.add_root_certificates(ca.clone());
    }
    if let (Some(cert), Some(key)) = (&settings.cert, &settings.key) {
        options = options.add_client_certificate(cert.clone(), key.clone());
    }
    Ok(options)
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
    endpoint: String,
    told: Told,
}

impl EventLog {
    fn tell(&self, event: &Event) {
        let server = &self.endpoint;
        match event {
            Event::Connected => {
                self.told.forget();
                info!(server, "control connection is up");
            }
            Event::Disconnected => warn!(server, "control connection is down"),
            Event::LameDuckMode => info!(server, "control server is about to shut down"),
            Event::Draining | Event::Closed => debug!(server, "control connection: {event}"),
            Event::SlowConsumer(_) | Event::ServerError(_) | Event::ClientError(_) => {
                let what = event.to_string();
                if self.told.is_news(&what) {
                    warn!(server, "control connection: {what}");
                } else {
                    debug!(server, "control connection: {what}");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Host, Tls};

    fn endpoint(scheme: Scheme, host: &str) -> Endpoint {
        Endpoint {
            hosts: vec![Host { host: host.to_owned(), port: 4333 }],
            scheme,
            auth: Auth::Anonymous,
            tls: Tls::default(),
            connect_timeout: Duration::from_secs(1),
        }
    }

    #[test]
    fn ipv6_hosts_get_their_brackets_back() {
        let servers = servers(&endpoint(Scheme::Tls, "::1")).unwrap();
        assert_eq!(servers[0].as_url_str(), "tls://[::1]:4333");
        assert!(servers[0].tls_required());
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
        let login = login(&Auth::NkeyFile { seed: path, jwt: None }, b"nonce").unwrap();
        assert_eq!(login.nkey, Some(key.public_key()));
        assert!(key.verify(b"nonce", &login.signature.unwrap()).is_ok());
    }
}
