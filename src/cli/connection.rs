//! Where a command finds its server, and as whom: flags, the environment and contexts, as the `nats` tool has them.

use std::{env, path::PathBuf, time::Duration};

use nats_lane::{ContextFields, FieldError, Secret, ServerRef, check_context_name, context, parse_duration};

use crate::names;

/// The service answers within 3 s.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(5);

/// How to connect; every flag takes precedence over the same field of the context.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Connection")]
pub(super) struct ConnectionFlags {
    /// Servers: `nats://[user:password@]host[:port][,host...][?credentials=FILE&nkey=FILE&...]`, also `tls://`, `ws://`
    /// and `wss://`
    #[arg(long, global = true, short, value_name = "URL[,URL]", env = "NATS_URL", hide_env_values = true)]
    server: Option<Secret>,

    /// User, or a token where there is no password
    #[arg(long, global = true, value_name = "USER", env = "NATS_USER", hide_env_values = true)]
    user: Option<String>,

    /// Password
    #[arg(long, global = true, value_name = "PASSWORD", env = "NATS_PASSWORD", hide_env_values = true)]
    password: Option<Secret>,

    /// Token
    #[arg(long, global = true, value_name = "TOKEN", env = "NATS_TOKEN", hide_env_values = true)]
    token: Option<Secret>,

    /// Credentials file: a JWT and its seed
    #[arg(long, global = true, value_name = "FILE", env = "NATS_CREDS", hide_env_values = true)]
    creds: Option<PathBuf>,

    /// File of an nkey seed
    #[arg(long, global = true, value_name = "FILE", env = "NATS_NKEY", hide_env_values = true)]
    nkey: Option<PathBuf>,

    /// User JWT
    #[arg(long, global = true, value_name = "JWT", env = "NATS_JWT", hide_env_values = true)]
    jwt: Option<Secret>,

    /// Seed that belongs to the user JWT
    #[arg(long, global = true, value_name = "SEED", env = "NATS_SEED", hide_env_values = true)]
    seed: Option<Secret>,

    /// Client certificate, PEM
    #[arg(long, global = true, value_name = "FILE", env = "NATS_CERT", hide_env_values = true)]
    tlscert: Option<PathBuf>,

    /// Key of the client certificate, PEM
    #[arg(long, global = true, value_name = "FILE", env = "NATS_KEY", hide_env_values = true)]
    tlskey: Option<PathBuf>,

    /// Certificate authorities to trust instead of the system's, PEM
    #[arg(long, global = true, value_name = "FILE", env = "NATS_CA", hide_env_values = true)]
    tlsca: Option<PathBuf>,

    /// Begin with the TLS handshake
    #[arg(long, global = true)]
    tlsfirst: bool,

    /// Context of the `nats` tool
    #[arg(long, global = true, value_name = "NAME", env = "NATS_CONTEXT", hide_env_values = true)]
    context: Option<String>,

    /// Use no context, neither NATS_CONTEXT nor the one that is selected in the `nats` tool
    #[arg(long, global = true)]
    no_context: bool,

    /// Not supported: an error, so that a connection that should go through a proxy does not go without
    #[arg(long, global = true, value_name = "URL", env = "NATS_SOCKS_PROXY", hide_env_values = true, hide = true)]
    socks_proxy: Option<Secret>,

    /// JetStream domain
    #[arg(long, global = true, value_name = "DOMAIN", env = "NATS_JS_DOMAIN", hide_env_values = true)]
    js_domain: Option<String>,

    /// Prefix of the JetStream API, where it is imported from another account
    #[arg(long, global = true, value_name = "SUBJECT", env = "NATS_JS_API_PREFIX", hide_env_values = true)]
    js_api_prefix: Option<String>,

    /// Prefix of reply subjects [default: _INBOX]
    #[arg(long, global = true, value_name = "SUBJECT", env = "NATS_INBOX_PREFIX", hide_env_values = true)]
    inbox_prefix: Option<String>,
}

/// The connection of a command that asks the service.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct RequestFlags {
    #[command(flatten)]
    connection: ConnectionFlags,

    /// How long to wait for an answer, or with `--wait` for the result [default: 5s for an answer, or NATS_TIMEOUT]
    #[arg(long, global = true, value_name = "DURATION", value_parser = parse_duration, help_heading = "Connection")]
    timeout: Option<Duration>,

    /// Name of the connection, as the server shows it
    #[arg(long, global = true, value_name = "NAME", help_heading = "Connection")]
    connection_name: Option<String>,
}

impl RequestFlags {
    /// Where to go; without a server and a context the one that is selected in the `nats` tool counts. An error names
    /// the flag or the file and shows no secret.
    pub(super) fn place(&self) -> Result<ServerRef, String> {
        self.connection.place_or_selected()
    }

