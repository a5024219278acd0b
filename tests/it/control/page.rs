//! The status page: what it is protected by, what its viewers are sent, and what a browser shows.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use async_nats::jetstream;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedReadHalf;
use tokio::time::timeout;

use super::browser::Browser;
use crate::harness::{Cli, LIMIT, Role, Server, Service, Site, connect, request, secrets, wait_for, wait_value};

/// Text that is markup wherever it is not taken as text.
const MARKUP: &str = "<img src=x onerror=\"window.harmed=1\"><script>window.harmed=2</script>";
/// What a change may take from the service to the page, on a machine of any kind.
const SEEN: Duration = Duration::from_secs(20);

async fn site() -> Result<Site> {
    Site::builder().control_at_source().args(["--monitor", "127.0.0.1:0", "--instance", "one"]).start().await
}

/// Status code, head in lower case and body.
pub async fn get(address: &str, path: &str, header: &str) -> Result<(u16, String, String)> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: x\r\n{header}\r\n").as_bytes()).await?;
    let mut answer = String::new();
    timeout(LIMIT, stream.read_to_string(&mut answer)).await??;
    secrets::check(path, &answer);
    let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP")?;
    let code = head.split(' ').nth(1).context("no status code")?.parse()?;
    Ok((code, head.to_lowercase(), body.to_owned()))
}

/// One who views the page, as its script does: rows by id with their names filled in.
pub struct Viewer {
    lines: Lines<BufReader<OwnedReadHalf>>,
    _writer: tokio::net::tcp::OwnedWriteHalf,
    texts: Vec<String>,
    ids: BTreeMap<u64, String>,
    rows: BTreeMap<String, Value>,
    events: Vec<Value>,
    instances: Value,
    /// The stream that earlier events are from.
    kept: Value,
    /// Names of the messages and how many bytes they had.
    pub got: Vec<(String, usize)>,
}

impl Viewer {
    pub async fn join(address: &str) -> Result<Self> {
        let (reader, mut writer) = TcpStream::connect(address).await?.into_split();
        writer.write_all(b"GET /live HTTP/1.0\r\nHost: x\r\n\r\n").await?;
        let mut lines = BufReader::new(reader).lines();
        let first = timeout(LIMIT, lines.next_line()).await??.context("no answer")?;
        ensure!(first.contains(" 200 "), "{first}");
        let mut viewer = Self {
            lines,
            _writer: writer,
            texts: Vec::new(),
            ids: BTreeMap::new(),
            rows: BTreeMap::new(),
            events: Vec::new(),
            instances: Value::Null,
            kept: Value::Null,
            got: Vec::new(),
        };
        while !viewer.line().await?.is_empty() {}
        viewer.message().await?;
        Ok(viewer)
    }

    async fn line(&mut self) -> Result<String> {
        timeout(LIMIT, self.lines.next_line()).await.context("silence")??.context("the stream ended")
    }

    /// Takes the next message.
    async fn message(&mut self) -> Result<()> {
        let name = self.line().await?.strip_prefix("event: ").context("an event")?.to_owned();
        let data = self.line().await?.strip_prefix("data: ").context("data")?.to_owned();
        ensure!(self.line().await?.is_empty(), "more lines");
        secrets::check("a message of the page", &data);
        self.got.push((name.clone(), data.len()));
        if name == "quiet" {
            return Ok(());
        }
        let message: Value = serde_json::from_str(&data)?;
        let list = |field: &str| message[field].as_array().cloned().unwrap_or_default();
        let first = message["first"].as_u64().context("first")? as usize;
        if name == "snapshot" {
            self.rows.clear();
            self.ids.clear();
            self.events.clear();
            self.kept = message["kept"].clone();
            ensure!(message["since"].as_str().is_some_and(|since| since.ends_with('Z')), "{}", message["since"]);
        }
        self.texts.truncate(first);
        ensure!(self.texts.len() == first, "{first} texts were sent, {} arrived", self.texts.len());
        self.texts.extend(list("texts").iter().filter_map(Value::as_str).map(str::to_owned));
        for row in list("rows") {
            let (number, id) = (row[0][0].as_u64().context("number")?, row[0][1].as_str().context("id")?.to_owned());
            let text = |index: &Value| index.as_u64().map(|index| self.texts[index as usize].clone());
            let shown = json!({"state": text(&row[0][2]), "from": text(&row[0][4]), "to": text(&row[0][6]),
                "leader": text(&row[2]), "do": text(&row[3]), "error": text(&row[4]), "lag": row[5][1], "drift": text(&row[8])});
            self.ids.insert(number, id.clone());
            self.rows.insert(id, shown);
        }
        for numbers in list("numbers") {
            let id = &self.ids[&numbers[0].as_u64().context("number")?];
            self.rows.get_mut(id).context("a row")?["lag"] = numbers[2].clone();
        }
        for number in list("gone") {
            let id = self.ids.remove(&number.as_u64().context("number")?).context("an id")?;
            self.rows.remove(&id);
        }
        if !message["instances"].is_null() {
            self.instances = message["instances"].clone();
        }
        self.events.extend(list("events"));
        Ok(())
    }

