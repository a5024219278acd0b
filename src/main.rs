//! Arguments and exit code.

use std::process::ExitCode;

// glibc's allocator keeps the room of large messages; this one gives it back.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    stream_replicator::cli::main()
}
