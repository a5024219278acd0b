//! The streams of a file beside the documents of the bucket.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{Place, copied, messages};
use crate::harness::client::{ask, refused, status};
use crate::harness::{LIMIT, Service, connect, request, wait_for};

#[tokio::test]
async fn a_document_of_the_bucket_takes_precedence() -> Result<()> {
    let place = Place::start().await?;
    let (mut source, mut target) = (place.source().await?, place.target().await?);
    source.create_stream("S", json!({"subjects": ["s.>"]})).await?;
    source.publish_all(messages("s", 1, 3)).await?;
    let mut service = Service::replicate(&place.write(&format!("name: A\nstreams:\n{}", place.stream("")))?).spawn()?;
    service.wait_ready().await?;
    copied(&mut target, "S", 3, &service).await?;
    let client = connect(&place.source.url()).await?;
    let origin = async || {
        let list = request(&client, "replicator.config.list", json!({})).await.unwrap_or_default();
        list["replications"][0]["origin"].as_str().unwrap_or_default().to_owned()
    };
    let runs = async |origin: &str| {
        status(&client, "S").await.is_some_and(|row| row["origin"] == origin && row["state"] == "running")
    };
    ensure!(origin().await == "file" && runs("file").await, "{:?}", status(&client, "S").await);
    let got = request(&client, "replicator.config.get", json!({"replication": "S"})).await?;
    ensure!(got["revision"] == 0 && got["config"]["hand_back"] == true, "{got}");

    let document = json!({"stream": "S", "source_url": place.source.url(), "target_url": place.target.url()});
    for (endpoint, body) in [("delete", json!({"replication": "S"})), ("update", document.clone())] {
        let reply = ask(&client, &format!("replicator.config.{endpoint}"), body.to_string().as_bytes()).await?;
        refused(&reply, 409, "is configured in the file of instance");
    }
    request(&client, "replicator.config.add", document).await?;
    wait_for("the document of the bucket to run", LIMIT, async || origin().await == "kv" && runs("kv").await).await?;
    request(&client, "replicator.config.delete", json!({"replication": "S"})).await?;
    wait_for("the file's to run again", LIMIT, async || origin().await == "file" && runs("file").await)
        .await
        .with_context(|| service.log())?;
    source.publish_all(messages("s", 4, 5)).await?;
    let stored = copied(&mut target, "S", 5, &service).await?;
    let last: Vec<Value> = stored.iter().map(|m| String::from_utf8_lossy(&m.payload).into_owned().into()).collect();
    ensure!(last == ["1", "2", "3", "4", "5"], "{last:?}");
    Ok(())
}
