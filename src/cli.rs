//! Command line. Exit codes: 0, 1 for errors while running, 2 for wrong usage or configuration.

mod connection;
mod serve;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Copies NATS JetStream streams between independent clusters: in order, without loss, without duplicates.
#[derive(Debug, Parser)]
#[command(name = crate::names::PROGRAM, version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(Box<serve::Args>),
}

/// Runs the program with the process's arguments.
pub fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Serve(args) => serve::main(&args),
    }
}
