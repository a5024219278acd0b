//! The pages in `docs/` are right: everything that they show is sent, and they describe everything that there is.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::{Value, json};
use stream_replicator::config;
use stream_replicator::events::Event;
use stream_replicator::status::{LastError, Row, State};

use crate::harness::client::{ask, connect, request};
use crate::harness::raw::wait_messages;
use crate::harness::server::free_port;
use crate::harness::{LIMIT, Outgoing, Raw, Role, SITE, Server, Service, Site, wait_for, wait_value, wire};

/// One `nats req` of the page and what it answers.
#[derive(Debug)]
struct Example {
    line: usize,
    endpoint: String,
    headers: Vec<(String, String)>,
    body: String,
    /// `None` where the page does not show it.
    reply: Option<Value>,
}

impl Example {
    fn is_refused(&self) -> bool {
        self.reply.as_ref().is_some_and(|reply| reply.get("error").is_some())
    }
}

#[test]
fn documented_requests_and_replies_follow_the_schemas() -> Result<()> {
    for example in examples(&page("docs/requests.md")?)? {
        let Example { line, endpoint, body, reply, .. } = &example;
        let subject = format!("replicator.{endpoint}");
        let context = || format!("docs/requests.md:{line}");
        if !example.is_refused() {
            wire::check_request(&subject, body.as_bytes()).with_context(context)?;
        }
        if let Some(reply) = reply {
            wire::check_reply(&subject, example.is_refused(), reply).with_context(context)?;
        }
    }
    Ok(())
}

/// From top to bottom, as a reader would who tries everything.
#[tokio::test]
async fn documented_requests_are_answered_as_documented() -> Result<()> {
    // Mirrors need a leafnode port.
    let leaf = free_port()?;
    let leafnodes = format!("leafnodes {{ listen: \"127.0.0.1:{leaf}\" }}");
    let target = Server::builder(Role::Target).config(&leafnodes).start().await?;
    let site = Site::builder().on(Server::start(Role::Source).await?, target).start().await?;
    let page = page("docs/requests.md")?;
    let examples = examples(&page)?;
    let mut answered = BTreeSet::new();
    let served = endpoints(&site).await?;
    prepare(&site).await?;
    let mut second = None;
    for example in &examples {
        before(&site, example).await?;
        if example.endpoint == "promote" {
            let fields = json!({"kind": "mirror", "target_leaf_url": format!("nats-leaf://127.0.0.1:{leaf}")});
            site.filled("LEDGER", 3).await?;
            site.add("LEDGER", fields).await?;
            site.settled("LEDGER", 3).await?;
        }
        if example.endpoint == "dlq.list" {
            site.source_stream("DEAD", json!({"subjects": ["dead.>"]})).await?;
            site.source_stream("CRATES", json!({})).await?;
            site.target_stream("CRATES", json!({"max_msg_size": 512})).await?;
            for _ in 0..2 {
                site.source().await?.publish(&Outgoing::new("crates.1", "x".repeat(1000))).await?;
            }
            site.add("CRATES", json!({"on_reject": "dead_letter", "dead_letter": {"subject": "dead.crates"}})).await?;
            site.settled("CRATES", 2).await?;
        }
        if example.endpoint == "consumers.export" {
            let config = json!({"name": "billing", "durable_name": "billing", "ack_policy": "explicit"});
            let body = json!({"stream_name": "ORDERS", "config": config});
            site.source().await?.api("CONSUMER.DURABLE.CREATE.ORDERS.billing", body).await?;
        }
        if example.endpoint == "dlq.replay" {
            let mut target = site.target().await?;
            let mut config = target.api("STREAM.INFO.CRATES", Value::Null).await?["config"].take();
            config["max_msg_size"] = (-1).into();
            target.api("STREAM.UPDATE.CRATES", config).await?;
        }
        if example.endpoint == "verify.status" {
            site.row_when("NODES", "is compared", |row| row["verify"]["state"] == "done").await?;
        }
        if example.endpoint == "verify.cancel" {
            site.send("verify", json!({"replication": "ORDERS", "rate": 1})).await?;
        }
        if example.endpoint == "stepdown" {
            second = Some(another_instance(&site).await?);
        }
        let body = on_this_site(&site, &example.body);
        let mut reply = match example.headers.as_slice() {
            [] => site.ask(&example.endpoint, &body).await?.body,
            [(name, value)] => site.ask_with(&example.endpoint, (name, value), body).await?.body,
            _ => bail!("line {}: one header at most", example.line),
        };
        if example.endpoint == "stepdown" && reply["to"].is_null() {
            // A slow machine may need longer than the answer waits.
            let another = |row: &Value| row["leader"].is_string() && row["leader"] != reply["from"];
            reply["to"] = site.row_when("ORDERS", "is led by another one", another).await?["leader"].take();
        }
        if let Some(expect) = &example.reply {
            // An error says the same everywhere, word for word.
            let same = if example.is_refused() { reply == *expect } else { true };
            let same = if same { same_shape("", expect, &reply) } else { Err(anyhow!("other words are documented")) };
            same.with_context(|| format!("docs/requests.md:{}: {reply} is answered", example.line))?;
            if !example.is_refused() {
                answered.insert(example.endpoint.clone());
            }
        } else {
            ensure!(reply.get("error").is_none(), "docs/requests.md:{}: {reply} is answered", example.line);
            answered.insert(example.endpoint.clone());
        }
    }
    drop(second);
    for (endpoint, group) in served {
        let heading = format!("### `replicator.{endpoint}`\n");
        let (_, section) = page.split_once(&heading).with_context(|| format!("{endpoint} has no section"))?;
        let section = section.split("\n##").next().unwrap_or_default();
        ensure!(answered.contains(&endpoint), "{endpoint} has no example that is served");
        let who = if group.is_empty() { "Every instance answers" } else { "One instance answers" };
        ensure!(section.contains(who), "{endpoint}: \"{who}\" is not said");
        for direction in ["request", "reply"] {
            let link = format!("(../schemas/{endpoint}.{direction}.json)");
            ensure!(section.contains(&link), "{endpoint}: no link to the schema of its {direction}");
        }
    }
    Ok(())
}

