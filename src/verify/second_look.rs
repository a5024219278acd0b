//! What is not explained by the first read is read again before it is reported: the source may have removed it meanwhile, or the
//! target by its limits.

use std::collections::{BTreeMap, HashMap, HashSet};

use nats_lane::{
    Error, Message, headers,
    jetstream::{Api, Delivery, StoredMessage},
    parser::number,
};

use super::{
    SourcePiece,
    compare::{BothSides, StreamComparison, TargetCursor, source_time_ns},
    fingerprint::{CopyTime, TargetMark},
    merge::{LOOK_UPS, Suspect},
    ranges::{EXAMPLES, MissingRanges},
    stream::{StreamSide, WantedRange, read_each, stream_name},
};
use crate::{
    config::{OnReject, Start},
    copy::{
        NamedChunks,
        target::{provenance::Tag, replay::letter_tag},
    },
    status::{DifferenceExample, DifferenceKind, ExpectedCause},
};

/// Ranges that are read one by one; more of them are read together with what is between them.
const APART: usize = 50;
/// Dead letters, and late copies, that are remembered.
const REMEMBERED: usize = 200_000;
/// Why nothing is repaired where more late copies may be there than are remembered.
const MANY_LATE: &str = "more messages than can be remembered are out of place at the target, so that they may be there: compare \
                         smaller ranges, with `from` and `to`";
/// Why nothing is repaired where more dead letters may be there than are remembered.
const MANY_LETTERS: &str = "more of them than can be remembered are in the dead letter stream, so that others may be there, too: \
                            compare smaller ranges, with `from` and `to`";
/// Why nothing is repaired where messages without a copy were not read again.
const MANY_GAPS: &str = "they are in more separate ranges than can be kept, so that not all were read again: compare smaller ranges, with \
                         `from` and `to`";
/// Why nothing is repaired where descriptions of objects were not looked up.
const MANY_OBJECTS: &str = "more messages of an object store are missing than are looked up, so that the chunks of some objects may be \
                            missing, too: compare smaller ranges, with `from` and `to`";
/// Why nothing is repaired where the first copy of the target is not known.
const UNKNOWN_FRONT: &str = "the first copy that the target has was not found, so that a limit of the target may have removed them, or \
                             they are before the configured start: compare again";
/// Slack for the time at which a server removes what has expired, nanoseconds.
const EXPIRY_SLACK: i64 = 5_000_000_000;
/// Bytes that a copy has in addition, at least.
const ADDED: usize = 64;

/// A message without a copy.
#[derive(Debug, Clone)]
struct Candidate {
    seq: u64,
    subject: String,
    bytes: usize,
}

/// What was found again.
#[derive(Debug, Default)]
struct LookedAgain {
    missing: MissingRanges,
    /// The first ones.
    examples: Vec<Candidate>,
    /// Messages that are missing beside those.
    expected: BTreeMap<ExpectedCause, u64>,
    late: Vec<LateCopy>,
    /// Messages that had no copy at the first read and were not read again; they are among the missing ones.
    not_judged: u64,
    doubt: Option<&'static str>,
}

impl LookedAgain {
    /// Adds a message that is missing. It is kept only as an example.
    fn add(&mut self, seq: u64, candidate: impl FnOnce() -> Candidate) {
        self.missing.add(seq);
        if self.examples.len() < EXAMPLES {
            self.examples.push(candidate());
        }
    }

    fn expect(&mut self, cause: ExpectedCause) {
        *self.expected.entry(cause).or_default() += 1;
    }

    /// Adds the messages in ranges that the first read could not keep, after all others. `keeps_fewer`: the target keeps fewer
    /// messages of each subject than the source, which explains them as it explains those that are not looked up.
    fn add_beyond(&mut self, beyond: u64, keeps_fewer: bool) {
        if beyond == 0 {
            return;
        }
        if keeps_fewer {
            *self.expected.entry(ExpectedCause::RemovedAtTarget).or_default() += beyond;
            return;
        }
        self.missing.beyond += beyond;
        self.not_judged = beyond;
        self.doubt = self.doubt.or(Some(MANY_GAPS));
    }
}

