//! Dead letters: what they were is listed and shown, and their messages reach the target once.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Value, json};

use crate::harness::{
    Outgoing, Raw, Site, Stored, cli::failed, client::refused, raw::header_values, request, site::merged, wait_for,
};

const ID: &str = "ORDERS";

/// So many messages, of which those that are divisible by 5 become dead letters.
async fn begin(target: Value, count: u64) -> Result<Site> {
    let site = Site::start().await?;
    site.source_stream("DEAD", json!({"subjects": ["dead.>"]})).await?;
    site.source_stream(ID, json!({})).await?;
    site.target_stream(ID, merged(json!({"max_msg_size": 1_000}), target)).await?;
    let message = |i: u64| {
        let payload = if i.is_multiple_of(5) { format!("{i:0>2000}") } else { i.to_string() };
        let lines = [format!("Nats-Msg-Id: own-{i}"), "Colour: blue".to_owned(), "no colon".to_owned()];
        let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
        Outgoing::new(format!("orders.{}", i % 3), payload).with_lines(&lines)
    };
    site.source().await?.publish_all((1..=count).map(message)).await?;
    site.add(ID, json!({"on_reject": "dead_letter", "dead_letter": {"subject": "dead.orders"}})).await?;
    let row = site.settled(ID, count).await?;
    ensure!(row["counters"]["dead_lettered"] == count / 5, "{row}");
    Ok(site)
}

async fn list(site: &Site) -> Result<Value> {
    request(&site.client, "replicator.dlq.list", json!({"replication": ID})).await
}

fn letters(list: &Value) -> Vec<u64> {
    list["letters"].as_array().into_iter().flatten().filter_map(|row| row["letter"].as_u64()).collect()
}

/// The target takes messages of any size from now on.
async fn widen(site: &Site, stream: &str) -> Result<()> {
    let mut target = site.target().await?;
    let mut config = target.api(&format!("STREAM.INFO.{stream}"), Value::Null).await?["config"].take();
    config["max_msg_size"] = (-1).into();
    target.api(&format!("STREAM.UPDATE.{stream}"), config).await?;
    Ok(())
}

/// The sequence of the source message that a message of the target is a copy or a replay of.
fn source_seq(message: &Stored) -> Option<u64> {
    let hops = header_values(&message.header, "Choria-SR-Source");
    let hop = hops.iter().find(|hop| hop.starts_with(&format!("{ID} ")))?;
    hop.split(' ').nth(1)?.parse().ok()
}

/// Each message of the source is at the target once, with its subject and its payload.
async fn each_once(site: &Site) -> Result<()> {
    let (from, to) = (site.source().await?.read_stream(ID).await?, site.target().await?.read_stream(ID).await?);
    ensure!(from.len() == to.len(), "{} messages became {}", from.len(), to.len());
    for original in &from {
        let found: Vec<_> = to.iter().filter(|copy| source_seq(copy) == Some(original.seq)).collect();
        ensure!(found.len() == 1, "{} is there {} times", original.seq, found.len());
        ensure!((&found[0].subject, &found[0].payload) == (&original.subject, &original.payload), "{:?}", found[0]);
        for (name, value) in [("Colour", "blue"), ("Choria-SR-Msg-Id", &*format!("own-{}", original.seq))] {
            ensure!(header_values(&found[0].header, name) == [value], "{:?}", found[0]);
        }
    }
    Ok(())
}

