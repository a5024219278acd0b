//! Command line. Exit codes: 0, 1 for errors while running, for what was refused or is not valid, 2 for wrong usage or
//! configuration.

mod adapter;
mod add;
mod admin;
mod apply;
mod assign;
mod check;
mod choria_forms;
mod client;
mod config;
mod connection;
mod consumers;
mod diff;
mod dlq;
mod doctor;
mod document;
mod drift;
mod edit;
mod error;
mod events;
mod files;
mod format;
mod generate;
mod global;
mod heartbeat;
mod instances;
mod link;
mod output;
mod progress;
mod replicate;
mod reply;
mod report;
mod select;
mod serve;
mod site;
mod status;
mod status_filter;
mod status_table;
mod status_view;
mod steer;
mod stream_reader;
mod template;
mod top;
mod transfer;
mod validation;
mod verify;
mod wait;
mod watch;
mod yaml;

use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand, error::ErrorKind, parser::ValueSource};

use self::{
    error::{CommandVerdict, Error},
    output::Output,
};

/// Copies NATS JetStream streams between independent clusters: in order, without loss, without duplicates
#[derive(Debug, Parser)]
#[command(
    name = crate::names::PROGRAM,
    version = crate::names::VERSION,
    propagate_version = true,
    after_help = "Flags for the output and the connection may be in front of the command or after it; the help of each \
                  command has them.\n\nExit codes: 0 done, 1 failed, refused or not valid, 2 wrong usage."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,

    /// So that they may be in front of the command too; each command has its own, with the same values.
    #[command(flatten)]
    _global: global::Global,
}

/// The definition of the command line. The flags of all commands are in the help of each, which also reads the environment.
fn command() -> clap::Command {
    Cli::command().mut_args(|argument| argument.hide(true).env(clap::builder::Resettable::Reset))
}

/// Reads the arguments; flags in front of a command that has no use for them are wrong too.
fn parse(arguments: Vec<std::ffi::OsString>) -> Result<Cli, clap::Error> {
    let mut matches = command().try_get_matches_from(arguments)?;
    if let Some((name, given)) = matches.subcommand() {
        let useless: &[&str] = match name {
            "serve" => &["json", "timeout", "trace", "connection_name"],
            "replicate" | "completions" | "man" => GLOBAL_FLAGS,
            _ => &[],
        };
        let is_given = |id: &&&str| given.value_source(id) == Some(ValueSource::CommandLine);
        if let Some(id) = useless.iter().find(is_given) {
            let flag = id.replace('_', "-");
            let message = format!("`--{flag}` has no effect with `{name}`: remove it");
            return Err(command().error(ErrorKind::ArgumentConflict, message));
        }
    }
    Cli::from_arg_matches_mut(&mut matches)
}

/// The ids of all flags that may be in front of a command.
const GLOBAL_FLAGS: &[&str] = &[
    "json",
    "prefix",
    "trace",
    "server",
    "user",
    "password",
    "token",
    "creds",
    "nkey",
    "jwt",
    "seed",
    "tlscert",
    "tlskey",
    "tlsca",
    "tlsfirst",
    "context",
    "no_context",
    "socks_proxy",
    "js_domain",
    "js_api_prefix",
    "inbox_prefix",
    "timeout",
    "connection_name",
];

#[derive(Debug, Subcommand)]
enum Command {
    Serve(Box<serve::Args>),
    Replicate(replicate::Args),
    #[command(flatten)]
    Other(Box<ClientCommand>),
}

/// Commands that end by themselves.
#[derive(Debug, Subcommand)]
enum ClientCommand {
    Config(config::Args),
    Status(status::Args),
    Report(report::Args),
    Drift(drift::Args),
    Top(top::Args),
    Check(check::Args),
    Doctor(doctor::Args),
    /// Stop copying and keep the position, also over restarts
    Pause(steer::IdsArgs),
    /// Resume after a pause
    Resume(steer::IdsArgs),
    Position(steer::PositionArgs),
    /// Try held replications again now
    Retry(steer::IdsArgs),
    /// Hand a replication over to another instance
    Stepdown(steer::IdsArgs),
    Skip(steer::SkipArgs),
    Promote(steer::PromoteArgs),
    Consumers(consumers::Args),
    Dlq(dlq::Args),
    Verify(verify::Args),
    Instances(instances::Args),
    Events(events::Args),
    Link(link::Args),
    Adapter(adapter::Args),
    Admin(admin::Args),
    Heartbeat(heartbeat::Args),
    Site(site::Args),
    Completions(generate::CompletionsArgs),
    Man(generate::ManArgs),
}

/// Runs the program with the process's arguments.
pub fn main() -> ExitCode {
    let arguments = replicate::with_default(std::env::args_os());
    let verb = arguments.iter().skip(1).find(|argument| !argument.to_string_lossy().starts_with('-'));
    let is_check = verb.is_some_and(|verb| verb == "check");
    let cli = match parse(arguments) {
        Ok(cli) => cli,
        Err(error) => return wrong_usage(&error, is_check),
    };
    match cli.command {
        Command::Serve(args) => serve::main(&args),
        Command::Replicate(args) => replicate::main(&args),
        Command::Other(command) => run_to_end(command.json(), async |out| command.run(out).await),
    }
}