    /// Takes messages until it sees this.
    async fn until(&mut self, what: &str, seen: impl Fn(&Self) -> bool) -> Result<()> {
        let end = Instant::now() + LIMIT;
        while !seen(self) {
            ensure!(Instant::now() < end, "{what} is not seen: {:?} {:?}", self.rows, self.events);
            self.message().await?;
        }
        Ok(())
    }
}

#[tokio::test]
async fn no_answer_can_be_taken_for_something_else() -> Result<()> {
    let site = site().await?;
    let address = site.service.monitor().await?;
    let types = [
        ("/", "text/html; charset=utf-8"),
        ("/page.css", "text/css; charset=utf-8"),
        ("/page.js", "text/javascript; charset=utf-8"),
        ("/topology.js", "text/javascript; charset=utf-8"),
        ("/icon.svg", "image/svg+xml"),
        ("/metrics", "text/plain"),
        ("/livez", "text/plain"),
        ("/replication/MISSING", "text/plain"),
        ("/missing", ""),
    ];
    for (path, content_type) in types {
        let (code, head, body) = get(&address, path, "").await?;
        assert_eq!(code, if path.to_lowercase().contains("missing") { 404 } else { 200 }, "{path}");
        assert!(head.contains(&format!("content-type: {content_type}")) || content_type.is_empty(), "{path}: {head}");
        for header in [
            "content-security-policy: default-src 'none'; script-src 'self';",
            "frame-ancestors 'none'",
            "x-content-type-options: nosniff",
            "x-frame-options: deny",
            "referrer-policy: no-referrer",
            "cache-control: no-store",
            "cross-origin-resource-policy: same-origin",
        ] {
            assert!(head.contains(header), "`{header}` is not in the head of {path}: {head}");
        }
        assert!(!head.contains("unsafe-inline"), "{head}");
        // Nothing comes from elsewhere, and the policy allows nothing in the page itself.
        let elsewhere = body.replace("http://www.w3.org/2000/svg", "");
        if path != "/metrics" {
            assert!(!elsewhere.contains("http://") && !elsewhere.contains("https://"), "{path}");
            assert!(!body.contains("style=\"") && !body.contains(" onclick"), "{path}");
        }
    }
    let mut stream = TcpStream::connect(&address).await?;
    stream.write_all(b"POST / HTTP/1.0\r\nHost: x\r\n\r\n").await?;
    let mut answer = String::new();
    timeout(LIMIT, stream.read_to_string(&mut answer)).await??;
    assert!(answer.contains(" 405 "), "{answer}");
    Ok(())
}

