//! Requests that nobody should send, to every endpoint that there is: each is answered in time and in form, errors are
//! counted, and nothing else changes. `SEED=<number>` runs the same requests again.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use async_nats::{HeaderMap, Request};
use chrono::Utc;
use futures_util::{StreamExt, TryStreamExt, stream};
use rand::{RngExt, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::harness::client::{check_reply, checked, request};
use crate::harness::{LIMIT, Outgoing, Raw, Site, secrets, wait_for};

/// The design's "within 3 s".
const ANSWER: Duration = Duration::from_secs(3);
/// Requests in flight at once.
const AT_ONCE: usize = 64;
/// Replications that the requests may be about; the rest is to be left alone.
const PLAYGROUND: [&str; 4] = ["PLAY", "PLAY.second", "MISSING", "NOWHERE"];
const HEADERS: [&str; 4] =
    ["Replicator-Deadline", "Replicator-Expected-Revision", "Nats-Expected-Last-Sequence", "X-Anything"];
const MAX_PAYLOAD: usize = 1 << 20;

#[tokio::test]
async fn random_requests_are_answered_counted_and_break_nothing() -> Result<()> {
    survives(2_000).await
}

/// `make check-long` runs it.
#[tokio::test]
#[ignore = "takes half a minute"]
async fn ten_thousand_random_requests_break_nothing() -> Result<()> {
    survives(10_000).await
}

async fn survives(count: usize) -> Result<()> {
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(rand::random);
    println!("SEED={seed}");
    let site = Site::small().await?;
    site.replicate("ORDERS", 10).await?;
    site.filled("PLAY", 10).await?;
    let untouched = site.row("ORDERS").await.context("the row")?;
    let endpoints = endpoints(&site).await?;
    let before = counts(&site).await?;

    let requests = Generator::new(seed, &site).requests(&endpoints, count);
    let site_of_all = &site;
    let answers = stream::iter(requests).map(|asked| async move {
        let answer = ask(site_of_all, &asked).await;
        answer.with_context(|| format!("SEED={seed}: {}", asked.shown()))
    });
    let answers: Vec<RequestAnswer> = answers.buffer_unordered(AT_ONCE).try_collect().await?;
    let slowest = answers.iter().max_by_key(|answer| answer.time).context("no answers")?;
    println!("the slowest answer came from {} after {:?}", slowest.endpoint, slowest.time);
    let mut refused: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
    for answer in &answers {
        let (all, errors) = refused.entry(&answer.endpoint).or_default();
        *all += 1;
        *errors += u64::from(answer.code.is_some());
    }
    println!("requests and error replies: {refused:?}");
    ensure!(refused.values().any(|(all, errors)| all > errors), "none was served");

    for (endpoint, (all, errors)) in counts(&site).await? {
        let (all_before, errors_before) = before.get(&endpoint).copied().unwrap_or_default();
        let seen = refused.get(endpoint.as_str()).copied().unwrap_or_default();
        ensure!((all - all_before, errors - errors_before) == seen, "{endpoint}: {all} and {errors}, seen {seen:?}");
    }
    only_valid_documents(&site).await?;
    goes_on(&site, &untouched).await?;
    ensure!(!site.service.log().contains("panic"), "SEED={seed}: {}", site.service.log());
    Ok(())
}

/// Name and subject of all that the service says it answers.
async fn endpoints(site: &Site) -> Result<Vec<(String, String)>> {
    let info = request(&site.client, "$SRV.INFO.replicator", Value::Null).await?;
    let text = |value: &Value| value.as_str().map(str::to_owned).context("no text");
    let endpoints = info["endpoints"].as_array().context("no endpoints")?.iter();
    endpoints.map(|endpoint| Ok((text(&endpoint["name"])?, text(&endpoint["subject"])?))).collect()
}

/// Requests and errors by endpoint, as the service counts them.
async fn counts(site: &Site) -> Result<BTreeMap<String, (u64, u64)>> {
    let stats = request(&site.client, "$SRV.STATS.replicator", Value::Null).await?;
    let endpoints = stats["endpoints"].as_array().context("no endpoints")?.iter();
    let count = |endpoint: &Value| {
        let name = endpoint["name"].as_str()?.to_owned();
        Some((name, (endpoint["num_requests"].as_u64()?, endpoint["num_errors"].as_u64()?)))
    };
    endpoints.map(|endpoint| count(endpoint).with_context(|| format!("{endpoint}"))).collect()
}

struct AskedRequest {
    endpoint: String,
    subject: String,
    headers: HeaderMap,
    body: Vec<u8>,
}

impl AskedRequest {
    fn shown(&self) -> String {
        let body: String = String::from_utf8_lossy(&self.body).chars().take(2_000).collect();
        format!("{} with {:?} and {} bytes: {body}", self.subject, self.headers, self.body.len())
    }
}

struct RequestAnswer {
    endpoint: String,
    code: Option<u16>,
    time: Duration,
}

/// Sends a request; an answer that is late or not in form is an error.
async fn ask(site: &Site, asked: &AskedRequest) -> Result<RequestAnswer> {
    let request = Request::new().headers(asked.headers.clone()).payload(asked.body.clone().into()).timeout(Some(LIMIT));
    let begun = Instant::now();
    let reply = site.client.send_request(asked.subject.clone(), request).await?;
    let time = begun.elapsed();
    ensure!(time < ANSWER, "answered after {time:?}");
    check_reply(&asked.subject, &reply);
    let body: Value = serde_json::from_slice(&reply.payload).context("the answer is not JSON")?;
    let header = |name: &str| reply.headers.as_ref()?.get(name).map(|value| value.as_str().to_owned());
    let code: Option<u16> = header("Nats-Service-Error-Code").map(|code| code.parse()).transpose()?;
    let error = &body["error"];
    match code {
        None => ensure!(body.is_object() && error.is_null(), "{body}"),
        Some(code) => {
            ensure!([400, 404, 408, 409, 503, 504].contains(&code), "{body}");
            ensure!(error["code"] == code && error["problems"].is_array(), "{body}");
            ensure!(error["description"].as_str().is_some_and(|text| !text.is_empty()), "{body}");
            ensure!(header("Nats-Service-Error").is_some_and(|text| !text.is_empty()), "{body}");
        }
    }
    checked(&asked.subject, &asked.body, code.is_some(), &body);
    Ok(RequestAnswer { endpoint: asked.endpoint.clone(), code, time })
}

/// What the bucket holds are documents without problems, under their own ids.
async fn only_valid_documents(site: &Site) -> Result<()> {
    let list = site.ask("config.list", "").await?.body;
    let rows = list["replications"].as_array().context("no list")?;
    ensure!(list["total"] == rows.len(), "{list}");
    println!("{} documents are left", rows.len());
    for row in rows {
        let id = row["replication"].as_str().context("no id")?;
        let shown = site.ask("config.get", id).await?;
        ensure!(
            shown.error.is_none() && shown.body["problems"].is_null() && shown.body["config"].is_object(),
            "{shown:?}"
        );
        ensure!(!["invalid", "stopped"].contains(&row["state"].as_str().unwrap_or_default()), "{row}");
    }
    Ok(())
}

/// What ran before still runs, and was not touched.
async fn goes_on(site: &Site, before: &Value) -> Result<()> {
    site.publish("ORDERS", 11..=20).await?;
    site.copied("ORDERS", 20).await?;
    let row = site.settled("ORDERS", 20).await?;
    for field in ["state", "leader", "epoch", "config_revision", "last_error"] {
        ensure!(row[field] == before[field], "{field}: {row}");
    }
    let counters = (&row["counters"]["errors"], &row["counters"]["consumers_recreated"], &row["counters"]["copied"]);
    ensure!(counters == (&json!(0), &json!(0), &json!(20)), "{row}");
    Ok(())
}

/// Makes requests that were right before something happened to them.
struct Generator {
    random: StdRng,
    source: String,
    target: String,
}

impl Generator {
    fn new(seed: u64, site: &Site) -> Self {
        // A password that no server asks for, in the URLs of all that is stored.
        let password = secrets::secret();
        let [source, target] = [&site.source, &site.target].map(|server| server.url_as(&format!("play:{password}")));
        Self { random: StdRng::seed_from_u64(seed), source, target }
    }

    /// In turns, so that all endpoints get alike many.
    fn requests(mut self, endpoints: &[(String, String)], count: usize) -> Vec<AskedRequest> {
        let turns = endpoints.iter().cycle().take(count);
        turns.map(|(endpoint, subject)| self.request(endpoint.clone(), subject.clone())).collect()
    }

    fn chance(&mut self, percent: u32) -> bool {
        self.random.random_range(0..100) < percent
    }

    fn below(&mut self, end: usize) -> usize {
        self.random.random_range(0..end)
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from.choose(&mut self.random).expect("something to pick from").clone()
    }

    fn request(&mut self, endpoint: String, subject: String) -> AskedRequest {
        let mut body = if self.chance(80) { self.fitting(&endpoint) } else { self.any() };
        while self.chance(40) {
            self.change_value(&mut body);
        }
        let mut bytes = match body {
            // An id may be plain text.
            Value::String(text) if self.chance(90) => text.into_bytes(),
            Value::Null if self.chance(90) => Vec::new(),
            body => body.to_string().into_bytes(),
        };
        while self.chance(25) {
            self.change_bytes(&mut bytes);
        }
        // The URLs were not there before: a copy to a server that is none of ours is no part of this test.
        let bytes = replace(replace(bytes, b"@source@", self.source.as_bytes()), b"@target@", self.target.as_bytes());
        AskedRequest {
            endpoint,
            subject,
            headers: self.headers(),
            body: bytes.into_iter().take(MAX_PAYLOAD - 4_096).collect(),
        }
    }

    fn headers(&mut self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        while self.chance(20) {
            let name = self.pick(&HEADERS);
            let now = Utc::now().timestamp_millis();
            let value = match self.below(8) {
                0 => (now + 60_000).to_string(),
                1 => (now - 60_000).to_string(),
                2 => self.below(50).to_string(),
                3 => u64::MAX.to_string() + "0",
                4 => "-1".to_owned(),
                5 => "1e3 or so".to_owned(),
                6 => String::new(),
                _ => "\u{fffd}".repeat(self.random.random_range(0..500)),
            };
            headers.append(name, value);
        }
        headers
    }

    /// What the endpoint expects, as far as its name tells.
    fn fitting(&mut self, endpoint: &str) -> Value {
        let last = endpoint.rsplit(['-', '.']).next().unwrap_or_default();
        match last {
            "add" | "update" | "validate" => self.document(),
            "list" | "schema" | "instances" => self.page(),
            "status" if self.chance(50) => self.page(),
            _ => self.named(),
        }
    }

    fn any(&mut self) -> Value {
        match self.below(4) {
            0 => self.document(),
            1 => self.page(),
            2 => self.named(),
            _ => self.value(5),
        }
    }

    fn document(&mut self) -> Value {
        let (stream, name) =
            self.pick(&[("PLAY", None), ("PLAY", Some("second")), ("MISSING", None), ("NOWHERE", None)]);
        let mut document = json!({"stream": stream, "source_url": "@source@", "target_url": "@target@"});
        let fields = [
            ("description", json!("anything, see https://example.net")),
            ("target_stream", json!("PLAY_COPY")),
            ("target_subject_prefix", json!("copy")),
            ("target_subject_remove", json!("play")),
            ("filter_subject", json!("play.1")),
            ("max_age", json!("1h")),
            ("start_at_end", json!(true)),
            ("start_sequence", json!(3)),
            ("start_delta", json!("5m")),
            ("start_time", json!("2026-01-01T00:00:00Z")),
            ("no_target_create", json!(true)),
            ("target_mode", json!("exclusive")),
            ("target_update", json!(true)),
            ("ordering", json!("strict")),
            ("limits", json!({"messages_in_flight": 5, "bytes_in_flight": 100_000})),
            ("tls", json!({"ca": "/nowhere/ca.pem"})),
            ("inspect_subject_token", json!(2)),
            ("inspect_header", json!("Who")),
            ("inspect_duration", json!("1h")),
            ("advisory", json!({"subject": "told.%s.%v", "reliable": true})),
        ];
        while self.chance(60) {
            let (field, value) = self.pick(&fields);
            document[field] = value;
        }
        if let Some(name) = name {
            document["name"] = name.into();
        }
        if stream == "NOWHERE" {
            document["source_url"] = "nats://127.0.0.1:1".into();
        }
        document
    }

    fn named(&mut self) -> Value {
        let id = self.pick(&PLAYGROUND);
        if self.chance(40) {
            return id.into();
        }
        let mut named = json!({ "replication": id });
        let fields = [
            ("keep", json!(true)),
            ("dry_run", json!(true)),
            ("source_seq", json!(3)),
            ("time", json!("2026-01-01T00:00:00Z")),
        ];
        while self.chance(40) {
            let (field, value) = self.pick(&fields);
            named[field] = value;
        }
        named
    }

    fn page(&mut self) -> Value {
        match self.below(4) {
            0 => Value::Null,
            1 => json!({}),
            2 => json!({"offset": self.below(5)}),
            _ => json!({"offset": self.below(3), "limit": self.below(5)}),
        }
    }

    /// Any JSON.
    fn value(&mut self, depth: usize) -> Value {
        match self.below(if depth == 0 { 8 } else { 10 }) {
            0 => Value::Null,
            1 => self.chance(50).into(),
            2 => self.pick(&[
                json!(0),
                json!(-1),
                json!(i64::MIN),
                json!(u64::MAX),
                json!(1e308),
                json!(-0.5),
                json!(1.0),
            ]),
            3 => self.random.random::<i64>().into(),
            4 => self.pick(&["", ".", "*", ">", "***", "@source@", "PLAY", "1h", "é\u{0}\u{fffd}\u{202e}"]).into(),
            5 => self.pick(&["nats://", "nats://h:99999", "nats://[::1", "nats://h?x=1", "tls://h", "@"]).into(),
            6 => "x".repeat(self.random.random_range(0..5_000)).into(),
            7 => "a.".repeat(self.random.random_range(0..500)).into(),
            8 => (0..self.below(4)).map(|_| self.value(depth - 1)).collect(),
            _ => {
                let keys = ["stream", "source_url", "limits", "replication", "source_sequence", "", "tls", "\u{0}"];
                let fields = (0..self.below(4)).map(|_| (self.pick(&keys).to_owned(), self.value(depth - 1)));
                Value::Object(fields.collect())
            }
        }
    }

    /// Changes a value, or one that lies somewhere in it.
    fn change_value(&mut self, value: &mut Value) {
        match value {
            Value::Object(fields) if !fields.is_empty() && self.chance(90) => {
                let keys: Vec<String> = fields.keys().cloned().collect();
                let key = self.pick(&keys);
                match self.below(6) {
                    0 => drop(fields.remove(&key)),
                    1 => {
                        let moved = fields.remove(&key).unwrap_or_default();
                        fields.insert(key[..key.len().saturating_sub(1)].to_owned(), moved);
                    }
                    2 => drop(fields.insert("colour".to_owned(), self.value(2))),
                    _ => self.change_value(&mut fields[&key]),
                }
            }
            Value::Array(values) if !values.is_empty() && self.chance(90) => {
                let at = self.below(values.len());
                self.change_value(&mut values[at]);
            }
            value => {
                let new = match self.below(4) {
                    0 => json!([value.take()]),
                    1 => json!({"replication": value.take()}),
                    _ => self.value(4),
                };
                *value = new;
            }
        }
    }

    fn change_bytes(&mut self, bytes: &mut Vec<u8>) {
        let at = self.below(bytes.len() + 1);
        match self.below(10) {
            0 => bytes.truncate(at),
            1 => bytes.insert(at, self.random.random()),
            2 => drop(bytes.splice(at..at, *b"\xff\xfe\x00")),
            3 => drop(bytes.splice(at..at, vec![b'['; 20_000])),
            4 => drop(bytes.splice(at..at, b"{\"a\":".repeat(5_000))),
            5 => drop(bytes.splice(at..at, b"1e999".iter().copied())),
            6 => drop(bytes.splice(at..at, vec![b' '; 100_000])),
            7 => {
                let copy = bytes[at..].to_vec();
                bytes.extend(copy);
            }
            8 => bytes.extend(vec![b'x'; MAX_PAYLOAD]),
            _ if at < bytes.len() => bytes[at] = self.random.random(),
            _ => {}
        }
    }
}

fn replace(bytes: Vec<u8>, what: &[u8], with: &[u8]) -> Vec<u8> {
    let mut replaced = Vec::with_capacity(bytes.len());
    let mut rest = bytes.as_slice();
    while let Some(at) = rest.windows(what.len()).position(|window| window == what) {
        replaced.extend_from_slice(&rest[..at]);
        replaced.extend_from_slice(with);
        rest = &rest[at + what.len()..];
    }
    replaced.extend_from_slice(rest);
    replaced
}

/// The client library ends a connection on which it meets headers that are none; the service connects again.
#[tokio::test]
async fn invalid_headers_cost_no_more_than_a_connection() -> Result<()> {
    let site = Site::small().await?;
    site.replicate("ORDERS", 10).await?;
    let before = site.settled("ORDERS", 10).await?;
    let mut raw = Raw::connect(&site.source.url()).await?;
    for block in
        [b"NATS/2.0\r\n\r\n".as_slice(), b"NATS/1.0\r\n\xff: \xfe\r\n\r\n", b"\r\n", b"NATS/1.0\r\nno colon\r\n\r\n"]
    {
        for subject in ["replicator.status", "replicator.config.add", "$SRV.PING"] {
            raw.send_only(&Outgoing::new(subject, "{}").with_block(block)).await?;
        }
        // What is asked while the connection is down may be lost.
        let asked = async || {
            timeout(Duration::from_secs(1), site.ask("status", "ORDERS")).await.is_ok_and(|reply| reply.is_ok())
        };
        wait_for("an answer", LIMIT, asked).await?;
    }
    let after = site.row_when("ORDERS", "is shown", Value::is_object).await?;
    for field in ["state", "epoch", "counters", "last_error"] {
        ensure!(after[field] == before[field], "{field}: {after}");
    }
    ensure!(!site.service.log().contains("panic"), "{}", site.service.log());
    Ok(())
}
