//! What signals do to `replicate`, and its log file.

use std::fs;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::{Place, copied, messages};
use crate::harness::{LIMIT, Service, connect, request, wait_for};

/// The log file, and the beginning of a file that names it.
fn logged(place: &Place) -> (PathBuf, String) {
    let log = place.path("stream-replicator.log");
    let top = format!("name: A\nlogfile: {}\nstreams:\n", log.display());
    (log, top)
}

#[tokio::test]
async fn a_hangup_reads_the_streams_again_and_reopens_the_log() -> Result<()> {
    let place = Place::start().await?;
    let (mut source, mut target) = (place.source().await?, place.target().await?);
    for (stream, subject) in [("S", "s.>"), ("T", "t.>")] {
        source.create_stream(stream, json!({"subjects": [subject]})).await?;
    }
    source.publish_all(messages("s", 1, 3).chain(messages("t", 1, 3))).await?;
    let (log, top) = logged(&place);
    let (only_s, only_t) = (place.stream(""), place.stream("").replace("stream: S", "stream: T"));
    let file = place.write(&(top.clone() + &only_s))?;
    let service = Service::replicate(&file).spawn()?;
    copied(&mut target, "S", 3, &service).await?;

    let old = place.path("old.log");
    fs::rename(&log, &old)?;
    place.write(&(top.clone() + &only_t))?;
    service.signal(Signal::HUP)?;
    copied(&mut target, "T", 3, &service).await?;
    wait_for("the first stream to be left alone", LIMIT, async || {
        let client = connect(&place.source.url()).await;
        let Ok(client) = client else { return false };
        let list = request(&client, "replicator.config.list", json!({})).await.unwrap_or_default();
        list["replications"].as_array().is_some_and(|rows| rows.len() == 1 && rows[0]["origin"] == "file")
    })
    .await?;
    ensure!(place.log()?.lines().any(|line| line.contains("SIGHUP")), "{}", place.log()?);

    place.write("name: A\nstreams: 5\n")?;
    service.signal(Signal::HUP)?;
    wait_for("the refusal in the log", LIMIT, async || {
        place
            .log()
            .is_ok_and(|log| log.contains("`streams` is not a list") && log.contains("continuing with what was read"))
    })
    .await?;
    source.publish_all(messages("t", 4, 5)).await?;
    copied(&mut target, "T", 5, &service).await?;
    Ok(())
}

#[tokio::test]
async fn a_quit_writes_the_state_and_the_log_may_be_truncated() -> Result<()> {
    let place = Place::start().await?;
    let (mut source, mut target) = (place.source().await?, place.target().await?);
    source.create_stream("S", json!({"subjects": ["s.>"]})).await?;
    source.publish_all(messages("s", 1, 3)).await?;
    let (log, top) = logged(&place);
    let file = place.write(&(top + &place.stream("")))?;
    let mut service = Service::replicate(&file).spawn()?;
    copied(&mut target, "S", 3, &service).await?;
    // As logrotate does with `copytruncate`.
    fs::OpenOptions::new().write(true).truncate(true).open(&log)?;
    service.signal(Signal::QUIT)?;
    wait_for("the state in the log", LIMIT, async || place.log().is_ok_and(|log| log.contains("state: {"))).await?;
    let text = place.log()?;
    let first: Value = serde_json::from_str(text.lines().next().unwrap_or_default())?;
    ensure!(first["level"].is_string(), "{text}");
    source.publish_all(messages("s", 4, 5)).await?;
    copied(&mut target, "S", 5, &service).await?;
    ensure!(service.stop().await?.success(), "{}", place.log()?);
    Ok(())
}