    /// Name of the connection.
    pub(super) fn connection_name(&self) -> String {
        let own = given(self.connection_name.as_ref(), String::as_str);
        own.unwrap_or_else(|| format!("{} command", names::PROGRAM))
    }

    /// How long to wait for an answer.
    pub(super) fn timeout(&self) -> Result<Duration, String> {
        let general = env::var("NATS_TIMEOUT").ok().filter(|text| !text.is_empty());
        match (self.timeout, general) {
            (Some(timeout), _) => Ok(timeout),
            (None, Some(text)) => parse_duration(&text).map_err(|error| format!("`NATS_TIMEOUT` is `{text}`: {error}")),
            (None, None) => Ok(DEFAULT_TIMEOUT),
        }
    }

    /// How long a command may take that waits for something; for as long as that takes, if nothing was said.
    pub(super) fn limit(&self) -> Option<Duration> {
        self.timeout
    }
}

impl ConnectionFlags {
    /// Whether something says where to go.
    pub(super) fn names_a_place(&self) -> bool {
        given(self.server.as_ref(), Secret::reveal).is_some() || self.context().is_some()
    }

    /// A server to go to unless another one is named.
    pub(super) fn server_or(mut self, server: Option<Secret>) -> Self {
        self.server = given(self.server.as_ref(), Secret::reveal).or(server);
        self
    }

    /// Everything that was given, put together.
    pub(super) fn place(&self) -> Result<ServerRef, String> {
        self.place_in(self.context())
    }

    fn context(&self) -> Option<String> {
        given(self.context.as_ref(), String::as_str).filter(|_| !self.no_context)
    }

    fn place_or_selected(&self) -> Result<ServerRef, String> {
        if self.names_a_place() || self.no_context {
            return self.place();
        }
        self.place_in(context::selected().map_err(|error| error.to_string())?)
    }

    fn place_in(&self, context: Option<String>) -> Result<ServerRef, String> {
        let fields = self.fields();
        fields.check().map_err(flag_error)?;
        match context {
            None => fields.connection().map(|connection| ServerRef::Known(Box::new(connection))).map_err(flag_error),
            Some(name) => {
                check_context_name(&name).map_err(|right| format!("`--context`: `{name}` is not possible: {right}"))?;
                let place = ServerRef::Context { name, over: Box::new(fields), under: Box::default() };
                context::resolve(&place).map_err(|error| error.to_string())?;
                Ok(place)
            }
        }
    }

    fn fields(&self) -> ContextFields {
        let text = |value: &Option<String>| given(value.as_ref(), String::as_str);
        let file = |path: &Option<PathBuf>| {
            let mut path = path.clone().filter(|path| !path.as_os_str().is_empty())?;
            context::expand(&mut path);
            Some(path)
        };
        ContextFields {
            url: given(self.server.as_ref(), Secret::reveal),
            user: text(&self.user),
            password: given(self.password.as_ref(), Secret::reveal),
            token: given(self.token.as_ref(), Secret::reveal),
            creds: file(&self.creds),
            nkey: file(&self.nkey),
            user_jwt: given(self.jwt.as_ref(), Secret::reveal),
            user_seed: given(self.seed.as_ref(), Secret::reveal),
            socks_proxy: given(self.socks_proxy.as_ref(), Secret::reveal),
            cert: file(&self.tlscert),
            key: file(&self.tlskey),
            ca: file(&self.tlsca),
            tls_first: self.tlsfirst,
            jetstream_domain: text(&self.js_domain),
            jetstream_api_prefix: text(&self.js_api_prefix),
            inbox_prefix: text(&self.inbox_prefix),
            ..ContextFields::default()
        }
    }
}

/// An empty flag or environment variable is as good as none.
fn given<T: Clone>(value: Option<&T>, text: impl Fn(&T) -> &str) -> Option<T> {
    value.filter(|value| !text(value).is_empty()).cloned()
}

/// The problem, with the flag and the variable in front.
fn flag_error(error: FieldError) -> String {
    let (flag, variable) = match error.field {
        "url" => ("--server", "NATS_URL"),
        "user" => ("--user", "NATS_USER"),
        "password" => ("--password", "NATS_PASSWORD"),
        "token" => ("--token", "NATS_TOKEN"),
        "user_jwt" => ("--jwt", "NATS_JWT"),
        "user_seed" => ("--seed", "NATS_SEED"),
        "socks_proxy" => ("--socks-proxy", "NATS_SOCKS_PROXY"),
        "creds" => ("--creds", "NATS_CREDS"),
        "nkey" => ("--nkey", "NATS_NKEY"),
        "cert" => ("--tlscert", "NATS_CERT"),
        "key" => ("--tlskey", "NATS_KEY"),
        "ca" => ("--tlsca", "NATS_CA"),
        "jetstream_domain" => ("--js-domain", "NATS_JS_DOMAIN"),
        "jetstream_api_prefix" => ("--js-api-prefix", "NATS_JS_API_PREFIX"),
        "inbox_prefix" => ("--inbox-prefix", "NATS_INBOX_PREFIX"),
        field => return format!("`{field}`: {}", error.message),
    };
    format!("`{flag}` (or `{variable}`): {}", error.message)
}

