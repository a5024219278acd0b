//! What all commands that ask the service have in common.

use std::time::Duration;

use super::connection::Connection;
use crate::{config::parse_duration, names};

/// How long a command waits for an answer: the service answers within 3 s.
pub(super) const ANSWER_WITHIN: Duration = Duration::from_secs(5);

#[derive(Debug, clap::Args)]
pub(super) struct Global {
    #[command(flatten, next_help_heading = "Connection")]
    pub(super) connection: Connection,

    /// Subject prefix of the service
    #[arg(
        long,
        value_name = "SUBJECT",
        env = "STREAM_REPLICATOR_PREFIX",
        hide_env_values = true,
        default_value = names::DEFAULT_PREFIX,
        value_parser = prefix,
        global = true,
        help_heading = "Connection"
    )]
    pub(super) prefix: String,

    /// How long to wait for an answer, and for what is waited for [default: 5s for an answer]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, global = true)]
    pub(super) timeout: Option<Duration>,

    /// Print JSON: the answer as the service sent it
    #[arg(long, global = true)]
    pub(super) json: bool,
}

impl Global {
    /// How long to wait for one answer.
    pub(super) fn answer_within(&self) -> Duration {
        self.timeout.unwrap_or(ANSWER_WITHIN)
    }
}

fn prefix(text: &str) -> Result<String, String> {
    names::check_prefix(text).map_err(|right| format!("it must be {right}"))?;
    Ok(text.to_owned())
}
