//! From a source message's header block to the target's. Pure. Everything is kept byte for byte except headers that a
//! server acts on: a server checks the headers of a publish, but not those of messages that it copies itself (mirrors,
//! sources).
//!
//! | header | at the target |
//! |---|---|
//! | `Nats-Expected-*` | removed: it is about the source's sequences. A KV update stores one in the message. On replicated streams of 2.14 and later a wrong `Nats-Expected-Last-Msg-Id` stops the stream |
//! | `Nats-Msg-Id` | renamed: catching up compresses time, so an id that was reused after its window would be dropped |
//! | `Nats-TTL` | shortened by the age of the message, where both streams act on it |
//! | `Nats-Rollup` | kept where it removes the same messages, else removed and counted |
//! | `Nats-Trace-*`, `Nats-Batch-*`, `Nats-Required-Api-Level` | removed: from 2.11 a trace-only message is neither stored nor acknowledged, from 2.12 a publish with `Nats-Batch-*` is refused |
//! | `Nats-Stream-Source`, `Nats-Schedule*`, `Nats-Incr`, `Nats-Counter-Sources` | renamed: servers act on them or refuse them (2.15 the first, 2.14 a stray `Nats-Scheduler`) |

use std::sync::LazyLock;

use memchr::memmem;
use nats_lane::{headers, parse_duration};

use crate::{
    copy::target::provenance::{MessageOrigin, Tag},
    names,
};

/// Which headers of a message keep their effect: the source acts on them, and the target allows them. A source stores a
/// header that it does not act on as data (a server before 2.11 does so with `Nats-TTL`, a mirror with every header
/// that its origin stored): at the target it would remove messages that the source keeps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Allowed {
    /// `Nats-TTL` (`allow_msg_ttl` of both streams).
    pub ttl: bool,
    /// `Nats-Rollup: sub` (`allow_rollup_hdrs` of both streams).
    pub rollup_subject: bool,
    /// `Nats-Rollup: all`: correct only if the target has everything of the source and no other messages, so only at a
    /// target that was created for this copy.
    pub rollup_all: bool,
}

/// Headers that make a second arrival of the same message harmless.
#[derive(Debug, Clone, Copy)]
pub struct Stamp<'a> {
    /// The target's last sequence before this message.
    pub chain: Option<u64>,
    /// An id that the target remembers for its duplicate window.
    pub id: Option<&'a str>,
}

/// The facts about one message that is copied.
#[derive(Debug, Clone, Copy)]
pub struct Passage<'a> {
    /// Its origin.
    pub origin: MessageOrigin,
    /// Its age at the source, seconds.
    pub age_secs: u64,
    /// The header that identifies it.
    pub stamp: Stamp<'a>,
    /// The stream that must store it, named in the first message of a run or batch.
    pub expected_stream: Option<&'a str>,
}

static NATS_LINE: LazyLock<memmem::Finder<'static>> = LazyLock::new(|| memmem::Finder::new(b"\r\nNats-"));

/// Writes the header block of the target message into `out` (cleared first). Returns how many headers were removed
/// because they would not have the effect that they have at the source.
pub fn header_block(out: &mut Vec<u8>, block: &[u8], allowed: Allowed, tag: &Tag, passage: &Passage<'_>) -> u64 {
    let mut removed = 0;
    // Chain and id come directly after the version line, before every other header: servers up to 2.10 use the first
    // occurrence of their name, even inside another name or a value.
    let body = first_line(out, block);
    stamp(out, passage);
    if tag.leads() {
        tag.write(out, passage.origin);
    }
    if body.starts_with(b"Nats-") || NATS_LINE.find(body).is_some() {
        removed = copy_lines(out, body, allowed, passage.age_secs);
    } else {
        out.extend_from_slice(body);
    }
    end_line(out);
    if !tag.leads() {
        tag.write(out, passage.origin);
    }
    out.extend_from_slice(b"\r\n");
    removed
}

/// Writes the version line into `out` (cleared first). Returns the other lines, without the empty one at the end, which
/// is written after our headers.
pub(in crate::copy) fn first_line<'b>(out: &mut Vec<u8>, block: &'b [u8]) -> &'b [u8] {
    out.clear();
    let end = headers::find_line_end(block).map_or(block.len(), |at| at + 2);
    let (version, body) = block.split_at(end);
    out.extend_from_slice(if block.is_empty() { headers::VERSION } else { version });
    end_line(out);
    body.strip_suffix(b"\r\n").unwrap_or(body)
}