/// A command for tests whose flags are not read from the environment of the test run.
#[cfg(test)]
pub(super) fn without_environment(command: clap::Command) -> clap::Command {
    command.mut_args(|argument| argument.env(clap::builder::Resettable::Reset))
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, FromArgMatches, Parser};
    use nats_lane::Auth;

    use super::*;

    #[derive(Debug, Parser)]
    struct Command {
        #[command(flatten)]
        asking: RequestFlags,
    }

    fn parse(arguments: &[&str]) -> Command {
        let command = without_environment(Command::command());
        let matches = command.try_get_matches_from(["x"].iter().chain(arguments)).unwrap();
        Command::from_arg_matches(&matches).unwrap()
    }

    fn place(arguments: &[&str]) -> Result<ServerRef, String> {
        parse(arguments).asking.connection.place()
    }

    #[test]
    fn flags_make_a_connection() {
        let ServerRef::Known(connection) = place(&[
            "-s",
            "tls://h",
            "--creds",
            "/c",
            "--tlscert",
            "/p",
            "--tlskey",
            "/k",
            "--tlsca",
            "/a",
            "--tlsfirst",
            "--js-domain",
            "hub",
            "--inbox-prefix",
            "in",
        ])
        .unwrap() else {
            panic!("a context")
        };
        assert_eq!(connection.endpoint.to_string(), "tls://h:4222?credentials=/c&tls_handshake_first=true");
        assert_eq!(connection.endpoint.tls.ca, Some("/a".into()));
        assert_eq!((connection.api_prefix.as_str(), connection.inbox_prefix.as_str()), ("$JS.hub.API", "in"));
        let asking = parse(&["--timeout", "1m"]).asking;
        assert_eq!((asking.timeout(), asking.limit()), (Ok(Duration::from_secs(60)), Some(Duration::from_secs(60))));
    }

    #[test]
    fn errors_name_the_flag_and_show_no_secret() {
        let check = |arguments: &[&str], expect: &str| {
            let error = place(arguments).unwrap_err();
            assert!(error.contains(expect) && !error.contains("s3cret"), "{error}");
        };
        check(&["--server", "http://u:s3cret@h"], "`--server` (or `NATS_URL`): the scheme");
        check(&["--password", "s3cret"], "`--password` (or `NATS_PASSWORD`): there is no user");
        check(&["--tlscert", "/c"], "`--tlscert` (or `NATS_CERT`): there is no key");
        check(&["--js-domain", "a.b"], "`--js-domain` (or `NATS_JS_DOMAIN`): the name of a domain");
        check(&["--js-domain", "a", "--js-api-prefix", "b"], "`--js-api-prefix` (or `NATS_JS_API_PREFIX`): a domain");
        check(&["--context", "../x"], "`--context`: `../x` is not possible");
        check(&["--context", "there is none"], "there is no such file");
        check(
            &["--socks-proxy", "socks5://u:s3cret@h"],
            "`--socks-proxy` (or `NATS_SOCKS_PROXY`): a SOCKS proxy is not",
        );
    }

    #[test]
    fn logins_of_the_nats_tool_are_taken() {
        let auth = |arguments: &[&str]| {
            let ServerRef::Known(connection) = place(arguments).unwrap() else { panic!("a context") };
            connection.endpoint.auth
        };
        assert_eq!(auth(&["--token", "t"]), Auth::Token("t".into()));
        let jwt = Auth::Jwt { jwt: "j".into(), seed: Some("s".into()) };
        assert_eq!(auth(&["--jwt", "j", "--seed", "s"]), jwt);
        assert_eq!(auth(&["--context", "there is none", "--no-context"]), Auth::Anonymous);
    }

    #[test]
    fn secrets_are_not_printed() {
        let secrets = ["--token", "s3cret", "--jwt", "s3cret", "--seed", "s3cret", "--socks-proxy", "s3cret"];
        assert!(!format!("{:?}", parse(&secrets)).contains("s3cret"));
        let command = parse(&["-s", "nats://u:s3cret@h", "--password", "s3cret"]);
        assert!(!format!("{command:?}").contains("s3cret"), "{command:?}");
    }
}
