//! `report`: the figures of both sides, compared with those of the servers, and what fills the streams.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::harness::{
    Cluster, LIMIT, Raw, Role, SITE, Server, Service, Site, client::refused, request, secrets, server::free_port,
    wait_for,
};

async fn report(site: &Site) -> Result<Value> {
    request(&site.client, "replicator.report", Value::Null).await
}

fn rows<'a>(report: &'a Value, list: &str) -> Vec<&'a Value> {
    report[list].as_array().map(|rows| rows.iter().collect()).unwrap_or_default()
}

/// The one row of a stream at a side, by the cluster or server that has it.
fn stream<'a>(report: &'a Value, name: &str, cluster: &str) -> Result<&'a Value> {
    let found: Vec<_> =
        rows(report, "streams").into_iter().filter(|row| row["stream"] == name && row["cluster"] == cluster).collect();
    ensure!(found.len() == 1, "{} rows of `{name}` at `{cluster}` in {report:#}", found.len());
    Ok(found[0])
}

fn replication<'a>(report: &'a Value, id: &str) -> Result<&'a Value> {
    rows(report, "replications").into_iter().find(|row| row["replication"] == id).with_context(|| format!("{report:#}"))
}

/// The figures of a row are those of `STREAM.INFO`, one by one.
fn same_figures(row: &Value, info: &Value) -> Result<()> {
    let state = &info["state"];
    let number = |value: &Value| value.as_u64().unwrap_or_default();
    let lost = state["lost"]["msgs"].as_array().map_or(0, Vec::len) as u64;
    let kind = match (&info["config"]["mirror"], &info["config"]["sources"]) {
        (Value::Object(_), _) => "mirror",
        (_, Value::Array(_)) => "source",
        _ => "stream",
    };
    let expect = json!({
        "stream": info["config"]["name"], "storage": info["config"]["storage"], "kind": kind,
        "replicas": info["config"]["num_replicas"], "consumers": number(&state["consumer_count"]),
        "messages": number(&state["messages"]), "bytes": number(&state["bytes"]), "lost": lost,
        "deleted": number(&state["num_deleted"]), "first_seq": number(&state["first_seq"]),
        "last_seq": number(&state["last_seq"]), "domain": info["domain"], "error": null,
    });
    for (field, value) in expect.as_object().context("fields")? {
        ensure!(row[field] == *value, "{field} is {} and not {value}\n{row:#}\n{info:#}", row[field]);
    }
    Ok(())
}

async fn info(raw: &mut Raw, stream: &str) -> Result<Value> {
    raw.api(&format!("STREAM.INFO.{stream}"), Value::Null).await
}

