//! Where to connect and as whom: what a `nats://`, `tls://`, `ws://` or `wss://` URL with its options says. Only
//! words: nothing here opens a file or a socket.

use std::{
    borrow::Cow,
    fmt,
    net::{IpAddr, Ipv6Addr},
    path::PathBuf,
    time::Duration,
};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use crate::{CustomIdentity, MASK, Secret, parse_duration};

const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const OPTIONS: [&str; 6] = ["credentials", "jwt", "nkey", "tls_handshake_first", "insecure", "connect_timeout"];

/// Servers of one cluster and the identity to use with them.
///
/// `Debug` and `Display` never show a password or a token.
#[derive(Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// The servers to try, in the order written; never empty.
    pub hosts: Vec<Host>,
    /// How the connection is made.
    pub scheme: Scheme,
    /// Path of the websocket on every server, with its leading `/`; empty for none and for other schemes.
    pub path: String,
    /// Who we are.
    pub auth: Auth,
    /// TLS settings; used when the scheme or the server asks for TLS.
    pub tls: Tls,
    /// Time limit for one connection attempt to one host, TLS and CONNECT included.
    pub connect_timeout: Duration,
}

/// One server address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// Host name or address, IPv6 without brackets.
    pub host: String,
    /// TCP port; that of the scheme when none was written.
    pub port: u16,
}

/// Transport of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    /// `nats://`: plain TCP, upgraded to TLS when the server requires it.
    Nats,
    /// `tls://`: TLS or nothing.
    Tls,
    /// `ws://`: a websocket over plain TCP.
    Ws,
    /// `wss://`: a websocket over TLS.
    Wss,
    /// `nats-leaf://`: the leafnode port, plain TCP, upgraded to TLS when the server requires it.
    Leaf,
}

impl Scheme {
    const ALL: [Self; 5] = [Self::Nats, Self::Tls, Self::Ws, Self::Wss, Self::Leaf];

    /// As written in a URL, without `://`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nats => "nats",
            Self::Tls => "tls",
            Self::Ws => "ws",
            Self::Wss => "wss",
            Self::Leaf => "nats-leaf",
        }
    }

    /// Whether the protocol goes through a websocket.
    pub const fn is_websocket(self) -> bool {
        matches!(self, Self::Ws | Self::Wss)
    }

    /// Port where a URL names none.
    const fn default_port(self) -> u16 {
        match self {
            Self::Nats | Self::Tls => 4222,
            Self::Ws => 80,
            Self::Wss => 443,
            Self::Leaf => 7422,
        }
    }
}

/// Identity presented in CONNECT. Files are read at every connection attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Auth {
    /// None.
    Anonymous,
    /// User and password.
    UserPassword {
        /// User name.
        user: String,
        /// Password.
        password: Secret,
    },
    /// A bearer token.
    Token(Secret),
    /// A credentials file (JWT and seed in one), `?credentials=`.
    CredentialsFile(PathBuf),
    /// A seed file, `?nkey=`, and optionally a JWT file, `?jwt=`.
    NkeyFile {
        /// File that holds the nkey seed.
        seed: PathBuf,
        /// File that holds the user JWT that belongs to the seed.
        jwt: Option<PathBuf>,
    },
    /// A user JWT and its seed themselves, from a context.
    Jwt {
        /// The user JWT.
        jwt: Secret,
        /// The seed that belongs to it; a bearer JWT needs none.
        seed: Option<Secret>,
    },
    /// An identity of the caller's own.
    Custom(CustomIdentity),
}

/// TLS settings of a connection.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tls {
    /// Certificate authorities to trust instead of the system's (PEM file).
    pub ca: Option<PathBuf>,
    /// Client certificate chain (PEM file); set together with `key`.
    pub cert: Option<PathBuf>,
    /// Client private key (PEM file); set together with `cert`.
    pub key: Option<PathBuf>,
    /// TLS starts before the server's INFO, `?tls_handshake_first=true`.
    pub handshake_first: bool,
    /// The server's certificate is not verified, `?insecure=true`.
    pub insecure: bool,
}

impl Endpoint {
    /// Parses `nats://user:pass@host:port,host2?credentials=FILE&...`.
    ///
    /// The error quotes nothing that could be part of a secret.
    pub fn parse(url: &str) -> Result<Self, String> {
        let (servers, query) = split_query(url.trim());
        let servers = Servers::parse(servers)?;
        let options = Options::parse(query)?;
        let endpoint = Self {
            auth: one_identity(servers.auth, options.auth()?)?,
            hosts: servers.hosts,
            scheme: servers.scheme,
            path: servers.path,
            tls: Tls::default(),
            connect_timeout: options.connect_timeout.unwrap_or(DEFAULT_CONNECT_TIMEOUT),
        };
        endpoint.with_tls(Tls {
            handshake_first: options.handshake_first,
            insecure: options.insecure,
            ..Tls::default()
        })
    }

