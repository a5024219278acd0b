//! One subject transform as JetStream has them (ADR-36): what matches `src` becomes `dest`, with functions of the
//! tokens that the `*` of `src` stand for. Subjects are bytes, as they are for a server: a cut may fall into a letter.
//!
//! What a server refuses is refused here. Beyond that, expressions that a server takes, and that cannot be meant: indexes below 1 (a
//! server takes the first token of the subject), no buckets (a server of 2.10 crashes at the first message), and a
//! function that is not a whole token (a server takes it for plain text).

use super::patterns;

/// Names of functions as people write them.
const FUNCTIONS: &str = "wildcard, partition, split, splitFromLeft, splitFromRight, sliceFromLeft, sliceFromRight, \
                         left and right";

/// One transform, valid by construction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transform {
    src: String,
    dest: Vec<DestPart>,
    /// Both end with `>`: so many tokens of the subject come before what that stands for.
    rest: Option<usize>,
}

/// What is wrong with a transform.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wrong {
    /// Whether it is `src`; otherwise it is `dest`.
    pub in_src: bool,
    /// What would be right.
    pub message: String,
}

/// One token of a destination; numbers of tokens are those of the subject, from 0.
#[derive(Debug, Clone, PartialEq, Eq)]
enum DestPart {
    Text(String),
    Token(usize),
    /// Without tokens the whole subject counts.
    Partition {
        buckets: u32,
        tokens: Vec<usize>,
    },
    Split {
        token: usize,
        at: Vec<u8>,
    },
    SplitFrom {
        side: TransformSide,
        token: usize,
        position: usize,
    },
    Slice {
        side: TransformSide,
        token: usize,
        size: usize,
    },
    Keep {
        side: TransformSide,
        token: usize,
        length: usize,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TransformSide {
    Left,
    Right,
}

impl Transform {
    /// Reads a transform; `src` is a valid subject with or without wildcards.
    pub fn parse(src: &str, dest: &str) -> Result<Self, Wrong> {
        let tokens: Vec<&str> = src.split('.').collect();
        let wildcards: Vec<usize> = (0..tokens.len()).filter(|index| tokens[*index] == "*").collect();
        let wrong = |message: String| Wrong { in_src: false, message };
        let mut parts = Vec::new();
        let mut ended = false;
        for token in dest.split('.') {
            if ended {
                return Err(wrong("`>` is only possible at the end".to_owned()));
            }
            match token {
                "" => {
                    return Err(wrong(
                        "a subject has no empty token: one dot between two, none at the ends".to_owned(),
                    ));
                }
                ">" => ended = true,
                _ => parts.push(part(token, &wildcards).map_err(wrong)?),
            }
        }
        match (tokens.last() == Some(&">"), ended) {
            (true, false) => Err(wrong(format!("`{src}` ends with `>`, so `dest` has to end with `>` too"))),
            (false, true) => Err(Wrong {
                in_src: true,
                message: "`dest` ends with `>`, so `src` has to end with `>` too".to_owned(),
            }),
            _ => Ok(Self { src: src.to_owned(), dest: parts, rest: ended.then_some(tokens.len() - 1) }),
        }
    }

    /// Which subjects it is for.
    pub fn src(&self) -> &str {
        &self.src
    }

    /// Appends what becomes of a subject; `false`, and nothing, if the subject does not match.
    pub fn apply(&self, subject: &[u8], out: &mut Vec<u8>) -> bool {
        if !patterns::matches(&self.src, subject) || !is_literal(subject) {
            return false;
        }
        let mut first = true;
        for part in &self.dest {
            if !std::mem::replace(&mut first, false) {
                out.push(b'.');
            }
            part.write(subject, out);
        }
        if let Some(count) = self.rest {
            let start = tokens_of(subject).take(count).map(|token| token.len() + 1).sum();
            if !first {
                out.push(b'.');
            }
            out.extend_from_slice(&subject[start..]);
        }
        true
    }

    /// What becomes of all subjects that are in `src` and in `pattern`, as a pattern that holds them; `None` if there
    /// are none.
    pub(crate) fn image(&self, pattern: &str) -> Option<String> {
        let from = patterns::intersection(&self.src, pattern)?;
        let mut image: Vec<String> = Vec::new();
        for part in &self.dest {
            if part.is_known(&from) {
                let mut known = Vec::new();
                part.write(from.as_bytes(), &mut known);
                image.push(String::from_utf8_lossy(&known).into_owned());
            } else if part.makes_one_token() {
                image.push("*".to_owned());
            } else {
                // The number of tokens that it makes is unknown.
                image.push(">".to_owned());
                return Some(image.join("."));
            }
        }
        if let Some(count) = self.rest {
            image.extend(from.split('.').skip(count).map(str::to_owned));
        }
        Some(image.join("."))
    }

    /// How many bytes longer a subject can become; `None` if that has no bound: a token that is used twice, or cut into
    /// many.
    pub(crate) fn growth(&self) -> Option<u64> {
        let mut used = Vec::new();
        let mut bytes = 0;
        for part in &self.dest {
            // A dot comes before each.
            bytes += 1 + match part {
                DestPart::Text(text) => text.len() as u64,
                DestPart::Partition { .. } => 10,
                DestPart::Token(token) | DestPart::Keep { token, .. } | DestPart::SplitFrom { token, .. }
                    if !used.contains(token) =>
                {
                    used.push(*token);
                    1
                }
                _ => return None,
            };
        }
        Some(bytes)
    }

    /// Whether no two subjects become the same one.
    pub(crate) fn is_reversible(&self) -> bool {
        let kept = |index| self.dest.iter().any(|part| matches!(part, DestPart::Token(token) if *token == index));
        let apart =
            |part: &DestPart| matches!(part, DestPart::Text(_) | DestPart::Token(_) | DestPart::Partition { .. });
        let mut tokens = self.src.split('.').enumerate();
        // A function that makes several tokens of one may make the same of it and its neighbours.
        tokens.all(|(index, token)| token != "*" || kept(index)) && self.dest.iter().all(apart)
    }
}

impl DestPart {
    fn write(&self, subject: &[u8], out: &mut Vec<u8>) {
        match self {
            Self::Text(text) => out.extend_from_slice(text.as_bytes()),
            Self::Token(token) => out.extend_from_slice(token_at(subject, *token)),
            Self::Partition { buckets, tokens } => {
                let hash = if tokens.is_empty() {
                    fnv1a(FNV_BASIS, subject)
                } else {
                    tokens.iter().fold(FNV_BASIS, |hash, token| fnv1a(hash, token_at(subject, *token)))
                };
                out.extend_from_slice(itoa::Buffer::new().format(hash % buckets).as_bytes());
            }
            Self::Split { token, at } => split(token_at(subject, *token), at, out),
            Self::SplitFrom { side, token, position } => {
                let (left, right) = cut(token_at(subject, *token), *side, *position);
                out.extend_from_slice(left);
                if !left.is_empty() && !right.is_empty() {
                    out.push(b'.');
                }
                out.extend_from_slice(right);
            }
            Self::Slice { side, token, size } => slice(token_at(subject, *token), *side, *size, out),
            Self::Keep { side, token, length } => {
                let token = token_at(subject, *token);
                let (left, right) = cut(token, *side, *length);
                let whole = left.is_empty() || right.is_empty();
                out.extend_from_slice(match side {
                    _ if whole => token,
                    TransformSide::Left => left,
                    TransformSide::Right => right,
                });
            }
        }
    }

    /// Whether a pattern says enough to tell what comes out.
    fn is_known(&self, pattern: &str) -> bool {
        let literal = |token: &usize| token_at(pattern.as_bytes(), *token) != b"*";
        match self {
            Self::Text(_) => true,
            Self::Partition { buckets: 1, .. } => true,
            Self::Partition { tokens, .. } if tokens.is_empty() => is_literal(pattern.as_bytes()),
            Self::Partition { tokens, .. } => tokens.iter().all(literal),
            Self::Token(token)
            | Self::Split { token, .. }
            | Self::SplitFrom { token, .. }
            | Self::Slice { token, .. }
            | Self::Keep { token, .. } => literal(token),
        }
    }

    fn makes_one_token(&self) -> bool {
        match self {
            Self::Text(_) | Self::Token(_) | Self::Partition { .. } | Self::Keep { .. } => true,
            Self::SplitFrom { position: 0, .. } | Self::Slice { size: 0, .. } => true,
            Self::Split { .. } | Self::SplitFrom { .. } | Self::Slice { .. } => false,
        }
    }
}

/// Whether a subject is one that can be published: no empty tokens, no wildcards.
fn is_literal(subject: &[u8]) -> bool {
    tokens_of(subject).all(|token| !matches!(token, b"" | b"*" | b">"))
}

fn tokens_of(subject: &[u8]) -> impl Iterator<Item = &[u8]> {
    subject.split(|byte| *byte == b'.')
}

fn token_at(subject: &[u8], index: usize) -> &[u8] {
    tokens_of(subject).nth(index).unwrap_or_default()
}

const FNV_BASIS: u32 = 2_166_136_261;

fn fnv1a(hash: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(hash, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(16_777_619))
}

/// A token in two, so many bytes from one side; one that is no longer than that stays whole.
fn cut(token: &[u8], side: TransformSide, at: usize) -> (&[u8], &[u8]) {
    match side {
        _ if at >= token.len() => (token, &[]),
        TransformSide::Left => token.split_at(at),
        TransformSide::Right => token.split_at(token.len() - at),
    }
}

/// Pieces of one size; what is left over is at the other end.
fn slice(token: &[u8], side: TransformSide, size: usize, out: &mut Vec<u8>) {
    if size == 0 || size >= token.len() {
        return out.extend_from_slice(token);
    }
    let first = match side {
        TransformSide::Right if !token.len().is_multiple_of(size) => token.len() % size,
        _ => size,
    };
    let (first, rest) = token.split_at(first);
    out.extend_from_slice(first);
    for piece in rest.chunks(size) {
        out.push(b'.');
        out.extend_from_slice(piece);
    }
}

/// The deliminator becomes a dot where something stands on both sides of it.
fn split(token: &[u8], at: &[u8], out: &mut Vec<u8>) {
    let mut rest = token;
    let mut first = true;
    let mut last_empty = false;
    loop {
        let end = if at.is_empty() { letter(rest) } else { memchr::memmem::find(rest, at) };
        let piece = &rest[..end.unwrap_or(rest.len())];
        // As servers do it: no dot before an empty piece, none after an empty first one.
        if !first && !piece.is_empty() && !last_empty {
            out.push(b'.');
        }
        out.extend_from_slice(piece);
        last_empty = first && piece.is_empty();
        first = false;
        match end {
            Some(end) => rest = &rest[end + at.len()..],
            None => return,
        }
    }
}

/// Where the first letter ends; `None` if none follows.
fn letter(bytes: &[u8]) -> Option<usize> {
    let length = match std::str::from_utf8(&bytes[..bytes.len().min(4)]) {
        Ok(text) => text.chars().next()?.len_utf8(),
        Err(error) if error.valid_up_to() > 0 => {
            let text = std::str::from_utf8(&bytes[..error.valid_up_to()]).ok()?;
            text.chars().next()?.len_utf8()
        }
        Err(_) => 1,
    };
    (length < bytes.len()).then_some(length)
}

/// Reads one token of a destination that is neither empty nor `>`.
fn part(token: &str, wildcards: &[usize]) -> Result<DestPart, String> {
    if let Some(c) = token.chars().find(|c| c.is_control()) {
        return Err(format!("a subject cannot contain {c:?}"));
    }
    if let Some(number) = token.strip_prefix('$')
        && let Some(index) = whole_number(number)
    {
        return Ok(DestPart::Token(wildcard(token, index, wildcards)?));
    }
    let inner = token.strip_prefix("{{").and_then(|rest| rest.strip_suffix("}}")).filter(|inner| !inner.is_empty());
    if let Some(inner) = inner {
        return function(token, inner, wildcards);
    }
    if let Some(c) = token.chars().find(|c| c.is_whitespace()) {
        return Err(format!("a subject cannot contain {c:?}"));
    }
    if token == "*" {
        return Err("`*` is not possible here: `{{wildcard(1)}}` is what the first `*` of `src` stands for".to_owned());
    }
    if token.contains(['*', '>']) {
        return Err(format!("`{token}`: `>` is a whole token at the end, and `*` is not possible here"));
    }
    if token.contains("{{") || token.contains("}}") {
        return Err(format!(
            "`{token}`: a function is a whole token, such as `{{{{wildcard(1)}}}}`, with no dot in it and nothing around it"
        ));
    }
    Ok(DestPart::Text(token.to_owned()))
}

/// Reads what stands between `{{` and `}}`.
fn function(token: &str, inner: &str, wildcards: &[usize]) -> Result<DestPart, String> {
    let call = inner.trim_matches(' ');
    let unknown =
        || format!("`{token}`: there is no such function: write {{{{name(arguments)}}}} with one of {FUNCTIONS}");
    let (name, arguments) = call.strip_suffix(')').and_then(|call| call.split_once('(')).ok_or_else(unknown)?;
    let name = name.trim_end_matches(' ');
    // A comma and the blanks after it separate arguments.
    let arguments: Vec<&str> = arguments
        .split(',')
        .enumerate()
        .map(|(i, text)| if i > 0 { text.trim_start_matches(' ') } else { text })
        .collect();
    let read = Arguments { token, arguments: &arguments, wildcards };
    let side = |left: bool| if left { TransformSide::Left } else { TransformSide::Right };
    if is_name(name, "Wildcard") {
        return Ok(DestPart::Token(read.exactly(1, "the number of a wildcard of `src`")?.wildcard(0)?));
    }
    if is_name(name, "Partition") {
        let buckets = read.number(0, "the number of buckets")?;
        let buckets = u32::try_from(buckets).ok().filter(|buckets| *buckets > 0);
        let buckets = buckets.ok_or_else(|| format!("`{token}`: 1 to 2147483647 buckets are possible"))?;
        let tokens = (1..arguments.len()).map(|index| read.wildcard(index)).collect::<Result<_, _>>()?;
        return Ok(DestPart::Partition { buckets, tokens });
    }
    if is_name(name, "Split") {
        let read = read.exactly(2, "the number of a wildcard of `src` and a deliminator")?;
        let at = arguments[1];
        if let Some(c) = at.chars().find(|c| c.is_whitespace() || c.is_control()) {
            return Err(format!("`{token}`: the deliminator cannot contain {c:?}"));
        }
        return Ok(DestPart::Split { token: read.wildcard(0)?, at: at.as_bytes().to_vec() });
    }
    for left in [true, false] {
        let (split, slice, keep) = if left {
            ("SplitFromLeft", "SliceFromLeft", "Left")
        } else {
            ("SplitFromRight", "SliceFromRight", "Right")
        };
        if ![split, slice, keep].iter().any(|known| is_name(name, known)) {
            continue;
        }
        let read = read.exactly(2, "the number of a wildcard of `src` and a number of bytes")?;
        let (side, index) = (side(left), read.wildcard(0)?);
        // Below 1, servers do nothing.
        let size = usize::try_from(read.number(1, "the number of bytes")?).unwrap_or(0);
        return Ok(match name {
            name if is_name(name, split) => DestPart::SplitFrom { side, token: index, position: size },
            name if is_name(name, slice) => DestPart::Slice { side, token: index, size },
            _ => DestPart::Keep { side, token: index, length: size },
        });
    }
    if is_name(name, "Random") {
        return Err(format!(
            "`{token}`: `random` is not possible: a message that is copied again would get another subject; `partition` \
             always gives it the same"
        ));
    }
    Err(unknown())
}

/// Each word of a name begins with a letter of either case, as servers take it.
fn is_name(name: &str, known: &str) -> bool {
    let same = |(one, known): (u8, u8)| one == known || known.is_ascii_uppercase() && one == known.to_ascii_lowercase();
    name.len() == known.len() && name.bytes().zip(known.bytes()).all(same)
}

/// A number as servers read it: `None` for everything else, and for what no machine number holds.
fn whole_number(text: &str) -> Option<i64> {
    text.parse().ok()
}

/// The token that a wildcard of `src` stands at.
fn wildcard(token: &str, number: i64, wildcards: &[usize]) -> Result<usize, String> {
    let index = usize::try_from(number).ok().and_then(|number| number.checked_sub(1));
    let found = index.and_then(|index| wildcards.get(index)).copied();
    found.ok_or_else(|| match wildcards.len() {
        0 => format!("`{token}`: `src` has no `*` that `{number}` could mean"),
        count => format!("`{token}`: `{number}` is not the number of a `*` of `src`, which go from 1 to {count}"),
    })
}

/// What stands between the parentheses.
struct Arguments<'a> {
    token: &'a str,
    arguments: &'a [&'a str],
    wildcards: &'a [usize],
}

