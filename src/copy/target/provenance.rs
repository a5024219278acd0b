//! `Choria-SR-Source: <stream> <sequence> <site> <name> <stored at, unix ms>`: the origin of a copied message
//! (Choria's header). Every hop adds one value; the last one is the newest.

use memchr::memmem;
use nats_lane::{
    Error, Lane, headers,
    jetstream::{Api, StreamInfo},
    parser::number,
};

use crate::{
    config::{FeedSubjects, Former, OriginTag, Replication},
    names,
};

/// Identifies the replication that a message came through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tag {
    stream: String,
    site: String,
    name: String,
    /// Former sites and names.
    former: Vec<Former>,
    /// Whether our value comes before those of earlier hops.
    leads: bool,
}

/// The last hop of a message that another site copied from the same stream, under the same name or its own default.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OtherSiteCopy {
    /// Name of that site.
    pub site: String,
    /// Name of its replication.
    pub name: String,
    /// The message's own part.
    pub origin: MessageOrigin,
}

/// One message's own part of its provenance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MessageOrigin {
    /// Source sequence.
    pub seq: u64,
    /// Stored time at the source, milliseconds since the Unix epoch.
    pub time_ms: i64,
}

impl OtherSiteCopy {
    /// What it carries, as a copy of this stream.
    pub fn tag(&self, stream: &str) -> OriginTag {
        OriginTag { stream: stream.to_owned(), site: self.site.clone(), name: Some(self.name.clone()), fed: None }
    }
}

impl Tag {
    /// The tag of a replication: source stream, site and the replication's name.
    pub fn new(stream: &str, site: &str, name: &str) -> Self {
        Self {
            stream: stream.to_owned(),
            site: site.to_owned(),
            name: name.to_owned(),
            former: Vec::new(),
            leads: false,
        }
    }

    /// The same, which also recognizes messages that were copied under former names.
    #[must_use]
    pub fn with_former(mut self, former: &[Former]) -> Self {
        self.former = former.to_vec();
        self
    }

    /// The same, with our value before or after those of earlier hops. Some readers know only the first value.
    #[must_use]
    pub fn leading(mut self, leads: bool) -> Self {
        self.leads = leads;
        self
    }

    /// Whether our value comes before those of earlier hops.
    pub fn leads(&self) -> bool {
        self.leads
    }

    /// Name of the site.
    pub fn site(&self) -> &str {
        &self.site
    }

    /// Writes our header line.
    pub fn write(&self, out: &mut Vec<u8>, origin: MessageOrigin) {
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

    /// The origin of a message, if its last hop was ours.
    pub fn origin(&self, header: &[u8]) -> Option<MessageOrigin> {
        let first = || values(header).next().and_then(|value| self.matches(value));
        let led = if self.leads { first() } else { None };
        led.or_else(|| self.matches(headers::last(header, names::SOURCE_HEADER.as_bytes())?))
    }

    /// The origin of a message that was stored at the target after the copy passed it: a replayed dead letter, or a repair. Its
    /// last hop is one of this site, also under a former name, and the one before is ours.
    pub fn origin_of_later(&self, header: &[u8]) -> Option<MessageOrigin> {
        let mut before = None;
        let mut last = None;
        for value in values(header) {
            before = last.replace(value);
        }
        let is_here = |site: &[u8]| {
            site == self.site.as_bytes() || self.former.iter().any(|former| site == former.site.as_bytes())
        };
        Hop::parse(last?).filter(|hop| is_here(hop.site))?;
        self.matches(before?)
    }

    /// Whether any hop of a message was ours.
    pub fn passed(&self, header: &[u8]) -> bool {
        // Most messages have no provenance at all: one search settles that.
        memmem::find(header, names::SOURCE_HEADER.as_bytes()).is_some()
            && values(header).any(|value| self.matches(value).is_some())
    }

    /// The origin of a message, if its last hop differs from ours in the site alone.
    pub fn other_site(&self, header: &[u8]) -> Option<OtherSiteCopy> {
        let hop = Hop::parse(headers::last(header, names::SOURCE_HEADER.as_bytes())?)?;
        let default = self.name == self.site && hop.name == hop.site;
        if hop.stream != self.stream.as_bytes() || self.is_ours(&hop) || !(hop.name == self.name.as_bytes() || default)
        {
            return None;
        }
        Some(hop.into())
    }

    fn matches(&self, value: &[u8]) -> Option<MessageOrigin> {
        Hop::parse(value).filter(|hop| self.is_ours(hop)).map(|hop| hop.origin)
    }

    fn is_ours(&self, hop: &Hop<'_>) -> bool {
        let named = |site: &str, name: &str| hop.site == site.as_bytes() && hop.name == name.as_bytes();
        let ours = named(&self.site, &self.name) || self.former.iter().any(|former| named(&former.site, &former.name));
        ours && hop.stream == self.stream.as_bytes()
    }
}

/// Recognizes what a target of kind `source` took over the feed of one replication. The header of its server names the stream and
/// the API prefix of the feed, so a stream of the same name that another feed, or another server, gives it is known as another one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FeedTag {
    api: String,
    /// What the header begins with, also under former names of the site.
    indexes: Vec<String>,
}