    /// The same servers with these TLS settings. What asks for TLS is refused where there can be none: a `ws://` would
    /// send the identity in plain text all the same.
    pub fn with_tls(self, tls: Tls) -> Result<Self, String> {
        let endpoint = Self { tls, ..self };
        if endpoint.scheme == Scheme::Ws && endpoint.requires_tls() {
            return Err("`ws://` is without TLS, and `tls_handshake_first`, a certificate authority or a client \
                        certificate asks for it: write `wss://`"
                .to_owned());
        }
        Ok(endpoint)
    }

    /// The same with these files, whatever its scheme.
    fn tls_files(self, files: Tls) -> Self {
        let Tls { ca, cert, key, .. } = files;
        Self { tls: Tls { ca, cert, key, ..self.tls }, ..self }
    }

    /// Whether a connection without TLS is out of the question: by scheme, by handshake-first, by the kind of identity, or
    /// because an authority or a certificate is named, which has no use for plain text.
    pub fn requires_tls(&self) -> bool {
        let Tls { ca, cert, handshake_first, .. } = &self.tls;
        let by_identity = matches!(&self.auth, Auth::Custom(identity) if identity.requires_tls());
        matches!(self.scheme, Scheme::Tls | Scheme::Wss)
            || *handshake_first
            || by_identity
            || ca.is_some()
            || cert.is_some()
    }

    /// Whether all servers are on this machine.
    pub fn is_local(&self) -> bool {
        let local = |host: &Host| {
            host.host == "localhost" || host.host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
        };
        self.hosts.iter().all(local)
    }

    /// Where one of the servers is: `scheme://host:port/path`.
    pub fn server(&self, host: &Host) -> String {
        format!("{}://{host}{}", self.scheme.name(), self.path)
    }
}

/// The URL with every secret as `***`.
impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://", self.scheme.name())?;
        match &self.auth {
            Auth::UserPassword { user, .. } => write!(f, "{}:{MASK}@", encode(user))?,
            Auth::Token(_) => write!(f, "{MASK}@")?,
            Auth::Anonymous | Auth::CredentialsFile(_) | Auth::NkeyFile { .. } | Auth::Jwt { .. } | Auth::Custom(_) => {
            }
        }
        for (index, host) in self.hosts.iter().enumerate() {
            let separator = if index == 0 { "" } else { "," };
            write!(f, "{separator}{host}{}", self.path)?;
        }
        for (index, option) in self.options().iter().enumerate() {
            let separator = if index == 0 { '?' } else { '&' };
            write!(f, "{separator}{option}")?;
        }
        Ok(())
    }
}

impl Endpoint {
    /// The options that are not at their defaults, as in a URL.
    fn options(&self) -> Vec<String> {
        let file = |option: &str, path: &PathBuf| format!("{option}={}", encode(&path.to_string_lossy()));
        let mut options = Vec::new();
        match &self.auth {
            Auth::CredentialsFile(path) => options.push(file("credentials", path)),
            Auth::NkeyFile { seed, jwt } => {
                options.push(file("nkey", seed));
                options.extend(jwt.iter().map(|jwt| file("jwt", jwt)));
            }
            Auth::Anonymous | Auth::UserPassword { .. } | Auth::Token(_) | Auth::Jwt { .. } | Auth::Custom(_) => {}
        }
        if self.tls.handshake_first {
            options.push("tls_handshake_first=true".to_owned());
        }
        if self.tls.insecure {
            options.push("insecure=true".to_owned());
        }
        if self.connect_timeout != DEFAULT_CONNECT_TIMEOUT {
            options.push(format!("connect_timeout={:?}", self.connect_timeout));
        }
        options
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Endpoint({self})")
    }
}

/// `host:port`, IPv6 in brackets.
impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// The URL as written, but with passwords and tokens as `***`. Where the text is no valid URL, everything that
/// could be a secret is masked.
pub fn mask_url(url: &str) -> String {
    if Endpoint::parse(url).is_err() {
        return mask_broken(url);
    }
    let (servers, query) = split_query(url.trim());
    let masked: Vec<_> = servers.split(',').map(mask_server).collect();
    with_query(masked.join(","), query)
}

