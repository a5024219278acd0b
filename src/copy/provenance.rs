//! `Choria-SR-Source: <stream> <sequence> <site> <name> <stored at, unix ms>`: where a copied message came from
//! (Choria's header). Every hop adds one value; the last one is the newest.

use memchr::memmem;

use crate::{
    names,
    nats::{headers, parser::number},
};

/// Says which replication a message came through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tag {
    stream: String,
    site: String,
    name: String,
}

/// One message's own part of its provenance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin {
    /// Source sequence.
    pub seq: u64,
    /// Stored time at the source, milliseconds since the Unix epoch.
    pub time_ms: i64,
}

impl Tag {
    /// The tag of a replication: source stream, site and the replication's name.
    pub fn new(stream: &str, site: &str, name: &str) -> Self {
        Self { stream: stream.to_owned(), site: site.to_owned(), name: name.to_owned() }
    }

    /// Appends our header line.
    pub fn write(&self, out: &mut Vec<u8>, origin: Origin) {
        let mut number = itoa::Buffer::new();
        out.extend_from_slice(names::SOURCE_HEADER.as_bytes());
        out.extend_from_slice(b": ");
        out.extend_from_slice(self.stream.as_bytes());
        out.push(b' ');
        out.extend_from_slice(number.format(origin.seq).as_bytes());
        out.push(b' ');
        out.extend_from_slice(self.site.as_bytes());
        out.push(b' ');
        out.extend_from_slice(self.name.as_bytes());
        out.push(b' ');
        out.extend_from_slice(number.format(origin.time_ms).as_bytes());
        out.extend_from_slice(b"\r\n");
    }

    /// Where a message came from, if its last hop was ours.
    pub fn origin(&self, header: &[u8]) -> Option<Origin> {
        self.matches(headers::last(header, names::SOURCE_HEADER.as_bytes())?)
    }

    /// Whether any hop of a message was ours.
    pub fn passed(&self, header: &[u8]) -> bool {
        // Most messages bear no provenance at all: one search settles that.
        memmem::find(header, names::SOURCE_HEADER.as_bytes()).is_some()
            && headers::lines(header)
                .filter_map(|line| headers::value_of(line, names::SOURCE_HEADER.as_bytes()))
                .any(|value| self.matches(value).is_some())
    }

    fn matches(&self, value: &[u8]) -> Option<Origin> {
        let mut words = value.split(|b| *b == b' ').filter(|word| !word.is_empty());
        let mut next = || words.next();
        let (stream, seq, site, name, time) = (next()?, next()?, next()?, next()?, next()?);
        let ours = stream == self.stream.as_bytes() && site == self.site.as_bytes() && name == self.name.as_bytes();
        if !ours || next().is_some() {
            return None;
        }
        Some(Origin { seq: number(seq)?, time_ms: i64::try_from(number(time)?).ok()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_recognised() {
        let tag = Tag::new("ORDERS", "US-EAST", "w1");
        let origin = Origin { seq: 42, time_ms: 1_700_000_000_123 };
        let mut block = b"NATS/1.0\r\nChoria-SR-Source: ORDERS 7 EU w0 5\r\n".to_vec();
        tag.write(&mut block, origin);
        block.extend_from_slice(b"\r\n");
        assert_eq!(tag.origin(&block), Some(origin));
        assert!(tag.passed(&block));
        assert!(Tag::new("ORDERS", "EU", "w0").passed(&block));
        assert_eq!(Tag::new("ORDERS", "EU", "w0").origin(&block), None);
    }

    #[test]
    fn what_is_not_ours_is_not() {
        let tag = Tag::new("ORDERS", "US-EAST", "w1");
        for value in [
            "",
            "ORDERS",
            "ORDERS x US-EAST w1 5",
            "ORDERS 1 US-EAST w1 -5",
            "ORDERS 1 US-EAST w1 5 6",
            "ORDERS 1 US-EAST w2 5",
            "orders 1 US-EAST w1 5",
        ] {
            let block = format!("NATS/1.0\r\nChoria-SR-Source: {value}\r\n\r\n");
            assert_eq!(tag.origin(block.as_bytes()), None, "{value}");
        }
        assert_eq!(tag.origin(b""), None);
    }
}
