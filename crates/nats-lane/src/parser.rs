//! The server's half of the NATS client protocol, parsed in place: no allocation per message, nothing is copied.
//!
//! [`parse`] takes the bytes received so far and returns every complete message as offsets into them.
//! Header blocks are not interpreted: they are passed on byte for byte, as a server stored them.

use std::ops::Range;

use serde::{Deserialize, Deserializer, de};

/// Longest control line accepted; servers send at most a few KiB (subject, reply and numbers).
const MAX_CONTROL_LINE: usize = 64 * 1024;
/// Longest INFO or -ERR line accepted (INFO lists every server of the cluster).
const MAX_INFO_LINE: usize = 1024 * 1024;
/// Largest message accepted: what an API reply needs to hold a message of the greatest `max_payload` that a server
/// allows (64 MiB) in base64, and something beside it.
const MAX_MESSAGE: usize = 92 << 20;

/// A piece of the buffer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Span {
    start: u32,
    len: u32,
}

impl Span {
    fn new(range: Range<usize>) -> Self {
        // Both fit: the buffer is bounded by MAX_MESSAGE and the lane's read-ahead.
        Self { start: range.start as u32, len: range.len() as u32 }
    }

    /// The bytes of this piece.
    pub fn of<'a>(&self, buffer: &'a [u8]) -> &'a [u8] {
        &buffer[self.start as usize..(self.start + self.len) as usize]
    }

    /// Number of bytes.
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// One message, as offsets into the buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MessageFrame {
    /// Subscription it came for.
    pub sid: u64,
    /// Subject.
    pub subject: Span,
    /// Reply subject; empty for none.
    pub reply: Span,
    /// Header block with its version line and the empty line at the end; empty for none.
    pub header: Span,
    /// Payload.
    pub payload: Span,
}

/// What the server says beside messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Control {
    /// `INFO` with its JSON.
    Info(Vec<u8>),
    /// `PING`: to be answered.
    Ping,
    /// `PONG`.
    Pong,
    /// `-ERR` with its text, quotes removed.
    Err(String),
}

/// Bytes that are not the protocol; the connection is of no more use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("protocol error: {0}")]
pub struct ParseError(String);

fn bad<T>(what: &str, line: &[u8]) -> Result<T, ParseError> {
    let shown = &line[..line.len().min(80)];
    Err(ParseError(format!("{what} in `{}`", String::from_utf8_lossy(shown).escape_debug())))
}

/// How far [`parse`] came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parsed {
    /// Bytes at the front of the buffer that are complete messages and control lines.
    pub consumed: usize,
    /// Total bytes from the front of the rest that the next message needs, where that is known; 0 otherwise.
    pub need: usize,
}

/// Parses everything complete at the front of `buffer`. Offsets in `frames` count from the start of `buffer`.
pub fn parse(buffer: &[u8], frames: &mut Vec<MessageFrame>, controls: &mut Vec<Control>) -> Result<Parsed, ParseError> {
    let mut at = 0;
    while at < buffer.len() {
        let rest = &buffer[at..];
        let Some(end) = memchr::memchr(b'\n', &rest[..rest.len().min(MAX_INFO_LINE)]) else {
            let limit = if rest[0] == b'I' || rest[0] == b'-' { MAX_INFO_LINE } else { MAX_CONTROL_LINE };
            if rest.len() >= limit {
                return bad("a line without an end", rest);
            }
            break;
        };
        let line = rest[..end].strip_suffix(b"\r").unwrap_or(&rest[..end]);
        let body = end + 1;
        match line.first() {
            Some(b'M' | b'H') => {
                let (frame, size) = message(line, at, at + body)?;
                if rest.len() < body + size + 2 {
                    return Ok(Parsed { consumed: at, need: body + size + 2 });
                }
                if &rest[body + size..body + size + 2] != b"\r\n" {
                    return bad("a payload of another length than announced", line);
                }
                frames.push(frame);
                at += body + size + 2;
            }
            _ => {
                if let Some(control) = control(line)? {
                    controls.push(control);
                }
                at += body;
            }
        }
    }
    Ok(Parsed { consumed: at, need: 0 })
}