#[tokio::test]
async fn a_login_is_needed_for_all_but_the_health() -> Result<()> {
    let login = format!("ops:{}", bcrypt::hash("s3cret-word", 4)?);
    let site = Site::builder()
        .control_at_source()
        .args(["--monitor", "127.0.0.1:0", "--monitor-auth", &login])
        .start()
        .await?;
    let address = site.service.monitor().await?;
    let header = |user: &str, password: &str| {
        format!("Authorization: Basic {}\r\n", BASE64_STANDARD.encode(format!("{user}:{password}")))
    };
    let good = header("ops", "s3cret-word");
    for path in [
        "/",
        "/page.js",
        "/topology.js",
        "/page.css",
        "/icon.svg",
        "/metrics",
        "/choria/prometheus",
        "/replication/X",
        "/live",
    ] {
        for wrong in [String::new(), header("ops", "s3cret"), header("root", "s3cret-word"), header("ops", "")] {
            let (code, head, body) = get(&address, path, &wrong).await?;
            assert_eq!(code, 401, "{path} {wrong}");
            assert!(head.contains("www-authenticate: basic realm="), "{head}");
            assert!(!body.contains("choria_") && !body.contains("TEST"), "{body}");
        }
        if path != "/live" {
            let (code, ..) = get(&address, path, &good).await?;
            assert_eq!(code, if path == "/replication/X" { 404 } else { 200 }, "{path}");
        }
    }
    for path in ["/livez", "/readyz"] {
        assert_eq!(get(&address, path, "").await?.0, 200, "{path}");
    }
    let log = site.service.log();
    assert!(!log.contains("s3cret") && !log.contains("$2"), "{log}");
    Ok(())
}

#[tokio::test]
async fn a_monitor_for_everyone_is_warned_of() -> Result<()> {
    let site = site().await?;
    let address = site.service.monitor().await?;
    assert!(!site.service.log().contains("--monitor-auth"), "{}", site.service.log());
    // A login that cannot be one ends the start, and is not quoted.
    let program = Cli::new(&site.service_url());
    let wrong = ["serve", "--name", "X", "--server", "nats://127.0.0.1:1", "--monitor-auth", "ops:hunter2"];
    let ended = program.run(wrong).await?;
    assert_eq!(ended.code, Some(2), "{ended:?}");
    assert!(ended.stderr.contains("`--monitor-auth`") && !ended.stderr.contains("hunter2"), "{ended:?}");
    assert_eq!(get(&address, "/", "").await?.0, 200);
    Ok(())
}

#[tokio::test]
async fn a_viewer_gets_a_snapshot_and_then_changes() -> Result<()> {
    let site = site().await?;
    let second = Service::builder(&site.service_url(), "TEST").instance("two").args(["--monitor", "127.0.0.1:0"]);
    let second = second.start().await?;
    for stream in ["A", "B", "C", "D"] {
        site.replicate(stream, 3).await?;
        site.settled(stream, 3).await?;
    }
    let [mut one, mut two] =
        [Viewer::join(&site.service.monitor().await?).await?, Viewer::join(&second.monitor().await?).await?];
    for viewer in [&mut one, &mut two] {
        assert_eq!(viewer.got[0].0, "snapshot");
        // Both show the whole group, whichever leads.
        viewer
            .until("all run", |viewer| {
                viewer.rows.len() == 4
                    && viewer.rows.values().all(|row| row["state"] == "running" && row["lag"] == 0)
                    && viewer.instances.as_array().is_some_and(|all| all.len() == 2)
            })
            .await?;
        let row = &viewer.rows["A"];
        let port = |server: &Server| format!("127.0.0.1:{}", server.port());
        assert_eq!((&row["from"], &row["to"]), (&port(&site.source).into(), &port(&site.target).into()), "{row}");
    }
    site.ask("pause", "B").await?;
    site.add("LATER", json!({})).await?;
    site.ask("config.delete", "C").await?;
    for viewer in [&mut one, &mut two] {
        let before = viewer.got.len();
        viewer
            .until("the changes", |viewer| {
                let state = |id: &str| viewer.rows.get(id).map(|row| row["state"].clone());
                state("B") == Some("paused".into()) && state("LATER") == Some("held".into()) && state("C").is_none()
            })
            .await?;
        let held = &viewer.rows["LATER"];
        assert!(held["do"].as_str().is_some_and(|todo| todo.contains("fix the cause")), "{held}");
        assert!(held["error"].as_str().is_some_and(|error| error.contains("LATER")), "{held}");
        viewer.until("the event", |viewer| viewer.events.iter().any(|event| event["kind"] == "paused")).await?;
        let deltas = &viewer.got[before..];
        assert!(deltas.iter().all(|(name, bytes)| name != "snapshot" && *bytes < 4_000), "{deltas:?}");
    }
    let (code, _, body) = get(&site.service.monitor().await?, "/replication/A", "").await?;
    let details: Value = serde_json::from_str(&body)?;
    assert_eq!(
        (code, &details["row"]["replication"], details["history"][0]["step"].as_u64()),
        (200, &"A".into(), Some(10))
    );
    Ok(())
}

