//! Polls the target for copies that it dropped (see [`drops`](super::drops)): one question beside each to the source, and
//! one more where the first message of the target is another one than before.

use nats_lane::{
    Lane, Message,
    jetstream::{StreamInfo, StreamState, decode_message, leaders_info, message_from_call},
};
use tokio::time::Instant;

use super::{
    drops::{Dropped, Drops, First},
    provenance::Tag,
};
/// Messages of other writers that are passed over in one poll.
const READS: u32 = 16;

/// What the target was asked.
#[derive(Debug)]
enum Asked {
    /// Its state; with the position then, if nothing was in flight.
    State { request: String, settled: Option<u64> },
    /// Its first message.
    First { request: String, state: StreamState, settled: Option<u64>, reads: u32 },
}

/// Watches one target stream during a run.
#[derive(Debug)]
pub(super) struct TargetWatch {
    pub(super) drops: Drops,
    tag: Tag,
    asked: Option<Asked>,
    /// It was asked before it was due.
    asked_early: bool,
    /// Up to here the first messages are those of other writers.
    passed: u64,
}

impl TargetWatch {
    pub fn new(drops: Drops, tag: Tag) -> Self {
        Self { drops, tag, asked: None, asked_early: false, passed: 0 }
    }

    /// Asks for the state of the target, if that is of interest. `settled` is the position, if nothing is in flight. A question
    /// that is not answered until the next one is due is not waited for.
    pub fn ask(&mut self, lane: &mut Lane, stream: &str, settled: Option<u64>) {
        if self.drops.watches() {
            let subject = format!("{}.STREAM.INFO.{stream}", lane.api_prefix());
            self.asked = Some(Asked::State { request: lane.send_request(&subject, b""), settled });
        }
    }

    /// The same once before it is due, where nothing is known yet.
    pub fn ask_first(&mut self, lane: &mut Lane, stream: &str, settled: Option<u64>) {
        if self.drops.is_new() && self.asked.is_none() && !std::mem::replace(&mut self.asked_early, true) {
            self.ask(lane, stream, settled);
        }
    }

    /// Takes an answer. An error says nothing: it is asked again when it is due.
    pub fn accept(&mut self, lane: &mut Lane, stream: &str, message: &Message<'_>, position: u64, in_flight: bool) {
        let (Some(Asked::State { request, .. } | Asked::First { request, .. }), now) = (&self.asked, Instant::now())
        else {
            return;
        };
        if request.as_bytes() != message.subject {
            return;
        }
        let unmoved = |settled: Option<u64>| settled.filter(|settled| *settled == position && !in_flight);
        match self.asked.take() {
            Some(Asked::State { settled, .. }) => {
                let Ok(Some(StreamInfo { state, .. })) = leaders_info(message.payload) else { return };
                let settled = unmoved(settled);
                if state.messages == 0 {
                    self.drops.target_is_empty(now, &state, position, settled);
                } else if self.drops.wants(state.first_seq) {
                    // What others wrote before was passed over by the poll before.
                    let from = state.first_seq.max(self.passed + 1);
                    self.read(lane, stream, from, state, settled, READS);
                } else {
                    self.drops.target_has(now, &state, None, settled);
                }
            }
            Some(Asked::First { state, settled, reads, .. }) => {
                let Ok(Some(first)) = decode_message(message.payload) else { return };
                match self.tag.origin(&first.header) {
                    Some(origin) => {
                        let (source_seq, time_ms) = (origin.seq, Some(origin.time_ms));
                        let first = First { seq: first.sequence, source_seq, time_ms };
                        self.drops.target_has(now, &state, Some(first), settled);
                    }
                    None => {
                        self.passed = first.sequence;
                        if reads > 1 {
                            self.read(lane, stream, first.sequence + 1, state, settled, reads - 1);
                        }
                    }
                }
            }
            None => {}
        }
    }

    fn read(&mut self, lane: &mut Lane, stream: &str, from: u64, state: StreamState, settled: Option<u64>, reads: u32) {
        let (what, body) = message_from_call(stream, from);
        let subject = format!("{}.{what}", lane.api_prefix());
        let request = lane.send_request(&subject, body.to_string().as_bytes());
        self.asked = Some(Asked::First { request, state, settled, reads });
    }

    /// What the source's answer to a question of that time means.
    pub fn source_has(&mut self, source: &StreamInfo, asked: Instant, now_ms: i64) -> Option<Dropped> {
        self.drops.source_has(source, asked, now_ms)
    }
}
