//! Header blocks as bytes: a version line, then lines that need not be well-formed, then an empty line. Nothing
//! here requires a block to be valid, because servers store what is not.

use bytes::BytesMut;

use crate::parser;

/// First line of every header block (ADR-4).
pub const VERSION: &[u8] = b"NATS/1.0";

/// Writes one publish command: `HPUB`, or `PUB` where the header block is empty. `reply` may be empty, too.
pub fn publish(out: &mut BytesMut, subject: &[u8], reply: &[u8], block: &[u8], payload: &[u8]) {
    out.reserve(subject.len() + reply.len() + block.len() + payload.len() + 64);
    let verb: &[u8] = if block.is_empty() { b"PUB " } else { b"HPUB " };
    for part in [verb, subject, b" ", reply, b" "] {
        out.extend_from_slice(part);
    }
    let mut number = itoa::Buffer::new();
    if !block.is_empty() {
        out.extend_from_slice(number.format(block.len()).as_bytes());
        out.extend_from_slice(b" ");
    }
    out.extend_from_slice(number.format(block.len() + payload.len()).as_bytes());
    for part in [b"\r\n", block, payload, b"\r\n"] {
        out.extend_from_slice(part);
    }
}

/// The status code in the first line of a block, as in `NATS/1.0 503`.
pub fn status(block: &[u8]) -> Option<u16> {
    let rest = block.strip_prefix(VERSION)?.strip_prefix(b" ")?;
    let digits = rest.get(..3)?;
    if rest.get(3).is_some_and(|next| !matches!(next, b' ' | b'\r')) {
        return None;
    }
    parser::number(digits).map(|n| n as u16)
}

/// The text after the status code, without blanks around it.
pub fn status_text(block: &[u8]) -> String {
    let line = block.split(|b| *b == b'\r').next().unwrap_or_default();
    let text = String::from_utf8_lossy(line.get(VERSION.len() + 4..).unwrap_or_default());
    text.trim().to_owned()
}

/// The lines of a block after the first one, without their line ends, up to the empty line.
pub fn lines(block: &[u8]) -> impl Iterator<Item = &[u8]> {
    lines_of(block).skip(1)
}

/// All lines, without their line ends, up to the empty line at the end.
pub fn lines_of(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let (line, next) = match find_line_end(rest) {
            Some(at) => (&rest[..at], &rest[at + 2..]),
            None => (rest, &rest[rest.len()..]),
        };
        rest = next;
        (!line.is_empty() || !rest.is_empty()).then_some(line)
    })
}

/// Where the first `\r\n` begins. A lone `\n` does not end a line: servers look for `\r\n` too.
pub fn find_line_end(bytes: &[u8]) -> Option<usize> {
    memchr::memchr_iter(b'\n', bytes).find(|at| *at > 0 && bytes[at - 1] == b'\r').map(|at| at - 1)
}

/// The value of a header line with exactly this name (names are case-sensitive for the server), blanks around it
/// removed.
pub fn value_of<'a>(line: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    Some(line.strip_prefix(name)?.strip_prefix(b":")?.trim_ascii())
}

/// The last value of a header.
pub fn last<'a>(block: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    lines(block).filter_map(|line| value_of(line, name)).last()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_a_code_in_the_first_line() {
        assert_eq!(status(b"NATS/1.0 503\r\n\r\n"), Some(503));
        assert_eq!(status(b"NATS/1.0 100 Idle Heartbeat\r\nA: b\r\n\r\n"), Some(100));
        assert_eq!(status(b"NATS/1.0\r\nA: 503\r\n\r\n"), None);
        assert_eq!(status(b"NATS/1.0 5034\r\n\r\n"), None);
        assert_eq!(status(b"NATS/1.0 x"), None);
        assert_eq!(status(b""), None);
        assert_eq!(status_text(b"NATS/1.0 409 Consumer Deleted\r\n\r\n"), "Consumer Deleted");
        assert_eq!(status_text(b"NATS/1.0 503\r\n\r\n"), "");
    }

    #[test]
    fn lines_need_not_be_well_formed() {
        let block = b"NATS/1.0\r\nA: 1\r\nno colon\r\nB:\nstill B\r\n\xff: x\r\n\r\n";
        let found: Vec<_> = lines(block).collect();
        assert_eq!(found, [&b"A: 1"[..], b"no colon", b"B:\nstill B", b"\xff: x"]);
        assert_eq!(lines(b"NATS/1.0\r\n\r\n").count(), 0);
        assert_eq!(lines(b"").count(), 0);
        assert_eq!(lines(b"NATS/1.0\r\nA: 1").collect::<Vec<_>>(), [b"A: 1"]);
    }

    #[test]
    fn the_last_value_counts() {
        let block = b"NATS/1.0\r\nA:1 \r\na: 9\r\nA:  2 \r\nAB: 3\r\n\r\n";
        assert_eq!(last(block, b"A"), Some(&b"2"[..]));
        assert_eq!(last(block, b"C"), None);
    }
}
