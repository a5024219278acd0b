//! The table, and what has to agree.

use std::collections::BTreeMap;
use std::fmt::Display;

use anyhow::{Result, bail};

/// Results of comparisons, and the rows of the table.
#[derive(Default)]
pub(super) struct Checks {
    /// Each with whether it holds.
    results: Vec<(String, bool)>,
    sites: Vec<String>,
    rows: Vec<(&'static str, Vec<String>)>,
}

impl Checks {
    /// Both are the same.
    pub(super) fn equal<T: PartialEq + Display>(&mut self, site: &str, left: &str, a: T, right: &str, b: T) {
        let holds = a == b;
        let sign = if holds { "=" } else { "but" };
        self.results.push((format!("{site} {left} {a} {sign} {right} {b}").trim().to_owned(), holds));
    }

    /// There is none of these.
    pub(super) fn none(&mut self, site: &str, what: &str, count: usize) {
        self.results.push((format!("{site} {what}: {count}"), count == 0));
    }

    /// A number of the table.
    pub(super) fn show(&mut self, site: &str, row: &'static str, value: impl Display) {
        if !self.sites.iter().any(|known| known == site) {
            self.sites.push(site.to_owned());
        }
        match self.rows.iter_mut().find(|(name, _)| *name == row) {
            Some((_, values)) => values.push(value.to_string()),
            None => self.rows.push((row, vec![value.to_string()])),
        }
    }

    pub(super) fn print_table(&self) {
        print!("  {:<42}", "");
        self.sites.iter().for_each(|site| print!("{site:>10}"));
        println!();
        for (row, values) in &self.rows {
            print!("  {row:<42}");
            values.iter().for_each(|value| print!("{value:>10}"));
            println!();
        }
    }

    /// Prints all results; an error names those that do not hold.
    pub(super) fn verdict(&self) -> Result<()> {
        for (text, holds) in &self.results {
            println!("  {} {text}", if *holds { "ok   " } else { "WRONG" });
        }
        let wrong: Vec<&str> = self.results.iter().filter(|(_, holds)| !holds).map(|(text, _)| text.as_str()).collect();
        if wrong.is_empty() {
            return Ok(());
        }
        bail!("{} of {} comparisons do not hold: {}", wrong.len(), self.results.len(), wrong.join("; "))
    }
}

/// Advisories of each kind.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct AdvisoryCounts(BTreeMap<String, u64>);

pub(super) const KINDS: [&str; 4] = ["new", "timeout", "recover", "expire"];

impl AdvisoryCounts {
    pub(super) fn add(&mut self, kind: &str, count: u64) {
        *self.0.entry(kind.to_owned()).or_default() += count;
    }

    pub(super) fn of(&self, kind: &str) -> u64 {
        self.0.get(kind).copied().unwrap_or_default()
    }
}

impl Display for AdvisoryCounts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let counts: Vec<_> = KINDS.iter().map(|kind| format!("{kind} {}", self.of(kind))).collect();
        write!(f, "({})", counts.join(", "))
    }
}
