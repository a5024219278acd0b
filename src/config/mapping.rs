//! From source subjects to target subjects. Pure; subjects are bytes, as they are for a server.

use std::collections::BTreeSet;

use super::{patterns, transform::Transform};

/// How a source subject becomes a target subject: by the first transform that matches, then Choria's prefix and
/// removal of a text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mapping {
    /// The first one whose `src` matches is used; a subject that none matches stays as it is.
    pub transforms: Vec<Transform>,
    /// Goes in front of the subject with a dot between; empty for none.
    pub prefix: String,
    /// Every literal occurrence is removed after the prefix was added; empty for none.
    pub remove: String,
}

impl Mapping {
    /// Whether every subject stays as it is.
    pub fn is_identity(&self) -> bool {
        self.transforms.is_empty() && self.prefix.is_empty() && self.remove.is_empty()
    }

    /// The target subject of a source subject, which is that itself or stands in `room`. Runs of dots become one and
    /// none stays at the ends; empty if nothing is left.
    pub fn apply<'a>(&self, subject: &'a [u8], room: &'a mut Vec<u8>) -> &'a [u8] {
        if self.is_identity() {
            return subject;
        }
        room.clear();
        if !self.prefix.is_empty() {
            room.extend_from_slice(self.prefix.as_bytes());
            room.push(b'.');
        }
        if !self.transforms.iter().any(|transform| transform.apply(subject, room)) {
            room.extend_from_slice(subject);
        }
        if !self.remove.is_empty() {
            remove(room, self.remove.as_bytes());
        }
        tidy(room);
        room
    }

    /// How many bytes longer than the source subject a target subject can be; `None` if that has no bound.
    pub fn growth(&self) -> Option<u64> {
        let prefix = if self.prefix.is_empty() { 0 } else { self.prefix.len() as u64 + 1 };
        self.transforms
            .iter()
            .try_fold(0, |most, transform| Some(transform.growth()?.max(most)))
            .map(|most| most + prefix)
    }

    /// Patterns that hold all target subjects of the source subjects that these patterns hold. Where a text is removed
    /// that a wildcard stands for, they do not.
    pub fn patterns(&self, from: &BTreeSet<String>) -> BTreeSet<String> {
        self.pieces(from).into_iter().map(|piece| self.finish(&piece)).collect()
    }

    /// Whether no two of these source subjects become the same target subject, as far as the transforms go.
    pub fn keeps_apart(&self, from: &BTreeSet<String>) -> bool {
        if self.transforms.is_empty() {
            return true;
        }
        let used = |transform: &&Transform| from.iter().any(|pattern| patterns::overlap(transform.src(), pattern));
        let pieces = self.pieces(from);
        let apart =
            |(index, piece): (usize, &String)| !pieces[index + 1..].iter().any(|other| patterns::overlap(piece, other));
        self.transforms.iter().filter(used).all(Transform::is_reversible) && pieces.iter().enumerate().all(apart)
    }

    /// What the transforms make of these patterns: a pattern for each of them that is used, and one for what none
    /// matches.
    fn pieces(&self, from: &BTreeSet<String>) -> Vec<String> {
        let mut pieces = Vec::new();
        for pattern in from {
            let mut rest = true;
            for (index, transform) in self.transforms.iter().enumerate() {
                let Some(shared) = patterns::intersection(transform.src(), pattern) else { continue };
                let earlier = &self.transforms[..index];
                if !earlier.iter().any(|earlier| patterns::holds(earlier.src(), &shared)) {
                    pieces.extend(transform.image(pattern));
                }
                if shared == *pattern {
                    rest = false;
                    break;
                }
            }
            if rest {
                pieces.push(pattern.clone());
            }
        }
        pieces
    }

    /// Prefix and removal.
    fn finish(&self, pattern: &str) -> String {
        let choria = Self { transforms: Vec::new(), ..self.clone() };
        let mut room = Vec::new();
        String::from_utf8_lossy(choria.apply(pattern.as_bytes(), &mut room)).into_owned()
    }
}

/// Removes every occurrence of a text, from left to right.
fn remove(from: &mut Vec<u8>, text: &[u8]) {
    let (mut read, mut write) = (0, 0);
    while let Some(at) = memchr::memmem::find(&from[read..], text) {
        from.copy_within(read..read + at, write);
        write += at;
        read += at + text.len();
    }
    let left = from.len() - read;
    from.copy_within(read.., write);
    from.truncate(write + left);
}