#[tokio::test]
async fn letters_are_listed_and_shown_as_they_were() -> Result<()> {
    let site = begin(json!({}), 20).await?;
    // Others use the same subject: these are none of this replication.
    let mut source = site.source().await?;
    source.publish(&Outgoing::new("dead.orders", "of another program")).await?;
    let other = "Choria-SR-Source: ORDERS 7 TEST other 5";
    source
        .publish(&Outgoing::new("dead.orders", "x").with_lines(&["Choria-SR-Subject: a", "Choria-SR-Error: b", other]))
        .await?;
    let all = list(&site).await?;
    assert_eq!(
        (&all["stream"], letters(&all), &all["next"]),
        (&json!("DEAD"), vec![1, 2, 3, 4], &Value::Null),
        "{all:#}"
    );
    let row = &all["letters"][1];
    assert_eq!((&row["source_seq"], &row["subject"]), (&json!(10), &json!("orders.1")), "{row}");
    assert!(row["error"].as_str().is_some_and(|error| error.contains("max_msg_size of 1000")), "{row}");
    assert!(row["bytes"].as_u64().is_some_and(|bytes| (2_000..2_200).contains(&bytes)), "{row}");
    // Page by page.
    let mut found = Vec::new();
    let mut after = json!(0);
    while !after.is_null() {
        let page = json!({"replication": ID, "after": after, "limit": 3});
        let mut page = request(&site.client, "replicator.dlq.list", page).await?;
        found.extend(letters(&page));
        after = page["next"].take();
    }
    assert_eq!(found, [1, 2, 3, 4]);
    let shown = request(&site.client, "replicator.dlq.show", json!({"replication": ID, "letter": 2})).await?;
    assert_eq!(shown["headers"], json!(["Nats-Msg-Id: own-10", "Colour: blue", "no colon"]), "{shown}");
    let payload = STANDARD.decode(shown["payload"].as_str().context("a payload")?)?;
    assert_eq!((payload, &shown["truncated"]), (format!("{:0>2000}", 10).into_bytes(), &json!(false)));
    let wrong = |letter: u64| json!({"replication": ID, "letter": letter});
    refused(
        &site.send("dlq.show", wrong(5)).await?,
        404,
        "message 5 of stream `DEAD` is no dead letter of replication `ORDERS`",
    );
    refused(&site.send("dlq.show", wrong(99)).await?, 404, "no dead letter");
    refused(&site.send("dlq.list", json!({"replication": "NONE"})).await?, 404, "does not exist");
    let none = json!({"replication": ID, "letters": []});
    refused(&site.send("dlq.drop", none).await?, 400, "1 to 100");
    Ok(())
}

#[tokio::test]
async fn a_replay_stores_each_message_once() -> Result<()> {
    for target in [json!({}), json!({"allow_batched": true})] {
        let batched = target != json!({});
        let site = begin(target, 40).await?;
        let change = |letters: &[u64]| json!({"replication": ID, "letters": letters});
        // As long as the target does not take it, nothing is lost.
        let kept = request(&site.client, "replicator.dlq.replay", change(&[1, 2])).await?;
        assert_eq!((&kept["done"], &kept["left"]), (&json!([]), &json!([1, 2])), "{kept}");
        assert!(kept["failed"].as_str().is_some_and(|error| error.contains("max_msg_size of 1000")), "{kept}");
        widen(&site, ID).await?;
        // A letter that is in the stream again after its replay is not stored again.
        let letter = site.source().await?.api("STREAM.MSG.GET.DEAD", json!({"seq": 1})).await?["message"].take();
        let done = request(&site.client, "replicator.dlq.replay", change(&[1, 2])).await?;
        assert_eq!((letters_done(&done), &done["failed"]), (vec![1, 2], &Value::Null), "{done}");
        again(&site, &letter).await?;
        let last = letters(&list(&site).await?).pop().context("a letter")?;
        let twice = request(&site.client, "replicator.dlq.replay", change(&[last])).await?;
        assert_eq!((&twice["done"][0]["duplicate"], &twice["left"]), (&json!(true), &json!([])), "{twice}");
        // The copy continues beside it, and after a restart too.
        site.source()
            .await?
            .publish_all((41..=60).map(|i| {
                Outgoing::new("orders.x", i.to_string()).with_lines(&[&format!("Nats-Msg-Id: own-{i}"), "Colour: blue"])
            }))
            .await?;
        site.settled(ID, 60).await?;
        let rest = letters(&list(&site).await?);
        assert_eq!(rest, [3, 4, 5, 6, 7, 8]);
        let text = site.cli().ok(["dlq", "replay", ID, "--all"]).await?;
        assert_eq!(text.lines().count(), 6, "{text}");
        assert!(text.contains("ORDERS: letter 3 is at the target now, sequence "), "{text}");
        assert_eq!(letters(&list(&site).await?), [0_u64; 0]);
        let mut site = site;
        site.service.kill()?;
        site.service.restart().await?;
        site.source()
            .await?
            .publish_all((61..=80).map(|i| {
                Outgoing::new("orders.x", i.to_string()).with_lines(&[&format!("Nats-Msg-Id: own-{i}"), "Colour: blue"])
            }))
            .await?;
        let row = site.settled(ID, 80).await?;
        each_once(&site).await.with_context(|| format!("batched {batched}\n{}", site.service.log()))?;
        assert_eq!(row["target_mode"], "shared", "{row}");
        site.events.quiet(&["held", "target-reset", "gap"])?;
    }
    Ok(())
}

