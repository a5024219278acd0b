//! Logging: what is written to standard error, and how.

use std::{
    fmt,
    fs::{File, OpenOptions},
    io::{self, Write},
    panic,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use chrono::SecondsFormat;
use nats_lane::entropy;
use serde_json::{Map, Value};
use tracing::{
    Event, Level, Metadata, Subscriber, error,
    field::{Field, Visit},
};
use tracing_subscriber::{
    EnvFilter,
    filter::filter_fn,
    fmt::{FmtContext, FormatEvent, FormatFields, format::Writer},
    layer::SubscriberExt,
    registry::LookupSpan,
    util::SubscriberInitExt,
};

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

/// Logs to a file from now on, panics too: one JSON object per line with `level`, `msg`, `time` (RFC 3339) and the fields of
/// the line. `level` is as for [`init`].
pub fn init_file(level: &str, file: Arc<LogFile>) -> Result<(), String> {
    let registry = tracing_subscriber::registry().with(filter(level)?).with(filter_fn(shows_no_payload));
    let lines = tracing_subscriber::fmt::layer().with_writer(file).event_format(JsonLines);
    registry.with(lines).try_init().map_err(|error| error.to_string())?;
    panic::set_hook(Box::new(|panic| error!("{panic}")));
    Ok(())
}

/// A log file that is only ever appended to, so that it can be truncated under us.
#[derive(Debug)]
pub struct LogFile {
    path: PathBuf,
    file: Mutex<File>,
}

impl LogFile {
    /// Opens the file, or creates it.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), file: Mutex::new(append(path)?) })
    }

    /// Continues in the file that has the name now; if that fails, in the one that was open.
    pub fn reopen(&self) -> io::Result<()> {
        let file = append(&self.path)?;
        *self.lock() = file;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, File> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).open(path)
}

impl Write for &LogFile {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.lock().write(line)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.lock().flush()
    }
}

/// The lines of a log file.
struct JsonLines;

impl<S, N> FormatEvent<S, N> for JsonLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut fields = LineFields(Map::new());
        event.record(&mut fields);
        let level = match *event.metadata().level() {
            Level::ERROR => "error",
            Level::WARN => "warning",
            Level::INFO => "info",
            Level::DEBUG => "debug",
            Level::TRACE => "trace",
        };
        let mut line = fields.0;
        line.insert("level".to_owned(), level.into());
        line.insert("time".to_owned(), entropy::now().to_rfc3339_opts(SecondsFormat::Millis, true).into());
        writeln!(writer, "{}", Value::Object(line))
    }
}

/// The fields of one line; the text is `msg`.
struct LineFields(Map<String, Value>);

impl LineFields {
    fn put(&mut self, field: &Field, value: Value) {
        let name = if field.name() == "message" { "msg" } else { field.name() };
        self.0.insert(name.to_owned(), value);
    }
}

impl Visit for LineFields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, format!("{value:?}").into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value.into());
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, value.into());
    }
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
