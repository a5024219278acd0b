//! `stream-replicator replicate`: the file of Choria's replicator, run as it is.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;
use tracing::{error, info, warn};

use super::{
    error::{CommandVerdict, USAGE},
    output::Output,
    serve::monitor_auth,
};
use crate::{
    allow::AllowList,
    app::{self, AppSettings, HangupHook, ReplicatorFile},
    choria::YamlProblem,
    http::MonitorAuth,
    metrics::Detail,
    names,
    preflight::{self, CheckOutcome, Finding, OtherReplication, Own},
    store::{FileDocuments, FileReloader, OwnStreams},
    telemetry::{self, LogFile},
};

/// Both sides of one replication are checked in this time.
const PREFLIGHT_WITHIN: Duration = Duration::from_secs(5);
/// As that of `serve`.
const LEASE_TTL: Duration = Duration::from_secs(15);

/// Run the YAML file of Choria's stream-replicator as it is
///
/// `replicate` may be omitted: `stream-replicator --config FILE` does the same. SIGHUP reads the streams of the file again and
/// reopens its `logfile`; SIGQUIT writes the state of every stream to the log.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// File to run, such as `/etc/stream-replicator/sr.yaml`
    #[arg(long, value_name = "FILE", required_unless_present = "check")]
    config: Option<PathBuf>,

    /// Log more, whatever `loglevel` says
    #[arg(long)]
    debug: bool,

    /// Report everything that is wrong with this file, check both sides of each stream, change nothing and exit
    #[arg(long, value_name = "FILE", conflicts_with = "config")]
    check: Option<PathBuf>,

    /// Warn of keys that are unknown instead of refusing them
    #[arg(long)]
    lenient: bool,

    /// Create no stream for the events
    #[arg(long)]
    no_event_stream: bool,

    /// Login for the status page and the metrics, with a bcrypt hash as `htpasswd -nB USER` prints it [default: none]
    #[arg(long, value_name = "USER:HASH", env = "STREAM_REPLICATOR_MONITOR_AUTH", hide_env_values = true)]
    monitor_auth: Option<String>,
}

/// Flags that stand for `replicate` where no command is named.
const FLAGS: [&str; 4] = ["--config", "--debug", "--check", "--lenient"];

/// The arguments with `replicate` in front of its flags. Choria's program has it as its default command, and takes its
/// flags in front of it too.
pub(super) fn with_default(arguments: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut arguments: Vec<_> = arguments.collect();
    let is_flag = |argument: &OsString| {
        let text = argument.to_string_lossy();
        FLAGS.iter().any(|flag| text == *flag || text.strip_prefix(flag).is_some_and(|rest| rest.starts_with('=')))
    };
    if !arguments.get(1).is_some_and(is_flag) {
        return arguments;
    }
    let takes_value = |argument: &OsString| argument == "--config" || argument == "--check";
    let named = (2..arguments.len()).find(|at| arguments[*at] == "replicate" && !takes_value(&arguments[at - 1]));
    if let Some(at) = named {
        arguments.remove(at);
    }
    arguments.insert(1, "replicate".into());
    arguments
}

impl Args {
    fn path(&self) -> &Path {
        self.check.as_ref().or(self.config.as_ref()).map_or(Path::new(""), PathBuf::as_path)
    }

    fn settings(&self, file: &ReplicatorFile, auth: Option<MonitorAuth>, log: Option<Arc<LogFile>>) -> AppSettings {
        let (documents, reloader) = FileDocuments::new(file.documents());
        let (path, lenient, before) = (self.path().to_owned(), self.lenient, file.clone());
        AppSettings {
            otlp: None,
            server: file.server.clone(),
            rules: AllowList::default(),
            read_only: false,
            site: file.yaml.name.clone(),
            instance: names::default_instance(&app::host_name(), rand::random()),
            monitor: file.monitor(),
            monitor_auth: auth,
            metrics_detail: Detail::Full,
            prefix: file.prefix(),
            bucket_prefix: file.bucket_prefix(),
            bucket_replicas: 1,
            event_stream: !self.no_event_stream,
            lease_ttl: LEASE_TTL,
            standalone: false,
            heartbeats: file.yaml.heartbeats.clone(),
            state_store: file.state_store(),
            documents,
            on_hangup: Some(HangupHook::new(move || hang_up(&path, lenient, &before, &reloader, log.as_deref()))),
        }
    }
}

/// SIGHUP: the log continues in the file that has its name now, and the streams are those that the file names now.
fn hang_up(path: &Path, lenient: bool, before: &ReplicatorFile, reloader: &FileReloader, log: Option<&LogFile>) {
    if let Some(Err(error)) = log.map(LogFile::reopen) {
        error!("the log file cannot be opened again; continuing with the one that was open: {error}");
    }
    match ReplicatorFile::read(path, lenient) {
        Ok(now) => {
            if !now.has_streams_only(before) {
                warn!("SIGHUP: only `streams` is read again; restart for the other changes of {}", path.display());
            }
            if now.yaml.name == before.yaml.name {
                let documents = now.documents();
                info!(streams = documents.len(), "SIGHUP: read {} again", path.display());
                reloader.replace(documents);
            }
        }
        Err(problems) => {
            problems.iter().for_each(|problem| error!("{problem}"));
            error!("SIGHUP: {} is not valid; continuing with what was read before", path.display());
        }
    }
}

