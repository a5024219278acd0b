//! The picture of `top`. Without a terminal.

use std::collections::VecDeque;

use ratatui::{
    Frame,
    layout::{Constraint, Layout, Rect},
    style::{Color, Modifier, Style},
    text::{Line, Span},
    widgets::{Cell, Paragraph, Row as TableRow, Table, Wrap},
};

use super::state::{Front, TopRow, TopState};
use crate::{
    cli::{
        format::{count, seconds},
        output::{Colour, Output, clean},
        status_table::footer,
        status_view::{detail, leader, state_colour, state_name},
    },
    status::Row,
};

/// A terminal below this shows nothing that helps.
const LEAST: (u16, u16) = (40, 8);
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
const HELP: &[(&str, &str)] = &[
    ("up, down, k, j", "select a replication; Page Up, Page Down, g and G go further"),
    ("Enter", "everything about it, with what to do; Esc goes back"),
    ("/", "filter: all words must be in id, state, leader or streams; Esc clears"),
    ("s", "next order: worst, lag, age, rate, errors, id"),
    ("p", "pause it, after a confirmation"),
    ("r", "resume it, after a confirmation"),
    ("t", "try it again now, after a confirmation"),
    ("q, Ctrl-C", "quit"),
];

/// Draws everything.
pub(super) fn draw(frame: &mut Frame<'_>, state: &mut TopState) {
    let area = frame.area();
    if area.width < LEAST.0 || area.height < LEAST.1 {
        frame.render_widget(Paragraph::new("the terminal is too small").wrap(Wrap { trim: true }), area);
        return;
    }
    let parts = [Constraint::Length(1), Constraint::Min(1), Constraint::Length(2), Constraint::Length(1)];
    let [head, body, advice, keys] = Layout::vertical(parts).areas(area);
    frame.render_widget(heading(state), head);
    let front = match &state.front {
        Front::Confirm { back, .. } => back.as_ref().clone(),
        front => front.clone(),
    };
    match front {
        Front::Help => help(frame, body),
        Front::Detail { id, scrolled } => details(frame, body, state, &id, scrolled),
        _ => list(frame, body, state),
    }
    frame.render_widget(Paragraph::new(news(state)).wrap(Wrap { trim: true }), advice);
    frame.render_widget(key_hints(state), keys);
}

fn heading(state: &TopState) -> Line<'static> {
    let rows: Vec<Row> = state.shown().into_iter().map(|row| row.row.clone()).collect();
    let mut spans = vec![Span::styled(state.site.clone(), Modifier::BOLD)];
    if state.is_stale() {
        spans.push(Span::styled("  no answer: this is old", Style::new().fg(Color::Red)));
    }
    spans.push(Span::raw(format!("  {}  {}  {}", footer(&rows), state.sort.name(), clean(&state.server))));
    Line::from(spans)
}

/// The columns at this width: what is narrow enough goes, the line of the lag first.
fn widths(width: u16) -> [u16; 8] {
    let line = if width >= 100 { 16 } else { 10 };
    let [state, rate, lag, behind, leader] =
        [9, 8, 8, if width >= 100 { 9 } else { 0 }, if width >= 100 { 18 } else { 10 }];
    let (rate_line, lag_line) = match width {
        0..56 => (0, 0),
        56..72 => (line, 0),
        _ => (line, line),
    };
    let leader = if width < 64 { 0 } else { leader };
    let others = [state, rate, rate_line, lag, lag_line, behind, leader];
    let gaps = others.iter().filter(|width| **width > 0).count() as u16;
    let id = width.saturating_sub(others.iter().sum::<u16>() + gaps).max(8);
    [id, state, rate, rate_line, lag, lag_line, behind, leader]
}

fn list(frame: &mut Frame<'_>, area: Rect, state: &mut TopState) {
    let selected = state.selected();
    let page = usize::from(area.height.saturating_sub(1)).max(1);
    state.page = page;
    if let Some(at) = selected {
        state.first = state.first.min(at).max((at + 1).saturating_sub(page));
    }
    let shown = state.shown();
    let first = state.first.min(shown.len().saturating_sub(page));
    let widths = widths(area.width);
    let titles = ["REPLICATION", "STATE", "RATE", "1 MIN", "LAG", "1 MIN", "BEHIND", "LEADER"];
    let kept: Vec<usize> = (0..widths.len()).filter(|column| widths[*column] > 0).collect();
    let right = |column: usize| [2, 4, 6].contains(&column);
    let cell = |column: usize, text: String| {
        let width = usize::from(widths[column]);
        let text = cut(&text, width);
        Cell::new(if right(column) { format!("{text:>width$}") } else { text })
    };
    let header = TableRow::new(kept.iter().map(|column| cell(*column, titles[*column].to_owned())));
    let rows = shown.iter().enumerate().skip(first).take(page).map(|(at, row)| {
        let style = if Some(at) == selected { Style::new().add_modifier(Modifier::REVERSED) } else { Style::new() };
        let cells = kept.iter().map(|column| {
            let made = cell(*column, text(row, *column, widths[*column]));
            if *column == 1 { made.style(Style::new().fg(colour(row.row.state))) } else { made }
        });
        TableRow::new(cells).style(style)
    });
    let table = Table::new(rows, kept.iter().map(|column| Constraint::Length(widths[*column])))
        .header(header.style(Style::new().add_modifier(Modifier::BOLD)));
    frame.render_widget(table, area);
    state.first = first;
}

