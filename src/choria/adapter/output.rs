//! The message that an adapter publishes.

use chrono::{DateTime, Datelike, Timelike, Utc};
use xxhash_rust::xxh3::Xxh3;

use super::Decoded;

/// What Choria's broker writes, whatever the type of its adapter.
pub const CHORIA_STREAMS: &str = "choria:adapters:choria_streams:output:1";
/// What older brokers wrote, and pages about them still say.
pub const JETSTREAM: &str = "choria:adapters:jetstream:output:1";

/// Which of the two is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum OutputProtocol {
    /// [`CHORIA_STREAMS`], with the id of the request.
    #[default]
    ChoriaStreams,
    /// [`JETSTREAM`], without it.
    JetStream,
}

impl OutputProtocol {
    /// Appends the message to `out`, byte for byte as Choria's broker writes it: Go's order of keys, and its escapes.
    pub fn encode(self, message: &Decoded, out: &mut Vec<u8>) {
        let protocol = match self {
            Self::ChoriaStreams => CHORIA_STREAMS,
            Self::JetStream => JETSTREAM,
        };
        out.reserve(message.data.len() + message.data.len() / 8 + message.sender.len() + 256);
        out.extend_from_slice(b"{\"protocol\":\"");
        out.extend_from_slice(protocol.as_bytes());
        out.extend_from_slice(b"\",\"data\":");
        text(&message.data, out);
        out.extend_from_slice(b",\"sender\":");
        text(&message.sender, out);
        out.extend_from_slice(b",\"time\":\"");
        time(message.time, out);
        out.push(b'"');
        if self == Self::ChoriaStreams {
            out.extend_from_slice(b",\"requestid\":");
            text(&message.request, out);
        }
        out.push(b'}');
    }
}

impl Decoded {
    /// An id of the message, for `Nats-Msg-Id`: 32 hexadecimal digits made of request, sender and agent. All replies to a
    /// request share its id, so that alone is not enough; where there is none, time and payload are part of it.
    pub fn message_id(&self) -> [u8; 32] {
        let mut hash = Xxh3::new();
        for part in [&self.request, &self.sender, &self.agent] {
            hash.update(part.as_bytes());
            hash.update(b"\0");
        }
        if self.request.is_empty() {
            hash.update(&self.time.timestamp().to_le_bytes());
            hash.update(&self.time.timestamp_subsec_nanos().to_le_bytes());
            hash.update(self.data.as_bytes());
        }
        let hash = hash.digest128();
        std::array::from_fn(|at| HEX[(hash >> (124 - 4 * at)) as usize & 15])
    }
}

/// A subject: each `%s` of the topic becomes the sender.
pub fn expand_topic(topic: &str, sender: &str) -> String {
    topic.replace("%s", sender)
}

const HEX: &[u8; 16] = b"0123456789abcdef";

/// A JSON text as Go's encoder writes it: it escapes what HTML gives a meaning, and U+2028 and U+2029.
fn text(text: &str, out: &mut Vec<u8>) {
    let bytes = text.as_bytes();
    out.push(b'"');
    let mut plain = 0;
    for (at, &byte) in bytes.iter().enumerate() {
        if !ESCAPED[usize::from(byte)] {
            continue;
        }
        let mut skipped = 1;
        let escape: &[u8] = match byte {
            b'"' => b"\\\"",
            b'\\' => b"\\\\",
            b'\n' => b"\\n",
            b'\r' => b"\\r",
            b'\t' => b"\\t",
            0x08 => b"\\b",
            0x0c => b"\\f",
            0xe2 => match bytes.get(at + 1..at + 3) {
                Some([0x80, 0xa8]) => {
                    skipped = 3;
                    b"\\u2028"
                }
                Some([0x80, 0xa9]) => {
                    skipped = 3;
                    b"\\u2029"
                }
                _ => continue,
            },
            other => {
                let [high, low] = [other >> 4, other & 15].map(|digit| HEX[usize::from(digit)]);
                out.extend_from_slice(&bytes[plain..at]);
                out.extend_from_slice(&[b'\\', b'u', b'0', b'0', high, low]);
                plain = at + 1;
                continue;
            }
        };
        out.extend_from_slice(&bytes[plain..at]);
        out.extend_from_slice(escape);
        plain = at + skipped;
    }
    out.extend_from_slice(&bytes[plain..]);
    out.push(b'"');
}

/// Bytes that begin something escaped.
const ESCAPED: [bool; 256] = {
    let mut escaped = [false; 256];
    let mut byte = 0;
    while byte < 0x20 {
        escaped[byte] = true;
        byte += 1;
    }
    escaped[b'"' as usize] = true;
    escaped[b'\\' as usize] = true;
    escaped[b'<' as usize] = true;
    escaped[b'>' as usize] = true;
    escaped[b'&' as usize] = true;
    escaped[0xe2] = true;
    escaped
};

/// A time as Go has it (`time.RFC3339Nano`), in UTC: without zeros at the end of the fraction.
fn time(time: DateTime<Utc>, out: &mut Vec<u8>) {
    let mut digits = |number: u32, width: usize, before: &[u8]| {
        out.extend_from_slice(before);
        let mut rest = number;
        let start = out.len();
        out.resize(start + width, b'0');
        for place in out[start..].iter_mut().rev() {
            *place = b'0' + (rest % 10) as u8;
            rest /= 10;
        }
    };
    digits(time.year().unsigned_abs(), 4, b"");
    digits(time.month(), 2, b"-");
    digits(time.day(), 2, b"-");
    digits(time.hour(), 2, b"T");
    digits(time.minute(), 2, b":");
    digits(time.second(), 2, b":");
    let nanoseconds = time.nanosecond();
    if nanoseconds > 0 {
        digits(nanoseconds, 9, b".");
        let kept = out.iter().rposition(|byte| *byte != b'0').map_or(0, |at| at + 1);
        out.truncate(kept);
    }
    out.push(b'Z');
}