fn mask_server(server: &str) -> String {
    let (scheme, rest) = split_scheme(server);
    let Some((info, host)) = rest.rsplit_once('@') else { return server.to_owned() };
    match info.split_once(':') {
        Some((user, _)) => format!("{scheme}{user}:{MASK}@{host}"),
        None => format!("{scheme}{MASK}@{host}"),
    }
}

/// Shows the host after the last `@`, without options; without one, or where the `@` may stand in an option, nothing
/// but the scheme.
fn mask_broken(url: &str) -> String {
    let url = url.trim();
    let (scheme, rest) = match url.split_once("://") {
        Some((scheme, rest)) if scheme.bytes().all(|byte| byte.is_ascii_alphanumeric()) => (scheme, rest),
        _ => ("", url),
    };
    let separator = if scheme.is_empty() { "" } else { "://" };
    match rest.rsplit_once('@') {
        Some((before, host)) if !before.contains('?') => match host.split_once('?') {
            Some((host, _)) => format!("{scheme}{separator}{MASK}@{host}?{MASK}"),
            None => format!("{scheme}{separator}{MASK}@{host}"),
        },
        _ => format!("{scheme}{separator}{MASK}"),
    }
}

/// Whether a password or token of the URL is [`MASK`] and so stands for one that is stored.
pub fn is_masked(url: &str) -> bool {
    match Endpoint::parse(url) {
        Ok(endpoint) => endpoint.auth.secret() == Some(MASK),
        Err(_) => url.contains(MASK),
    }
}

/// Puts the stored secret in place of `***` in a URL that was shown masked; both with the TLS files that belong to them.
/// Only for the servers, the user and the TLS that it was stored with: a caller who may change a URL must not learn a
/// password by sending it to another server or in plain text.
pub fn unmask(new: (&str, Tls), stored: Option<(&str, Tls)>) -> Result<String, String> {
    let ((new, tls), stored) = (new, stored);
    if !is_masked(new) {
        return Ok(new.to_owned());
    }
    let (stored, stored_tls) =
        stored.ok_or("`***` stands for a stored secret, and none is stored: write the secret")?;
    if let (Ok(after), Ok(before)) = (Endpoint::parse(new), Endpoint::parse(stored)) {
        keeps_tls(&after.tls_files(tls), &before.tls_files(stored_tls))?;
    }
    if new == mask_url(stored) {
        return Ok(stored.to_owned());
    }
    let (after, before) = (Endpoint::parse(new)?, Endpoint::parse(stored).map_err(|_| NOT_THE_STORED)?);
    if !same_identity(&after.auth, &before.auth) {
        return Err(NOT_THE_STORED.to_owned());
    }
    let farther = after.hosts.iter().any(|host| !before.hosts.contains(host));
    let elsewhere = after.scheme != before.scheme || after.path != before.path;
    if farther || elsewhere || (after.tls.insecure && !before.tls.insecure) {
        return Err(
            "`***` keeps the stored secret only for the servers it was stored with: write the secret".to_owned()
        );
    }
    let (servers, query) = split_query(new.trim());
    let secret = encode(before.auth.secret().unwrap_or_default()).into_owned();
    let servers: Vec<_> = servers.split(',').map(|server| unmask_server(server, &secret)).collect();
    Ok(with_query(servers.join(","), query))
}

/// Refuses what could bring a secret out of the TLS that it was stored with.
fn keeps_tls(after: &Endpoint, before: &Endpoint) -> Result<(), String> {
    if before.requires_tls() && (!after.requires_tls() || after.tls.ca != before.tls.ca) {
        return Err("`***` keeps the stored secret only with the TLS that it was stored with (`tls_handshake_first`, \
                    certificate authority and client certificate): write the secret"
            .to_owned());
    }
    Ok(())
}

const NOT_THE_STORED: &str = "`***` stands for a stored secret, and none is stored for this user: write the secret";

fn same_identity(a: &Auth, b: &Auth) -> bool {
    match (a, b) {
        (Auth::UserPassword { user: a, .. }, Auth::UserPassword { user: b, .. }) => a == b,
        (Auth::Token(_), Auth::Token(_)) => true,
        _ => false,
    }
}

fn unmask_server(server: &str, secret: &str) -> String {
    let (scheme, rest) = split_scheme(server);
    let Some((info, host)) = rest.rsplit_once('@') else { return server.to_owned() };
    match info.split_once(':') {
        Some((user, _)) => format!("{scheme}{user}:{secret}@{host}"),
        None => format!("{scheme}{secret}@{host}"),
    }
}

impl Auth {
    fn secret(&self) -> Option<&str> {
        match self {
            Self::UserPassword { password: secret, .. } | Self::Token(secret) => Some(secret.reveal()),
            Self::Anonymous | Self::CredentialsFile(_) | Self::NkeyFile { .. } | Self::Jwt { .. } | Self::Custom(_) => {
                None
            }
        }
    }
}