#[tokio::test]
async fn viewers_are_bounded_and_leave_their_place() -> Result<()> {
    let site = site().await?;
    let address = site.service.monitor().await?;
    let mut viewers = Vec::new();
    for _ in 0..32 {
        viewers.push(Viewer::join(&address).await?);
    }
    let (code, head, _) = get(&address, "/live", "").await?;
    assert_eq!(code, 503);
    assert!(head.contains("retry-after: "), "{head}");
    viewers.truncate(10);
    wait_for("a place", LIMIT, async || Viewer::join(&address).await.is_ok()).await?;
    // A stop does not wait for those who view.
    let mut site = site;
    let began = Instant::now();
    site.stop().await?;
    println!("stopped in {:?} with viewers", began.elapsed());
    Ok(())
}

#[tokio::test]
async fn many_events_are_shown_as_the_last_few() -> Result<()> {
    let site = site().await?;
    let address = site.service.monitor().await?;
    let event = |number: usize| {
        json!({"kind": "held", "replication": format!("R{number}"), "site": "TEST", "instance": "i",
            "time": "2026-01-01T00:00:00Z", "timestamp": "2026-01-01T00:00:00Z", "id": "1",
            "type": "io.stream_replicator.event.v1.held", "message": "x".repeat(2_000)})
    };
    for number in 0..20_000 {
        let subject = format!("replicator.event.held.R{number}");
        site.client.publish(subject, event(number).to_string().into()).await?;
    }
    site.client.flush().await?;
    let last = async || {
        let viewer = Viewer::join(&address).await.ok()?;
        (viewer.events.last()?["replication"] == "R19999").then_some(viewer)
    };
    let viewer = wait_value("the last event", LIMIT, last).await?;
    assert_eq!(viewer.events.len(), 200);
    assert!(viewer.got[0].1 < 200 * 1_000, "{:?}", viewer.got);
    Ok(())
}

fn kinds(viewer: &Viewer) -> Vec<&str> {
    viewer.events.iter().filter_map(|event| event["kind"].as_str()).collect()
}

#[tokio::test]
async fn events_from_before_a_restart_are_shown_once() -> Result<()> {
    let mut site = site().await?;
    site.replicate("A", 3).await?;
    site.settled("A", 3).await?;
    let mut viewer = Viewer::join(&site.service.monitor().await?).await?;
    viewer.until("the stream of events", |viewer| viewer.kept == "REPLICATOR_EVENTS").await?;
    site.ask("pause", "A").await?;
    viewer.until("the pause", |viewer| kinds(viewer).contains(&"paused")).await?;
    let before: Vec<String> = kinds(&viewer).into_iter().map(str::to_owned).collect();
    drop(viewer);
    site.service.stop().await?;
    site.service.restart().await?;
    let mut viewer = Viewer::join(&site.service.monitor().await?).await?;
    viewer.until("the earlier events", |viewer| viewer.kept == "REPLICATOR_EVENTS").await?;
    site.ask("resume", "A").await?;
    viewer.until("the news", |viewer| kinds(viewer).contains(&"resumed")).await?;
    let shown = kinds(&viewer);
    // All of before, in their order, then what came after.
    ensure!(shown.starts_with(&before.iter().map(String::as_str).collect::<Vec<_>>()), "{before:?} {shown:?}");
    ensure!(shown.iter().filter(|kind| **kind == "paused").count() == 1, "{shown:?}");
    Ok(())
}

#[tokio::test]
async fn without_a_stream_of_events_the_page_says_since_when() -> Result<()> {
    let args = ["--monitor", "127.0.0.1:0", "--no-event-stream"];
    let mut site = Site::builder().control_at_source().args(args).start().await?;
    site.replicate("A", 3).await?;
    site.ask("pause", "A").await?;
    let mut viewer = Viewer::join(&site.service.monitor().await?).await?;
    viewer.until("the pause", |viewer| kinds(viewer).contains(&"paused")).await?;
    ensure!(viewer.kept.is_null(), "{}", viewer.kept);
    site.service.stop().await?;
    site.service.restart().await?;
    let address = site.service.monitor().await?;
    ensure!(!kinds(&Viewer::join(&address).await?).contains(&"paused"));
    let Some(mut browser) = Browser::start().await? else { return Ok(()) };
    opened(&mut browser, &address).await?;
    browser.until("document.getElementById('events-from').textContent.includes('earlier ones are not known')").await?;
    Ok(())
}