/// The file of the page is started with, then its requests are sent from top to bottom.
#[tokio::test]
async fn documented_heartbeats_are_published() -> Result<()> {
    let page = page("docs/heartbeats.md")?;
    let (_, yaml) = page.split_once("```yaml\n").context("no YAML")?;
    let (yaml, _) = yaml.split_once("```").context("no end of the YAML")?;
    let source = Server::start(Role::Source).await?;
    let place = source.url().trim_start_matches("nats://").to_owned();
    let mut raw = Raw::connect(&source.url()).await?;
    raw.create_stream("HB", json!({"subjects": ["heartbeats.>"]})).await?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("site.yaml");
    std::fs::write(&file, yaml.replace("nats.east.example.net:4222", &place))?;
    let file = file.display().to_string();
    let service = Service::builder(&source.url(), "US-EAST").args(["--config", file.as_str()]).start().await?;
    wait_messages(&mut raw, "HB", 4, LIMIT).await.with_context(|| service.log())?;
    let stored = raw.read_stream("HB").await?;
    let often = stored.iter().filter(|message| message.subject == "heartbeats.us-east.often");
    for message in often.clone() {
        let lines = ["X-Site: us-east", "X-Pace: often", "Choria-SR-Subject: heartbeats.us-east.often"];
        let header = String::from_utf8_lossy(&message.header);
        ensure!(lines.iter().all(|line| header.contains(line)), "{header}");
    }
    ensure!(often.count() >= 3, "{stored:?}");
    let client = connect(&source.url()).await?;
    for Example { line, endpoint, body, reply, .. } in examples(&page)? {
        let body = body.replace("nats.east.example.net:4222", &place);
        let sent = ask(&client, &format!("replicator.{endpoint}"), body.as_bytes()).await?.body;
        same_shape("", &reply.context("a reply")?, &sent)
            .with_context(|| format!("docs/heartbeats.md:{line}: {sent}"))?;
    }
    Ok(())
}

