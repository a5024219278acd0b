//! Choria's leader election, with an old replicator that keeps to Choria's rules, its faults too.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use futures_util::StreamExt;
use nats_lane::{Connection, Endpoint, ServerRef};
use serde_json::{Value, json};
use stream_replicator::allow::AllowList;
use stream_replicator::election::{self, BUCKET, Campaign, Election, Leadership};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use crate::harness::raw::header_values;
use crate::harness::server::free_port;
use crate::harness::{Cluster, Expect, LIMIT, Outgoing, Proxy, Raw, Role, SITE, Server, Service, Site, wait_for};

const STREAM: &str = "KV_CHORIA_LEADER_ELECTION";
const KEY: &str = "SR_EAST_ORDERS";
const SUBJECT: &str = "$KV.CHORIA_LEADER_ELECTION.SR_EAST_ORDERS";
const NEW: &str = "new.example.net";

/// A TTL that no test waits for.
const LONG: Duration = Duration::from_secs(60);
/// One that tests wait for.
const SHORT: Duration = Duration::from_secs(3);

/// Makes the bucket as Choria's broker does.
async fn make_bucket(raw: &mut Raw, ttl: Duration) -> Result<()> {
    raw.create_stream(STREAM, bucket(ttl)).await.map(|_| ())
}

fn bucket(ttl: Duration) -> Value {
    json!({"name": STREAM, "subjects": [format!("$KV.{BUCKET}.>")], "max_age": ttl.as_nanos() as u64,
        "max_msgs_per_subject": 1, "max_msg_size": 1024, "discard": "new", "deny_delete": true, "allow_rollup_hdrs": true,
        "allow_direct": true})
}

/// A server with the bucket, and a login that may do everything.
async fn start(ttl: Duration) -> Result<(Server, Raw)> {
    let server = Server::start(Role::Source).await?;
    let mut raw = Raw::connect(&server.url()).await?;
    make_bucket(&mut raw, ttl).await?;
    Ok((server, raw))
}

fn place(url: &str) -> Result<ServerRef> {
    Ok(ServerRef::Known(Box::new(Connection::to(Endpoint::parse(url).map_err(anyhow::Error::msg)?))))
}

fn stand(url: &str, candidate: &str) -> Result<Campaign> {
    let election = Election { key: KEY.to_owned(), candidate: candidate.to_owned() };
    Ok(Campaign::start(Arc::new(AllowList::default()), place(url)?, election))
}

async fn won(led: &mut watch::Receiver<Leadership>) -> Result<()> {
    let won = timeout(LIMIT, election::won(led)).await.with_context(|| format!("no victory: {:?}", led.borrow()))?;
    ensure!(won, "the campaign is over");
    Ok(())
}

async fn lost(led: &mut watch::Receiver<Leadership>) -> Result<()> {
    timeout(LIMIT, election::lost(led)).await.context("still leads")
}

/// Waits until the campaign has tried, in vain, so many times more.
async fn tried(led: &watch::Receiver<Leadership>, times: u64) -> Result<()> {
    let tries = || led.borrow().campaigns.candidate;
    let enough = tries() + times;
    wait_for("attempts in vain", LIMIT, async || tries() >= enough).await
}

async fn told(led: &mut watch::Receiver<Leadership>, expect: &str) -> Result<()> {
    let says = |led: &Leadership| led.error.as_ref().is_some_and(|error| error.contains(expect));
    let heard = timeout(LIMIT, led.wait_for(says)).await.map(|heard| heard.map(|_| ()));
    Ok(heard.with_context(|| format!("`{expect}` is not reported: {:?}", led.borrow()))??)
}

/// The state of the key: revision, and the value unless it is a deletion.
async fn key(raw: &mut Raw) -> Result<Option<(u64, Option<String>)>> {
    let found = raw.api(&format!("STREAM.MSG.GET.{STREAM}"), json!({"last_by_subj": SUBJECT})).await;
    let found = match found {
        Err(error) if error.to_string().contains("10037") => return Ok(None),
        found => found?,
    };
    let bytes = |name: &str| STANDARD.decode(found["message"][name].as_str().unwrap_or_default());
    let value = header_values(&bytes("hdrs")?, "KV-Operation").is_empty().then_some(bytes("data")?);
    let value = value.map(|value| String::from_utf8_lossy(&value).into_owned());
    Ok(Some((found["message"]["seq"].as_u64().context("no sequence")?, value)))
}

