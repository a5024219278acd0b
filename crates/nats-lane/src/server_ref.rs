//! Which server to connect to: by a URL, or by a context of the `nats` tool with fields that take precedence over the
//! context's own and others that fill its gaps. Only words: the file of a context is read elsewhere.

use std::{fmt, path::PathBuf};

use serde_json::{Map, Value};

use crate::{Auth, Endpoint, Secret, Tls};

/// Where the subjects of the JetStream API begin unless a domain or a prefix says otherwise.
pub const DEFAULT_API_PREFIX: &str = "$JS.API";
/// Where the subjects of replies begin unless a context says otherwise.
const DEFAULT_INBOX_PREFIX: &str = "_INBOX";
/// Where the `nats` tool goes when nothing is said.
const DEFAULT_URL: &str = "nats://127.0.0.1:4222";

/// Everything that a connection needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Connection {
    /// The servers and the identity to use with them.
    pub endpoint: Endpoint,
    /// What subjects of the JetStream API begin with: `$JS.API`, `$JS.<domain>.API`, or that of an import.
    pub api_prefix: String,
    /// What reply subjects begin with.
    pub inbox_prefix: String,
}

/// How a connection is named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServerRef {
    /// By a URL and what else belongs to it.
    Known(Box<Connection>),
    /// By a context of the `nats` tool, read again at every attempt to connect.
    Context {
        /// Name of the context.
        name: String,
        /// Fields that take precedence over the context's.
        over: Box<ContextFields>,
        /// Fields for what the context does not say.
        under: Box<ContextFields>,
    },
}

/// What may be said of a connection, field by field: the fields of a context of the `nats` tool, under their names
/// there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ContextFields {
    /// Servers; may hold a password.
    pub url: Option<Secret>,
    /// User; a token where there is no password, not even an empty one.
    pub user: Option<String>,
    /// Password of the user.
    pub password: Option<Secret>,
    /// Bearer token.
    pub token: Option<Secret>,
    /// Credentials file.
    pub creds: Option<PathBuf>,
    /// File of an nkey seed.
    pub nkey: Option<PathBuf>,
    /// User JWT.
    pub user_jwt: Option<Secret>,
    /// Seed that belongs to the JWT.
    pub user_seed: Option<Secret>,
    /// Client certificate chain.
    pub cert: Option<PathBuf>,
    /// Client key.
    pub key: Option<PathBuf>,
    /// Certificate authorities.
    pub ca: Option<PathBuf>,
    /// TLS starts before the server's INFO.
    pub tls_first: bool,
    /// JetStream domain.
    pub jetstream_domain: Option<String>,
    /// Prefix of the JetStream API.
    pub jetstream_api_prefix: Option<String>,
    /// What reply subjects begin with.
    pub inbox_prefix: Option<String>,
    /// Where `nsc` has the identity; not supported.
    pub nsc: Option<Secret>,
    /// Proxy; not supported.
    pub socks_proxy: Option<Secret>,
}

/// What is wrong with one of the [`ContextFields`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldError {
    /// Name of the field, as in a context.
    pub field: &'static str,
    /// What is wrong, without secrets and without the field's name.
    pub message: String,
}

impl Connection {
    /// A connection to these servers with everything else as it is by default.
    pub fn to(endpoint: Endpoint) -> Self {
        let (api_prefix, inbox_prefix) = (DEFAULT_API_PREFIX.to_owned(), DEFAULT_INBOX_PREFIX.to_owned());
        Self { endpoint, api_prefix, inbox_prefix }
    }
}

/// For the log: where to, without secrets.
impl fmt::Display for ServerRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Known(connection) => connection.endpoint.fmt(f),
            Self::Context { name, .. } => write!(f, "context `{name}`"),
        }
    }
}

