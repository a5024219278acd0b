//! What a feed shows and saves of itself.

use chrono::DateTime;
use nats_lane::entropy;
use tokio::time::{Duration, Instant};

use super::{Amount, FedPoint, Feed, Served, UNASKED};
use crate::{
    config::NativeKind,
    copy::{
        Fed,
        source::{
            clock::shown,
            reader::Reader,
            retention::{Oldest, Outlook, Retention, Waiting},
        },
    },
    status::{InFlight, Lag, LastError, Position, Row, State},
};

/// The error in the status while a target does not ask.
const WAITS: &str =
    "the target has not asked for messages yet: after a long outage of the feed it asks again within 50 s";

impl Feed<'_> {
    /// Brings the status up to date.
    pub(super) fn show(&mut self, now: Instant) {
        let Amount { messages, bytes, .. } =
            self.session.as_ref().map(|served| served.session.in_flight()).unwrap_or_default();
        let is_fed = self.is_fed();
        self.copy.in_flight = InFlight { messages, bytes };
        self.show_lag(is_fed, now);
        let target_seq = self.target_seq();
        let copy = &mut self.copy;
        copy.target.last_seq = Some(target_seq);
        copy.source.clock_offset_seconds =
            shown(copy.source.clock_offset_seconds, self.clock.offset(now, entropy::now()));
        if is_fed {
            self.state = if self.full.is_some() { State::Held } else { State::Running };
        }
        let unasked = !is_fed && now.duration_since(self.times.waits) > UNASKED;
        let waits = match &self.full {
            Some(full) => Some(("hold", full.why.as_str())),
            None => unasked.then_some(("retry", WAITS)),
        };
        let (copy, new) = (&mut self.copy, self.state);
        self.status.send_modify(|(state, published)| {
            *state = new;
            let mut last_error = published.last_error.take();
            if let Some((kind, why)) = waits
                && last_error.as_ref().is_none_or(|error| !error.current || error.message != why)
            {
                last_error = Some(LastError::now(kind, why));
            }
            if let Some(error) = last_error.as_mut().filter(|_| new == State::Running && waits.is_none()) {
                error.ran();
            }
            copy.last_error = last_error;
            // They are moved beside the run.
            copy.consumers.clone_from(&published.consumers);
            *published = copy.clone();
        });
    }

    /// Updates position, lag and headroom in the status. The last two are not known while the target has no consumer.
    pub(super) fn show_lag(&mut self, is_fed: bool, now: Instant) {
        let target_seq = self.target_seq();
        let (copy, state, position) = (&mut self.copy, &self.source_info.state, self.position.seq);
        // As long as the position stays, so does the oldest message, also where it is not read yet.
        let before = copy.lag.filter(|_| copy.position.source_seq == position).and_then(|lag| lag.oldest);
        copy.position = Position { source_seq: position, target_seq };
        (copy.source.first_seq, copy.source.last_seq) = (Some(state.first_seq), Some(state.last_seq.max(position)));
        let Some(Served { session, reader, read, .. }) = self.session.as_ref().filter(|_| is_fed) else {
            (copy.lag, copy.headroom) = (None, None);
            return;
        };
        let counted = reader.pending() + session.in_flight().messages;
        let seen = read.seq.max(reader.plain().map_or(0, Reader::seen));
        let all = reader.plain().is_some() && self.job.replication.scope.is_whole();
        let Waiting { last_seq, messages } = Waiting::of(state, all, position, counted, seen);
        copy.source.last_seq = Some(last_seq);
        let next = || reader.next().map(|point| FedPoint { seq: point.seq, time_ns: point.time_ns });
        let oldest = session.oldest().or_else(next);
        let stored = oldest.and_then(|point| point.time_ns).map(DateTime::from_timestamp_nanos);
        let lag = Lag::new(messages, stored.or(before), self.clock.now(now));
        copy.lag = Some(lag);
        let oldest = Oldest {
            seq: oldest.map_or(position + 1, |point| point.seq),
            age: lag.oldest.and(lag.seconds).map(Duration::from_secs_f64),
        };
        copy.headroom = match self.polls.outlook(&Retention::of(&self.source_info), &oldest) {
            _ if messages == 0 => None,
            Outlook::Left(headroom) => Some(headroom),
            Outlook::Safe => None,
            Outlook::Unknown => copy.headroom,
        };
    }

    /// The target's sequence at the position: a mirror has that of the source, another stream its last one when it was read.
    pub(super) fn target_seq(&self) -> u64 {
        match self.kind {
            NativeKind::Mirror => self.position.seq,
            NativeKind::Source => self.target_info.state.last_seq,
        }
    }

    pub(super) fn row(&self) -> Row {
        Row { state: self.state, copy: self.copy.clone(), todo: None, ..self.job.row.clone() }
    }

    pub(super) fn fed(&self) -> Fed<'_> {
        Fed {
            point: self.compared.then_some((self.position.seq, self.position.time_ns)),
            target_seq: self.target_seq(),
            now: self.clock.now(Instant::now()),
            source_created: &self.source_info.created,
            target_created: &self.target_info.created,
            sampled: self.session.as_ref().and_then(|served| Some(served.sampler.as_ref()?.sampled())),
        }
    }
}