/// What the second look confirmed.
#[derive(Debug, Default)]
pub(super) struct ConfirmedMissing {
    pub ranges: MissingRanges,
    /// Why some of them may have a copy, or rightly have none: they are not repaired.
    pub doubt: Option<&'static str>,
}

#[derive(Debug, Clone, Copy)]
struct LateCopy {
    seq: u64,
    /// Stored time at the source, where the copy says it.
    time: Option<CopyTime>,
    target_seq: u64,
    repaired: bool,
}

/// What explains that copies are missing.
#[derive(Debug, Default)]
struct Explanations {
    /// Copies of source messages before this one were removed from the front of the target.
    removed_before: Option<u64>,
    /// Source messages before this one were never to be copied.
    start: Option<u64>,
    /// Times to live are acted on.
    ttl: bool,
    now_ns: i64,
    /// Largest message that the target takes.
    largest: Option<usize>,
    dead_letters: LetterOrigins,
    /// Subjects of the descriptions of objects begin with this.
    descriptions: Option<String>,
    /// Why these may not be all.
    doubt: Option<&'static str>,
}

impl Explanations {
    fn cause(&self, delivery: &Delivery, message: &Message<'_>, bytes: usize) -> Option<ExpectedCause> {
        let seq = delivery.stream_seq;
        if self.removed_before.is_some_and(|first| seq < first) {
            return Some(ExpectedCause::RemovedAtTarget);
        }
        if self.start.is_some_and(|start| seq < start) {
            return Some(ExpectedCause::BeforeStart);
        }
        let ttl = self.ttl.then(|| headers::last(message.header, b"Nats-TTL")).flatten();
        let seconds = ttl.and_then(|value| match number(value) {
            Some(seconds) => Some(seconds),
            None => nats_lane::parse_duration(std::str::from_utf8(value).ok()?).ok().map(|time| time.as_secs()),
        });
        if let Some(seconds) = seconds.filter(|seconds| *seconds > 0) {
            let life = i64::try_from(seconds).unwrap_or(i64::MAX).saturating_mul(1_000_000_000);
            if delivery.time_ns.saturating_add(life) < self.now_ns.saturating_add(EXPIRY_SLACK) {
                return Some(ExpectedCause::RemovedAtTarget);
            }
        }
        let too_large = self.largest.is_some_and(|largest| message.header.len() + bytes + ADDED > largest);
        (too_large || self.dead_letters.seqs.contains(&seq)).then_some(ExpectedCause::Rejected)
    }

    /// Whether a subject is that of a description of an object.
    fn describes(&self, subject: &[u8]) -> bool {
        self.descriptions.as_ref().is_some_and(|prefix| subject.starts_with(prefix.as_bytes()))
    }
}

/// Source sequences of messages without a copy that are in the dead letter stream.
#[derive(Debug, Default)]
struct LetterOrigins {
    seqs: HashSet<u64>,
    /// There are more than are remembered.
    are_more: bool,
}

impl LetterOrigins {
    fn add(&mut self, seq: u64) {
        if self.seqs.len() < REMEMBERED {
            self.seqs.insert(seq);
        } else {
            self.are_more |= !self.seqs.contains(&seq);
        }
    }

    fn doubt(&self) -> Option<&'static str> {
        self.are_more.then_some(MANY_LETTERS)
    }
}

