//! A leader that cannot reach its target, though it reaches its source and keeps its lease.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::proxy::{BOTH, Newcomers, Proxy};
use crate::harness::site::merged;
use crate::harness::{Expect, LIMIT, SITE, Service, Site, request, wait_for, wait_value};

const TTL: &str = "3s";
/// Longer than anybody keeps a lease who does not renew it.
const LONGER: Duration = Duration::from_secs(4);
/// By the chain, by ids without batches, and by ids in batches.
const STREAMS: [&str; 3] = ["ORDERS", "PLAIN", "SHARED"];

/// Two instances. `two` leads, and reaches the target through a proxy only.
struct CutOffPair {
    site: Site,
    one: Service,
    two: Service,
    proxy: Proxy,
    _homes: TempDir,
}

impl CutOffPair {
    async fn start() -> Result<Self> {
        let mut site = Site::start().await?;
        // The service of the site is not part of it.
        site.stop().await?;
        let proxy = Proxy::start(site.target.port()).await?;
        let homes = tempfile::tempdir()?;
        let start = async |instance: &str, url: String| {
            let home = homes.path().join(instance);
            fs::create_dir_all(home.join("nats/context"))?;
            fs::write(home.join("nats/context/target.json"), json!({"url": url}).to_string())?;
            let service = Service::builder(&site.control().url(), SITE).instance(instance);
            service.args(["--lease-ttl", TTL]).env("XDG_CONFIG_HOME", &home.display().to_string()).start().await
        };
        let one = start("one", site.target.url()).await?;
        site.target_stream("PLAIN", json!({})).await?;
        for stream in STREAMS {
            site.filled(stream, 100).await?;
            let document = json!({"stream": stream, "source_url": site.source.url(), "target_context": "target"});
            let fields = if stream == "SHARED" { json!({"target_mode": "shared"}) } else { json!({}) };
            request(&site.client, "replicator.config.add", merged(document, fields)).await?;
        }
        for stream in STREAMS {
            site.settled(stream, 100).await.with_context(|| one.log())?;
        }
        let two = start("two", proxy.url()).await?;
        let pair = Self { site, one, two, proxy, _homes: homes };
        // What was handed over by request does not go back by itself.
        pair.hand_over("two").await?;
        for stream in STREAMS {
            pair.settled(stream, 100).await?;
        }
        Ok(pair)
    }

    async fn hand_over(&self, to: &str) -> Result<()> {
        for stream in STREAMS {
            let asked = async || {
                let reply = request(&self.site.client, "replicator.stepdown", json!({"replication": stream})).await;
                reply.ok().filter(|reply| reply["to"] == to)
            };
            wait_value("somebody to hand over to", LIMIT, asked).await?;
        }
        for stream in STREAMS {
            let led = |row: &Value| row["leader"] == to && row["state"] == "running";
            self.site.row_when(stream, &format!("is led by {to}"), led).await.with_context(|| self.logs())?;
        }
        Ok(())
    }

    async fn publish(&self, from: u64, to: u64) -> Result<()> {
        for stream in STREAMS {
            self.site.publish(stream, from..=to).await?;
        }
        Ok(())
    }

    async fn settled(&self, stream: &str, last: u64) -> Result<Value> {
        self.site.settled(stream, last).await.with_context(|| self.logs())
    }

    /// Everything is there, once and in order.
    async fn verify(&self, last: u64) -> Result<()> {
        for stream in STREAMS {
            self.settled(stream, last).await?;
            let expect = Expect::copy_of(stream);
            self.site.verify(stream, &expect).await.with_context(|| format!("{stream}\n{}", self.logs()))?;
        }
        Ok(())
    }

    fn logs(&self) -> String {
        format!("--- one\n{}\n--- two\n{}", self.one.log(), self.two.log())
    }

    async fn epochs(&self) -> Result<Vec<Value>> {
        let mut epochs = Vec::new();
        for stream in STREAMS {
            let row = self.site.row(stream).await.context("a row")?;
            ensure!(row["leader"] == "two", "{row}\n{}", self.logs());
            epochs.push(row["epoch"].clone());
        }
        Ok(epochs)
    }
}

#[tokio::test]
async fn a_leader_cut_off_from_its_target_keeps_its_lease() -> Result<()> {
    let pair = CutOffPair::start().await?;
    let epochs = pair.epochs().await?;
    let troubles: [fn(&Proxy); 2] = [Proxy::cut, |proxy| proxy.half_open(BOTH, Newcomers::Hang)];
    let mut last = 100;
    for trouble in troubles {
        trouble(&pair.proxy);
        pair.publish(last + 1, last + 500).await?;
        last += 500;
        let begun = Instant::now();
        while begun.elapsed() < LONGER {
            assert_eq!(pair.epochs().await?, epochs);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        for stream in STREAMS {
            ensure!(pair.site.at_target(stream).await? < last, "`{stream}` was not cut off");
        }
        pair.proxy.resume();
        pair.verify(last).await?;
        assert_eq!(pair.epochs().await?, epochs);
    }
    Ok(())
}

/// The leader hands over while what it sent is stuck on its way; that arrives when the successor has copied it too, or
/// while it does.
async fn late_messages(in_the_middle: bool) -> Result<()> {
    let pair = CutOffPair::start().await?;
    pair.proxy.stall();
    pair.publish(101, 3_100).await?;
    for stream in STREAMS {
        let sent = |row: &Value| row["in_flight"]["messages"].as_u64() > Some(0);
        pair.site.row_when(stream, "has messages in flight", sent).await.with_context(|| pair.logs())?;
    }
    pair.hand_over("one").await?;
    if !in_the_middle {
        pair.verify(3_100).await?;
    }
    ensure!(pair.proxy.open() > 0, "nothing is on its way any more");
    pair.proxy.resume();
    wait_for("what was on its way to arrive", LIMIT, async || pair.proxy.open() == 0).await?;
    pair.publish(3_101, 3_200).await?;
    pair.verify(3_200).await
}

#[tokio::test]
async fn late_messages_of_a_former_leader_do_no_harm() -> Result<()> {
    late_messages(false).await
}

#[tokio::test]
async fn late_messages_beside_a_successor_do_no_harm() -> Result<()> {
    late_messages(true).await
}

/// The leader publishes one by one with ids; its successor finds a target that takes batches and chains its messages.
#[tokio::test]
async fn late_messages_of_another_transport_are_not_stored_twice() -> Result<()> {
    let pair = CutOffPair::start().await?;
    assert_eq!(pair.site.row("PLAIN").await.context("a row")?["transport"], "pipelined");
    pair.proxy.stall();
    pair.publish(101, 3_100).await?;
    let sent = |row: &Value| row["in_flight"]["messages"].as_u64() > Some(0);
    pair.site.row_when("PLAIN", "has messages in flight", sent).await.with_context(|| pair.logs())?;
    let mut target = pair.site.target().await?;
    let mut config = target.api("STREAM.INFO.PLAIN", Value::Null).await?["config"].take();
    config["allow_batched"] = true.into();
    target.api("STREAM.UPDATE.PLAIN", config).await?;
    pair.hand_over("one").await?;
    pair.verify(3_100).await?;
    assert_eq!(pair.site.row("PLAIN").await.context("a row")?["transport"], "fast_ingest");
    ensure!(pair.proxy.open() > 0, "nothing is in flight any more");
    pair.proxy.resume();
    wait_for("what was in flight to arrive", LIMIT, async || pair.proxy.open() == 0).await?;
    pair.publish(3_101, 3_200).await?;
    pair.verify(3_200).await
}
