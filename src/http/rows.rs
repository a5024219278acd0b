//! What a viewer gets: everything once, and after that what changed. Short, because a group may have thousands of replications:
//! rows are arrays, and texts that many rows share are sent once and named by their index. Pure.

use std::collections::{BTreeMap, HashMap};

use serde::{Serialize, Serializer};

use super::recent_events::RecentEvent;

/// Characters of an error in the list; the whole is in the details.
const LONGEST: usize = 200;
/// Texts that are kept beyond those that are in use, until all viewers get everything again.
const SPARE_TEXTS: usize = 2_000;

/// One replication, as it is shown.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct ShownRow {
    /// Its id.
    pub id: String,
    /// Its state.
    pub state: String,
    /// `copy`, `mirror` or `source`.
    pub kind: &'static str,
    /// The servers that messages come from; empty where that is not known.
    pub from: String,
    /// The stream there.
    pub from_stream: String,
    /// The servers that messages go to.
    pub to: String,
    /// The stream there.
    pub to_stream: String,
    /// The instance that runs it.
    pub leader: Option<String>,
    /// What to do.
    pub todo: Option<String>,
    /// The error that lasts.
    pub error: Option<String>,
    /// The settings in which the target differs, empty for none; `None` where that is not known.
    pub drift: Option<String>,
    /// What changes all the time.
    pub numbers: RowNumbers,
}

/// What changes all the time, rounded.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct RowNumbers {
    /// Messages per second.
    pub rate: Option<f64>,
    /// Messages that wait.
    pub lag: Option<u64>,
    /// Age of the oldest of them.
    pub lag_seconds: Option<u64>,
}

/// One instance, as it is shown.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct ShownInstance {
    /// Its name.
    pub instance: String,
    /// Its host.
    pub host: String,
    /// Its version.
    pub version: String,
    /// When it started.
    pub started: String,
    /// Seconds without a sign of life.
    pub silent: u64,
    /// How many replications it runs.
    pub leads: usize,
}

/// Everything at one time.
#[derive(Debug, Default)]
pub(super) struct GroupView {
    /// Sorted by id.
    pub rows: Vec<ShownRow>,
    /// All instances.
    pub instances: Vec<ShownInstance>,
}

/// What all viewers have got.
#[derive(Debug, Default)]
pub(super) struct SentView {
    texts: TextTable,
    rows: BTreeMap<String, SentRow>,
    instances: Vec<ShownInstance>,
    last_event: u64,
    next: u32,
}

#[derive(Debug)]
struct SentRow {
    /// Names the row in later messages.
    number: u32,
    row: ShownRow,
}

/// Texts by index; it only grows until everything begins again.
#[derive(Debug, Default)]
struct TextTable {
    index: HashMap<String, usize>,
    /// In the order of their indices.
    texts: Vec<String>,
}

/// A row on the wire.
struct WireRow<'a> {
    number: u32,
    row: &'a ShownRow,
    texts: [Option<usize>; 8],
    /// The last minutes of the rate and of the lag.
    lines: [String; 2],
}

impl Serialize for WireRow<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let [state, kind, from, to, leader, todo, error, drift] = self.texts;
        let [rate_line, lag_line] = &self.lines;
        let ShownRow { id, from_stream, to_stream, numbers, .. } = self.row;
        let names = (self.number, id, state, kind, from, from_stream, to);
        let same = if from_stream == to_stream { "" } else { to_stream };
        let RowNumbers { rate, lag, lag_seconds } = numbers;
        let numbers = (Number(*rate), lag, lag_seconds);
        (names, same, leader, todo, error, numbers, rate_line, lag_line, drift).serialize(serializer)
    }
}

/// Whole numbers without a fraction.
struct Number(Option<f64>);

impl Serialize for Number {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            None => serializer.serialize_none(),
            Some(value) if value.fract() == 0.0 && value.abs() < 1e15 => serializer.serialize_i64(value as i64),
            Some(value) => serializer.serialize_f64(value),
        }
    }
}

/// Where a snapshot is from.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct SnapshotOrigin<'a> {
    /// The site.
    pub site: &'a str,
    /// The instance that the viewer is connected to.
    pub instance: &'a str,
    /// When this process began to listen to events.
    pub since: &'a str,
    /// The stream that events before that were read from; `None` where none was.
    pub kept: Option<&'a str>,
}