/// Prints help, the version, or what is wrong with the arguments. A monitoring system takes 2 for a critical state.
fn wrong_usage(error: &clap::Error, is_check: bool) -> ExitCode {
    // a closed output is no error
    let _ = error.print();
    match error.exit_code() {
        0 => ExitCode::SUCCESS,
        _ if is_check => ExitCode::from(check::UNKNOWN),
        _ => ExitCode::from(error::USAGE),
    }
}

/// Runs a command that ends by itself; returns the exit code.
fn run_to_end(json: bool, command: impl AsyncFnOnce(&mut Output) -> Result<CommandVerdict, Error>) -> ExitCode {
    let mut out = Output::new(json);
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            out.note(&format!("error: cannot start: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let verdict = runtime.block_on(command(&mut out));
    // do not wait for an outstanding answer
    runtime.shutdown_background();
    let code = match verdict {
        Ok(CommandVerdict::Good) => ExitCode::SUCCESS,
        Ok(CommandVerdict::Bad) => ExitCode::FAILURE,
        Ok(CommandVerdict::Code(code)) => ExitCode::from(code),
        Err(error) => {
            error.print(&mut out);
            error.exit_code()
        }
    };
    match out.finish() {
        None => code,
        Some(error) => {
            out.note(&format!("error: cannot write to stdout: {error}"));
            ExitCode::FAILURE
        }
    }
}

impl ClientCommand {
    /// Whether the output is for a program.
    fn json(&self) -> bool {
        match self {
            Self::Config(args) => args.global().json,
            Self::Status(args) => args.json(),
            Self::Report(args) => args.global.json,
            Self::Drift(args) => args.global.json,
            Self::Top(args) => args.global.json,
            Self::Check(args) => args.json(),
            Self::Doctor(args) => args.json(),
            Self::Pause(args) | Self::Resume(args) | Self::Retry(args) | Self::Stepdown(args) => args.global.json,
            Self::Position(args) => args.global.json,
            Self::Skip(args) => args.global.json,
            Self::Promote(args) => args.global.json,
            Self::Consumers(args) => args.global().json,
            Self::Dlq(args) => args.global().json,
            Self::Verify(args) => args.global.json,
            Self::Instances(args) => args.global.json,
            Self::Events(args) => args.global.json,
            Self::Link(args) => args.global().json,
            Self::Adapter(args) => args.global().json,
            Self::Admin(args) => args.json(),
            Self::Heartbeat(args) => args.global().json,
            Self::Site(args) => args.global().json,
            Self::Completions(_) | Self::Man(_) => false,
        }
    }

    async fn run(&self, out: &mut Output) -> Result<CommandVerdict, Error> {
        match self {
            Self::Config(args) => config::run(args, out).await,
            Self::Status(args) => status::run(args, out).await,
            Self::Report(args) => report::run(args, out).await,
            Self::Drift(args) => drift::run(args, out).await,
            Self::Top(args) => top::run(args, out).await,
            Self::Check(args) => check::run(args, out).await,
            Self::Doctor(args) => doctor::run(args, out).await,
            Self::Pause(args) => steer::each(args, "pause", "is paused", out).await,
            Self::Resume(args) => steer::each(args, "resume", "is resumed", out).await,
            Self::Position(args) => steer::position(args, out).await,
            Self::Retry(args) => steer::each(args, "retry", "is tried again", out).await,
            Self::Stepdown(args) => steer::stepdown(args, out).await,
            Self::Skip(args) => steer::skip(args, out).await,
            Self::Promote(args) => steer::promote(args, out).await,
            Self::Consumers(args) => consumers::run(args, out).await,
            Self::Dlq(args) => dlq::run(args, out).await,
            Self::Verify(args) => verify::run(args, out).await,
            Self::Instances(args) => instances::run(args, out).await,
            Self::Events(args) => events::run(args, out).await,
            Self::Link(args) => link::run(args, out).await,
            Self::Adapter(args) => adapter::run(args, out).await,
            Self::Admin(args) => admin::run(args, out).await,
            Self::Heartbeat(args) => heartbeat::run(args, out).await,
            Self::Site(args) => site::run(args, out).await,
            Self::Completions(args) => Ok(generate::completions(args, command(), out)),
            Self::Man(args) => generate::man(args, command(), out),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flag_of_all_commands_is_known_by_its_id() {
        let command = command();
        let mut ids: Vec<_> = command.get_arguments().map(|argument| argument.get_id().as_str()).collect();
        let mut known = GLOBAL_FLAGS.to_vec();
        ids.sort_unstable();
        known.sort_unstable();
        assert_eq!(ids, known);
        assert!(command.get_arguments().all(|argument| argument.is_global_set()));
        command.debug_assert();
    }
}