/// The text of one column.
fn text(row: &TopRow, column: usize, width: u16) -> String {
    let lag = row.row.copy.lag;
    match column {
        0 => clean(&row.row.replication),
        1 => state_name(row.row.state),
        2 => row.rate.map_or_else(|| "?".to_owned(), |rate| format!("{}/s", short(rate.round() as u64))),
        3 => bars(&row.rates, width.into()),
        4 => lag.map_or_else(|| "?".to_owned(), |lag| short(lag.messages)),
        5 => bars(&row.lags, width.into()),
        6 => lag.and_then(|lag| lag.seconds).map_or_else(|| "?".to_owned(), seconds),
        _ => leader(&row.row),
    }
}

/// A number in few characters.
fn short(number: u64) -> String {
    match number {
        0..100_000 => count(number),
        100_000..10_000_000 => format!("{}k", count(number / 1_000)),
        10_000_000..10_000_000_000 => format!("{}M", count(number / 1_000_000)),
        _ => format!("{}G", count(number / 1_000_000_000)),
    }
}

/// The newest points as bars, against the largest of them; a gap where one was not known.
fn bars(points: &VecDeque<Option<f64>>, width: usize) -> String {
    let newest = points.range(points.len().saturating_sub(width)..);
    let most = newest.clone().flatten().fold(0.0_f64, |most, point| most.max(*point));
    let bar = |point: &Option<f64>| match point {
        None => ' ',
        Some(point) if *point <= 0.0 || most <= 0.0 => BARS[0],
        Some(point) => BARS[((point / most * 7.0).ceil() as usize).min(7)],
    };
    let bars: String = newest.map(bar).collect();
    let empty = " ".repeat(width.saturating_sub(points.len()));
    format!("{empty}{bars}")
}

fn cut(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some(_) => text.chars().take(most.saturating_sub(1)).chain(['…']).collect(),
        None => text.to_owned(),
    }
}

fn details(frame: &mut Frame<'_>, area: Rect, state: &mut TopState, id: &str, scrolled: u16) {
    let lines = match state.row(id) {
        None => vec![format!("`{}` is gone", clean(id))],
        Some(row) => {
            let mut lines = detail(&row.row, row.rate, &Output::plain());
            let width = usize::from(area.width.saturating_sub(16)).min(super::state::POINTS);
            lines.push(format!("  {:<11} {}", "rate, 1 min", bars(&row.rates, width)));
            lines.push(format!("  {:<11} {}", "lag, 1 min", bars(&row.lags, width)));
            lines
        }
    };
    let lines: Vec<Line<'_>> = lines.into_iter().map(Line::from).collect();
    // No further than to the last line.
    let width = usize::from(area.width).max(1);
    let height: usize = lines.iter().map(|line| line.width().div_ceil(width).max(1)).sum();
    let most = u16::try_from(height.saturating_sub(area.height.into())).unwrap_or(u16::MAX);
    let scrolled = scrolled.min(most);
    if let Front::Detail { scrolled: at, .. } = &mut state.front {
        *at = scrolled;
    }
    frame.render_widget(Paragraph::new(lines).wrap(Wrap { trim: false }).scroll((scrolled, 0)), area);
}

fn help(frame: &mut Frame<'_>, area: Rect) {
    let lines = HELP
        .iter()
        .map(|(keys, does)| Line::from(vec![Span::styled(format!("  {keys:<16}"), Modifier::BOLD), Span::raw(*does)]));
    let title = Line::styled("Keys", Modifier::BOLD);
    frame.render_widget(Paragraph::new([title].into_iter().chain(lines).collect::<Vec<_>>()), area);
}

/// The advice about the selected replication, the question before a change, or the answer to it.
fn news(state: &TopState) -> Line<'static> {
    let red = Style::new().fg(Color::Red);
    match (&state.front, &state.message) {
        (Front::Confirm { endpoint, id, .. }, _) => {
            Line::styled(format!("{endpoint} {}? y: yes, any other key: no", clean(id)), Modifier::BOLD)
        }
        (Front::Filter, _) => Line::from(format!("filter: {}_", state.filter)),
        (_, Some(Err(error))) => Line::styled(error.clone(), red),
        (_, Some(Ok(text))) => Line::from(text.clone()),
        (Front::Detail { .. } | Front::Help, None) => Line::default(),
        (_, None) => {
            let shown = state.shown();
            let row = state.selected().and_then(|at| shown.get(at).copied());
            let todo = row.and_then(|row| row.row.todo.as_deref().map(|todo| (&row.row.replication, todo)));
            todo.map_or_else(Line::default, |(id, todo)| Line::from(format!("{}, do: {}", clean(id), clean(todo))))
        }
    }
}