#[derive(Serialize)]
struct WireMessage<'a> {
    #[serde(flatten)]
    origin: Option<SnapshotOrigin<'a>>,
    /// The index of the first of the texts.
    first: usize,
    texts: &'a [String],
    rows: Vec<WireRow<'a>>,
    numbers: Vec<(u32, Number, Option<u64>, Option<u64>)>,
    gone: Vec<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    instances: Option<&'a [ShownInstance]>,
    events: Vec<RecentEvent>,
}

impl TextTable {
    fn index(&mut self, text: &str) -> usize {
        if let Some(index) = self.index.get(text) {
            return *index;
        }
        let index = self.texts.len();
        self.texts.push(text.to_owned());
        self.index.insert(text.to_owned(), index);
        index
    }

    fn of_row(&mut self, row: &ShownRow) -> [Option<usize>; 8] {
        let ShownRow { state, kind, from, to, leader, todo, error, drift, .. } = row;
        let mut some = |text: Option<&str>| text.map(|text| self.index(text));
        let mut always = |text: &str| some(Some(text));
        let [state, kind, from, to] = [always(state), always(kind), always(from), always(to)];
        let [leader, todo, error, drift] = [leader, todo, error, drift].map(|text| some(text.as_deref()));
        [state, kind, from, to, leader, todo, error, drift]
    }
}

impl SentView {
    /// Whether so many texts are no longer in use that everything should be sent again.
    pub(super) fn is_worn(&self) -> bool {
        self.texts.texts.len() > 4 * self.rows.len() + SPARE_TEXTS
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        *self = Self { next: self.next, ..Self::default() };
    }

    /// Takes over a view; returns the message for those who have what was sent before, `None` if nothing changed.
    pub(super) fn update(&mut self, view: GroupView, events: Vec<RecentEvent>) -> Option<String> {
        let first = self.texts.texts.len();
        let mut before = std::mem::take(&mut self.rows);
        let (mut changed, mut numbers) = (Vec::new(), Vec::new());
        for mut row in view.rows {
            row.error = row.error.map(|error| error.chars().take(LONGEST).collect());
            let known = before.remove(&row.id);
            let number = known.as_ref().map_or_else(|| self.number(), |known| known.number);
            let id = row.id.clone();
            let same = known.as_ref().is_some_and(|known| known.row == row);
            let only_numbers = known.is_some_and(|known| ShownRow { numbers: row.numbers, ..known.row } == row);
            if !only_numbers {
                changed.push((id.clone(), self.texts.of_row(&row)));
            } else if !same {
                let RowNumbers { rate, lag, lag_seconds } = row.numbers;
                numbers.push((number, Number(rate), lag, lag_seconds));
            }
            self.rows.insert(id, SentRow { number, row });
        }
        let gone: Vec<u32> = before.into_values().map(|row| row.number).collect();
        let instances = (self.instances != view.instances).then_some(view.instances);
        let new_instances = instances.is_some();
        self.instances = instances.unwrap_or_else(|| std::mem::take(&mut self.instances));
        if changed.is_empty() && numbers.is_empty() && gone.is_empty() && !new_instances && events.is_empty() {
            return None;
        }
        self.last_event = events.last().map_or(self.last_event, |event| event.number);
        let rows = changed.into_iter().filter_map(|(id, texts)| {
            let SentRow { number, row } = self.rows.get(&id)?;
            Some(WireRow { number: *number, row, texts, lines: Default::default() })
        });
        Some(text(&WireMessage {
            origin: None,
            first,
            texts: &self.texts.texts[first..],
            rows: rows.collect(),
            numbers,
            gone,
            instances: new_instances.then_some(&self.instances),
            events,
        }))
    }

    /// The number of the newest event that was sent.
    pub(super) fn last_event(&self) -> u64 {
        self.last_event
    }

    /// Everything, for one who has nothing. `lines` draws the last minutes of a replication.
    pub(super) fn snapshot(
        &mut self,
        origin: SnapshotOrigin<'_>,
        events: Vec<RecentEvent>,
        lines: impl Fn(&str) -> [String; 2],
    ) -> String {
        let Self { texts, rows, instances, .. } = self;
        let rows: Vec<_> = rows
            .values()
            .map(|SentRow { number, row }| WireRow {
                number: *number,
                row,
                texts: texts.of_row(row),
                lines: lines(&row.id),
            })
            .collect();
        text(&WireMessage {
            origin: Some(origin),
            first: 0,
            texts: &texts.texts,
            rows,
            numbers: Vec::new(),
            gone: Vec::new(),
            instances: Some(instances),
            events,
        })
    }

    fn number(&mut self) -> u32 {
        self.next = self.next.wrapping_add(1);
        self.next
    }
}