impl StreamComparison<'_> {
    /// Judges what the first read of a range did not explain. Returns the messages that are missing.
    pub async fn second_look(&mut self, piece: SourcePiece, cursor: TargetCursor) -> Result<ConfirmedMissing, Error> {
        let missing = self.merge.end();
        let confirmed = self.look_for_missing(&missing, cursor).await?;
        self.look_up_unknown(piece).await?;
        self.look_at_suspects().await?;
        self.show(|record| record.position = piece.to);
        Ok(confirmed)
    }

    async fn look_for_missing(
        &mut self,
        missing: &MissingRanges,
        cursor: TargetCursor,
    ) -> Result<ConfirmedMissing, Error> {
        let mut confirmed = ConfirmedMissing::default();
        if missing.ranges().is_empty() {
            return Ok(confirmed);
        }
        let looked = loop {
            match self.try_missing(missing, cursor).await {
                Ok(looked) => break looked,
                Err(error) => self.wait_after(error).await?,
            }
        };
        confirmed.doubt = looked.doubt;
        for (cause, messages) in looked.expected {
            self.merge.expect(cause, messages);
        }
        for late in &looked.late {
            if late.repaired {
                self.merge.expect(ExpectedCause::Repaired, 1);
            } else {
                let list = self.merge.list(DifferenceKind::Order);
                list.add(late.seq);
                list.example(DifferenceExample {
                    source_seq: Some(late.seq),
                    target_seq: Some(late.target_seq),
                    subject: None,
                    detail: "is stored after messages that follow it at the source".to_owned(),
                });
            }
            if self.merge.suspects.len() < LOOK_UPS {
                self.merge.suspects.push(Suspect { seq: late.seq, target_seq: late.target_seq });
            }
        }
        let list = self.merge.list(DifferenceKind::Missing);
        list.add_missing(&looked.missing);
        if looked.not_judged > 0 {
            let kept = missing.ranges();
            list.example(DifferenceExample {
                source_seq: kept.last().map(|range| range.to),
                target_seq: None,
                subject: None,
                detail: format!(
                    "is the last of {} ranges without a copy that can be kept: {} messages after it had no copy and were not read \
                     again, so that some may rightly have none; compare from here on, with `from`",
                    kept.len(),
                    looked.not_judged
                ),
            });
        }
        confirmed.ranges = looked.missing;
        for candidate in looked.examples {
            list.example(DifferenceExample {
                source_seq: Some(candidate.seq),
                target_seq: None,
                subject: Some(candidate.subject),
                detail: format!("is not at the target; its payload has {} bytes", candidate.bytes),
            });
        }
        Ok(confirmed)
    }

    async fn try_missing(&mut self, missing: &MissingRanges, cursor: TargetCursor) -> Result<LookedAgain, Error> {
        self.connect().await?;
        let Some(mut sides) = self.sides.take() else { return Ok(LookedAgain::default()) };
        let mut looked = LookedAgain::default();
        let mut late = self.late_copies(&mut sides.target, missing, cursor).await?;
        if late.len() >= REMEMBERED {
            looked.doubt = Some(MANY_LATE);
        }
        let explanations = self.explanations(&mut sides, missing, cursor).await?;
        looked.doubt = looked.doubt.or(explanations.doubt);
        let (by_subject, keeps_fewer) = by_subject(&sides);
        let mut asked = Vec::new();
        // After those that are asked.
        let mut rest = LookedAgain::default();
        let scope = &self.job.replication.scope;
        for (from, to) in spans(missing) {
            let wanted = WantedRange { filters: scope.filters(), from, to, headers_only: true };
            rest.missing.close();
            read_each(&mut sides.source, wanted, |incoming| {
                let (seq, message) = (incoming.delivery.stream_seq, &incoming.message);
                if scope.excludes(message.subject) {
                    return;
                }
                let copy =
                    late.remove(&seq).filter(|copy| copy.time.is_none_or(|time| time.fits(incoming.delivery.time_ns)));
                looked.late.extend(copy);
                if !missing.contains(seq) || copy.is_some() {
                    rest.missing.close();
                    return;
                }
                let bytes =
                    headers::last(message.header, b"Nats-Msg-Size").and_then(number).unwrap_or_default() as usize;
                if let Some(cause) = explanations.cause(&incoming.delivery, message, bytes) {
                    looked.expect(cause);
                    rest.missing.close();
                    return;
                }
                let candidate =
                    || Candidate { seq, subject: String::from_utf8_lossy(message.subject).into_owned(), bytes };
                // Of an object store all are, so that they stay in order.
                if (by_subject || explanations.descriptions.is_some()) && asked.len() < LOOK_UPS {
                    asked.push(candidate());
                } else if keeps_fewer {
                    // As the first ones, which were looked up.
                    looked.expect(ExpectedCause::RemovedAtTarget);
                } else {
                    if explanations.describes(message.subject) {
                        looked.doubt = looked.doubt.or(Some(MANY_OBJECTS));
                    }
                    rest.add(seq, candidate);
                }
            })
            .await?;
        }
        for candidate in asked {
            if by_subject && self.is_replaced(&mut sides, &candidate).await? {
                looked.expect(ExpectedCause::RemovedAtTarget);
            } else if explanations.describes(candidate.subject.as_bytes())
                && self.is_incomplete(&mut sides, &candidate).await?
            {
                looked.expect(ExpectedCause::Incomplete);
            } else {
                looked.missing.close();
                looked.add(candidate.seq, || candidate);
            }
        }
        looked.missing.append(&rest.missing);
        looked.examples.extend(rest.examples);
        looked.add_beyond(missing.beyond, keeps_fewer);
        self.sides = Some(sides);
        Ok(looked)
    }

    /// Copies that were stored late: after where the first read of the target ended, or anywhere if it met them when their originals
    /// had been given up.
    async fn late_copies(
        &mut self,
        target: &mut StreamSide,
        missing: &MissingRanges,
        cursor: TargetCursor,
    ) -> Result<HashMap<u64, LateCopy>, Error> {
        let mut late = HashMap::new();
        let from = if self.merge.gave_up { cursor.start } else { cursor.read.unwrap_or_default() + 1 };
        if from > cursor.end {
            return Ok(late);
        }
        let prints = &self.prints;
        let wanted = WantedRange { filters: &[], from, to: cursor.end, headers_only: true };
        read_each(target, wanted, |incoming| {
            let origin = prints.origin(&incoming.delivery, incoming.message.header);
            if let Some((seq, time, repaired)) = origin.filter(|(seq, ..)| missing.contains(*seq))
                && late.len() < REMEMBERED
            {
                late.insert(seq, LateCopy { seq, time, target_seq: incoming.delivery.stream_seq, repaired });
            }
        })
        .await?;
        Ok(late)
    }

    /// Whether the target removed a copy because it has newer messages of its subject.
    async fn is_replaced(&mut self, sides: &mut BothSides, candidate: &Candidate) -> Result<bool, Error> {
        let mut room = Vec::new();
        let subject = self.job.replication.mapping.apply(candidate.subject.as_bytes(), &mut room);
        let subject = String::from_utf8_lossy(subject).into_owned();
        let target = stream_name(&sides.target.info).to_owned();
        let last = Api::new(&mut sides.target.lane).last_message_of(&target, &subject).await?;
        let Some(last) = last else { return Ok(false) };
        let newer = self.origin_of(&last).is_none_or(|(seq, _)| seq > candidate.seq);
        if !newer {
            return Ok(false);
        }
        // Where both keep the same number, the source would have removed it, too; unless others write to the target.
        let is_shared = self.job.is_shared || self.merge.expected.contains_key(&ExpectedCause::OtherWriter);
        if by_subject(sides).1 || is_shared || !self.job.replication.mapping.is_identity() {
            return Ok(true);
        }
        let source = stream_name(&sides.source.info).to_owned();
        let still = Api::new(&mut sides.source.lane).message(&source, candidate.seq).await?;
        Ok(still.is_none())
    }

    /// Whether the target has other chunks than a description names, for which the copy skips it.
    async fn is_incomplete(&mut self, sides: &mut BothSides, candidate: &Candidate) -> Result<bool, Error> {
        let source = stream_name(&sides.source.info).to_owned();
        let found = Api::new(&mut sides.source.lane).whole_message(&source, candidate.seq).await?;
        let named = found.and_then(|(_, payload)| NamedChunks::of(candidate.subject.as_bytes(), &payload));
        let Some(named) = named else { return Ok(false) };
        let target = stream_name(&sides.target.info).to_owned();
        let chunks = named.at_target(&mut sides.target.lane, &target, &self.job.replication.mapping).await?;
        Ok(chunks != named.chunks)
    }

    fn origin_of(&self, message: &StoredMessage) -> Option<(u64, bool)> {
        let delivery = Delivery { stream_seq: message.sequence, consumer_seq: 1, time_ns: message.time_ns, pending: 0 };
        self.prints.origin(&delivery, &message.header).map(|(seq, _, repaired)| (seq, repaired))
    }

    async fn explanations(
        &mut self,
        sides: &mut BothSides,
        missing: &MissingRanges,
        cursor: TargetCursor,
    ) -> Result<Explanations, Error> {
        let replication = &self.job.replication;
        let target = &mut sides.target;
        let stream = stream_name(&target.info).to_owned();
        let now = Api::new(&mut target.lane).stream_info(&stream).await?;
        target.info = now.ok_or_else(|| Error::hold(format!("stream `{stream}` does not exist")))?;
        let info = &target.info;
        let is_limited = ["max_age", "max_msgs", "max_bytes"].iter().any(|limit| info.number(limit) > 0);
        let (first_seq, ttl) = (info.state.first_seq, info.flag("allow_msg_ttl"));
        let stream_limit = usize::try_from(info.number("max_msg_size")).ok().filter(|limit| *limit > 0);
        let largest = stream_limit.unwrap_or(usize::MAX).min(target.lane.info().max_payload);
        let from = missing.ranges().first().map_or(1, |range| range.from);
        let read = self.merge.first_copy.and_then(|first| first.at_front(cursor.start, first_seq, from));
        let first = match read {
            Some(first) => Some(first),
            None => self.first_copy(target).await?,
        };
        // An empty target that had messages removed all of them.
        let front = first.or((info_is_empty(target)).then_some(u64::MAX));
        let removed_before = front.filter(|_| is_limited && first_seq > 1);
        let matters = is_limited && first_seq > 1 || replication.start != Start::All;
        let doubt = (matters && front.is_none()).then_some(UNKNOWN_FRONT);
        let start = first.filter(|_| replication.start != Start::All);
        let mut dead_letters = LetterOrigins::default();
        if let OnReject::DeadLetter { subject } = &replication.on_reject {
            let tag = letter_tag(replication, &self.job.site);
            dead_letters = read_letters(&mut sides.source, subject, &tag, missing).await?;
        }
        let doubt = doubt.or(dead_letters.doubt());
        let bucket = replication.source.stream.strip_prefix("OBJ_");
        let descriptions = bucket.map(|bucket| format!("$O.{bucket}.M."));
        let now_ns = source_time_ns(&sides.source);
        Ok(Explanations {
            removed_before,
            start,
            ttl,
            now_ns,
            largest: Some(largest),
            dead_letters,
            descriptions,
            doubt,
        })
    }

    /// The source sequence of the first copy that the target has.
    async fn first_copy(&mut self, target: &mut StreamSide) -> Result<Option<u64>, Error> {
        let stream = stream_name(&target.info).to_owned();
        let mut at = target.info.state.first_seq.max(1);
        for _ in 0..LOOK_UPS {
            let Some(message) = Api::new(&mut target.lane).message_from(&stream, at).await? else { break };
            if let Some((seq, false)) = self.origin_of(&message) {
                return Ok(Some(seq));
            }
            at = message.sequence + 1;
        }
        Ok(None)
    }

    /// Asks the source for the originals of copies that had none.
    async fn look_up_unknown(&mut self, piece: SourcePiece) -> Result<(), Error> {
        let unknown = std::mem::take(&mut self.merge.unknown);
        let mut originals: HashMap<u64, Option<StoredMessage>> = HashMap::new();
        for copy in &unknown {
            while !originals.contains_key(&copy.seq) {
                match self.original(copy.seq).await {
                    Ok(original) => _ = originals.insert(copy.seq, original),
                    Err(error) => self.wait_after(error).await?,
                }
            }
        }
        for copy in unknown {
            let original = originals.get(&copy.seq).cloned().flatten();
            self.judge_unknown(&copy, original.as_ref(), piece);
        }
        Ok(())
    }

    async fn original(&mut self, seq: u64) -> Result<Option<StoredMessage>, Error> {
        let source = &mut self.connect().await?.source;
        let stream = stream_name(&source.info).to_owned();
        Api::new(&mut source.lane).message(&stream, seq).await
    }

    fn judge_unknown(&mut self, copy: &TargetMark, original: Option<&StoredMessage>, piece: SourcePiece) {
        let scope = &self.job.replication.scope;
        let Some(original) = original else {
            return match copy.seq > piece.to {
                true => self.merge.extra(Some(copy.seq), copy.target_seq, None, "its original does not exist"),
                false => self.merge.expect(ExpectedCause::RemovedAtSource, 1),
            };
        };
        let out_of_scope =
            scope.excludes(original.subject.as_bytes()) || scope.of([original.subject.as_str()]).is_empty();
        if out_of_scope {
            return self.merge.expect(ExpectedCause::OutOfScope, 1);
        }
        let detail = match copy.time.is_none_or(|time| time.fits(original.time_ns)) {
            true => "is a second copy",
            false => "is a copy of another message than the source has at that sequence",
        };
        self.merge.extra(Some(copy.seq), copy.target_seq, Some(original.subject.clone()), detail);
    }

    /// Reads messages again whose contents differ, for examples. Late copies are compared here for the first time.
    async fn look_at_suspects(&mut self) -> Result<(), Error> {
        let counted: HashSet<u64> = {
            let lists = [DifferenceKind::Payload, DifferenceKind::Headers, DifferenceKind::Subject];
            let differences: Vec<_> = lists
                .iter()
                .filter_map(|kind| self.merge.list(*kind).difference())
                .flat_map(|found| found.ranges)
                .collect();
            let seqs = self.merge.suspects.iter().map(|suspect| suspect.seq);
            seqs.filter(|seq| differences.iter().any(|range| (range.from..=range.to).contains(seq))).collect()
        };
        for suspect in std::mem::take(&mut self.merge.suspects) {
            let wanted = [DifferenceKind::Payload, DifferenceKind::Headers, DifferenceKind::Subject];
            let is_late = !counted.contains(&suspect.seq);
            if !is_late && !wanted.iter().any(|kind| self.merge.list(*kind).wants_example()) {
                continue;
            }
            let differs = loop {
                match self.try_contents(suspect).await {
                    Ok(differs) => break differs,
                    Err(error) => self.wait_after(error).await?,
                }
            };
            let Some((subject, differs)) = differs else { continue };
            for (kind, detail) in differs {
                let list = self.merge.list(kind);
                if is_late {
                    list.add(suspect.seq);
                }
                list.example(DifferenceExample {
                    source_seq: Some(suspect.seq),
                    target_seq: Some(suspect.target_seq),
                    subject: Some(subject.clone()),
                    detail,
                });
            }
        }
        Ok(())
    }

    /// The source subject, and how the contents of a message and of its copy differ; `None` if one of them is gone.
    async fn try_contents(
        &mut self,
        suspect: Suspect,
    ) -> Result<Option<(String, Vec<(DifferenceKind, String)>)>, Error> {
        let sides = self.connect().await?;
        let (from, to) = (stream_name(&sides.source.info).to_owned(), stream_name(&sides.target.info).to_owned());
        let original = Api::new(&mut sides.source.lane).whole_message(&from, suspect.seq).await?;
        let copy = Api::new(&mut sides.target.lane).whole_message(&to, suspect.target_seq).await?;
        let (Some((original, was)), Some((copy, is))) = (original, copy) else { return Ok(None) };
        let (expect, expected_lines) = {
            let (delivery, message) = as_read(&original, &was);
            (self.prints.of_source(&delivery, &message).content, self.prints.lines())
        };
        let (delivery, message) = as_read(&copy, &is);
        let Some(found) = self.prints.of_target(&delivery, &message) else { return Ok(None) };
        let (found, lines) = (found.content, self.prints.lines());
        let mut differs = Vec::new();
        if expect.payload != found.payload {
            let at = was.iter().zip(&is).take_while(|(was, is)| was == is).count();
            let detail = format!(
                "the payload has {} bytes instead of {}, and differs from byte {} on",
                is.len(),
                was.len(),
                at + 1
            );
            differs.push((DifferenceKind::Payload, detail));
        }
        if expect.headers != found.headers {
            differs.push((DifferenceKind::Headers, header_words(&expected_lines, &lines)));
        }
        if expect.subject != found.subject {
            let mut room = Vec::new();
            let mapped = self.job.replication.mapping.apply(original.subject.as_bytes(), &mut room);
            let mapped = String::from_utf8_lossy(mapped);
            differs.push((DifferenceKind::Subject, format!("the subject is `{}` instead of `{mapped}`", copy.subject)));
        }
        Ok(Some((original.subject, differs)))
    }
}