fn letters_done(changed: &Value) -> Vec<u64> {
    letters(&json!({"letters": changed["done"]}))
}

/// Stores a dead letter again, as after a crash outside of the duplicate window.
async fn again(site: &Site, letter: &Value) -> Result<()> {
    let text = |field: &str| STANDARD.decode(letter[field].as_str().unwrap_or_default());
    let mut source = site.source().await?;
    let mut config = source.api("STREAM.INFO.DEAD", Value::Null).await?["config"].take();
    let stored = Outgoing::new("dead.orders", text("data")?).with_block(text("hdrs")?);
    // Until the window is over, the stream answers with the old sequence. A server sets its timer before the new window counts: a
    // timer that is faster than the update waits for the old window, so each attempt is another update.
    let before = source.stream_state("DEAD").await?["last_seq"].as_u64();
    let mut window = 100_000_000;
    wait_for("the letter to be stored again", Duration::from_secs(30), async || {
        window += 1_000_000;
        config["duplicate_window"] = window.into();
        let Ok(mut raw) = Raw::connect(&site.source.url()).await else { return false };
        raw.api("STREAM.UPDATE.DEAD", config.clone()).await.is_ok() && raw.publish(&stored).await.ok() > before
    })
    .await
}

#[tokio::test]
async fn a_replay_replaces_nothing_newer() -> Result<()> {
    let site = Site::start().await?;
    site.source_stream("DEAD", json!({"subjects": ["dead.>"]})).await?;
    let last = json!({"max_msgs_per_subject": 1});
    let mut source = site.source_stream(ID, last.clone()).await?;
    let mut target = site.target_stream(ID, merged(last, json!({"max_msg_size": 1_000}))).await?;
    site.add(ID, json!({"on_reject": "dead_letter", "dead_letter": {"subject": "dead.orders"}})).await?;
    let (small, large) = ("new".to_owned(), "x".repeat(2_000));
    let message = |(key, payload): (&str, &String)| Outgoing::new(format!("orders.{key}"), payload.as_str());
    source.publish_all([("a", &large), ("b", &large), ("c", &small), ("d", &large)].map(message)).await?;
    site.settled(ID, 4).await?;
    source.publish_all([("a", &small), ("c", &large)].map(message)).await?;
    site.settled(ID, 6).await?;
    assert_eq!(letters(&list(&site).await?), [1, 2, 3, 4]);
    widen(&site, ID).await?;
    let before = target.read_stream(ID).await?;
    let older = before.iter().find(|message| message.subject == "orders.c").context("an older value")?.seq;
    let change = json!({"replication": ID, "letters": [1, 2, 3, 4]});
    let done = request(&site.client, "replicator.dlq.replay", change).await?;
    let reason = "the target has a newer message of its subject, which it would replace";
    assert_eq!(done["refused"], json!([{"letter": 1, "reason": reason}]), "{done}");
    assert_eq!(
        (letters_done(&done), &done["left"], &done["failed"]),
        (vec![2, 3, 4], &json!([]), &Value::Null),
        "{done}"
    );
    assert_eq!(letters(&list(&site).await?), [1]);
    let ended = site.cli().run(["dlq", "replay", ID, "--all"]).await?;
    failed(&ended, &["1 dead letter could not be replayed"]);
    assert!(ended.stdout.contains(&format!("ORDERS: letter 1 stays: {reason}")), "{ended:?}");
    let stored = target.read_stream(ID).await?;
    let payloads: Vec<_> = ["a", "b", "c", "d"]
        .iter()
        .map(|key| {
            stored
                .iter()
                .find(|message| message.subject == format!("orders.{key}"))
                .map(|message| message.payload.clone())
        })
        .collect();
    let large = Some(large.into_bytes());
    assert_eq!(payloads, [Some(small.into_bytes()), large.clone(), large.clone(), large]);
    // Nothing that the copy stores meanwhile is replaced either.
    for (key, expect) in [("c", older), ("d", 0)] {
        let subject = format!("orders.{key}");
        let found = stored.iter().find(|message| message.subject == subject).context("a replay")?;
        assert_eq!(
            header_values(&found.header, "Nats-Expected-Last-Subject-Sequence"),
            [expect.to_string()],
            "{found:?}"
        );
    }
    Ok(())
}

