//! What `top` shows: the rows, their last minutes, and what the keys did. Without a terminal.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, VecDeque},
    time::Instant,
};

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use crate::{
    cli::{status_filter::rank, status_view::state_name, watch::CopyRates},
    status::Row,
};

/// Points of a line.
pub(super) const POINTS: usize = 60;

/// Order of the rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(in crate::cli) enum TopSort {
    /// By state: held, invalid, stopped, retrying, in need of attention, starting, paused, running; then by lag
    Worst,
    /// The greatest lag first
    Lag,
    /// The oldest waiting message first
    Behind,
    /// The fastest first
    Rate,
    /// The most errors first
    Errors,
    /// By id
    Id,
}

impl TopSort {
    const ALL: [Self; 6] = [Self::Worst, Self::Lag, Self::Behind, Self::Rate, Self::Errors, Self::Id];

    /// The word in the heading.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Worst => "worst first",
            Self::Lag => "by lag",
            Self::Behind => "by age of the oldest message",
            Self::Rate => "by rate",
            Self::Errors => "by errors",
            Self::Id => "by id",
        }
    }

    fn next(self) -> Self {
        let at = Self::ALL.iter().position(|sort| *sort == self).unwrap_or_default();
        Self::ALL[(at + 1) % Self::ALL.len()]
    }
}

/// What a key asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Action {
    Nothing,
    Quit,
    /// A request about one replication.
    Change {
        endpoint: &'static str,
        id: String,
    },
}

/// What is in front.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Front {
    List,
    /// Everything about one replication, scrolled by so many lines.
    Detail {
        id: String,
        scrolled: u16,
    },
    Help,
    /// A filter is typed.
    Filter,
    /// Asks before a change; what was in front before comes back.
    Confirm {
        endpoint: &'static str,
        id: String,
        back: Box<Front>,
    },
}

/// One replication with its last minute.
#[derive(Debug)]
pub(super) struct TopRow {
    pub(super) row: Row,
    /// Messages per second.
    pub(super) rate: Option<f64>,
    /// The newest last; `None` where it was not known.
    pub(super) rates: VecDeque<Option<f64>>,
    pub(super) lags: VecDeque<Option<f64>>,
}

/// Everything that is shown.
#[derive(Debug)]
pub(super) struct TopState {
    pub(super) site: String,
    pub(super) server: String,
    pub(super) sort: TopSort,
    pub(super) filter: String,
    pub(super) front: Front,
    /// The answer to the last change, or why there is no new status.
    pub(super) message: Option<Result<String, String>>,
    /// Rows of the list that fit; set when it is drawn.
    pub(super) page: usize,
    /// The first row of the list that is seen.
    pub(super) first: usize,
    /// As they are sorted.
    rows: Vec<TopRow>,
    /// Stays the same when the order changes.
    selected: Option<String>,
    rates: CopyRates,
    stale: bool,
}

impl TopState {
    pub(super) fn new(site: String, server: String, sort: TopSort) -> Self {
        Self {
            site,
            server,
            sort,
            filter: String::new(),
            front: Front::List,
            message: None,
            page: 1,
            first: 0,
            rows: Vec::new(),
            selected: None,
            rates: CopyRates::default(),
            stale: false,
        }
    }

    /// Takes over a status, or the reason why there is none: the rows stay then.
    pub(super) fn update(&mut self, rows: Result<Vec<Row>, String>, now: Instant) {
        let rows = match rows {
            Ok(rows) => rows,
            Err(error) => {
                self.stale = true;
                self.message = Some(Err(error));
                return;
            }
        };
        if std::mem::take(&mut self.stale) {
            self.message = None;
        }
        let rates = self.rates.update(&rows, now);
        let mut before: BTreeMap<_, _> =
            std::mem::take(&mut self.rows).into_iter().map(|row| (row.row.replication.clone(), row)).collect();
        self.rows = rows
            .into_iter()
            .zip(rates)
            .map(|(row, rate)| {
                let (mut rates, mut lags) =
                    before.remove(&row.replication).map(|row| (row.rates, row.lags)).unwrap_or_default();
                push(&mut rates, rate);
                push(&mut lags, row.copy.lag.map(|lag| lag.messages as f64));
                TopRow { row, rate, rates, lags }
            })
            .collect();
        self.arrange();
    }

