//! Metric names and help texts, rendered at scrape time from the status rows. There is no registry: a row is
//! the only owner of its numbers. Names and labels are those of Choria's stream-replicator (counters without
//! `_total`), and ours beside them.

mod adapters;
mod instance;

use std::time::Duration;

use prometheus::{
    TextEncoder,
    proto::{Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType},
};

#[cfg(target_os = "linux")]
use prometheus::{core::Collector, process_collector::ProcessCollector};

pub use self::{
    adapters::{AdapterReading, render_adapters},
    instance::{InstanceReading, render_instance},
};
use crate::{
    names::choria_consumer,
    status::{self, Advised, GroupDrift, Repairs, Row, SamplingStatus, State},
};

/// What every name begins with.
const PREFIX: &str = "choria_stream_replicator_replicator_";
const HEARTBEAT_PREFIX: &str = "choria_stream_replicator_heartbeat_";
const ELECTION_PREFIX: &str = "choria_stream_replicator_election_";

/// How much is shown of each replication.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Detail {
    /// Everything.
    #[default]
    Full,
    /// What alerts and overviews use: about a dozen series for each replication, no histogram.
    Off,
}

/// What sampling knows, with the labels of Choria's parts: their prefix, name and labels differ.
struct Sampled {
    name: &'static str,
    help: &'static str,
    kind: MetricType,
    labels: fn(&str, &Row) -> Vec<LabelPair>,
    read: fn(&SamplingStatus) -> f64,
}

/// Every metric with one series per sampled replication, after the prefix `choria_stream_replicator_`.
#[rustfmt::skip]
const SAMPLED: &[Sampled] = &[
    // Choria's.
    Sampled { name: "tracker_total_items", help: "Senders that are known", kind: MetricType::GAUGE, labels, read: |s| s.senders as f64 },
    Sampled { name: "limiter_messages_without_limit_field_count", help: "Messages that name no sender and were copied", kind: MetricType::COUNTER, labels: limiter_labels, read: |s| s.without_sender as f64 },
    Sampled { name: "limiter_messages_copy_forced_count", help: "Messages copied because they say so themselves", kind: MetricType::COUNTER, labels: limiter_labels, read: |s| s.forced as f64 },
    // Ours.
    Sampled { name: "tracker_untracked_messages", help: "Messages copied without tracking their sender, because there are too many senders", kind: MetricType::COUNTER, labels, read: |s| s.untracked as f64 },
    Sampled { name: "tracker_records_written", help: "Records of senders written", kind: MetricType::COUNTER, labels, read: |s| s.records_written as f64 },
    Sampled { name: "tracker_write_lag_seconds", help: "Time since everything known of senders was written last; 0 while all of it is", kind: MetricType::GAUGE, labels, read: |s| s.write_lag_seconds },
    Sampled { name: "advisor_waiting", help: "Advisories that wait to be published or confirmed", kind: MetricType::GAUGE, labels, read: |s| s.advisories_waiting as f64 },
    Sampled { name: "advisor_dropped", help: "Advisories that were dropped because too many waited", kind: MetricType::COUNTER, labels, read: |s| s.advisories_dropped as f64 },
];

/// One number of a row; rows that do not know it have no series.
struct Reading {
    name: &'static str,
    help: &'static str,
    kind: MetricType,
    /// Whether it is shown with [`Detail::Off`] as well.
    essential: bool,
    read: fn(&Row) -> Option<f64>,
}

const fn counter(name: &'static str, help: &'static str, read: fn(&Row) -> Option<f64>) -> Reading {
    Reading { name, help, kind: MetricType::COUNTER, essential: false, read }
}

const fn gauge(name: &'static str, help: &'static str, read: fn(&Row) -> Option<f64>) -> Reading {
    Reading { name, help, kind: MetricType::GAUGE, essential: false, read }
}

impl Reading {
    const fn essential(self) -> Self {
        Self { essential: true, ..self }
    }
}

