//! `stream-replicator serve`: what was written becomes [`AppSettings`] that cannot be wrong, all mistakes at once.

use std::{env, fs, ops::RangeInclusive, path::PathBuf, process::ExitCode, time::Duration};

use nats_lane::{Secret, ServerRef, parse_duration};
use serde_json::Value;
use tracing::error;

use super::{connection::ConnectionFlags, error::USAGE};
use crate::{
    adapter::adapter_key,
    allow::AllowList,
    app::{self, AppSettings},
    config::{self, SiteFile, parse_file},
    http,
    metrics::Detail,
    names,
    store::FileDocuments,
    telemetry,
};

/// A shorter lease would be lost in a pause of its server; after a crash, a longer one leaves replications without a leader for
/// too long.
const LEASE_TTL: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(3600);

/// How long the exit waits for blocking work, such as the lookup of a name.
const EXIT: Duration = Duration::from_secs(1);

/// Run the replicator: one process of one site
#[derive(Debug, clap::Args)]
#[command(mut_arg("server", |arg| {
    arg.help("Servers that hold the configuration and carry the service, or NATS_URL: \
              `nats://[user:password@]host[:port][,host...][?credentials=FILE&nkey=FILE&...]`")
        .env("STREAM_REPLICATOR_SERVER")
}))]
pub(super) struct Args {
    #[command(flatten)]
    connection: ConnectionFlags,

    /// Name of the site, for provenance, metrics and as the default for each replication's `name`; not needed beside
    /// `--config`
    #[arg(
        long,
        value_name = "SITE",
        env = "STREAM_REPLICATOR_NAME",
        hide_env_values = true,
        required_unless_present = "config"
    )]
    name: Option<String>,

    /// YAML file of the site: `name`, `heartbeats` and `adapters`
    #[arg(long, value_name = "FILE", env = "STREAM_REPLICATOR_CONFIG", hide_env_values = true)]
    config: Option<PathBuf>,

    /// Id of this process [default: host name and a random part]
    #[arg(long, value_name = "ID", env = "STREAM_REPLICATOR_INSTANCE", hide_env_values = true)]
    instance: Option<String>,

    /// Serve a status page, /metrics, /livez and /readyz here; port 0 takes any that is free
    #[arg(long, value_name = "ADDR:PORT", env = "STREAM_REPLICATOR_MONITOR", hide_env_values = true)]
    monitor: Option<String>,

    /// Login for the status page and the metrics, with a bcrypt hash as `htpasswd -nB USER` prints it [default: none]
    #[arg(long, value_name = "USER:HASH", env = "STREAM_REPLICATOR_MONITOR_AUTH", hide_env_values = true)]
    monitor_auth: Option<String>,

    /// Metrics of each replication: `full`, or `off` for a dozen series without histograms
    #[arg(
        long,
        value_name = "DETAIL",
        env = "STREAM_REPLICATOR_METRICS_DETAIL",
        hide_env_values = true,
        default_value = "full",
        value_parser = metrics_detail
    )]
    metrics_detail: Detail,

    /// Send a span for each run and each takeover to this OpenTelemetry collector, by OTLP over HTTP
    #[arg(long, value_name = "URL", env = "STREAM_REPLICATOR_OTLP", hide_env_values = true)]
    otlp: Option<String>,

    /// error, warn, info, debug, trace, or a filter such as `info,stream_replicator::copy=debug`
    #[arg(
        long,
        value_name = "LEVEL",
        env = "STREAM_REPLICATOR_LOG_LEVEL",
        hide_env_values = true,
        default_value = "info"
    )]
    log_level: String,

    /// Format of log lines
    #[arg(long, value_enum, env = "STREAM_REPLICATOR_LOG_FORMAT", hide_env_values = true, default_value = "text")]
    log_format: telemetry::Format,

    /// Prefix of the names of the buckets
    #[arg(
        long,
        value_name = "PREFIX",
        env = "STREAM_REPLICATOR_BUCKET_PREFIX",
        hide_env_values = true,
        default_value = names::DEFAULT_BUCKET_PREFIX
    )]
    bucket_prefix: String,

    /// Replicas of buckets that have to be created
    #[arg(
        long,
        value_name = "N",
        env = "STREAM_REPLICATOR_BUCKET_REPLICAS",
        hide_env_values = true,
        default_value_t = 1,
        value_parser = clap::value_parser!(u8).range(1..=5)
    )]
    bucket_replicas: u8,

    /// Create no stream for the events; without this, `<bucket prefix>_EVENTS` keeps them for 30 days, 100 MiB at most
    #[arg(long, env = "STREAM_REPLICATOR_NO_EVENT_STREAM", hide_env_values = true)]
    no_event_stream: bool,

    /// How long this process may be silent before others take over its replications, 1s to 1h; the same for all of a
    /// group
    #[arg(
        long,
        value_name = "DURATION",
        env = "STREAM_REPLICATOR_LEASE_TTL",
        hide_env_values = true,
        default_value = "15s"
    )]
    lease_ttl: String,

    /// This is the only process of its site: it continues to copy while the control connection is down
    #[arg(long, env = "STREAM_REPLICATOR_STANDALONE", hide_env_values = true)]
    standalone: bool,

    /// Servers that documents may name, `[scheme://]host[:port]` with `*` for any text of an address or at the beginning of a
    /// name, and for text without dots elsewhere, such as `nats://*.example.net:4222`; may be repeated [default: any]
    #[arg(
        long,
        value_name = "PATTERN",
        env = "STREAM_REPLICATOR_ALLOW_URL",
        hide_env_values = true,
        value_delimiter = ','
    )]
    allow_url: Vec<String>,

    /// Folder of files that documents may name, with everything below it; may be repeated [default: any]
    #[arg(
        long,
        value_name = "DIR",
        env = "STREAM_REPLICATOR_ALLOW_CREDENTIALS",
        hide_env_values = true,
        value_delimiter = ','
    )]
    allow_credentials: Vec<PathBuf>,

    /// Refuse every request that changes something
    #[arg(long, env = "STREAM_REPLICATOR_READ_ONLY", hide_env_values = true)]
    read_only: bool,

    /// Subject prefix of the service and of events
    #[arg(
        long,
        value_name = "SUBJECT",
        env = "STREAM_REPLICATOR_PREFIX",
        hide_env_values = true,
        default_value = names::DEFAULT_PREFIX
    )]
    prefix: String,
}

