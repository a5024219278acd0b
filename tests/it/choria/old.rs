//! Choria's replicator, played by a client that does to consumer, target and election what the Go program does.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use async_nats::HeaderMap;
use async_nats::jetstream::{self, consumer::pull};
use futures_util::StreamExt;
use serde_json::{Value, json};

use crate::harness::{LIMIT, Outgoing, Raw, Server, connect, raw::wait_messages, wait_for};

/// One hop of stream `S` in the name of a site.
pub(super) struct OldHop<'a> {
    pub(super) from: &'a Server,
    pub(super) to: &'a Server,
    pub(super) site: &'static str,
}

impl OldHop<'_> {
    fn durable(&self) -> String {
        format!("SR_{}", self.site)
    }

    /// Its durable consumer at the source.
    pub(super) async fn consumer(&self) -> Result<Value> {
        let mut raw = Raw::connect(&self.from.url()).await?;
        raw.api(&format!("CONSUMER.INFO.S.{}", self.durable()), Value::Null).await
    }

    /// Copies the next messages that its consumer has, one after the other. The last one is not acknowledged if it is killed.
    pub(super) async fn copies(&self, count: usize, killed: bool) -> Result<()> {
        self.copies_while(count, killed, async || Ok(())).await
    }

    async fn copies_while(&self, count: usize, killed: bool, mut leads: impl AsyncFnMut() -> Result<()>) -> Result<()> {
        let (durable, site) = (self.durable(), self.site);
        if self.consumer().await.is_err() {
            let config = json!({"durable_name": durable, "description": format!("Choria Stream Replicator {site}"),
                "deliver_policy": "all", "ack_policy": "explicit", "ack_wait": 30_000_000_000u64, "max_ack_pending": 1,
                "max_deliver": -1, "replay_policy": "instant"});
            let mut raw = Raw::connect(&self.from.url()).await?;
            let body = json!({"stream_name": "S", "config": config});
            raw.api(&format!("CONSUMER.DURABLE.CREATE.S.{durable}"), body).await?;
        }
        let from = jetstream::new(connect(&self.from.url()).await?);
        let to = jetstream::new(connect(&self.to.url()).await?);
        let stream = from.get_stream("S").await?;
        let consumer = stream.get_consumer::<pull::Config>(&durable).await.map_err(anyhow::Error::from_boxed)?;
        for index in 1..=count {
            leads().await?;
            let mut batch = consumer.fetch().max_messages(1).expires(LIMIT).messages().await?;
            let message = batch.next().await.context("nothing to copy")?.map_err(anyhow::Error::from_boxed)?;
            let info = message.info().map_err(anyhow::Error::from_boxed)?;
            let (seq, time_ms) = (info.stream_sequence, info.published.unix_timestamp_nanos() / 1_000_000);
            let mut headers = message.headers.clone().unwrap_or_else(HeaderMap::new);
            headers.append("Choria-SR-Source", format!("S {seq} {site} {site} {time_ms}").as_str());
            to.publish_with_headers(message.subject.clone(), headers, message.payload.clone()).await?.await?;
            if !(killed && index == count) {
                message.double_ack().await.map_err(anyhow::Error::from_boxed)?;
            }
        }
        Ok(())
    }

    /// Wins Choria's election, copies so many messages and ends: it frees the key, or is killed.
    pub(super) async fn leads(&self, count: usize, killed: bool) -> Result<()> {
        let mut raw = Raw::connect(&self.from.url()).await?;
        let subject = format!("$KV.CHORIA_LEADER_ELECTION.SR_{}_S", self.site);
        let mut key = OldKey { raw: &mut raw, subject: &subject, revision: 0 };
        wait_for("the key of the election", LIMIT, async || key.create().await).await?;
        // It leads with the next update.
        key.update().await?;
        self.copies_while(count, killed, async || key.update().await).await?;
        if !killed {
            let deletion = Outgoing::new(subject.as_str(), "").with_lines(&["KV-Operation: DEL"]);
            raw.publish(&deletion).await?;
        }
        Ok(())
    }
}

struct OldKey<'a> {
    raw: &'a mut Raw,
    subject: &'a str,
    revision: u64,
}

impl OldKey<'_> {
    async fn write(&mut self, revision: u64) -> bool {
        let line = format!("Nats-Expected-Last-Subject-Sequence: {revision}");
        let written = self.raw.publish(&Outgoing::new(self.subject, "OLD").with_lines(&[&line])).await;
        self.revision = written.as_ref().copied().unwrap_or_default();
        written.is_ok()
    }

    /// Writes where there is no key, or only the marker of a deletion.
    async fn create(&mut self) -> bool {
        if self.write(0).await {
            return true;
        }
        let last = json!({"last_by_subj": self.subject});
        let Ok(found) = self.raw.api("STREAM.MSG.GET.KV_CHORIA_LEADER_ELECTION", last).await else { return false };
        let (is_marker, revision) = (found["message"]["data"].is_null(), found["message"]["seq"].as_u64());
        is_marker && self.write(revision.unwrap_or_default()).await
    }

    async fn update(&mut self) -> Result<()> {
        let revision = self.revision;
        ensure!(self.write(revision).await, "the old replicator lost the election");
        Ok(())
    }
}

/// Makes the bucket of Choria's elections.
pub(super) async fn make_election_bucket(raw: &mut Raw, ttl: Duration) -> Result<()> {
    let bucket = json!({"subjects": ["$KV.CHORIA_LEADER_ELECTION.>"], "max_age": ttl.as_nanos() as u64,
        "max_msgs_per_subject": 1, "discard": "new", "deny_delete": true, "allow_rollup_hdrs": true});
    raw.create_stream("KV_CHORIA_LEADER_ELECTION", bucket).await.map(|_| ())
}

/// Stream `S` has the payloads from 1 to `count`, each once and in order.
pub(super) async fn has_all(raw: &mut Raw, count: u64) -> Result<()> {
    wait_messages(raw, "S", count, LIMIT).await?;
    let stored = raw.read_stream("S").await?;
    let numbers: Vec<String> = stored.iter().map(|m| String::from_utf8_lossy(&m.payload).into_owned()).collect();
    let expect: Vec<String> = (1..=count).map(|number| number.to_string()).collect();
    ensure!(numbers == expect, "{numbers:?}");
    Ok(())
}
