//! What is in scope is copied, under the subjects that it shall have: filters, exclusions and transforms together.

use std::time::Duration;

use anyhow::Result;
use serde_json::{Value, json};

use crate::harness::{Expect, Outgoing, Site, Stored, wait_for};

const LONG: Duration = Duration::from_secs(120);
const REGIONS: [&str; 4] = ["eu", "us", "asia", "test"];

/// The i-th of many messages on `s.<kind>.<region>.<number>`.
fn message(i: u64) -> Outgoing {
    let kind = ["orders", "returns", "audit"][(i % 3) as usize];
    let region = REGIONS[(i / 3 % 4) as usize];
    Outgoing::new(format!("s.{kind}.{region}.{}", i * 7919 % 1000), format!("{i:0>100}"))
}

/// Orders and returns but for those of the tests; returns get another form, orders a partition. What the mapping makes
/// of a subject is written out in [`mapped`].
fn document() -> Value {
    json!({
        "target_stream": "T", "filter_subjects": ["s.orders.>", "s.returns.>"], "exclude_subjects": ["s.*.test.*", "x"],
        "subject_transforms": [
            {"src": "s.returns.*.*", "dest": "returns.{{wildcard(2)}}.{{left(1,1)}}"},
            {"src": "s.*.us.>", "dest": "america.{{Wildcard( 1 )}}.>"},
            {"src": "s.returns.>", "dest": "never.>"},
        ],
        "target_subject_prefix": "hub", "limits": {"messages_in_flight": 500}
    })
}

fn in_scope(message: &Stored) -> bool {
    let tokens: Vec<&str> = message.subject.split('.').collect();
    matches!(tokens[1], "orders" | "returns") && tokens[2] != "test"
}

fn mapped(subject: &str) -> String {
    let tokens: Vec<&str> = subject.split('.').collect();
    match (tokens[1], tokens[2]) {
        ("returns", region) => format!("hub.returns.{}.{}", tokens[3], &region[..1]),
        (kind, "us") => format!("hub.america.{kind}.{}", tokens[3]),
        _ => format!("hub.{subject}"),
    }
}

/// The last source sequence in scope: without messages after it, the position stays there.
async fn last_in_scope(site: &Site, scope: impl Fn(&Stored) -> bool) -> Result<u64> {
    Ok(site.source().await?.read_stream("S").await?.iter().rfind(|message| scope(message)).map_or(0, |last| last.seq))
}

/// Waits until a source sequence is settled and nothing waits.
async fn settled(site: &Site, id: &str, seq: u64) -> Result<Value> {
    let done = |row: &Value| {
        row["state"] == "running" && row["position"]["source_seq"].as_u64() >= Some(seq) && row["lag"]["messages"] == 0
    };
    wait_for(&format!("`{id}` to settle {seq}"), LONG, async || site.row(id).await.is_some_and(|row| done(&row)))
        .await?;
    site.row_when(id, "has settled", done).await
}

