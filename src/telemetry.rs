//! Logging: what is written to standard error, and how.

use std::{io, panic};

use tracing::{Level, Metadata, error};
use tracing_subscriber::{EnvFilter, filter::filter_fn, layer::SubscriberExt, util::SubscriberInitExt};

/// How log lines look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// Logs to standard error from now on, panics too. `level` is `error`, `warn`, `info`, `debug`, `trace` or a filter of the
/// form `info,stream_replicator::copy=debug`.
pub fn init(level: &str, format: Format) -> Result<(), String> {
    let filter = filter(level)?;
    let registry = tracing_subscriber::registry().with(filter).with(filter_fn(shows_no_payload));
    let lines = tracing_subscriber::fmt::layer().with_writer(io::stderr);
    let done = match format {
        Format::Text => registry.with(lines.with_ansi(false)).try_init(),
        Format::Json => registry.with(lines.json().flatten_event(true)).try_init(),
    };
    done.map_err(|error| error.to_string())?;
    panic::set_hook(Box::new(|panic| error!("{panic}")));
    Ok(())
}

/// The NATS client traces whole messages, and so documents with passwords: no filter brings that into the log.
fn shows_no_payload(line: &Metadata<'_>) -> bool {
    *line.level() != Level::TRACE || !line.target().starts_with("async_nats")
}

/// A plain level is about this program: libraries say less, and the NATS client, which repeats itself while a
/// server is away and whose events we log ourselves, says nothing before `debug`.
fn filter(level: &str) -> Result<EnvFilter, String> {
    let directives = match level {
        "error" | "warn" | "info" => format!("{level},async_nats=off"),
        "debug" | "trace" => format!("info,stream_replicator={level},nats_lane={level},async_nats=debug"),
        other => other.to_owned(),
    };
    let wrong = |why: String| {
        format!("log level `{level}` is not `error`, `warn`, `info`, `debug`, `trace` or a filter: {why}")
    };
    if level.is_empty() {
        return Err(wrong("it is empty".to_owned()));
    }
    // A lone word is taken for a target by the filter language: `--log-level inof` would log nothing at all.
    let is_word = !level.contains(['=', ',', ':', '[']);
    if is_word && !matches!(level, "error" | "warn" | "info" | "debug" | "trace" | "off") {
        return Err(wrong("there is no such level".to_owned()));
    }
    EnvFilter::builder().parse(directives).map_err(|error| wrong(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_and_filters_are_understood() {
        for good in ["error", "warn", "info", "debug", "trace", "off", "info,stream_replicator::copy=debug"] {
            assert!(filter(good).is_ok(), "{good}");
        }
    }

    #[test]
    fn a_misspelt_level_is_an_error() {
        for bad in ["", "inof", "INFO!", "stream_replicator=loud"] {
            assert!(filter(bad).is_err(), "{bad}");
        }
    }
}