/// Users with exactly the permissions of the page: a copy of each kind of source, over a restart.
#[tokio::test]
async fn documented_permissions_suffice() -> Result<()> {
    let page = page("docs/permissions.md")?;
    let blocks: Vec<&str> =
        page.split("```\npermissions {").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    let [control, source, queue, target, ..] = blocks.as_slice() else { bail!("{} blocks", blocks.len()) };
    let user = |name: &str, block: &str| format!("{{ user: {name}, password: p, permissions {{{block} }}");
    let config = |users: &[String]| {
        let all = "{ user: all, password: p }".to_owned();
        format!("authorization {{ users: [{}] }}", [users, &[all]].concat().join(", "))
    };
    let queue = queue.replace("ORDERS", "QUEUE");
    let target = target.replace("\"orders.>\"", "\"orders.>\", \"queue.>\"");
    let both = format!("{}\n{}", target, target.replace("ORDERS", "QUEUE"));
    let lines =
        |permissions: &str| permissions.lines().filter(|line| line.contains("    \"")).collect::<Vec<_>>().join("\n");
    let target = format!("\n  publish: [\n{}\n  ]\n  subscribe: \"_INBOX.>\"\n}}", lines(&both));
    let source_server = Server::builder(Role::Source).config(&config(&[user("orders", source), user("queue", &queue)]));
    let target_server = Server::builder(Role::Target).config(&config(&[user("copies", &target)]));
    let control_server = Server::builder(Role::Control).config(&config(&[user("service", control)]));
    let (source, target) = tokio::try_join!(source_server.start(), target_server.start())?;
    let control = control_server.start().await?;
    let service = Service::builder(&control.url_as("service:p"), SITE);
    let mut service = service.args(["--monitor", "127.0.0.1:0"]).start().await?;
    let client = connect(&control.url_as("all:p")).await?;
    let mut raw = Raw::connect(&source.url_as("all:p")).await?;
    raw.create_stream("ORDERS", json!({"subjects": ["orders.>"]})).await?;
    raw.create_stream("QUEUE", json!({"subjects": ["queue.>"], "retention": "workqueue"})).await?;
    let mut copies = Raw::connect(&target.url_as("all:p")).await?;
    let mut published = 0;
    for round in 0..2 {
        for stream in ["ORDERS", "QUEUE"] {
            let subject = stream.to_lowercase();
            if round == 0 {
                let login = |server: &Server, user: &str| server.url_as(&format!("{user}:p"));
                let document = json!({"stream": stream, "source_url": login(&source, &subject),
                    "target_url": login(&target, "copies")});
                let report = request(&client, "replicator.config.validate", document.clone()).await?;
                let warnings = report["warnings"].as_array().context("warnings")?;
                ensure!(report["valid"] == true && warnings.is_empty(), "{report:#}");
                request(&client, "replicator.config.add", document).await?;
            }
            raw.publish_all((0..50).map(|n| Outgoing::new(format!("{subject}.a"), n.to_string()))).await?;
        }
        published += 50;
        for stream in ["ORDERS", "QUEUE"] {
            let copied = wait_messages(&mut copies, stream, published, LIMIT).await;
            copied.with_context(|| service.log())?;
        }
        service.stop().await?;
        service.restart().await?;
    }
    // What is asked of both sides by request needs no more.
    let report = request(&client, "replicator.report", json!({})).await?;
    let streams = report["streams"].as_array().context("streams")?;
    ensure!(streams.len() == 4 && streams.iter().all(|stream| stream["messages"].is_u64()), "{report:#}");
    let drift = request(&client, "replicator.drift", json!({})).await?;
    let rows = drift["replications"].as_array().context("rows")?;
    ensure!(rows.len() == 2 && rows.iter().all(|row| row["error"].is_null()), "{drift:#}");
    request(&client, "replicator.verify", json!({"replication": "ORDERS"})).await?;
    let verified = async || {
        let asked = request(&client, "replicator.verify.status", json!({"replication": "ORDERS"})).await.ok()?;
        let result = asked["verification"].clone();
        (result["state"] == "done").then_some(result)
    };
    let result = wait_value("the result of verify", LIMIT, verified).await.with_context(|| service.log())?;
    ensure!(result["findings"] == 0 && result["source_messages"] == 100, "{result:#}");
    for log in [source.log(), target.log(), control.log()] {
        let refused = log.lines().find(|line| line.to_lowercase().contains("violation"));
        ensure!(refused.is_none(), "{}", refused.unwrap_or_default());
    }
    for id in ["ORDERS", "QUEUE"] {
        request(&client, "replicator.pause", json!({"replication": id})).await?;
        request(&client, "replicator.config.delete", json!({"replication": id})).await?;
    }
    ensure!(!service.logs().to_lowercase().contains("violation"), "{}", service.logs());
    Ok(())
}

/// The subjects that one column of the table of requests adds.
fn added(page: &str, column: usize) -> Result<String> {
    let (_, rest) = page.split_once("## Requests").context("requests")?;
    let (table, _) = rest.split_once("\n## ").context("an end")?;
    let cells = table.lines().filter_map(|line| line.split('|').nth(column));
    let subjects = cells.flat_map(|cell| cell.split('`').skip(1).step_by(2)).filter(|word| word.starts_with('$'));
    let lines: Vec<_> = subjects.map(|subject| format!("    \"{subject}\"")).collect();
    ensure!(!lines.is_empty(), "{table}");
    Ok(lines.join("\n"))
}

