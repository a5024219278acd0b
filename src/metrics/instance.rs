//! Metrics of one instance: its control connection, and how many replications it leads and in which state.

use prometheus::{TextEncoder, proto::MetricType};

use super::{family, label, series};
use crate::status::{Row, State};

/// What an instance knows of itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct InstanceReading {
    /// Whether the control connection is up.
    pub connected: bool,
    /// Replications that are configured, wherever they run.
    pub configured: usize,
    /// Of these, those that this instance leads.
    pub led: usize,
    /// Of these, those that are running.
    pub running: usize,
    /// Replications whose document, or its newest revision, cannot run.
    pub rejected: usize,
}

impl InstanceReading {
    /// Counts the rows as the group sees them, for `instance`.
    pub fn of(connected: bool, instance: &str, rows: &[Row]) -> Self {
        let led = || rows.iter().filter(|row| row.leader.as_deref() == Some(instance));
        let rejected = |row: &&Row| {
            let error = row.copy.last_error.as_ref();
            row.state == State::Invalid || error.is_some_and(|error| error.current && error.kind == "invalid")
        };
        Self {
            connected,
            configured: rows.len(),
            led: led().count(),
            running: led().filter(|row| row.state == State::Running).count(),
            rejected: rows.iter().filter(rejected).count(),
        }
    }
}

/// One instance in Prometheus' text format, to append to the output of [`super::render`].
pub fn render_instance(site: &str, reading: &InstanceReading) -> Result<String, prometheus::Error> {
    let gauge = |name: &str, help: &str, value: f64| {
        let all = vec![series(vec![label("replicator", site)], MetricType::GAUGE, value)];
        family(format!("choria_stream_replicator_{name}"), help, MetricType::GAUGE, all)
    };
    let InstanceReading { connected, configured, led, running, rejected } = *reading;
    TextEncoder::new().encode_to_string(&[
        gauge("control_connected", "1 while the control connection is up", f64::from(u8::from(connected))),
        gauge("replications", "Replications that are configured, wherever they run", configured as f64),
        gauge("leases_held", "Replications that this instance leads", led as f64),
        gauge("replications_running", "Replications that this instance leads and that are running", running as f64),
        gauge("documents_rejected", "Replications whose document, or its newest revision, cannot run", rejected as f64),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::{CopyStatus, LastError};

    #[test]
    fn replications_are_counted_by_leader_and_state() {
        let row = |leader: Option<&str>, state, error: Option<&str>| Row {
            replication: "S".to_owned(),
            state,
            origin: "kv".to_owned(),
            leader: leader.map(str::to_owned),
            epoch: 1,
            config_revision: 1,
            copy: CopyStatus { last_error: error.map(|kind| LastError::now(kind, "why")), ..CopyStatus::default() },
            verify: None,
            todo: None,
        };
        let rows = [
            row(Some("one"), State::Running, None),
            row(Some("one"), State::Held, Some("hold")),
            row(Some("one"), State::Running, Some("invalid")),
            row(Some("two"), State::Running, None),
            row(None, State::Invalid, None),
        ];
        let reading = InstanceReading::of(true, "one", &rows);
        assert_eq!(reading, InstanceReading { connected: true, configured: 5, led: 3, running: 2, rejected: 2 });
        let text = render_instance("US", &reading).unwrap();
        for line in
            ["control_connected 1", "replications 5", "leases_held 3", "replications_running 2", "documents_rejected 2"]
        {
            let (name, value) = line.split_once(' ').unwrap();
            let line = format!("choria_stream_replicator_{name}{{replicator=\"US\"}} {value}");
            assert!(text.lines().any(|found| found == line), "`{line}` is missing in\n{text}");
        }
    }
}
