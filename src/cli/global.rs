//! Flags of all commands that ask the service, and the names that flags take.

use super::connection::RequestFlags;
use crate::names;

#[derive(Debug, clap::Args)]
pub(super) struct Global {
    /// Print JSON: the answer as the service sent it
    #[arg(long, global = true)]
    pub(super) json: bool,

    /// Subject prefix of the service
    #[arg(
        long,
        global = true,
        value_name = "SUBJECT",
        env = "STREAM_REPLICATOR_PREFIX",
        hide_env_values = true,
        default_value = names::DEFAULT_PREFIX,
        value_parser = prefix,
        help_heading = "Connection"
    )]
    pub(super) prefix: String,

    /// Print each request and each reply on stderr
    #[arg(long, global = true)]
    pub(super) trace: bool,

    #[command(flatten)]
    pub(super) asking: RequestFlags,
}

fn prefix(text: &str) -> Result<String, String> {
    checked(text, names::check_prefix)
}

/// Name of a site.
pub(super) fn site(text: &str) -> Result<String, String> {
    checked(text, names::check_token)
}

/// Prefix of the names of buckets.
pub(super) fn bucket_prefix(text: &str) -> Result<String, String> {
    checked(text, names::check_bucket_prefix)
}

fn checked(text: &str, check: fn(&str) -> Result<(), &'static str>) -> Result<String, String> {
    check(text).map_err(|right| format!("it must be {right}"))?;
    Ok(text.to_owned())
}