/// Users with what the table of requests adds: each request does its work, and no server refuses anything.
#[tokio::test]
async fn documented_permissions_of_requests_suffice() -> Result<()> {
    let page = page("docs/permissions.md")?;
    let blocks: Vec<&str> =
        page.split("```\npermissions {").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    let [_, source, _, target, ..] = blocks.as_slice() else { bail!("{} blocks", blocks.len()) };
    let config = |block: &str, more: &str| {
        let block = block.replacen("publish: [", &format!("publish: [\n{more}"), 1);
        format!(
            "authorization {{ users: [{{ user: one, password: p, permissions {{{block} }}, {{ user: all, password: p }}] }}"
        )
    };
    let at_source = format!("{}\n    \"dead.orders\"", added(&page, 2)?);
    let source = Server::builder(Role::Source).config(&config(source, &at_source)).start().await?;
    let target = Server::builder(Role::Target).config(&config(target, &added(&page, 3)?)).start().await?;
    let control = Server::start(Role::Control).await?;
    let service = Service::builder(&control.url(), SITE).start().await?;
    let client = connect(&control.url()).await?;
    let mut raw = Raw::connect(&source.url_as("all:p")).await?;
    raw.create_stream("ORDERS", json!({"subjects": ["orders.>"]})).await?;
    raw.create_stream("DEAD", json!({"subjects": ["dead.>"]})).await?;
    let durable = json!({"stream_name": "ORDERS", "config": {"name": "bills", "durable_name": "bills", "ack_policy": "explicit"}});
    raw.api("CONSUMER.DURABLE.CREATE.ORDERS.bills", durable).await?;
    let mut copies = Raw::connect(&target.url_as("all:p")).await?;
    let mut there = json!({"subjects": ["orders.>"], "max_msg_size": 1_000});
    copies.create_stream("ORDERS", there.clone()).await?;
    let payload = |n: usize| if n < 2 { "x".repeat(2_000) } else { n.to_string() };
    raw.publish_all((0..10).map(|n| Outgoing::new(format!("orders.{n}"), payload(n)))).await?;
    let document = json!({"stream": "ORDERS", "source_url": source.url_as("one:p"), "target_url": target.url_as("one:p"),
        "on_reject": "dead_letter", "dead_letter": {"subject": "dead.orders"}});
    request(&client, "replicator.config.add", document).await?;
    wait_messages(&mut raw, "DEAD", 2, LIMIT).await.with_context(|| service.log())?;
    wait_messages(&mut copies, "ORDERS", 8, LIMIT).await.with_context(|| service.log())?;

    let one = |fields: Value| {
        let mut body = json!({"replication": "ORDERS"});
        fields.as_object().into_iter().flatten().for_each(|(name, value)| body[name] = value.clone());
        body
    };
    let listed = request(&client, "replicator.dlq.list", one(json!({}))).await?;
    ensure!(listed["letters"].as_array().is_some_and(|letters| letters.len() == 2), "{listed:#}");
    request(&client, "replicator.dlq.show", one(json!({"letter": 1}))).await?;
    request(&client, "replicator.dlq.drop", one(json!({"letters": [1]}))).await?;
    (there["name"], there["max_msg_size"]) = ("ORDERS".into(), (-1).into());
    copies.api("STREAM.UPDATE.ORDERS", there).await?;
    let replayed = request(&client, "replicator.dlq.replay", one(json!({"letters": [2]}))).await?;
    ensure!(replayed["done"][0]["letter"] == 2 && replayed["failed"].is_null(), "{replayed:#}");
    let exported = request(&client, "replicator.consumers.export", one(json!({"consumers": ["bills"]}))).await?;
    let found = &exported["consumers"][0];
    ensure!(found["error"].is_null(), "{exported:#}");
    let names = ["name", "position", "start", "config"];
    let consumer: serde_json::Map<_, _> =
        names.into_iter().map(|name| (name.to_owned(), found[name].clone())).collect();
    let consumers = one(json!({"consumers": [consumer]}));
    let imported = request(&client, "replicator.consumers.import", consumers).await?;
    ensure!(imported["consumers"][0]["outcome"] == "created", "{imported:#}");
    for log in [source.log(), target.log()] {
        let refused = log.lines().find(|line| line.to_lowercase().contains("violation"));
        ensure!(refused.is_none(), "{}", refused.unwrap_or_default());
    }
    Ok(())
}

#[test]
fn every_state_error_and_event_is_explained() -> Result<()> {
    let page = page("docs/states.md")?;
    let status: Value = serde_json::from_str(&std::fs::read_to_string(wire::folder().join("status.reply.json"))?)?;
    let states = status["$defs"]["State"]["oneOf"].as_array().context("states")?;
    let states = states.iter().filter_map(|state| state["const"].as_str());
    check_headings(&page, "States", states.collect())?;
    check_headings(&page, "Errors", LastError::KINDS.into())?;
    check_headings(&page, "Events", Event::KINDS.into())
}

/// What `do` of a row says is on the page word for word.
#[test]
fn the_page_of_states_has_the_words_of_every_advice() -> Result<()> {
    let words = page("docs/states.md")?.split_whitespace().collect::<Vec<_>>().join(" ");
    let hour_ago = chrono::Utc::now() - chrono::TimeDelta::hours(1);
    let mut seen = BTreeSet::new();
    for state in State::ALL {
        for kind in LastError::KINDS {
            for (headroom, seq) in [(None, None), (Some(1.0), None), (None, Some(1234))] {
                let error = json!({"at": hour_ago, "kind": kind, "message": "why", "source_seq": seq});
                let headroom = headroom.map(|left| json!({"seconds": left, "limit": "age", "low_below": 60.0}));
                let mut row: Row =
                    serde_json::from_value(json!({"replication": "ORDERS", "state": state, "origin": "kv",
                    "leader": "i", "epoch": 1, "config_revision": 1, "last_error": error, "headroom": headroom}))?;
                row.at(chrono::Utc::now());
                seen.extend(row.todo);
            }
        }
    }
    ensure!(seen.len() >= 9, "{seen:?}");
    for advice in seen {
        ensure!(words.contains(&advice), "docs/states.md does not say: {advice}");
    }
    Ok(())
}

/// Each name has a heading of its own below `## title`, and nothing else has.
fn check_headings(page: &str, title: &str, names: BTreeSet<&str>) -> Result<()> {
    let (_, part) = page.split_once(&format!("\n## {title}\n")).with_context(|| format!("no part {title}"))?;
    let part = part.split("\n## ").next().unwrap_or_default();
    let found = part.lines().filter_map(|line| line.strip_prefix("### `")?.strip_suffix('`'));
    let found: BTreeSet<&str> = found.collect();
    ensure!(found == names, "{title}: the page has {found:?}, the program {names:?}");
    Ok(())
}

