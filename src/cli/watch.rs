//! `status --watch`: a picture that is drawn again on a terminal, else a line for each change.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use chrono::Utc;
use serde_json::{Value, json};

use super::{
    client::Client,
    error::{CommandVerdict, Error},
    format::time,
    output::{Output, clean},
    status_filter::StatusFilter,
    status_table::{TableStyle, lines},
    status_view::{StatusView, line},
};
use crate::status::Row;

const EVERY: Duration = Duration::from_secs(1);

/// Runs until the output is closed, or the one watched replication is gone.
pub(super) async fn run(
    client: &Client,
    filter: &StatusFilter,
    style: TableStyle,
    out: &mut Output,
) -> Result<CommandVerdict, Error> {
    let mut first = true;
    let mut picture = Picture {
        only: filter.only_id().is_some(),
        style,
        drawn: false,
        lines: Vec::new(),
        rates: CopyRates::default(),
    };
    let mut changes = ChangedLines::default();
    let mut ticks = tokio::time::interval(EVERY);
    while !out.closed() {
        ticks.tick().await;
        let view = match StatusView::request(client, filter).await {
            Err(error) if first || error.code() == Some(404) => return Err(error),
            other => other,
        };
        first = false;
        if out.terminal() && !out.json() {
            picture.draw(client, view, out);
        } else {
            changes.print(view, out);
        }
    }
    Ok(CommandVerdict::Good)
}

/// The lines on the terminal.
struct Picture {
    /// Everything about one replication.
    only: bool,
    style: TableStyle,
    drawn: bool,
    lines: Vec<String>,
    rates: CopyRates,
}

impl Picture {
    fn draw(&mut self, client: &Client, view: Result<StatusView, Error>, out: &mut Output) {
        let room = out.size().map_or(usize::MAX, |(_, height)| height.saturating_sub(3));
        let heading = match view {
            Ok(view) => {
                let rates = self.rates.update(view.rows(), Instant::now());
                self.lines = lines(&view, self.only, Some(&rates), self.style, out).fit(room);
                format!("{}  {}  {}", time(Utc::now()), clean(&view.reply.value.site), client.server())
            }
            // what was seen last stays
            Err(error) => format!("{}  {}", time(Utc::now()), clean(&error.to_string())),
        };
        // home, long lines cut off, each line to its end, then everything below
        let mut picture = format!("\x1b[H\x1b[?7l{heading}\x1b[K\n\x1b[K\n");
        for line in self.lines.iter().take(room) {
            picture += &format!("{line}\x1b[K\n");
        }
        picture += "\x1b[?7h\x1b[J";
        if !self.drawn {
            picture.insert_str(0, "\x1b[2J");
        }
        self.drawn = true;
        out.text(&picture);
        out.flush();
    }
}

/// Messages per second since the answer before.
#[derive(Debug, Default)]
pub(super) struct CopyRates {
    /// Epoch and messages copied.
    before: BTreeMap<String, (u64, u64)>,
    at: Option<Instant>,
}

impl CopyRates {
    /// The rate of each row; `None` where the answer before does not say it.
    pub(super) fn update(&mut self, rows: &[Row], now: Instant) -> Vec<Option<f64>> {
        let passed = self.at.map(|at| now.duration_since(at).as_secs_f64()).filter(|passed| *passed > 0.0);
        let rate = |row: &Row| {
            let (epoch, copied) = self.before.get(&row.replication)?;
            // counters restart with each leader
            let more = row.copy.counters.copied.checked_sub(*copied).filter(|_| *epoch == row.epoch)?;
            Some(more as f64 / passed?)
        };
        let rates = rows.iter().map(rate).collect();
        self.before = rows.iter().map(|row| (row.replication.clone(), (row.epoch, row.copy.counters.copied))).collect();
        self.at = Some(now);
        rates
    }
}

/// The line that was printed last for each replication.
#[derive(Default)]
struct ChangedLines {
    printed: BTreeMap<String, (String, Value)>,
    error: String,
}

impl ChangedLines {
    fn print(&mut self, view: Result<StatusView, Error>, out: &mut Output) {
        let view = match view {
            Ok(view) => view,
            Err(error) => {
                let error = error.to_string();
                if error != self.error {
                    out.note(&format!("error: {error}"));
                    self.error = error;
                }
                return;
            }
        };
        self.error.clear();
        let mut now = BTreeMap::new();
        for (row, raw) in view.rows().iter().zip(view.raw_rows()) {
            let change = (line(&timeless(row)), timeless_value(raw.clone()));
            let before = self.printed.get(&row.replication);
            if out.json() {
                if before.is_none_or(|(_, before)| *before != change.1) {
                    out.value(&raw);
                }
            } else if before.is_none_or(|(before, _)| *before != change.0) {
                out.line(&format!("{} {}", time(Utc::now()), line(row)));
            }
            now.insert(row.replication.clone(), change);
        }
        for id in self.printed.keys().filter(|id| !now.contains_key(*id)) {
            if out.json() {
                out.value(&json!({"replication": id, "gone": true}));
            } else {
                out.line(&format!("{} {} is gone", time(Utc::now()), clean(id)));
            }
        }
        self.printed = now;
        out.flush();
    }
}

/// A row without the fields that change by the passing of time alone.
fn timeless(row: &Row) -> Row {
    let mut row = row.clone();
    if let Some(lag) = &mut row.copy.lag {
        lag.seconds = lag.seconds.map(|seconds| if seconds > 0.0 { 1.0 } else { 0.0 });
    }
    row
}

/// The same of a row as it was sent.
fn timeless_value(mut row: Value) -> Value {
    for seconds in ["/lag/seconds", "/headroom/seconds"] {
        if let Some(value) = row.pointer_mut(seconds) {
            *value = Value::Null;
        }
    }
    row
}
