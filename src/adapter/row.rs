//! The state of an adapter in one process, as the status and the metrics show it.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use chrono::{DateTime, SubsecRound, Utc};
use nats_lane::{Error, ErrorKind};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::drops::{DropCounts, DropReason};
use crate::{metrics::AdapterReading, status::Histogram};

/// What an adapter does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum AdapterState {
    /// It connects for the first time.
    #[default]
    Starting,
    /// It reads, and publishes what it reads.
    Running,
    /// A connection is down, or the target refuses messages: what is read waits in the queue.
    Retrying,
    /// It was paused: it reads nothing.
    Paused,
    /// Another instance reads (`exclusive`).
    Standby,
    /// Its document is not valid, and there is no earlier one that is.
    Invalid,
}

/// Counters of one adapter since the process started it.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct AdapterCounters {
    pub(super) received: u64,
    pub(super) received_bytes: u64,
    pub(super) accepted: u64,
    pub(super) stored: u64,
    pub(super) stored_bytes: u64,
    pub(super) duplicates: u64,
    pub(super) retried: u64,
    /// Lost connections, and refusals by the target.
    pub(super) ingest_errors: u64,
    pub(super) target_errors: u64,
    /// Time to decode a message.
    pub(super) decode_time: Histogram,
    /// Time from its arrival to its ack.
    pub(super) store_time: Histogram,
}

/// The state of one connection.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AdapterConnection {
    /// Its servers, without secrets.
    pub server: String,
    /// Whether it is up.
    pub connected: bool,
}

/// What is in the queue.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AdapterQueue {
    /// Messages that wait or are in flight.
    pub messages: usize,
    /// Their bytes.
    pub bytes: usize,
    /// Those of the messages that are in flight.
    pub in_flight: usize,
    /// Messages that it may hold.
    pub capacity: usize,
    /// Bytes that it may hold.
    pub capacity_bytes: usize,
}

/// The last error of an adapter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AdapterError {
    /// When it happened.
    pub at: DateTime<Utc>,
    /// Description.
    pub message: String,
    /// Whether an operator has to act.
    pub hold: bool,
    /// Whether it lasts.
    pub current: bool,
}

/// One adapter in one process.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct AdapterRow {
    /// Its name.
    pub adapter: String,
    /// The instance that this is about: each has its own numbers.
    pub instance: String,
    /// What it does.
    pub state: AdapterState,
    /// Where the document is: `kv` or `file`.
    pub origin: String,
    /// Revision of the document that runs; 0 if it is from a file.
    pub config_revision: u64,
    /// The connection that reads.
    pub ingest: AdapterConnection,
    /// The connection that publishes.
    pub stream: AdapterConnection,
    /// Messages received since the adapter was started in this process.
    pub received: u64,
    /// Bytes of their payloads.
    pub received_bytes: u64,
    /// Messages that were taken into the queue.
    pub accepted: u64,
    /// Messages that the target has stored.
    pub stored: u64,
    /// Bytes of their payloads.
    pub stored_bytes: u64,
    /// Of these, messages that the target had stored before.
    pub duplicates: u64,
    /// Messages that were sent again after an error.
    pub retried: u64,
    /// Messages that were dropped, by reason. Reasons that did not occur are absent.
    pub dropped: BTreeMap<String, u64>,
    /// What waits for the target.
    pub queue: AdapterQueue,
    /// The last error; `null` for none.
    pub last_error: Option<AdapterError>,
}

/// The state of one adapter, as its task reports it.
#[derive(Debug, Default)]
pub(super) struct AdapterCell(Mutex<CellContent>);

/// Content of a cell.
#[derive(Debug, Clone, Default)]
pub(super) struct CellContent {
    pub(super) row: AdapterRow,
    pub(super) counters: AdapterCounters,
    pub(super) drops: DropCounts,
}

impl AdapterCell {
    pub(super) fn lock(&self) -> MutexGuard<'_, CellContent> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The row of now.
    pub(super) fn row(&self) -> AdapterRow {
        let CellContent { row, counters, drops } = self.lock().clone();
        let dropped = DropReason::ALL.into_iter().zip(drops).filter(|(_, count)| *count > 0);
        AdapterRow {
            received: counters.received,
            received_bytes: counters.received_bytes,
            accepted: counters.accepted,
            stored: counters.stored,
            stored_bytes: counters.stored_bytes,
            duplicates: counters.duplicates,
            retried: counters.retried,
            dropped: dropped.map(|(reason, count)| (reason.name().to_owned(), count)).collect(),
            ..row
        }
    }

    /// For the metrics page.
    pub(super) fn reading(&self) -> AdapterReading {
        let CellContent { row, counters, drops } = self.lock().clone();
        let dropped = DropReason::ALL.into_iter().zip(drops);
        let of_input = dropped.clone().filter(|(reason, _)| reason.is_of_input()).map(|(_, count)| count).sum::<u64>();
        let of_output = drops.iter().sum::<u64>() - of_input;
        AdapterReading {
            name: row.adapter,
            received: counters.accepted,
            received_bytes: counters.received_bytes,
            stored: counters.stored,
            stored_bytes: counters.stored_bytes,
            input_errors: counters.ingest_errors + of_input,
            output_errors: counters.target_errors + of_output,
            duplicates: counters.duplicates,
            retried: counters.retried,
            dropped: dropped.map(|(reason, count)| (reason.name(), count)).collect(),
            input_time: counters.decode_time,
            output_time: counters.store_time,
            queue: row.queue.messages,
            queue_bytes: row.queue.bytes,
            capacity: row.queue.capacity,
            in_flight: row.queue.in_flight,
            connected: [row.ingest.connected, row.stream.connected],
        }
    }

    /// Keeps an error; `true` if it is another one than the last.
    pub(super) fn failed(&self, error: &Error) -> bool {
        let last = &mut self.lock().row.last_error;
        let news = last.as_ref().is_none_or(|last| !last.current || last.message != error.message);
        *last = Some(AdapterError {
            at: Utc::now().trunc_subsecs(3),
            message: error.message.clone(),
            hold: error.kind == ErrorKind::Hold,
            current: true,
        });
        news
    }

    /// The last error is over.
    pub(super) fn works(&self) {
        if let Some(error) = &mut self.lock().row.last_error {
            error.current = false;
        }
    }
}
