//! Secrets of every kind in every place, right and wrong, and every way to fail: none is ever shown. What the harness
//! sees is searched for all of them, see `harness/secrets.rs`; here it gets to see everything that there is.

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};
use async_nats::jetstream;
use futures_util::TryStreamExt;
use nkeys::KeyPair;
use serde_json::{Value, json};

use crate::harness::client::request;
use crate::harness::{LIMIT, Outgoing, Raw, Role, Server, Site, secrets, wait_for};

/// Files with secrets in them, sound and broken.
struct SecretFiles {
    folder: tempfile::TempDir,
}

impl SecretFiles {
    fn write(seed: &str) -> Result<Self> {
        let files = Self { folder: tempfile::tempdir()? };
        // No server accepts it, but it looks like one.
        let jwt = format!("eyJ0eXAiOiJKV1QifQ.{}.{}", secrets::secret(), secrets::secret());
        let creds = |jwt: &str, seed: &str| {
            format!(
                "-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n\
                 -----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
            )
        };
        let pem = format!("-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----\n", secrets::secret());
        for (name, text) in [
            ("good.nk", seed.to_owned()),
            ("other.nk", KeyPair::new_user().seed()?),
            ("broken.nk", format!("SU{}", secrets::secret())),
            ("user.jwt", jwt.clone()),
            ("good.creds", creds(&jwt, &KeyPair::new_user().seed()?)),
            ("broken.creds", creds(&jwt, &secrets::secret())),
            ("no.creds", format!("{}\n{}\n", secrets::secret(), secrets::secret())),
            ("broken.pem", pem),
        ] {
            fs::write(files.path(name), text)?;
            secrets::register_file(&files.path(name));
        }
        Ok(files)
    }

    fn path(&self, name: &str) -> String {
        Path::new(self.folder.path()).join(name).display().to_string()
    }
}

