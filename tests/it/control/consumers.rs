//! Durable consumers of the source at the target: a subscriber that moves there continues where it was.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use async_nats::jetstream::{self, consumer::pull};
use futures_util::TryStreamExt;
use serde_json::{Value, json};

use crate::harness::{
    BOTH, LIMIT, Outgoing, Proxy, Raw, Role, Server, Site,
    cli::failed,
    client::{connect, refused, request},
    server::free_port,
    site::merged,
    wait_for, wait_while_moving,
};

const ID: &str = "ORDERS";
/// In flight when the subscriber stops: delivered, and some of them acknowledged.
const IN_FLIGHT: u64 = 50;

pub(crate) async fn create(raw: &mut Raw, stream: &str, name: &str, config: Value) -> Result<Value> {
    let config = merged(json!({"name": name, "durable_name": name, "ack_policy": "explicit"}), config);
    let body = json!({"stream_name": stream, "config": config});
    raw.api(&format!("CONSUMER.DURABLE.CREATE.{stream}.{name}"), body).await
}

async fn info(raw: &mut Raw, stream: &str, name: &str) -> Option<Value> {
    raw.api(&format!("CONSUMER.INFO.{stream}.{name}"), Value::Null).await.ok()
}

/// The source position that a consumer at the target was created for.
fn position(info: &Value) -> Option<u64> {
    info["config"]["metadata"]["stream-replicator.position"].as_str()?.parse().ok()
}

pub(crate) async fn wait_position(raw: &mut Raw, stream: &str, name: &str, expect: u64) -> Result<Value> {
    let mut last = None;
    wait_for(&format!("{name} at {expect}"), LIMIT, async || {
        last = info(raw, stream, name).await;
        last.as_ref().and_then(position) == Some(expect)
    })
    .await
    .with_context(|| format!("{last:?}"))?;
    last.context("a consumer")
}

async fn consumer(url: &str, stream: &str, name: &str) -> Result<jetstream::consumer::Consumer<pull::Config>> {
    let js = jetstream::new(connect(url).await?);
    let stream = js.get_stream_no_info(stream).await?;
    stream.get_consumer(name).await.map_err(|error| anyhow::anyhow!("{error}"))
}

/// What a subscriber was given: numbers and stream sequences, in order. Without `acks` for those that are not wanted.
pub(crate) async fn take(
    url: &str,
    stream: &str,
    name: &str,
    count: u64,
    acks: impl Fn(u64) -> bool,
) -> Result<Vec<(u64, u64)>> {
    let consumer = consumer(url, stream, name).await?;
    let mut seen = Vec::new();
    while (seen.len() as u64) < count {
        let wanted = (count - seen.len() as u64).min(500);
        let batch =
            consumer.fetch().max_messages(usize::try_from(wanted)?).expires(Duration::from_secs(20)).messages().await?;
        let messages: Vec<_> = batch.try_collect().await.map_err(|error| anyhow::anyhow!("{error}"))?;
        ensure!(!messages.is_empty(), "nothing more came after {} of {count}", seen.len());
        for message in messages {
            let number = std::str::from_utf8(&message.payload)?.parse()?;
            let seq = message.info().map_err(|error| anyhow::anyhow!("{error}"))?.stream_sequence;
            seen.push((number, seq));
            if acks(number) {
                message.double_ack().await.map_err(|error| anyhow::anyhow!("{error}"))?;
            }
        }
    }
    Ok(seen)
}

/// How the target is filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fill {
    Mirror,
    Source,
    FastIngest,
    Pipelined,
}

async fn started(fill: Fill, count: u64) -> Result<Site> {
    let port = free_port()?;
    let leafnodes = format!("leafnodes {{ listen: \"127.0.0.1:{port}\" }}");
    let target = Server::builder(Role::Target).config(&leafnodes).start().await?;
    let site = Site::builder().on(Server::start(Role::Source).await?, target).start().await?;
    site.filled(ID, count).await?;
    let own = json!({"subjects": ["orders.>", "own"], "allow_batched": fill == Fill::FastIngest});
    match fill {
        Fill::Mirror => {}
        Fill::Source => _ = site.target_stream(ID, json!({"subjects": ["own"]})).await?,
        _ => _ = site.target_stream(ID, own).await?,
    }
    if fill != Fill::Mirror {
        // Sequences of the target are its own.
        site.target().await?.publish_all((0..37).map(|_| Outgoing::new("own", "0"))).await?;
    }
    let leaf = json!({"target_leaf_url": format!("nats-leaf://127.0.0.1:{port}"), "consumers": ["billing"]});
    let fields = match fill {
        Fill::Mirror => merged(leaf, json!({"kind": "mirror"})),
        Fill::Source => merged(leaf, json!({"kind": "source", "target_update": true})),
        _ => json!({"consumers": ["bill*"]}),
    };
    let filter = if fill == Fill::Mirror { json!({}) } else { json!({"filter_subject": "orders.>"}) };
    create(&mut site.source().await?, ID, "billing", merged(filter, json!({"max_ack_pending": 5000}))).await?;
    site.add(ID, fields).await?;
    site.settled_within(ID, count, Duration::from_secs(120)).await?;
    Ok(site)
}