/// Runs until a signal; returns the exit code.
pub(super) fn main(args: &Args) -> ExitCode {
    let settings = match args.settings() {
        Ok(settings) => settings,
        Err(problems) => return usage(&problems),
    };
    if let Err(problem) = telemetry::init(&args.log_level, args.log_format) {
        return usage(&[problem]);
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            error!("cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let ended = runtime.block_on(app::run(settings));
    // The control client resolves names on threads of the runtime: a lookup that hangs must not delay the exit.
    runtime.shutdown_timeout(EXIT);
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!("{error:#}");
            let code = if error.is::<app::Misconfigured>() { USAGE } else { 1 };
            ExitCode::from(code)
        }
    }
}

#[expect(clippy::print_stderr, reason = "there is no log yet")]
fn usage(problems: &[String]) -> ExitCode {
    for problem in problems {
        eprintln!("error: {problem}");
    }
    eprintln!("\nFor more information, try '{} serve --help'.", names::PROGRAM);
    ExitCode::from(USAGE)
}

impl Args {
    fn settings(&self) -> Result<AppSettings, Vec<String>> {
        let mut problems = Vec::new();
        let mut check = |flag: &str, value: &str, result: Result<(), &str>| {
            if let Err(right) = result {
                problems.push(format!("`{flag}`: `{value}` is not possible; it must be {right}"));
            }
        };
        let instance = given(self.instance.as_ref()).unwrap_or_else(default_instance);
        let monitor = given(self.monitor.as_ref());
        let name = given(self.name.as_ref());
        if let Some(name) = &name {
            check("--name", name, names::check_token(name));
        }
        check("--instance", &instance, names::check_token(&instance));
        check("--prefix", &self.prefix, names::check_prefix(&self.prefix));
        check("--bucket-prefix", &self.bucket_prefix, names::check_bucket_prefix(&self.bucket_prefix));
        if let Some(monitor) = &monitor {
            check("--monitor", monitor, check_address(monitor));
        }
        let monitor_auth =
            monitor_auth(self.monitor_auth.as_ref()).map_err(|wrong| problems.push(wrong)).ok().flatten();
        let otlp = given(self.otlp.as_ref());
        if let Some(Err(wrong)) = otlp.as_deref().map(http::check_collector) {
            problems.push(format!("`--otlp`: {wrong}"));
        }
        let mut check = |flag: &str, value: &str, result: Result<(), &str>| {
            if let Err(right) = result {
                problems.push(format!("`{flag}`: `{value}` is not possible; it must be {right}"));
            }
        };
        let lease_ttl = parse_duration(&self.lease_ttl).ok().filter(|ttl| LEASE_TTL.contains(ttl));
        let right = "a duration from 1s to 1h, such as `15s`";
        check("--lease-ttl", &self.lease_ttl, lease_ttl.map(|_| ()).ok_or(right));
        let server = self.place().map_err(|problem| problems.push(problem));
        let rules = AllowList::new(&self.allow_url, &self.allow_credentials).map_err(|problem| problems.push(problem));
        let file = self.file(name.as_deref(), rules.as_ref().ok()).map_err(|found| problems.extend(found));
        let (Ok(server), Ok(rules), Ok(file)) = (server, rules, file) else { return Err(problems) };
        if !problems.is_empty() {
            return Err(problems);
        }
        Ok(AppSettings {
            server,
            rules,
            read_only: self.read_only,
            site: file.name,
            instance,
            monitor,
            monitor_auth,
            metrics_detail: self.metrics_detail,
            otlp,
            prefix: self.prefix.clone(),
            bucket_prefix: self.bucket_prefix.clone(),
            bucket_replicas: usize::from(self.bucket_replicas),
            event_stream: !self.no_event_stream,
            lease_ttl: lease_ttl.unwrap_or_default(),
            standalone: self.standalone,
            heartbeats: file.heartbeats,
            state_store: None,
            documents: adapters(&file.adapters),
            on_hangup: None,
        })
    }
}