impl ContextFields {
    /// Reads the fields of a context as the `nats` tool means them: a user without a password has an empty one, and
    /// where domain and prefix are both there, the prefix holds. Unknown fields are another tool's business; an empty
    /// text is as good as none.
    pub fn of_context(json: &[u8]) -> Result<Self, String> {
        // Not the parser's words: they may quote a secret.
        let fields: Map<String, Value> = serde_json::from_slice(json)
            .map_err(|error| format!("it is not a JSON object (line {}, column {})", error.line(), error.column()))?;
        // A value is never shown: it may be a secret.
        let text = |name: &str| match fields.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone()).filter(|text| !text.is_empty())),
            Some(_) => Err(format!("`{name}` is not a text")),
        };
        let secret = |name: &str| text(name).map(|text| text.map(Secret::from));
        let file = |name: &str| text(name).map(|text| text.map(PathBuf::from));
        let (user, mut password) = (text("user")?, secret("password")?);
        if user.is_some() {
            // Only on a command line a user without a password is a token.
            password = password.or_else(|| Some("".into()));
        }
        let (mut domain, prefix) = (text("jetstream_domain")?, text("jetstream_api_prefix")?);
        if prefix.is_some() {
            domain = None;
        }
        let tls_first = match fields.get("tls_first") {
            None | Some(Value::Null) => false,
            Some(Value::Bool(first)) => *first,
            Some(_) => return Err("`tls_first` is neither `true` nor `false`".to_owned()),
        };
        Ok(Self {
            url: secret("url")?,
            user,
            password,
            token: secret("token")?,
            creds: file("creds")?,
            nkey: file("nkey")?,
            user_jwt: secret("user_jwt")?,
            user_seed: secret("user_seed")?,
            cert: file("cert")?,
            key: file("key")?,
            ca: file("ca")?,
            tls_first,
            jetstream_domain: domain,
            jetstream_api_prefix: prefix,
            inbox_prefix: text("inbox_prefix")?,
            nsc: secret("nsc")?,
            socks_proxy: secret("socks_proxy")?,
        })
    }

    /// The files that are named, to be expanded.
    pub fn files_mut(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        [&mut self.creds, &mut self.nkey, &mut self.cert, &mut self.key, &mut self.ca].into_iter().flatten()
    }

    /// These fields, and those of `base` that are not here. An identity replaces that of `base` as a whole, whatever
    /// kind it is of; so do domain and prefix, which exclude each other. `cert` and `key` go together.
    #[must_use]
    pub fn over(self, mut base: Self) -> Self {
        if self.names_identity() {
            base.url = base.url.map(without_identity);
            if self.user.is_none() && self.password.is_none() {
                (base.user, base.password) = (None, None);
            }
            if self.user.is_some() {
                base.password = base.password.filter(|password| !password.reveal().is_empty());
            }
            (base.token, base.nsc, base.user_jwt, base.user_seed) = (None, None, None, None);
            (base.creds, base.nkey) = (None, None);
        }
        if self.jetstream_domain.is_some() || self.jetstream_api_prefix.is_some() {
            (base.jetstream_domain, base.jetstream_api_prefix) = (None, None);
        }
        if self.cert.is_some() || self.key.is_some() {
            (base.cert, base.key) = (None, None);
        }
        Self {
            url: self.url.or(base.url),
            user: self.user.or(base.user),
            password: self.password.or(base.password),
            token: self.token.or(base.token),
            creds: self.creds.or(base.creds),
            nkey: self.nkey.or(base.nkey),
            user_jwt: self.user_jwt.or(base.user_jwt),
            user_seed: self.user_seed.or(base.user_seed),
            cert: self.cert.or(base.cert),
            key: self.key.or(base.key),
            ca: self.ca.or(base.ca),
            tls_first: self.tls_first || base.tls_first,
            jetstream_domain: self.jetstream_domain.or(base.jetstream_domain),
            jetstream_api_prefix: self.jetstream_api_prefix.or(base.jetstream_api_prefix),
            inbox_prefix: self.inbox_prefix.or(base.inbox_prefix),
            nsc: self.nsc.or(base.nsc),
            socks_proxy: self.socks_proxy.or(base.socks_proxy),
        }
    }

    fn names_identity(&self) -> bool {
        let named = self.user.is_some()
            || self.password.is_some()
            || self.token.is_some()
            || self.creds.is_some()
            || self.nkey.is_some()
            || self.user_jwt.is_some();
        let in_url = |url: &Secret| Endpoint::parse(url.reveal()).is_ok_and(|url| url.auth != Auth::Anonymous);
        named || self.url.as_ref().is_some_and(in_url)
    }

    /// Everything that these fields can say for themselves, whatever takes precedence over them.
    pub fn check(&self) -> Result<(), FieldError> {
        if let Some(url) = &self.url {
            Endpoint::parse(url.reveal()).map_err(|message| FieldError { field: "url", message })?;
        }
        self.api_prefix()?;
        self.inbox().map(|_| ())
    }

    /// Puts everything together.
    pub fn connection(&self) -> Result<Connection, FieldError> {
        if self.socks_proxy.is_some() {
            return Err(wrong("socks_proxy", "a SOCKS proxy is not supported"));
        }
        let url = self.url.as_ref().map_or(DEFAULT_URL, Secret::reveal);
        let mut endpoint = Endpoint::parse(url).map_err(|message| FieldError { field: "url", message })?;
        if endpoint.auth == Auth::Anonymous {
            endpoint.auth = self.identity()?;
        }
        match (&self.cert, &self.key) {
            (Some(_), None) => return Err(wrong("cert", "there is no key beside it: `cert` and `key` go together")),
            (None, Some(_)) => {
                return Err(wrong("key", "there is no certificate beside it: `cert` and `key` go together"));
            }
            _ => {}
        }
        let tls = Tls {
            ca: self.ca.clone(),
            cert: self.cert.clone(),
            key: self.key.clone(),
            handshake_first: endpoint.tls.handshake_first || self.tls_first,
            ..endpoint.tls
        };
        let endpoint = endpoint.with_tls(tls).map_err(|message| FieldError { field: "url", message })?;
        Ok(Connection {
            api_prefix: self.api_prefix()?.unwrap_or_else(|| DEFAULT_API_PREFIX.to_owned()),
            inbox_prefix: self.inbox()?.unwrap_or_else(|| DEFAULT_INBOX_PREFIX.to_owned()),
            endpoint,
        })
    }

    fn identity(&self) -> Result<Auth, FieldError> {
        match (&self.user, &self.password) {
            (Some(user), Some(password)) => {
                return Ok(Auth::UserPassword { user: user.clone(), password: password.clone() });
            }
            (Some(token), None) => return Ok(Auth::Token(token.as_str().into())),
            (None, Some(_)) => return Err(wrong("password", "there is no user that it belongs to")),
            (None, None) => {}
        }
        if let Some(path) = &self.creds {
            return Ok(Auth::CredentialsFile(path.clone()));
        }
        if let Some(seed) = &self.nkey {
            return Ok(Auth::NkeyFile { seed: seed.clone(), jwt: None });
        }
        if let Some(jwt) = &self.user_jwt {
            return Ok(Auth::Jwt { jwt: jwt.clone(), seed: self.user_seed.clone() });
        }
        match (&self.token, &self.nsc) {
            (Some(token), _) => Ok(Auth::Token(token.clone())),
            (None, Some(_)) => Err(wrong("nsc", "credentials of `nsc` are not supported: name their file in `creds`")),
            (None, None) => Ok(Auth::Anonymous),
        }
    }

    fn api_prefix(&self) -> Result<Option<String>, FieldError> {
        match (&self.jetstream_domain, &self.jetstream_api_prefix) {
            (Some(_), Some(_)) => Err(wrong("jetstream_api_prefix", "a domain says the same: remove one of them")),
            (Some(domain), None) => {
                let prefix = domain_prefix(domain);
                prefix.map(Some).map_err(|message| FieldError { field: "jetstream_domain", message })
            }
            (None, Some(prefix)) => {
                let prefix = subject_prefix(prefix);
                prefix.map(Some).map_err(|message| FieldError { field: "jetstream_api_prefix", message })
            }
            (None, None) => Ok(None),
        }
    }

    fn inbox(&self) -> Result<Option<String>, FieldError> {
        let Some(prefix) = &self.inbox_prefix else { return Ok(None) };
        subject_prefix(prefix).map(Some).map_err(|message| FieldError { field: "inbox_prefix", message })
    }
}