/// Every metric with one series per replication.
#[rustfmt::skip]
const READINGS: &[Reading] = &[
    // Choria's.
    counter("total_messages", "Messages read from the source", |r| Some(r.copy.counters.received as f64)),
    counter("total_bytes", "Payload bytes read from the source", |r| Some(r.copy.metered.received_payload as f64)),
    counter("copied_messages", "Messages stored at the target", |r| Some(r.copy.counters.copied as f64)).essential(),
    counter("copied_bytes", "Payload bytes of the messages stored at the target", |r| Some(r.copy.metered.copied_payload as f64)).essential(),
    counter("skipped_messages", "Messages skipped for any reason", |r| Some(skipped(r) as f64)).essential(),
    counter("skipped_bytes", "Payload bytes of the skipped messages", |r| Some(r.copy.metered.skipped_payload as f64)),
    counter("too_old_messages", "Messages skipped because they were older than max_age", |r| Some(r.copy.counters.skipped_old as f64)),
    counter("handler_error_count", "Runs of the copy that ended with an error", |r| Some(r.copy.counters.errors as f64)).essential(),
    counter("meta_parse_failed_count", "Always 0: a message without a stream sequence ends the run, see handler_error_count", |_| Some(0.0)),
    counter("ack_failed_count", "Messages that the target refused", |r| Some(r.copy.counters.refused as f64)),
    counter("consumer_recreated", "Source consumers created, the first one included", |r| Some(r.copy.metered.consumers as f64)),
    gauge("stream_sequence", "Source sequence up to which everything is settled", |r| Some(r.copy.position.source_seq as f64).filter(|_| r.knows_position())).essential(),
    gauge("stream_lag_messages", "Messages in scope that are not settled; absent where the source does not tell", |r| r.copy.lag.map(|lag| lag.messages as f64)).essential(),
    // Ours.
    gauge("stream_lag_seconds", "Age of the oldest message in scope that is not settled, counted when it is read; absent where it is not known", |r| r.copy.lag?.seconds).essential(),
    gauge("in_flight_messages", "Messages read and not settled", |r| Some(r.copy.in_flight.messages as f64)),
    gauge("in_flight_bytes", "Bytes of the messages read and not settled", |r| Some(r.copy.in_flight.bytes as f64)),
    counter("skipped_sampled_messages", "Messages skipped by sampling", |r| Some(r.copy.counters.skipped_sampled as f64)),
    counter("skipped_filtered_messages", "Messages skipped by a filter", |r| Some(r.copy.counters.skipped_filtered as f64)),
    counter("skipped_loop_messages", "Messages skipped because they returned through a replication loop", |r| Some(r.copy.counters.skipped_loop as f64)),
    counter("skipped_incomplete_messages", "Descriptions of objects skipped because the target does not have all of their chunks", |r| Some(r.copy.counters.skipped_incomplete as f64)),
    counter("skipped_refused_messages", "Messages skipped, by request or by on_reject, because the target can never store them", |r| Some(r.copy.counters.skipped_refused as f64)),
    counter("dead_lettered_messages", "Messages published to the dead letter subject", |r| Some(r.copy.counters.dead_lettered as f64)),
    counter("gap_messages", "Source messages that were gone before they were read", |r| Some(r.copy.counters.gap_messages as f64)).essential(),
    counter("target_dropped_messages", "Copies that the target removed by its limits while the source still had the messages", |r| Some(r.copy.counters.target_dropped as f64)).essential(),
    counter("position_save_errors", "Saves of the position that failed", |r| Some(r.copy.counters.position_save_errors as f64)).essential(),
    counter("headers_removed", "Headers removed because they would not have the effect that they have at the source", |r| Some(r.copy.counters.headers_removed as f64)),
    gauge("epoch", "Grows with every new holder of the replication", |r| Some(r.epoch as f64)),
    gauge("source_connected", "1 while the source connection is up", |r| Some(f64::from(u8::from(r.copy.source.connected)))),
    gauge("target_connected", "1 while the target connection is up", |r| Some(f64::from(u8::from(r.copy.target.connected)))),
    gauge("last_error_timestamp_seconds", "When the newest error happened, over or not, since the Unix epoch; absent without one", |r| r.copy.last_error.as_ref().map(|error| error.at.timestamp_millis() as f64 / 1e3)).essential(),
    gauge("verify_findings", "Unexpected differences between both streams, by the newest comparison that is done; absent without one", |r| Some(r.verify.as_ref()?.last.as_ref()?.findings as f64)).essential(),
    gauge("verify_messages", "Messages of the source that the newest comparison of both streams has compared; absent without one", |r| Some(r.verify.as_ref()?.last.as_ref()?.messages as f64)),
    gauge("verify_timestamp_seconds", "When the newest comparison of both streams ended, since the Unix epoch; absent without one", |r| Some(r.verify.as_ref()?.last.as_ref()?.at.timestamp_millis() as f64 / 1e3)).essential(),
    gauge("consumers_failing", "Consumers of the document that are not kept at the target, and one more if the last pass over them was not completed; absent if the document names none", |r| Some(r.copy.consumers.as_ref()?.failing as f64)).essential(),
    gauge("target_sequence", "Sequence of the newest message of ours at the target", |r| Some(r.copy.position.target_seq as f64).filter(|_| r.knows_position())),
];