async fn over_kills(target: Option<Value>) -> Result<()> {
    const COUNT: u64 = 40_000;
    let mut site = Site::builder().args(["--instance", "one"]).start().await?;
    let mut raw = site.source_stream("S", json!({})).await?;
    raw.publish_all((1..=COUNT).map(message)).await?;
    if let Some(config) = target {
        site.target_stream("T", config).await?;
    }
    site.add("S", document()).await?;
    for share in [4, 2] {
        // Half of all is in scope.
        wait_for("the copy to continue", LONG, async || {
            site.at_target("T").await.unwrap_or_default() >= COUNT / 2 / share
        })
        .await?;
        site.service.kill()?;
        site.service.restart().await?;
    }
    settled(&site, "S", last_in_scope(&site, in_scope).await?).await?;
    site.verify("T", &Expect::copy_of("S").only(in_scope).mapped(mapped)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn filters_and_transforms_hold_over_kills_on_a_created_target() -> Result<()> {
    over_kills(None).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes long: make check-long"]
async fn filters_and_transforms_hold_over_kills_pipelined() -> Result<()> {
    over_kills(Some(json!({"subjects": ["hub.>"]}))).await
}

#[tokio::test]
async fn skipped_messages_are_counted_and_lag_is_filtered() -> Result<()> {
    let site = Site::start().await?;
    let mut raw = site.source_stream("S", json!({})).await?;
    raw.publish_all((0..120).map(message)).await?;
    let mut document = document();
    document["limits"] = json!({});
    site.add("S", document).await?;
    let row = settled(&site, "S", last_in_scope(&site, in_scope).await?).await?;
    // Of 120 messages 40 are orders and 40 returns, a quarter of them of the tests; the server keeps the rest back. The
    // last ones may be of the tests, and settle a moment later.
    let counted = |row: &Value, name: &str| row["counters"][name].as_u64().unwrap_or_default();
    assert_eq!(counted(&row, "copied"), 60, "{row}");
    site.row_when("S", "has counted", |row| counted(row, "skipped_filtered") == 20).await?;

    site.target.freeze()?;
    raw.publish_all((120..1320).map(message)).await?;
    let row = site.row_when("S", "lags", |row| row["lag"]["messages"].as_u64() >= Some(600)).await?;
    assert!(row["lag"]["messages"].as_u64() <= Some(800), "{row}");
    site.target.thaw()?;
    settled(&site, "S", last_in_scope(&site, in_scope).await?).await?;
    site.verify("T", &Expect::copy_of("S").only(in_scope).mapped(mapped)).await
}

#[tokio::test]
async fn a_change_of_filters_holds_from_the_position_on() -> Result<()> {
    let site = Site::start().await?;
    let mut raw = site.source_stream("S", json!({})).await?;
    let mut target = site.target_stream("S", json!({"subjects": ["s.>"]})).await?;
    raw.publish_all((0..300).map(message)).await?;
    let orders = |message: &Stored| message.subject.starts_with("s.orders.");
    let fields = |fields: Value| site.document_with("S", fields);
    site.add("S", json!({"filter_subject": "s.orders.>"})).await?;
    let changed = last_in_scope(&site, orders).await?;
    settled(&site, "S", changed).await?;

    // Returns too, but not those of Asia; then only returns; and each time more messages.
    let wide = json!({"filter_subjects": ["s.orders.>", "s.returns.>"], "exclude_subjects": ["*.returns.asia.>"]});
    let returns = |message: &Stored| {
        message.subject.starts_with("s.returns.") && message.subject.split('.').nth(2) != Some("asia")
    };
    let runs = async |revision: u64| {
        let runs = |row: &Value| row["state"] == "running" && row["config_revision"] == revision;
        site.row_when("S", "runs as changed", runs).await
    };
    site.send("config.update", fields(wide)).await?;
    runs(3).await?;
    raw.publish_all((300..600).map(message)).await?;
    let narrowed = last_in_scope(&site, |message| orders(message) || returns(message)).await?;
    settled(&site, "S", narrowed).await?;
    let narrow = json!({"filter_subjects": ["s.returns.>"], "exclude_subjects": ["*.returns.asia.>"]});
    site.send("config.update", fields(narrow)).await?;
    runs(4).await?;
    raw.publish_all((600..900).map(message)).await?;
    settled(&site, "S", last_in_scope(&site, returns).await?).await?;

    let expected = |message: &Stored| {
        let was_orders = orders(message) && message.seq <= narrowed;
        was_orders || returns(message) && message.seq > changed
    };
    site.verify("S", &Expect::copy_of("S").only(expected)).await?;
    assert!(target.read_stream("S").await?.iter().any(|message| message.subject.starts_with("s.returns.eu")));
    Ok(())
}

#[tokio::test]
async fn two_filtered_copies_of_one_stream_go_to_one_account() -> Result<()> {
    let site = Site::start().await?;
    let mut raw = site.source_stream("S", json!({})).await?;
    raw.publish_all((0..240).map(message)).await?;
    let split = json!([{"src": "s.returns.*.*", "dest": "returns.{{split(2,5)}}.$1"}]);
    let two = [
        (
            "orders",
            json!({"filter_subjects": ["s.orders.eu.*", "s.orders.us.*"]}),
            json!(["s.orders.eu.*", "s.orders.us.*"]),
        ),
        (
            "returns",
            json!({"filter_subject": "s.returns.>", "subject_transforms": split}),
            json!(["returns.>", "s.returns.>"]),
        ),
    ];
    for (name, fields, subjects) in &two {
        let mut fields = fields.clone();
        fields["name"] = (*name).into();
        fields["target_stream"] = name.to_uppercase().into();
        site.add("S", fields).await?;
        site.row_when(&format!("S.{name}"), "runs", |row| row["state"] == "running").await?;
        let info = site.target().await?.api(&format!("STREAM.INFO.{}", name.to_uppercase()), Value::Null).await?;
        assert_eq!(&info["config"]["subjects"], subjects, "{name}");
    }
    let of = |kind: &'static str, regions: &'static [&'static str]| {
        move |message: &Stored| {
            let tokens: Vec<&str> = message.subject.split('.').collect();
            tokens[1] == kind && regions.contains(&tokens[2])
        }
    };
    let (orders, returns) = (of("orders", &["eu", "us"]), of("returns", &REGIONS));
    settled(&site, "S.orders", last_in_scope(&site, orders).await?).await?;
    settled(&site, "S.returns", last_in_scope(&site, returns).await?).await?;
    site.verify("ORDERS", &Expect::copy_of("S").only(orders)).await?;
    let split = |subject: &str| {
        let tokens: Vec<&str> = subject.split('.').collect();
        let pieces: Vec<&str> = tokens[3].split('5').filter(|piece| !piece.is_empty()).collect();
        ["returns"].into_iter().chain(pieces).chain([tokens[2]]).collect::<Vec<_>>().join(".")
    };
    site.verify("RETURNS", &Expect::copy_of("S").only(returns).mapped(split)).await
}

#[tokio::test]
async fn a_bucket_is_copied_under_another_name() -> Result<()> {
    let site = Site::start().await?;
    let bucket =
        json!({"subjects": ["$KV.A.>"], "max_msgs_per_subject": 1, "allow_rollup_hdrs": true, "deny_delete": true});
    let mut raw = site.source_stream("KV_A", bucket).await?;
    for (key, lines) in
        [("a.x", &[][..]), ("b.x", &[]), ("a.x", &["KV-Operation: PURGE", "Nats-Rollup: sub"]), ("b.y", &[])]
    {
        raw.publish(&Outgoing::new(format!("$KV.A.{key}"), "v").with_lines(lines)).await?;
    }
    let rename = json!([{"src": "$KV.A.>", "dest": "$KV.B.>"}]);
    let merge = json!([{"src": "$KV.A.*.x", "dest": "merged.x"}, {"src": "$KV.A.>", "dest": "merged.>"}]);
    site.add("KV_A", json!({"name": "rename", "target_stream": "KV_B", "subject_transforms": rename})).await?;
    site.add("KV_A", json!({"name": "merge", "target_stream": "M", "subject_transforms": merge})).await?;
    let row = site.settled_within("KV_A.rename", 4, LONG).await?;
    assert_eq!(row["counters"]["headers_removed"], 0, "{row}");
    let row = site.settled_within("KV_A.merge", 4, LONG).await?;
    assert_eq!(row["counters"]["headers_removed"], 1, "{row}");
    let subjects = |all: Vec<Stored>| all.into_iter().map(|message| message.subject).collect::<Vec<_>>();
    assert_eq!(subjects(site.target().await?.read_stream("KV_B").await?), ["$KV.B.b.x", "$KV.B.a.x", "$KV.B.b.y"]);
    assert_eq!(subjects(site.target().await?.read_stream("M").await?), ["merged.x", "merged.x", "merged.b.y"]);
    Ok(())
}