/// The URL without the identity that is in it.
fn without_identity(url: Secret) -> Secret {
    match Endpoint::parse(url.reveal()) {
        Ok(endpoint) => Endpoint { auth: Auth::Anonymous, ..endpoint }.to_string().into(),
        Err(_) => url,
    }
}

fn wrong(field: &'static str, message: &str) -> FieldError {
    FieldError { field, message: message.to_owned() }
}

/// Prefix of the JetStream API of a domain.
pub fn domain_prefix(domain: &str) -> Result<String, String> {
    check_subject(domain)?;
    if domain.contains('.') {
        return Err("the name of a domain is one token, without dots".to_owned());
    }
    Ok(format!("$JS.{domain}.API"))
}

/// A prefix of subjects, without the dot at its end.
pub fn subject_prefix(prefix: &str) -> Result<String, String> {
    let prefix = prefix.strip_suffix('.').unwrap_or(prefix);
    check_subject(prefix).map(|()| prefix.to_owned())
}

fn check_subject(subject: &str) -> Result<(), String> {
    if subject.len() > 255 {
        return Err("it has more than 255 characters".to_owned());
    }
    no_url(subject)?;
    if subject.split('.').any(str::is_empty) {
        return Err("it has an empty token: one dot between two tokens, none in front".to_owned());
    }
    let illegal = |c: char| c.is_whitespace() || c.is_control() || c == '*' || c == '>';
    match subject.chars().find(|c| illegal(*c)) {
        Some(c) => Err(format!("it cannot contain {c:?}")),
        None => Ok(()),
    }
}