impl Args {
    /// The content of the site's file, or the default without one.
    fn file(&self, name: Option<&str>, rules: Option<&AllowList>) -> Result<SiteFile, Vec<String>> {
        let Some(path) = self.config.as_ref().filter(|path| !path.as_os_str().is_empty()) else {
            let name = name.ok_or("`--name` or `--config` is needed, for the name of the site");
            return Ok(SiteFile {
                name: name.map_err(|problem| vec![problem.to_owned()])?.to_owned(),
                heartbeats: Value::Null,
                adapters: Vec::new(),
            });
        };
        let named = |problem: String| format!("`--config {}`: {problem}", path.display());
        let yaml = fs::read_to_string(path).map_err(|error| vec![named(error.to_string())])?;
        // Where the rules are themselves wrong nothing can be said by them.
        let judge = |heartbeats: &Value| {
            let found = rules.and_then(|rules| rules.parse_heartbeats(heartbeats).err());
            found.map(|problems| problems.0).unwrap_or_default()
        };
        parse_file(&yaml, name, judge).map_err(|problems| problems.into_iter().map(named).collect())
    }

    /// A service needs an explicit server: the context that is selected in the `nats` tool does not count.
    fn place(&self) -> Result<ServerRef, String> {
        let general = env::var("NATS_URL").ok().filter(|url| !url.is_empty()).map(Secret::from);
        let connection = self.connection.clone().server_or(general);
        if !connection.names_a_place() {
            return Err(
                "`--server` or `--context` is needed: where are the servers that hold the configuration?".to_owned()
            );
        }
        connection.place()
    }
}

/// The adapters of a file, beside the documents of the bucket. One that cannot run is reported when it is read, and the others run.
fn adapters(adapters: &[Value]) -> FileDocuments {
    let documents = adapters.iter().filter_map(|document| {
        let name = config::adapter_name(document)?;
        Some((adapter_key(&name), document.to_string().into()))
    });
    FileDocuments::new(documents.collect()).0
}

/// An empty environment variable is as good as none.
fn given(value: Option<&String>) -> Option<String> {
    value.filter(|value| !value.is_empty()).cloned()
}

/// The login of the monitor, from a flag or the environment.
pub(super) fn monitor_auth(text: Option<&String>) -> Result<Option<http::MonitorAuth>, String> {
    let read = |text: String| text.parse().map_err(|wrong: String| format!("`--monitor-auth`: {wrong}"));
    given(text).map(read).transpose()
}

fn metrics_detail(text: &str) -> Result<Detail, String> {
    match text {
        // As good as none.
        "" | "full" => Ok(Detail::Full),
        "off" => Ok(Detail::Off),
        _ => Err("it must be `full` or `off`".to_owned()),
    }
}

fn check_address(address: &str) -> Result<(), &'static str> {
    let port = address.rsplit_once(':').filter(|(host, _)| !host.is_empty()).map(|(_, port)| port.parse::<u16>());
    if matches!(port, Some(Ok(_))) {
        Ok(())
    } else {
        Err("an address and a port, such as `0.0.0.0:8080` or `[::]:8080`")
    }
}