/// A subscriber takes half of the messages at the source and the rest at the target.
async fn continues(fill: Fill, count: u64) -> Result<()> {
    let site = started(fill, count).await?;
    let half = count / 2;
    let floor = half - IN_FLIGHT;
    // Of those in flight, every second one is acknowledged, and the first is not.
    let acks = |number: u64| number <= floor || (number - floor).is_multiple_of(2);
    let before = take(&site.source.url(), ID, "billing", half, acks).await?;
    let mut target = site.target().await?;
    if fill == Fill::Mirror {
        let promoted = request(&site.client, "replicator.promote", json!({"replication": ID})).await?;
        let moved = &promoted["consumers"][0];
        assert_eq!(
            (&moved["name"], &moved["position"], &moved["start"]),
            (&json!("billing"), &json!(floor), &json!(floor + 1))
        );
    } else {
        wait_position(&mut target, ID, "billing", floor).await?;
        request(&site.client, "replicator.config.delete", json!({"replication": ID})).await?;
    }
    let after = take(&site.target.url(), ID, "billing", count - floor, |_| true).await?;
    let mut seen: BTreeMap<u64, u64> = BTreeMap::new();
    for (number, _) in before.iter().chain(&after) {
        *seen.entry(*number).or_default() += 1;
    }
    assert_eq!(seen.len() as u64, count, "{fill:?}: messages were skipped");
    for (number, times) in &seen {
        let may = if (floor + 1..=half).contains(number) { 2 } else { 1 };
        assert!(*times <= may, "{fill:?}: {number} was delivered {times} times");
    }
    // Order, and for a mirror the sequences, are those of the source.
    let numbers: Vec<_> = after.iter().map(|(number, _)| *number).collect();
    assert_eq!(numbers, (floor + 1..=count).collect::<Vec<_>>(), "{fill:?}");
    if fill == Fill::Mirror {
        assert!(after.iter().all(|(number, seq)| number == seq));
        let left = info(&mut target, ID, "billing").await.context("a consumer")?;
        assert_eq!(position(&left), None, "{left}");
    }
    println!("{fill:?}: {count} messages, {} of them twice", before.len() + after.len() - seen.len());
    Ok(())
}

#[tokio::test]
async fn a_subscriber_of_a_promoted_mirror_continues() -> Result<()> {
    continues(Fill::Mirror, 3_000).await
}

#[tokio::test]
async fn a_subscriber_of_a_copy_continues() -> Result<()> {
    continues(Fill::FastIngest, 3_000).await
}

#[tokio::test]
async fn a_subscriber_of_a_pipelined_copy_continues() -> Result<()> {
    continues(Fill::Pipelined, 3_000).await
}

#[tokio::test]
async fn a_subscriber_of_a_source_continues() -> Result<()> {
    continues(Fill::Source, 3_000).await
}

#[tokio::test]
#[ignore = "takes a minute: 100,000 messages for each kind"]
async fn a_subscriber_in_100_000_messages_continues() -> Result<()> {
    for fill in [Fill::Mirror, Fill::FastIngest, Fill::Pipelined, Fill::Source] {
        continues(fill, 100_000).await?;
    }
    Ok(())
}

