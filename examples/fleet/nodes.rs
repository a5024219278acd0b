//! The simulated nodes.

use chrono::Utc;

use super::inventory::inventory;
use crate::harness::{Outgoing, REGISTRATION, Registration};

/// What a node does when others are silent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Habit {
    /// It reports all the time.
    Steady,
    /// It is silent until it has timed out.
    ShortSilent,
    /// It is silent until it has expired.
    LongSilent,
}

/// One node.
pub(super) struct Node {
    number: usize,
    pub(super) identity: String,
    pub(super) habit: Habit,
    inventory: String,
}

/// A report, and the request id by which it is found again.
pub(super) struct NodeReport {
    pub(super) id: String,
    pub(super) message: Outgoing,
}

impl Node {
    pub(super) fn new(number: usize, site: &str) -> Self {
        let identity = format!("n{number}.{}.example.net", site.to_lowercase());
        let habit = match number / 2 % 5 {
            1 => Habit::ShortSilent,
            2 => Habit::LongSilent,
            _ => Habit::Steady,
        };
        let inventory = inventory(number, &identity, 0);
        Self { number, identity, habit, inventory }
    }

    /// Changes the content of every fifth node by more than the size trigger.
    pub(super) fn install_packages(&mut self) {
        if self.number / 2 % 5 == 3 {
            self.inventory = inventory(self.number, &self.identity, 40);
        }
    }

    /// A report of the protocol version that the node speaks: half of the nodes of each site speak either.
    pub(super) fn report(&self) -> NodeReport {
        let id = uuid::Uuid::new_v4().simple().to_string();
        let time = Utc::now().timestamp_nanos_opt().unwrap_or_default();
        let report = Registration { id: &id, sender: &self.identity, data: &self.inventory, time };
        let body = if (self.number / 2).is_multiple_of(2) { report.v1() } else { report.v2() };
        NodeReport { message: Outgoing::new(REGISTRATION, body), id }
    }
}