#[tokio::test]
async fn figures_are_those_of_the_servers() -> Result<()> {
    let server = |role, name: &str| Server::builder(role).name(name).start();
    let (east, west) = tokio::try_join!(server(Role::Source, "east"), server(Role::Target, "west"))?;
    let site = Site::builder().on(east, west).start().await?;
    let mut source = site.source().await?;
    source.create_stream("BASE", json!({"subjects": ["base.>"], "storage": "memory"})).await?;
    site.filled("ORDERS", 50).await?;
    for seq in [10, 11, 30] {
        source.api("STREAM.MSG.DELETE.ORDERS", json!({"seq": seq})).await?;
    }
    // The servers have a mirror and a source of their own.
    source.create_stream("MIRRORED", json!({"subjects": null, "mirror": {"name": "ORDERS"}})).await?;
    source.create_stream("JOINED", json!({"subjects": ["joined.>"], "sources": [{"name": "BASE"}]})).await?;
    source
        .api(
            "CONSUMER.CREATE.ORDERS.mine",
            json!({"stream_name": "ORDERS",
        "config": {"name": "mine", "durable_name": "mine", "ack_policy": "explicit"}}),
        )
        .await?;
    site.add("ORDERS", json!({})).await?;
    site.settled("ORDERS", 50).await?;
    site.add("MIRRORED", json!({"target_subject_prefix": "m"})).await?;
    site.settled("MIRRORED", 50).await?;
    site.add("JOINED", json!({})).await?;
    site.row_when("JOINED", "runs", |row| row["state"] == "running").await?;

    let mut target = site.target().await?;
    // Consumers of the copies come and go, so both sides are compared until they agree.
    let mut last = None;
    let agree = wait_for("the figures to agree", LIMIT, async || {
        let compared = async {
            let shown = report(&site).await?;
            for name in ["ORDERS", "MIRRORED", "JOINED"] {
                same_figures(stream(&shown, name, "east")?, &info(&mut source, name).await?)?;
                same_figures(stream(&shown, name, "west")?, &info(&mut target, name).await?)?;
            }
            anyhow::Ok(shown)
        };
        last = Some(compared.await);
        matches!(last, Some(Ok(_)))
    });
    agree.await.with_context(|| format!("{last:?}"))?;
    let shown = last.context("a report")??;
    let orders = stream(&shown, "ORDERS", "east")?;
    assert_eq!((&orders["messages"], &orders["deleted"]), (&json!(47), &json!(3)), "{orders}");
    assert_eq!(rows(&shown, "streams").len(), 6, "{shown:#}");

    let copy = replication(&shown, "ORDERS")?;
    assert_eq!(
        (&copy["kind"], &copy["stream"], &copy["source_stream"]),
        (&json!("copy"), &json!("ORDERS"), &json!("ORDERS"))
    );
    assert_eq!((&copy["lag"], &copy["state"], &copy["error"]), (&json!(0), &json!("running"), &Value::Null), "{copy}");
    assert_eq!((&copy["from"], &copy["active"]), (&json!(site.source.url()), &json!(0.0)), "{copy}");
    assert_eq!((&copy["source"], &copy["target"]), (&orders["node"], &stream(&shown, "ORDERS", "west")?["node"]));

    let native: Vec<_> = rows(&shown, "native");
    assert_eq!(native.len(), 2, "{shown:#}");
    let find = |name: &str| native.iter().find(|row| row["stream"] == name).context("a native row");
    let (mirror, joined) = (find("MIRRORED")?, find("JOINED")?);
    assert_eq!((&mirror["kind"], &mirror["source_stream"]), (&json!("mirror"), &json!("ORDERS")), "{mirror}");
    assert_eq!((&mirror["lag"], &mirror["source"]), (&json!(0), &orders["node"]), "{mirror}");
    let told = info(&mut source, "MIRRORED").await?;
    assert_eq!((&told["mirror"]["name"], &told["mirror"]["lag"]), (&json!("ORDERS"), &json!(0)));
    assert!(mirror["active"].as_f64().is_some_and(|seconds| seconds < 60.0), "{mirror}");
    // BASE is in no replication.
    assert_eq!(
        (&joined["kind"], &joined["source_stream"], &joined["source"]),
        (&json!("source"), &json!("BASE"), &Value::Null)
    );
    Ok(())
}

#[tokio::test]
async fn streams_of_three_domains_are_told_apart() -> Result<()> {
    let server = |role, domain: &str| Server::builder(role).name(domain).domain(domain).start();
    let (hub, east) = tokio::try_join!(server(Role::Target, "hub"), server(Role::Source, "east"))?;
    let west = server(Role::Source, "west").await?;
    let site = Site::builder().on(east, hub).start().await?;
    site.filled("ORDERS", 20).await?;
    let mut far = Raw::connect(&west.url()).await?;
    far.create_stream("ORDERS", json!({"subjects": ["orders.>"]})).await?;
    site.add("ORDERS", json!({"source_domain": "east", "target_domain": "hub"})).await?;
    let west_fields =
        json!({"name": "west", "source_url": west.url(), "target_stream": "WEST", "target_subject_prefix": "west"});
    site.add("ORDERS", west_fields).await?;
    // The same stream under another address and another prefix is one row.
    let by_name = site.source.url().replace("127.0.0.1", "localhost");
    site.add(
        "ORDERS",
        json!({"name": "again", "source_url": by_name, "target_stream": "AGAIN", "target_subject_prefix": "again"}),
    )
    .await?;
    site.settled("ORDERS", 20).await?;
    site.settled("ORDERS.again", 20).await?;
    site.row_when("ORDERS.west", "runs", |row| row["state"] == "running").await?;
    let shown = report(&site).await?;
    let mut all: Vec<_> =
        rows(&shown, "streams").into_iter().map(|row| (row["stream"].to_string(), row["domain"].to_string())).collect();
    all.sort();
    let pair = |stream: &str, domain: &str| (format!("\"{stream}\""), format!("\"{domain}\""));
    let expect = [
        pair("AGAIN", "hub"),
        pair("ORDERS", "east"),
        pair("ORDERS", "hub"),
        pair("ORDERS", "west"),
        pair("WEST", "hub"),
    ];
    assert_eq!(all, expect, "{shown:#}");
    for (name, domain, url) in
        [("ORDERS", "east", site.source.url()), ("ORDERS", "hub", site.target.url()), ("ORDERS", "west", west.url())]
    {
        same_figures(stream(&shown, name, domain)?, &info(&mut Raw::connect(&url).await?, name).await?)?;
    }
    assert_eq!(replication(&shown, "ORDERS.again")?["source"], replication(&shown, "ORDERS")?["source"], "{shown:#}");
    assert_ne!(replication(&shown, "ORDERS.west")?["source"], replication(&shown, "ORDERS")?["source"], "{shown:#}");
    Ok(())
}