impl FeedTag {
    /// That of a replication of a site.
    pub(crate) fn of(replication: &Replication, site: &str) -> Self {
        let Replication { id, former, source, .. } = replication;
        let sites = std::iter::once(site).chain(former.iter().map(|former| former.site.as_str()));
        let mut indexes: Vec<_> = sites.map(|site| FeedSubjects::of(site, id).source_index(&source.stream)).collect();
        indexes.sort();
        indexes.dedup();
        Self { api: FeedSubjects::of(site, id).api(), indexes }
    }

    /// An error where the target has several sources of this feed, which differ in their filters alone.
    pub(crate) fn check(&self, target: &StreamInfo) -> Result<(), Error> {
        let sources = target.config["sources"].as_array().into_iter().flatten();
        let same = sources.filter(|source| source["external"]["api"] == self.api.as_str()).count();
        if same > 1 {
            let (stream, api) = (target.text("name"), &self.api);
            return Err(Error::hold(format!(
                "target stream `{stream}` has {same} sources with the API prefix `{api}`: its messages do not show from which of \
                 them they are"
            )));
        }
        Ok(())
    }

    /// The source sequence of a message of the target; `None` if it came another way.
    pub(crate) fn origin(&self, header: &[u8]) -> Option<u64> {
        let mut words = headers::last(header, names::STREAM_SOURCE_HEADER.as_bytes())?.split(|byte| *byte == b' ');
        let index = words.next()?;
        self.indexes.iter().any(|ours| is_index(index, ours)).then(|| number(words.next()?)).flatten()
    }
}

/// Whether the first word of the server's header is of this feed. A durable consumer adds a part of its own.
fn is_index(word: &[u8], feed: &str) -> bool {
    word.strip_prefix(feed.as_bytes()).is_some_and(|rest| rest.is_empty() || rest.starts_with(b":"))
}

/// All hops from a stream of this name in the provenance of a message: the sites, and the origins.
pub(crate) fn hops_from(header: &[u8], stream: &str) -> Vec<OtherSiteCopy> {
    let hops = values(header).filter_map(Hop::parse).filter(|hop| hop.stream == stream.as_bytes());
    hops.map(OtherSiteCopy::from).collect()
}

/// How many of the last messages of a target are read to see how it got them.
const LAST: usize = 16;

/// Whether one of the last messages of a stream has a header like that: a deleted replication leaves its messages behind, and
/// no record that says how the target got them.
pub(crate) async fn at_end(lane: &mut Lane, stream: &str, end: u64, is: impl Fn(&[u8]) -> bool) -> Result<bool, Error> {
    for seq in (1..=end).rev().take(LAST) {
        if let Some(message) = Api::new(lane).message(stream, seq).await?
            && is(&message.header)
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether any hop of a message is one of these.
pub(crate) fn came_from(header: &[u8], origins: &[OriginTag]) -> bool {
    let copied = || {
        memmem::find(header, names::SOURCE_HEADER.as_bytes()).is_some()
            && values(header).filter_map(Hop::parse).any(|hop| origins.iter().any(|origin| hop.is(origin)))
    };
    !origins.is_empty() && (was_fed(header, origins) || copied())
}

/// Whether a target of kind `source` took a message over one of these feeds, at this hop or an earlier one: a copy and a feed
/// keep the server's header under another name.
fn was_fed(header: &[u8], origins: &[OriginTag]) -> bool {
    let is_of = |value: &[u8], fed: &str| is_index(value.split(|byte| *byte == b' ').next().unwrap_or_default(), fed);
    let feeds = || origins.iter().filter_map(|origin| origin.fed.as_deref());
    feeds().next().is_some()
        && memmem::find(header, names::STREAM_SOURCE_HEADER.as_bytes()).is_some()
        && headers::lines(header).any(|line| {
            let line = line.strip_prefix(names::RENAMED.as_bytes()).unwrap_or(line);
            let value = headers::value_of(line, names::STREAM_SOURCE_HEADER.as_bytes());
            value.is_some_and(|value| feeds().any(|fed| is_of(value, fed)))
        })
}

/// All values of the header, in their order.
fn values(header: &[u8]) -> impl Iterator<Item = &[u8]> {
    headers::lines(header).filter_map(|line| headers::value_of(line, names::SOURCE_HEADER.as_bytes()))
}

/// One value of the header.
struct Hop<'a> {
    stream: &'a [u8],
    site: &'a [u8],
    name: &'a [u8],
    origin: MessageOrigin,
}

impl From<Hop<'_>> for OtherSiteCopy {
    fn from(hop: Hop<'_>) -> Self {
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        Self { site: text(hop.site), name: text(hop.name), origin: hop.origin }
    }
}

