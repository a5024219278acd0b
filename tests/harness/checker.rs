//! Compares a source stream with its copy, message by message. Written once, used by every test: what it
//! finds is named as loss, duplicate, order, alteration or foreign message, with the first few offenders.

use std::collections::HashMap;
use std::fmt;

use anyhow::{Result, bail};

use super::raw::{Raw, Stored, header_values, split_lines};

/// How many offenders of a kind are described; all are counted.
const SHOWN: usize = 5;

/// Where a copy says that it comes from: `<stream> <sequence> <site> <name> <unix ms>`.
const PROVENANCE: &str = "Choria-SR-Source";

/// Removed from the source's header block: a publish with them would be checked by the target.
const CONTROL: &[&str] = &[
    "Nats-Msg-Id",
    "Nats-Required-Api-Level",
    "Nats-Incr",
    "Nats-Counter-Sources",
    "Nats-Stream-Source",
    "Nats-Scheduler",
    "Nats-TTL",
    "Nats-Rollup",
];
const CONTROL_PREFIXES: &[&str] = &["Nats-Expected-", "Nats-Batch-", "Nats-Trace-", "Nats-Schedule"];

/// Control headers that the target keeps under a name of ours, as `Choria-SR-<name>`.
const RENAMED: &[&str] = &[
    "Nats-Stream-Source",
    "Nats-Scheduler",
    "Nats-Schedule",
    "Nats-Schedule-Next",
    "Nats-Schedule-Target",
    "Nats-Schedule-TTL",
    "Nats-Incr",
    "Nats-Counter-Sources",
];

/// Headers that the target may have as the source has them, with another value or not at all.
const NEGOTIABLE: &[&str] = &["Nats-TTL", "Nats-Rollup"];

/// What a right copy looks like.
pub struct Expect<'a> {
    stream: &'a str,
    site: Option<&'a str>,
    name: Option<&'a str>,
    map: Box<dyn Fn(&str) -> String + 'a>,
    scope: Box<dyn Fn(&Stored) -> bool + 'a>,
    foreign: bool,
    late: bool,
}

impl<'a> Expect<'a> {
    /// A whole copy of `stream` under the same subjects.
    pub fn copy_of(stream: &'a str) -> Self {
        let (map, scope) = (Box::new(str::to_owned), Box::new(|_: &Stored| true));
        Self { stream, site: None, name: None, map, scope, foreign: false, late: false }
    }

    /// The site that the provenance must name.
    pub fn site(mut self, site: &'a str) -> Self {
        self.site = Some(site);
        self
    }

    /// Only what came through the replication of this name.
    pub fn name(mut self, name: &'a str) -> Self {
        self.name = Some(name);
        self
    }

    /// How subjects are mapped.
    pub fn mapped(mut self, map: impl Fn(&str) -> String + 'a) -> Self {
        self.map = Box::new(map);
        self
    }

    /// Which source messages shall be copied.
    pub fn only(mut self, scope: impl Fn(&Stored) -> bool + 'a) -> Self {
        self.scope = Box::new(scope);
        self
    }

    /// Others write to the target too: messages that are not from this source are ignored.
    pub fn shared(mut self) -> Self {
        self.foreign = true;
        self
    }

    /// A refused message may come later than its successors (a target without fast-ingest).
    pub fn late_allowed(mut self) -> Self {
        self.late = true;
        self
    }
}

/// One kind of fault.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Faults {
    pub count: usize,
    pub first: Vec<String>,
}

impl Faults {
    fn add(&mut self, describe: impl FnOnce() -> String) {
        self.count += 1;
        if self.first.len() < SHOWN {
            self.first.push(describe());
        }
    }
}

/// What a comparison found.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Report {
    /// Source messages in scope.
    pub expected: usize,
    /// Of them at the target, at least once.
    pub copied: usize,
    /// In scope at the source, not at the target.
    pub lost: Faults,
    /// More than once at the target.
    pub duplicated: Faults,
    /// After a message that follows it at the source.
    pub out_of_order: Faults,
    /// Another subject, header, payload or provenance than it must have.
    pub altered: Faults,
    /// At the target, but not from this source, or out of scope.
    pub foreign: Faults,
}