#[tokio::test]
async fn a_cluster_and_its_replicas_are_shown() -> Result<()> {
    let cluster = Cluster::start(Role::Target).await?;
    let site = Site::small().await?;
    site.filled("ORDERS", 10).await?;
    cluster.create_stream("ORDERS", json!({"subjects": ["orders.>"]})).await?;
    site.add("ORDERS", json!({"target_url": cluster.url()})).await?;
    site.settled("ORDERS", 10).await?;
    let shown = report(&site).await?;
    let row = stream(&shown, "ORDERS", "Target")?;
    assert_eq!((&row["replicas"], &row["messages"]), (&json!(3), &json!(10)), "{row}");
    let leader = cluster.leader("ORDERS").await.context("a leader")?;
    assert_eq!(row["leader"], cluster.servers[leader].name(), "{row}");
    Ok(())
}

/// What this service feeds is one row, with what the target's server says of it.
#[tokio::test]
async fn a_mirror_that_is_fed_is_one_row() -> Result<()> {
    let port = free_port()?;
    let leafnodes = format!("leafnodes {{ listen: \"127.0.0.1:{port}\" }}");
    let target = Server::builder(Role::Target).name("west").config(&leafnodes).start().await?;
    let site = Site::builder().on(Server::start(Role::Source).await?, target).start().await?;
    site.filled("ORDERS", 30).await?;
    site.add("ORDERS", json!({"kind": "mirror", "target_leaf_url": format!("nats-leaf://127.0.0.1:{port}")})).await?;
    site.settled("ORDERS", 30).await?;
    let shown = report(&site).await?;
    assert_eq!(rows(&shown, "native").len(), 0, "{shown:#}");
    let row = replication(&shown, "ORDERS")?;
    assert_eq!(
        (&row["kind"], &row["lag"], &row["from"]),
        (&json!("mirror"), &json!(0), &json!(site.source.url())),
        "{row}"
    );
    assert!(row["active"].as_f64().is_some_and(|seconds| seconds < 60.0), "{row}");
    same_figures(stream(&shown, "ORDERS", "west")?, &info(&mut site.target().await?, "ORDERS").await?)?;
    assert_eq!(stream(&shown, "ORDERS", "west")?["kind"], "mirror");
    Ok(())
}