#[tokio::test]
async fn consumers_follow_until_they_are_used() -> Result<()> {
    let site = Site::start().await?;
    site.filled(ID, 100).await?;
    let (mut source, mut target) = (site.source().await?, site.target().await?);
    for name in ["used", "idle", "gone", "gone-used", "taken"] {
        create(&mut source, ID, name, json!({})).await?;
    }
    target.create_stream(ID, json!({"subjects": ["orders.>"]})).await?;
    create(&mut target, ID, "taken", json!({"description": "of another program"})).await?;
    site.add(ID, json!({"consumers": ["*"]})).await?;
    site.settled(ID, 100).await?;
    for name in ["used", "idle", "gone", "gone-used"] {
        wait_position(&mut target, ID, name, 0).await?;
    }
    for name in ["used", "idle"] {
        take(&site.source.url(), ID, name, 40, |_| true).await?;
    }
    let start = wait_position(&mut target, ID, "used", 40).await?["config"]["opt_start_seq"].clone();
    assert_eq!(start, 41);
    // A subscriber takes one message there: from now on it is that subscriber's.
    take(&site.target.url(), ID, "used", 1, |_| true).await?;
    take(&site.target.url(), ID, "gone-used", 1, |_| true).await?;
    for name in ["used", "idle"] {
        take(&site.source.url(), ID, name, 20, |_| true).await?;
    }
    for name in ["gone", "gone-used"] {
        source.api(&format!("CONSUMER.DELETE.{ID}.{name}"), Value::Null).await?;
    }
    wait_position(&mut target, ID, "idle", 60).await?;
    wait_for("the deleted one to be removed", LIMIT, async || info(&mut target, ID, "gone").await.is_none()).await?;
    let used = info(&mut target, ID, "used").await.context("it is there")?;
    assert_eq!((position(&used), &used["ack_floor"]["stream_seq"]), (Some(40), &json!(41)), "{used}");
    assert!(info(&mut target, ID, "gone-used").await.is_some());
    let taken = info(&mut target, ID, "taken").await.context("it is there")?;
    assert_eq!((&taken["config"]["description"], position(&taken)), (&json!("of another program"), None), "{taken}");
    let log = site.service.log();
    assert!(log.contains("consumer `taken` exists at the target and was created by others"), "{log}");
    assert_eq!(log.matches("created by others").count(), 1, "{log}");
    Ok(())
}

/// A copy follows a recreated source; what is at the target has positions in the stream before it.
#[tokio::test]
async fn consumers_outlive_a_recreated_source() -> Result<()> {
    let mut site = Site::start().await?;
    site.filled(ID, 100).await?;
    let (mut source, mut target) = (site.source().await?, site.target().await?);
    for name in ["billing", "shop"] {
        create(&mut source, ID, name, json!({})).await?;
        take(&site.source.url(), ID, name, 40, |_| true).await?;
    }
    site.add(ID, json!({"consumers": ["*"]})).await?;
    site.settled(ID, 100).await?;
    for name in ["billing", "shop"] {
        wait_position(&mut target, ID, name, 40).await?;
    }
    source.api(&format!("STREAM.DELETE.{ID}"), Value::Null).await?;
    site.source_stream(ID, json!({})).await?;
    site.publish(ID, 1..=30).await?;
    // One is created again, with a position in the other stream; the other one is not.
    create(&mut source, ID, "billing", json!({})).await?;
    take(&site.source.url(), ID, "billing", 20, |_| true).await?;
    create(&mut source, ID, "later", json!({})).await?;
    let stay = async |site: &Site, target: &mut Raw| -> Result<()> {
        // A pass that is over: a consumer that is new at the source is at the target.
        for name in ["billing", "shop"] {
            wait_for(&format!("{name} to be in the log"), LIMIT, async || {
                site.service.log().contains(&format!("consumer `{name}` keeps its position in stream `{ID}`"))
            })
            .await?;
            let there = info(target, ID, name).await.with_context(|| format!("{name} is gone"))?;
            assert_eq!((position(&there), &there["config"]["opt_start_seq"]), (Some(40), &json!(41)), "{there}");
        }
        Ok(())
    };
    wait_position(&mut target, ID, "later", 0).await?;
    stay(&site, &mut target).await?;
    // An import says so too, and another instance knows as much.
    let exported = site.cli().ok(["consumers", "export", ID]).await?;
    let ended = site.cli().run_with(["consumers", "import", ID], &exported).await?;
    let text = format!("{}{}", ended.stdout, ended.stderr);
    assert!(text.contains("consumer `billing` keeps its position in stream `ORDERS`"), "{text}");
    site.service.kill()?;
    site.service.restart().await?;
    create(&mut source, ID, "last", json!({})).await?;
    wait_position(&mut target, ID, "last", 0).await?;
    stay(&site, &mut target).await?;
    // Deleted at the target, it is created for the stream of now; and gone there, it is removed again.
    target.api(&format!("CONSUMER.DELETE.{ID}.billing"), Value::Null).await?;
    wait_position(&mut target, ID, "billing", 20).await?;
    source.api(&format!("CONSUMER.DELETE.{ID}.billing"), Value::Null).await?;
    wait_for("the deleted one to be removed", LIMIT, async || info(&mut target, ID, "billing").await.is_none()).await?;
    assert!(info(&mut target, ID, "shop").await.is_some());
    Ok(())
}

