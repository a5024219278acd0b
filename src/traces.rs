//! Spans for a collector of OpenTelemetry, where one is named: each run of a replication, and each takeover from another instance.
//! The `traceparent` headers of messages are copied like any other header and have no part in this.

use std::time::Duration;

use opentelemetry::{
    KeyValue,
    trace::{Span as _, SpanBuilder, SpanKind, Status, Tracer as _, TracerProvider as _},
};
use opentelemetry_http::HttpClient;
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::{
    Resource,
    trace::{SdkTracer, SdkTracerProvider, Span},
};

use crate::names;

/// Path of a collector for spans.
const PATH: &str = "/v1/traces";
/// Time for the last spans of a process that stops.
const LAST: Duration = Duration::from_secs(1);

/// Makes spans; cheap to clone. Without a collector it makes none.
#[derive(Debug, Clone, Default)]
pub struct Traces(Option<SdkTracer>);

/// Sends the spans, in a thread of its own.
#[derive(Debug)]
pub struct TraceSender(SdkTracerProvider);

/// Sends spans to the collector at `url` over `client`; the URL is not checked.
pub fn start(
    url: &str,
    site: &str,
    instance: &str,
    client: impl HttpClient + 'static,
) -> Result<(Traces, TraceSender), String> {
    let exporter = SpanExporter::builder()
        .with_http()
        .with_http_client(client)
        .with_protocol(Protocol::HttpJson)
        .with_endpoint(endpoint(url))
        .build()
        .map_err(|error| error.to_string())?;
    let attributes =
        [("service.version", names::VERSION), ("service.namespace", site), ("service.instance.id", instance)];
    let attributes = attributes.map(|(name, value)| KeyValue::new(name, value.to_owned()));
    let resource = Resource::builder().with_service_name(names::PROGRAM).with_attributes(attributes).build();
    let provider = SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build();
    Ok((Traces(Some(provider.tracer(names::PROGRAM))), TraceSender(provider)))
}

/// As for other programs: the path is added to the address of the collector.
fn endpoint(url: &str) -> String {
    let url = url.trim_end_matches('/');
    if url.ends_with(PATH) { url.to_owned() } else { format!("{url}{PATH}") }
}

impl TraceSender {
    /// Sends what is left. Blocks for a short time.
    pub fn finish(self) {
        // A collector that is away keeps no service from stopping.
        let _ = self.0.shutdown_with_timeout(LAST);
    }
}

impl Traces {
    /// A span that begins now and ends when it is dropped.
    pub fn begin(&self, name: &'static str, replication: &str, epoch: u64) -> TraceSpan {
        let span = self.0.as_ref().map(|tracer| {
            let attributes = vec![
                KeyValue::new("replication", replication.to_owned()),
                KeyValue::new("epoch", i64::try_from(epoch).unwrap_or(i64::MAX)),
            ];
            let builder = SpanBuilder::from_name(name).with_kind(SpanKind::Internal).with_attributes(attributes);
            tracer.build(builder)
        });
        TraceSpan(span)
    }
}

/// One span, if spans are wanted.
#[derive(Debug, Default)]
pub struct TraceSpan(Option<Span>);

impl TraceSpan {
    /// Adds a text.
    pub fn text(&mut self, name: &'static str, value: &str) {
        if let Some(span) = &mut self.0 {
            span.set_attribute(KeyValue::new(name, value.to_owned()));
        }
    }

    /// Adds a number.
    pub fn number(&mut self, name: &'static str, value: u64) {
        if let Some(span) = &mut self.0 {
            span.set_attribute(KeyValue::new(name, i64::try_from(value).unwrap_or(i64::MAX)));
        }
    }

    /// It failed; the text has no secrets.
    pub fn fail(&mut self, kind: &'static str, message: &str) {
        if let Some(span) = &mut self.0 {
            span.set_attribute(KeyValue::new("error.type", kind));
            span.set_status(Status::error(message.to_owned()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_for_spans_is_added_once() {
        for url in ["http://c:4318", "http://c:4318/", "http://c:4318/v1/traces"] {
            assert_eq!(endpoint(url), "http://c:4318/v1/traces");
        }
        assert_eq!(endpoint("http://c/agent"), "http://c/agent/v1/traces");
    }

    #[test]
    fn without_a_collector_there_are_no_spans() {
        let mut span = Traces::default().begin("run", "ORDERS", 1);
        span.text("a", "b");
        span.fail("retry", "cut");
        assert!(span.0.is_none());
    }
}