impl Arguments<'_> {
    fn exactly(self, count: usize, what: &str) -> Result<Self, String> {
        let given = if self.arguments == [""] { 0 } else { self.arguments.len() };
        if given == count {
            return Ok(self);
        }
        Err(format!("`{}`: it takes {what}, that is {count} and not {given} arguments", self.token))
    }

    fn number(&self, index: usize, what: &str) -> Result<i32, String> {
        let text = self.arguments.get(index).copied().unwrap_or_default().trim_matches(' ');
        let number = whole_number(text).and_then(|number| i32::try_from(number).ok());
        number.ok_or_else(|| format!("`{}`: {what} is `{text}`, which is no whole number up to 2147483647", self.token))
    }

    fn wildcard(&self, index: usize) -> Result<usize, String> {
        wildcard(self.token, self.number(index, "the number of a wildcard")?.into(), self.wildcards)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn apply(src: &str, dest: &str, subject: &str) -> Option<String> {
        let transform = Transform::parse(src, dest).unwrap_or_else(|wrong| panic!("{src} {dest}: {wrong:?}"));
        let mut out = b"x:".to_vec();
        let matched = transform.apply(subject.as_bytes(), &mut out);
        matched.then(|| String::from_utf8_lossy(&out[2..]).into_owned())
    }

    #[test]
    fn functions_do_what_servers_do() {
        let check = |function: &str, token: &str, expect: &str| {
            let subject = format!("t.{token}.z");
            let found = apply("t.*.*", &format!("{function}.$2"), &subject);
            assert_eq!(found, Some(format!("{expect}.z")), "{function} of {token}");
        };
        check("$1", "abc", "abc");
        check("{{ Wildcard ( 1 ) }}", "abc", "abc");
        check("$a", "abc", "$a");
        check("{{partition(3,1)}}", "abc", "2");
        check("{{Partition( 10 , 1)}}", "abcdefg", "3");
        check("{{partition(1)}}", "abc", "0");
        check("{{split(1,-)}}", "de-f-g", "de.f.g");
        check("{{split(1,-)}}", "-a--b-", "a.b");
        check("{{split(1,-)}}", "---", "");
        check("{{split(1,--)}}", "-a--b-", "-a.b-");
        check("{{split(1,)}}", "a\u{e9}b", "a.\u{e9}.b");
        check("{{split(1,))}}", "a)b", "a.b");
        check("{{splitFromLeft(1,2)}}", "abc", "ab.c");
        check("{{splitfromleft(1, 3)}}", "abc", "abc");
        check("{{SplitFromLeft(1,0)}}", "abc", "abc");
        check("{{splitFromRight(1,2)}}", "abc", "a.bc");
        check("{{splitFromRight(1,-1)}}", "abc", "abc");
        check("{{sliceFromLeft(1,2)}}", "abcdefg", "ab.cd.ef.g");
        check("{{sliceFromRight(1,2)}}", "abcdefg", "a.bc.de.fg");
        check("{{sliceFromRight(1,2)}}", "abcd", "ab.cd");
        check("{{sliceFromLeft(1,9)}}", "abc", "abc");
        check("{{left(1,2)}}", "abc", "ab");
        check("{{Left(1,3)}}", "abc", "abc");
        check("{{left(1,0)}}", "abc", "abc");
        check("{{right(1,2)}}", "abc", "bc");
        check("{{right(1,9)}}", "abc", "abc");
        check("{{left(1,1)}}", "\u{e9}", "\u{fffd}");
    }

    #[test]
    fn what_matches_is_taken_apart_and_the_rest_follows() {
        let check = |src: &str, dest: &str, subject: &str, expect: Option<&str>| {
            assert_eq!(apply(src, dest, subject).as_deref(), expect, "{src} {dest} {subject}");
        };
        check("a.b", "x", "a.b", Some("x"));
        check("a.b", "x", "a.c", None);
        check("a.>", "x.>", "a.b.c", Some("x.b.c"));
        check("a.>", "x.>", "a", None);
        check("a.>", ">", "a.b.c", Some("b.c"));
        check(">", "x.>", "a", Some("x.a"));
        check(">", ">", "a.b", Some("a.b"));
        check("a.*.>", "$1.x.>", "a.b.c.d", Some("b.x.c.d"));
        check("*.*", "{{wildcard(2)}}.{{left(1,1)}}.{{wildcard(2)}}", "abc.d", Some("d.a.d"));
        check("t.>", "x.{{partition(3)}}.>", "t.a.b.c", Some("x.2.a.b.c"));
        check("a.>", "x.>", "a..b", None);
        check("a.>", "x.>", "a.*", None);
    }

    #[test]
    fn what_is_wrong_is_told_with_what_would_be_right() {
        let check = |src: &str, dest: &str, expect: &str| {
            let wrong = Transform::parse(src, dest).expect_err(dest);
            assert!(!wrong.in_src && wrong.message.contains(expect), "{dest}: {wrong:?}");
        };
        let three = |dest: &str, expect: &str| check("t.*.*.*", dest, expect);
        three("", "no empty token");
        three("x..y", "no empty token");
        three("x. y", "cannot contain ' '");
        three("x.\n", "cannot contain '\\n'");
        three("x.*", "`{{wildcard(1)}}` is what the first");
        three("x.a*", "is a whole token");
        three("x.>.y", "only possible at the end");
        three("$4", "`4` is not the number of a `*` of `src`, which go from 1 to 3");
        three("$0", "from 1 to 3");
        three("{{wildcard(-1)}}", "from 1 to 3");
        three("{{WILDCARD(1)}}", "no such function");
        three("{{wildcard 1}}", "no such function");
        three("{{foo(1)}}", "one of wildcard, partition");
        three("{{wildcard()}}", "1 and not 0 arguments");
        three("{{wildcard(1,2)}}", "1 and not 2 arguments");
        three("{{wildcard(a)}}", "`a`, which is no whole number");
        three("{{wildcard(1)}}{{wildcard(2)}}", "no whole number");
        three("a{{wildcard(1)}}", "a whole token");
        three("{{left(1,1.5)}}", "a whole token");
        three("{{partition()}}", "the number of buckets is ``");
        three("{{partition(0,1)}}", "1 to 2147483647 buckets");
        three("{{partition(3,)}}", "the number of a wildcard is ``");
        three("{{partition(2147483648,1)}}", "up to 2147483647");
        three("{{partition(3,4)}}", "from 1 to 3");
        three("{{split(1)}}", "2 and not 1 arguments");
        three("{{split(1,-,-)}}", "2 and not 3 arguments");
        three("{{split(1,- )}}", "the deliminator cannot contain ' '");
        three("{{left(1,2147483648)}}", "up to 2147483647");
        three("{{random(3)}}", "`partition` always gives it the same");
        check("a", "$1", "no `*` that `1` could mean");
        check("a.>", "x", "has to end with `>` too");
        let wrong = Transform::parse("a.*", "x.>").unwrap_err();
        assert!(wrong.in_src && wrong.message.contains("`src` has to end with `>` too"), "{wrong:?}");
    }

    #[test]
    fn patterns_become_patterns() {
        let check = |src: &str, dest: &str, pattern: &str, expect: Option<&str>| {
            let image = Transform::parse(src, dest).unwrap().image(pattern);
            assert_eq!(image.as_deref(), expect, "{src} {dest} {pattern}");
        };
        check("a.>", "x.>", "a.b", Some("x.b"));
        check("a.>", "x.>", ">", Some("x.>"));
        check("a.>", "x.>", "*.*", Some("x.*"));
        check("a.>", "x.>", "b.>", None);
        check("a.*.*", "x.$2.{{left(1,1)}}", "a.bcd.*", Some("x.*.b"));
        check("a.*", "x.{{partition(3,1)}}.y", "a.*", Some("x.*.y"));
        check("a.*", "x.{{partition(3,1)}}.y", "a.abc", Some("x.2.y"));
        check("a.*", "x.{{split(1,-)}}.y", "a.*", Some("x.>"));
        check("a.*", "x.{{split(1,-)}}.y", "a.b-c", Some("x.b.c.y"));
        check("*.>", "{{sliceFromLeft(1,2)}}.>", ">", Some(">"));
    }

    #[test]
    fn reversible_is_what_keeps_everything() {
        let check = |src: &str, dest: &str, expect| {
            assert_eq!(Transform::parse(src, dest).unwrap().is_reversible(), expect, "{src} {dest}");
        };
        check("a.>", "b.>", true);
        check("a.*.*", "$2.x.$1", true);
        check("a.*", "{{partition(3,1)}}.$1", true);
        check("a.*.*", "x.$1", false);
        check("a.*", "{{left(1,2)}}", false);
        check("a.*.*", "$1.{{split(2,-)}}", false);
    }
}