/// The words of a cell of the table of settings.
async fn settings(browser: &mut Browser) -> Result<Value> {
    let cells =
        "[...document.querySelectorAll('#drift-table tbody tr')].map(tr => [...tr.children].map(td => td.textContent))";
    browser.value(cells).await
}

#[tokio::test]
async fn a_browser_shows_a_drift_until_it_is_fixed() -> Result<()> {
    let Some(mut browser) = Browser::start().await? else { return Ok(()) };
    let site = site().await?;
    site.filled("ORDERS", 3).await?;
    site.add("ORDERS", json!({"target_update": true})).await?;
    site.settled("ORDERS", 3).await?;
    site.replicate("SAME", 3).await?;
    let mut target = site.target().await?;
    let mut config = target.api("STREAM.INFO.ORDERS", Value::Null).await?["config"].take();
    config["max_age"] = 3_600_000_000_000_u64.into();
    target.api("STREAM.UPDATE.ORDERS", config).await?;
    let address = site.service.monitor().await?;
    browser.look(1440, 900, "light").await?;
    opened(&mut browser, &address).await?;
    browser.until(&row_with("ORDERS", "drift: max_age")).await?;
    browser.value("document.getElementById('drifted').click()").await?;
    browser
        .until("location.hash === '#filter=has%3Adrift' && document.querySelectorAll('#rows tr').length === 1")
        .await?;
    browser.value("location.hash = '#/replication/ORDERS'").await?;
    browser.until("!document.getElementById('drift-table').hidden").await?;
    // The same words as those of the request, and of `report`; durations as the command line has them.
    let report = request(&site.client, "replicator.drift", json!({"replication": "ORDERS"})).await?;
    let fields = report["replications"][0]["fields"].as_array().context("fields")?;
    let found: Vec<_> = fields.iter().filter(|field| field["class"] != "expected").collect();
    let text = |value: &Value| match value {
        Value::String(text) => text.clone(),
        value => match value.as_u64() {
            Some(0) => "unlimited".to_owned(),
            Some(3_600_000_000_000) => "1h0m0s".to_owned(),
            _ => value.to_string().replace("null", "-"),
        },
    };
    let words = |field: &&Value| {
        let names = ["field", "source", "target", "wanted", "class", "reason"];
        names.map(|name| text(&field[name]))
    };
    assert_eq!(settings(&mut browser).await?, json!(found.iter().map(words).collect::<Vec<_>>()));
    let rows = request(&site.client, "replicator.report", json!({})).await?;
    let counts: Vec<_> =
        rows["replications"].as_array().context("rows")?.iter().map(|row| row["drift"].clone()).collect();
    assert_eq!(counts, [json!(1), json!(0)]);
    browser.picture("drift-1440-light").await?;
    browser.look(400, 900, "dark").await?;
    let over = browser.value("document.documentElement.scrollWidth - innerWidth").await?;
    assert!(over.as_i64() <= Some(0), "{over} pixels are cut off");
    browser.picture("drift-400-dark").await?;
    let series = "choria_stream_replicator_replicator_drift_settings{";
    let counted = async |id: &str, count: &str| {
        let (.., page) = get(&address, "/metrics", "").await.ok()?;
        let mut lines = page.lines().filter(|line| line.starts_with(series));
        lines.any(|line| line.contains(id) && line.ends_with(count)).then_some(())
    };
    wait_value("the metric", LIMIT, async || counted("\"ORDERS\"", " 1").await).await?;

    request(&site.client, "replicator.drift", json!({"replication": "ORDERS", "fix": true})).await?;
    browser.until("document.getElementById('drift-words').textContent.startsWith('None at')").await?;
    browser.until("document.getElementById('drifted').hidden").await?;
    wait_value("the metric", LIMIT, async || counted("\"ORDERS\"", " 0").await).await?;
    Ok(())
}

/// Opens the page, and waits until it is live.
pub async fn opened(browser: &mut Browser, address: &str) -> Result<()> {
    browser.open(&format!("http://{address}/")).await?;
    browser.until("document.getElementById('link').className === 'link live'").await
}