/// What a URL that strayed into another field has in it. Subjects of requests are made of these fields and shown in errors,
/// and the URL's password would be with them.
pub fn looks_like_url(text: &str) -> bool {
    text.contains([':', '/', '@'])
}

/// Refuses what [`looks_like_url`]; the value is not in the words.
pub fn no_url(text: &str) -> Result<(), String> {
    if looks_like_url(text) {
        return Err(
            "it cannot contain `:`, `/` or `@`, as a URL does; the value is not shown, it may be a secret".to_owned()
        );
    }
    Ok(())
}

/// Checks the name of a context, which becomes the name of a file.
pub fn check_context_name(name: &str) -> Result<(), &'static str> {
    let legal = |c: char| !c.is_control() && c != '/' && c != '\\';
    if !name.is_empty() && name.len() <= 128 && name.chars().all(legal) && !name.contains("..") {
        return Ok(());
    }
    Err("the name of a context has 1 to 128 characters, no `/`, no `\\` and no `..`")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn context(fields: Value) -> ContextFields {
        ContextFields::of_context(fields.to_string().as_bytes()).unwrap()
    }

    fn connection(fields: Value) -> Connection {
        context(fields).connection().unwrap()
    }

    #[test]
    fn a_context_as_the_nats_tool_writes_it() {
        let fields = context(json!({
            "description": "the hub", "url": "nats://hub.example.net", "token": "", "user": "", "password": "",
            "creds": "/hub.creds", "nkey": "", "cert": "/c", "key": "/k", "ca": "/ca", "nsc": "",
            "jetstream_domain": "hub", "jetstream_api_prefix": "", "jetstream_event_prefix": "",
            "inbox_prefix": "_INBOX.me", "user_jwt": "", "color_scheme": "", "tls_first": true, "later": [1]
        }));
        let Connection { endpoint, api_prefix, inbox_prefix } = fields.connection().unwrap();
        assert_eq!(endpoint.to_string(), "nats://hub.example.net:4222?credentials=/hub.creds&tls_handshake_first=true");
        assert_eq!(endpoint.tls.key, Some("/k".into()));
        assert_eq!((api_prefix.as_str(), inbox_prefix.as_str()), ("$JS.hub.API", "_INBOX.me"));
        let both = connection(json!({"jetstream_domain": "a", "jetstream_api_prefix": "js.b"}));
        assert_eq!(both.api_prefix, "js.b");
        let default = connection(json!({"url": null}));
        assert_eq!(default, Connection::to(Endpoint::parse("nats://127.0.0.1:4222").unwrap()));
    }

    #[test]
    fn identities() {
        let check = |fields: Value, expect: Auth| assert_eq!(connection(fields).endpoint.auth, expect);
        let password = |password: &str| Auth::UserPassword { user: "u".into(), password: password.into() };
        check(json!({"user": "u", "password": "p"}), password("p"));
        check(json!({"user": "u", "password": "p", "url": "nats://u:q@h"}), password("q"));
        check(json!({"user": "u"}), password(""));
        check(json!({"user": "u", "password": "", "token": "t"}), password(""));
        check(json!({"token": "t"}), Auth::Token("t".into()));
        check(json!({"nkey": "/n"}), Auth::NkeyFile { seed: "/n".into(), jwt: None });
        check(json!({"user_jwt": "j", "user_seed": "s"}), Auth::Jwt { jwt: "j".into(), seed: Some("s".into()) });
        check(json!({"nsc": "nsc://o/a/u", "creds": "/c"}), Auth::CredentialsFile("/c".into()));
    }

    #[test]
    fn an_identity_is_replaced_as_a_whole_other_fields_one_by_one() {
        let base = json!({"url": "nats://u:p@h", "creds": "/c", "ca": "/ca", "jetstream_domain": "d"});
        let over = |over: Value| context(over).over(context(base.clone())).connection().unwrap();
        assert_eq!(over(json!({})).endpoint.to_string(), "nats://u:***@h:4222");
        assert_eq!(over(json!({"creds": "/x"})).endpoint.to_string(), "nats://h:4222?credentials=/x");
        assert_eq!(over(json!({"url": "tls://i"})).endpoint.to_string(), "tls://i:4222?credentials=/c");
        assert_eq!(over(json!({"url": "t@i"})).endpoint.auth, Auth::Token("t".into()));
        let mixed = over(json!({"jetstream_api_prefix": "js.hub.", "cert": "/c", "key": "/k"}));
        assert_eq!((mixed.api_prefix.as_str(), mixed.endpoint.tls.ca), ("js.hub", Some("/ca".into())));
        assert_eq!(mixed.endpoint.tls.cert, Some("/c".into()));
        let flag = |user: &str| ContextFields { user: Some(user.to_owned()), ..ContextFields::default() };
        let user = flag("v").over(context(json!({"user": "u", "password": "p", "token": "t"})));
        assert_eq!(user.connection().unwrap().endpoint.to_string(), "nats://v:***@127.0.0.1:4222");
        assert_eq!((user.token, user.password), (None, Some("p".into())));
        // A user of a command line, alone and before a context without a password.
        for base in [ContextFields::default(), context(json!({"user": "u"}))] {
            assert_eq!(flag("t").over(base).connection().unwrap().endpoint.auth, Auth::Token("t".into()));
        }
    }

    #[test]
    fn errors_name_the_field_and_never_the_secret() {
        let check = |fields: Value, field: &str, expect: &str| {
            let error = context(fields).connection().unwrap_err();
            assert_eq!(error.field, field, "{error:?}");
            assert!(error.message.contains(expect) && !error.message.contains("s3cret"), "{error:?}");
        };
        check(json!({"url": "nats://a:s3cret"}), "url", "port");
        check(json!({"password": "s3cret"}), "password", "no user");
        check(json!({"cert": "/c"}), "cert", "go together");
        check(json!({"key": "/c"}), "key", "go together");
        for asks in [json!({"ca": "/ca"}), json!({"cert": "/c", "key": "/k"}), json!({"tls_first": true})] {
            let mut fields = asks;
            fields["url"] = "ws://u:s3cret@h".into();
            check(fields, "url", "`ws://` is without TLS");
        }
        check(json!({"nsc": "nsc://o/a/u?s3cret"}), "nsc", "`creds`");
        check(json!({"socks_proxy": "socks5://u:s3cret@h"}), "socks_proxy", "not supported");
        check(json!({"jetstream_domain": "a.b"}), "jetstream_domain", "one token");
        check(json!({"jetstream_api_prefix": "a.>"}), "jetstream_api_prefix", "cannot contain '>'");
        check(json!({"inbox_prefix": "a..b"}), "inbox_prefix", "empty token");
        let both = ContextFields {
            jetstream_domain: Some("a".into()),
            jetstream_api_prefix: Some("b".into()),
            ..ContextFields::default()
        };
        let error = both.connection().unwrap_err();
        assert_eq!(error.field, "jetstream_api_prefix");
        assert!(error.message.contains("remove one"), "{error:?}");
        for (json, expect) in [
            ("[]", "not a JSON object"),
            ("\"s3cret\"", "not a JSON object"),
            ("{\"password\": \"s3cret\"", "not a JSON object (line 1, column 21)"),
            ("{\"password\": 53}", "`password` is not a text"),
            ("{\"tls_first\": \"s3cret\"}", "`tls_first` is neither"),
        ] {
            let error = ContextFields::of_context(json.as_bytes()).unwrap_err();
            assert!(error.contains(expect) && !error.contains("s3cret") && !error.contains("53"), "{error}");
        }
    }

    #[test]
    fn names_of_contexts_stay_in_their_folder() {
        for good in ["hub", "a.b", "us east-1", "\u{fc}"] {
            assert!(check_context_name(good).is_ok(), "{good}");
        }
        for bad in ["", "../x", "a/b", "a\\b", "..", "a\nb", &"x".repeat(129)] {
            assert!(check_context_name(bad).is_err(), "{bad}");
        }
    }
}
