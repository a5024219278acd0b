//! One difference among thousands of messages is found and named, and nothing else is.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::{ID, copied, details, kinds, ranges, shown, tamper, verified};
use crate::harness::{Outgoing, Site, Stored, cli::failed};

const MESSAGES: u64 = 5_000;

/// What a comparison finds after a change at the target.
async fn after(fields: Value, change: impl FnOnce(&mut Vec<Stored>)) -> Result<(Site, Value)> {
    let site = Site::small().await?;
    copied(&site, fields, MESSAGES).await?;
    tamper(&site, ID, change).await?;
    let found = verified(&site, ID, json!({})).await?;
    ensure!(found["state"] == "done", "{found:#}\n{}", site.service.log());
    Ok((site, found))
}

#[tokio::test]
async fn a_missing_message_is_named() -> Result<()> {
    let (site, found) = after(json!({}), |messages| _ = messages.remove(2_499)).await?;
    assert_eq!((kinds(&found), ranges(&found, "missing")), (vec!["missing"], vec![(2_500, 2_500)]), "{found:#}");
    assert_eq!((&found["findings"], &found["source_messages"]), (&json!(1), &json!(MESSAGES)), "{found:#}");
    assert_eq!(found["differences"][0]["examples"][0]["source_seq"], 2_500, "{found:#}");
    // What was found is in the status, and in the output of the command.
    let row = site.row(ID).await.unwrap_or_default();
    assert_eq!((&row["verify"]["state"], &row["verify"]["last"]["findings"]), (&json!("done"), &json!(1)), "{row:#}");
    let ended = site.cli().run(["verify", ID, "--status"]).await?;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    for line in ["1 difference", "missing   1 message: source 2500", "source 2500, `orders.1`: is not at the target"] {
        assert!(ended.stdout.contains(line), "{line}\n{}", ended.stdout);
    }
    // Several, at both ends, with an example of each.
    let (_, found) = after(json!({}), |messages| {
        messages.retain(|message| ![1, 700, 701, 702, 4_000, MESSAGES].contains(&message.seq));
    })
    .await?;
    let expect = vec![(1, 1), (700, 702), (4_000, 4_000), (MESSAGES, MESSAGES)];
    assert_eq!((kinds(&found), ranges(&found, "missing")), (vec!["missing"], expect), "{found:#}");
    Ok(())
}

#[tokio::test]
async fn a_changed_byte_is_named() -> Result<()> {
    let (_, found) = after(json!({}), |messages| messages[1_233].payload[3] ^= 1).await?;
    assert_eq!((kinds(&found), ranges(&found, "payload")), (vec!["payload"], vec![(1_234, 1_234)]), "{found:#}");
    assert!(details(&found)[0].ends_with("differs from byte 4 on"), "{found:#}");
    Ok(())
}

#[tokio::test]
async fn a_changed_header_is_named() -> Result<()> {
    let (_, found) = after(json!({}), |messages| {
        let block = String::from_utf8_lossy(&messages[2_000].header).replace("Colour: red", "Colour: rot");
        assert_ne!(block.as_bytes(), messages[2_000].header);
        messages[2_000].header = block.into_bytes();
    })
    .await?;
    assert_eq!((kinds(&found), ranges(&found, "headers")), (vec!["headers"], vec![(2_001, 2_001)]), "{found:#}");
    assert_eq!(details(&found), ["header `Colour` differs"], "{found:#}");
    Ok(())
}

#[tokio::test]
async fn a_changed_subject_is_named() -> Result<()> {
    let fields = json!({"target_subject_prefix": "copy"});
    let (_, found) = after(fields, |messages| messages[99].subject = "copy.orders.other".to_owned()).await?;
    assert_eq!((kinds(&found), ranges(&found, "subject")), (vec!["subject"], vec![(100, 100)]), "{found:#}");
    assert_eq!(details(&found), ["the subject is `copy.orders.other` instead of `copy.orders.2`"], "{found:#}");
    Ok(())
}

#[tokio::test]
async fn two_that_changed_places_are_named() -> Result<()> {
    for (one, other) in [(1_000, 1_001), (500, 4_500)] {
        let (_, found) = after(json!({}), |messages| messages.swap(one - 1, other - 1)).await?;
        let order = ranges(&found, "order");
        let both = [(one as u64, one as u64), (other as u64, other as u64)];
        ensure!(kinds(&found) == ["order"] && !order.is_empty(), "{found:#}");
        ensure!(order.iter().all(|range| both.contains(range)), "{found:#}");
    }
    Ok(())
}