#[tokio::test]
async fn a_letter_stays_if_its_replay_was_removed() -> Result<()> {
    let site = begin(json!({}), 5).await?;
    widen(&site, ID).await?;
    let letter = site.source().await?.api("STREAM.MSG.GET.DEAD", json!({"seq": 1})).await?["message"].take();
    let change = |letter: u64| json!({"replication": ID, "letters": [letter]});
    let done = request(&site.client, "replicator.dlq.replay", change(1)).await?;
    let at = done["done"][0]["target_seq"].as_u64().with_context(|| done.to_string())?;
    again(&site, &letter).await?;
    let last = letters(&list(&site).await?).pop().context("a letter")?;
    let mut target = site.target().await?;
    target.api(&format!("STREAM.MSG.DELETE.{ID}"), json!({"seq": at})).await?;
    let kept = request(&site.client, "replicator.dlq.replay", change(last)).await?;
    let reason = kept["refused"][0]["reason"].as_str().with_context(|| kept.to_string())?;
    assert!(reason.contains("replay it again after its duplicate window"), "{kept}");
    assert_eq!((&kept["done"], letters(&list(&site).await?)), (&json!([]), vec![last]), "{kept}");
    // Each attempt is another update, see `again`.
    let mut config = target.api(&format!("STREAM.INFO.{ID}"), Value::Null).await?["config"].take();
    let mut window = 100_000_000;
    wait_for("the letter to be replayed", Duration::from_secs(30), async || {
        window += 1_000_000;
        config["duplicate_window"] = window.into();
        let updated = target.api(&format!("STREAM.UPDATE.{ID}"), config.clone()).await;
        let done = request(&site.client, "replicator.dlq.replay", change(last)).await;
        updated.is_ok() && done.is_ok_and(|done| letters_done(&done) == [last])
    })
    .await?;
    each_once(&site).await
}

#[tokio::test]
async fn letters_are_removed_after_a_question() -> Result<()> {
    let site = begin(json!({}), 20).await?;
    let cli = site.cli();
    let table = cli.ok(["dlq", "list", ID]).await?;
    assert_eq!(table.lines().count(), 5, "{table}");
    assert!(table.starts_with("LETTER  SINCE") && table.contains("orders.2"), "{table}");
    let shown = cli.ok(["dlq", "show", ID, "1"]).await?;
    for line in ["subject  orders.2", "header   Colour: blue", "header   no colon"] {
        assert!(shown.lines().any(|found| found == line), "{line}\n{shown}");
    }
    failed(&cli.run(["dlq", "show", ID, "9"]).await?, &["no dead letter of replication `ORDERS`"]);
    let ended = cli.run(["dlq", "drop", ID, "1"]).await?;
    assert_eq!(ended.code, Some(2), "{ended:?}");
    let mut asked = cli.on_terminal(["dlq", "drop", ID, "1"])?;
    asked.shows("remove? [y/N]").await?;
    asked.types("n\n")?;
    assert_eq!(asked.end().await?.code, Some(1));
    assert_eq!(letters(&list(&site).await?), [1, 2, 3, 4]);
    let text = cli.ok(["dlq", "drop", ID, "1", "3", "--force"]).await?;
    assert_eq!(text, "ORDERS: letter 1 is removed\nORDERS: letter 3 is removed\n");
    assert_eq!(letters(&list(&site).await?), [2, 4]);
    let changed = cli.json(["dlq", "drop", ID, "--all", "--force"]).await?;
    assert_eq!(letters_done(&changed), [2, 4]);
    assert_eq!(cli.ok(["dlq", "drop", ID, "--all", "--force"]).await?, "ORDERS: no dead letters\n");
    assert_eq!(site.at_target(ID).await?, 16);
    Ok(())
}