/// One server is frozen, one refuses the login, one stream does not exist: all others have their figures, in time.
#[tokio::test]
async fn what_does_not_answer_says_why() -> Result<()> {
    let site = Site::start().await?;
    site.replicate("ORDERS", 10).await?;
    site.settled("ORDERS", 10).await?;
    let frozen = Server::start(Role::Source).await?;
    let locked = Server::builder(Role::Source).config("authorization { user: u, password: right }").start().await?;
    let wrong = secrets::secret();
    site.add("FROZEN", json!({"source_url": frozen.url()})).await?;
    site.add("LOCKED", json!({"source_url": locked.url_as(&format!("u:{wrong}"))})).await?;
    site.add("MISSING", json!({})).await?;
    site.put("BROKEN", "{}").await?;
    site.row_when("BROKEN", "is invalid", |row| row["state"] == "invalid").await?;
    site.row_when("LOCKED", "has an error", |row| row["last_error"]["current"] == true).await?;
    frozen.freeze()?;
    let begun = Instant::now();
    let shown = report(&site).await?;
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    frozen.thaw()?;
    let error = |name: &str, at: &Server| {
        let port = at.port().to_string();
        let of = |row: &&Value| row["stream"] == name && row["url"].as_str().is_some_and(|url| url.contains(&port));
        let row = rows(&shown, "streams").into_iter().find(of).with_context(|| format!("{shown:#}"))?;
        ensure!(row["messages"].is_null() && row["cluster"].is_null(), "{row}");
        Ok(row["error"].as_str().unwrap_or_default().to_owned())
    };
    assert_eq!(error("FROZEN", &frozen)?, "no answer in time");
    assert!(error("LOCKED", &locked)?.to_lowercase().contains("authorization"), "{}", error("LOCKED", &locked)?);
    assert_eq!(error("MISSING", &site.source)?, "stream `MISSING` does not exist");
    assert_eq!(stream(&shown, "ORDERS", site.source.name())?["messages"], 10, "{shown:#}");
    let broken = replication(&shown, "BROKEN")?;
    assert_eq!((&broken["state"], &broken["source"], &broken["lag"]), (&json!("invalid"), &Value::Null, &Value::Null));
    assert!(broken["error"].as_str().is_some_and(|error| error.contains("cannot run")), "{broken}");
    let locked = replication(&shown, "LOCKED")?;
    assert!(locked["from"].as_str().is_some_and(|from| from.starts_with("nats://u:***@")), "{locked}");
    assert!(locked["error"].is_string() && locked["active"].is_null(), "{locked}");
    Ok(())
}

#[tokio::test]
async fn every_instance_knows_what_the_others_run() -> Result<()> {
    let site = Site::builder().args(["--instance", "one"]).start().await?;
    let second = Service::builder(&site.service_url(), SITE).instance("two").start().await?;
    let both = async || request(&site.client, "replicator.instances", Value::Null).await.is_ok_and(|r| r["total"] == 2);
    wait_for("both instances", LIMIT, both).await?;
    for index in 0..8 {
        let id = format!("S{index}");
        site.filled(&id, 3).await?;
        site.add(&id, json!({})).await?;
    }
    for index in 0..8 {
        site.settled(&format!("S{index}"), 3).await?;
    }
    let mut others = BTreeSet::new();
    // Each answers for all; only its own are known to it without delay.
    wait_for("an answer of each instance", LIMIT, async || {
        let leaders = async || anyhow::Ok(request(&site.client, "replicator.status", Value::Null).await?);
        let (Ok(shown), Ok(status)) = (report(&site).await, leaders().await) else { return false };
        let active: Vec<_> = rows(&shown, "replications").iter().filter_map(|row| row["active"].as_f64()).collect();
        assert_eq!(active.len(), 8, "{shown:#}");
        assert!(active.iter().all(|seconds| *seconds < 60.0), "{shown:#}");
        for (row, seconds) in rows(&status, "replications").into_iter().zip(&active) {
            if *seconds > 0.0 {
                others.insert(row["leader"].to_string());
            }
        }
        others.len() == 2
    })
    .await?;
    drop(second);
    Ok(())
}

#[tokio::test]
async fn pages_hold_what_one_message_holds() -> Result<()> {
    let control = Server::builder(Role::Control).config("max_payload: 16384").start().await?;
    let site = Site::builder().control(control).start().await?;
    for index in 0..30 {
        let id = format!("S{index:02}");
        site.filled(&id, 1).await?;
        site.add(&id, json!({})).await?;
    }
    site.copied("S29", 1).await?;
    let first = report(&site).await?;
    let shown = rows(&first, "replications").len();
    assert!((2..30).contains(&shown), "{shown}");
    assert_eq!((&first["total"], &first["offset"]), (&json!(30), &json!(0)), "{first:#}");
    assert_eq!(rows(&first, "streams").len(), 2 * shown, "{first:#}");
    let one = request(&site.client, "replicator.report", json!({"offset": 29, "limit": 5})).await?;
    assert_eq!(rows(&one, "replications").len(), 1, "{one:#}");
    assert_eq!(rows(&one, "replications")[0]["replication"], "S29");
    refused(&site.send("report", json!({"stream": "S"})).await?, 400, "unknown field `stream`");
    // The command joins the pages.
    let all = site.cli().json(["report"]).await?;
    assert_eq!((rows(&all, "replications").len(), rows(&all, "streams").len()), (30, 60), "{all:#}");
    Ok(())
}

