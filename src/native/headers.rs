//! Headers on their way to a source: a server drops a message whose id another message had within the duplicate window of the
//! target, also one of another source (2.10 to 2.15), and replaces the mark of an earlier hop by its own. So both are renamed. Pure.

use memchr::memmem;
use nats_lane::headers::find_line_end;

use crate::names;

const ID: &[u8] = b"Nats-Msg-Id:";
const HOP: &[u8] = b"Nats-Stream-Source:";

/// The header block with its message ids and earlier hops renamed, which is that itself or is in `room`.
pub(super) fn without_ids<'a>(block: &'a [u8], room: &'a mut Vec<u8>) -> &'a [u8] {
    if memmem::find(block, b"\nNats-Msg-Id:").is_none() && memmem::find(block, b"\nNats-Stream-Source:").is_none() {
        return block;
    }
    room.clear();
    let mut rest = block;
    while !rest.is_empty() {
        let (line, after) = rest.split_at(find_line_end(rest).map_or(rest.len(), |at| at + 2));
        match line.strip_prefix(ID) {
            Some(value) => {
                room.extend_from_slice(names::ORIGINAL_ID_HEADER.as_bytes());
                room.push(b':');
                room.extend_from_slice(value);
            }
            None => {
                if line.starts_with(HOP) {
                    room.extend_from_slice(names::RENAMED.as_bytes());
                }
                room.extend_from_slice(line);
            }
        }
        rest = after;
    }
    room
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_renamed_and_all_else_stays() {
        let check = |block: &str, expect: &str| {
            assert_eq!(without_ids(block.as_bytes(), &mut b"old".to_vec()), expect.as_bytes());
        };
        check("", "");
        check("NATS/1.0\r\nA: Nats-Msg-Id: 1\r\n\r\n", "NATS/1.0\r\nA: Nats-Msg-Id: 1\r\n\r\n");
        check(
            "NATS/1.0\r\nA: b\r\nNats-Msg-Id: 1\r\nnats-msg-id: 2\r\nNats-Msg-Id:3\r\n\r\n",
            "NATS/1.0\r\nA: b\r\nChoria-SR-Msg-Id: 1\r\nnats-msg-id: 2\r\nChoria-SR-Msg-Id:3\r\n\r\n",
        );
        check(
            "NATS/1.0\r\nNats-Stream-Source: S:x 1 > > a\r\n\r\n",
            "NATS/1.0\r\nChoria-SR-Nats-Stream-Source: S:x 1 > > a\r\n\r\n",
        );
    }
}
