//! Many subjects as few patterns. Pure.
//!
//! Subjects stay literal while few of them differ at one token; beyond that, the token becomes `*`. The first token stays
//! literal, and so do the first two where it begins with `$`: there, the second one names a bucket. If that leaves too many
//! patterns, what follows becomes `>`, as late as possible.

use std::collections::{BTreeMap, BTreeSet};

/// Tokens at one place that are kept apart.
const MANY: usize = 16;
/// Patterns that come out at most: servers match each publish against all subjects of a stream.
const MOST: usize = 256;
/// Most tokens of a subject that are distinguished; the rest is `>`.
const DEEPEST: usize = 32;

/// Subjects that were added so far, in bounded memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Outline {
    root: Node,
    /// First tokens beyond what can be listed.
    left_out: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Node {
    /// A subject ends here.
    ends: bool,
    /// Longer subjects continue here in ways that are not listed.
    more: bool,
    /// By token; `*` is a token of its own.
    children: BTreeMap<String, Node>,
}

impl Outline {
    /// Adds one subject.
    pub(crate) fn add(&mut self, subject: &str) {
        let fixed = fixed(subject);
        let mut node = &mut self.root;
        for (depth, token) in subject.split('.').enumerate() {
            if depth == DEEPEST {
                node.more = true;
                return;
            }
            // A server writes bytes that are no text in this way: the token is unknown.
            let unknown = token.contains('\u{fffd}') || matches!(token, "" | "*" | ">");
            if depth < fixed {
                if unknown || depth == 0 && node.children.len() >= MOST && !node.children.contains_key(token) {
                    self.left_out = true;
                    return;
                }
                node = node.children.entry(token.to_owned()).or_default();
                continue;
            }
            let known = node.children.contains_key(token);
            if !node.is_any() && (unknown || !known && node.children.len() >= MANY) {
                node.generalize();
            }
            let key = if node.is_any() { "*" } else { token };
            node = node.children.entry(key.to_owned()).or_default();
        }
        node.ends = true;
    }

    /// Patterns that hold all of them; `None` if they begin with too many different tokens.
    pub(crate) fn patterns(&self) -> Option<BTreeSet<String>> {
        if self.left_out {
            return None;
        }
        (0..=DEEPEST).rev().map(|levels| self.cut_at(levels)).find(|patterns| patterns.len() <= MOST)
    }

    /// With this many tokens after the fixed ones, and `>` for the rest.
    fn cut_at(&self, levels: usize) -> BTreeSet<String> {
        let mut patterns = BTreeSet::new();
        for (first, node) in &self.root.children {
            node.write(first.clone(), fixed(first) - 1 + levels, &mut patterns);
        }
        patterns
    }
}

/// Tokens at the beginning that stay literal.
fn fixed(subject: &str) -> usize {
    if subject.starts_with('$') { 2 } else { 1 }
}

impl Node {
    fn is_any(&self) -> bool {
        self.children.contains_key("*")
    }

    /// Makes one of all children.
    fn generalize(&mut self) {
        let mut any = Self::default();
        for child in std::mem::take(&mut self.children).into_values() {
            any.merge(child);
        }
        self.children.insert("*".to_owned(), any);
    }

    fn merge(&mut self, other: Self) {
        self.ends |= other.ends;
        self.more |= other.more;
        for (token, child) in other.children {
            self.children.entry(token).or_default().merge(child);
        }
        if self.children.len() > MANY || self.is_any() && self.children.len() > 1 {
            self.generalize();
        }
    }

    fn write(&self, pattern: String, levels: usize, patterns: &mut BTreeSet<String>) {
        let all = self.more || levels == 0 && !self.children.is_empty();
        if all {
            patterns.insert(format!("{pattern}.>"));
        } else {
            for (token, child) in &self.children {
                child.write(format!("{pattern}.{token}"), levels - 1, patterns);
            }
        }
        if self.ends {
            patterns.insert(pattern);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::patterns;

    fn outline(subjects: impl IntoIterator<Item = String>) -> Option<Vec<String>> {
        let mut outline = Outline::default();
        let subjects: Vec<String> = subjects.into_iter().collect();
        subjects.iter().for_each(|subject| outline.add(subject));
        let found: Vec<String> = outline.patterns()?.into_iter().collect();
        for subject in subjects {
            let is_held = found.iter().any(|pattern| patterns::matches(pattern, subject.as_bytes()));
            assert!(is_held, "{subject} is not in {found:?}");
        }
        Some(found)
    }

    fn many(pattern: &str, count: usize) -> Vec<String> {
        (0..count).map(|i| pattern.replace('#', &format!("t{i}"))).collect()
    }

    #[test]
    fn few_subjects_stay_as_they_are() {
        let few = ["a.b", "a.c.d", "e"].map(str::to_owned);
        assert_eq!(outline(few.clone()), Some(few.to_vec()));
        assert_eq!(outline(many("a.#", MANY)).map(|found| found.len()), Some(MANY));
        assert_eq!(outline([]), Some(vec![]));
    }

    #[test]
    fn tokens_that_are_many_become_a_wildcard() {
        let check = |subjects: Vec<String>, expect: &[&str]| assert_eq!(outline(subjects).unwrap(), expect);
        check(many("a.#", 1000), &["a.*"]);
        check([many("a.#.x", 100), many("a.#", 5)].concat(), &["a.*", "a.*.x"]);
        check([many("a.#.x", 10), many("a.b#.y", 10)].concat(), &["a.*.x", "a.*.y"]);
        check([many("a.#", 100), vec!["b.c".to_owned()]].concat(), &["a.*", "b.c"]);
        // Another bucket has no owner here.
        check(many("$KV.A.#", 100), &["$KV.A.*"]);
        assert_eq!(outline(many("$KV.#.k", 100)).unwrap().len(), 100);
        check(many("a.#.#.#.x", 100), &["a.*.*.*.x"]);
    }

    #[test]
    fn what_is_too_much_is_cut_and_never_everything() {
        // 16 tokens at each of three places are 4,096 patterns.
        let all = many("a.#", 16).into_iter().flat_map(|a| many(&format!("{a}.#"), 16));
        let all: Vec<String> = all.flat_map(|a| many(&format!("{a}.#"), 16)).collect();
        let found = outline(all).unwrap();
        assert_eq!((found.len(), found[0].as_str()), (256, "a.t0.t0.>"));
        assert_eq!(outline(many("#.a", MOST)).map(|found| found.len()), Some(MOST));
        assert_eq!(outline(many("#.a", MOST + 1)), None);
        let deep = vec!["a"; 100].join(".");
        let found = outline([deep]).unwrap();
        assert_eq!(found.len(), 1);
        assert!(found[0].ends_with(".a.>"), "{found:?}");
    }

    #[test]
    fn a_token_that_is_no_text_can_be_anything() {
        assert_eq!(outline(["a.\u{fffd}.b".to_owned(), "a.c.b".to_owned()]).unwrap(), ["a.*.b"]);
        assert_eq!(outline(["a\u{fffd}.b".to_owned()]), None);
    }
}
