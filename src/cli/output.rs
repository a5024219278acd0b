//! What a command prints: lines and tables for people, JSON for programs. A reader that went away (`| head`) changes
//! neither what is done nor how it ends; what is only there to be read stops.

use std::{
    env,
    io::{self, BufRead, IsTerminal, Write},
};

use comfy_table::{CellAlignment, presets};
use serde::Serialize;

use super::reply::Reply;

/// Where a command prints to.
#[derive(Debug)]
pub(super) struct Output {
    json: bool,
    terminal: bool,
    colour: bool,
    closed: bool,
    failed: Option<io::Error>,
}

/// Colour of a word on a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Colour {
    Plain,
    Red,
    Green,
    Yellow,
    Cyan,
    Bold,
}

impl Output {
    /// Stdout as it is.
    pub(super) fn new(json: bool) -> Self {
        let terminal = io::stdout().is_terminal();
        let unwanted = |name: &str| env::var_os(name).is_some_and(|value| !value.is_empty());
        let dumb = env::var_os("TERM").is_none_or(|term| term == "dumb");
        Self { json, terminal, colour: terminal && !dumb && !unwanted("NO_COLOR"), closed: false, failed: None }
    }

    /// Text without colours, for what draws by itself.
    pub(super) fn plain() -> Self {
        Self { json: false, terminal: false, colour: false, closed: false, failed: None }
    }

    /// Whether a program reads it.
    pub(super) fn json(&self) -> bool {
        self.json
    }

    /// Whether a person reads it as it comes.
    pub(super) fn terminal(&self) -> bool {
        self.terminal
    }

    /// Columns and lines of the terminal; `None` without one, or where it does not know.
    pub(super) fn size(&self) -> Option<(usize, usize)> {
        let size = rustix::termios::tcgetwinsize(io::stdout()).ok().filter(|_| self.terminal)?;
        (size.ws_col > 0 && size.ws_row > 0).then(|| (size.ws_col.into(), size.ws_row.into()))
    }

    /// Whether the reader of the output is gone.
    pub(super) fn closed(&self) -> bool {
        self.closed
    }

    /// Prints a line.
    pub(super) fn line(&mut self, text: &str) {
        self.write(&[text.as_bytes(), b"\n"]);
    }

    /// Prints text that has its line ends.
    pub(super) fn text(&mut self, text: &str) {
        self.write(&[text.as_bytes()]);
    }

    /// Prints a value as one line of JSON.
    pub(super) fn value(&mut self, value: &impl Serialize) {
        self.line(&serde_json::to_string(value).unwrap_or_default());
    }

    /// Prints an answer: as it was sent for programs, in words for people.
    pub(super) fn reply<T>(&mut self, reply: &Reply<T>, words: impl FnOnce(&T) -> String) {
        if self.json {
            self.write(&[reply.raw.trim_ascii(), b"\n"]);
        } else {
            self.line(&words(&reply.value));
        }
    }

    /// Prints a table.
    pub(super) fn table(&mut self, table: &Table) {
        for line in self.render(table) {
            self.line(&line);
        }
    }

    /// The lines of a table.
    pub(super) fn render(&self, table: &Table) -> Vec<String> {
        table.render(|colour, text| self.paint(colour, text))
    }