/// Removes empty tokens: a server takes no such subject.
fn tidy(subject: &mut Vec<u8>) {
    let mut before = b'.';
    subject.retain(|byte| {
        let keep = *byte != b'.' || before != b'.';
        before = *byte;
        keep
    });
    if subject.last() == Some(&b'.') {
        subject.pop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(transforms: &[(&str, &str)], prefix: &str, remove: &str) -> Mapping {
        let transforms = transforms.iter().map(|(src, dest)| Transform::parse(src, dest).unwrap());
        Mapping { transforms: transforms.collect(), prefix: prefix.to_owned(), remove: remove.to_owned() }
    }

    fn apply(mapping: &Mapping, subject: &[u8]) -> Vec<u8> {
        mapping.apply(subject, &mut b"old".to_vec()).to_vec()
    }

    #[test]
    fn subjects_get_a_prefix_and_lose_a_text() {
        let check = |prefix: &str, remove: &str, subject: &str, expect: &str| {
            let found = apply(&mapping(&[], prefix, remove), subject.as_bytes());
            let found = String::from_utf8(found).unwrap();
            assert_eq!(found, expect, "prefix {prefix:?}, remove {remove:?}, subject {subject:?}");
        };
        check("", "", "a.b", "a.b");
        check("east", "", "a.b", "east.a.b");
        check("east.", "", "a.b", "east.a.b");
        check("east", "a", "a.b", "est.b");
        check("x", "b", "a.b.c", "x.a.c");
        check("", "b.", "a.b.c", "a.c");
        check("", ".b", "a.b.c", "a.c");
        check("", "a", "a.b.a.c.a", "b.c");
        check("", "b", "a.bb.c", "a.c");
        check("", "ab", "aabb", "ab");
        check("x", "x.a", "a.b", "b");
        check("", "a.b", "a.b", "");
        check("", "nothing", "a.b", "a.b");
    }

    #[test]
    fn the_first_matching_transform_precedes_prefix_and_removal() {
        let both = [("a.*", "{{wildcard(1)}}.one"), ("*.>", "two.$1.>")];
        let check = |prefix: &str, remove: &str, subject: &str, expect: &str| {
            let found = apply(&mapping(&both, prefix, remove), subject.as_bytes());
            assert_eq!(String::from_utf8(found).unwrap(), expect, "{prefix} {remove} {subject}");
        };
        check("", "", "a.b", "b.one");
        check("", "", "a.b.c", "two.a.b.c");
        check("", "", "a", "a");
        check("p", ".one", "a.b", "p.b");
        check("p", "wo", "a.b.c", "p.t.a.b.c");
    }

    #[test]
    fn empty_tokens_of_a_function_go_and_odd_bytes_stay() {
        let empty = mapping(&[("a.*.*", "x.{{split(1,-)}}.$2")], "", "");
        assert_eq!(apply(&empty, b"a.--.b"), b"x.b");
        assert_eq!(apply(&empty, b"a.\xff-b.c"), b"x.\xff.b.c");
        assert_eq!(apply(&mapping(&[], "p", "b"), b"a\xffb.c"), b"p.a\xff.c");
    }

    #[test]
    fn patterns_are_mapped_by_every_transform_that_can_be_used() {
        let check = |transforms: &[(&str, &str)], prefix: &str, from: &[&str], expect: &[&str], apart: bool| {
            let from = from.iter().map(|pattern| (*pattern).to_owned()).collect();
            let mapping = mapping(transforms, prefix, "");
            let found: Vec<_> = mapping.patterns(&from).into_iter().collect();
            assert_eq!(found, expect, "{transforms:?} {from:?}");
            assert_eq!(mapping.keeps_apart(&from), apart, "{transforms:?} {from:?}");
        };
        check(&[], "p", &["a.>", "b"], &["p.a.>", "p.b"], true);
        check(&[("a.>", "x.>")], "p", &["a.>", "b"], &["p.b", "p.x.>"], true);
        check(&[("a.1", "x")], "", &["a.*"], &["a.*", "x"], true);
        check(&[("a.*", "x.$1"), ("a.1", "y"), (">", "z.>")], "", &["a.*"], &["x.*"], true);
        check(&[("a.*", "x.$1"), (">", "z.>")], "", &["a.>"], &["x.*", "z.a.>"], true);
        check(&[("eu.>", "all.>"), ("us.>", "all.>")], "", &["eu.>", "us.>"], &["all.>"], false);
        check(&[("eu.>", "all.>")], "", &["eu.>", "all.x"], &["all.>", "all.x"], false);
        check(&[("a.*.*", "x.$1")], "", &["a.>"], &["a.>", "x.*"], false);
        check(&[("c.*.*", "x.$1")], "", &["a.>"], &["a.>"], true);
    }
}