/// Whether the target keeps a limited number of messages for each subject, and whether that is less than the source keeps.
fn by_subject(sides: &BothSides) -> (bool, bool) {
    let keeps = |side: &StreamSide| side.info.number("max_msgs_per_subject");
    let (source, target) = (keeps(&sides.source), keeps(&sides.target));
    (target > 0, target > 0 && (source <= 0 || target < source))
}

fn info_is_empty(side: &StreamSide) -> bool {
    side.info.state.messages == 0
}

/// The ranges to read again.
fn spans(missing: &MissingRanges) -> Vec<(u64, u64)> {
    let ranges = missing.ranges();
    match (ranges.first(), ranges.last()) {
        (Some(first), Some(last)) if ranges.len() > APART => vec![(first.from, last.to)],
        _ => ranges.iter().map(|range| (range.from, range.to)).collect(),
    }
}

/// Those of the messages without a copy that became dead letters and are still there.
async fn read_letters(
    source: &mut StreamSide,
    subject: &str,
    tag: &Tag,
    missing: &MissingRanges,
) -> Result<LetterOrigins, Error> {
    let streams = Api::new(&mut source.lane).stream_names(subject).await?;
    let mut letters = LetterOrigins::default();
    let own = stream_name(&source.info).to_owned();
    let Some(stream) = streams.into_iter().find(|stream| *stream != own) else { return Ok(letters) };
    let info = Api::new(&mut source.lane).stream_info(&stream).await?;
    let Some(info) = info.filter(|info| info.state.messages > 0) else { return Ok(letters) };
    let last = info.state.last_seq;
    let before = std::mem::replace(&mut source.info, info);
    let filters = [subject.to_owned()];
    let wanted = WantedRange { filters: &filters, from: 1, to: last, headers_only: true };
    let read = read_each(source, wanted, |incoming| {
        if let Some(origin) = tag.origin(incoming.message.header).filter(|origin| missing.contains(origin.seq)) {
            letters.add(origin.seq);
        }
    })
    .await;
    source.info = before;
    read.map(|()| letters)
}