/// Checks the file, or runs it until a signal; returns the exit code.
pub(super) fn main(args: &Args) -> ExitCode {
    let file = match ReplicatorFile::read(args.path(), args.lenient) {
        Ok(file) => file,
        Err(problems) => return refuse(&problems),
    };
    if args.check.is_some() {
        return super::run_to_end(false, async |out| Ok(check(args.path(), &file, out).await));
    }
    let auth = match monitor_auth(args.monitor_auth.as_ref()) {
        Ok(auth) => auth,
        Err(problem) => return refuse(&[problem]),
    };
    let log = match start_log(args, &file) {
        Ok(log) => log,
        Err(problem) => return refuse(&[problem]),
    };
    file.notices.iter().for_each(|notice| warn!("{}:{notice}", args.path().display()));
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            error!("cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(app::run(args.settings(&file, auth, log))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!("{error:#}");
            ExitCode::from(if error.is::<app::Misconfigured>() { USAGE } else { 1 })
        }
    }
}

/// Starts the log; the file that it goes to, if it is one.
fn start_log(args: &Args, file: &ReplicatorFile) -> Result<Option<Arc<LogFile>>, String> {
    let level = if args.debug { "debug" } else { file.log_level() };
    let Some(path) = file.log_file() else {
        return telemetry::init(level, telemetry::Format::Text).map(|()| None);
    };
    let line = file.yaml.line("/logfile");
    let failed = |error| format!("{}:{line}: logfile: {}: {error}", args.path().display(), path.display());
    let log = Arc::new(LogFile::open(&path).map_err(failed)?);
    telemetry::init_file(level, log.clone())?;
    Ok(Some(log))
}

/// What both sides say to each stream.
async fn check(path: &Path, file: &ReplicatorFile, out: &mut Output) -> CommandVerdict {
    let path = path.display();
    for notice in &file.notices {
        out.line(&format!("{path}:{notice}"));
    }
    let mut verdict = CommandVerdict::Good;
    for (index, replication) in file.replications.iter().enumerate() {
        let others = file.replications.iter().filter(|other| other.id != replication.id);
        let known: Vec<_> = others
            .map(|other| OtherReplication {
                replication: other.clone(),
                source_server: String::new(),
                target_server: String::new(),
            })
            .collect();
        let streams = OwnStreams::default();
        let own = Own { site: &file.yaml.name, installation: "", streams: &streams };
        let until = Instant::now() + PREFLIGHT_WITHIN;
        let report = preflight::run(&AllowList::default(), &own, replication, &known, until).await;
        let findings = report.source.findings.iter().chain(&report.target.findings);
        for Finding { outcome, message, path: field, .. } in findings.filter(|finding| !finding.message.is_empty()) {
            let what = match outcome {
                CheckOutcome::Ok => continue,
                CheckOutcome::Warning | CheckOutcome::Unknown => "warning: ",
                CheckOutcome::Failed => {
                    verdict = CommandVerdict::Bad;
                    ""
                }
            };
            let pointer = format!("/streams/{index}{field}");
            let problem = YamlProblem::new(file.yaml.line(&pointer), &pointer, format!("{what}{message}"));
            out.line(&format!("{path}:{problem}"));
        }
    }
    let streams = file.replications.len();
    let word = if verdict == CommandVerdict::Good { "can run" } else { "cannot run as it is" };
    out.line(&format!("{path}: {word}; streams: {streams}"));
    verdict
}

#[expect(clippy::print_stderr, reason = "there is no log yet")]
fn refuse(problems: &[String]) -> ExitCode {
    for problem in problems {
        eprintln!("error: {problem}");
    }
    ExitCode::from(USAGE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replicate_is_the_default_command() {
        let check = |given: &str, expect: &str| {
            let words = |text: &str| text.split(' ').map(OsString::from).collect::<Vec<_>>();
            assert_eq!(with_default(words(given).into_iter()), words(expect), "{given}");
        };
        check("sr --config f", "sr replicate --config f");
        check("sr --config=f --debug", "sr replicate --config=f --debug");
        check("sr --debug replicate --config f", "sr replicate --debug --config f");
        check("sr --config f replicate", "sr replicate --config f");
        check("sr --config replicate", "sr replicate --config replicate");
        check("sr replicate --config f", "sr replicate --config f");
        check("sr serve --config f", "sr serve --config f");
        check("sr --version", "sr --version");
        check("sr", "sr");
    }
}