/// Choria's replicator.
struct Old {
    raw: Raw,
    /// Of its last write, while it leads.
    revision: Option<u64>,
}

impl Old {
    async fn connect(url: &str) -> Result<Self> {
        Ok(Self { raw: Raw::connect(url).await?, revision: None })
    }

    /// Writes at a revision; whether that worked.
    async fn write(&mut self, revision: u64) -> bool {
        let line = format!("Nats-Expected-Last-Subject-Sequence: {revision}");
        self.revision = self.raw.publish(&Outgoing::new(SUBJECT, "old").with_lines(&[&line])).await.ok();
        self.revision.is_some()
    }

    /// Creates the key, where only the marker of a deletion lies too.
    async fn create(&mut self) -> Result<bool> {
        if self.write(0).await {
            return Ok(true);
        }
        match key(&mut self.raw).await? {
            Some((marker, None)) => Ok(self.write(marker).await),
            _ => Ok(false),
        }
    }

    /// Says that it still leads.
    async fn update(&mut self) -> bool {
        match self.revision {
            Some(revision) => self.write(revision).await,
            None => false,
        }
    }

    /// Its shutdown: the key is deleted, whoever leads.
    async fn shut_down(mut self) -> Result<()> {
        self.raw.publish(&Outgoing::new(SUBJECT, "").with_lines(&["KV-Operation: DEL"])).await.map(|_| ())
    }

    /// Leads from now on, until an update fails.
    fn lead(mut self) -> Leading {
        let updates = Arc::new(AtomicU64::new(0));
        let count = updates.clone();
        let task = tokio::spawn(async move {
            while self.update().await {
                count.fetch_add(1, Ordering::SeqCst);
                sleep(Duration::from_millis(250)).await;
            }
        });
        Leading { task, updates }
    }
}

/// An old replicator that leads; aborting the task is the death of the process.
struct Leading {
    task: JoinHandle<()>,
    updates: Arc<AtomicU64>,
}

impl Leading {
    /// It leads, and continues to.
    async fn goes_on(&self) -> Result<()> {
        let updates = || self.updates.load(Ordering::SeqCst);
        let enough = updates() + 3;
        wait_for("the old leader to continue", LIMIT, async || updates() >= enough || self.task.is_finished()).await?;
        ensure!(!self.task.is_finished(), "the old leader stood down");
        Ok(())
    }
}

#[tokio::test]
async fn while_an_old_leader_lives_we_wait_and_when_it_dies_we_lead() -> Result<()> {
    let (server, mut raw) = start(SHORT).await?;
    let mut old = Old::connect(&server.url()).await?;
    ensure!(old.create().await?);
    let old = old.lead();
    let campaign = stand(&server.url(), NEW)?;
    let mut led = campaign.led();
    tried(&led, 3).await?;
    old.goes_on().await?;
    let (_, value) = key(&mut raw).await?.context("no key")?;
    ensure!(value.as_deref() == Some("old") && !led.borrow().leads(Instant::now()));

    old.task.abort();
    won(&mut led).await?;
    let (_, value) = key(&mut raw).await?.context("no key")?;
    ensure!(value.as_deref() == Some(NEW), "{value:?}");
    let mut other = Old::connect(&server.url()).await?;
    ensure!(!other.create().await?, "two lead");
    let Leadership { error, campaigns, .. } = led.borrow().clone();
    ensure!(error.is_none() && campaigns.candidate >= 4 && campaigns.leader >= 1, "{error:?} {campaigns:?}");
    let reading = campaign.poll().reading();
    ensure!((reading.election.as_str(), reading.identity.as_str(), reading.leads) == (KEY, NEW, true), "{reading:?}");
    Ok(())
}