/// The settings of every kind of consumer arrive, with subjects of the target and positions by the rules of its acks.
#[tokio::test]
async fn consumers_of_every_kind_keep_their_settings() -> Result<()> {
    let site = Site::start().await?;
    site.filled(ID, 60).await?;
    let (mut source, mut target) = (site.source().await?, site.target().await?);
    let kinds = [
        (
            "filtered",
            json!({"filter_subject": "orders.1", "backoff": [1_000_000_000, 2_000_000_000], "max_deliver": 5}),
        ),
        ("several", json!({"filter_subjects": ["orders.1", "orders.2"], "headers_only": true})),
        ("none", json!({"ack_policy": "none"})),
        ("all", json!({"ack_policy": "all", "max_ack_pending": 77})),
        ("pushed", json!({"deliver_subject": "pushed.here", "deliver_group": "workers"})),
        ("paused", json!({"pause_until": "2099-01-01T00:00:00Z"})),
        ("groups", json!({"priority_groups": ["jobs"], "priority_policy": "overflow"})),
        ("later", json!({"deliver_policy": "by_start_sequence", "opt_start_seq": 31, "metadata": {"team": "a"}})),
        ("new", json!({"deliver_policy": "new"})),
        ("out", json!({"filter_subject": "orders.4"})),
    ];
    for (name, config) in &kinds {
        create(&mut source, ID, name, config.clone()).await?;
    }
    take(&site.source.url(), ID, "none", 25, |_| false).await?;
    take(&site.source.url(), ID, "all", 25, |number| number == 20).await?;
    take(&site.source.url(), ID, "filtered", 3, |_| true).await?;
    site.add(ID, json!({"consumers": ["*"], "exclude_subjects": ["orders.4"], "target_subject_prefix": "x"})).await?;
    let copied = site.settled(ID, 60).await?;
    ensure!(copied["counters"]["copied"] == 48, "{copied}");
    // Every fifth message is not copied, so sequences of the target fall behind.
    for (name, position) in [("none", 25), ("all", 20), ("filtered", 11), ("later", 30), ("new", 60), ("paused", 0)] {
        let made = wait_position(&mut target, ID, name, position).await?;
        let last_copied = (1..=position).filter(|seq| seq % 5 != 4).count() as u64;
        assert_eq!(made["config"]["opt_start_seq"], last_copied + 1, "{name}: {made}");
    }
    for (name, config) in &kinds[..9] {
        let made = info(&mut target, ID, name).await.with_context(|| format!("{name} is not there"))?["config"].take();
        for (field, value) in config.as_object().context("fields")? {
            let expect = match field.as_str() {
                "filter_subject" => json!("x.orders.1"),
                "filter_subjects" => json!(["x.orders.1", "x.orders.2"]),
                "deliver_policy" => json!("by_start_sequence"),
                "opt_start_seq" => json!(25),
                "metadata" => {
                    assert_eq!(made["metadata"]["team"], "a");
                    continue;
                }
                _ => value.clone(),
            };
            assert_eq!(made[field], expect, "{name}: {field} of {made}");
        }
    }
    assert!(info(&mut target, ID, "out").await.is_none());
    assert!(site.service.log().contains("nothing of `orders.4` is at the target"), "{}", site.service.log());
    Ok(())
}