#[tokio::test]
async fn a_read_only_service_asks_no_server() -> Result<()> {
    let site = Site::builder().args(["--read-only"]).start().await?;
    site.filled("A", 10).await?;
    site.put("A", site.document("A").to_string()).await?;
    site.settled("A", 10).await?;
    let shown = report(&site).await?;
    assert_eq!(replication(&shown, "A")?["lag"], 0, "{shown:#}");
    let unknown =
        |row: &Value| row["messages"].is_null() && row["error"].as_str().is_some_and(|e| e.contains("read-only"));
    assert!(rows(&shown, "streams").len() == 2 && rows(&shown, "streams").into_iter().all(unknown), "{shown:#}");
    Ok(())
}

#[tokio::test]
async fn the_command_prints_tables_and_draws_pictures() -> Result<()> {
    let server = |role, name: &str| Server::builder(role).name(name).start();
    let (east, west) = tokio::try_join!(server(Role::Source, "east"), server(Role::Target, "west"))?;
    let site = Site::builder().on(east, west).start().await?;
    site.replicate("ORDERS", 1500).await?;
    site.settled("ORDERS", 1500).await?;
    site.add("MISSING", json!({})).await?;
    site.row_when("MISSING", "is held", |row| row["state"] == "held").await?;
    let cli = site.cli();
    let text = cli.ok(["report"]).await?;
    let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let lines: Vec<_> = text.lines().map(words).collect();
    let head = "STREAM CLUSTER STORAGE KIND REPLICAS CONSUMERS MESSAGES BYTES LOST DELETED ERROR";
    assert_eq!(lines[0].join(" "), head, "{text}");
    let orders = lines.iter().find(|line| line.starts_with(&["ORDERS".into(), "west".into()])).context("a row")?;
    assert_eq!(orders[2..7], ["file", "Stream", "1", "0", "1,500"], "{text}");
    let head = "STREAM KIND FROM SOURCE STREAM ACTIVE LAG REPLICATION STATE DRIFT ERROR";
    assert!(lines.iter().any(|line| line.join(" ") == head), "{text}");
    let copy = lines
        .iter()
        .find(|line| line.get(1).is_some_and(|kind| kind == "Copy") && line[0] == "ORDERS")
        .context("a row")?;
    assert_eq!(copy[2..], [site.source.url().as_str(), "ORDERS", "0s", "0", "ORDERS", "running", "0"], "{text}");
    assert!(text.contains("stream `MISSING` does not exist"), "{text}");

    let folder = tempfile::tempdir()?;
    let (dot, svg) = (folder.path().join("all.dot"), folder.path().join("all.svg"));
    let printed = cli.ok(["report", "--dot", &dot.to_string_lossy(), "--svg", &svg.to_string_lossy()]).await?;
    assert_eq!(printed, "");
    let graph = std::fs::read_to_string(&dot)?;
    assert!(
        graph.contains("label=\"Copy ORDERS\\nlag 0\"") && graph.contains("ORDERS\\neast\\n1,500 messages, "),
        "{graph}"
    );
    assert_eq!(cli.ok(["report", "--dot", "-"]).await?.lines().next(), Some("digraph replications {"));
    let picture = std::fs::read_to_string(&svg)?;
    assert!(picture.contains(">Copy ORDERS</text>") && picture.contains(">west</text>"), "{picture}");
    well_formed(&svg)?;
    let ended = cli.run(["report", "--svg", "/nonexistent/x.svg"]).await?;
    crate::harness::cli::failed(&ended, &["cannot write `/nonexistent/x.svg`"]);
    Ok(())
}

/// By an XML parser where there is one.
fn well_formed(file: &std::path::Path) -> Result<()> {
    let parse = "import sys, xml.dom.minidom; xml.dom.minidom.parse(sys.argv[1])";
    match std::process::Command::new("python3").args(["-c", parse]).arg(file).output() {
        Ok(ended) => ensure!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr)),
        Err(error) => println!("skipped: the picture is not parsed, python3 cannot run: {error}"),
    }
    Ok(())
}