#[tokio::test]
async fn a_standby_that_stops_leaves_the_key_alone() -> Result<()> {
    let (server, mut raw) = start(LONG).await?;
    let mut old = Old::connect(&server.url()).await?;
    ensure!(old.create().await?);
    let campaign = stand(&server.url(), NEW)?;
    tried(&campaign.led(), 2).await?;
    let before = key(&mut raw).await?;
    campaign.stop().await;
    ensure!(key(&mut raw).await? == before, "{before:?}");
    ensure!(old.update().await, "the old leader was evicted");
    Ok(())
}

#[tokio::test]
async fn a_leader_that_stops_frees_the_key_at_once() -> Result<()> {
    let (server, mut raw) = start(LONG).await?;
    let campaign = stand(&server.url(), NEW)?;
    let mut led = campaign.led();
    won(&mut led).await?;
    let mut old = Old::connect(&server.url()).await?;
    ensure!(!old.create().await?, "two lead");
    campaign.stop().await;
    lost(&mut led).await?;
    ensure!(matches!(key(&mut raw).await?, Some((_, None))));
    ensure!(old.create().await?, "the key is not free");
    Ok(())
}

#[tokio::test]
async fn a_winner_that_does_not_lead_yet_frees_the_key_too() -> Result<()> {
    let (server, mut raw) = start(LONG).await?;
    let campaign = stand(&server.url(), NEW)?;
    wait_for("a key", LIMIT, async || key(&mut raw).await.is_ok_and(|key| key.is_some())).await?;
    campaign.stop().await;
    ensure!(matches!(key(&mut raw).await?, Some((_, None))));
    Ok(())
}

#[tokio::test]
async fn a_stop_frees_the_election_without_the_ttl() -> Result<()> {
    let (server, mut raw) = start(LONG).await?;
    let first = stand(&server.url(), "first")?;
    won(&mut first.led()).await?;
    let second = stand(&server.url(), "second")?;
    tried(&second.led(), 2).await?;
    ensure!(!second.led().borrow().leads(Instant::now()), "two lead");
    first.stop().await;
    won(&mut second.led()).await?;
    let (_, value) = key(&mut raw).await?.context("no key")?;
    ensure!(value.as_deref() == Some("second"), "{value:?}");
    Ok(())
}

#[tokio::test]
async fn who_is_evicted_by_a_deletion_stands_down_at_the_next_update() -> Result<()> {
    let (server, _) = start(LONG).await?;
    let campaign = stand(&server.url(), NEW)?;
    let mut led = campaign.led();
    won(&mut led).await?;
    let mut old = Old::connect(&server.url()).await?;
    // An old standby stops: it deletes what is not its own. We may be the first to take the key again.
    let mut evict = async || {
        Old::connect(&server.url()).await?.shut_down().await?;
        old.create().await
    };
    while !evict().await? {}
    // Long before the TTL.
    lost(&mut led).await?;
    let old = old.lead();
    tried(&led, 2).await?;
    old.goes_on().await?;
    ensure!(!led.borrow().leads(Instant::now()), "two lead");
    Ok(())
}

#[tokio::test]
async fn a_lost_connection_ends_leadership_until_the_next_one() -> Result<()> {
    let (server, mut raw) = start(LONG).await?;
    let proxy = Proxy::start(server.port()).await?;
    let campaign = stand(&proxy.url(), NEW)?;
    let mut led = campaign.led();
    won(&mut led).await?;
    proxy.cut();
    let begun = Instant::now();
    lost(&mut led).await?;
    ensure!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    told(&mut led, "cannot connect to").await?;
    let mut old = Old::connect(&server.url()).await?;
    ensure!(!old.create().await?, "the key is free before its TTL");
    proxy.resume();
    won(&mut led).await?;
    ensure!(led.borrow().error.is_none(), "{:?}", led.borrow());
    let (_, value) = key(&mut raw).await?.context("no key")?;
    ensure!(value.as_deref() == Some(NEW), "{value:?}");
    Ok(())
}