#[tokio::test]
async fn an_export_is_imported_at_the_target() -> Result<()> {
    let site = Site::start().await?;
    site.filled(ID, 50).await?;
    let (mut source, mut target) = (site.source().await?, site.target().await?);
    create(&mut source, ID, "billing", json!({})).await?;
    create(&mut source, ID, "shop", json!({"filter_subject": "orders.2"})).await?;
    take(&site.source.url(), ID, "billing", 30, |_| true).await?;
    site.add(ID, json!({})).await?;
    site.settled(ID, 50).await?;
    let cli = site.cli();
    let text = cli.ok(["consumers", "export", ID, "--consumer", "bill*"]).await?;
    let exported: Value = serde_json::from_str(&text)?;
    let one = &exported["consumers"][0];
    assert_eq!(
        (&one["name"], &one["position"], &one["start"]),
        (&json!("billing"), &json!(30), &json!(31)),
        "{exported:#}"
    );
    assert_eq!(exported["consumers"].as_array().map(Vec::len), Some(1));
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("consumers.json");
    std::fs::write(&file, &text)?;
    let file = file.display().to_string();
    let made = cli.ok(["consumers", "import", ID, &file]).await?;
    assert!(made.contains("ORDERS: consumer billing created, begins with 31 (source position 30)"), "{made}");
    assert!(cli.ok(["consumers", "import", ID, &file]).await?.contains("is current"));
    // Later acks at the source are in a later export.
    take(&site.source.url(), ID, "billing", 5, |_| true).await?;
    let later = cli.json(["consumers", "export", ID]).await?;
    let ended = cli.run_with(["consumers", "import", ID, "--json"], &later.to_string()).await?;
    let imported: Value = serde_json::from_str(&ended.stdout)?;
    let outcome = |name: &str| {
        let all = imported["consumers"].as_array().into_iter().flatten();
        all.into_iter().find(|one| one["name"] == name).map(|one| (one["outcome"].clone(), one["start"].clone()))
    };
    assert_eq!(outcome("billing"), Some((json!("moved"), json!(36))), "{imported:#}");
    assert_eq!(outcome("shop"), Some((json!("created"), json!(1))), "{imported:#}");
    assert_eq!(take(&site.target.url(), ID, "billing", 1, |_| true).await?, [(36, 36)]);
    let used = cli.ok(["consumers", "import", ID, &file]).await?;
    assert!(used.contains("is used at the target and was left as it is"), "{used}");
    assert_eq!(take(&site.target.url(), ID, "billing", 1, |_| true).await?, [(37, 37)]);
    create(&mut target, ID, "other", json!({})).await?;
    let mut foreign = exported.clone();
    for field in ["name", "config/durable_name", "config/name"] {
        *foreign.pointer_mut(&format!("/consumers/0/{field}")).context("a field")? = "other".into();
    }
    let other = folder.path().join("other.json");
    std::fs::write(&other, foreign.to_string())?;
    let ended = cli.run(["consumers", "import", ID, &other.display().to_string()]).await?;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.stdout.contains("was created by others"), "{ended:?}");
    Ok(())
}

/// A mirror whose target is reached over a proxy, and its consumer `billing` at position 10.
async fn mirrored_over(proxy: &Proxy, site: &Site, consumers: Value) -> Result<()> {
    let mut document = request(&site.client, "replicator.config.get", json!({"replication": ID})).await?;
    let document = merged(document["config"].take(), json!({"target_url": proxy.url(), "consumers": consumers}));
    request(&site.client, "replicator.config.update", document).await?;
    take(&site.source.url(), ID, "billing", 10, |_| true).await?;
    wait_position(&mut site.target().await?, ID, "billing", 10).await.map(drop)
}

/// A promotion that has no time for all consumers is refused, and forced it names the others.
#[tokio::test]
async fn a_promotion_names_consumers_it_had_no_time_for() -> Result<()> {
    const CONSUMERS: usize = 101;
    let site = started(Fill::Mirror, 100).await?;
    let (mut source, mut target) = (site.source().await?, site.target().await?);
    for i in 1..CONSUMERS {
        create(&mut source, ID, &format!("c{i}"), json!({})).await?;
    }
    let proxy = Proxy::start(site.target.port()).await?;
    mirrored_over(&proxy, &site, json!(["billing", "c*"])).await?;
    let all = async |target: &mut Raw| {
        let listed = target.api(&format!("CONSUMER.LIST.{ID}"), Value::Null).await.unwrap_or_default();
        let listed = listed["consumers"].as_array().map(Vec::len);
        if listed == Some(CONSUMERS) { Ok(()) } else { Err(listed) }
    };
    wait_while_moving("all of them at the target", LIMIT, async || all(&mut target).await).await?;
    // Each takes a round trip, even one that is current.
    proxy.latency(BOTH, Duration::from_millis(15));
    let ended = site.send("promote", json!({"replication": ID})).await?;
    refused(&ended, 503, "there was no time left for it; try again, or use `force`");
    refused(&ended, 503, " more: ");
    let mirror = target.api(&format!("STREAM.INFO.{ID}"), Value::Null).await?;
    assert!(mirror["config"]["mirror"].is_object(), "{mirror}");
    site.publish(ID, 101..=110).await?;
    site.settled(ID, 110).await?;
    let promoted = request(&site.client, "replicator.promote", json!({"replication": ID, "force": true})).await?;
    let moved = promoted["consumers"].as_array().context("consumers")?;
    let late: Vec<_> = moved.iter().filter(|one| one["outcome"] == "not_refreshed").collect();
    assert_eq!(moved.len(), CONSUMERS, "{promoted}");
    assert!(!late.is_empty() && late.iter().all(|one| one["reason"] == "there was no time left for it"), "{promoted}");
    println!("{} of {CONSUMERS} were not refreshed", late.len());
    let stream = target.api(&format!("STREAM.INFO.{ID}"), Value::Null).await?;
    assert!(stream["config"].get("mirror").is_none(), "{stream}");
    all(&mut target).await.map_err(|listed| anyhow::anyhow!("{listed:?} consumers are left"))?;
    // Their marks take longer than the request has time for.
    let released = async || {
        let listed = target.api(&format!("CONSUMER.LIST.{ID}"), Value::Null).await.unwrap_or_default();
        let all = listed["consumers"].as_array().map(Vec::as_slice).unwrap_or_default();
        all.len() == CONSUMERS && all.iter().all(|one| position(one).is_none())
    };
    wait_for("all of them without a mark", LIMIT, released).await
}