/// Every state and its label.
const STATES: [(State, &str); 7] = [
    (State::Starting, "starting"),
    (State::Running, "running"),
    (State::Paused, "paused"),
    (State::Retrying, "retrying"),
    (State::Held, "held"),
    (State::Invalid, "invalid"),
    (State::Stopped, "stopped"),
];

/// The rows in Prometheus' text format. `dropped_events` counts events that found their queue full.
pub fn render(site: &str, rows: &[Row], dropped_events: u64, detail: Detail) -> Result<String, prometheus::Error> {
    let labels: Vec<_> = rows.iter().map(|row| labels(site, row)).collect();
    let rows: Vec<_> = rows.iter().zip(&labels).collect();
    let full = detail == Detail::Full;
    let readings = READINGS.iter().filter(|reading| full || reading.essential);
    let mut families: Vec<_> = readings.map(|reading| reading_family(reading, &rows)).collect();
    families.push(headroom_family(&rows));
    families.push(state_family(&rows, detail));
    if full {
        families.push(repairs_family(&rows));
        families.push(clock_family(&rows));
        families.push(processing_family(&rows));
        families.push(gossip_family(&rows));
    }
    families.extend(sampling_families(site, &rows));
    families.retain(|family| !family.get_metric().is_empty());
    families.push(dropped_events_family(site, dropped_events));
    TextEncoder::new().encode_to_string(&families)
}

/// How many settings of each target differ that are not meant to, in the same format; replications that were not compared have no
/// series.
pub fn render_drift(site: &str, rows: &[Row], known: &GroupDrift) -> Result<String, prometheus::Error> {
    let all: Vec<_> = rows
        .iter()
        .filter_map(|row| {
            let count = known.get(&row.replication)?.count?;
            Some(series(labels(site, row), MetricType::GAUGE, count as f64))
        })
        .collect();
    if all.is_empty() {
        return Ok(String::new());
    }
    let help = "Settings in which the target stream differs from what it would be created with now, see `drift`; absent where \
                the streams were not compared";
    TextEncoder::new().encode_to_string(&[family(format!("{PREFIX}drift_settings"), help, MetricType::GAUGE, all)])
}

/// The version of the program, and what Prometheus' libraries show of a process, in the same format.
pub fn render_process(version: &str) -> Result<String, prometheus::Error> {
    let all = vec![series(vec![label("version", version)], MetricType::GAUGE, 1.0)];
    let name = "choria_stream_replicator_build_info".to_owned();
    let mut families = vec![family(name, "1; the label is the version of the program", MetricType::GAUGE, all)];
    families.extend(process_families());
    TextEncoder::new().encode_to_string(&families)
}

#[cfg(target_os = "linux")]
fn process_families() -> Vec<MetricFamily> {
    ProcessCollector::for_self().collect()
}

/// The collector reads `/proc`.
#[cfg(not(target_os = "linux"))]
fn process_families() -> Vec<MetricFamily> {
    Vec::new()
}

/// How many buckets of the service this process recreated, in the same format.
pub fn render_buckets(site: &str, recreated: u64) -> Result<String, prometheus::Error> {
    let all = vec![series(vec![label("replicator", site)], MetricType::COUNTER, recreated as f64)];
    let help = "Buckets of the service that were deleted while it ran and that this process recreated";
    let name = "choria_stream_replicator_buckets_recreated".to_owned();
    TextEncoder::new().encode_to_string(&[family(name, help, MetricType::COUNTER, all)])
}

/// One replication's part in Choria's leader election.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ElectionReading {
    /// Its key.
    pub election: String,
    /// The candidate's name.
    pub identity: String,
    /// Campaigns while the key was not ours.
    pub as_candidate: u64,
    /// Campaigns while it was.
    pub as_leader: u64,
    /// Whether it is won now.
    pub leads: bool,
    /// Between the last campaign and the next one.
    pub interval: Duration,
}