#[tokio::test]
async fn a_silent_connection_ends_leadership_by_our_own_clock() -> Result<()> {
    let (server, _) = start(SHORT).await?;
    let proxy = Proxy::start(server.port()).await?;
    let campaign = stand(&proxy.url(), NEW)?;
    let mut led = campaign.led();
    won(&mut led).await?;
    let mut old = Old::connect(&server.url()).await?;
    proxy.stall();
    wait_for("the TTL", LIMIT, async || old.create().await.is_ok_and(|free| free)).await?;
    ensure!(!led.borrow().leads(Instant::now()), "two lead");
    let old = old.lead();
    // What was on its way comes too late, and changes nothing.
    proxy.resume();
    tried(&led, 2).await?;
    old.goes_on().await?;
    ensure!(!led.borrow().leads(Instant::now()), "two lead");
    Ok(())
}

/// A login with these subjects to publish to leads, waits for an old leader, and leads again.
async fn leads_with(publish: &[&str]) -> Result<()> {
    let users = json!([{"user": "all", "password": "p"}, {"user": "new", "password": "p",
        "permissions": {"publish": publish, "subscribe": ["_INBOX.>"]}}]);
    let server = Server::builder(Role::Source).config(&format!("authorization: {{users: {users}}}")).start().await?;
    let mut raw = Raw::connect(&server.url_as("all:p")).await?;
    make_bucket(&mut raw, SHORT).await?;
    let campaign = stand(&server.url_as("new:p"), NEW)?;
    let mut led = campaign.led();
    won(&mut led).await?;
    Old::connect(&server.url_as("all:p")).await?.shut_down().await?;
    let mut old = Old::connect(&server.url_as("all:p")).await?;
    ensure!(old.create().await?, "the key is not free");
    lost(&mut led).await?;
    let leading = old.lead();
    tried(&led, 1).await?;
    leading.goes_on().await?;
    leading.task.abort();
    Old::connect(&server.url_as("all:p")).await?.shut_down().await?;
    won(&mut led).await?;
    ensure!(led.borrow().error.is_none(), "{:?}", led.borrow());
    campaign.stop().await;
    ensure!(matches!(key(&mut raw).await?, Some((_, None))), "the key is not free");
    Ok(())
}

#[tokio::test]
async fn a_login_that_may_publish_to_its_key_alone_leads() -> Result<()> {
    leads_with(&[SUBJECT]).await
}

#[tokio::test]
async fn a_login_of_choria_for_elections_leads() -> Result<()> {
    leads_with(&["$KV.CHORIA_LEADER_ELECTION.>", "$JS.API.STREAM.INFO.KV_CHORIA_LEADER_ELECTION"]).await
}

#[tokio::test]
async fn a_login_that_may_not_publish_to_its_key_is_told() -> Result<()> {
    let users = json!([{"user": "new", "password": "p", "permissions": {"publish": ["other"]}}]);
    let server = Server::builder(Role::Source).config(&format!("authorization: {{users: {users}}}")).start().await?;
    let campaign = stand(&server.url_as("new:p"), NEW)?;
    told(&mut campaign.led(), &format!("Permissions Violation for Publish to \"{SUBJECT}\"")).await
}

#[tokio::test]
async fn a_missing_bucket_is_told_and_looked_for_again() -> Result<()> {
    let publish = json!({"publish": [SUBJECT], "subscribe": ["_INBOX.>"]});
    let users = json!([{"user": "all", "password": "p"}, {"user": "new", "password": "p", "permissions": publish}]);
    let server = Server::builder(Role::Source).config(&format!("authorization: {{users: {users}}}")).start().await?;
    let mut raw = Raw::connect(&server.url_as("all:p")).await?;
    let campaign = stand(&server.url_as("all:p"), NEW)?;
    let mut led = campaign.led();
    let add = "`nats kv add CHORIA_LEADER_ELECTION --ttl 10s --replicas 3`";
    told(&mut led, &format!("bucket `CHORIA_LEADER_ELECTION` does not exist: make it with {add}")).await?;
    // A client that may not ask only knows that there is no answer.
    let blind = stand(&server.url_as("new:p"), "blind")?;
    told(&mut blind.led(), &format!("or it does not exist and is made with {add}")).await?;
    blind.stop().await;

    make_bucket(&mut raw, Duration::ZERO).await?;
    told(&mut led, "bucket `CHORIA_LEADER_ELECTION` has no TTL, and 1 s to 1 h is right").await?;
    raw.api(&format!("STREAM.UPDATE.{STREAM}"), bucket(Duration::from_millis(500))).await?;
    told(&mut led, "has a TTL of 500ms").await?;
    raw.api(&format!("STREAM.UPDATE.{STREAM}"), bucket(SHORT)).await?;
    won(&mut led).await?;
    ensure!(led.borrow().error.is_none(), "{:?}", led.borrow());
    Ok(())
}