fn split_query(url: &str) -> (&str, Option<&str>) {
    match url.split_once('?') {
        Some((servers, query)) => (servers, Some(query)),
        None => (url, None),
    }
}

fn with_query(servers: String, query: Option<&str>) -> String {
    match query {
        Some(query) => format!("{servers}?{query}"),
        None => servers,
    }
}

/// The scheme with its `://`, or nothing, and the rest.
fn split_scheme(server: &str) -> (&str, &str) {
    match server.find("://") {
        Some(at) => server.split_at(at + 3),
        None => ("", server),
    }
}

/// The part before the options.
struct Servers {
    scheme: Scheme,
    auth: Auth,
    hosts: Vec<Host>,
    path: String,
}

impl Servers {
    fn parse(list: &str) -> Result<Self, String> {
        let mut schemes = None;
        let mut info = None;
        let mut paths = None;
        let mut hosts = Vec::new();
        for (index, server) in list.split(',').enumerate() {
            let number = index + 1;
            let (written, rest) = split_scheme(server.trim());
            same(&mut schemes, parse_scheme(written)?, "scheme", number)?;
            let scheme = schemes.flatten().unwrap_or(Scheme::Nats);
            let (user, host) = match rest.rsplit_once('@') {
                Some((user, host)) => (Some(user), host),
                None => (None, rest),
            };
            same(&mut info, user, "user", number)?;
            let (host, path) = split_path(host);
            check_path(path, scheme).map_err(|error| format!("server {number} of the URL: {error}"))?;
            same(&mut paths, Some(path), "path", number)?;
            hosts.push(parse_host(host, scheme).map_err(|error| format!("server {number} of the URL: {error}"))?);
        }
        Ok(Self {
            scheme: schemes.flatten().unwrap_or(Scheme::Nats),
            auth: info.flatten().map_or(Ok(Auth::Anonymous), parse_user)?,
            hosts,
            path: paths.flatten().unwrap_or_default().to_owned(),
        })
    }
}

/// The path after a host, with its `/`; `/` alone is none.
fn split_path(host: &str) -> (&str, &str) {
    match host.find('/') {
        Some(at) if at + 1 < host.len() => host.split_at(at),
        Some(at) => (&host[..at], ""),
        None => (host, ""),
    }
}

fn check_path(path: &str, scheme: Scheme) -> Result<(), String> {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~!$&'()*+;=:%/".contains(&byte);
    if !path.is_empty() && !scheme.is_websocket() {
        return Err("a path after the host is only possible with `ws://` and `wss://`".to_owned());
    }
    if !path.bytes().all(legal) {
        return Err("the path has a character that has to be percent-encoded".to_owned());
    }
    Ok(())
}

/// What the first server says holds for all: the others repeat it or say nothing.
fn same<T: PartialEq>(first: &mut Option<Option<T>>, this: Option<T>, what: &str, number: usize) -> Result<(), String> {
    match first {
        None => *first = Some(this),
        Some(first) if this.is_some() && *first != this => {
            return Err(format!(
                "server {number} of the URL has another {what} than the first: all servers of a list share one (a comma \
                 in a password is written `%2C`)"
            ));
        }
        Some(_) => {}
    }
    Ok(())
}

fn parse_scheme(written: &str) -> Result<Option<Scheme>, String> {
    let written = written.to_ascii_lowercase();
    let Some(name) = written.strip_suffix("://") else { return Ok(None) };
    let known = Scheme::ALL.into_iter().find(|scheme| scheme.name() == name);
    // Only what is known to be a scheme is named: anything else may be a part of a secret.
    let foreign = ["http", "https", "ftp", "tcp", "ssl", "mqtt"].contains(&name);
    match known {
        Some(scheme) => Ok(Some(scheme)),
        None if foreign => Err(format!("the scheme of the URL is `{written}`, not {SCHEMES}")),
        None => Err(format!("the scheme of the URL is not {SCHEMES}")),
    }
}

const SCHEMES: &str = "`nats://`, `tls://`, `ws://` or `wss://`";

fn parse_user(info: &str) -> Result<Auth, String> {
    let (user, password) = match info.split_once(':') {
        Some((user, password)) => (decode(user, "user")?, Some(decode(password, "password")?)),
        None => (decode(info, "token")?, None),
    };
    if user.is_empty() {
        return Err("the user before `@` in the URL is empty".to_owned());
    }
    Ok(match password {
        Some(password) => Auth::UserPassword { user, password: password.into() },
        None => Auth::Token(user.into()),
    })
}