#[test]
fn links_lead_somewhere() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut links = 0;
    for page in [pages(root)?, pages(&root.join("docs"))?].concat() {
        let text = std::fs::read_to_string(&page)?;
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if link.contains("://") {
                continue;
            }
            links += 1;
            let (file, anchor) = link.split_once('#').map_or((link, None), |(file, anchor)| (file, Some(anchor)));
            let target = if file.is_empty() { page.clone() } else { page.with_file_name(file) };
            ensure!(target.exists(), "{}: `{link}` does not exist", page.display());
            if let Some(anchor) = anchor {
                let found =
                    std::fs::read_to_string(&target)?.lines().any(|line| anchor_of(line) == Some(anchor.into()));
                ensure!(found, "{}: `{link}` has no such heading", page.display());
            }
        }
    }
    ensure!(links > 20, "only {links} links");
    Ok(())
}

/// Each claim of the security page names tests, and all of these exist.
#[test]
fn each_claim_about_security_has_its_test() -> Result<()> {
    let page = page("SECURITY.md")?;
    let (_, claims) = page.split_once("\n## ").context("no claims")?;
    let mut tests = 0;
    for claim in self::claims(claims) {
        let named: Vec<_> = claim.split('`').filter_map(|word| word.rsplit_once("::")).collect();
        ensure!(!named.is_empty(), "this claim names no test: {claim}");
        for (module, test) in named {
            let code = self::page(&format!("tests/it/{}.rs", module.replace("::", "/")))?;
            let attribute = code.split(&format!("fn {test}(")).next().and_then(|before| before.rsplit("\n\n").next());
            let exists = code.contains(&format!("fn {test}(")) && attribute.is_some_and(|text| text.contains("test"));
            ensure!(exists, "there is no test `{module}::{test}`");
            tests += 1;
        }
    }
    ensure!(tests > 20, "only {tests} tests are named");
    Ok(())
}

/// The claims of a page: the items of its lists with everything that is indented below them, and the paragraphs that say
/// what a peer can or cannot do.
fn claims(text: &str) -> Vec<String> {
    let (mut claims, mut open) = (Vec::<String>::new(), false);
    let mut paragraph = String::new();
    let is_claim = |text: &str| text.contains(" can ") || text.contains(" cannot ");
    // The line at the end closes a paragraph.
    for line in text.lines().chain([""]) {
        let inside = line.starts_with("  ") || line.is_empty();
        match line.strip_prefix("- ") {
            Some(begin) => {
                claims.push(begin.to_owned());
                open = true;
            }
            None if open && inside => {
                let claim = claims.last_mut().expect("an open claim");
                claim.push('\n');
                claim.push_str(line);
            }
            None => {
                open = false;
                paragraph.push_str(line);
                paragraph.push(' ');
            }
        }
        if line.is_empty() || line.starts_with("- ") {
            let whole = std::mem::take(&mut paragraph);
            // What introduces a list, and headings, claim nothing themselves.
            claims.extend(Some(whole).filter(|text| is_claim(text) && !text.trim_end().ends_with(':')));
        }
    }
    claims
}

#[test]
fn a_claim_ends_where_its_list_item_ends() {
    let page = "The page.\n\nCan:\n\n- One\n  two (`a::b`).\n\n  More of it (`c::d`).\n- Three.\nNo claim.\n\nAnother peer cannot do\n\
                that (`e::f`).\n\nWith more rights, it cannot:\n\n- Four\n";
    let claims = claims(page);
    let begins: Vec<_> = claims.iter().map(|claim| claim.split_whitespace().next().unwrap_or_default()).collect();
    assert_eq!(begins, ["One", "Three.", "Another", "Four"], "{claims:?}");
    assert!(claims[0].contains("`a::b`") && claims[0].contains("`c::d`"), "{claims:?}");
    assert!(!claims[1].contains("No claim"), "{claims:?}");
    assert!(claims[2].contains("`e::f`"), "{claims:?}");
}

#[test]
fn the_index_lists_every_page() -> Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs");
    let index = page("docs/README.md")?;
    for page in pages(&folder)? {
        let name = page.file_name().and_then(|name| name.to_str()).context("a name")?;
        ensure!(name == "README.md" || index.contains(&format!("({name})")), "docs/README.md does not list {name}");
    }
    Ok(())
}

fn page(path: &str) -> Result<String> {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).with_context(|| path.to_owned())
}

fn pages(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    Ok(entries.into_iter().filter(|path| path.extension().is_some_and(|extension| extension == "md")).collect())
}

/// What a heading is linked by.
fn anchor_of(line: &str) -> Option<String> {
    let heading = line.strip_prefix('#')?.trim_start_matches('#').strip_prefix(' ')?;
    let kept = heading.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    Some(kept.map(|c| if c == ' ' { '-' } else { c.to_ascii_lowercase() }).collect())
}