    /// Colours a text where colours are wanted.
    pub(super) fn paint(&self, colour: Colour, text: &str) -> String {
        let code = match colour {
            _ if !self.colour || text.is_empty() => return text.to_owned(),
            Colour::Plain => return text.to_owned(),
            Colour::Red => 31,
            Colour::Green => 32,
            Colour::Yellow => 33,
            Colour::Cyan => 36,
            Colour::Bold => 1,
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }

    /// Writes a line to stderr; a closed stderr is no error.
    pub(super) fn note(&self, text: &str) {
        let _ = writeln!(io::stderr(), "{}", clean_lines(text));
    }

    /// Whether a line about the progress of something can be drawn again and again, on stderr.
    pub(super) fn shows_progress(&self) -> bool {
        !self.json && io::stderr().is_terminal() && env::var_os("TERM").is_some_and(|term| term != "dumb")
    }

    /// Draws that line where it can be drawn; an empty one removes it. It is cut where the terminal ends.
    pub(super) fn progress(&self, line: &str) {
        if !self.shows_progress() {
            return;
        }
        let width = rustix::termios::tcgetwinsize(io::stderr()).map_or(0, |size| usize::from(size.ws_col));
        let line: String = clean(line).chars().take(if width > 1 { width - 1 } else { usize::MAX }).collect();
        let mut stderr = io::stderr();
        let _ = write!(stderr, "\r{line}\x1b[K");
        let _ = stderr.flush();
    }

    /// The error of stdout, if it is not that the reader is gone.
    pub(super) fn finish(&mut self) -> Option<io::Error> {
        self.flush();
        self.failed.take()
    }

    fn write(&mut self, parts: &[&[u8]]) {
        if self.closed {
            return;
        }
        let mut stdout = io::stdout().lock();
        let written = parts.iter().try_for_each(|part| stdout.write_all(part));
        drop(stdout);
        self.check(written);
    }

    /// Flushes the output.
    pub(super) fn flush(&mut self) {
        self.check(io::stdout().flush());
    }

    fn check(&mut self, written: io::Result<()>) {
        let Err(error) = written else { return };
        self.closed = true;
        if error.kind() != io::ErrorKind::BrokenPipe && self.failed.is_none() {
            self.failed = Some(error);
        }
    }
}

/// Whether there is a terminal to ask on.
pub(super) fn can_ask() -> bool {
    io::stdin().is_terminal() && io::stderr().is_terminal()
}

/// Asks a question whose answer is yes or no; `None` at the end of input. Blocks.
pub(super) fn confirm(question: &str) -> Option<bool> {
    let _ = write!(io::stderr(), "{question} ");
    let _ = io::stderr().flush();
    let mut answer = String::new();
    match io::stdin().lock().read_line(&mut answer) {
        Ok(0) | Err(_) => None,
        Ok(_) => Some(matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes")),
    }
}

/// A table with these `headers`.
#[derive(Debug)]
pub(super) struct Table {
    headers: Vec<&'static str>,
    /// Columns with numbers.
    right: Vec<usize>,
    /// The column that has colours; those left of it are ASCII.
    painted: Option<usize>,
    rows: Vec<(Colour, Vec<String>)>,
}

impl Table {
    pub(super) fn new(headers: &[&'static str]) -> Self {
        Self { headers: headers.to_vec(), right: Vec::new(), painted: None, rows: Vec::new() }
    }

    /// Aligns columns to the right.
    pub(super) fn right(mut self, columns: &[usize]) -> Self {
        self.right = columns.to_vec();
        self
    }

    /// Gives one column the colour of its row.
    pub(super) fn painted(mut self, column: usize) -> Self {
        self.painted = Some(column);
        self
    }

    pub(super) fn row(&mut self, colour: Colour, cells: Vec<String>) {
        self.rows.push((colour, cells.iter().map(|cell| clean(cell)).collect()));
    }

    fn render(&self, paint: impl Fn(Colour, &str) -> String) -> Vec<String> {
        let mut table = comfy_table::Table::new();
        table.load_style(presets::NOTHING).set_header(self.headers.clone());
        table.add_rows(self.rows.iter().map(|(_, cells)| cells.clone()));
        for (index, column) in table.column_iter_mut().enumerate() {
            column.set_padding((0, 2));
            if self.right.contains(&index) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        let widths: Vec<usize> = table.column_max_content_widths().iter().map(|width| usize::from(*width)).collect();
        let colours = [Colour::Bold].into_iter().chain(self.rows.iter().map(|(colour, _)| *colour));
        let lines = table.lines().zip(colours).enumerate().map(|(index, (line, colour))| {
            let line = line.trim_end();
            match self.painted {
                _ if index == 0 => paint(colour, line),
                Some(column) => {
                    let begin = widths.iter().take(column).map(|width| width + 2).sum();
                    let end = line.len().min(begin + widths[column]);
                    match (line.get(..begin), line.get(begin..end), line.get(end..)) {
                        (Some(left), Some(word), Some(rest)) => format!("{left}{}{rest}", paint(colour, word)),
                        _ => line.to_owned(),
                    }
                }
                None => line.to_owned(),
            }
        });
        lines.collect()
    }
}

/// A text from elsewhere in one line, without control characters.
pub(super) fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

fn clean_lines(text: &str) -> String {
    text.lines().map(clean).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let mut table = Table::new(&["ID", "STATE", "LAG"]).right(&[2]).painted(1);
        table.row(Colour::Green, vec!["ORDERS".into(), "running".into(), "5".into()]);
        table.row(Colour::Red, vec!["A".into(), "held".into(), "1,000".into()]);
        table
    }

    #[test]
    fn columns_begin_at_the_same_place_in_every_line() {
        let lines = table().render(|_, text| text.to_owned());
        assert_eq!(lines, ["ID      STATE      LAG", "ORDERS  running      5", "A       held     1,000"]);
    }

    #[test]
    fn only_the_word_is_coloured() {
        let lines = table().render(|colour, text| format!("<{colour:?}:{text}>"));
        assert_eq!(lines[1], "ORDERS  <Green:running>      5");
        assert_eq!(lines[2], "A       <Red:held   >  1,000");
    }

    #[test]
    fn control_characters_of_a_text_do_not_reach_the_terminal() {
        assert_eq!(clean("a\x1b[2Jb\r\nc\u{9b}d"), "a [2Jb  c d");
    }
}