/// `MSG <subject> <sid> [reply] <size>` or `HMSG <subject> <sid> [reply] <header size> <total size>`.
/// `line_at` is where the line lies in the buffer, `body_at` where header and payload begin.
fn message(line: &[u8], line_at: usize, body_at: usize) -> Result<(MessageFrame, usize), ParseError> {
    let (keyword, with_header) = match line {
        [b'M', b'S', b'G', b' ' | b'\t', ..] => (4, false),
        [b'H', b'M', b'S', b'G', b' ' | b'\t', ..] => (5, true),
        _ => return bad("an unknown operation", line),
    };
    let mut words = [(0usize, 0usize); 5];
    let mut count = 0;
    let mut at = keyword;
    while at < line.len() {
        if line[at] == b' ' || line[at] == b'\t' {
            at += 1;
            continue;
        }
        let end = memchr::memchr2(b' ', b'\t', &line[at..]).map_or(line.len(), |n| at + n);
        if count == words.len() {
            return bad("too many words", line);
        }
        words[count] = (at, end);
        count += 1;
        at = end;
    }
    let numbers = if with_header { 2 } else { 1 };
    if count != 2 + numbers && count != 3 + numbers {
        return bad("a wrong number of words", line);
    }
    let word = |n: usize| &line[words[n].0..words[n].1];
    let span = |n: usize| Span::new(line_at + words[n].0..line_at + words[n].1);
    let Some(sid) = number(word(1)) else { return bad("a subscription id that is no number", line) };
    let reply = if count == 3 + numbers { span(2) } else { Span::default() };
    let Some(size) = number(word(count - 1)) else { return bad("a size that is no number", line) };
    let header = if with_header { number(word(count - 2)) } else { Some(0) };
    let Some(header) = header else { return bad("a header size that is no number", line) };
    if size > MAX_MESSAGE as u64 || header > size {
        return bad("an impossible size", line);
    }
    let (size, header) = (size as usize, header as usize);
    let frame = MessageFrame {
        sid,
        subject: span(0),
        reply,
        header: Span::new(body_at..body_at + header),
        payload: Span::new(body_at + header..body_at + size),
    };
    Ok((frame, size))
}

fn control(line: &[u8]) -> Result<Option<Control>, ParseError> {
    match line {
        b"" | b"+OK" => Ok(None),
        b"PING" => Ok(Some(Control::Ping)),
        b"PONG" => Ok(Some(Control::Pong)),
        [b'I', b'N', b'F', b'O', b' ' | b'\t', json @ ..] => Ok(Some(Control::Info(json.to_vec()))),
        [b'-', b'E', b'R', b'R', text @ ..] => {
            let text = String::from_utf8_lossy(text);
            Ok(Some(Control::Err(text.trim().trim_matches('\'').to_owned())))
        }
        _ => bad("an unknown operation", line),
    }
}

/// The largest number that is accepted from a server. No stream comes near it, and sums of a few such numbers fit into
/// 64 bits: whatever a server sends, arithmetic on it does not overflow. Times in nanoseconds are below it until 2116.
pub const MAX_NUMBER: u64 = 1 << 62;

/// An unsigned decimal number up to [`MAX_NUMBER`], nothing else beside it.
pub fn number(word: &[u8]) -> Option<u64> {
    if word.is_empty() || word.len() > 19 {
        return None;
    }
    let number = word.iter().try_fold(0u64, |sum, byte| {
        byte.is_ascii_digit().then(|| sum.wrapping_mul(10).wrapping_add(u64::from(byte - b'0')))
    });
    number.filter(|number| *number <= MAX_NUMBER)
}

/// [`number`] in JSON.
pub(crate) fn count<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    bounded(u64::deserialize(deserializer)?)
}

/// [`count`] that may be absent.
pub(crate) fn optional_count<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    Option::<u64>::deserialize(deserializer)?.map(bounded).transpose()
}