impl Report {
    fn kinds(&self) -> [(&'static str, &Faults); 5] {
        [
            ("lost", &self.lost),
            ("duplicated", &self.duplicated),
            ("out of order", &self.out_of_order),
            ("altered", &self.altered),
            ("foreign", &self.foreign),
        ]
    }

    pub fn is_clean(&self) -> bool {
        self.kinds().iter().all(|(_, faults)| faults.count == 0)
    }

    /// An error that tells all of it, unless the copy is right.
    pub fn verify(&self) -> Result<()> {
        if self.is_clean() { Ok(()) } else { bail!("the copy is wrong: {self}") }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} messages copied", self.copied, self.expected)?;
        for (kind, faults) in self.kinds() {
            if faults.count > 0 {
                write!(f, "\n  {} {kind}: {}", faults.count, faults.first.join("; "))?;
                let more = if faults.count > faults.first.len() { "; ..." } else { "" };
                write!(f, "{more}")?;
            }
        }
        Ok(())
    }
}

/// Reads both streams and compares them.
pub async fn compare_streams(source: &mut Raw, target: &mut Raw, to: &str, expect: &Expect<'_>) -> Result<Report> {
    let from = source.read_stream(expect.stream).await?;
    let copied = target.read_stream(to).await?;
    Ok(compare(&from, &copied, expect))
}

/// Compares what was read from both sides.
pub fn compare(source: &[Stored], target: &[Stored], expect: &Expect<'_>) -> Report {
    let mut report = Report::default();
    let mut wanted: HashMap<u64, (&Stored, bool)> = HashMap::new();
    wanted.extend(source.iter().filter(|m| (expect.scope)(m)).map(|m| (m.seq, (m, false))));
    report.expected = wanted.len();

    let mut highest = 0;
    for copy in target {
        let ours = |p: &Provenance| p.stream == expect.stream && expect.name.is_none_or(|name| p.name == name);
        let Some(origin) = Provenance::of(copy).filter(ours) else {
            if !expect.foreign {
                report
                    .foreign
                    .add(|| format!("target {} `{}` has no provenance of this source", copy.seq, copy.subject));
            }
            continue;
        };
        let Some((original, seen)) = wanted.get_mut(&origin.seq) else {
            report.foreign.add(|| format!("target {} names source {}, which is not in scope", copy.seq, origin.seq));
            continue;
        };
        if *seen {
            report.duplicated.add(|| format!("source {} again at target {}", origin.seq, copy.seq));
            continue;
        }
        *seen = true;
        report.copied += 1;
        if origin.seq < highest && !expect.late {
            report.out_of_order.add(|| format!("source {} at target {}, after source {highest}", origin.seq, copy.seq));
        }
        highest = highest.max(origin.seq);
        if let Err(why) = same(original, copy, &origin, expect) {
            report.altered.add(|| format!("source {} at target {}: {why}", origin.seq, copy.seq));
        }
    }
    for message in source {
        if wanted.get(&message.seq).is_some_and(|(_, seen)| !seen) {
            report.lost.add(|| format!("source {} `{}`", message.seq, message.subject));
        }
    }
    report
}

#[derive(Debug)]
struct Provenance {
    stream: String,
    seq: u64,
    site: String,
    name: String,
    unix_ms: u64,
}

impl Provenance {
    /// The last one: a chain of hops keeps those of the hops before.
    fn of(message: &Stored) -> Option<Self> {
        let value = header_values(&message.header, PROVENANCE).pop()?;
        let fields: Vec<&str> = value.split(' ').collect();
        let [stream, seq, site, name, unix_ms] = fields[..] else { return None };
        let (stream, site, name) = (stream.to_owned(), site.to_owned(), name.to_owned());
        Some(Self { stream, seq: seq.parse().ok()?, site, name, unix_ms: unix_ms.parse().ok()? })
    }
}

