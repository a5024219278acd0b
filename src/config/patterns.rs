//! Subjects with wildcards as sets of subjects: `*` stands for one token, `>` for one or more at the end. Pure.

use std::collections::BTreeSet;

/// Whether a subject is in the set.
pub(crate) fn matches(pattern: &str, subject: &[u8]) -> bool {
    let mut tokens = subject.split(|byte| *byte == b'.');
    for wanted in pattern.as_bytes().split(|byte| *byte == b'.') {
        match (wanted, tokens.next()) {
            (b">", Some(_)) => return true,
            (b"*", Some(_)) => {}
            (wanted, Some(token)) if wanted == token => {}
            _ => return false,
        }
    }
    tokens.next().is_none()
}

/// Whether two sets share a subject.
pub(crate) fn overlap(one: &str, other: &str) -> bool {
    let (mut one, mut other) = (one.split('.'), other.split('.'));
    loop {
        match (one.next(), other.next()) {
            (None, None) | (Some(">"), Some(_)) | (Some(_), Some(">")) => return true,
            (Some("*"), Some(_)) | (Some(_), Some("*")) => {}
            (Some(one), Some(other)) if one == other => {}
            _ => return false,
        }
    }
}

/// The subjects that two patterns share: always one pattern, or none.
pub(crate) fn intersection(one: &str, other: &str) -> Option<String> {
    let (mut one, mut other) = (one.split('.'), other.split('.'));
    let mut shared = Vec::new();
    loop {
        match (one.next(), other.next()) {
            (None, None) => return Some(shared.join(".")),
            (Some(">"), Some(token)) => {
                shared.push(token);
                shared.extend(other);
                return Some(shared.join("."));
            }
            (Some(token), Some(">")) => {
                shared.push(token);
                shared.extend(one);
                return Some(shared.join("."));
            }
            (Some("*"), Some(token)) | (Some(token), Some("*")) => shared.push(token),
            (Some(one), Some(other)) if one == other => shared.push(one),
            _ => return None,
        }
    }
}

/// Whether all subjects of a set are in another one.
pub(crate) fn holds(outer: &str, inner: &str) -> bool {
    intersection(outer, inner).is_some_and(|shared| shared == inner)
}

/// The smallest pattern for two sets that share a subject.
fn union(one: &str, other: &str) -> String {
    let (mut one, mut other) = (one.split('.'), other.split('.'));
    let mut both = Vec::new();
    loop {
        match (one.next(), other.next()) {
            (None, None) => break,
            (Some(token), Some(same)) if token == same => both.push(token),
            (Some(">"), _) | (_, Some(">")) | (None, _) | (_, None) => {
                both.push(">");
                break;
            }
            (Some(_), Some(_)) => both.push("*"),
        }
    }
    both.join(".")
}

/// Subjects as a stream takes them, which takes none that overlap: two that do become one that holds both.
pub(crate) fn disjoint(patterns: impl IntoIterator<Item = String>) -> Vec<String> {
    let mut apart: Vec<String> = Vec::new();
    let patterns: BTreeSet<String> = patterns.into_iter().collect();
    for mut pattern in patterns {
        while let Some(index) = apart.iter().position(|known| overlap(known, &pattern)) {
            pattern = union(&apart.swap_remove(index), &pattern);
        }
        apart.push(pattern);
    }
    apart.sort();
    apart
}

/// Whether a subject may contain wildcards.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Wildcards {
    Allowed,
    Refused,
}

/// Describes the first problem of a subject, if it has one.
pub(super) fn wrong_subject(subject: &str, wildcards: Wildcards) -> Option<String> {
    if let Some(c) = subject.chars().find(|c| c.is_whitespace() || c.is_control()) {
        return Some(format!("a subject cannot contain {c:?}"));
    }
    let tokens: Vec<_> = subject.split('.').collect();
    for (index, token) in tokens.iter().enumerate() {
        let last = index + 1 == tokens.len();
        match *token {
            "" => return Some("a subject has no empty token: one dot between two tokens, none at the ends".to_owned()),
            "*" | ">" if wildcards == Wildcards::Refused => return Some("wildcards are not possible here".to_owned()),
            ">" if !last => return Some("`>` is only possible at the end".to_owned()),
            "*" | ">" => {}
            token if token.contains(['*', '>']) => {
                return Some("`*` and `>` are whole tokens, between dots".to_owned());
            }
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_share_one_pattern_or_nothing() {
        let check = |one: &str, other: &str, expect: Option<&str>| {
            for (one, other) in [(one, other), (other, one)] {
                assert_eq!(intersection(one, other).as_deref(), expect, "{one} and {other}");
                assert_eq!(overlap(one, other), expect.is_some(), "{one} and {other}");
            }
        };
        check("a.b", "a.b", Some("a.b"));
        check("a.b", "a.c", None);
        check("a.b", "a", None);
        check("a.>", "a", None);
        check("a.>", "a.b.c", Some("a.b.c"));
        check("a.>", "*.b.*", Some("a.b.*"));
        check("a.*", "*.b", Some("a.b"));
        check("a.*.>", "*.b.>", Some("a.b.>"));
        check(">", ">", Some(">"));
        check("*", "a.b", None);
    }

    #[test]
    fn a_subject_is_in_a_pattern_or_not() {
        let check = |pattern: &str, subject: &str, expect| {
            assert_eq!(matches(pattern, subject.as_bytes()), expect, "{pattern} {subject}");
            assert_eq!(holds(pattern, subject), expect, "{pattern} {subject}");
        };
        check("a.b", "a.b", true);
        check("a.b", "a.b.c", false);
        check("a.b.c", "a.b", false);
        check("a.*", "a.b", true);
        check("a.*", "a", false);
        check("a.>", "a", false);
        check("a.>", "a.b.c", true);
        check("*.b.>", "a.b.c", true);
        check(">", "a", true);
        check("A", "a", false);
        assert!(holds("a.>", "a.*") && !holds("a.*", "a.>"));
        assert!(matches("a.*", b"a.\xff"));
    }

    #[test]
    fn what_overlaps_becomes_one() {
        let check = |patterns: &[&str], expect: &[&str]| {
            assert_eq!(disjoint(patterns.iter().map(|pattern| (*pattern).to_owned())), expect, "{patterns:?}");
        };
        check(&["b", "a", "b"], &["a", "b"]);
        check(&["a.*", "a.b"], &["a.*"]);
        check(&["a.>", "a.b.c", "a.*"], &["a.>"]);
        check(&["*.b", "a.*"], &["*.*"]);
        check(&["*.b", "a.*", "c.d", "e"], &["*.*", "e"]);
        check(&["a.*.c.>", "a.b.>", "x"], &["a.*.>", "x"]);
    }
}