fn parse_host(text: &str, scheme: Scheme) -> Result<Host, String> {
    let (host, port) = match text.strip_prefix('[') {
        Some(text) => {
            let (host, rest) = text.split_once(']').ok_or("the `[` of an IPv6 address is not closed")?;
            host.parse::<Ipv6Addr>().map_err(|_| "the text in brackets is not an IPv6 address")?;
            match rest.strip_prefix(':') {
                None if !rest.is_empty() => return Err("there is more after `]` than a port".to_owned()),
                port => (host, port),
            }
        }
        None => match text.split_once(':') {
            Some((_, port)) if port.contains(':') => {
                return Err("there is more than one `:`; an IPv6 address goes in brackets".to_owned());
            }
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        },
    };
    if host.is_empty() {
        return Err("the host name is empty".to_owned());
    }
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b':');
    if !host.bytes().all(legal) {
        return Err("the host name has a character other than letters, digits, `-`, `.` and `_`".to_owned());
    }
    let port = port
        .map_or(Some(scheme.default_port()), parse_port)
        .ok_or("the port is not a number from 1 to 65535 (a user and a password are followed by `@` and the host)")?;
    Ok(Host { host: host.to_owned(), port })
}

fn parse_port(text: &str) -> Option<u16> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|port| digits && *port != 0)
}

/// The options after `?`.
#[derive(Default)]
struct Options {
    credentials: Option<PathBuf>,
    jwt: Option<PathBuf>,
    nkey: Option<PathBuf>,
    handshake_first: bool,
    insecure: bool,
    connect_timeout: Option<Duration>,
}

impl Options {
    fn parse(query: Option<&str>) -> Result<Self, String> {
        let mut options = Self::default();
        let mut seen = Vec::new();
        let query = query.unwrap_or_default();
        if Scheme::ALL.iter().any(|scheme| query.contains(&format!(",{}://", scheme.name()))) {
            return Err("options of a URL follow the last server".to_owned());
        }
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (option, value) = pair.split_once('=').unwrap_or((pair, ""));
            if !OPTIONS.contains(&option) {
                return Err(unknown_option(option, query));
            }
            if seen.contains(&option) {
                return Err(format!("option `{option}` is there twice"));
            }
            seen.push(option);
            options.set(option, &decode(value, option)?)?;
        }
        Ok(options)
    }

    fn set(&mut self, option: &str, value: &str) -> Result<(), String> {
        match option {
            "credentials" => self.credentials = Some(file(option, value)?),
            "jwt" => self.jwt = Some(file(option, value)?),
            "nkey" => self.nkey = Some(file(option, value)?),
            "tls_handshake_first" => self.handshake_first = flag(option, value)?,
            "insecure" => self.insecure = flag(option, value)?,
            _ => {
                let timeout = parse_duration(value).map_err(|error| format!("option `{option}` {error}"))?;
                self.connect_timeout = Some(timeout);
            }
        }
        Ok(())
    }

    fn auth(&self) -> Result<Auth, String> {
        match (&self.credentials, &self.nkey, &self.jwt) {
            (None, None, None) => Ok(Auth::Anonymous),
            (Some(path), None, None) => Ok(Auth::CredentialsFile(path.clone())),
            (None, Some(seed), jwt) => Ok(Auth::NkeyFile { seed: seed.clone(), jwt: jwt.clone() }),
            (None, None, Some(_)) => Err("option `jwt` needs `nkey` beside it, the seed that belongs to it".to_owned()),
            (Some(_), ..) => Err("option `credentials` holds JWT and seed already: remove `nkey` and `jwt`".to_owned()),
        }
    }
}

fn one_identity(user: Auth, options: Auth) -> Result<Auth, String> {
    match (user, options) {
        (auth, Auth::Anonymous) | (Auth::Anonymous, auth) => Ok(auth),
        _ => Err("the URL has a user or token and also an option with another identity: remove one of them".to_owned()),
    }
}

/// Names the option only where it cannot be the end of a password with a `?` in it.
fn unknown_option(option: &str, query: &str) -> String {
    if query.contains('@') || !option.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-') {
        return "the URL has an unknown option (a `?` in a password is written `%3F`)".to_owned();
    }
    match nearest(option, OPTIONS) {
        Some(near) => format!("option `{option}` of the URL is unknown, did you mean `{near}`?"),
        None => format!("option `{option}` of the URL is unknown, there are `{}`", OPTIONS.join("`, `")),
    }
}