fn same(original: &Stored, copy: &Stored, origin: &Provenance, expect: &Expect<'_>) -> Result<(), String> {
    let subject = (expect.map)(&original.subject);
    if copy.subject != subject {
        return Err(format!("subject `{}` instead of `{subject}`", copy.subject));
    }
    if copy.payload != original.payload {
        return Err(format!("payload of {} bytes differs from {} bytes", copy.payload.len(), original.payload.len()));
    }
    if expect.site.is_some_and(|site| site != origin.site) {
        return Err(format!("provenance names site `{}`", origin.site));
    }
    if origin.unix_ms != original.time / 1_000_000 {
        return Err(format!("provenance names time {} instead of {}", origin.unix_ms, original.time / 1_000_000));
    }
    same_headers(original, copy)
}

fn same_headers(original: &Stored, copy: &Stored) -> Result<(), String> {
    let mut want = source_lines(&original.header);
    let found = target_lines(&copy.header, &original.header);
    // From 2.12 the server itself takes a status out of the first line of what it stores.
    if found.first() == Some(&b"NATS/1.0".as_slice()) && want[0].starts_with(b"NATS/1.0 ") {
        want[0] = found[0];
    }
    if want != found {
        return Err(format!("headers are {} instead of {}", show(&found), show(&want)));
    }
    // What went under another name must be there under it.
    let first = |block: &[u8], name: &str| header_values(block, name).into_iter().next();
    if header_values(&original.header, "Choria-SR-Msg-Id").is_empty() {
        let (id, kept) = (first(&original.header, "Nats-Msg-Id"), first(&copy.header, "Choria-SR-Msg-Id"));
        if id != kept {
            return Err(format!("message id {id:?} is kept as {kept:?}"));
        }
    }
    for name in RENAMED {
        let kept = header_values(&copy.header, &format!("Choria-SR-{name}"));
        for value in header_values(&original.header, name) {
            if !kept.contains(&value) {
                return Err(format!("`{name}: {value}` is not kept under our own name"));
            }
        }
    }
    for name in NEGOTIABLE {
        if first(&copy.header, name).is_some() && first(&original.header, name).is_none() {
            return Err(format!("`{name}` is not at the source"));
        }
    }
    Ok(())
}

/// The source's lines that must be at the target as they are.
fn source_lines(block: &[u8]) -> Vec<&[u8]> {
    let control = |line: &&[u8]| {
        let Some(name) = name(line) else { return false };
        CONTROL.contains(&name) || CONTROL_PREFIXES.iter().any(|p| name.starts_with(p)) || is_renamed(name)
    };
    lines(block).into_iter().filter(|l| !control(l)).collect()
}

/// The target's lines without what we add.
fn target_lines<'a>(block: &'a [u8], original: &[u8]) -> Vec<&'a [u8]> {
    let own_id = header_values(original, "Choria-SR-Msg-Id").is_empty();
    let added = |line: &&[u8]| match name(line) {
        Some("Nats-Msg-Id" | "Nats-Expected-Last-Sequence" | "Nats-Expected-Stream") => true,
        Some("Choria-SR-Msg-Id") => own_id,
        Some(name) => NEGOTIABLE.contains(&name) || is_renamed(name),
        None => false,
    };
    let mut lines: Vec<&[u8]> = lines(block).into_iter().filter(|l| !added(l)).collect();
    // Only the last one is ours.
    if let Some(at) = lines.iter().rposition(|l| name(l) == Some(PROVENANCE)) {
        lines.remove(at);
    }
    lines
}

fn is_renamed(name: &str) -> bool {
    RENAMED.iter().any(|r| name.strip_prefix("Choria-SR-") == Some(r))
}

/// All lines, the first too; a message without a block counts as one with an empty block, because the copy
/// always has one.
fn lines(block: &[u8]) -> Vec<&[u8]> {
    if block.is_empty() {
        return vec![b"NATS/1.0"];
    }
    let mut lines: Vec<&[u8]> = split_lines(block).collect();
    while lines.last().is_some_and(|l| l.is_empty()) {
        lines.pop();
    }
    lines
}

/// Name of a header line, exactly as it is spelled.
fn name(line: &[u8]) -> Option<&str> {
    let at = line.iter().position(|b| *b == b':')?;
    std::str::from_utf8(&line[..at]).ok()
}

fn show(lines: &[&[u8]]) -> String {
    let text: Vec<_> = lines.iter().map(|l| String::from_utf8_lossy(l).into_owned()).collect();
    format!("{text:?}")
}
