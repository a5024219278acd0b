//! Networks fail between the service and its servers: connections end anywhere, go silent, or are slow. Every message
//! once, in order, and the copy continues by itself.

use std::time::{Duration, Instant};

use anyhow::Result;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::json;

use crate::harness::copies::KINDS;
use crate::harness::{
    BOTH, Cluster, Copies, Direction, LIMIT, Newcomers, Outgoing, Proxy, Role, Site, request, wait_for,
};

const LONG: Duration = Duration::from_secs(120);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum NetworkSides {
    Source,
    Target,
    Both,
}

impl NetworkSides {
    fn proxies(self, copies: &Copies) -> Vec<&Proxy> {
        let (source, target) = (&copies.source.proxies, &copies.target.proxies);
        match self {
            NetworkSides::Source => source.iter().collect(),
            NetworkSides::Target => target.iter().collect(),
            NetworkSides::Both => source.iter().chain(target).collect(),
        }
    }
}

async fn single_servers() -> Result<Copies> {
    let (source, target) = tokio::try_join!(Cluster::single(Role::Source), Cluster::single(Role::Target))?;
    Copies::start(source, target, &KINDS, json!({})).await
}

async fn cluster_at_target() -> Result<Copies> {
    let (source, target) = tokio::try_join!(Cluster::single(Role::Source), Cluster::start(Role::Target))?;
    Copies::start(source, target, &KINDS, json!({})).await
}

/// Cuts a connection of either side after a random number of bytes in a random direction, so many times.
async fn cut(copies: &Copies, times: usize) -> Result<()> {
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    for time in 1..=times {
        let side = if random.random_bool(0.5) { NetworkSides::Source } else { NetworkSides::Target };
        let proxies = side.proxies(copies);
        let accepted = || proxies.iter().map(|proxy| proxy.accepted()).sum::<u64>();
        // Most bytes flow away from the source; the other way there is little but requests and acks.
        let much = random.random_bool(0.7);
        let direction = if much == (side == NetworkSides::Target) { Direction::ToServer } else { Direction::ToClient };
        let bytes = random.random_range(1..if much { 100_000 } else { 2_000 });
        let before = accepted();
        proxies.iter().for_each(|proxy| proxy.cut_after(direction, bytes));
        if side == NetworkSides::Source && !much {
            // Hardly anything is asked of the source but at the start.
            proxies.iter().for_each(|proxy| proxy.drop_connections());
        }
        let what = format!("cut {time}: {side:?}, {bytes} bytes {direction:?}, and another connection");
        let cut = || proxies.iter().any(|proxy| !proxy.cut_pending(direction));
        wait_for(&what, LIMIT, async || cut() && accepted() > before).await?;
    }
    copies.go_on("the last cut").await
}

