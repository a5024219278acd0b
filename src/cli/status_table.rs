//! The status of many replications: a table that fits the terminal, what to do, and a line that sums it up.

use super::{
    format::{count, seconds},
    output::{Output, Table, clean},
    status_view::{
        StatusView, current_error, detail, error_age, known, leader, rate, state_colour, state_name, transport,
    },
};
use crate::status::{Row, State};

/// Width of the text of an error where nothing says how wide the output is.
const ERROR_WIDTH: usize = 70;
/// Below this the text of an error says nothing: other columns are dropped first.
const LEAST_ERROR_WIDTH: usize = 24;
/// Lines of what to do, at most.
const MOST_TODOS: usize = 8;
/// Ids in one line, at most.
const MOST_IDS: usize = 5;

/// How much a table shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TableStyle {
    /// What fits.
    Fitted,
    /// All columns and whole texts.
    Wide,
}

/// Lines for people.
#[derive(Debug)]
pub(super) struct StatusLines {
    /// The header and one line for each replication, or everything about one.
    rows: Vec<String>,
    /// Whether the first of them is a header that stays.
    is_table: bool,
    /// What to do.
    todos: Vec<String>,
    /// The line that sums it up.
    footer: Option<String>,
}

impl StatusLines {
    /// The lines that fit into so many: first the advice is cut off, then the rows.
    pub(super) fn fit(self, room: usize) -> Vec<String> {
        let Self { mut rows, is_table, mut todos, footer } = self;
        let footer = footer.into_iter().flat_map(|footer| [String::new(), footer]).collect::<Vec<_>>();
        if is_table && rows.len() + footer.len() + todos.len() > room {
            todos.truncate(room.saturating_sub(rows.len() + footer.len()).max(2));
            let most = room.saturating_sub(footer.len() + todos.len() + 1).max(2);
            if rows.len() > most + 1 {
                let more = rows.len() - most;
                rows.truncate(most);
                rows.push(format!("{} more", count(more as u64)));
            }
        }
        rows.into_iter().chain(todos).chain(footer).collect()
    }
}

/// The output for people: everything about one replication, or a table. `rates` are messages per second, in the order
/// of the rows.
pub(super) fn lines(
    view: &StatusView,
    only: bool,
    rates: Option<&[Option<f64>]>,
    style: TableStyle,
    out: &Output,
) -> StatusLines {
    let rows = view.rows();
    if let ([row], true) = (rows, only) {
        let rows = detail(row, rates.and_then(|rates| *rates.first()?), out);
        return StatusLines { rows, is_table: false, todos: Vec::new(), footer: None };
    }
    let width = out.size().map(|(width, _)| width).filter(|_| style == TableStyle::Fitted);
    StatusLines {
        rows: out.render(&table(rows, rates, style, width)),
        is_table: true,
        todos: todos(rows),
        footer: (!rows.is_empty()).then(|| footer(rows)),
    }
}

/// One row, and what is shown with it.
struct TableRow<'a> {
    row: &'a Row,
    rate: Option<f64>,
}

/// When a column is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shown {
    Always,
    /// The greater number is dropped first where the terminal is too narrow.
    UnlessNarrow(u8),
    WithRates,
    Wide,
}

struct StatusColumn {
    header: &'static str,
    right: bool,
    shown: Shown,
    cell: fn(&TableRow<'_>) -> String,
}

const fn column(header: &'static str, right: bool, shown: Shown, cell: fn(&TableRow<'_>) -> String) -> StatusColumn {
    StatusColumn { header, right, shown, cell }
}

/// The last one is cut to the width that is left.
const COLUMNS: [StatusColumn; 13] = [
    column("REPLICATION", false, Shown::Always, |r| r.row.replication.clone()),
    column("STATE", false, Shown::Always, |r| state_name(r.row.state)),
    column("LAG", true, Shown::Always, |r| known(r.row.copy.lag.map(|lag| count(lag.messages)))),
    column("BEHIND", true, Shown::UnlessNarrow(1), |r| known(r.row.copy.lag.and_then(|lag| lag.seconds).map(seconds))),
    column("POSITION", true, Shown::UnlessNarrow(2), |r| {
        known(r.row.knows_position().then(|| count(r.row.copy.position.source_seq)))
    }),
    column("RATE", true, Shown::WithRates, |r| rate(r.rate)),
    column("SOURCE", false, Shown::Wide, |r| r.row.copy.source.stream.clone()),
    column("TARGET", false, Shown::Wide, |r| r.row.copy.target.stream.clone()),
    column("EPOCH", true, Shown::Wide, |r| r.row.epoch.to_string()),
    column("ERRORS", true, Shown::Wide, |r| count(r.row.copy.counters.errors)),
    column("TRANSPORT", false, Shown::UnlessNarrow(4), |r| transport(r.row.copy.transport).to_owned()),
    column("LEADER", false, Shown::UnlessNarrow(3), |r| leader(r.row)),
    column("LAST ERROR", false, Shown::Always, |r| {
        current_error(r.row).map_or_else(String::new, |error| format!("{} ago: {}", error_age(error), error.message))
    }),
];

