//! Where a command finds the service, and as whom: flags, the environment and contexts, as the `nats` tool has them.

use crate::config::Endpoint;

/// The connection of a command.
#[derive(Debug, clap::Args)]
pub(super) struct Connection {
    /// NATS servers to ask: `nats://[user:password@]host[:port][,host...][?credentials=FILE&nkey=FILE&...]`
    #[arg(long, short, value_name = "URL[,URL]", env = "NATS_URL", hide_env_values = true, global = true)]
    server: Option<String>,
}

impl Connection {
    /// Everything that was given, put together; the error names the flag or the file, never a secret.
    pub(super) fn endpoint(&self) -> Result<Endpoint, String> {
        let server = self.server.as_deref().unwrap_or("nats://127.0.0.1:4222");
        Endpoint::parse(server).map_err(|error| format!("`--server`: {error}"))
    }
}