fn row_with(id: &str, text: &str) -> String {
    format!(
        "[...document.querySelectorAll('#rows tr')].some(tr => tr.querySelector('a').textContent === '{id}' && \
         tr.innerText.includes('{text}'))"
    )
}

#[tokio::test]
async fn a_browser_shows_changes_as_they_happen() -> Result<()> {
    let Some(mut browser) = Browser::start().await? else { return Ok(()) };
    let site = site().await?;
    let address = site.service.monitor().await?;
    site.replicate("ORDERS", 50).await?;
    browser.look(1440, 900, "light").await?;
    opened(&mut browser, &address).await?;
    browser.until(&row_with("ORDERS", "running")).await?;
    let seen = |what: &str, began: Instant| {
        println!("{what} is on the page {:?} after the service knew it", began.elapsed());
        assert!(began.elapsed() < SEEN, "{what}: {:?}", began.elapsed());
    };

    // A new replication, and one that its source does not have.
    site.filled("NEW", 5).await?;
    site.add("NEW", json!({})).await?;
    let began = Instant::now();
    browser.until(&row_with("NEW", "")).await?;
    seen("a new replication", began);
    site.add("MISSING", json!({})).await?;
    site.row_when("MISSING", "is held", |row| row["state"] == "held").await?;
    let began = Instant::now();
    browser.until(&row_with("MISSING", "held")).await?;
    seen("a hold", began);
    browser.until("document.getElementById('attention').innerText.includes('MISSING')").await?;
    let advice = browser.value("document.getElementById('attention').innerText").await?;
    assert!(advice.as_str().is_some_and(|text| text.contains("do: fix the cause")), "{advice}");
    assert!(browser.value("document.getElementById('announce').textContent").await?.as_str() != Some(""));

    // A stall: the consumer is deleted under the copy.
    site.settled("ORDERS", 50).await?;
    let mut raw = site.source().await?;
    let names = raw.api("CONSUMER.NAMES.ORDERS", Value::Null).await?;
    for name in names["consumers"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        raw.api(&format!("CONSUMER.DELETE.ORDERS.{name}"), Value::Null).await?;
    }
    site.publish("ORDERS", 51..=60).await?;
    site.events.ever("stalled").await?;
    let began = Instant::now();
    browser.until("[...document.querySelectorAll('#events b')].some(kind => kind.textContent === 'stalled')").await?;
    seen("a stall", began);
    Ok(())
}

#[tokio::test]
async fn texts_of_others_are_never_markup_in_a_browser() -> Result<()> {
    let Some(mut browser) = Browser::start().await? else { return Ok(()) };
    let control = Server::start(Role::Control).await?;
    let service = Service::builder(&control.url(), "TEST").args(["--monitor", "127.0.0.1:0"]).start().await?;
    let address = service.monitor().await?;
    opened(&mut browser, &address).await?;
    let client = connect(&control.url()).await?;
    let bucket = jetstream::new(client.clone()).get_key_value("REPLICATOR_CONFIG").await?;
    let document = json!({"stream": MARKUP, "description": MARKUP, "source_url": "nats://a", "target_url": "nats://b",
        "target_stream": MARKUP});
    bucket.put("EVIL", document.to_string().into()).await?;
    for (kind, time) in [("held", "2026-01-01T00:00:00Z"), (MARKUP, MARKUP)] {
        let event = json!({"kind": kind, "replication": MARKUP, "instance": MARKUP, "time": time, "message": MARKUP,
            MARKUP: MARKUP});
        client.publish("replicator.event.held.EVIL", event.to_string().into()).await?;
    }
    client.flush().await?;
    browser.until("document.getElementById('attention').innerText.includes('EVIL')").await?;
    browser.until("document.getElementById('events').innerText.includes('<img src=x')").await?;
    browser.open(&format!("http://{address}/#/replication/%3Cimg%20src=x%20onerror=%22window.harmed=3%22%3E")).await?;
    browser.until("document.getElementById('detail-title').textContent.startsWith('<img')").await?;
    browser.open(&format!("http://{address}/#filter=%3Cscript%3E")).await?;
    let made = browser.value("document.querySelectorAll('img, script:not([src])').length").await?;
    let harmed = browser.value("window.harmed === undefined").await?;
    assert_eq!((made, harmed), (json!(0), json!(true)));
    Ok(())
}

