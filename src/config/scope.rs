//! What of a source is copied, by subject.

use std::collections::BTreeSet;

use super::patterns;

/// Which subjects are in scope; all of them by default.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scope {
    filters: Vec<String>,
    excluded: Vec<String>,
}

impl Scope {
    /// What one of the filters matches (without filters everything) and none of the excluded patterns. Filters do not
    /// overlap.
    pub fn new(filters: Vec<String>, excluded: Vec<String>) -> Self {
        Self { filters, excluded }
    }

    /// What the server is asked for; empty for everything.
    pub fn filters(&self) -> &[String] {
        &self.filters
    }

    /// What is skipped of that.
    pub fn excluded(&self) -> &[String] {
        &self.excluded
    }

    /// Whether the server leaves something out, so that its sequences jump.
    pub fn is_filtered(&self) -> bool {
        !self.filters.is_empty()
    }

    /// Whether everything is in scope.
    pub fn is_whole(&self) -> bool {
        self.filters.is_empty() && self.excluded.is_empty()
    }

    /// Whether a message that the filters let through is skipped.
    pub fn excludes(&self, subject: &[u8]) -> bool {
        self.excluded.iter().any(|pattern| patterns::matches(pattern, subject))
    }

    /// What of these subjects is in scope. A pattern of which only a part is excluded stays.
    pub fn of<'a>(&self, subjects: impl IntoIterator<Item = &'a str>) -> BTreeSet<String> {
        let everything = [">".to_owned()];
        let filters = if self.filters.is_empty() { &everything } else { self.filters.as_slice() };
        let shared = subjects
            .into_iter()
            .flat_map(|subject| filters.iter().filter_map(|filter| patterns::intersection(subject, filter)));
        shared.filter(|subject| !self.excluded.iter().any(|pattern| patterns::holds(pattern, subject))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scope(filters: &[&str], excluded: &[&str]) -> Scope {
        let own = |list: &[&str]| list.iter().map(|pattern| (*pattern).to_owned()).collect();
        Scope::new(own(filters), own(excluded))
    }

    #[test]
    fn excluded_is_what_any_pattern_matches() {
        let scope = scope(&["a.>"], &["a.*.old", "a.x"]);
        for (subject, expect) in [("a.b.old", true), ("a.x", true), ("a.x.y", false), ("a.b", false)] {
            assert_eq!(scope.excludes(subject.as_bytes()), expect, "{subject}");
        }
        assert!(!Scope::default().excludes(b"a") && Scope::default().is_whole());
        assert!(scope.is_filtered() && !scope.is_whole());
    }

    #[test]
    fn in_scope_is_what_filters_let_through() {
        let check = |filters: &[&str], excluded: &[&str], subjects: &[&str], expect: &[&str]| {
            let found = scope(filters, excluded).of(subjects.iter().copied());
            assert_eq!(found.into_iter().collect::<Vec<_>>(), expect, "{filters:?} {excluded:?} {subjects:?}");
        };
        check(&[], &[], &["a.>", "b"], &["a.>", "b"]);
        check(&["a.1", "a.2.>"], &[], &["a.>", "b"], &["a.1", "a.2.>"]);
        check(&["*.1"], &[], &["a.>", "b.>"], &["a.1", "b.1"]);
        check(&["c"], &[], &["a.>"], &[]);
        check(&[], &["b", "a.1"], &["a.>", "b"], &["a.>"]);
        check(&["a.1", "a.2"], &["a.*"], &["a.>"], &[]);
    }
}
