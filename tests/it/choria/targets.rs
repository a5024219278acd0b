//! Target streams that are created: as Choria's replicator makes them.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::{Place, copied, messages};
use crate::harness::{Raw, Service, Stored};

async fn config(raw: &mut Raw, stream: &str) -> Result<Value> {
    Ok(raw.api(&format!("STREAM.INFO.{stream}"), Value::Null).await?["config"].clone())
}

fn subjects(config: &Value) -> BTreeSet<&str> {
    config["subjects"].as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

/// Entries of a file: stream, name, filter and target of each.
fn file(place: &Place, entries: &[(&str, &str, &str, &str)]) -> Result<std::path::PathBuf> {
    let mut text = "name: A\nstreams:\n".to_owned();
    for (stream, name, filter, target) in entries {
        let more = format!("    name: {name}\n    filter_subject: {filter}\n    target_stream: {target}\n");
        text += &place.stream(&more).replace("stream: S\n", &format!("stream: {stream}\n"));
    }
    place.write(&text)
}

#[tokio::test]
async fn entries_into_one_missing_target_make_all_its_subjects() -> Result<()> {
    let place = Place::start().await?;
    let (mut source, mut target) = (place.source().await?, place.target().await?);
    let nodes =
        json!({"subjects": ["n.>", "other.*", "more"], "description": "fleet nodes", "metadata": {"team": "ops"}});
    source.create_stream("NODES", nodes).await?;
    for prefix in ["n.a", "n.b", "n.c", "other"] {
        source.publish_all(messages(prefix, 1, 20)).await?;
    }
    let entries = [("NODES", "na", "n.a.>", "ALL"), ("NODES", "nb", "n.b.>", "ALL"), ("NODES", "o", "other.*", "ALL")];
    let service = Service::replicate(&file(&place, &entries)?).spawn()?;
    copied(&mut target, "ALL", 60, &service).await?;
    let made = config(&mut target, "ALL").await?;
    // Also what no entry copies.
    ensure!(subjects(&made) == BTreeSet::from(["n.>", "other.*", "more"]), "{made}");
    ensure!(made["description"] == "fleet nodes" && made["metadata"]["team"] == "ops", "{made}");
    let of =
        |stored: &[Stored], prefix: &str| stored.iter().filter(|message| message.subject.starts_with(prefix)).count();
    let stored = target.read_stream("ALL").await?;
    ensure!((of(&stored, "n.a."), of(&stored, "n.b."), of(&stored, "other.")) == (20, 20, 20), "{made}");
    Ok(())
}

#[tokio::test]
async fn two_targets_of_one_source_share_its_subjects() -> Result<()> {
    let place = Place::start().await?;
    let (mut source, mut target) = (place.source().await?, place.target().await?);
    source.create_stream("NODES", json!({"subjects": ["n.>"]})).await?;
    source.publish_all(messages("n.a", 1, 10).chain(messages("n.b", 1, 10))).await?;
    // Choria's replicator creates the first one that asks and tries the other for ever.
    let entries = [("NODES", "a", "n.a.>", "A"), ("NODES", "b", "n.b.>", "B")];
    let mut service = Service::replicate(&file(&place, &entries[..1])?).spawn()?;
    copied(&mut target, "A", 10, &service).await?;
    ensure!(subjects(&config(&mut target, "A").await?) == BTreeSet::from(["n.>"]), "the whole source");
    service.stop().await?;
    target.api("STREAM.PURGE.A", Value::Null).await?;
    let mut narrow = config(&mut target, "A").await?;
    narrow["subjects"] = json!(["n.a.>"]);
    target.api("STREAM.UPDATE.A", narrow).await?;
    let service = Service::replicate(&file(&place, &entries[1..])?).spawn()?;
    copied(&mut target, "B", 10, &service).await?;
    ensure!(subjects(&config(&mut target, "B").await?) == BTreeSet::from(["n.b.>"]), "what is free");
    Ok(())
}