/// The known word that is most like this one, if one is like it: for "did you mean".
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let word = word.to_lowercase();
    known
        .into_iter()
        .map(|candidate| (strsim::jaro_winkler(&word, &candidate.to_lowercase()), candidate))
        .filter(|(likeness, _)| *likeness >= 0.85)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

fn file(option: &str, value: &str) -> Result<PathBuf, String> {
    let secret = value.starts_with("eyJ") || value.starts_with("-----") || (value.starts_with('S') && is_seed(value));
    if secret {
        return Err(format!("option `{option}` names a file, it does not hold the secret itself"));
    }
    if value.is_empty() {
        return Err(format!("option `{option}` names no file"));
    }
    Ok(PathBuf::from(value))
}

fn is_seed(value: &str) -> bool {
    value.len() == 58 && value.bytes().all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit())
}

fn flag(option: &str, value: &str) -> Result<bool, String> {
    match value {
        "" | "true" | "1" => Ok(true),
        "false" | "0" => Ok(false),
        _ => Err(format!("option `{option}` of the URL is neither `true` nor `false`")),
    }
}

fn decode(text: &str, what: &str) -> Result<String, String> {
    let decoded = percent_decode_str(text).decode_utf8();
    decoded.map(Cow::into_owned).map_err(|_| format!("the {what} in the URL is not UTF-8 after percent-decoding"))
}

/// What needs no encoding anywhere in our URLs.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b'/');