/// A stored message as a consumer delivers it.
fn as_read<'a>(message: &'a StoredMessage, payload: &'a [u8]) -> (Delivery, Message<'a>) {
    let delivery = Delivery { stream_seq: message.sequence, consumer_seq: 1, time_ns: message.time_ns, pending: 0 };
    let message = Message { sid: 0, subject: message.subject.as_bytes(), reply: b"", header: &message.header, payload };
    (delivery, message)
}

/// Names of headers that differ.
fn header_words(expected: &[u8], found: &[u8]) -> String {
    let lines = |text: &[u8]| -> Vec<Vec<u8>> {
        text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).map(<[u8]>::to_vec).collect()
    };
    let (expected, found) = (lines(expected), lines(found));
    let name = |line: &Vec<u8>| {
        let name = line.split(|byte| *byte == b':').next().unwrap_or_default();
        format!("`{}`", nats_lane::excerpt(&String::from_utf8_lossy(name)))
    };
    let mut names: Vec<String> = Vec::new();
    for line in
        expected.iter().filter(|line| !found.contains(line)).chain(found.iter().filter(|line| !expected.contains(line)))
    {
        let name = name(line);
        if !names.contains(&name) {
            names.push(name);
        }
    }
    match names.as_slice() {
        [] => "the headers are in another order, or occur another number of times".to_owned(),
        [name] => format!("header {name} differs"),
        names => format!("headers {} differ", names[..names.len().min(5)].join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verify::{
        fingerprint::{Fingerprint, SourceMark},
        merge::Merge,
    };

    #[test]
    fn what_could_not_be_kept_is_counted_and_doubted() {
        // Each second message has no copy, in 60,000 separate ranges.
        let mut merge = Merge::new();
        merge.begin(1, 120_000);
        for seq in 1..=120_000 {
            let content = Fingerprint { subject: 1, headers: 2, payload: seq };
            if seq % 2 == 0 {
                let time = Some(CopyTime::Ms(seq as i64));
                merge.copy_read(TargetMark { seq, time, target_seq: seq / 2, repaired: false, content });
            }
            merge.source(SourceMark { seq, time_ns: seq as i64 * 1_000_000, content }, None);
        }
        let missing = merge.end();
        assert_eq!((missing.ranges().len(), missing.beyond), (50_000, 10_000));
        // The second read confirms the ranges that were kept.
        let mut looked = LookedAgain::default();
        for range in missing.ranges() {
            looked.add(range.from, || Candidate { seq: range.from, subject: "a".to_owned(), bytes: 1 });
            looked.missing.close();
        }
        looked.add_beyond(missing.beyond, false);
        assert_eq!((looked.missing.messages(), looked.not_judged, looked.doubt), (60_000, 10_000, Some(MANY_GAPS)));
        // A target that keeps fewer of each subject explains them.
        let mut looked = LookedAgain::default();
        looked.add_beyond(missing.beyond, true);
        assert_eq!((looked.missing.messages(), looked.doubt), (0, None));
        assert_eq!(looked.expected[&ExpectedCause::RemovedAtTarget], 10_000);
        looked.add_beyond(0, false);
        assert_eq!(looked.doubt, None);
    }

    #[test]
    fn more_dead_letters_than_are_remembered_are_doubted() {
        let mut letters = LetterOrigins::default();
        (0..REMEMBERED as u64).for_each(|seq| letters.add(seq));
        // Again, after a replay.
        letters.add(7);
        assert_eq!((letters.seqs.len(), letters.doubt()), (REMEMBERED, None));
        letters.add(REMEMBERED as u64);
        assert_eq!((letters.seqs.len(), letters.doubt()), (REMEMBERED, Some(MANY_LETTERS)));
    }

    #[test]
    fn a_copy_that_outlived_its_time_is_expected() {
        let second = 1_000_000_000;
        let explain = |ttl: bool, value: &str, age: i64| {
            let explanations = Explanations { ttl, now_ns: 1_000 * second, ..Explanations::default() };
            let header = format!("NATS/1.0\r\nNats-TTL: {value}\r\n\r\n");
            let delivery = Delivery { stream_seq: 5, consumer_seq: 5, time_ns: (1_000 - age) * second, pending: 0 };
            let message = Message { sid: 1, subject: b"orders.1", reply: b"", header: header.as_bytes(), payload: b"" };
            explanations.cause(&delivery, &message, 0)
        };
        let removed = Some(ExpectedCause::RemovedAtTarget);
        for (ttl, value, age, expect) in [
            (true, "60", 61, removed),
            (true, "1m", 61, removed),
            (true, "60", 30, None),
            (true, "1h", 61, None),
            (true, "never", 999, None),
            // Not acted on.
            (false, "60", 61, None),
        ] {
            assert_eq!(explain(ttl, value, age), expect, "{ttl} {value} {age}");
        }
    }
}