/// State of the elections of replications and of that of heartbeats in Prometheus' text format, to append to the output of
/// [`render`]. As with Choria's replicator, the election of heartbeats has no replicator.
pub fn render_elections(
    site: &str,
    elections: &[ElectionReading],
    of_heartbeats: Option<&ElectionReading>,
) -> Result<String, prometheus::Error> {
    let elections = elections.iter().map(|of| (site, of)).chain(of_heartbeats.map(|of| ("unknown", of)));
    let elections: Vec<_> = elections.collect();
    let labels = |(site, of): &(&str, &ElectionReading)| -> Vec<_> {
        vec![label("election", &of.election), label("identity", &of.identity), label("replicator", site)]
    };
    let gauges = |name, help, read: fn(&ElectionReading) -> f64| {
        let all = elections.iter().map(|of| series(labels(of), MetricType::GAUGE, read(of.1))).collect();
        family(format!("{ELECTION_PREFIX}{name}"), help, MetricType::GAUGE, all)
    };
    let campaigns = elections.iter().flat_map(|of| {
        [("candidate", of.1.as_candidate), ("leader", of.1.as_leader)].map(|(state, count)| {
            let labels = labels(of).into_iter().chain([label("state", state)]).collect();
            series(labels, MetricType::COUNTER, count as f64)
        })
    });
    let help = "Attempts to get or to keep the key of the election";
    let mut families = vec![
        family(format!("{ELECTION_PREFIX}campaigns"), help, MetricType::COUNTER, campaigns.collect()),
        gauges("leader", "1 while the election is won", |of| f64::from(u8::from(of.leads))),
        gauges("interval_seconds", "Time between the last campaign and the next one", |of| of.interval.as_secs_f64()),
    ];
    families.retain(|family| !family.get_metric().is_empty());
    TextEncoder::new().encode_to_string(&families)
}

/// What this process publishes as heartbeats.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct HeartbeatReading {
    /// Name of this host.
    pub host: String,
    /// Whether another instance publishes.
    pub paused: bool,
    /// One per subject.
    pub subjects: Vec<HeartbeatSubject>,
}

/// One subject of the heartbeats.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct HeartbeatSubject {
    /// The subject.
    pub subject: String,
    /// Heartbeats that a stream stored.
    pub published: u64,
    /// Heartbeats that were due and were not stored.
    pub errors: u64,
    /// From sending one to its confirmation.
    pub times: status::Histogram,
}

/// Heartbeats in Prometheus' text format, to append to the output of [`render`].
pub fn render_heartbeats(site: &str, heartbeats: &HeartbeatReading) -> Result<String, prometheus::Error> {
    let replicator = || label("replicator", site);
    let gauge = |name, help, labels, value| {
        let all = vec![series(labels, MetricType::GAUGE, value)];
        family(format!("{HEARTBEAT_PREFIX}{name}"), help, MetricType::GAUGE, all)
    };
    let labels = |of: &HeartbeatSubject| vec![replicator(), label("subject", &of.subject)];
    let counters = |name, help, read: fn(&HeartbeatSubject) -> u64| {
        let all = heartbeats.subjects.iter();
        let all = all.map(|of| series(labels(of), MetricType::COUNTER, read(of) as f64)).collect();
        family(format!("{HEARTBEAT_PREFIX}{name}"), help, MetricType::COUNTER, all)
    };
    let times = heartbeats.subjects.iter().map(|of| {
        let mut metric = Metric::from_label(labels(of));
        metric.set_histogram(histogram(&of.times));
        metric
    });
    let help = "Time from publishing a heartbeat to its confirmation";
    let host = vec![label("hostname", &heartbeats.host), replicator()];
    let (count, paused) = (heartbeats.subjects.len() as f64, f64::from(u8::from(heartbeats.paused)));
    let mut families = vec![
        gauge("subjects_count", "Subjects that heartbeats are configured for", vec![replicator()], count),
        gauge("paused", "1 while another instance publishes the heartbeats", host, paused),
        counters("published_count", "Heartbeats that a stream stored", |of| of.published),
        counters("published_error_count", "Heartbeats that were due and not stored", |of| of.errors),
        family(format!("{HEARTBEAT_PREFIX}publish_time"), help, MetricType::HISTOGRAM, times.collect()),
    ];
    families.retain(|family| !family.get_metric().is_empty());
    TextEncoder::new().encode_to_string(&families)
}

/// `stream, replicator, worker`; the first and the last are the two parts of a replication id.
fn labels(site: &str, row: &Row) -> Vec<LabelPair> {
    let (stream, worker) = row.replication.split_once('.').unwrap_or((&row.replication, site));
    vec![label("stream", stream), label("replicator", site), label("worker", worker)]
}

fn label(name: &str, value: &str) -> LabelPair {
    let mut pair = LabelPair::default();
    pair.set_name(name.to_owned());
    pair.set_value(value.to_owned());
    pair
}

fn family(name: String, help: &str, kind: MetricType, series: Vec<Metric>) -> MetricFamily {
    let mut family = MetricFamily::default();
    family.set_name(name);
    family.set_help(help.to_owned());
    family.set_field_type(kind);
    family.set_metric(series);
    family
}