fn default_instance() -> String {
    names::default_instance(&app::host_name(), rand::random())
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, FromArgMatches, error::ErrorKind};

    use super::*;
    use crate::cli::{Cli, Command, connection::without_environment};

    const NEEDED: [&str; 6] = ["stream-replicator", "serve", "--server", "nats://127.0.0.1:4222", "--name", "US"];

    fn parse(more: &[&str]) -> Result<Box<Args>, clap::Error> {
        parse_all(&[&NEEDED, more].concat())
    }

    /// The environment of the test run is ignored.
    fn parse_all(arguments: &[&str]) -> Result<Box<Args>, clap::Error> {
        let mut command = Cli::command().mut_subcommand("serve", without_environment);
        match Cli::from_arg_matches(&command.try_get_matches_from_mut(arguments)?)?.command {
            Command::Serve(args) => Ok(args),
            other => panic!("{other:?}"),
        }
    }

    #[track_caller]
    fn refused(more: &[&str], expect: &str) {
        let problems = parse(more).unwrap().settings().unwrap_err();
        assert!(problems.iter().any(|problem| problem.contains(expect)), "{problems:?}");
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn defaults_are_filled_in() {
        let settings = parse(&[]).unwrap().settings().unwrap();
        assert_eq!((settings.prefix.as_str(), settings.bucket_prefix.as_str()), ("replicator", "REPLICATOR"));
        assert_eq!((settings.bucket_replicas, settings.monitor), (1, None));
        assert!(names::check_token(&settings.instance).is_ok());
    }

    #[test]
    fn names_that_cannot_be_tokens_are_refused_with_flag_and_value() {
        refused(&["--instance", "a.b"], "`--instance`: `a.b` is not possible; it must be 1 to 128 letters");
        refused(&["--prefix", "a.*"], "`--prefix`: `a.*`");
        refused(&["--bucket-prefix", "A B"], "`--bucket-prefix`: `A B`");
        refused(&["--monitor", "8080"], "`--monitor`: `8080`");
        refused(&["--monitor", "host:80800"], "`--monitor`: `host:80800`");
        refused(&["--monitor-auth", "ops"], "`--monitor-auth`: it must be `USER:HASH`");
    }

    #[test]
    fn all_mistakes_are_told_at_once() {
        let problems = parse(&["--instance", "*", "--prefix", ""]).unwrap().settings().unwrap_err();
        assert_eq!(problems.len(), 2, "{problems:?}");
    }

    #[test]
    fn a_wrong_url_is_refused_without_showing_its_password() {
        let args = ["stream-replicator", "serve", "--name", "US", "--server", "http://me:hunter2@host"];
        let problems = parse_all(&args).unwrap().settings().unwrap_err();
        assert!(problems[0].starts_with("`--server` (") && !problems[0].contains("hunter2"), "{problems:?}");
    }

    #[test]
    fn the_site_name_of_file_and_command_line_must_agree() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("site.yaml");
        let write = |text: &str| fs::write(&file, text).unwrap();
        let place = ["stream-replicator", "serve", "--server", "nats://127.0.0.1:4222"];
        let of_file = ["--config", file.to_str().unwrap()];
        let settings = |more: &[&str]| parse_all(&[&place, more].concat()).unwrap().settings();
        write("name: EU\nheartbeats: {url: 'nats://h', subjects: [{subject: a}]}");
        let found = settings(&of_file).unwrap();
        assert_eq!((found.site.as_str(), &found.heartbeats["url"]), ("EU", &Value::from("nats://h")));
        assert_eq!(settings(&[&of_file[..], &["--name", "EU"]].concat()).unwrap().site, "EU");
        let problems = settings(&[&of_file[..], &["--name", "US"]].concat()).unwrap_err();
        assert!(problems[0].contains("`name` is `EU`, and `--name` is `US`"), "{problems:?}");
        let rules = [&of_file[..], &["--allow-url", "other"]].concat();
        let problems = settings(&rules).unwrap_err();
        assert!(problems[0].contains("`/heartbeats/url`: server `nats://h:4222` is not allowed"), "{problems:?}");
        write("name: EU");
        assert_eq!(settings(&of_file).unwrap().heartbeats, Value::Null);
        let problems = settings(&["--config", "/there/is/none"]).unwrap_err();
        assert!(problems[0].starts_with("`--config /there/is/none`: "), "{problems:?}");
        assert_eq!(parse_all(&place).unwrap_err().kind(), ErrorKind::MissingRequiredArgument);
    }

    #[test]
    fn replicas_are_bounded() {
        assert_eq!(parse(&["--bucket-replicas", "6"]).unwrap_err().kind(), ErrorKind::ValueValidation);
    }
}