fn key_hints(state: &TopState) -> Line<'static> {
    let filter = if state.filter.is_empty() { String::new() } else { format!("  filter: {}", clean(&state.filter)) };
    let keys = match &state.front {
        Front::Help => "any key: back".to_owned(),
        Front::Filter => "Enter: done  Esc: clear".to_owned(),
        Front::Detail { .. } => "Esc: back  p: pause  r: resume  t: retry  q: quit".to_owned(),
        _ => format!("?: help  /: filter  s: sort  Enter: open  p: pause  r: resume  t: retry  q: quit{filter}"),
    };
    Line::styled(keys, Modifier::DIM)
}

fn colour(state: crate::status::State) -> Color {
    match state_colour(state) {
        Colour::Red => Color::Red,
        Colour::Green => Color::Green,
        Colour::Yellow => Color::Yellow,
        Colour::Cyan => Color::Cyan,
        Colour::Plain | Colour::Bold => Color::Reset,
    }
}

#[cfg(test)]
mod tests {
    use ratatui::{Terminal, backend::TestBackend};

    use super::*;
    use crate::cli::top::state::tests::{press, row, state};

    /// The lines of a terminal of this size.
    fn drawn(state: &mut TopState, width: u16, height: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, state)).unwrap();
        let buffer = terminal.backend().buffer();
        let line = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>().trim_end().to_owned();
        (0..height).map(line).collect()
    }

    fn many() -> TopState {
        let mut rows: Vec<_> = (0..50).map(|at| row(&format!("R{at:02}"), "running", 10, at)).collect();
        rows.push(row("ORDERS-WITH-A-VERY-LONG-NAME-INDEED", "held", 0, 1_234_567));
        state(rows)
    }

    #[test]
    fn all_columns_fit_80_by_24() {
        let lines = drawn(&mut many(), 80, 24);
        assert!(lines[0].starts_with("SITE  51: 50 running, 1 held; lag"), "{lines:#?}");
        let header: Vec<_> = lines[1].split_whitespace().collect();
        assert_eq!(header.join(" "), "REPLICATION STATE RATE 1 MIN LAG 1 MIN LEADER");
        assert!(lines[2].starts_with("ORDERS-WITH-A-V") && lines[2].contains("… held"), "{lines:#?}");
        assert!(lines[2].contains("1,234k") && lines[2].ends_with("one"), "{lines:#?}");
        assert!(lines[21].contains("do: fix the cause") && lines[23].starts_with("?: help"), "{lines:#?}");
        assert!(lines[23].ends_with("q: quit"), "{lines:#?}");
    }

    #[test]
    fn each_size_is_drawn_without_a_panic() {
        for keys in ["", "G", "\n", "?", "/x", "\u{1b}p"] {
            let mut state = many();
            press(&mut state, keys);
            for (width, height) in [(0, 0), (1, 1), (40, 8), (56, 10), (72, 24), (100, 30), (300, 80), (80, 24)] {
                drawn(&mut state, width, height);
            }
        }
        assert!(drawn(&mut many(), 30, 5)[0].starts_with("the terminal is too small"));
        assert!(drawn(&mut state(Vec::new()), 80, 24)[0].starts_with("SITE  0"));
    }

    #[test]
    fn the_selected_row_is_always_seen() {
        let mut state = many();
        drawn(&mut state, 80, 24);
        press(&mut state, "G");
        assert!(drawn(&mut state, 80, 24)[20].starts_with("R00"), "{:#?}", drawn(&mut state, 80, 24));
        press(&mut state, "g");
        assert!(drawn(&mut state, 80, 24)[2].starts_with("ORDERS"));
    }

    #[test]
    fn details_questions_and_help_are_in_front() {
        let mut state = many();
        press(&mut state, "\n");
        let lines = drawn(&mut state, 80, 24).join("\n");
        assert!(
            lines.contains("the stream is full") && !lines.contains('\u{1b}') && lines.contains("fix the cause"),
            "{lines}"
        );
        press(&mut state, "p");
        let lines = drawn(&mut state, 80, 24);
        assert!(lines[21].starts_with("pause ORDERS-WITH-A-VERY-LONG-NAME-INDEED? y: yes"), "{lines:#?}");
        press(&mut state, "n\u{1b}?");
        let lines = drawn(&mut state, 80, 24).join("\n");
        assert!(lines.contains("pause it, after a confirmation") && lines.contains("any key: back"), "{lines}");
    }

    #[test]
    fn bars_are_against_the_largest() {
        let points = VecDeque::from([Some(0.0), None, Some(50.0), Some(100.0)]);
        assert_eq!(bars(&points, 6), "  ▁ ▅█");
        assert_eq!(bars(&points, 2), "▅█");
    }
}