    /// The answer to a change.
    pub(super) fn answered(&mut self, answer: Result<String, String>) {
        self.message = Some(answer);
    }

    /// Whether what is shown is old, because the service does not answer.
    pub(super) fn is_stale(&self) -> bool {
        self.stale
    }

    /// The rows that fit the filter.
    pub(super) fn shown(&self) -> Vec<&TopRow> {
        let words: Vec<String> = self.filter.to_lowercase().split_whitespace().map(str::to_owned).collect();
        let fits = |row: &Row| {
            let leader = row.leader.as_deref().unwrap_or_default();
            let (source, target) = (&row.copy.source, &row.copy.target);
            let texts = [&row.replication, &state_name(row.state), leader, &source.stream, &target.stream];
            let text = texts.join("\n").to_lowercase();
            words.iter().all(|word| text.contains(word))
        };
        self.rows.iter().filter(|row| fits(&row.row)).collect()
    }

    /// Index of the selected row among those that are shown.
    pub(super) fn selected(&self) -> Option<usize> {
        let shown = self.shown();
        let found = self.selected.as_ref().and_then(|id| shown.iter().position(|row| row.row.replication == *id));
        found.or((!shown.is_empty()).then_some(0))
    }

    /// One row by its id.
    pub(super) fn row(&self, id: &str) -> Option<&TopRow> {
        self.rows.iter().find(|row| row.row.replication == id)
    }

    fn arrange(&mut self) {
        let millis = |value: Option<f64>| value.map(|value| (value * 1e3) as u64);
        let lag = |row: &TopRow| row.row.copy.lag.map(|lag| lag.messages);
        let behind = |row: &TopRow| millis(row.row.copy.lag.and_then(|lag| lag.seconds));
        self.rows.sort_by(|one, other| one.row.replication.cmp(&other.row.replication));
        match self.sort {
            TopSort::Worst => self.rows.sort_by_key(|row| (rank(&row.row), Reverse(lag(row)))),
            TopSort::Lag => self.rows.sort_by_key(|row| Reverse(lag(row))),
            TopSort::Behind => self.rows.sort_by_key(|row| Reverse(behind(row))),
            TopSort::Rate => self.rows.sort_by_key(|row| Reverse(millis(row.rate))),
            TopSort::Errors => self.rows.sort_by_key(|row| Reverse(row.row.copy.counters.errors)),
            TopSort::Id => {}
        }
    }

    /// Acts on a key.
    pub(super) fn key(&mut self, key: KeyEvent) -> Action {
        if key.modifiers.contains(KeyModifiers::CONTROL) && matches!(key.code, KeyCode::Char('c' | 'd')) {
            return Action::Quit;
        }
        match self.front.clone() {
            Front::Filter => self.type_filter(key.code),
            Front::Confirm { endpoint, id, back } => {
                self.front = *back;
                if matches!(key.code, KeyCode::Char('y' | 'Y')) {
                    self.message = Some(Ok(format!("asking to {endpoint} {id}...")));
                    return Action::Change { endpoint, id };
                }
                self.message = Some(Ok("nothing was changed".to_owned()));
            }
            Front::Help => self.front = Front::List,
            Front::Detail { id, scrolled } => return self.detail_key(key.code, id, scrolled),
            Front::List => return self.list_key(key.code),
        }
        Action::Nothing
    }

    fn type_filter(&mut self, code: KeyCode) {
        match code {
            KeyCode::Enter => self.front = Front::List,
            KeyCode::Esc => {
                self.filter.clear();
                self.front = Front::List;
            }
            KeyCode::Backspace => _ = self.filter.pop(),
            KeyCode::Char(character) if !character.is_control() => self.filter.push(character),
            _ => {}
        }
    }