/// Without its source, a mirror is promoted with the consumers of the last pass, and the answer says so.
#[tokio::test]
async fn a_promotion_without_a_source_names_its_consumers() -> Result<()> {
    let site = started(Fill::Mirror, 50).await?;
    let proxy = Proxy::start(site.target.port()).await?;
    mirrored_over(&proxy, &site, json!(["billing", "never", "c*"])).await?;
    site.source.freeze()?;
    let asked = json!({"replication": ID, "force": true, "subjects": ["orders.>"]});
    let promoted = request(&site.client, "replicator.promote", asked).await;
    site.source.thaw()?;
    let promoted = promoted?;
    let row = |name: &str, position: u64, start: u64| {
        let reason = &promoted["consumers"][0]["reason"];
        json!({"name": name, "position": position, "start": start, "outcome": "not_refreshed", "reason": reason})
    };
    assert_eq!(promoted["consumers"], json!([row("billing", 10, 11), row("never", 0, 0)]), "{promoted}");
    let reason = promoted["consumers"][0]["reason"].as_str().unwrap_or_default();
    assert!(reason.contains("did not answer in time"), "{promoted}");
    assert_eq!(take(&site.target.url(), ID, "billing", 1, |_| true).await?, [(11, 11)]);
    Ok(())
}

/// What an import does not say, the source stream of its positions, is not lost for a consumer that has it.
#[tokio::test]
async fn an_import_keeps_the_stream_of_a_position() -> Result<()> {
    let site = Site::start().await?;
    site.filled(ID, 50).await?;
    let (mut source, mut target) = (site.source().await?, site.target().await?);
    for name in ["billing", "shop"] {
        create(&mut source, ID, name, json!({})).await?;
    }
    site.add(ID, json!({})).await?;
    site.settled(ID, 50).await?;
    let mut exported = site.cli().json(["consumers", "export", ID]).await?;
    for one in exported["consumers"].as_array_mut().context("consumers")? {
        one.as_object_mut().context("a consumer")?.remove("error");
    }
    let mut by_hand = exported.clone();
    for (at, one) in by_hand["consumers"].as_array_mut().context("consumers")?.iter_mut().enumerate() {
        one["config"]["metadata"] = json!({});
        (one["position"], one["start"]) = (json!(10 + at), json!(11 + at));
    }
    let import = async |what: &Value| -> Result<Vec<Value>> {
        let asked = json!({"replication": ID, "consumers": what["consumers"]});
        let mut done = request(&site.client, "replicator.consumers.import", asked).await?;
        done["consumers"].as_array_mut().map(std::mem::take).context("consumers")
    };
    // By hand, consumers are created and moved, as long as nothing else is known of them.
    assert!(import(&by_hand).await?.iter().all(|one| one["outcome"] == "created"));
    assert!(import(&exported).await?.iter().all(|one| one["outcome"] == "moved"));
    let before = info(&mut target, ID, "billing").await.context("it is there")?;
    let created = &before["config"]["metadata"]["stream-replicator.source-created"];
    let created = created.as_str().with_context(|| format!("no stream in {before}"))?.to_owned();
    for one in import(&by_hand).await? {
        let name = one["name"].as_str().unwrap_or_default();
        assert_eq!(one["outcome"], "refused", "{one}");
        let start = format!("consumer `{name}` has its position in stream `{ID}` that was created at {created}");
        let reason = one["reason"].as_str().unwrap_or_default();
        assert!(reason.starts_with(&start) && reason.contains("delete the consumer at the target"), "{one}");
    }
    let after = info(&mut target, ID, "billing").await.context("it is there")?;
    assert_eq!((&after["config"], &after["created"]), (&before["config"], &before["created"]));
    // What the error says.
    assert!(import(&exported).await?.iter().all(|one| one["outcome"] == "current"));
    target.api(&format!("CONSUMER.DELETE.{ID}.billing"), Value::Null).await?;
    let again = import(&by_hand).await?;
    let outcomes: Vec<_> = again.iter().map(|one| (one["name"].as_str(), one["outcome"].as_str())).collect();
    assert_eq!(outcomes, [(Some("billing"), Some("created")), (Some("shop"), Some("refused"))]);
    Ok(())
}

