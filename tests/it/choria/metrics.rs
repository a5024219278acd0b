//! `/metrics` after a run, as dashboards and alerts for Choria's replicator expect it.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::old::make_election_bucket;
use super::{Place, copied, messages};
use crate::harness::client::http_get;
use crate::harness::{LIMIT, Outgoing, Service, wait_value};

/// One series: name, labels and value.
type MetricSeries = (String, BTreeMap<String, String>, f64);

/// The series of a page. No label of these tests has a comma, a quote or a brace.
fn series(page: &str) -> Vec<MetricSeries> {
    let of = |line: &str| {
        let (series, value) = line.rsplit_once(' ')?;
        let (name, labels) = series.split_once('{').unwrap_or((series, ""));
        let labels = labels.trim_end_matches('}').split(',').filter_map(|label| label.split_once('='));
        let labels = labels.map(|(name, value)| (name.to_owned(), value.trim_matches('"').to_owned())).collect();
        Some((name.to_owned(), labels, value.parse().ok()?))
    };
    page.lines().filter(|line| !line.starts_with('#')).filter_map(of).collect()
}

fn labels(text: &str) -> BTreeMap<String, String> {
    let pairs = text.split(',').filter_map(|pair| pair.split_once('='));
    pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

/// Exactly these labels, in any order.
fn value(page: &[MetricSeries], name: &str, of: &str) -> Option<f64> {
    let name = format!("choria_stream_replicator_{name}");
    let of = labels(of);
    page.iter().find(|(found, labels, _)| *found == name && *labels == of).map(|(_, _, value)| *value)
}

fn report(body: Value) -> Outgoing {
    Outgoing::new("reg", body.to_string())
}

/// Names that the panels of Choria's dashboard read with `replicator` and `stream`, and those that they read as they are.
pub const PANELS: [&str; 12] = [
    "replicator_stream_lag_messages",
    "tracker_total_items",
    "replicator_copied_messages",
    "replicator_copied_bytes",
    "replicator_skipped_messages",
    "replicator_skipped_bytes",
    "replicator_total_messages",
    "replicator_total_bytes",
    "replicator_too_old_messages",
    "replicator_processing_time_seconds_sum",
    "replicator_processing_time_seconds_count",
    "advisor_total_messages",
];
pub const PLAIN_PANELS: [&str; 5] = [
    "advisor_publish_errors",
    "replicator_ack_failed_count",
    "replicator_consumer_recreated",
    "replicator_handler_error_count",
    "replicator_meta_parse_failed_count",
];

/// What the Go program shows after the same run; `None` where only the series counts.
fn expected(bytes: &[usize], host: &str) -> Vec<(&'static str, String, Option<f64>)> {
    let reg = "stream=REG,replicator=EAST,worker=P1";
    let limiter = "limiter=memory,stream=SR_P1,replicator=EAST";
    let total: usize = bytes.iter().sum();
    let election = "election=SR_P1_REG,identity=ONE,replicator=EAST";
    let beat = format!("election=SR_EAST_HB,identity={host},replicator=unknown");
    let own = |name, labels: &str, value: f64| (name, labels.to_owned(), Some(value));
    let any = |name, labels: &str| (name, labels.to_owned(), None);
    vec![
        own("replicator_total_messages", reg, 5.0),
        own("replicator_total_bytes", reg, total as f64),
        own("replicator_copied_messages", reg, 4.0),
        own("replicator_copied_bytes", reg, (total - bytes[2]) as f64),
        own("replicator_skipped_messages", reg, 1.0),
        own("replicator_skipped_bytes", reg, bytes[2] as f64),
        own("replicator_too_old_messages", reg, 0.0),
        any("replicator_handler_error_count", reg),
        own("replicator_meta_parse_failed_count", reg, 0.0),
        own("replicator_ack_failed_count", reg, 0.0),
        any("replicator_consumer_recreated", reg),
        own("replicator_stream_sequence", reg, 5.0),
        own("replicator_processing_time_seconds_count", reg, 4.0),
        any("replicator_processing_time_seconds_sum", reg),
        own("replicator_too_old_messages", "stream=OLD,replicator=EAST,worker=EAST", 3.0),
        own("replicator_skipped_bytes", "stream=OLD,replicator=EAST,worker=EAST", 3.0),
        own("tracker_total_items", reg, 2.0),
        own("tracker_seen_by_gossip", reg, 0.0),
        own("limiter_messages_without_limit_field_count", limiter, 1.0),
        own("limiter_messages_copy_forced_count", limiter, 1.0),
        own("advisor_total_messages", "advisory=new,stream=REG,replicator=EAST", 2.0),
        own("advisor_publish_errors", "advisory=new,stream=REG,replicator=EAST", 0.0),
        any("election_campaigns", &format!("{election},state=candidate")),
        any("election_campaigns", &format!("{election},state=leader")),
        own("election_leader", election, 1.0),
        any("election_interval_seconds", election),
        own("election_leader", &beat, 1.0),
        own("heartbeat_subjects_count", "replicator=EAST", 1.0),
        own("heartbeat_paused", &format!("hostname={host},replicator=EAST"), 0.0),
        any("heartbeat_published_count", "replicator=EAST,subject=beats.a"),
        any("heartbeat_published_error_count", "replicator=EAST,subject=beats.a"),
        any("heartbeat_publish_time_count", "replicator=EAST,subject=beats.a"),
        any("heartbeat_publish_time_sum", "replicator=EAST,subject=beats.a"),
    ]
}

/// The first series that is missing or has another value.
fn missing(page: &[MetricSeries], expected: &[(&'static str, String, Option<f64>)]) -> Option<String> {
    let wrong = |(name, labels, expect): &&(&str, String, Option<f64>)| match value(page, name, labels) {
        None => true,
        Some(found) => expect.is_some_and(|expect| expect != found),
    };
    let (name, labels, expect) = expected.iter().find(wrong)?;
    Some(format!("{name}{{{labels}}} is {:?}, not {expect:?}", value(page, name, labels)))
}

#[tokio::test]
async fn every_series_of_chorias_list_has_the_right_value() -> Result<()> {
    let place = Place::start().await?;
    let (mut source, mut target) = (place.source().await?, place.target().await?);
    make_election_bucket(&mut source, Duration::from_secs(4)).await?;
    for (stream, subject) in [("REG", "reg"), ("OLD", "old.>"), ("BEATS", "beats.>"), ("ADV", "adv.>")] {
        source.create_stream(stream, json!({"subjects": [subject]})).await?;
    }
    let bodies = [
        json!({"sender": "n1"}),
        json!({"sender": "n2"}),
        json!({"sender": "n1", "some": "more"}),
        json!({"sender": "n1", "changed": true}),
        json!({"nobody": 1}),
    ];
    let bytes: Vec<usize> = bodies.iter().map(|body| body.to_string().len()).collect();
    source.publish_all(bodies.into_iter().map(report)).await?;
    source.publish_all(messages("old", 1, 3)).await?;
    let (from, to) = (place.source.url(), place.target.url());
    let text = format!(
        "name: EAST\nmonitor_port: {}\nheartbeats:\n  url: {from}\n  interval: 1s\n  leader_election: true\n  subjects:\n    - \
         subject: beats.a\nstreams:\n  - stream: REG\n    name: P1\n    source_url: {from}\n    target_url: {to}\n    \
         leader_election_name: ONE\n    inspect_field: sender\n    inspect_force_field: changed\n    inspect_duration: 1h\n    \
         advisory: {{subject: 'adv.%s.%v', reliable: true}}\n  - stream: OLD\n    source_url: {from}\n    target_url: {to}\n    \
         max_age: 1ms\n",
        place.port
    );
    let service = Service::replicate(&place.write(&text)?).spawn()?;
    copied(&mut target, "REG", 4, &service).await?;
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname")?.trim().to_owned();
    let (expected, mut page) = (expected(&bytes, &host), Vec::new());
    let mut wrong = String::new();
    let right = async || {
        let (_, text) = http_get(&format!("127.0.0.1:{}", place.port), "/metrics").await.ok()?;
        page = series(&text);
        wrong = missing(&page, &expected).unwrap_or_default();
        wrong.is_empty().then_some(())
    };
    let done = wait_value("every series with its value", LIMIT, right).await;
    done.with_context(|| format!("{wrong}\n{}", service.log()))?;
    // It listens on all addresses.
    ensure!(service.log().contains("set `--monitor-auth`"), "{}", service.log());
    // One for each run; a busy machine may need a second one.
    let consumers = value(&page, "replicator_consumer_recreated", "stream=REG,replicator=EAST,worker=P1");
    ensure!(consumers >= Some(1.0), "{consumers:?}");
    for panel in PANELS {
        let wanted = |labels: &BTreeMap<String, String>| {
            labels.get("replicator").is_some_and(|v| v == "EAST") && labels.get("stream").is_some_and(|v| v == "REG")
        };
        let name = format!("choria_stream_replicator_{panel}");
        ensure!(page.iter().any(|(found, labels, _)| *found == name && wanted(labels)), "no series for {panel}");
    }
    for panel in PLAIN_PANELS {
        let name = format!("choria_stream_replicator_{panel}");
        ensure!(page.iter().any(|(found, ..)| *found == name), "no series for {panel}");
    }
    Ok(())
}