/// Connections of these sides are silent for a while, and for good; then new ones work.
async fn half_open(
    copies: &Copies,
    sides: NetworkSides,
    directions: &[Direction],
    newcomers: Newcomers,
    time: Duration,
) -> Result<()> {
    let proxies = sides.proxies(copies);
    proxies.iter().for_each(|proxy| proxy.half_open(directions, newcomers));
    tokio::time::sleep(time).await;
    proxies.iter().for_each(|proxy| proxy.resume());
    copies.go_on(&format!("{sides:?} half-open {directions:?} for {time:?}, newcomers {newcomers:?}")).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_are_cut_anywhere_many_times() -> Result<()> {
    let mut copies = cluster_at_target().await?;
    cut(&copies, 30).await?;
    copies.verify().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes: make check-long"]
async fn connections_are_cut_anywhere_hundreds_of_times() -> Result<()> {
    let mut copies = cluster_at_target().await?;
    for _ in 0..4 {
        cut(&copies, 100).await?;
    }
    copies.verify().await
}

/// All sides at once, each on servers of its own: nearly all of the time is waiting.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_fall_silent_are_given_up_in_time() -> Result<()> {
    let one = async |sides: NetworkSides, directions: &[Direction]| {
        let mut copies = single_servers().await?;
        // A firewall forgot what it knew: nothing is ever heard again, and nothing but the silence tells.
        half_open(&copies, sides, directions, Newcomers::Work, Duration::ZERO).await?;
        copies.verify().await
    };
    tokio::try_join!(
        one(NetworkSides::Source, BOTH),
        one(NetworkSides::Target, BOTH),
        one(NetworkSides::Both, BOTH),
        one(NetworkSides::Target, &[Direction::ToClient]),
    )?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_network_stops_the_copy_no_longer_than_it_lasts() -> Result<()> {
    let mut copies = cluster_at_target().await?;
    half_open(&copies, NetworkSides::Both, BOTH, Newcomers::Hang, Duration::from_secs(30)).await?;
    copies.verify().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes: make check-long"]
async fn half_open_connections_of_thirty_seconds_in_every_way() -> Result<()> {
    let mut copies = cluster_at_target().await?;
    for sides in [NetworkSides::Source, NetworkSides::Target, NetworkSides::Both] {
        for directions in [BOTH, &[Direction::ToServer], &[Direction::ToClient]] {
            for (newcomers, seconds) in [(Newcomers::Work, 0), (Newcomers::Hang, 30)] {
                half_open(&copies, sides, directions, newcomers, Duration::from_secs(seconds)).await?;
            }
        }
    }
    copies.verify().await
}

/// Frozen for longer than any timeout of ours or the servers'.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes: make check-long"]
async fn servers_and_the_service_are_frozen_for_long() -> Result<()> {
    let mut copies = cluster_at_target().await?;
    let frozen = Duration::from_secs(35);
    copies.service.freeze()?;
    tokio::time::sleep(frozen).await;
    copies.service.thaw()?;
    copies.go_on("the service was frozen").await?;
    copies.source.servers[0].freeze()?;
    tokio::time::sleep(frozen).await;
    copies.source.servers[0].thaw()?;
    copies.wait_leaders().await?;
    copies.go_on("the source was frozen").await?;
    copies.target.servers.iter().try_for_each(|server| server.freeze())?;
    tokio::time::sleep(frozen).await;
    copies.target.servers.iter().try_for_each(|server| server.thaw())?;
    copies.wait_leaders().await?;
    copies.go_on("the whole target was frozen").await?;
    copies.verify().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_that_was_frozen_goes_on() -> Result<()> {
    let mut copies = single_servers().await?;
    copies.service.freeze()?;
    // Longer than the server waits for the next message of a batch.
    tokio::time::sleep(Duration::from_secs(12)).await;
    copies.service.thaw()?;
    copies.go_on("the service was frozen").await?;
    copies.verify().await
}

/// What is on its way for long is not lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_line_is_not_taken_for_a_silent_one() -> Result<()> {
    const COUNT: u64 = 500;
    let site = Site::small().await?;
    let target = Proxy::start(site.target.port()).await?;
    target.throttle(BOTH, Some(1 << 20));
    let mut raw = site.source_stream("T", json!({})).await?;
    raw.publish_all((0..COUNT).map(|i| Outgoing::new("t.a", format!("{i:0>16384}")))).await?;
    let begun = Instant::now();
    site.add("T", json!({"target_url": target.url()})).await?;
    let row = site.settled("T", COUNT).await?;
    println!("8 MiB at 1 MiB/s in {:?}", begun.elapsed());
    assert_eq!((&row["counters"]["errors"], &row["counters"]["received"]), (&json!(0), &json!(COUNT)), "{row}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes long: make check-long"]
async fn latency_costs_the_copy_little_of_its_speed() -> Result<()> {
    const COUNT: u64 = 100_000;
    let site = Site::start().await?;
    let (source, target) = (Proxy::start(site.source.port()).await?, Proxy::start(site.target.port()).await?);
    let mut raw = site.source_stream("W", json!({})).await?;
    raw.publish_all((0..COUNT).map(|i| Outgoing::new("w.a", format!("{i:0>1024}")))).await?;
    let each_way = Duration::from_millis(25);
    let mut rates = Vec::new();
    for (name, slow) in
        [("near", vec![]), ("from", vec![&source]), ("to", vec![&target]), ("far", vec![&source, &target])]
    {
        for proxy in [&source, &target] {
            proxy.latency(BOTH, Duration::ZERO);
        }
        slow.iter().for_each(|proxy| proxy.latency(BOTH, each_way));
        site.add(
            "W",
            json!({"name": name, "target_stream": name, "target_subject_prefix": name,
            "source_url": source.url(), "target_url": target.url()}),
        )
        .await?;
        // Without the start, which takes some round trips.
        site.copied(name, 1).await?;
        let (begun, before) = (Instant::now(), site.at_target(name).await?);
        let id = format!("W.{name}");
        site.settled_within(&id, COUNT, LONG).await?;
        let rate = (COUNT - before) as f64 / begun.elapsed().as_secs_f64();
        println!("{name}: {rate:.0} messages/s");
        rates.push(rate);
        request(&site.client, "replicator.config.delete", json!({"replication": id})).await?;
    }
    // The bench has the exact figures; here other tests run beside it.
    assert!(rates[1..].iter().all(|rate| *rate > rates[0] / 3.0), "{rates:?}");
    Ok(())
}