#[tokio::test]
async fn the_page_works_by_keyboard_address_and_filter() -> Result<()> {
    let Some(mut browser) = Browser::start().await? else { return Ok(()) };
    let site = site().await?;
    let address = site.service.monitor().await?;
    for stream in ["ALPHA", "BETA", "GAMMA"] {
        site.replicate(stream, 5).await?;
        site.settled(stream, 5).await?;
    }
    opened(&mut browser, &address).await?;
    browser.until("document.querySelectorAll('#rows tr').length === 3").await?;
    browser.press("/").await?;
    assert_eq!(browser.value("document.activeElement.id").await?, "filter");
    for key in ["b", "e", "t"] {
        browser.press(key).await?;
    }
    browser.until("document.querySelectorAll('#rows tr').length === 1 && location.hash === '#filter=bet'").await?;
    browser.open(&format!("http://{address}/#filter=state:running&sort=id&down=0")).await?;
    let ids = "[...document.querySelectorAll('#rows a')].map(a => a.textContent).join()";
    browser.until(&format!("{ids} === 'GAMMA,BETA,ALPHA'")).await?;
    let sorted = browser.value("document.querySelector('th[aria-sort]').getAttribute('aria-sort')").await?;
    assert_eq!(sorted, "descending");
    browser.value("document.querySelector('#rows a').focus()").await?;
    browser.press("ArrowDown").await?;
    assert_eq!(browser.value("document.activeElement.textContent").await?, "BETA");
    let ring = browser.value("getComputedStyle(document.activeElement).outlineStyle").await?;
    assert_eq!(ring, "solid");
    browser.press("Enter").await?;
    browser.until("document.getElementById('detail-title').textContent === 'BETA'").await?;
    assert_eq!(browser.value("location.hash").await?, "#/replication/BETA");
    assert_eq!(browser.value("document.activeElement.id").await?, "detail-title");
    browser.until("document.getElementById('facts').innerText.includes('one')").await?;
    browser.press("Escape").await?;
    browser.until("document.getElementById('detail').hidden").await?;
    assert_eq!(browser.value("document.activeElement.textContent").await?, "BETA");
    let rows = browser.value("document.getElementById('table').getAttribute('aria-rowcount')").await?;
    assert_eq!(rows, "4");
    Ok(())
}

/// Rows of the document are in the order that is seen.
pub const IN_ORDER: &str = "[...document.querySelectorAll('#rows tr')].map(tr => Number(tr.ariaRowIndex))\
                            .every((at, index, all) => index === 0 || at > all[index - 1])";

#[tokio::test]
async fn scrolled_rows_keep_their_order_and_the_focus() -> Result<()> {
    let Some(mut browser) = Browser::start().await? else { return Ok(()) };
    let site = site().await?;
    let address = site.service.monitor().await?;
    for number in 0..150 {
        site.put(&format!("R{number:03}"), "{}").await?;
    }
    browser.look(1440, 900, "light").await?;
    browser.open(&format!("http://{address}/#sort=id")).await?;
    browser.until("page.shown.length === 150 && document.querySelector('#rows a')?.textContent === 'R000'").await?;
    browser.value("document.querySelector('#rows a').focus()").await?;
    // Down in steps, each of which uses rows again, and to the end.
    for step in 1..=20 {
        browser
            .value(&format!("new Promise(done => {{ scrollTo(0, {step} * 370); requestAnimationFrame(done) }})"))
            .await?;
    }
    browser.value("document.getElementById('events').scrollIntoView({block: 'end'})").await?;
    let ids = "[...document.querySelectorAll('#rows a')].map(a => a.textContent)";
    browser.until(&format!("{ids}.includes('R149')")).await?;
    browser.until(IN_ORDER).await?;
    let rows = browser.value("document.querySelectorAll('#rows tr').length").await?;
    ensure!(rows.as_u64().is_some_and(|rows| rows < 60), "{rows} rows are in the document");
    // Each row is where its place in the list is, with the words of its replication.
    let wrong = "[...document.querySelectorAll('#rows tr')].filter(tr => { const row = page.shown[tr.ariaRowIndex - 2];\
                 const top = tr.getBoundingClientRect().top - document.getElementById('rows').getBoundingClientRect().top;\
                 return tr.querySelector('a').textContent !== row.id || Math.abs(top - 48 * row.at) > 1 }).length";
    assert_eq!(browser.value(wrong).await?, 0);
    assert_eq!(browser.value("document.activeElement.textContent").await?, "R000");
    browser.press("ArrowDown").await?;
    assert_eq!(browser.value("document.activeElement.textContent").await?, "R001");
    let seen = "(() => { const row = document.activeElement.closest('tr').getBoundingClientRect();\
                return row.top >= document.getElementById('table').tHead.getBoundingClientRect().bottom - 1\
                && row.bottom <= innerHeight + 1 })()";
    assert_eq!(browser.value(seen).await?, true, "the focused row is not in view");
    Ok(())
}

