//! Spans for a collector of OpenTelemetry.

use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};
use axum::{Router, body::Bytes, extract::State, routing::post};
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::harness::raw::header_values;
use crate::harness::{LIMIT, Outgoing, SITE, Service, Site, wait_value};

/// A collector that keeps what it gets.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<Value>>>);

impl Collector {
    async fn start(&self) -> Result<String> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let take = async |State(collector): State<Self>, body: Bytes| {
            let spans = serde_json::from_slice(&body).unwrap_or_else(|_| json!({"not": "json"}));
            collector.0.lock().expect("spans").push(spans);
            "{}"
        };
        let router = Router::new().route("/v1/traces", post(take)).with_state(self.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        Ok(format!("http://{address}"))
    }

    /// Spans of this name, each with the attributes of its process.
    fn spans(&self, name: &str) -> Vec<(Value, Value)> {
        let all = self.0.lock().expect("spans");
        let resources = all.iter().flat_map(|request| request["resourceSpans"].as_array().into_iter().flatten());
        let spans = resources.flat_map(|resource| {
            let scopes = resource["scopeSpans"].as_array().into_iter().flatten();
            let spans = scopes.flat_map(|scope| scope["spans"].as_array().into_iter().flatten());
            spans.map(|span| (span.clone(), resource["resource"].clone()))
        });
        spans.filter(|(span, _)| span["name"] == name).collect()
    }

    async fn span(&self, name: &str, is: impl Fn(&Value) -> bool) -> Result<(Value, Value)> {
        let found = async || self.spans(name).into_iter().find(|(span, _)| is(span));
        wait_value(&format!("a span {name}"), LIMIT, found).await.with_context(|| format!("{:?}", self.0))
    }
}

/// An attribute of a span or of a process, as text.
fn attribute(of: &Value, name: &str) -> String {
    let found = of["attributes"].as_array().into_iter().flatten().find(|one| one["key"] == name);
    let value = found.map(|one| &one["value"]).cloned().unwrap_or_default();
    let text = ["stringValue", "intValue"].iter().find_map(|kind| value.get(*kind)).cloned().unwrap_or_default();
    text.as_str().map_or_else(|| text.to_string(), str::to_owned)
}

#[tokio::test]
async fn runs_and_takeovers_are_spans() -> Result<()> {
    let collector = Collector::default();
    let url = collector.start().await?;
    let flags = ["--otlp", url.as_str(), "--lease-ttl", "2s"];
    let mut site = Site::builder().control_at_source().args(["--instance", "one"]).args(flags).start().await?;
    site.source_stream("ORDERS", json!({})).await?;
    let traced = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let message = Outgoing::new("orders.a", "x").with_lines(&[&format!("traceparent: {traced}")]);
    site.source().await?.publish_all([message]).await?;
    site.publish("ORDERS", 1..=9).await?;
    site.add("ORDERS", json!({})).await?;
    site.settled("ORDERS", 10).await?;
    site.ask("pause", "ORDERS").await?;
    let (run, process) = collector.span("run", |span| attribute(span, "copied") == "10").await?;
    for (name, expect) in [("replication", "ORDERS"), ("source.stream", "ORDERS"), ("position", "10"), ("epoch", "1")] {
        ensure!(attribute(&run, name) == expect, "{name}: {run}");
    }
    let own = [("service.name", "stream-replicator"), ("service.namespace", SITE), ("service.instance.id", "one")];
    for (name, expect) in own {
        ensure!(attribute(&process, name) == expect, "{name}: {process}");
    }
    // A comparison of both streams is one, too.
    site.ask("verify", "ORDERS").await?;
    collector
        .span("verify", |span| attribute(span, "source.messages") == "10" && attribute(span, "findings") == "0")
        .await?;
    // The header of the message is that of its publisher.
    let stored = site.target().await?.read_stream("ORDERS").await?;
    ensure!(header_values(&stored[0].header, "traceparent") == [traced], "{stored:?}");

    site.ask("resume", "ORDERS").await?;
    site.row_when("ORDERS", "runs", |row| row["state"] == "running").await?;
    site.target.kill()?;
    let failed = |span: &Value| attribute(span, "error.type") == "retry";
    let (run, _) = collector.span("run", failed).await?;
    ensure!(run["status"]["message"].as_str().is_some_and(|message| message.starts_with("target: ")), "{run}");
    site.target.restart().await?;
    site.row_when("ORDERS", "runs again", |row| row["state"] == "running").await?;

    let two = Service::builder(&site.service_url(), SITE).instance("two").args(flags).start().await?;
    site.service.kill()?;
    let (takeover, process) = collector.span("takeover", |span| attribute(span, "previous") == "one").await?;
    ensure!(attribute(&process, "service.instance.id") == "two", "{takeover} {process}");
    ensure!(attribute(&takeover, "replication") == "ORDERS", "{takeover}");
    drop(two);
    Ok(())
}

#[tokio::test]
async fn a_collector_that_is_away_changes_nothing() -> Result<()> {
    let nowhere = format!("http://127.0.0.1:{}", crate::harness::server::free_port()?);
    let mut site = Site::builder().control_at_source().args(["--otlp", nowhere.as_str()]).start().await?;
    site.replicate("ORDERS", 5).await?;
    site.settled("ORDERS", 5).await?;
    // Gracefully and in time.
    site.service.stop().await?;
    Ok(())
}
