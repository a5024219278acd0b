//! Metrics of adapters, under the names that Choria's broker has for its own.

use prometheus::{
    TextEncoder,
    proto::{LabelPair, Metric, MetricFamily, MetricType},
};

use super::{family, histogram, label, series};
use crate::status::Histogram;

/// What every name begins with.
const PREFIX: &str = "choria_adapter_";

/// One adapter of this process.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct AdapterReading {
    /// Its name.
    pub name: String,
    /// Messages taken into the queue.
    pub received: u64,
    /// Bytes of the payloads received.
    pub received_bytes: u64,
    /// Messages stored by the target.
    pub stored: u64,
    /// Bytes of their payloads.
    pub stored_bytes: u64,
    /// Errors on the way in, messages dropped there included.
    pub input_errors: u64,
    /// Errors on the way out, messages dropped there included.
    pub output_errors: u64,
    /// Messages that the target had stored before.
    pub duplicates: u64,
    /// Messages sent again.
    pub retried: u64,
    /// Messages dropped, by reason.
    pub dropped: Vec<(&'static str, u64)>,
    /// Time to decode a message.
    pub input_time: Histogram,
    /// Time from its arrival to the ack of the target.
    pub output_time: Histogram,
    /// Messages in the queue.
    pub queue: usize,
    /// Their bytes.
    pub queue_bytes: usize,
    /// Messages that the queue may hold.
    pub capacity: usize,
    /// Messages in flight.
    pub in_flight: usize,
    /// Whether the connections that read and publish are up.
    pub connected: [bool; 2],
}

/// Adapters in Prometheus' text format, to append to the output of [`super::render`]. `identity` is this host.
pub fn render_adapters(identity: &str, adapters: &[AdapterReading]) -> Result<String, prometheus::Error> {
    let (counter, gauge) = (MetricType::COUNTER, MetricType::GAUGE);
    let sides = |name: &str, help: &str, kind: MetricType, read: fn(&AdapterReading) -> [f64; 2]| {
        let all = adapters.iter().flat_map(|one| {
            let [input, output] = read(one);
            [("input", input), ("output", output)]
                .map(|(role, value)| series(of_role(one, identity, role), kind, value))
        });
        named(name, help, kind, all.collect())
    };
    let each = |name: &str, help: &str, kind: MetricType, read: fn(&AdapterReading) -> f64| {
        let all = adapters.iter().map(|one| series(of_adapter(one, identity), kind, read(one)));
        named(name, help, kind, all.collect())
    };
    let dropped = adapters.iter().flat_map(|one| {
        one.dropped.iter().map(|(reason, count)| {
            let labels = of_adapter(one, identity).into_iter().chain([label("reason", reason)]).collect();
            series(labels, counter, *count as f64)
        })
    });
    let published = adapters.iter().map(|one| series(of_role(one, identity, "output"), counter, one.stored as f64));
    let times = adapters.iter().flat_map(|one| {
        [("input", &one.input_time), ("output", &one.output_time)].map(|(role, times)| {
            let mut metric = Metric::from_label(of_role(one, identity, role));
            metric.set_histogram(histogram(times));
            metric
        })
    });
    let help = "Time to decode a message (input), and from its arrival to the ack of the target (output)";
    let mut families = vec![
        // Choria's.
        sides(
            "received_msgs",
            "Messages taken into the queue (input), and stored by the target (output)",
            counter,
            |one| [one.received as f64, one.stored as f64],
        ),
        named("published_msgs", "Messages stored by the target", counter, published.collect()),
        sides("errors", "Errors, and messages dropped", counter, |one| {
            [one.input_errors as f64, one.output_errors as f64]
        }),
        sides("bytes", "Bytes of the messages received (input), and stored (output)", counter, |one| {
            [one.received_bytes as f64, one.stored_bytes as f64]
        }),
        named("time", help, MetricType::HISTOGRAM, times.collect()),
        each("queue_length", "Messages that wait for the target or are in flight", gauge, |one| one.queue as f64),
        each("queue_capacity", "Messages that the queue may hold", gauge, |one| one.capacity as f64),
        // Ours.
        each("queue_bytes", "Bytes of the messages in the queue", gauge, |one| one.queue_bytes as f64),
        each("in_flight_messages", "Messages published and not acknowledged", gauge, |one| one.in_flight as f64),
        each("duplicate_messages", "Messages that the target had stored before", counter, |one| one.duplicates as f64),
        each("retried_messages", "Messages published again after an error", counter, |one| one.retried as f64),
        named("dropped_messages", "Messages dropped, by reason", counter, dropped.collect()),
        sides("connected", "1 while the connection that reads (input) or publishes (output) is up", gauge, |one| {
            one.connected.map(|up| f64::from(u8::from(up)))
        }),
    ];
    families.retain(|family| !family.get_metric().is_empty());
    TextEncoder::new().encode_to_string(&families)
}

fn named(name: &str, help: &str, kind: MetricType, all: Vec<Metric>) -> MetricFamily {
    family(format!("{PREFIX}{name}"), help, kind, all)
}

/// Choria numbers its workers; here there is one.
fn of_role(one: &AdapterReading, identity: &str, role: &str) -> Vec<LabelPair> {
    vec![label("identity", identity), label("name", &format!("{}.0", one.name)), label("role", role)]
}

fn of_adapter(one: &AdapterReading, identity: &str) -> Vec<LabelPair> {
    vec![label("identity", identity), label("name", &one.name)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_labels_are_those_of_choria() {
        let reading = AdapterReading {
            name: "inventory".to_owned(),
            received: 7,
            stored: 5,
            dropped: vec![("queue_full", 2)],
            capacity: 1_000,
            ..AdapterReading::default()
        };
        let text = render_adapters("n1", &[reading]).unwrap();
        for line in [
            r#"choria_adapter_received_msgs{identity="n1",name="inventory.0",role="input"} 7"#,
            r#"choria_adapter_received_msgs{identity="n1",name="inventory.0",role="output"} 5"#,
            r#"choria_adapter_queue_capacity{identity="n1",name="inventory"} 1000"#,
            r#"choria_adapter_dropped_messages{identity="n1",name="inventory",reason="queue_full"} 2"#,
            "# TYPE choria_adapter_time histogram",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
        assert_eq!(render_adapters("n1", &[]).unwrap(), "");
    }
}