/// All `nats req` in the console blocks of a page, with the lines after them.
fn examples(page: &str) -> Result<Vec<Example>> {
    let mut examples = Vec::new();
    let mut lines = page.lines().enumerate().peekable();
    let mut in_console = false;
    while let Some((number, line)) = lines.next() {
        if line.starts_with("```") {
            in_console = line == "```console";
        }
        let Some(command) = line.strip_prefix("$ ").filter(|_| in_console) else { continue };
        let mut command = command.to_owned();
        while command.matches('\'').count() % 2 == 1 {
            let (_, more) = lines.next().context("a quote is not closed")?;
            command = format!("{command}\n{more}");
        }
        let mut output = String::new();
        while let Some((_, more)) = lines.next_if(|(_, line)| !line.starts_with("$ ") && !line.starts_with("```")) {
            output.push_str(more);
        }
        let line = number + 1;
        if let Some(rest) = command.strip_prefix("nats req ") {
            let example = example(line, rest, &output);
            examples.push(example.with_context(|| format!("line {line}: `{command}`"))?);
        } else {
            let known = ["stream-replicator ", "nats sub ", "nats kv ", "nats micro "];
            ensure!(known.iter().any(|known| command.starts_with(known)), "line {line}: `{command}` is not checked");
        }
    }
    ensure!(!examples.is_empty(), "no examples");
    Ok(examples)
}

fn example(line: usize, command: &str, output: &str) -> Result<Example> {
    let mut words = words(command)?.into_iter();
    let (mut plain, mut headers, mut raw, mut hidden) = (Vec::new(), Vec::new(), false, false);
    while let Some(word) = words.next() {
        match word.as_str() {
            "--raw" => raw = true,
            "-H" => {
                let header = words.next().context("a header")?;
                let (name, value) = header.split_once(':').context("a header is `name:value`")?;
                headers.push((name.to_owned(), value.to_owned()));
            }
            "|" => ensure!(words.next().as_deref() == Some("jq"), "only jq can follow"),
            ">" => hidden = words.next().is_some(),
            _ => plain.push(word),
        }
    }
    // Without `--raw` the tool says more than the reply, and without a body it reads its input.
    ensure!(raw, "without --raw");
    let [subject, body] = plain.try_into().ok().context("subject and body")?;
    let endpoint = subject.strip_prefix("replicator.").context("the subject")?.to_owned();
    let reply = if hidden { None } else { Some(serde_json::from_str(output).context("the reply")?) };
    Ok(Example { line, endpoint, headers, body, reply })
}

/// Words as a shell splits them, as far as the pages need it.
fn words(command: &str) -> Result<Vec<String>> {
    let (mut words, mut word, mut quoted) = (Vec::new(), None, false);
    for c in command.chars() {
        match c {
            '\'' => {
                quoted = !quoted;
                word.get_or_insert_with(String::new);
            }
            ' ' if !quoted => words.extend(word.take()),
            '"' | '$' | '`' | '\\' if !quoted => bail!("`{c}` outside of quotes"),
            c => word.get_or_insert_with(String::new).push(c),
        }
    }
    ensure!(!quoted, "a quote is not closed");
    words.extend(word);
    Ok(words)
}

/// Name and queue group of all endpoints.
async fn endpoints(site: &Site) -> Result<HashMap<String, String>> {
    let info = request(&site.client, "$SRV.INFO.replicator", Value::Null).await?;
    let endpoints = info["endpoints"].as_array().context("endpoints")?.iter().map(|endpoint| {
        let name = endpoint["subject"].as_str().and_then(|subject| subject.strip_prefix("replicator."))?;
        Some((name.to_owned(), endpoint["queue_group"].as_str()?.to_owned()))
    });
    endpoints.collect::<Option<_>>().context("subjects and groups")
}

/// A document of the page, with the servers of this site.
fn on_this_site(site: &Site, body: &str) -> String {
    let place = |url: String| url.trim_start_matches("nats://").to_owned();
    body.replace("nats.east.example.net:4222", &place(site.source.url()))
        .replace("nats.hub.example.net:4222", &place(site.target.url()))
}