fn bounded<E: de::Error>(number: u64) -> Result<u64, E> {
    if number > MAX_NUMBER {
        return Err(E::custom(format_args!("the number {number} is larger than {MAX_NUMBER}")));
    }
    Ok(number)
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng, rngs::StdRng};

    use super::*;

    type Owned = (u64, Vec<u8>, Vec<u8>, Vec<u8>, Vec<u8>);

    fn all(buffer: &[u8]) -> Result<(Vec<Owned>, Vec<Control>, Parsed), ParseError> {
        let (mut frames, mut controls) = (Vec::new(), Vec::new());
        let parsed = parse(buffer, &mut frames, &mut controls)?;
        let owned = frames
            .iter()
            .map(|f| {
                let of = |span: Span| span.of(buffer).to_vec();
                (f.sid, of(f.subject), of(f.reply), of(f.header), of(f.payload))
            })
            .collect();
        Ok((owned, controls, parsed))
    }

    fn check(input: &[u8], subject: &str, reply: &str, header: &[u8], payload: &[u8]) {
        let (frames, _, parsed) = all(input).unwrap();
        assert_eq!(parsed, Parsed { consumed: input.len(), need: 0 });
        let expect = (7, subject.as_bytes().to_vec(), reply.as_bytes().to_vec(), header.to_vec(), payload.to_vec());
        assert_eq!(frames, vec![expect]);
    }

    #[test]
    fn messages_come_out_byte_for_byte() {
        check(b"MSG a.b 7 5\r\nhello\r\n", "a.b", "", b"", b"hello");
        check(b"MSG a.b 7 re.ply 0\r\n\r\n", "a.b", "re.ply", b"", b"");
        check(b"MSG\ta.b  7 4\r\n\r\n\r\n\r\n", "a.b", "", b"", b"\r\n\r\n");
        check(b"HMSG a 7 12 14\r\nNATS/1.0\r\n\r\nhi\r\n", "a", "", b"NATS/1.0\r\n\r\n", b"hi");
        check(b"HMSG a 7 r 12 12\r\nNATS/1.0\r\n\r\n\r\n", "a", "r", b"NATS/1.0\r\n\r\n", b"");
        let odd = b"NATS/1.0 503 x\r\nno colon\r\n A : \xff\xfe \r\n\r\n";
        let mut input = format!("HMSG a 7 r {} {}\r\n", odd.len(), odd.len()).into_bytes();
        input.extend_from_slice(odd);
        input.extend_from_slice(b"\r\n");
        check(&input, "a", "r", odd, b"");
    }

    #[test]
    fn control_lines_are_told() {
        let (frames, controls, _) =
            all(b"INFO {\"a\":1}\r\nPING\r\n+OK\r\nPONG\r\n-ERR 'Authorization Violation'\r\n").unwrap();
        assert!(frames.is_empty());
        let expect = [
            Control::Info(b"{\"a\":1}".to_vec()),
            Control::Ping,
            Control::Pong,
            Control::Err("Authorization Violation".into()),
        ];
        assert_eq!(controls, expect);
    }

    #[test]
    fn what_is_not_the_protocol_is_refused() {
        for input in [
            &b"MSG a 7\r\n"[..],
            b"MSG a x 0\r\n\r\n",
            b"MSG a 7 r s 0\r\n\r\n",
            b"MSG a 7 -1\r\n\r\n",
            b"MSG a 7 99999999999\r\n",
            b"HMSG a 7 12 4\r\n",
            b"HMSG a 7 4\r\n",
            b"MSG a 7 2\r\nhello\r\n",
            b"HTTP/1.1 200 OK\r\n",
            b"\x16\x03\x01\n",
        ] {
            assert!(all(input).is_err(), "{:?}", String::from_utf8_lossy(input));
        }
        assert!(all(&[b'M'; MAX_CONTROL_LINE]).is_err());
    }

    #[test]
    fn a_stream_cut_anywhere_gives_the_same_messages() {
        // The header block holds a line without a colon, the payload holds line ends.
        let input = b"PING\r\nHMSG a.b 7 r.1 14 19\r\nNATS/1.0\r\nA\n\r\nh\r\n\r\n\r\nMSG c 7 3\r\nabc\r\nPONG\r\n";
        let (expect, expect_controls, _) = all(input).unwrap();
        for cut in 0..input.len() {
            let (mut frames, mut controls, parsed) = all(&input[..cut]).unwrap();
            assert!(parsed.need == 0 || parsed.need > cut - parsed.consumed, "need {} at {cut}", parsed.need);
            let (more, more_controls, _) = all(&input[parsed.consumed..]).unwrap();
            frames.extend(more);
            controls.extend(more_controls);
            assert_eq!((&frames, &controls), (&expect, &expect_controls), "cut at {cut}");
        }
    }

    /// The bounded twin of `fuzz/fuzz_targets/parser.rs`.
    #[test]
    fn mutated_input_never_panics() {
        let seeds: [&[u8]; 4] = [
            b"INFO {\"server_id\":\"x\",\"max_payload\":1048576}\r\nPING\r\n",
            b"MSG orders.new 1 $JS.ACK.S.C.1.5.5.1700000000000000000.0 3\r\nabc\r\n",
            b"HMSG a 2 r 12 14\r\nNATS/1.0\r\n\r\nhi\r\n-ERR 'x'\r\n",
            b"+OK\r\nHMSG a 2 12 12\r\nNATS/1.0\r\n\r\n\r\n",
        ];
        let mut random = StdRng::seed_from_u64(0x5eed);
        for _ in 0..50_000 {
            let mut input = seeds[random.random_range(0..seeds.len())].to_vec();
            for _ in 0..random.random_range(1..6) {
                let at = random.random_range(0..input.len());
                match random.random_range(0..4) {
                    0 => input[at] = random.random(),
                    1 => input.insert(at, random.random()),
                    2 => input.truncate(at.max(1)),
                    _ => input.extend_from_within(at..),
                }
            }
            let _ = all(&input);
        }
    }
}