/// What the target refuses is in the status, in an event and in a metric, until it is mended.
#[tokio::test]
async fn a_refused_consumer_is_named_until_it_is_mended() -> Result<()> {
    const METRIC: &str = "choria_stream_replicator_replicator_consumers_failing";
    let mut site = Site::builder().args(["--monitor", "127.0.0.1:0"]).start().await?;
    site.filled(ID, 20).await?;
    let (mut source, mut target) = (site.source().await?, site.target().await?);
    // There, deliveries of a consumer would be stored again.
    target.create_stream(ID, json!({"subjects": ["orders.>", "pushed.>"]})).await?;
    create(&mut source, ID, "pulled", json!({})).await?;
    create(&mut source, ID, "pushed", json!({"deliver_subject": "pushed.here"})).await?;
    site.add(ID, json!({"consumers": ["*"]})).await?;
    let row = site.row_when(ID, "names it", |row| row["consumers"]["failing"] == 1).await?;
    let error = &row["consumers"]["errors"][0];
    assert_eq!((&error["consumer"], &row["state"]), (&json!("pushed"), &json!("running")), "{row}");
    let message = error["message"].as_str().context("a message")?;
    assert!(message.contains("cycle"), "{row}");
    let event = site.events.wait("consumer-refused", ID).await?;
    assert_eq!((&event["consumer"], &event["message"]), (&json!("pushed"), &json!(message)), "{event}");
    let metric = async |expect: u64| {
        let what = format!("{METRIC} {expect}");
        wait_for(&what, LIMIT, async || {
            let (_, page) = site.service.get("/metrics").await.unwrap_or_default();
            page.lines().any(|line| line.starts_with(METRIC) && line.ends_with(&format!(" {expect}")))
        })
        .await
    };
    metric(1).await?;
    let shown = site.cli().ok(["status", ID]).await?;
    assert!(shown.contains("pushed is not kept at the target: ") && shown.contains("cycle"), "{shown}");
    // A row that is saved outlives the instance; what it says is not published again.
    site.publish(ID, 21..=30).await?;
    let row = site.settled(ID, 30).await?;
    assert_eq!(row["consumers"]["failing"], 1, "{row}");
    assert!(info(&mut target, ID, "pulled").await.is_some() && info(&mut target, ID, "pushed").await.is_none());
    assert_eq!(site.events.told("consumer-refused").len(), 1);
    let mut config = target.api(&format!("STREAM.INFO.{ID}"), Value::Null).await?["config"].take();
    config["subjects"] = json!(["orders.>"]);
    target.api(&format!("STREAM.UPDATE.{ID}"), config).await?;
    let mended = |row: &Value| row["consumers"] == json!({"failing": 0, "errors": []});
    site.row_when(ID, "is mended", mended).await?;
    metric(0).await?;
    assert!(info(&mut target, ID, "pushed").await.is_some());
    assert!(!site.cli().ok(["status", ID]).await?.contains("not kept at the target"));
    // Without the field, nothing is said of consumers.
    request(&site.client, "replicator.config.update", site.document_with(ID, json!({}))).await?;
    site.row_when(ID, "has no consumers", |row| row["consumers"].is_null() && row["state"] == "running").await?;
    Ok(())
}

/// `config.validate` names what the login may not do.
#[tokio::test]
async fn a_missing_permission_is_named() -> Result<()> {
    let users = |role, denied: &str| {
        let users = format!(
            "authorization {{ users: [{{ user: all, password: p }}, {{ user: u, password: p, \
             permissions: {{ publish: {{ deny: \"{denied}\" }} }} }}] }}"
        );
        async move { Server::builder(role).config(&users).start().await }
    };
    let (from, to) = tokio::try_join!(
        users(Role::Source, "$JS.API.CONSUMER.LIST.>"),
        users(Role::Target, "$JS.API.CONSUMER.INFO.>")
    )?;
    let control = Server::start(Role::Control).await?;
    let (source, target) = (from.url_as("u:p"), to.url_as("u:p"));
    let mut raw = Raw::connect(&from.url_as("all:p")).await?;
    raw.create_stream(ID, json!({"subjects": ["orders.>"]})).await?;
    let service = crate::harness::Service::builder(&control.url(), "TEST").start().await?;
    let client = connect(&control.url()).await?;
    let document = json!({"stream": ID, "source_url": source, "target_url": target});
    let without = request(&client, "replicator.config.validate", document.clone()).await?;
    assert!(!without.to_string().contains("CONSUMER.LIST"), "{without}");
    let with = merged(document, json!({"consumers": ["*"]}));
    let with = request(&client, "replicator.config.validate", with).await?.to_string();
    for denied in ["`$JS.API.CONSUMER.LIST.ORDERS`", "`$JS.API.CONSUMER.INFO.ORDERS."] {
        assert!(with.contains(denied), "{with}");
    }
    drop(service);
    Ok(())
}