#[tokio::test]
async fn a_message_too_many_is_named() -> Result<()> {
    // A second copy of a message.
    let (_, found) = after(json!({}), |messages| {
        let again = messages[9].clone();
        messages.insert(3_000, again);
    })
    .await?;
    assert_eq!((kinds(&found), ranges(&found, "extra")), (vec!["extra"], vec![(3_001, 3_001)]), "{found:#}");
    assert_eq!(
        (details(&found), &found["differences"][0]["examples"][0]["source_seq"]),
        (vec!["is a second copy".to_owned()], &json!(10))
    );
    // A copy of a message that the source does not have under that sequence.
    let (_, found) = after(json!({}), |messages| {
        let block = String::from_utf8_lossy(&messages[0].header).replace(" 1 TEST TEST ", " 77 TEST TEST ");
        let forged = Stored { header: block.into_bytes(), ..messages[0].clone() };
        messages.push(forged);
    })
    .await?;
    let last = MESSAGES + 1;
    assert_eq!((kinds(&found), ranges(&found, "extra")), (vec!["extra"], vec![(last, last)]), "{found:#}");
    // A message of another writer, where none may be.
    let site = Site::small().await?;
    copied(&site, json!({"target_mode": "exclusive"}), 500).await?;
    tamper(&site, ID, |_| {}).await?;
    site.target().await?.publish(&Outgoing::new("orders.9", "foreign")).await?;
    let found = verified(&site, ID, json!({})).await?;
    assert_eq!((kinds(&found), ranges(&found, "extra")), (vec!["extra"], vec![(501, 501)]), "{found:#}");
    assert_eq!(details(&found), ["is no copy of this replication"], "{found:#}");
    Ok(())
}

#[tokio::test]
async fn a_part_finds_what_is_in_it() -> Result<()> {
    let (site, _) = after(json!({}), |messages| {
        messages.retain(|message| ![100, 3_000, 4_999].contains(&message.seq));
    })
    .await?;
    let found = verified(&site, ID, json!({"from": 2_000, "to": 4_000})).await?;
    assert_eq!(
        (ranges(&found, "missing"), &found["source_messages"]),
        (vec![(3_000, 3_000)], &json!(2_001)),
        "{found:#}"
    );
    assert_eq!((&found["from"], &found["to"]), (&json!(2_000), &json!(4_000)));
    let found = verified(&site, ID, json!({"from": 3_001, "to": 4_998})).await?;
    assert_eq!((kinds(&found), &found["source_messages"]), (vec![], &json!(1_998)), "{found:#}");
    // A sample reads its part and no more.
    let found = verified(&site, ID, json!({"sample": "20%"})).await?;
    assert_eq!((&found["source_messages"], &found["sample"]), (&json!(1_000), &json!("20%")), "{found:#}");
    // Beyond the end there is nothing to compare.
    let found = verified(&site, ID, json!({"from": MESSAGES + 1})).await?;
    assert_eq!((&found["state"], &found["source_messages"]), (&json!("done"), &json!(0)), "{found:#}");
    Ok(())
}

#[tokio::test]
async fn the_command_follows_and_prints_the_result() -> Result<()> {
    let site = Site::small().await?;
    copied(&site, json!({}), 500).await?;
    let text = site.cli().ok(["verify", ID, "--follow"]).await?;
    assert!(text.starts_with("ORDERS: no differences, ") && text.contains("500 messages of the source"), "{text}");
    tamper(&site, ID, |messages| messages[9].payload.push(b'x')).await?;
    let ended = site.cli().run(["verify", ID, "--follow", "--rate", "100000"]).await?;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.stdout.contains("payload   1 message: source 10"), "{}", ended.stdout);
    assert!(!ended.stderr.contains('\x1b'), "progress is for terminals alone: {ended:?}");
    let json = site.cli().run(["verify", ID, "--status", "--json"]).await?;
    let shown_json: Value = serde_json::from_str(&json.stdout)?;
    assert_eq!(shown_json["verification"], shown(&site, ID).await?);
    failed(&site.cli().run(["verify", "NONE"]).await?, &["replication `NONE` does not exist"]);
    Ok(())
}