fn stamp(out: &mut Vec<u8>, passage: &Passage<'_>) {
    if let Some(last) = passage.stamp.chain {
        let mut number = itoa::Buffer::new();
        push(out, "Nats-Expected-Last-Sequence", number.format(last).as_bytes());
    }
    if let Some(id) = passage.stamp.id {
        push(out, "Nats-Msg-Id", id.as_bytes());
    }
    if let Some(stream) = passage.expected_stream {
        push(out, "Nats-Expected-Stream", stream.as_bytes());
    }
}

pub(in crate::copy) fn end_line(out: &mut Vec<u8>) {
    if !out.ends_with(b"\r\n") {
        out.extend_from_slice(b"\r\n");
    }
}

pub(in crate::copy) fn push(out: &mut Vec<u8>, name: &str, value: &[u8]) {
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

/// Copies line by line, removing or renaming headers that a server would act on. Names are compared as the server
/// does: exactly.
fn copy_lines(out: &mut Vec<u8>, body: &[u8], allowed: Allowed, age_secs: u64) -> u64 {
    let mut removed = 0;
    let mut rest = body;
    // Servers act on the first of several headers of one name.
    let (mut has_ttl, mut has_rollup) = (false, false);
    let mut kept_id = headers::lines_of(body).any(|line| line.starts_with(b"Choria-SR-Msg-Id:"));
    while !rest.is_empty() {
        let end = headers::find_line_end(rest).map_or(rest.len(), |at| at + 2);
        let line = &rest[..end];
        rest = &rest[end..];
        match fate(line, allowed) {
            HeaderFate::Keep => out.extend_from_slice(line),
            HeaderFate::Drop => {}
            HeaderFate::Refused => removed += 1,
            HeaderFate::Rollup if std::mem::replace(&mut has_rollup, true) => removed += 1,
            HeaderFate::Rollup => out.extend_from_slice(line),
            HeaderFate::Rename => {
                out.extend_from_slice(names::RENAMED_HEADER_PREFIX.as_bytes());
                out.extend_from_slice(line);
            }
            // The id of the first hop stays: a later one was set by a hop in between.
            HeaderFate::Id => {
                if !std::mem::replace(&mut kept_id, true) {
                    out.extend_from_slice(names::ORIGINAL_ID_HEADER.as_bytes());
                    out.extend_from_slice(&line[b"Nats-Msg-Id".len()..]);
                }
            }
            HeaderFate::Ttl(_) if std::mem::replace(&mut has_ttl, true) => removed += 1,
            HeaderFate::Ttl(value) => match time_to_live(value) {
                Some(Ttl::Never) if allowed.ttl => out.extend_from_slice(line),
                Some(Ttl::Seconds(seconds)) if allowed.ttl => {
                    let mut number = itoa::Buffer::new();
                    // A server accepts no value below a second; the message was still there a moment ago.
                    push(out, "Nats-TTL", number.format(seconds.saturating_sub(age_secs).max(1)).as_bytes());
                }
                _ => removed += 1,
            },
        }
    }
    removed
}

enum HeaderFate<'a> {
    Keep,
    /// Without meaning at the target.
    Drop,
    /// With an effect that it cannot have at the target; counted.
    Refused,
    /// A rollup with the same effect at the target.
    Rollup,
    /// Kept under our own name.
    Rename,
    /// The source's own message id.
    Id,
    /// A time to live, to be shortened by the message's age.
    Ttl(&'a [u8]),
}

/// The handling of a header line. Each of these would otherwise be acted on or refused by a server of some
/// version; the list is measured.
fn fate(line: &[u8], allowed: Allowed) -> HeaderFate<'_> {
    let Some(rest) = line.strip_prefix(b"Nats-") else { return HeaderFate::Keep };
    let Some(colon) = memchr::memchr(b':', rest) else { return HeaderFate::Keep };
    let (name, value) = (&rest[..colon], rest[colon + 1..].trim_ascii());
    match name {
        b"Msg-Id" => HeaderFate::Id,
        b"TTL" => HeaderFate::Ttl(value),
        b"Rollup" if value.eq_ignore_ascii_case(b"sub") && allowed.rollup_subject => HeaderFate::Rollup,
        b"Rollup" if value.eq_ignore_ascii_case(b"all") && allowed.rollup_all => HeaderFate::Rollup,
        b"Rollup" => HeaderFate::Refused,
        b"Stream-Source" | b"Scheduler" | b"Incr" | b"Counter-Sources" => HeaderFate::Rename,
        _ if name.starts_with(b"Schedule") => HeaderFate::Rename,
        b"Required-Api-Level" => HeaderFate::Drop,
        _ if name.starts_with(b"Expected-") || name.starts_with(b"Batch-") || name.starts_with(b"Trace-") => {
            HeaderFate::Drop
        }
        _ => HeaderFate::Keep,
    }
}

