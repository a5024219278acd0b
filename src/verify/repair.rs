//! Stores at the target what is missing there: copies as a run makes them, after everything that is there already.

use nats_lane::{
    Error,
    jetstream::{Api, PublishAck},
};

use super::{
    compare::{BothSides, StreamComparison, source_time_ns},
    second_look::ConfirmedMissing,
    stream::stream_name,
};
use crate::{
    config::{Replication, Sharing},
    copy::target::{
        repair::repaired,
        replay::{LaterTarget, REPLACES_NEWER, keeps_last},
    },
    status::RepairResult,
};

/// The message that is repaired, and the last message of its subject at the target when it was first looked up. It stays the same
/// while the message is tried again: the try before may have stored it.
type ExpectedLast = Option<(u64, u64)>;

/// What became of one message.
enum Repaired {
    Stored,
    /// The source removed it meanwhile.
    Gone,
    Left(String),
}

/// Why missing messages of a replication cannot be repaired; `None` if they can.
pub fn cannot_repair(replication: &Replication) -> Option<String> {
    if let Some(native) = &replication.native {
        let message = format!("its kind is `{}`, and the target's own server stores what it asks for", native.kind);
        return Some(message);
    }
    let why = if replication.target_mode == Sharing::Exclusive {
        "its `target_mode` is `exclusive`, and a repair is another writer: set `auto` or `shared`"
    } else if replication.provenance_first {
        "its copies have their provenance before that of earlier hops, by which a repair would be taken for one of them"
    } else if replication.sampling.is_some() {
        "it is sampled, so that messages without a copy are no losses"
    } else {
        return None;
    };
    Some(why.to_owned())
}

impl StreamComparison<'_> {
    /// Copies these messages, one after the other.
    pub async fn repair(&mut self, missing: &ConfirmedMissing) -> Result<(), Error> {
        let mut result = RepairResult::default();
        let ConfirmedMissing { ranges, doubt } = missing;
        if let Some(doubt) = doubt.filter(|_| !ranges.ranges().is_empty()) {
            result.left = ranges.messages();
            result.reason = Some(doubt.to_owned());
        }
        let ranges = if doubt.is_some() { &[][..] } else { ranges.ranges() };
        for range in ranges {
            let mut seq = range.from;
            let mut condition = None;
            while seq <= range.to {
                match self.repair_next(seq, range.to, &mut condition).await {
                    Ok(None) => break,
                    Ok(Some((at, done))) => {
                        match done {
                            Repaired::Stored => result.stored += 1,
                            Repaired::Gone => {}
                            Repaired::Left(reason) => {
                                result.left += 1;
                                result.reason.get_or_insert(format!("message {at}: {reason}"));
                            }
                        }
                        seq = at + 1;
                    }
                    Err(error) => self.wait_after(error).await?,
                }
            }
        }
        self.show(|record| {
            let all = record.repaired.get_or_insert_default();
            all.stored += result.stored;
            all.left += result.left;
            all.reason = all.reason.take().or(result.reason);
        });
        Ok(())
    }

    /// Copies the next message in scope, up to a sequence; returns which.
    async fn repair_next(
        &mut self,
        from: u64,
        to: u64,
        condition: &mut ExpectedLast,
    ) -> Result<Option<(u64, Repaired)>, Error> {
        self.connect().await?;
        let Some(mut sides) = self.sides.take() else { return Ok(None) };
        let stream = stream_name(&sides.source.info).to_owned();
        let next = Api::new(&mut sides.source.lane).message_from(&stream, from).await?;
        let Some(next) = next.filter(|next| next.sequence <= to) else {
            self.sides = Some(sides);
            return Ok(None);
        };
        let scope = &self.job.replication.scope;
        let out_of_scope = scope.excludes(next.subject.as_bytes()) || scope.of([next.subject.as_str()]).is_empty();
        let done = if out_of_scope {
            Repaired::Gone
        } else if next.sequence > self.merge.last_copy {
            // A run that begins finds that the target lost its end, and would store it a second time.
            Repaired::Left(
                "it is after the last copy that the target has: the copy stores it itself when it is paused and resumed".to_owned(),
            )
        } else {
            self.store(&mut sides, next.sequence, condition).await?
        };
        self.sides = Some(sides);
        Ok(Some((next.sequence, done)))
    }

    async fn store(
        &mut self,
        sides: &mut BothSides,
        seq: u64,
        condition: &mut ExpectedLast,
    ) -> Result<Repaired, Error> {
        let BothSides { source, target } = sides;
        let stream = stream_name(&source.info).to_owned();
        let found = Api::new(&mut source.lane).whole_message(&stream, seq).await?;
        let Some((original, payload)) = found else { return Ok(Repaired::Gone) };
        let to = LaterTarget {
            replication: &self.job.replication,
            site: &self.job.site,
            target: &target.info,
            api_prefix: target.lane.api_prefix(),
            max_payload: target.lane.info().max_payload,
            ttl: source.info.flag("allow_msg_ttl") && target.info.flag("allow_msg_ttl"),
            now_ns: source_time_ns(source),
        };
        let mut message = match repaired(&original, self.job.generation, &to) {
            Ok(message) => message,
            Err(error) => return Ok(Repaired::Left(error.message)),
        };
        let into = stream_name(&target.info).to_owned();
        let last = Api::new(&mut target.lane).last_message_of(&into, &message.subject).await?;
        if last.as_ref().is_some_and(|last| self.prints.is_copy(last, &original)) {
            // Of an earlier try whose ack was lost.
            return Ok(Repaired::Stored);
        }
        if keeps_last(&target.info)
            && let Some(last) = &last
        {
            let newer = self.prints.origin_of_stored(last).is_none_or(|origin| origin > seq);
            if newer {
                return Ok(Repaired::Left(REPLACES_NEWER.to_owned()));
            }
        }
        let (_, last) = match *condition {
            Some(kept) if kept.0 == seq => kept,
            _ => *condition.insert((seq, last.map_or(0, |last| last.sequence))),
        };
        message.expect_last(last);
        let request = target.lane.send_request_with(&message.subject, &message.header, &payload);
        let answer = loop {
            let answers = target.lane.answers().await?;
            if let Some((_, answer)) = answers.into_iter().find(|(reply, _)| *reply == request.as_bytes()) {
                break answer;
            }
        };
        if answer.is_empty() {
            return Ok(Repaired::Left(format!("no stream takes `{}`", message.subject)));
        }
        let ack = match PublishAck::parse(&answer, "the target") {
            Ok(ack) => ack,
            Err(error) if error.kind == nats_lane::ErrorKind::Retry => return Err(error),
            Err(error) if error.kind == nats_lane::ErrorKind::ChainBroken => {
                return Ok(Repaired::Left(
                    "the target stored another message of its subject at the same time: repair again".to_owned(),
                ));
            }
            Err(error) => return Ok(Repaired::Left(error.message)),
        };
        if ack.stream != into.as_str() {
            return Ok(Repaired::Left(format!("stream `{}` took it", ack.stream)));
        }
        let (at, duplicate) = (ack.seq, ack.duplicate);
        if !duplicate {
            return Ok(Repaired::Stored);
        }
        // Of an earlier try, or of the copy that was removed: its id is remembered for a while.
        let there = Api::new(&mut target.lane).message(&into, at).await?;
        let is_there = there.is_some_and(|there| self.prints.is_copy(&there, &original));
        Ok(match is_there {
            true => Repaired::Stored,
            false => Repaired::Left(
                "the target still knows its id, and takes it for a duplicate: repair again after its duplicate window"
                    .to_owned(),
            ),
        })
    }
}