fn text(message: &WireMessage<'_>) -> String {
    serde_json::to_string(message).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const ORIGIN: SnapshotOrigin<'_> =
        SnapshotOrigin { site: "SITE", instance: "one", since: "2026", kept: Some("EVENTS") };

    fn row(id: &str, state: &str, lag: u64) -> ShownRow {
        ShownRow {
            id: id.to_owned(),
            state: state.to_owned(),
            kind: "copy",
            from: "nats://a:4222".to_owned(),
            from_stream: id.to_owned(),
            to: "nats://b:4222".to_owned(),
            to_stream: format!("COPY_{id}"),
            numbers: RowNumbers { rate: Some(1.5), lag: Some(lag), lag_seconds: None },
            ..ShownRow::default()
        }
    }

    fn update(sent: &mut SentView, rows: Vec<ShownRow>) -> Option<Value> {
        let delta = sent.update(GroupView { rows, instances: Vec::new() }, Vec::new())?;
        Some(serde_json::from_str(&delta).unwrap())
    }

    #[test]
    fn only_changes_are_sent() {
        let mut sent = SentView::default();
        let first = update(&mut sent, vec![row("A", "running", 0), row("B", "running", 0)]).unwrap();
        assert_eq!(first["rows"].as_array().unwrap().len(), 2);
        assert_eq!(first["texts"], json!(["running", "copy", "nats://a:4222", "nats://b:4222"]));
        assert_eq!(update(&mut sent, vec![row("A", "running", 0), row("B", "running", 0)]), None);
        let lag = update(&mut sent, vec![row("A", "running", 5), row("B", "running", 0)]).unwrap();
        assert_eq!((&lag["rows"], &lag["numbers"]), (&json!([]), &json!([[1, 1.5, 5, null]])));
        let held = update(&mut sent, vec![row("A", "held", 5)]).unwrap();
        assert_eq!((&held["first"], &held["texts"], &held["gone"]), (&json!(4), &json!(["held"]), &json!([2])));
        let expect = json!([[[1, "A", 4, 1, 2, "A", 3], "COPY_A", null, null, null, [1.5, 5, null], "", "", null]]);
        assert_eq!(held["rows"], expect);
    }

    #[test]
    fn a_snapshot_and_deltas_have_the_same_indices() {
        let mut sent = SentView::default();
        update(&mut sent, vec![row("A", "running", 0)]);
        update(&mut sent, vec![row("A", "paused", 0)]);
        let snapshot: Value =
            serde_json::from_str(&sent.snapshot(ORIGIN, Vec::new(), |_| ["1|A".to_owned(), "2|B".to_owned()])).unwrap();
        assert_eq!((&snapshot["site"], &snapshot["first"]), (&json!("SITE"), &json!(0)));
        assert_eq!(snapshot["texts"][4], "paused");
        let first = &snapshot["rows"][0];
        assert_eq!(
            (&first[0][2], &first[6], &first[7], &first[8]),
            (&json!(4), &json!("1|A"), &json!("2|B"), &Value::Null)
        );
        assert_eq!((&snapshot["since"], &snapshot["kept"]), (&json!("2026"), &json!("EVENTS")));
        assert_eq!(update(&mut sent, vec![row("A", "running", 0)]).unwrap()["texts"], json!([]));
    }

    #[test]
    fn a_drift_is_sent_when_it_changes() {
        let mut sent = SentView::default();
        update(&mut sent, vec![row("A", "running", 0)]);
        let drift = |words: &str| ShownRow { drift: Some(words.to_owned()), ..row("A", "running", 0) };
        let found = update(&mut sent, vec![drift("max_age")]).unwrap();
        assert_eq!((&found["texts"], &found["rows"][0][8]), (&json!(["max_age"]), &json!(4)));
        assert_eq!(update(&mut sent, vec![drift("max_age")]), None);
        assert_eq!(update(&mut sent, vec![drift("")]).unwrap()["texts"], json!([""]));
    }

    #[test]
    fn texts_that_nobody_uses_do_not_pile_up() {
        let mut sent = SentView::default();
        for number in 0..100_000 {
            let error = Some(format!("{number} {}", "x".repeat(1_000)));
            update(&mut sent, vec![ShownRow { error, ..row("A", "retrying", 0) }]);
            if sent.is_worn() {
                sent.clear();
            }
        }
        assert!(sent.texts.texts.len() <= SPARE_TEXTS + 10, "{}", sent.texts.texts.len());
        assert!(sent.texts.texts.iter().all(|text| text.len() <= LONGEST));
    }
}