/// A time to live that a server acts on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ttl {
    /// Longer than any limit of the stream.
    Never,
    /// In seconds, at least one.
    Seconds(u64),
}

/// How a server reads the value of a `Nats-TTL`; `None` where it has no effect (`0`) or a server refuses it.
fn time_to_live(value: &[u8]) -> Option<Ttl> {
    let value = std::str::from_utf8(value).ok()?;
    if value.eq_ignore_ascii_case("never") {
        return Some(Ttl::Never);
    }
    let seconds = match value.bytes().all(|byte| byte.is_ascii_digit()) {
        true => value.parse::<u64>().ok()?,
        // Servers know no units beyond hours.
        false if value.ends_with(['d', 'w', 'M', 'Y']) => return None,
        false => parse_duration(value).ok()?.as_secs(),
    };
    (seconds > 0).then_some(Ttl::Seconds(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: &str = "Choria-SR-Source: S 7 SITE w 5\r\n\r\n";

    fn run(block: &[u8], allowed: Allowed, expected_stream: Option<&str>) -> (String, u64) {
        let mut out = b"old".to_vec();
        let passage = Passage {
            origin: MessageOrigin { seq: 7, time_ms: 5 },
            age_secs: 10,
            stamp: Stamp { chain: Some(41), id: None },
            expected_stream,
        };
        let removed = header_block(&mut out, block, allowed, &Tag::new("S", "SITE", "w"), &passage);
        (String::from_utf8_lossy(&out).into_owned(), removed)
    }

    fn check(lines: &str, expect: &str, expect_removed: u64) {
        let all = Allowed { ttl: true, rollup_subject: true, rollup_all: false };
        check_allowed(lines, all, expect, expect_removed);
    }

    fn check_allowed(lines: &str, allowed: Allowed, expect: &str, expect_removed: u64) {
        let (out, removed) = run(format!("NATS/1.0\r\n{lines}\r\n").as_bytes(), allowed, None);
        let expect = format!("NATS/1.0\r\nNats-Expected-Last-Sequence: 41\r\n{expect}{OURS}");
        assert_eq!((out, removed), (expect, expect_removed), "{lines}");
    }

    #[test]
    fn a_message_without_headers_gets_ours() {
        let (out, _) = run(b"", Allowed::default(), Some("T"));
        assert_eq!(out, format!("NATS/1.0\r\nNats-Expected-Last-Sequence: 41\r\nNats-Expected-Stream: T\r\n{OURS}"));
    }

    #[test]
    fn provenance_that_leads_is_first_and_is_found_there() {
        let tag = Tag::new("S", "SITE", "w").leading(true);
        let origin = MessageOrigin { seq: 7, time_ms: 9 };
        let stamp = Stamp { chain: None, id: Some("id") };
        let passage = Passage { origin, age_secs: 0, stamp, expected_stream: None };
        let (mut out, block) = (Vec::new(), b"NATS/1.0\r\nA: b\r\nChoria-SR-Source: T 1 EU x 2\r\n\r\n");
        header_block(&mut out, block, Allowed::default(), &tag, &passage);
        let expect = "NATS/1.0\r\nNats-Msg-Id: id\r\nChoria-SR-Source: S 7 SITE w 9\r\nA: b\r\nChoria-SR-Source: T 1 EU x 2\r\n\r\n";
        assert_eq!(String::from_utf8(out.clone()).unwrap(), expect);
        assert_eq!((tag.origin(&out), Tag::new("S", "SITE", "w").origin(&out)), (Some(origin), None));
        header_block(&mut out, block, Allowed::default(), &Tag::new("S", "SITE", "w"), &passage);
        assert_eq!(tag.origin(&out), Some(origin), "what was copied before the document said so");
    }

    #[test]
    fn what_servers_do_not_act_on_is_kept_byte_for_byte() {
        for lines in [
            "A: 1\r\nb:2\r\nA:  3 \r\n",
            "no colon\r\n: empty name\r\n A : \u{1}\r\n",
            "KV-Operation: DEL\r\nNats-Marker-Reason: MaxAge\r\n",
            "nats-msg-id: lower\r\nNats-Msg-Idx: 1\r\n",
            "Choria-SR-Source: X 1 Y z 2\r\n",
            "A: Nats-Expected-Stream: x\r\n",
            "Nats-NoColon\r\n",
        ] {
            check(lines, lines, 0);
        }
    }

    #[test]
    fn what_servers_act_on_is_not_replayed() {
        check("A: 1\r\nNats-Expected-Last-Subject-Sequence: 4\r\nB: 2\r\n", "A: 1\r\nB: 2\r\n", 0);
        check("Nats-Expected-Stream: X\r\nNats-Expected-Last-Msg-Id: y\r\n", "", 0);
        check("Nats-Batch-Id: X\r\nNats-Batch-Sequence: 1\r\nNats-Required-Api-Level: 2\r\n", "", 0);
        check("Nats-Trace-Dest: a\r\nNats-Trace-Only: true\r\n", "", 0);
        check("Nats-Msg-Id: abc\r\n", "Choria-SR-Msg-Id: abc\r\n", 0);
        check("Nats-Msg-Id: hop\r\nChoria-SR-Msg-Id: abc\r\n", "Choria-SR-Msg-Id: abc\r\n", 0);
        check("Nats-Stream-Source: a b\r\n", "Choria-SR-Nats-Stream-Source: a b\r\n", 0);
        check(
            "Nats-Schedule: @at x\r\nNats-Scheduler: y\r\n",
            "Choria-SR-Nats-Schedule: @at x\r\nChoria-SR-Nats-Scheduler: y\r\n",
            0,
        );
        check("Nats-Incr: +1\r\n", "Choria-SR-Nats-Incr: +1\r\n", 0);
    }

    #[test]
    fn what_the_target_does_not_allow_is_left_out_and_counted() {
        check("Nats-TTL: 60\r\nA: 1\r\n", "Nats-TTL: 50\r\nA: 1\r\n", 0);
        check("Nats-TTL: 1m\r\n", "Nats-TTL: 50\r\n", 0);
        check("Nats-TTL: 3\r\n", "Nats-TTL: 1\r\n", 0);
        check("Nats-TTL: never\r\n", "Nats-TTL: never\r\n", 0);
        check("Nats-TTL: Never\r\n", "Nats-TTL: Never\r\n", 0);
        // No time to live at the source; at the target each of these would be one, or a refusal.
        for ttl in ["0", "0s", "-1", "-1s", "500ms", "", "soon", "1d", "18446744073709551616"] {
            check(&format!("Nats-TTL: {ttl}\r\nA: 1\r\n"), "A: 1\r\n", 1);
        }
        // The first one counts.
        check("Nats-TTL: 0\r\nNats-TTL: 3\r\n", "", 2);
        check("Nats-TTL: never\r\nNats-TTL: 3\r\n", "Nats-TTL: never\r\n", 1);
        check("Nats-Rollup: sub\r\nNats-Rollup: sub\r\n", "Nats-Rollup: sub\r\n", 1);
        check("Nats-Rollup: SUB\r\n", "Nats-Rollup: SUB\r\n", 0);
        check("Nats-Rollup: sub\r\n", "Nats-Rollup: sub\r\n", 0);
        check("Nats-Rollup: all\r\n", "", 1);
        check_allowed("Nats-TTL: 60\r\nNats-Rollup: sub\r\nA: 1\r\n", Allowed::default(), "A: 1\r\n", 2);
        let whole = Allowed { rollup_all: true, ..Allowed::default() };
        check_allowed("Nats-Rollup: all\r\n", whole, "Nats-Rollup: all\r\n", 0);
    }

    #[test]
    fn a_malformed_block_gets_our_header_where_servers_read() {
        let stamp = "Nats-Expected-Last-Sequence: 41\r\n";
        let ours = format!("{stamp}{OURS}");
        assert_eq!(run(b"NATS/1.0 503 x\r\n\r\n", Allowed::default(), None).0, format!("NATS/1.0 503 x\r\n{ours}"));
        assert_eq!(run(b"NATS/1.0\r\nA: 1", Allowed::default(), None).0, format!("NATS/1.0\r\n{stamp}A: 1\r\n{OURS}"));
        assert_eq!(run(b"\xff", Allowed::default(), None).0, format!("\u{fffd}\r\n{ours}"));
    }
}