/// Two replications of one stream have dead letters of the same messages on one subject: each request keeps to its own.
#[tokio::test]
async fn letters_of_a_shared_subject_are_kept_apart() -> Result<()> {
    const OTHER: &str = "ORDERS.second";
    let site = begin(json!({}), 20).await?;
    site.target_stream("SECOND", json!({"subjects": ["second.>"], "max_msg_size": 1_000})).await?;
    let fields = json!({
        "name": "second", "target_stream": "SECOND", "target_subject_prefix": "second", "on_reject": "dead_letter",
        "dead_letter": {"subject": "dead.orders"}
    });
    site.add(ID, fields).await?;
    let row = site.settled(OTHER, 20).await?;
    ensure!(row["counters"]["dead_lettered"] == 4, "{row}");
    let list = async |id: &str| request(&site.client, "replicator.dlq.list", json!({"replication": id})).await;
    let both = async || anyhow::Ok((letters(&list(ID).await?), letters(&list(OTHER).await?)));
    assert_eq!(both().await?, (vec![1, 2, 3, 4], vec![5, 6, 7, 8]));
    for (id, others) in [(ID, 5), (OTHER, 1)] {
        let expect = format!("message {others} of stream `DEAD` is no dead letter of replication `{id}`");
        refused(&site.send("dlq.show", json!({"replication": id, "letter": others})).await?, 404, &expect);
        for verb in ["replay", "drop"] {
            let asked = json!({"replication": id, "letters": [others]});
            let changed = request(&site.client, &format!("replicator.dlq.{verb}"), asked).await?;
            assert_eq!((letters_done(&changed), &changed["failed"]), (vec![], &json!(expect)), "{verb}: {changed}");
        }
    }
    assert_eq!((site.at_target(ID).await?, site.at_target("SECOND").await?), (16, 16));
    assert_eq!(both().await?, (vec![1, 2, 3, 4], vec![5, 6, 7, 8]));
    // All of one are none of the other.
    widen(&site, ID).await?;
    let changed = site.cli().json(["dlq", "replay", ID, "--all"]).await?;
    assert_eq!(letters_done(&changed), [1, 2, 3, 4], "{changed}");
    assert_eq!(both().await?, (vec![], vec![5, 6, 7, 8]));
    each_once(&site).await?;
    assert_eq!(site.at_target("SECOND").await?, 16);
    let changed = site.cli().json(["dlq", "drop", OTHER, "--all", "--force"]).await?;
    assert_eq!(letters_done(&changed), [5, 6, 7, 8], "{changed}");
    assert_eq!(both().await?, (vec![], vec![]));
    Ok(())
}

#[tokio::test]
async fn what_cannot_be_replayed_says_why() -> Result<()> {
    let site = begin(json!({}), 5).await?;
    site.filled("PLAIN", 1).await?;
    site.add("PLAIN", json!({})).await?;
    refused(&site.send("dlq.list", json!({"replication": "PLAIN"})).await?, 409, "`on_reject` is not `dead_letter`");
    let strict =
        json!({"on_reject": "dead_letter", "dead_letter": {"subject": "dead.orders"}, "target_mode": "exclusive"});
    request(&site.client, "replicator.config.update", site.document_with(ID, strict)).await?;
    let change = json!({"replication": ID, "letters": [1]});
    refused(&site.send("dlq.replay", change).await?, 409, "`target_mode` is `exclusive`");
    let elsewhere = json!({"on_reject": "dead_letter", "dead_letter": {"subject": "nowhere.orders"}});
    request(&site.client, "replicator.config.update", site.document_with(ID, elsewhere)).await?;
    refused(
        &site.send("dlq.list", json!({"replication": ID})).await?,
        409,
        "no stream at the source takes dead letters on `nowhere.orders`",
    );
    Ok(())
}