#[tokio::test]
async fn the_shortest_ttl_is_long_enough_to_go_on_leading() -> Result<()> {
    let (server, _) = start(Duration::from_secs(1)).await?;
    let campaign = stand(&server.url(), NEW)?;
    let mut led = campaign.led();
    won(&mut led).await?;
    // On a machine that is busy for longer than this lease it may be lost, and won again.
    let mut won_at = led.borrow().campaigns;
    wait_for("10 updates without a loss", LIMIT, async || {
        let now = led.borrow().campaigns;
        if now.candidate != won_at.candidate {
            won_at = now;
        }
        now.leader >= won_at.leader + 10
    })
    .await
}

#[tokio::test]
async fn a_new_bucket_leader_is_written_from_our_own_revision() -> Result<()> {
    let cluster = Cluster::start(Role::Source).await?;
    let mut raw = Raw::connect(&cluster.servers[0].url()).await?;
    let mut config = bucket(LONG);
    config["num_replicas"] = 3.into();
    raw.create_stream(STREAM, config).await?;
    let campaign = stand(&cluster.url(), NEW)?;
    let mut led = campaign.led();
    won(&mut led).await?;
    let before = led.borrow().campaigns;
    raw.api(&format!("STREAM.LEADER.STEPDOWN.{STREAM}"), Value::Null).await?;
    // Whether an update met the change or not: long before the TTL.
    wait_for("updates after the change", LIMIT, async || {
        let now = led.borrow().clone();
        now.leads(Instant::now()) && now.campaigns.leader >= before.leader + 5
    })
    .await
}

#[tokio::test]
async fn the_bucket_of_a_domain_is_written_by_way_of_the_domain() -> Result<()> {
    let port = free_port()?;
    let listen = format!("leafnodes {{ host: \"127.0.0.1\", port: {port} }}");
    let hub = Server::builder(Role::Source).domain("hub").config(&listen).start().await?;
    let remote = format!("leafnodes {{ remotes: [{{ url: \"nats://127.0.0.1:{port}\" }}] }}");
    let leaf = Server::builder(Role::Source).domain("leaf").config(&remote).start().await?;
    let mut raw = Raw::connect(&hub.url()).await?;
    make_bucket(&mut raw, LONG).await?;
    let ServerRef::Known(mut connection) = place(&leaf.url())? else { anyhow::bail!("no place") };
    connection.api_prefix = "$JS.hub.API".to_owned();
    let election = Election { key: KEY.to_owned(), candidate: NEW.to_owned() };
    let campaign = Campaign::start(Arc::new(AllowList::default()), ServerRef::Known(connection), election);
    won(&mut campaign.led()).await?;
    let (_, value) = key(&mut raw).await?.context("no key")?;
    ensure!(value.as_deref() == Some(NEW), "{value:?}");
    campaign.stop().await;
    ensure!(matches!(key(&mut raw).await?, Some((_, None))), "the key is not free");
    Ok(())
}

/// What each of so many instances says of a replication.
async fn said_by_all(site: &Site, id: &str, instances: usize) -> Result<Vec<Value>> {
    let inbox = site.client.new_inbox();
    let replies = site.client.subscribe(inbox.clone()).await?.take(instances);
    site.client.publish_with_reply("replicator.status", inbox, "".into()).await?;
    let replies: Vec<_> = timeout(Duration::from_secs(2), replies.collect()).await?;
    let row = |message: &async_nats::Message| -> Option<Value> {
        let body: Value = serde_json::from_slice(&message.payload).ok()?;
        body["replications"].as_array()?.iter().find(|row| row["replication"] == id).cloned()
    };
    replies.iter().map(row).collect::<Option<Vec<_>>>().context("no row")
}