fn encode(text: &str) -> Cow<'_, str> {
    utf8_percent_encode(text, ENCODED).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(host: &str, port: u16) -> Host {
        Host { host: host.to_owned(), port }
    }

    #[test]
    fn servers() {
        let check = |url: &str, scheme: Scheme, hosts: &[Host]| {
            let endpoint = Endpoint::parse(url).unwrap_or_else(|error| panic!("{url}: {error}"));
            assert_eq!((endpoint.scheme, endpoint.hosts.as_slice()), (scheme, hosts), "{url}");
            assert_eq!(endpoint.connect_timeout, Duration::from_secs(5));
        };
        check("nats://h", Scheme::Nats, &[host("h", 4222)]);
        check("h", Scheme::Nats, &[host("h", 4222)]);
        check(" h:1 ", Scheme::Nats, &[host("h", 1)]);
        check("TLS://h.example.net:4223/", Scheme::Tls, &[host("h.example.net", 4223)]);
        check("nats://h1,h2:2", Scheme::Nats, &[host("h1", 4222), host("h2", 2)]);
        check("nats://a:b@h1:1,nats://a:b@h2:2", Scheme::Nats, &[host("h1", 1), host("h2", 2)]);
        check("nats://a:b@h1:1, h2", Scheme::Nats, &[host("h1", 1), host("h2", 4222)]);
        check("tls://[::1],[2001:db8::1]:5", Scheme::Tls, &[host("::1", 4222), host("2001:db8::1", 5)]);
        check("10.0.0.1:4222", Scheme::Nats, &[host("10.0.0.1", 4222)]);
        check("ws://h", Scheme::Ws, &[host("h", 80)]);
        check("WSS://a:b@h,i:8443/", Scheme::Wss, &[host("h", 443), host("i", 8443)]);
    }

    #[test]
    fn paths_of_websockets() {
        let endpoint = Endpoint::parse("wss://u:p@h1/nats/%41,[::1]:9/nats/%41?insecure").unwrap();
        assert_eq!(endpoint.path, "/nats/%41");
        assert_eq!(endpoint.hosts, [host("h1", 443), host("::1", 9)]);
        assert_eq!(endpoint.server(&endpoint.hosts[1]), "wss://[::1]:9/nats/%41");
        assert_eq!(Endpoint::parse("ws://h/").unwrap().path, "");
    }

    #[test]
    fn tls_is_required_by_scheme_and_by_tls_options() {
        let check = |url: &str, expect: bool| assert_eq!(Endpoint::parse(url).unwrap().requires_tls(), expect, "{url}");
        check("nats://h?insecure", false);
        check("ws://h", false);
        check("tls://h", true);
        check("wss://h", true);
        check("nats://h?tls_handshake_first", true);
        let mut endpoint = Endpoint::parse("nats://h").unwrap();
        endpoint.tls.ca = Some("/ca".into());
        assert!(endpoint.requires_tls());
    }

    #[test]
    fn identities() {
        let check = |url: &str, auth: Auth| assert_eq!(Endpoint::parse(url).unwrap().auth, auth, "{url}");
        let user = |user: &str, password: &str| Auth::UserPassword { user: user.into(), password: password.into() };
        check("nats://h", Auth::Anonymous);
        check("nats://a:b@h", user("a", "b"));
        check("nats://a:@h", user("a", ""));
        check("nats://a%40x:b%2Cc%3A%2F%3F@h", user("a@x", "b,c:/?"));
        check("nats://a:b@c@h", user("a", "b@c"));
        check("nats://a:b:c@h", user("a", "b:c"));
        check("nats://T%20K@h", Auth::Token("T K".into()));
        check("h?credentials=/etc/a%20b.creds", Auth::CredentialsFile("/etc/a b.creds".into()));
        check("h?nkey=/s", Auth::NkeyFile { seed: "/s".into(), jwt: None });
        check("h?jwt=/j&nkey=/s", Auth::NkeyFile { seed: "/s".into(), jwt: Some("/j".into()) });
    }

    #[test]
    fn options() {
        let endpoint = Endpoint::parse("h?tls_handshake_first=true&insecure&connect_timeout=1m").unwrap();
        assert!(endpoint.tls.handshake_first && endpoint.tls.insecure);
        assert_eq!(endpoint.connect_timeout, Duration::from_secs(60));
        let endpoint = Endpoint::parse("h?tls_handshake_first=false&insecure=0&").unwrap();
        assert!(!endpoint.tls.handshake_first && !endpoint.tls.insecure);
    }

    #[test]
    fn errors_say_what_is_wrong_and_never_the_secret() {
        let check = |url: &str, expect: &str| {
            let error = Endpoint::parse(url).unwrap_err();
            assert!(error.contains(expect), "{url}: {error}");
            assert!(!error.contains("s3cret"), "{url}: {error}");
            assert!(!mask_url(url).contains("s3cret"), "{url}: {}", mask_url(url));
        };
        check("", "host name is empty");
        check("nats://", "host name is empty");
        check("nats://a:s3cret@", "host name is empty");
        check("nats://h:0", "port");
        check("nats://h:65536", "port");
        check("nats://h:+1", "port");
        check("nats://a:s3cret", "port");
        check("nats://a:s3cret,x@h", "port");
        check("nats://a:1,s3cret@h", "another user");
        check("nats://a:s3cret?x@h", "port");
        check("nats://a:1?s3cret@h", "unknown option");
        check("nats://a:1?s3cret=1@h", "unknown option");
        check("nats://:s3cret@h", "empty");
        check("nats://@h", "empty");
        check("nats://a:%ffs3cret@h", "not UTF-8");
        check("nats://a:s3cret@h1,nats://a:s3cret2@h2", "another user");
        check("nats://h1,nats://a:s3cret@h2", "another user");
        check("nats://h1,tls://h2", "another scheme");
        check("ws://a:s3cret@h1,wss://h2", "another scheme");
        check("ws://h1/a,h2/b", "another path");
        check("ws://h1/a,h2", "another path");
        check("ws://h/<a>", "percent-encoded");
        check("http://a:s3cret@h", "is `http://`, not `nats://`, `tls://`, `ws://` or `wss://`");
        check("nats://::1", "brackets");
        check("nats://[::1", "not closed");
        check("nats://[s3cret]", "not an IPv6 address");
        check("nats://[::1]x", "after `]`");
        check("nats://a b", "character");
        check("nats://h/path", "only possible with `ws://`");
        check("h1,,h2", "server 2 of the URL: the host name is empty");
        check("h?insecur=true", "did you mean `insecure`");
        check("h?cred=x", "did you mean `credentials`");
        check("h?colour=x", "is unknown, there are");
        check("h?insecure=maybe", "neither `true` nor `false`");
        check("h?insecure=1&insecure=1", "twice");
        check("h?connect_timeout=5", "not a duration");
        check("h?connect_timeout=0s", "more than 0");
        check("h?credentials=", "names no file");
        check("h?jwt=/j", "needs `nkey`");
        check("h?jwt=eyJs3cret&nkey=/s", "names a file");
        check("h?credentials=/c&nkey=/s", "remove `nkey`");
        check("nats://a:s3cret@h?credentials=/c", "remove one");
        check("h?insecure=true,nats://h2", "follow the last server");
        check("ws://h?insecure=true,wss://h2", "follow the last server");
        check("ws://a:s3cret@h?tls_handshake_first", "write `wss://`");
    }

    #[test]
    fn shown_without_secrets() {
        let check = |url: &str, shown: &str, masked: &str| {
            let endpoint = Endpoint::parse(url).unwrap();
            assert_eq!(endpoint.to_string(), shown);
            assert_eq!(format!("{endpoint:?}"), format!("Endpoint({shown})"));
            assert!(!format!("{:?}", endpoint.auth).contains("s3cret"));
            assert_eq!(mask_url(url), masked);
        };
        check("h", "nats://h:4222", "h");
        check("nats://a:s3cret@h,h2:2", "nats://a:***@h:4222,h2:2", "nats://a:***@h,h2:2");
        check("a:s3cret@h,a:s3cret@i", "nats://a:***@h:4222,i:4222", "a:***@h,a:***@i");
        check("tls://s3cret@[::1]", "tls://***@[::1]:4222", "tls://***@[::1]");
        check("h?insecure&credentials=/c", "nats://h:4222?credentials=/c&insecure=true", "h?insecure&credentials=/c");
        check(
            "h?nkey=/n&jwt=/j&connect_timeout=1500ms",
            "nats://h:4222?nkey=/n&jwt=/j&connect_timeout=1.5s",
            "h?nkey=/n&jwt=/j&connect_timeout=1500ms",
        );
    }

    #[test]
    fn a_broken_url_shows_its_host_and_no_option() {
        let check = |url: &str, expect: &str| {
            assert!(Endpoint::parse(url).is_err(), "{url}");
            assert_eq!(mask_url(url), expect);
            assert_eq!(mask_url(expect), expect);
        };
        check("nats://u:p@h:x", "nats://***@h:x");
        check("nats://u:p@h?token=s3cret", "nats://***@h?***");
        check("nats://u:p@h:1?colour=s?3cret", "nats://***@h:1?***");
        check("u:p@h?nkey=SUAM", "***@h?***");
        check("nats://h?password=s3cret", "nats://***");
        check("nats://u:p@h?password=p@s3cret", "nats://***");
        check("nats://u:p?w@h", "nats://***");
    }

    #[test]
    fn what_is_shown_parses_to_the_same() {
        for url in [
            "tls://h,i:1?insecure",
            "wss://h/a/b,i:1/a/b",
            "[::1]?credentials=/a b,c.creds",
            "h?nkey=/n&jwt=/j&connect_timeout=1m5s",
        ] {
            let endpoint = Endpoint::parse(url).unwrap();
            assert_eq!(Endpoint::parse(&endpoint.to_string()), Ok(endpoint), "{url}");
        }
    }

    #[test]
    fn unmasking() {
        let check = |new: &str, stored: Option<&str>, expect: Result<&str, &str>| {
            let without_files = |url| (url, Tls::default());
            match (unmask(without_files(new), stored.map(without_files)), expect) {
                (Ok(url), Ok(expect)) => assert_eq!(url, expect),
                (Err(error), Err(expect)) => assert!(error.contains(expect), "{new}: {error}"),
                (got, _) => panic!("{new}: {got:?}"),
            }
        };
        let stored = Some("nats://a:p%3Fw@h1,h2:2");
        check("nats://a:new@h9", stored, Ok("nats://a:new@h9"));
        check("nats://a:***@h1,h2:2", stored, Ok("nats://a:p%3Fw@h1,h2:2"));
        check("nats://a:***@h2:2?insecure=false", stored, Ok("nats://a:p%3Fw@h2:2?insecure=false"));
        check("a:%2A**@h1,a:%2A**@h2:2", stored, Ok("a:p%3Fw@h1,a:p%3Fw@h2:2"));
        check("nats://***@h", Some("nats://token@h"), Ok("nats://token@h"));
        check("nats://***@h?connect_timeout=1s", Some("nats://token@h"), Ok("nats://token@h?connect_timeout=1s"));
        check("nats://***@h2", Some("nats://token@h"), Err("servers it was stored with"));
        check("nats://a:***@h1:99", stored, Err("servers it was stored with"));
        check("tls://a:***@h1", stored, Err("servers it was stored with"));
        check("nats://a:***@h1?insecure", stored, Err("servers it was stored with"));
        check("nats://b:***@h1", stored, Err("none is stored for this user"));
        check("nats://***@h1", stored, Err("none is stored for this user"));
        check("nats://a:***@h1", Some("nats://h1"), Err("none is stored for this user"));
        check("nats://a:***@h1", None, Err("none is stored"));
        let stored = Some("nats://a:pw@h?tls_handshake_first");
        check("nats://a:***@h", stored, Err("only with the TLS"));
        check("nats://a:***@h?tls_handshake_first=false", stored, Err("only with the TLS"));
        check("nats://a:***@h?tls_handshake_first=1", stored, Ok("nats://a:pw@h?tls_handshake_first=1"));
        check("nats://a:***@h?tls_handshake_first", Some("nats://a:pw@h"), Ok("nats://a:pw@h?tls_handshake_first"));
    }
}