fn series(labels: Vec<LabelPair>, kind: MetricType, value: f64) -> Metric {
    let mut metric = Metric::from_label(labels);
    if kind == MetricType::COUNTER {
        let mut counter = Counter::default();
        counter.set_value(value);
        metric.set_counter(counter);
    } else {
        let mut gauge = Gauge::default();
        gauge.set_value(value);
        metric.set_gauge(gauge);
    }
    metric
}

fn reading_family(reading: &Reading, rows: &[(&Row, &Vec<LabelPair>)]) -> MetricFamily {
    let known = rows.iter().filter_map(|(row, labels)| Some((labels, (reading.read)(row)?)));
    let all = known.map(|(labels, value)| series((*labels).clone(), reading.kind, value)).collect();
    family(format!("{PREFIX}{}", reading.name), reading.help, reading.kind, all)
}

/// Only of those that are sampled. A gauge with Choria's replicator, though it only grows.
fn gossip_family(rows: &[(&Row, &Vec<LabelPair>)]) -> MetricFamily {
    let sampled = rows.iter().filter(|(row, _)| row.copy.sampling.is_some() || row.copy.metered.gossip > 0);
    let value = |row: &Row| row.copy.metered.gossip as f64;
    let all = sampled.map(|(row, labels)| series((*labels).clone(), MetricType::GAUGE, value(row)));
    let help = "Senders that other replicators reported as seen";
    family("choria_stream_replicator_tracker_seen_by_gossip".to_owned(), help, MetricType::GAUGE, all.collect())
}

/// Only of those that are sampled.
fn sampling_families(site: &str, rows: &[(&Row, &Vec<LabelPair>)]) -> Vec<MetricFamily> {
    let name = |name: &str| format!("choria_stream_replicator_{name}");
    let sampled: Vec<_> = rows.iter().filter_map(|(row, _)| Some((*row, row.copy.sampling.as_ref()?))).collect();
    let mut families: Vec<_> = SAMPLED
        .iter()
        .map(|Sampled { name: of, help, kind, labels, read }| {
            let all = sampled.iter().map(|(row, sampling)| (labels(site, row), read(sampling)));
            family(name(of), help, *kind, summed(*kind, all))
        })
        .collect();
    let by_event = |of: &dyn Fn(&SamplingStatus) -> [u64; 4]| {
        let mut all = Vec::new();
        for (row, sampling) in &sampled {
            for (event, count) in ["new", "timeout", "recover", "expire"].into_iter().zip(of(sampling)) {
                let labels = [label("advisory", event)].into_iter().chain(stream_labels(site, row)).collect();
                all.push((labels, count as f64));
            }
        }
        summed(MetricType::COUNTER, all)
    };
    let told = by_event(&|sampling| events_of(sampling.advised));
    let help = "Advisories published, and confirmed where they are reliable";
    families.push(family(name("advisor_total_messages"), help, MetricType::COUNTER, told));
    let failed = by_event(&|sampling| events_of(sampling.advisory_errors));
    let help = "Attempts to publish an advisory that failed";
    families.push(family(name("advisor_publish_errors"), help, MetricType::COUNTER, failed));
    families
}

/// One series for each set of labels: some of Choria's do not tell all replications apart.
fn summed(kind: MetricType, readings: impl IntoIterator<Item = (Vec<LabelPair>, f64)>) -> Vec<Metric> {
    let mut sums: Vec<(Vec<LabelPair>, f64)> = Vec::new();
    for (labels, value) in readings {
        match sums.iter_mut().find(|(known, _)| *known == labels) {
            Some((_, sum)) => *sum += value,
            None => sums.push((labels, value)),
        }
    }
    sums.into_iter().map(|(labels, value)| series(labels, kind, value)).collect()
}

fn events_of(Advised { new, timeout, recover, expire }: Advised) -> [u64; 4] {
    [new, timeout, recover, expire]
}

/// Choria's limiter is named by its consumer.
fn limiter_labels(site: &str, row: &Row) -> Vec<LabelPair> {
    let worker = row.replication.split_once('.').map_or(site, |(_, worker)| worker);
    vec![label("limiter", "memory"), label("stream", &choria_consumer(worker)), label("replicator", site)]
}

fn stream_labels(site: &str, row: &Row) -> Vec<LabelPair> {
    let stream = row.replication.split_once('.').map_or(row.replication.as_str(), |(stream, _)| stream);
    vec![label("stream", stream), label("replicator", site)]
}

/// Only for those that lose something one day: no value would say that rightly of the others.
fn headroom_family(rows: &[(&Row, &Vec<LabelPair>)]) -> MetricFamily {
    let all = rows.iter().filter_map(|(row, labels)| {
        let headroom = row.copy.headroom?;
        Some(series((*labels).clone(), MetricType::GAUGE, headroom.seconds))
    });
    let help =
        "Time until the source removes the oldest message that is not copied; absent where nothing lags or limits";
    family(format!("{PREFIX}retention_headroom_seconds"), help, MetricType::GAUGE, all.collect())
}