#[tokio::test]
async fn a_late_import_leaves_no_consumer_deleted() -> Result<()> {
    const CONSUMERS: u64 = 60;
    let site = Site::start().await?;
    site.filled(ID, 10).await?;
    let proxy = Proxy::start(site.target.port()).await?;
    site.add(ID, json!({"target_url": proxy.url()})).await?;
    site.settled(ID, 10).await?;
    let import = async |start: u64| {
        let one = |i: u64| {
            let name = format!("c{i}");
            let config = json!({"durable_name": name, "ack_policy": "explicit"});
            json!({"name": name, "position": start - 1, "start": start, "config": config})
        };
        let consumers: Vec<_> = (0..CONSUMERS).map(one).collect();
        site.send("consumers.import", json!({"replication": ID, "consumers": consumers})).await
    };
    // The second one moves them all, with three round trips for each, and its answer is due before that.
    let direct = import(2).await?;
    assert!(direct.error.is_none_or(|code| code == 504), "{direct:?}");
    let mut target = site.target().await?;
    let moved = async |target: &mut Raw, start: u64| -> Result<()> {
        wait_while_moving(&format!("all of them at {start}"), LIMIT, async || {
            let listed = target.api(&format!("CONSUMER.LIST.{ID}"), Value::Null).await.unwrap_or_default();
            let all = listed["consumers"].as_array().into_iter().flatten();
            let done = all.filter(|one| one["config"]["opt_start_seq"] == start).count() as u64;
            if done == CONSUMERS { Ok(()) } else { Err(done) }
        })
        .await
    };
    moved(&mut target, 2).await?;
    proxy.latency(BOTH, Duration::from_millis(10));
    refused(&import(5).await?, 504, "did not answer in time");
    moved(&mut target, 5).await
}

#[tokio::test]
async fn wrong_consumers_are_refused_and_named() -> Result<()> {
    let site = Site::start().await?;
    site.filled(ID, 3).await?;
    site.add(ID, json!({})).await?;
    site.settled(ID, 3).await?;
    let import = async |one: Value| site.send("consumers.import", json!({"replication": ID, "consumers": [one]})).await;
    let good =
        json!({"name": "a", "position": 1, "start": 2, "config": {"durable_name": "a", "ack_policy": "explicit"}});
    refused(&import(merged(good.clone(), json!({"start": 0}))).await?, 400, "consumer `a`: `start` is 0");
    refused(&import(merged(good.clone(), json!({"name": "a b"}))).await?, 400, "consumer `a b`: its name");
    refused(&import(merged(good.clone(), json!({"config": {}}))).await?, 400, "consumer `a`: `config.durable_name`");
    refused(&import(merged(good.clone(), json!({"more": 1}))).await?, 400, "unknown field `more`");
    refused(&site.send("consumers.import", json!({"replication": ID, "consumers": []})).await?, 400, "1 to 500");
    let other = json!({"replication": "ORDRES", "consumers": [good]});
    refused(&site.send("consumers.import", other).await?, 404, "did you mean `ORDERS`?");
    refused(&site.ask("consumers.export", "NONE").await?, 404, "does not exist");
    let document = site.document_with(ID, json!({"consumers": ["a.b"]}));
    refused(&site.send("config.update", document).await?, 400, "not valid");
    let checked = site.send("config.validate", site.document_with(ID, json!({"consumers": ["a.b"]}))).await?.body;
    assert!(checked.to_string().contains("`consumers` has `a.b`: the name of a consumer has no '.'"), "{checked}");
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("x.json");
    std::fs::write(&file, "{}")?;
    let ended = site.cli().run(["consumers", "import", ID, &file.display().to_string()]).await?;
    failed(&ended, &["is not what `consumers export` prints"]);
    Ok(())
}