/// One line of a table: the stream, source and target URL, further fields.
type Case = (&'static str, String, String, Value);

#[tokio::test]
async fn no_secret_of_any_kind_is_shown_anywhere_whatever_fails() -> Result<()> {
    let [password, token, control_password] = [(); 3].map(|()| secrets::secret());
    // With all that has to be encoded.
    let odd = format!("{}@/:?#&%\"\\{}", secrets::secret(), secrets::secret());
    secrets::register(&odd);
    let key = KeyPair::new_user();
    let files = SecretFiles::write(&key.seed()?)?;
    let users = format!(
        "authorization {{ users: [{{user: u, password: \"{password}\"}}, {{user: odd, password: {}}}, {{nkey: {}}}] }}",
        json!(odd),
        key.public_key()
    );
    let source = Server::builder(Role::Source).config(&users).start().await?;
    let target = Server::builder(Role::Target).config(&format!("authorization {{ token: {token} }}")).start().await?;
    let control = format!("authorization {{ users: [{{user: c, password: {control_password}}}] }}");
    let control = Server::builder(Role::Control).config(&control).start().await?;
    let builder = Site::builder().on(source, target).control(control).login(&format!("c:{control_password}"));
    let mut site = builder.args(["--log-level", "trace", "--monitor", "127.0.0.1:0"]).start().await?;

    let encoded = percent_encoding::utf8_percent_encode(&odd, percent_encoding::NON_ALPHANUMERIC).to_string();
    let from = |login: &str| site.source.url_as(login);
    let option = |option: &str, file: &str| format!("{}?{option}={}", site.source.url(), files.path(file));
    let (good, to) = (from(&format!("u:{password}")), site.target.url_as(&token));
    let mut raw = Raw::connect(&good).await?;
    let works = ["PASSWORD", "ODD", "NKEY"];
    for stream in works {
        raw.create_stream(stream, json!({"subjects": [stream.to_lowercase()]})).await?;
        raw.publish(&Outgoing::new(stream.to_lowercase(), "x")).await?;
    }
    let running: Vec<Case> = vec![
        ("PASSWORD", good.clone(), to.clone(), json!({"description": format!("from {good}")})),
        ("ODD", from(&format!("odd:{encoded}")), to.clone(), json!({})),
        ("NKEY", option("nkey", "good.nk"), to.clone(), json!({})),
    ];
    let failing: Vec<Case> = vec![
        ("WRONG_PASSWORD", from(&format!("u:{}", secrets::secret())), to.clone(), json!({})),
        ("WRONG_TOKEN", from(&secrets::secret()), to.clone(), json!({})),
        ("WRONG_TARGET", good.clone(), site.target.url_as(&secrets::secret()), json!({})),
        ("OTHER_SEED", option("nkey", "other.nk"), to.clone(), json!({})),
        ("BROKEN_SEED", option("nkey", "broken.nk"), to.clone(), json!({})),
        ("JWT", format!("{}&jwt={}", option("nkey", "good.nk"), files.path("user.jwt")), to.clone(), json!({})),
        ("CREDS", option("credentials", "good.creds"), to.clone(), json!({})),
        ("BROKEN_CREDS", option("credentials", "broken.creds"), to.clone(), json!({})),
        ("NO_CREDS", option("credentials", "no.creds"), to.clone(), json!({})),
        ("NO_TLS", good.replace("nats://", "tls://"), to.clone(), json!({})),
        (
            "BROKEN_KEY",
            good.replace("nats://", "tls://"),
            to.clone(),
            json!({"tls": {"cert": files.path("broken.pem"), "key": files.path("broken.pem")}}),
        ),
        ("NO_STREAM", good.clone(), to.clone(), json!({})),
        ("CLOSED", format!("nats://u:{}@127.0.0.1:1", secrets::secret()), to.clone(), json!({})),
    ];
    for (stream, source_url, target_url, fields) in running.iter().chain(&failing) {
        let document = json!({"stream": stream, "source_url": source_url, "target_url": target_url});
        let document = crate::harness::site::merged(document, fields.clone());
        validate(&site, &document).await?;
        let added = site.send("config.add", document).await?;
        ensure!(added.error.is_none(), "{stream}: {added:?}");
    }
    for (stream, ..) in &running {
        site.row_when(stream, "has copied", |row| row["counters"]["copied"] == 1).await?;
    }
    for (stream, ..) in &failing {
        let failed = |row: &Value| row["last_error"]["message"].as_str().is_some_and(|text| !text.is_empty());
        site.row_when(stream, "tells its error", failed).await?;
    }

    in_wrong_places(&site, &good, &to).await?;
    see_everything(&site).await?;
    // Once more while it starts with all of that, and while it stops.
    site.stop().await?;
    secrets::check("the log", &site.service.log());
    site.service.restart().await?;
    site.row_when("PASSWORD", "runs again", |row| row["state"] == "running").await?;
    see_everything(&site).await
}

/// If the service has it, the effects of a document are reported, too.
async fn validate(site: &Site, document: &Value) -> Result<()> {
    let info = request(&site.client, "$SRV.INFO.replicator", Value::Null).await?;
    let endpoints = info["endpoints"].as_array().context("no endpoints")?;
    if endpoints.iter().any(|endpoint| endpoint["subject"] == "replicator.config.validate") {
        site.send("config.validate", document.clone()).await?;
    }
    Ok(())
}

/// In documents that are refused or written by hand, and in requests that are none.
async fn in_wrong_places(site: &Site, good: &str, to: &str) -> Result<()> {
    let secret = secrets::secret();
    let url = format!("nats://u:{secret}@127.0.0.1:4222");
    let seed = KeyPair::new_user().seed()?;
    secrets::register(&seed);
    let mut documents = Vec::new();
    for broken in [
        format!("u:{secret}@h:port"),
        format!("{secret}@h,{secret}x@i"),
        format!("nats://u:{secret}@h:99999"),
        format!("nats://u:{secret}?x@h"),
        format!("nats://u:{secret}/x,y@h"),
        format!("nats://u:%zz{secret}@[::1"),
        format!("nats://u:{secret}@h?nkey=/a"),
        format!("ftp://u:{secret}@h"),
        format!("nats://h?nkey={seed}"),
        format!("nats://h?credentials=eyJ0eXAi{secret}"),
        format!("nats://h?password={secret}@h"),
    ] {
        documents.push(json!({"stream": "BROKEN", "source_url": broken, "target_url": to}));
        documents.push(json!({"stream": "BROKEN", "source_url": good, "target_url": broken}));
    }
    for field in ["stream", "name", "max_age", "start_time", "filter_subject", "target_stream", "target_subject_prefix"]
    {
        documents.push(json!({"stream": "BROKEN", "source_url": good, "target_url": to, field: url}));
    }
    for (field, value) in [
        ("password", json!(secret)),
        ("source_pasword", json!([secret, {"x": secret}])),
        ("sorce_url", json!(url)),
        ("limits", json!({"messages_in_flight": url})),
        ("limits", json!({"password": secret})),
        ("tls", json!({"ca": 5, "password": secret})),
        ("tls", json!(secret)),
        ("start_sequence", json!(url)),
        ("no_target_create", json!(url)),
    ] {
        documents.push(json!({"stream": "BROKEN", "source_url": good, "target_url": to, field: value}));
    }
    for document in &documents {
        validate(site, document).await?;
        let added = site.send("config.add", document.clone()).await?;
        match (added.error, added.body["replication"].as_str()) {
            // A subject may look like a URL, and somebody's user name, too.
            (None, Some(id)) => ensure!(site.ask("config.delete", id).await?.error.is_none(), "{added:?}"),
            (code, _) => ensure!(code == Some(400), "{document}: {added:?}"),
        }
    }
    // The same and worse by hand; every request that reads documents checks all of them.
    let [no_scheme, other_scheme] = ["nats//u", "nats:/u"].map(|user| {
        json!({"stream": "BROKEN", "source_url": format!("{user}:{secret}@h"), "target_url": to}).to_string()
    });
    let text = json!(url).to_string();
    let garbage =
        [no_scheme, other_scheme, url.clone(), text, format!("{{\"source_url\": \"{url}\""), format!("[\"{secret}\"]")];
    let written = documents.iter().map(Value::to_string).chain(garbage);
    for (index, text) in written.enumerate() {
        let key = format!("HAND{index}");
        site.put(&key, text).await?;
        site.row_when(&key, "is invalid", |row| row["state"] == "invalid").await?;
    }
    // Requests are counted and reported by `$SRV.STATS`, which must not show text that was pasted into them.
    let info = request(&site.client, "$SRV.INFO.replicator", Value::Null).await?;
    for endpoint in info["endpoints"].as_array().context("no endpoints")? {
        let subject = endpoint["subject"].as_str().context("no subject")?;
        for body in [
            url.clone(),
            json!(url).to_string(),
            json!({"replication": url}).to_string(),
            json!({"replication": [url]}).to_string(),
            json!({"replication": "NONE", "keep": url, "offset": url, "source_seq": url, "time": url}).to_string(),
            json!({"offset": url}).to_string(),
            json!({"replication": "NONE", "source_seq": secret}).to_string(),
            json!({"replication": "NONE", "time": secret}).to_string(),
            json!({ url.as_str(): 1 }).to_string(),
        ] {
            let message = site.client.request(subject.to_owned(), body.into()).await?;
            // An answer to the one who wrote it may say what is wrong with it; the counters may not.
            ensure!(!message.payload.is_empty(), "{subject}");
            for verb in ["$SRV.STATS", "$SRV.INFO"] {
                request(&site.client, verb, Value::Null).await?;
            }
        }
        for header in ["Replicator-Deadline", "Replicator-Expected-Revision"] {
            site.ask_with(subject.trim_start_matches("replicator."), (header, &secret), "NONE").await?;
        }
    }
    Ok(())
}

/// Asks for all that can be asked for, and looks into what the service keeps.
async fn see_everything(site: &Site) -> Result<()> {
    for verb in ["$SRV.PING", "$SRV.INFO", "$SRV.STATS"] {
        request(&site.client, verb, Value::Null).await?;
    }
    let list = site.ask("config.list", "").await?.body;
    let rows = list["replications"].as_array().context("no list")?;
    ensure!(rows.len() > 16, "{list}");
    for row in rows {
        let id = row["replication"].as_str().context("no id")?;
        for endpoint in ["config.get", "status"] {
            let shown = site.ask(endpoint, id).await?;
            ensure!(shown.error.is_none(), "{endpoint} of {id}: {shown:?}");
        }
    }
    site.ask("status", "").await?;
    // Each message of the page is checked as it arrives, and the first has all replications.
    super::page::Viewer::join(&site.service.monitor().await?).await?;
    for path in ["/metrics", "/livez", "/readyz", "/", "/replication/PASSWORD", "/replication/WRONG_TOKEN"] {
        site.service.get(path).await?;
    }
    // The configuration holds secrets; nothing else that is stored does.
    let jetstream = jetstream::new(site.client.clone());
    let names: Vec<String> = jetstream.stream_names().try_collect().await?;
    let mut looked = 0;
    let mut raw = Raw::connect(&site.service_url()).await?;
    for name in names.iter().filter(|name| name.starts_with("KV_REPLICATOR_") && *name != "KV_REPLICATOR_CONFIG") {
        for stored in raw.read_stream(name).await? {
            let (header, payload) = (String::from_utf8_lossy(&stored.header), String::from_utf8_lossy(&stored.payload));
            secrets::check(name, &format!("{} {header} {payload}", stored.subject));
            looked += 1;
        }
    }
    ensure!(looked >= 16, "{looked} records in {names:?}");
    let events = site.events.seen();
    ensure!(events.len() > 16, "{events:?}");
    events.iter().for_each(|(subject, body)| secrets::check(subject, &body.to_string()));
    wait_for("the log", LIMIT, async || site.service.log().contains(" DEBUG ")).await?;
    secrets::check("the log", &site.service.log());
    Ok(())
}

/// The search finds what it is to find, or all of it proves nothing.
#[test]
fn the_search_finds_a_secret_in_each_spelling() {
    let odd = format!("{} /\"é", secrets::secret());
    secrets::register(&odd);
    let url_password = format!("{}Q", secrets::secret());
    secrets::register_document(&json!({"source_url": format!("nats://h:1,nats://u:{url_password}@h?insecure=true")}));
    let encoded = percent_encoding::utf8_percent_encode(&odd, percent_encoding::NON_ALPHANUMERIC).to_string();
    for shown in [&odd, &encoded, &json!({"x": odd}).to_string(), &format!("u:{url_password}@")] {
        assert!(secrets::found_in(&format!("an error with {shown} in it")).is_some(), "{shown}");
    }
    assert_eq!(secrets::found_in("write the secret of `nats://u:***@h`"), None);
}