/// Words of the picture that lie on a box, on other words or on more than one line.
const HIDDEN_WORDS: &str = "(() => { const svg = document.querySelector('#topology svg');\
    const box = shape => shape.getBBox(), labels = [...svg.querySelectorAll('.label')].map(box);\
    const boxes = [...svg.querySelectorAll('rect')].map(box), lines = [...svg.querySelectorAll('path:not(.tip)')];\
    const over = (a, b) => a.x < b.x + b.width && b.x < a.x + a.width && a.y < b.y + b.height && b.y < a.y + a.height;\
    const on = (label, line) => Array.from({length: 200}, (_, at) => line.getPointAtLength(line.getTotalLength() * at / 199))\
        .some(({x, y}) => x > label.x && x < label.x + label.width && y > label.y && y < label.y + label.height);\
    return labels.filter((label, at) => boxes.some(other => over(label, other)) || lines.filter(line => on(label, line)).length > 1\
        || labels.some((other, index) => index !== at && over(label, other))).length; })()";

/// Kept below `target/tmp/status-page`, for review.
#[tokio::test]
async fn pictures_of_the_page_are_kept() -> Result<()> {
    let Some(mut browser) = Browser::start().await? else { return Ok(()) };
    let site = site().await?;
    let address = site.service.monitor().await?;
    for number in 1..=12 {
        site.replicate(&format!("ORDERS-{number}"), 20).await?;
    }
    let back = json!({"stream": "BACK", "source_url": site.target.url(), "target_url": site.source.url()});
    site.target_stream("BACK", json!({})).await?;
    request(&site.client, "replicator.config.add", back).await?;
    site.add("MISSING-STREAM", json!({})).await?;
    site.row_when("MISSING-STREAM", "is held", |row| row["state"] == "held").await?;
    site.ask("pause", "ORDERS-3").await?;
    site.put("BROKEN", "{}").await?;
    site.filled("SLOW", 5_000).await?;
    site.add("SLOW", json!({"limits": {"messages_per_second": 100}})).await?;
    for i in 0..5 {
        let place = json!({"stream": format!("EDGE-{i}"), "source_url": format!("nats://edge-{i}.example.net"),
            "target_url": site.source.url()});
        site.put(&format!("EDGE-{i}"), place.to_string()).await?;
    }
    opened(&mut browser, &address).await?;
    // Enough for lines to be drawn.
    browser.until("[...page.rows.values()].some(row => row.line.filter(rate => rate > 0).length >= 2)").await?;
    for colours in ["light", "dark"] {
        for width in [400, 800, 1440] {
            // So tall that all rows are drawn.
            browser.look(width, 2_400, colours).await?;
            browser.value("location.hash = ''").await?;
            browser.until("document.getElementById('detail').hidden").await?;
            let over = browser.value("document.documentElement.scrollWidth - innerWidth").await?;
            assert!(over.as_i64() <= Some(0), "{over} pixels are cut off at {width}");
            browser.until("document.querySelector('#topology svg') !== null").await?;
            assert_eq!(browser.value(HIDDEN_WORDS).await?, 0, "words of the topology are hidden at {width}");
            browser.picture(&format!("list-{width}-{colours}")).await?;
            browser.value("location.hash = '#/replication/SLOW'").await?;
            browser.until("document.querySelectorAll('.chart svg').length === 2").await?;
            browser.picture(&format!("detail-{width}-{colours}")).await?;
        }
    }
    Ok(())
}
