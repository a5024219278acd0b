//! Command line. Exit codes: 0, 1 for errors while running, for what was refused or is not valid, 2 for wrong usage or
//! configuration.

mod adapter;
mod admin;
mod apply;
mod check;
mod choria_forms;
mod client;
mod config;
mod connection;
mod document;
mod edit;
mod error;
mod events;
mod files;
mod format;
mod generate;
mod global;
mod heartbeat;
mod instances;
mod output;
mod replicate;
mod reply;
mod select;
mod serve;
mod site;
mod status;
mod status_filter;
mod status_table;
mod status_view;
mod steer;
mod stream_reader;
mod transfer;
mod wait;
mod watch;
mod yaml;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

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
    after_help = "Exit codes: 0 done, 1 failed, refused or not valid, 2 wrong usage."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

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
    Check(check::Args),
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
    Instances(instances::Args),
    Events(events::Args),
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
    let cli = match Cli::try_parse_from(arguments) {
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
            Self::Check(args) => args.json(),
            Self::Pause(args) | Self::Resume(args) | Self::Retry(args) | Self::Stepdown(args) => args.global.json,
            Self::Position(args) => args.global.json,
            Self::Skip(args) => args.global.json,
            Self::Promote(args) => args.global.json,
            Self::Instances(args) => args.global.json,
            Self::Events(args) => args.global.json,
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
            Self::Check(args) => check::run(args, out).await,
            Self::Pause(args) => steer::each(args, "pause", "is paused", out).await,
            Self::Resume(args) => steer::each(args, "resume", "is resumed", out).await,
            Self::Position(args) => steer::position(args, out).await,
            Self::Retry(args) => steer::each(args, "retry", "is tried again", out).await,
            Self::Stepdown(args) => steer::stepdown(args, out).await,
            Self::Skip(args) => steer::skip(args, out).await,
            Self::Promote(args) => steer::promote(args, out).await,
            Self::Instances(args) => instances::run(args, out).await,
            Self::Events(args) => events::run(args, out).await,
            Self::Adapter(args) => adapter::run(args, out).await,
            Self::Admin(args) => admin::run(args, out).await,
            Self::Heartbeat(args) => heartbeat::run(args, out).await,
            Self::Site(args) => site::run(args, out).await,
            Self::Completions(args) => Ok(generate::completions(args, Cli::command(), out)),
            Self::Man(args) => generate::man(args, Cli::command(), out),
        }
    }
}