    fn detail_key(&mut self, code: KeyCode, id: String, scrolled: u16) -> Action {
        let scrolled = match code {
            KeyCode::Char('q') => return Action::Quit,
            KeyCode::Esc | KeyCode::Enter | KeyCode::Left | KeyCode::Backspace => {
                self.front = Front::List;
                return Action::Nothing;
            }
            KeyCode::Char(letter @ ('p' | 'r' | 't')) => {
                self.confirm(letter, id);
                return Action::Nothing;
            }
            KeyCode::Down | KeyCode::Char('j') => scrolled.saturating_add(1),
            KeyCode::Up | KeyCode::Char('k') => scrolled.saturating_sub(1),
            KeyCode::PageDown | KeyCode::Char(' ') => scrolled.saturating_add(10),
            KeyCode::PageUp => scrolled.saturating_sub(10),
            KeyCode::Home => 0,
            _ => scrolled,
        };
        self.front = Front::Detail { id, scrolled };
        Action::Nothing
    }

    fn list_key(&mut self, code: KeyCode) -> Action {
        match code {
            KeyCode::Char('q') => return Action::Quit,
            KeyCode::Esc if self.filter.is_empty() => return Action::Quit,
            KeyCode::Esc => self.filter.clear(),
            KeyCode::Char('?' | 'h') => self.front = Front::Help,
            KeyCode::Char('/') => self.front = Front::Filter,
            KeyCode::Char('s') => {
                self.sort = self.sort.next();
                self.arrange();
            }
            KeyCode::Down | KeyCode::Char('j') => self.step(1),
            KeyCode::Up | KeyCode::Char('k') => self.step(-1),
            KeyCode::PageDown | KeyCode::Char(' ') => self.step(isize::try_from(self.page).unwrap_or(1)),
            KeyCode::PageUp => self.step(-isize::try_from(self.page).unwrap_or(1)),
            KeyCode::Home | KeyCode::Char('g') => self.step(isize::MIN / 2),
            KeyCode::End | KeyCode::Char('G') => self.step(isize::MAX / 2),
            KeyCode::Enter | KeyCode::Right => {
                if let Some(id) = self.selected_id() {
                    self.front = Front::Detail { id, scrolled: 0 };
                }
            }
            KeyCode::Char(letter @ ('p' | 'r' | 't')) => {
                if let Some(id) = self.selected_id() {
                    self.confirm(letter, id);
                }
            }
            _ => {}
        }
        Action::Nothing
    }

    fn confirm(&mut self, letter: char, id: String) {
        let endpoint = match letter {
            'p' => "pause",
            'r' => "resume",
            _ => "retry",
        };
        self.message = None;
        self.front = Front::Confirm { endpoint, id, back: Box::new(self.front.clone()) };
    }

    fn selected_id(&self) -> Option<String> {
        let index = self.selected()?;
        self.shown().get(index).map(|row| row.row.replication.clone())
    }

    fn step(&mut self, by: isize) {
        let shown = self.shown();
        let last = shown.len().saturating_sub(1);
        let to = self.selected().unwrap_or_default().saturating_add_signed(by).min(last);
        self.selected = shown.get(to).map(|row| row.row.replication.clone());
    }
}