/// Only for those whose source server was asked and reports its time: 0 would say that the clocks agree.
fn clock_family(rows: &[(&Row, &Vec<LabelPair>)]) -> MetricFamily {
    let all = rows.iter().filter_map(|(row, labels)| {
        let offset = row.copy.source.clock_offset_seconds?;
        Some(series((*labels).clone(), MetricType::GAUGE, offset))
    });
    let help =
        "How far the clock of the source server is ahead of the clock of this host; absent where it is not known";
    family(format!("{PREFIX}source_clock_offset_seconds"), help, MetricType::GAUGE, all.collect())
}

/// How often each step of a repair was taken.
fn repairs_family(rows: &[(&Row, &Vec<LabelPair>)]) -> MetricFamily {
    let mut all = Vec::with_capacity(rows.len() * 3);
    for (row, labels) in rows {
        let Repairs { consumer, connections, everything } = row.copy.counters.repairs;
        for (step, count) in [("consumer", consumer), ("connections", connections), ("everything", everything)] {
            let labels = labels.iter().cloned().chain([label("step", step)]).collect();
            all.push(series(labels, MetricType::COUNTER, count as f64));
        }
    }
    let help = "Repairs of a stall or after a transient error, by the part that was recreated";
    family(format!("{PREFIX}repairs"), help, MetricType::COUNTER, all)
}

/// All states, or only the current one.
fn state_family(rows: &[(&Row, &Vec<LabelPair>)], detail: Detail) -> MetricFamily {
    let mut all = Vec::with_capacity(rows.len() * STATES.len());
    for (row, labels) in rows {
        for (state, name) in STATES.into_iter().filter(|(state, _)| detail == Detail::Full || row.state == *state) {
            let labels = labels.iter().cloned().chain([label("state", name)]).collect();
            all.push(series(labels, MetricType::GAUGE, f64::from(u8::from(row.state == state))));
        }
    }
    family(format!("{PREFIX}state"), "1 for the state that the replication is in", MetricType::GAUGE, all)
}

fn processing_family(rows: &[(&Row, &Vec<LabelPair>)]) -> MetricFamily {
    let all = rows.iter().map(|(row, labels)| {
        let mut metric = Metric::from_label((*labels).clone());
        metric.set_histogram(histogram(&row.copy.processing));
        metric
    });
    let help = "Time from reading a message to settling it";
    family(format!("{PREFIX}processing_time_seconds"), help, MetricType::HISTOGRAM, all.collect())
}

/// Ours counts per bucket, Prometheus' counts up to a bound.
fn histogram(times: &status::Histogram) -> Histogram {
    let mut total = 0;
    let buckets = status::Histogram::BOUNDS.iter().zip(&times.counts).map(|(bound, count)| {
        total += count;
        let mut bucket = Bucket::default();
        bucket.set_upper_bound(*bound);
        bucket.set_cumulative_count(total);
        bucket
    });
    let mut histogram = Histogram::default();
    histogram.set_bucket(buckets.collect());
    histogram.set_sample_count(times.counts.iter().sum());
    histogram.set_sample_sum(times.sum);
    histogram
}

fn dropped_events_family(site: &str, dropped: u64) -> MetricFamily {
    let labels = vec![label("replicator", site)];
    let all = vec![series(labels, MetricType::COUNTER, dropped as f64)];
    let help = "Events that were not published because too many were waiting";
    family("choria_stream_replicator_events_dropped".to_owned(), help, MetricType::COUNTER, all)
}

