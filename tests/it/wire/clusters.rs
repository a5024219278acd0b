//! Clusters lose leaders and servers under a copy with steady load: every message once, in order, and the copy goes
//! on by itself.

use anyhow::Result;
use serde_json::json;

use crate::harness::copies::{KINDS, SOURCE};
use crate::harness::{Cluster, Copies, End, Role};

async fn cluster_at_target() -> Result<Copies> {
    let (source, target) = tokio::try_join!(Cluster::single(Role::Source), Cluster::start(Role::Target))?;
    Copies::start(source, target, &KINDS, json!({})).await
}

async fn cluster_at_source() -> Result<Copies> {
    let (source, target) = tokio::try_join!(Cluster::start(Role::Source), Cluster::single(Role::Target))?;
    Copies::start(source, target, &KINDS, json!({})).await
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ClusterSide {
    Source,
    Target,
}

impl ClusterSide {
    fn cluster(self, copies: &Copies) -> &Cluster {
        match self {
            ClusterSide::Source => &copies.source,
            ClusterSide::Target => &copies.target,
        }
    }

    fn cluster_mut(self, copies: &mut Copies) -> &mut Cluster {
        match self {
            ClusterSide::Source => &mut copies.source,
            ClusterSide::Target => &mut copies.target,
        }
    }

    fn streams(self, copies: &Copies) -> Vec<&'static str> {
        match self {
            ClusterSide::Source => vec![SOURCE],
            ClusterSide::Target => copies.targets(),
        }
    }
}

/// The leader of each stream hands over, so many times.
async fn step_down(copies: &Copies, side: ClusterSide, times: usize) -> Result<()> {
    for time in 1..=times {
        for stream in side.streams(copies) {
            side.cluster(copies).step_down(stream).await?;
        }
        copies.go_on(&format!("{side:?}: step-downs {time}")).await?;
    }
    Ok(())
}

/// kill -9 of the leader of each stream in turn.
async fn kill_leaders(copies: &mut Copies, side: ClusterSide, streams: &[&str]) -> Result<()> {
    for stream in streams {
        let leader = side.cluster(copies).leader(stream).await.expect("a leader");
        side.cluster_mut(copies).end(leader, End::Killed).await?;
        side.cluster(copies).wait_leaders(&side.streams(copies), Some(leader)).await?;
        copies.go_on(&format!("{side:?}: leader of {stream} killed")).await?;
        side.cluster_mut(copies).servers[leader].restart().await?;
        copies.wait_current().await?;
    }
    Ok(())
}

/// SIGSTOP of the leader of each stream in turn, until another one has long led, and the thaw.
async fn freeze_leaders(copies: &Copies, side: ClusterSide, streams: &[&str]) -> Result<()> {
    let cluster = side.cluster(copies);
    for stream in streams {
        let leader = cluster.leader(stream).await.expect("a leader");
        cluster.servers[leader].freeze()?;
        cluster.wait_leaders(&side.streams(copies), Some(leader)).await?;
        copies.go_on(&format!("{side:?}: leader of {stream} frozen")).await?;
        cluster.servers[leader].thaw()?;
        copies.wait_leaders().await?;
        copies.go_on(&format!("{side:?}: leader of {stream} thawed")).await?;
        copies.wait_current().await?;
    }
    Ok(())
}

async fn one_by_one(copies: &mut Copies, side: ClusterSide, how: End) -> Result<()> {
    for server in 0..side.cluster(copies).servers.len() {
        side.cluster_mut(copies).end(server, how).await?;
        side.cluster_mut(copies).servers[server].restart().await?;
        copies.wait_leaders().await?;
        copies.go_on(&format!("{side:?}: server {server} {how:?} and started")).await?;
        copies.wait_current().await?;
    }
    Ok(())
}

async fn all_at_once(copies: &mut Copies, side: ClusterSide, how: End) -> Result<()> {
    side.cluster_mut(copies).restart_all(how).await?;
    copies.wait_leaders().await?;
    copies.go_on(&format!("{side:?}: all {how:?} and started")).await?;
    copies.wait_current().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_targets_leader_steps_down_is_killed_and_frozen() -> Result<()> {
    let mut copies = cluster_at_target().await?;
    step_down(&copies, ClusterSide::Target, 2).await?;
    kill_leaders(&mut copies, ClusterSide::Target, &["EXCLUSIVE"]).await?;
    freeze_leaders(&copies, ClusterSide::Target, &["EXCLUSIVE"]).await?;
    copies.verify().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_sources_leader_steps_down_is_killed_and_frozen() -> Result<()> {
    let mut copies = cluster_at_source().await?;
    step_down(&copies, ClusterSide::Source, 2).await?;
    kill_leaders(&mut copies, ClusterSide::Source, &[SOURCE]).await?;
    freeze_leaders(&copies, ClusterSide::Source, &[SOURCE]).await?;
    copies.verify().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_servers_of_the_target_are_restarted() -> Result<()> {
    let mut copies = cluster_at_target().await?;
    one_by_one(&mut copies, ClusterSide::Target, End::Stopped).await?;
    all_at_once(&mut copies, ClusterSide::Target, End::Killed).await?;
    copies.verify().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_servers_of_the_source_are_restarted() -> Result<()> {
    let mut copies = cluster_at_source().await?;
    one_by_one(&mut copies, ClusterSide::Source, End::Stopped).await?;
    all_at_once(&mut copies, ClusterSide::Source, End::Killed).await?;
    copies.verify().await
}

/// While a stream has no leader, and for some seconds after its start, a server answers for the stream from its own state.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_server_that_lost_its_disk_is_not_believed() -> Result<()> {
    let mut copies = cluster_at_target().await?;
    // The streams' first leaders are the servers that answer for them after the restart.
    let leader = copies.target.leader("EXCLUSIVE").await.expect("a leader");
    copies.target.end(leader, End::Killed).await?;
    copies.target.servers[leader].wipe()?;
    copies.target.servers[leader].restart().await?;
    copies.wait_leaders().await?;
    copies.go_on("a disk of the target lost").await?;
    copies.wait_current().await?;
    copies.verify().await?;
    copies.events.quiet(&["target-reset"])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes: make check-long"]
async fn everything_happens_to_the_clusters_of_both_sides() -> Result<()> {
    let (source, target) = tokio::try_join!(Cluster::start(Role::Source), Cluster::start(Role::Target))?;
    let mut copies = Copies::start(source, target, &KINDS, json!({})).await?;
    for side in [ClusterSide::Target, ClusterSide::Source] {
        let streams = side.streams(&copies);
        step_down(&copies, side, 5).await?;
        kill_leaders(&mut copies, side, &streams).await?;
        freeze_leaders(&copies, side, &streams).await?;
        for how in [End::Stopped, End::Killed] {
            one_by_one(&mut copies, side, how).await?;
            all_at_once(&mut copies, side, how).await?;
        }
    }
    copies.verify().await
}