fn push(points: &mut VecDeque<Option<f64>>, point: Option<f64>) {
    points.push_back(point);
    if points.len() > POINTS {
        points.pop_front();
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;

    pub(in crate::cli::top) fn row(id: &str, state: &str, copied: u64, lag: u64) -> Row {
        let todo = (state == "held").then_some("fix the cause");
        let error = (state == "held").then(|| {
            json!({"at": "2026-01-01T00:00:00Z", "kind": "hold", "message": "the stream is full\u{1b}[2J", "current": true})
        });
        let row = json!({"replication": id, "state": state, "origin": "kv", "leader": "one", "epoch": 1,
            "config_revision": 1, "source": {"stream": id}, "lag": {"messages": lag, "seconds": lag},
            "counters": {"copied": copied}, "do": todo, "last_error": error});
        serde_json::from_value(row).unwrap()
    }

    pub(in crate::cli::top) fn state(rows: Vec<Row>) -> TopState {
        let mut state = TopState::new("SITE".to_owned(), "nats://h".to_owned(), TopSort::Worst);
        state.update(Ok(rows), Instant::now());
        state
    }

    pub(in crate::cli::top) fn press(state: &mut TopState, keys: &str) -> Vec<Action> {
        let code = |letter| match letter {
            '\n' => KeyCode::Enter,
            '\u{1b}' => KeyCode::Esc,
            '\u{8}' => KeyCode::Backspace,
            letter => KeyCode::Char(letter),
        };
        keys.chars().map(|letter| state.key(KeyEvent::new(code(letter), KeyModifiers::NONE))).collect()
    }

    fn ids(state: &TopState) -> Vec<&str> {
        state.shown().into_iter().map(|row| row.row.replication.as_str()).collect()
    }

    fn many() -> Vec<Row> {
        vec![row("A", "running", 10, 1), row("B", "running", 10, 9), row("C", "held", 0, 0), row("D", "paused", 5, 3)]
    }

    #[test]
    fn rows_are_sorted_and_filtered() {
        let mut state = state(many());
        assert_eq!(ids(&state), ["C", "D", "B", "A"]);
        for expect in [["B", "D", "A", "C"], ["B", "D", "A", "C"], ["A", "B", "C", "D"], ["A", "B", "C", "D"]] {
            press(&mut state, "s");
            assert_eq!(ids(&state), expect, "{:?}", state.sort);
        }
        press(&mut state, "/hElx\u{8}\n");
        assert_eq!((ids(&state), state.filter.as_str()), (vec!["C"], "hEl"));
        assert_eq!(press(&mut state, "\u{1b}"), [Action::Nothing]);
        assert_eq!(ids(&state).len(), 4);
        assert_eq!(press(&mut state, "\u{1b}"), [Action::Quit]);
    }

    #[test]
    fn the_selection_follows_its_replication() {
        let mut state = state(many());
        press(&mut state, "jj");
        assert_eq!(state.selected_id().as_deref(), Some("B"));
        press(&mut state, "sss");
        assert_eq!(state.selected_id().as_deref(), Some("B"));
        press(&mut state, "G");
        assert_eq!(state.selected(), Some(3));
        press(&mut state, "gk");
        assert_eq!(state.selected(), Some(0));
        state.update(Ok(Vec::new()), Instant::now());
        assert_eq!((state.selected(), press(&mut state, "\np")), (None, vec![Action::Nothing, Action::Nothing]));
    }

    #[test]
    fn changes_are_asked_for_after_a_confirmation() {
        let mut state = state(many());
        for (key, endpoint) in [("p", "pause"), ("r", "resume"), ("t", "retry")] {
            assert_eq!(press(&mut state, key), [Action::Nothing]);
            assert_eq!(press(&mut state, "n"), [Action::Nothing]);
            assert_eq!(state.message, Some(Ok("nothing was changed".to_owned())));
            let expect = [Action::Nothing, Action::Change { endpoint, id: "C".to_owned() }];
            assert_eq!(press(&mut state, &format!("{key}y")), expect);
        }
        // From the details too, which stay in front.
        press(&mut state, "\npy");
        assert_eq!(state.front, Front::Detail { id: "C".to_owned(), scrolled: 0 });
        assert_eq!(press(&mut state, "q"), [Action::Quit]);
    }

    #[test]
    fn rates_and_lags_have_a_past() {
        let begin = Instant::now();
        let mut state = TopState::new(String::new(), String::new(), TopSort::Id);
        for second in 0..100 {
            state.update(Ok(vec![row("A", "running", second * 50, second)]), begin + Duration::from_secs(second));
        }
        let row = &state.rows[0];
        assert_eq!((row.rates.len(), row.lags.len(), row.rate), (POINTS, POINTS, Some(50.0)));
        assert_eq!(row.lags.back(), Some(&Some(99.0)));
        state.update(Err("no answer".to_owned()), begin);
        assert!(state.is_stale() && state.rows.len() == 1);
        state.update(Ok(Vec::new()), begin);
        assert_eq!((state.is_stale(), state.message.clone()), (false, None));
    }

    #[test]
    fn control_c_ends_it_everywhere() {
        let mut state = state(many());
        for keys in ["", "/", "\u{1b}?", "\n\n", "p"] {
            press(&mut state, keys);
            let key = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
            assert_eq!(state.key(key), Action::Quit, "{keys:?}");
        }
    }
}