fn table(rows: &[Row], rates: Option<&[Option<f64>]>, style: TableStyle, width: Option<usize>) -> Table {
    let with_rate = |(index, row)| TableRow { row, rate: rates.and_then(|rates| rates.get(index).copied().flatten()) };
    let cells: Vec<Vec<String>> = rows
        .iter()
        .enumerate()
        .map(with_rate)
        .map(|row| COLUMNS.iter().map(|column| clean(&(column.cell)(&row))).collect())
        .collect();
    let mut shown: Vec<usize> = (0..COLUMNS.len())
        .filter(|index| match COLUMNS[*index].shown {
            Shown::Always | Shown::UnlessNarrow(_) => true,
            Shown::WithRates => rates.is_some(),
            Shown::Wide => style == TableStyle::Wide,
        })
        .collect();
    let error = COLUMNS.len() - 1;
    let error_width = match (style, width) {
        (TableStyle::Wide, _) => usize::MAX,
        (_, None) => ERROR_WIDTH,
        (_, Some(width)) => drop_columns(&mut shown, &cells, width),
    };
    let right: Vec<_> = (0..shown.len()).filter(|at| COLUMNS[shown[*at]].right).collect();
    let headers: Vec<_> = shown.iter().map(|index| COLUMNS[*index].header).collect();
    let mut table = Table::new(&headers).right(&right).painted(1);
    for (row, mut cells) in rows.iter().zip(cells) {
        cells[error] = shortened(&cells[error], error_width);
        let cells = shown.iter().map(|index| std::mem::take(&mut cells[*index])).collect();
        table.row(state_colour(row.state), cells);
    }
    table
}

/// Drops the least important columns until the others fit; returns the width that is left for the last one.
fn drop_columns(shown: &mut Vec<usize>, cells: &[Vec<String>], width: usize) -> usize {
    let column_width = |index: usize| {
        let widest = cells.iter().map(|row| row[index].chars().count()).max().unwrap_or_default();
        widest.max(COLUMNS[index].header.len())
    };
    let last = column_width(COLUMNS.len() - 1);
    loop {
        let others: usize = shown.iter().rev().skip(1).map(|index| column_width(*index) + 2).sum();
        let left = width.saturating_sub(others);
        let priority = |at: &usize| match COLUMNS[shown[*at]].shown {
            Shown::UnlessNarrow(priority) => priority,
            _ => 0,
        };
        let droppable = (0..shown.len()).filter(|at| priority(at) > 0).max_by_key(priority);
        match droppable {
            Some(at) if left < last.min(LEAST_ERROR_WIDTH) => shown.remove(at),
            _ => return left.max(COLUMNS[COLUMNS.len() - 1].header.len()),
        };
    }
}

/// A text that is no longer than so many characters.
fn shortened(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some(_) => text.chars().take(most.saturating_sub(3)).chain("...".chars()).collect(),
        None => text.to_owned(),
    }
}

/// What to do, once for each text, with the ids that it is about.
fn todos(rows: &[Row]) -> Vec<String> {
    let mut groups: Vec<(&str, Vec<&str>)> = Vec::new();
    for row in rows.iter().filter(|row| row.state != State::Paused) {
        let Some(todo) = row.todo.as_deref() else { continue };
        match groups.iter_mut().find(|(text, _)| *text == todo) {
            Some((_, ids)) => ids.push(&row.replication),
            None => groups.push((todo, vec![&row.replication])),
        }
    }
    if groups.is_empty() {
        return Vec::new();
    }
    let lines = groups.iter().take(MOST_TODOS).map(|(todo, ids)| clean(&format!("do: {todo} ({})", named(ids))));
    let more = groups.len().saturating_sub(MOST_TODOS);
    let more = (more > 0).then(|| format!("do: {more} more; `status ID` shows each"));
    std::iter::once(String::new()).chain(lines).chain(more).collect()
}