fn skipped(row: &Row) -> u64 {
    let counters = &row.copy.counters;
    counters.skipped_sampled
        + counters.skipped_old
        + counters.skipped_filtered
        + counters.skipped_loop
        + counters.skipped_refused
        + counters.skipped_incomplete
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::{CopyStatus, RetentionLimit};

    fn row(id: &str) -> Row {
        let mut copy = CopyStatus::default();
        copy.counters.received = 5;
        copy.counters.copied = 3;
        copy.counters.skipped_old = 1;
        copy.counters.skipped_filtered = 1;
        copy.position.source_seq = 42;
        copy.lag = Some(status::Lag { messages: 2, seconds: Some(1.5), oldest: None });
        copy.processing.observe(0.002, 2);
        copy.processing.observe(60.0, 1);
        Row {
            replication: id.to_owned(),
            state: State::Running,
            origin: "kv".to_owned(),
            leader: Some("one".to_owned()),
            epoch: 3,
            config_revision: 7,
            copy,
            verify: None,
            todo: None,
        }
    }

    #[track_caller]
    fn check(text: &str, line: &str) {
        assert!(text.lines().any(|l| l == line), "`{line}` is missing in\n{text}");
    }

    #[test]
    fn counters_and_gauges_carry_choria_names_and_labels() {
        let text = render("US", &[row("ORDERS")], 0, Detail::Full).unwrap();
        let labels = r#"{stream="ORDERS",replicator="US",worker="US"}"#;
        check(&text, "# TYPE choria_stream_replicator_replicator_copied_messages counter");
        check(&text, &format!("choria_stream_replicator_replicator_total_messages{labels} 5"));
        check(&text, &format!("choria_stream_replicator_replicator_copied_messages{labels} 3"));
        check(&text, &format!("choria_stream_replicator_replicator_skipped_messages{labels} 2"));
        check(&text, &format!("choria_stream_replicator_replicator_stream_sequence{labels} 42"));
        check(&text, &format!("choria_stream_replicator_replicator_stream_lag_seconds{labels} 1.5"));
    }

    #[test]
    fn what_is_not_known_has_no_value() {
        let mut unknown = row("NEVER");
        unknown.leader = None;
        unknown.copy = CopyStatus::default();
        let text = render("US", &[row("ORDERS"), unknown], 0, Detail::Full).unwrap();
        for name in ["stream_lag_messages", "stream_lag_seconds", "stream_sequence", "target_sequence"] {
            let prefix = format!("choria_stream_replicator_replicator_{name}{{");
            let found: Vec<_> = text.lines().filter(|line| line.starts_with(&prefix)).collect();
            assert!(found.len() == 1 && found[0].contains("\"ORDERS\""), "{name} in\n{text}");
        }
        let labels = r#"{stream="NEVER",replicator="US",worker="US"}"#;
        check(&text, &format!("choria_stream_replicator_replicator_source_connected{labels} 0"));
    }

    #[test]
    fn a_named_replication_is_its_own_worker() {
        let text = render("US", &[row("ORDERS"), row("ORDERS.fast")], 0, Detail::Full).unwrap();
        let line = r#"choria_stream_replicator_replicator_epoch{stream="ORDERS",replicator="US",worker="fast"} 3"#;
        check(&text, line);
        assert_eq!(text.matches("# TYPE choria_stream_replicator_replicator_epoch ").count(), 1);
    }

    #[test]
    fn one_state_is_current() {
        let text = render("US", &[row("ORDERS")], 0, Detail::Full).unwrap();
        let line = |state, value| {
            format!(
                "choria_stream_replicator_replicator_state\
                 {{stream=\"ORDERS\",replicator=\"US\",worker=\"US\",state=\"{state}\"}} {value}"
            )
        };
        check(&text, &line("running", 1));
        check(&text, &line("held", 0));
    }

    #[test]
    fn repairs_are_counted_by_step() {
        let mut row = row("ORDERS");
        row.copy.counters.repairs.consumer = 2;
        let text = render("US", &[row], 0, Detail::Full).unwrap();
        let labels = r#"stream="ORDERS",replicator="US",worker="US""#;
        check(&text, &format!("choria_stream_replicator_replicator_repairs{{{labels},step=\"consumer\"}} 2"));
        check(&text, &format!("choria_stream_replicator_replicator_repairs{{{labels},step=\"everything\"}} 0"));
    }

    #[test]
    fn headroom_has_a_value_only_where_something_can_be_lost() {
        let text = render("US", &[row("ORDERS")], 0, Detail::Full).unwrap();
        assert!(!text.contains("retention_headroom_seconds"), "{text}");
        let mut short = row("ORDERS");
        short.copy.headroom = Some(status::Headroom { seconds: 12.5, limit: RetentionLimit::Age, low_below: 600.0 });
        let text = render("US", &[short, row("OTHER")], 0, Detail::Full).unwrap();
        let line = r#"choria_stream_replicator_replicator_retention_headroom_seconds{stream="ORDERS",replicator="US",worker="US"} 12.5"#;
        check(&text, line);
        assert_eq!(text.matches("retention_headroom_seconds{").count(), 1, "{text}");
    }

    #[test]
    fn elections_carry_choria_names_and_labels() {
        let election = |key: &str, leads| ElectionReading {
            election: key.to_owned(),
            identity: "new".to_owned(),
            as_candidate: 3,
            as_leader: 2,
            leads,
            interval: Duration::from_millis(1250),
        };
        let text = render_elections("US", &[election("SR_US_A", true), election("SR_US_B", false)], None).unwrap();
        let labels = r#"election="SR_US_A",identity="new",replicator="US""#;
        check(&text, "# TYPE choria_stream_replicator_election_campaigns counter");
        check(&text, &format!("choria_stream_replicator_election_campaigns{{{labels},state=\"candidate\"}} 3"));
        check(&text, &format!("choria_stream_replicator_election_campaigns{{{labels},state=\"leader\"}} 2"));
        check(&text, &format!("choria_stream_replicator_election_leader{{{labels}}} 1"));
        check(&text, &format!("choria_stream_replicator_election_interval_seconds{{{labels}}} 1.25"));
        let other = r#"{election="SR_US_B",identity="new",replicator="US"}"#;
        check(&text, &format!("choria_stream_replicator_election_leader{other} 0"));
        let beat = render_elections("US", &[], Some(&election("SR_US_HB", true))).unwrap();
        let labels = r#"{election="SR_US_HB",identity="new",replicator="unknown"}"#;
        check(&beat, &format!("choria_stream_replicator_election_leader{labels} 1"));
        assert_eq!(render_elections("US", &[], None).unwrap(), "");
    }

    #[test]
    fn heartbeats_carry_choria_names_and_labels() {
        let mut subject =
            HeartbeatSubject { subject: "a.b".to_owned(), published: 3, errors: 2, ..HeartbeatSubject::default() };
        subject.times.observe(0.25, 3);
        let heartbeats = HeartbeatReading { host: "one.example.net".to_owned(), paused: true, subjects: vec![subject] };
        let text = render_heartbeats("US", &heartbeats).unwrap();
        let name = "choria_stream_replicator_heartbeat_";
        check(&text, &format!("{name}subjects_count{{replicator=\"US\"}} 1"));
        check(&text, &format!("{name}paused{{hostname=\"one.example.net\",replicator=\"US\"}} 1"));
        check(&text, &format!("# TYPE {name}published_count counter"));
        check(&text, &format!("{name}published_count{{replicator=\"US\",subject=\"a.b\"}} 3"));
        check(&text, &format!("{name}published_error_count{{replicator=\"US\",subject=\"a.b\"}} 2"));
        check(&text, &format!("{name}publish_time_count{{replicator=\"US\",subject=\"a.b\"}} 3"));
        check(&text, &format!("{name}publish_time_sum{{replicator=\"US\",subject=\"a.b\"}} 0.75"));
    }

    #[test]
    fn state_labels_are_the_names_of_the_wire() {
        for (state, name) in STATES {
            assert_eq!(serde_json::to_value(state).unwrap(), name);
        }
    }

    #[test]
    fn histogram_buckets_are_cumulative() {
        let text = render("US", &[row("ORDERS")], 0, Detail::Full).unwrap();
        let name = "choria_stream_replicator_replicator_processing_time_seconds";
        let labels = r#"stream="ORDERS",replicator="US",worker="US""#;
        check(&text, &format!("{name}_bucket{{{labels},le=\"0.001\"}} 0"));
        check(&text, &format!("{name}_bucket{{{labels},le=\"0.0025\"}} 2"));
        check(&text, &format!("{name}_bucket{{{labels},le=\"10\"}} 2"));
        check(&text, &format!("{name}_bucket{{{labels},le=\"+Inf\"}} 3"));
        check(&text, &format!("{name}_sum{{{labels}}} 60.004"));
        check(&text, &format!("{name}_count{{{labels}}} 3"));
    }

    #[test]
    fn without_detail_a_replication_has_few_series() {
        let mut failed = row("ORDERS");
        failed.copy.last_error = Some(status::LastError::now("retry", "timed out"));
        let text = render("US", &[failed], 0, Detail::Off).unwrap();
        let series: Vec<_> = text.lines().filter(|line| line.contains("stream=\"ORDERS\"")).collect();
        let essential = READINGS.iter().filter(|reading| reading.essential).count();
        assert!(series.len() <= essential + 2, "{text}");
        assert!(series.iter().map(|line| line.len()).sum::<usize>() < 2_000, "{text}");
        check(
            &text,
            r#"choria_stream_replicator_replicator_state{stream="ORDERS",replicator="US",worker="US",state="running"} 1"#,
        );
        assert!(!text.contains("processing_time") && !text.contains("state=\"held\""), "{text}");
    }

    #[test]
    fn no_replications_are_no_error() {
        let text = render("US", &[], 2, Detail::Full).unwrap();
        check(&text, r#"choria_stream_replicator_events_dropped{replicator="US"} 2"#);
        assert!(!text.contains("copied_messages"));
    }
}