impl<'a> Hop<'a> {
    fn is(&self, origin: &OriginTag) -> bool {
        origin.fed.is_none()
            && self.stream == origin.stream.as_bytes()
            && self.site == origin.site.as_bytes()
            && origin.name.as_ref().is_none_or(|name| self.name == name.as_bytes())
    }

    fn parse(value: &'a [u8]) -> Option<Self> {
        let mut words = value.split(|b| *b == b' ').filter(|word| !word.is_empty());
        let mut next = || words.next();
        let (stream, seq, site, name, time) = (next()?, next()?, next()?, next()?, next()?);
        if next().is_some() {
            return None;
        }
        // No message has sequence 0: other writers may write any header.
        let seq = number(seq).filter(|seq| *seq > 0)?;
        let origin = MessageOrigin { seq, time_ms: i64::try_from(number(time)?).ok()? };
        Some(Self { stream, site, name, origin })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_recognised() {
        let tag = Tag::new("ORDERS", "US-EAST", "w1");
        let origin = MessageOrigin { seq: 42, time_ms: 1_700_000_000_123 };
        let mut block = b"NATS/1.0\r\nChoria-SR-Source: ORDERS 7 EU w0 5\r\n".to_vec();
        tag.write(&mut block, origin);
        block.extend_from_slice(b"\r\n");
        assert_eq!(tag.origin(&block), Some(origin));
        assert!(tag.passed(&block));
        assert_eq!(tag.origin_of_later(&block), None);
        let mut later = block.strip_suffix(b"\r\n").unwrap().to_vec();
        Tag::new("DEAD", "US-EAST", "w1").write(&mut later, MessageOrigin { seq: 3, time_ms: 9 });
        later.extend_from_slice(b"\r\n");
        assert_eq!((tag.origin(&later), tag.origin_of_later(&later)), (None, Some(origin)));
        assert!(Tag::new("ORDERS", "EU", "w0").passed(&block));
        assert_eq!(Tag::new("ORDERS", "EU", "w0").origin(&block), None);
    }

    #[test]
    fn former_names_of_the_site_are_ours_and_other_sites_are_not() {
        let block = |site: &str, name: &str| format!("NATS/1.0\r\nChoria-SR-Source: ORDERS 7 {site} {name} 5\r\n\r\n");
        let origin = MessageOrigin { seq: 7, time_ms: 5 };
        let check = |tag: &Tag, site: &str, name: &str, ours: bool, other: bool| {
            let block = block(site, name);
            let block = block.as_bytes();
            let found = (tag.origin(block), tag.passed(block), tag.other_site(block));
            let expect = other.then(|| OtherSiteCopy { site: site.to_owned(), name: name.to_owned(), origin });
            assert_eq!(found, (ours.then_some(origin), ours, expect), "{site} {name}");
        };
        let former = |site: &str, name: &str| Former { site: site.to_owned(), name: name.to_owned() };
        let default = Tag::new("ORDERS", "TWO", "TWO").with_former(&[former("ONE", "ONE")]);
        for (site, name, ours, other) in [
            ("TWO", "TWO", true, false),
            ("ONE", "ONE", true, false),
            ("ONE", "TWO", false, true),
            ("THREE", "THREE", false, true),
            ("THREE", "w1", false, false),
        ] {
            check(&default, site, name, ours, other);
        }
        let named = Tag::new("ORDERS", "TWO", "w1").with_former(&[former("ONE", "w1")]);
        for (site, name, ours, other) in
            [("ONE", "w1", true, false), ("THREE", "w1", false, true), ("THREE", "THREE", false, false)]
        {
            check(&named, site, name, ours, other);
        }
        assert_eq!(Tag::new("RETURNS", "TWO", "TWO").other_site(block("ONE", "ONE").as_bytes()), None);
    }

    #[test]
    fn later_copies_of_a_former_site_are_ours() {
        let former = Former { site: "ONE".to_owned(), name: "w1".to_owned() };
        let tag = Tag::new("ORDERS", "TWO", "w1").with_former(&[former]);
        for (copied, later, ours) in [
            ("ONE", "ONE", true),
            ("ONE", "TWO", true),
            ("TWO", "TWO", true),
            ("ONE", "THREE", false),
            ("THREE", "ONE", false),
        ] {
            let block = format!(
                "NATS/1.0\r\nChoria-SR-Source: ORDERS 7 {copied} w1 5\r\nChoria-SR-Source: ORDERS 7 {later} repair:w1 5\r\n\r\n"
            );
            let expect = ours.then_some(MessageOrigin { seq: 7, time_ms: 5 });
            assert_eq!(tag.origin_of_later(block.as_bytes()), expect, "{copied} {later}");
        }
    }

    #[test]
    fn the_server_s_header_names_the_feed() {
        let subjects = |site: &str, id: &str| FeedSubjects::of(site, id);
        let indexes = ["EAST", "ONE"].map(|site| subjects(site, "ORDERS.a").source_index("ORDERS")).to_vec();
        let tag = FeedTag { api: subjects("EAST", "ORDERS.a").api(), indexes };
        let check = |value: &str, expect: Option<u64>| {
            let header = format!("NATS/1.0\r\nNats-Stream-Source: {value}\r\n\r\n");
            assert_eq!(tag.origin(header.as_bytes()), expect, "{value}");
        };
        let index = |site: &str, id: &str, stream: &str| subjects(site, id).source_index(stream);
        let ours = index("EAST", "ORDERS.a", "ORDERS");
        check(&format!("{ours} 12 > > orders.1"), Some(12));
        check(&format!("{ours}:C=aB3dE6gH 12 > > orders.1"), Some(12));
        check(&format!("{} 12 > > orders.1", index("ONE", "ORDERS.a", "ORDERS")), Some(12));
        // Another replication, site or stream, and a source in the account itself.
        check(&format!("{} 12 > > orders.1", index("EAST", "ORDERS.b", "ORDERS")), None);
        check(&format!("{} 12 > > orders.1", index("WEST", "ORDERS.a", "ORDERS")), None);
        check(&format!("{} 12 > > orders.1", index("EAST", "ORDERS.a", "ORDERS2")), None);
        for wrong in [format!("{ours}x 12 > > o"), format!("{ours} x"), ours.clone(), "ORDERS 12 > > o".to_owned()] {
            check(&wrong, None);
        }
        assert_eq!(tag.origin(b""), None);
        // Two with the same prefix look the same.
        let source = |api: &str, filter: &str| serde_json::json!({"name": "ORDERS", "filter_subject": filter, "external": {"api": api}});
        let target = |other: &str| -> StreamInfo {
            let sources = [source(&tag.api, "a"), source(other, "b")];
            serde_json::from_value(serde_json::json!({"config": {"name": "T", "sources": sources}, "state": {}}))
                .unwrap()
        };
        assert_eq!(tag.check(&target("$SR.other.API")), Ok(()));
        let error = tag.check(&target(&tag.api)).unwrap_err().message;
        assert!(error.starts_with("target stream `T` has 2 sources with the API prefix `$SR."), "{error}");
    }

    #[test]
    fn any_hop_from_a_stream_counts() {
        let block = b"NATS/1.0\r\nChoria-SR-Source: A 7 EU one 5\r\nX: y\r\nChoria-SR-Source: B 3 US two 6\r\n\r\n";
        let check = |stream: &str, site: &str, name: Option<&str>, expect: bool| {
            let tag = OriginTag { stream: stream.into(), site: site.into(), name: name.map(str::to_owned), fed: None };
            assert_eq!(came_from(block, &[tag]), expect, "{stream} {site} {name:?}");
        };
        check("A", "EU", Some("one"), true);
        check("A", "EU", None, true);
        check("B", "US", Some("two"), true);
        check("B", "EU", Some("one"), false);
        check("A", "EU", Some("two"), false);
        check("A", "US", None, false);
        assert!(!came_from(block, &[]));
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