/// The streams of the page: one to copy, one with a message that the target can never store; a third one is missing.
async fn prepare(site: &Site) -> Result<()> {
    site.filled("ORDERS", 1200).await?;
    site.source_stream("NODES", json!({})).await?;
    site.source().await?.publish(&Outgoing::new("nodes.1", r#"{"sender": "n1.example.net"}"#)).await?;
    site.source_stream("PARCELS", json!({})).await?;
    site.target_stream("PARCELS", json!({"max_msg_size": 512})).await?;
    site.source().await?.publish(&Outgoing::new("parcels.1", "x".repeat(1000))).await?;
    Ok(())
}

/// Waits until what the example is about is as the page says.
async fn before(site: &Site, example: &Example) -> Result<()> {
    if example.is_refused() {
        return Ok(());
    }
    let state = async |id: &str, state: &str| site.row_when(id, state, |row| row["state"] == state).await;
    match example.endpoint.as_str() {
        // From here on the page knows more replications than the one that it added.
        "config.list" if site.ask("config.get", "INVOICES").await?.error.is_some() => {
            site.add("INVOICES", json!({})).await?;
            site.add("PARCELS", json!({})).await?;
            state("INVOICES", "held").await?;
            state("PARCELS", "held").await?;
        }
        "adapter.status" => {
            let running = async || site.ask("adapter.status", "inventory").await.ok()?.body["adapters"].get(0).cloned();
            let running =
                async || running().await.filter(|row| row["state"] == "running" && row["queue"]["capacity"] == 50_000);
            drop(wait_value("the adapter runs", LIMIT, running).await?);
        }
        "senders" => {
            site.add("NODES", json!({"inspect_field": "sender", "inspect_duration": "1h"})).await?;
            site.settled("NODES", 1).await?;
        }
        "status" | "pause" => {
            site.settled("ORDERS", 1200).await?;
            // On a busy machine the source has not answered yet.
            site.row_when("ORDERS", "its lag is known", |row| row["lag"]["seconds"].is_number()).await?;
        }
        "position" | "resume" => drop(state("ORDERS", "paused").await?),
        "retry" => drop(state("INVOICES", "held").await?),
        "skip" => drop(state("PARCELS", "held").await?),
        _ => {}
    }
    Ok(())
}

/// A second instance, which the first knows of.
async fn another_instance(site: &Site) -> Result<Service> {
    let second = Service::builder(&site.service_url(), SITE).instance("node2-0b7de").start().await?;
    let both = async || request(&site.client, "replicator.instances", Value::Null).await.is_ok_and(|r| r["total"] == 2);
    wait_for("both instances", LIMIT, both).await?;
    site.row_when("ORDERS", "is led", |row| row["leader"].is_string()).await?;
    Ok(second)
}

/// The same fields of the same types, whatever the values.
fn same_shape(at: &str, documented: &Value, sent: &Value) -> Result<()> {
    match (documented, sent) {
        (Value::Object(documented), Value::Object(sent)) => {
            let (ours, theirs): (BTreeSet<_>, BTreeSet<_>) = (documented.keys().collect(), sent.keys().collect());
            ensure!(ours == theirs, "`{at}`: documented are {ours:?}, sent are {theirs:?}");
            documented.iter().try_for_each(|(name, value)| same_shape(&format!("{at}/{name}"), value, &sent[name]))
        }
        (Value::Array(documented), Value::Array(sent)) => {
            ensure!(documented.is_empty() == sent.is_empty(), "`{at}`: only one of both is empty");
            documented.iter().zip(sent).try_for_each(|(ours, theirs)| same_shape(&format!("{at}/0"), ours, theirs))
        }
        (Value::Null, Value::Null)
        | (Value::Bool(_), Value::Bool(_))
        | (Value::Number(_), Value::Number(_))
        | (Value::String(_), Value::String(_)) => Ok(()),
        _ => bail!("`{at}`: documented is {documented}, sent is {sent}"),
    }
}

#[test]
fn documented_subjects_are_what_the_document_makes() -> Result<()> {
    let page = page("docs/subjects.md")?;
    let (_, part) = page.split_once("\n## Mapping\n").context("no part Mapping")?;
    let (_, json) = part.split_once("```json\n").context("no document")?;
    let (json, rest) = json.split_once("```").context("no end of the document")?;
    let replication = config::parse(json.as_bytes(), "SITE").map_err(|problems| anyhow!("{problems}"))?;
    let (_, table) = rest.split_once("| source | target |\n").context("no table")?;
    let rows: Vec<_> = table.lines().skip(1).take_while(|line| line.starts_with('|')).collect();
    ensure!(rows.len() >= 3, "{rows:?}");
    for row in rows {
        let cells: Vec<_> = row.split('|').map(|cell| cell.trim().trim_matches('`')).collect();
        let (subject, expect) = (cells[1].as_bytes(), cells[2]);
        let mut room = Vec::new();
        let found = match replication.scope.excludes(subject) {
            true => "not copied".as_bytes(),
            false => replication.mapping.apply(subject, &mut room),
        };
        ensure!(found == expect.as_bytes(), "{row}: {}", found.escape_ascii());
    }
    Ok(())
}

/// One command of a page and the output that the page shows for it.
struct Shown {
    line: usize,
    words: Vec<String>,
    output: Vec<String>,
}

/// All commands in the console blocks of a part of a page.
fn commands(part: &str) -> Result<Vec<Shown>> {
    let mut shown: Vec<Shown> = Vec::new();
    let (mut in_console, mut lines) = (false, part.lines().enumerate());
    while let Some((number, line)) = lines.next() {
        if line.starts_with("```") {
            in_console = line == "```console";
        } else if let Some(command) = line.strip_prefix("$ ").filter(|_| in_console) {
            let mut command = command.to_owned();
            while command.matches('\'').count() % 2 == 1 {
                let (_, more) = lines.next().context("a quote is not closed")?;
                command = format!("{command}\n{more}");
            }
            shown.push(Shown { line: number + 1, words: words(&command)?, output: Vec::new() });
        } else if in_console {
            shown.last_mut().context("output before a command")?.output.push(line.to_owned());
        }
    }
    Ok(shown)
}

/// The stream that `nats stream add` makes.
fn stream_of(words: &[String]) -> Result<(String, Value)> {
    let mut config = json!({});
    let mut words = words.iter();
    let name = words.next().context("a name")?.clone();
    while let Some(word) = words.next() {
        let mut value = || words.next().context("a value");
        let seconds = |text: &str| nats_lane::parse_duration(text).map(|duration| duration.as_nanos() as u64);
        match word.as_str() {
            "--subjects" => config["subjects"] = json!([value()?]),
            "--max-msgs-per-subject" => config["max_msgs_per_subject"] = value()?.parse::<u64>()?.into(),
            "--max-age" => config["max_age"] = seconds(value()?).map_err(|error| anyhow!(error))?.into(),
            "--dupe-window" => config["duplicate_window"] = seconds(value()?).map_err(|error| anyhow!(error))?.into(),
            "--defaults" => {}
            other => bail!("`{other}` is not known here"),
        }
    }
    Ok((name, config))
}

#[tokio::test]
async fn the_documented_walk_through_with_registration_data_works() -> Result<()> {
    let site = Site::builder().control_at_source().start().await?;
    let page = page("docs/sampling.md")?;
    let (_, part) = page.split_once("\n## A walk-through with Choria's registration data\n").context("no part")?;
    let part = part.split("\n## ").next().unwrap_or_default();
    let mut raw = site.source().await?;
    let mut ran = 0;
    for Shown { line, words, output } in commands(part)? {
        let context = || format!("line {line} of the part: {words:?}");
        let text: Vec<&str> = words.iter().map(String::as_str).collect();
        let printed = match text.as_slice() {
            ["nats", "stream", "add", ..] => {
                let (name, config) = stream_of(&words[3..]).with_context(context)?;
                raw.create_stream(&name, config).await?;
                String::new()
            }
            ["nats", "pub", subject, body] => {
                raw.publish(&Outgoing::new(*subject, *body)).await?;
                String::new()
            }
            ["nats", "req", "--raw", subject, body] => {
                let body = body
                    .replace("nats://east.example.net", &site.source.url())
                    .replace("nats://central.example.net", &site.target.url());
                let endpoint = subject.strip_prefix("replicator.").context("the subject")?;
                site.ask(endpoint, body).await?.body.to_string()
            }
            ["nats", "kv", "get", bucket, key, "--raw"] => {
                let bucket = site.bucket(bucket).await?;
                wait_for("the record", LIMIT, async || bucket.get(*key).await.is_ok_and(|it| it.is_some())).await?;
                String::from_utf8_lossy(&bucket.get(*key).await?.context("a value")?).into_owned()
            }
            ["stream-replicator", arguments @ ..] => {
                let run = async || site.cli().ok(arguments).await;
                // What it shows is written behind.
                wait_for("as many lines", LIMIT, async || {
                    run().await.is_ok_and(|printed| printed.lines().count() == output.len())
                })
                .await
                .with_context(context)?;
                run().await?
            }
            _ => bail!("line {line}: {words:?} is not run"),
        };
        ran += 1;
        let printed: Vec<&str> = printed.lines().collect();
        assert_eq!(printed.len(), output.len(), "line {line}: {words:?} prints {printed:?}");
        for (expect, printed) in output.iter().zip(printed) {
            match (serde_json::from_str::<Value>(expect), serde_json::from_str::<Value>(printed)) {
                (Ok(expect), Ok(printed)) => same_shape("", &expect, &printed).with_context(context)?,
                _ => assert!(same_words(expect, printed), "line {line}: {expect:?} is documented, {printed:?} printed"),
            }
        }
    }
    ensure!(ran >= 8, "{ran} commands");
    Ok(())
}

/// The same words, but for times, names of this site and how long ago something was.
fn same_words(expect: &str, printed: &str) -> bool {
    let plain = |word: &&str| {
        let is_time = word.starts_with(|c: char| c.is_ascii_digit() || "([".contains(c));
        !is_time && !["US-EAST", SITE].contains(word)
    };
    let words = |line: &str| line.split_whitespace().filter(plain).map(str::to_owned).collect::<Vec<_>>();
    words(expect) == words(printed)
}

/// Whatever the monitor shows of a replication that samples and of heartbeats is on the page.
#[tokio::test]
async fn every_metric_is_explained() -> Result<()> {
    let page = [page("docs/metrics.md")?, page("docs/heartbeats.md")?].concat();
    let site = Site::builder().control_at_source().args(["--monitor", "127.0.0.1:0"]).start().await?;
    site.filled("ORDERS", 10).await?;
    site.add("ORDERS", json!({"inspect_field": "sender", "inspect_duration": "1h"})).await?;
    let beats = json!({"url": site.source.url(), "subjects": [{"subject": "orders.beat"}]});
    request(&site.client, "replicator.heartbeat.set", beats).await?;
    let names = async || -> Result<Vec<String>> {
        let (_, text) = site.service.get("/metrics").await?;
        let names = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
        Ok(names.map(|name| name.trim_start_matches("choria_stream_replicator_").to_owned()).collect())
    };
    let all = async || {
        names().await.is_ok_and(|names| {
            ["heartbeat_", "tracker_", "replicator_stream_lag_seconds"]
                .iter()
                .all(|part| names.iter().any(|name| name.contains(part)))
        })
    };
    wait_for("all metrics", LIMIT, all).await?;
    let shown = names().await?;
    ensure!(shown.len() > 40, "{shown:?}");
    for name in shown {
        let short = name.trim_start_matches("replicator_");
        let explained = [short, &name]
            .iter()
            .any(|name| page.contains(&format!("`{name}`")) || page.contains(&format!("_{name}`")));
        ensure!(explained, "docs/metrics.md does not explain {name}");
    }
    Ok(())
}