#[tokio::test]
async fn all_instances_say_who_waits_for_an_election() -> Result<()> {
    const ID: &str = "ORDERS.EAST";
    let (server, _) = start(SHORT).await?;
    let site = Site::builder().on(server, Server::start(Role::Target).await?).args(["--instance", "one"]);
    let mut site = site.start().await?;
    site.filled("ORDERS", 10).await?;
    site.add("ORDERS", json!({"name": "EAST", "leader_election_name": NEW})).await?;
    site.settled(ID, 10).await?;
    let _two = Service::builder(&site.control().url(), SITE).instance("two").start().await?;
    let all_say = async |site: &Site, what: &str, is: fn(&Value) -> bool| {
        let all = async || said_by_all(site, ID, 2).await.is_ok_and(|rows| rows.iter().all(is));
        wait_for(what, LIMIT, all).await
    };
    all_say(&site, "both to say that it runs", |row| row["state"] == "running" && row["leader"] == "one").await?;
    // An old replicator takes the key.
    let mut old = Old::connect(&site.source.url()).await?;
    let (revision, _) = key(&mut old.raw).await?.context("no key")?;
    let mut won = old.write(revision).await;
    while !won {
        let (revision, _) = key(&mut old.raw).await?.context("no key")?;
        won = old.write(revision).await;
    }
    let old = old.lead();
    all_say(&site, "both to say that it waits", |row| row["state"] == "stopped" && row["leader"].is_null()).await?;
    let told = site.events.wait("stopped", ID).await?;
    ensure!(told["message"].as_str().unwrap_or_default().contains("election was lost"), "{told}");
    old.task.abort();
    all_say(&site, "both to say that it runs again", |row| row["state"] == "running" && row["leader"] == "one").await
}

#[tokio::test]
async fn a_replication_is_copied_only_while_its_election_is_won() -> Result<()> {
    const ID: &str = "ORDERS.EAST";
    let (server, mut raw) = start(SHORT).await?;
    let site = Site::builder().on(server, Server::start(Role::Target).await?).args(["--monitor", "127.0.0.1:0"]);
    let mut site = site.start().await?;
    site.filled("ORDERS", 10).await?;
    let mut old = Old::connect(&site.source.url()).await?;
    ensure!(old.create().await?);
    let old = old.lead();
    site.add("ORDERS", json!({"name": "EAST", "leader_election_name": NEW})).await?;
    let waits = |row: &Value| row["state"] == "stopped" && row["leader"].is_null();
    site.row_when(ID, "waits for the election", waits).await?;
    old.goes_on().await?;
    let row = site.row(ID).await.context("a row")?;
    ensure!(row["state"] == "stopped" && row["counters"]["copied"] == 0, "{row}");
    old.task.abort();
    site.settled(ID, 10).await?;
    let (_, page) = site.service.get("/metrics").await?;
    let leads = "choria_stream_replicator_election_leader{election=\"SR_EAST_ORDERS\",identity=\"new.example.net\"";
    ensure!(page.lines().any(|line| line.starts_with(leads) && line.ends_with(" 1")), "{page}");

    // Frozen for longer than the bucket keeps the key: the old one leads, and nothing is copied after the thaw.
    site.service.freeze()?;
    let mut old = Old::connect(&site.source.url()).await?;
    wait_for("the old one to win", LIMIT, async || old.create().await.unwrap_or(false)).await?;
    let old = old.lead();
    site.publish("ORDERS", 11..=20).await?;
    site.service.thaw()?;
    site.row_when(ID, "finds that it has lost", waits).await?;
    old.goes_on().await?;
    assert_eq!(site.at_target("ORDERS").await?, 10);
    old.task.abort();
    site.settled(ID, 20).await?;
    site.verify("ORDERS", &Expect::copy_of("ORDERS").name("EAST")).await?;

    site.stop().await?;
    ensure!(key(&mut raw).await?.is_none_or(|(_, value)| value.is_none()), "the key is not freed");
    Ok(())
}
