//! Handles the source's answers to questions of the run, and repairs its consumer.

use nats_lane::{
    Batch, ErrorKind as NatsErrorKind,
    jetstream::{ConsumerInfo, StreamInfo, decode},
};
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::{Ending, Run, upkeep::TICK};
use crate::{
    config::Replication,
    copy::{
        Error, ErrorKind, ErrorSide,
        flow::{
            throttle,
            watchdog::{Consumer, Observation, Reporting, WatchdogAction},
        },
        sampling_driver::SamplingDriver,
        source::{
            intake::Intake,
            locate,
            reader::{Lost, Reader},
            renewal::ConsumerRenewal,
            retention::Retention,
        },
        target::{drops::Dropped, stream},
    },
    events::{Event, Step},
};

impl Run<'_> {
    pub(super) fn take_messages(&mut self, batch: Batch) -> Result<(), Error> {
        if let Some((info, asked)) = self.source.state_in(&batch)? {
            self.source_says(info, asked)?;
        }
        if let Some((info, asked)) = self.source.consumer_in(&batch) {
            self.consumer_is(info.and_then(decode::<ConsumerInfo>), asked)?;
        }
        self.go_on_with_renewal(&batch)?;
        let (dead_lettered, refused) = self.rejects.accept(&batch, &mut self.bounds.window);
        if dead_lettered > 0 {
            self.report.copy.counters.dead_lettered += dead_lettered;
            self.bounds.moved = Instant::now();
            self.report_rejected(false);
        }
        if let Some(error) = refused {
            self.end(Ending::Failed(error));
        }
        match self.source.reader.accept(batch) {
            Ok(()) => Ok(()),
            Err(Lost { error, .. }) if self.source.reader.plain().is_none() => Err(error.into()),
            Err(Lost { error, forgotten }) => {
                let seen = self.seen();
                let action = self.source.watchdog.lost(Instant::now(), &seen, error.message, forgotten);
                self.act(action)
            }
        }
    }

    /// Handles the state of the source stream, as its leader reported it; `asked` is when the request was sent.
    pub(super) fn source_says(&mut self, info: StreamInfo, asked: Instant) -> Result<(), Error> {
        let source = &mut self.source;
        if let Some(why) = source.polls.end.answered(info.state.last_seq) {
            // The next run determines where to continue, or whether to hold.
            return Err(Error::new(ErrorKind::Retry, why));
        }
        for (from, to) in source.gaps.first_is(info.state.first_seq) {
            self.report.found(Event::Gap { from, to, messages: to - from + 1 });
        }
        source.retention = Retention::of(&info);
        source.poll_history.add(Instant::now(), info.state.clone());
        let now_ms = source.clock.now(Instant::now()).timestamp_millis();
        if let Some(Dropped { messages, event }) = self.target.watch.source_has(&info, asked, now_ms) {
            self.report.copy.counters.target_dropped += messages;
            event.into_iter().for_each(|event| self.report.found(event));
        }
        if self.ending.is_none() && !stream::acts_alike(&info, &self.source.info) {
            let id = &self.report.replication.id;
            info!(replication = id, "the source acts on other headers than before: a new run follows");
            self.end(Ending::BeginsAgain);
        }
        self.source.info.state = info.state;
        Ok(())
    }

    /// Handles the server's answer about our consumer, which was requested at `asked`.
    fn consumer_is(&mut self, info: Result<ConsumerInfo, nats_lane::Error>, asked: Instant) -> Result<(), Error> {
        let consumer = match info {
            Ok(info) => {
                if let Some(reader) = self.source.reader.plain_mut()
                    && info.delivered.consumer_seq <= reader.deliveries()
                {
                    // Pending messages may have been removed, by age or by hand.
                    reader.correct_pending(info.num_pending);
                    if info.num_pending == 0 {
                        self.source.cleared_at = Some(asked);
                    }
                }
                Consumer::Has(info.num_pending)
            }
            Err(error) if error.kind == NatsErrorKind::NotFound => Consumer::Gone,
            // Unknown; it is asked again.
            Err(_) => return Ok(()),
        };
        let last_seq = self.source.info.state.last_seq;
        let action = self.source.watchdog.answered(Instant::now(), consumer, last_seq);
        action.map_or(Ok(()), |action| self.act(action))
    }

    fn go_on_with_renewal(&mut self, batch: &Batch) -> Result<(), Error> {
        let (source, replication) = (&mut self.source, &self.report.replication);
        let Some(renewal) = &mut source.renewal else { return Ok(()) };
        let ahead = throttle::read_ahead(&replication.limits);
        let Some(made) = renewal.accept(&mut source.lane, batch, ahead) else { return Ok(()) };
        source.renewal = None;
        let made = made.map_err(|error| {
            let stream = &replication.source.stream;
            Error::stalled(ErrorSide::Source, format!("the consumer of stream `{stream}` was not recreated: {error}"))
        })?;
        source.reader = Intake::Plain(Box::new(made));
        source.watchdog.renewed(Instant::now());
        self.report.copy.counters.consumers_recreated += 1;
        self.report.copy.metered.consumers += 1;
        Ok(())
    }

    /// Does what the watchdog decided.
    pub(super) fn act(&mut self, action: WatchdogAction) -> Result<(), Error> {
        match action {
            WatchdogAction::Ask => self.source.ask_consumer(&self.report.replication.source.stream),
            WatchdogAction::Renew { reason, reporting } => self.renew(&reason, reporting)?,
            WatchdogAction::GiveUp { reason } => return Err(Error::stalled(ErrorSide::Source, reason)),
            WatchdogAction::Repaired => {
                let position = self.bounds.window.position().seq;
                info!(replication = self.report.replication.id, position, "repaired");
                self.report.emit(Event::Repaired { position });
                self.update_status();
            }
        }
        Ok(())
    }

    /// Begins to recreate the consumer.
    fn renew(&mut self, reason: &str, reporting: Reporting) -> Result<(), Error> {
        let Self { report, source, bounds, times, sampler, .. } = self;
        let Replication { id, scope, source: of, .. } = &*report.replication;
        let message = format!("recreating the consumer of stream `{}`: {reason}", of.stream);
        let Some(reader) = source.reader.plain_mut() else { return Err(Error::stalled(ErrorSide::Source, message)) };
        source.consumer_request = None;
        let deletion = reader.abandon(&mut source.lane);
        // Messages that are read again for sampling come before everything that the window has seen.
        let replayed = sampler.as_ref().and_then(SamplingDriver::replayed);
        let (behind, name) = (replayed.unwrap_or(bounds.window.newest()), source.names.next());
        // The server's answer about the stream may be older than its large messages.
        let counters = &report.copy.counters;
        let read = counters.received_bytes.checked_div(counters.received).unwrap_or_default();
        let heavy = locate::is_heavy(&source.info) || read >= locate::HEAVY;
        let shows = heavy.then(|| source.names.next());
        let names = (name, shows, source.names.labels());
        let renewal = ConsumerRenewal::begin(&mut source.lane, &of.stream, scope.filters(), behind, names, deletion);
        source.renewal = Some(renewal);
        times.next_tick = times.next_tick.min(Instant::now() + TICK);
        if reporting == Reporting::All {
            warn!(replication = id, "stalled: {message}");
            report.shows_error(&message);
            report.emit(Event::Stalled { message, step: Step::Consumer });
        } else {
            debug!(replication = id, "{message}");
        }
        report.copy.counters.repairs.consumer += u64::from(reporting != Reporting::Nothing);
        Ok(())
    }

    pub(super) fn seen(&self) -> Observation {
        let (source, target) = (&self.source, &self.target);
        // A durable consumer is supervised by its own reader.
        let plain = source.reader.plain();
        let heard = plain.map_or(self.times.began, Reader::heard);
        Observation {
            asking: plain.is_some_and(Reader::is_asking),
            delivered: plain.map_or(0, Reader::delivered),
            handed_out: self.bounds.window.newest().seq,
            pending: source.reader.pending(),
            last_seq: source.info.state.last_seq,
            consumer_heard: heard.max(source.lane.partial_at()),
            source_heard: source.lane.heard_at(),
            receiving: source.lane.is_receiving(),
            source_partial: source.lane.partial_at(),
            in_flight: self.bounds.window.len(),
            waiting: source.reader.peek().is_some(),
            // By the limit of its rate, by dead letters, which have a clock of their own, or by saves that fail.
            held_back: self.bounds.throttled.is_some() || self.rejects.any_in_flight() || self.waits_for_saves(),
            settled: self.bounds.moved,
            drained: target.lane.drained(),
            unwritten: target.lane.unwritten(),
        }
    }
}
