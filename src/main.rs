//! Arguments and exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    stream_replicator::cli::main()
}