/// The first ids, and how many more there are.
fn named(ids: &[&str]) -> String {
    let more = ids.len().saturating_sub(MOST_IDS);
    let more = if more > 0 { format!(", {} more", count(more as u64)) } else { String::new() };
    format!("{}{more}", ids[..ids.len().min(MOST_IDS)].join(", "))
}

/// `205: 198 running, 4 retrying, 3 held; lag 1,204`
pub(super) fn footer(rows: &[Row]) -> String {
    const ORDER: [State; 7] =
        [State::Running, State::Starting, State::Paused, State::Retrying, State::Held, State::Invalid, State::Stopped];
    let states = ORDER.into_iter().filter_map(|state| {
        let number = rows.iter().filter(|row| row.state == state).count();
        (number > 0).then(|| format!("{} {}", count(number as u64), state_name(state)))
    });
    let states = states.collect::<Vec<_>>().join(", ");
    let lag: u64 = rows.iter().filter_map(|row| row.copy.lag).map(|lag| lag.messages).sum();
    let unknown = rows.iter().filter(|row| row.copy.lag.is_none()).count();
    let lag = match unknown {
        0 => count(lag),
        unknown if unknown == rows.len() => "unknown".to_owned(),
        unknown => format!("{}, unknown of {}", count(lag), count(unknown as u64)),
    };
    format!("{}: {states}; lag {lag}", count(rows.len() as u64))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn row(id: &str, state: &str, lag: Value) -> Row {
        let mut row: Row = serde_json::from_value(json!({"replication": id, "state": state, "origin": "kv",
            "leader": "an-instance", "epoch": 1, "config_revision": 1, "lag": lag}))
        .unwrap();
        if state == "held" {
            row.copy.last_error = Some(crate::status::LastError::now("hold", &"why ".repeat(100)));
            row.todo = Some("fix it".to_owned());
        }
        row
    }

    fn many() -> Vec<Row> {
        let lag = |messages: u64| json!({"messages": messages, "seconds": 0.0});
        let mut rows: Vec<_> = (0..7).map(|index| row(&format!("H{index}"), "held", Value::Null)).collect();
        rows.extend((0..3).map(|index| row(&format!("R{index}"), "running", lag(400 + index))));
        rows
    }

    #[test]
    fn the_footer_sums_up() {
        assert_eq!(footer(&many()), "10: 3 running, 7 held; lag 1,203, unknown of 7");
        assert_eq!(footer(&many()[7..]), "3: 3 running; lag 1,203");
        assert_eq!(footer(&many()[..2]), "2: 2 held; lag unknown");
    }

    #[test]
    fn the_same_advice_is_given_once() {
        assert_eq!(todos(&many()), ["", "do: fix it (H0, H1, H2, H3, H4, 2 more)"]);
        assert!(todos(&many()[7..]).is_empty());
    }

    #[test]
    fn columns_fit_the_width() {
        let out = Output::new(false);
        for (width, expect) in [(200, "LEADER"), (60, "BEHIND"), (44, "LAG")] {
            let lines = out.render(&table(&many(), None, TableStyle::Fitted, Some(width)));
            assert!(lines[0].contains(expect) && lines[0].contains("LAST ERROR"), "{width}: {}", lines[0]);
            assert!(lines.iter().all(|line| line.chars().count() <= width), "{width}: {lines:#?}");
            assert!(lines[1].contains("why") && lines[1].ends_with("..."), "{width}: {}", lines[1]);
        }
        let narrow = out.render(&table(&many(), None, TableStyle::Fitted, Some(50)));
        assert!(!narrow[0].contains("TRANSPORT"), "{}", narrow[0]);
        let wide = out.render(&table(&many(), None, TableStyle::Wide, None));
        assert!(wide[0].contains("EPOCH") && wide[1].len() > 400, "{wide:#?}");
    }

    #[test]
    fn rows_that_do_not_fit_are_counted() {
        let lines = |room: usize| {
            let rows = (0..=20).map(|index| format!("row {index}")).collect();
            let (todos, footer) = (vec![String::new(), "do".into()], Some("20 rows".to_owned()));
            StatusLines { rows, is_table: true, todos, footer }.fit(room)
        };
        assert_eq!(lines(25).len(), 25);
        let short = lines(12);
        assert_eq!(short[short.len() - 5..], ["14 more", "", "do", "", "20 rows"], "{short:?}");
        assert_eq!((short.len(), short[6].as_str()), (12, "row 6"));
        assert!(lines(1).len() <= 8, "{:?}", lines(1));
    }
}
