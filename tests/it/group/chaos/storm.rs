//! Does what a plan says, and brings back what it ended.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

use super::plan::{InstanceFault, Plan, ServerFault, Step, THREE, Trouble, Way};
use crate::harness::{Cluster, End, Proxy, Service, request};

/// A request in the middle of a storm may be lost.
const ASKED: Duration = Duration::from_secs(3);

/// The ways of one instance: a proxy in front of each server.
pub struct Paths {
    pub control: Vec<Proxy>,
    pub source: Vec<Proxy>,
    pub target: Vec<Proxy>,
}

impl Paths {
    fn of(&self, way: Way) -> &[Proxy] {
        match way {
            Way::Control => &self.control,
            Way::Source => &self.source,
            Way::Target => &self.target,
        }
    }
}

impl Trouble {
    async fn befall(self, proxies: &[&Proxy], lasts: Duration) {
        for proxy in proxies {
            match self {
                Trouble::Cut => proxy.cut(),
                Trouble::Dropped => proxy.drop_connections(),
                Trouble::Stalled => proxy.stall(),
                Trouble::HalfOpen(directions, newcomers) => proxy.half_open(directions, newcomers),
                Trouble::Slow(latency) => proxy.delay(latency),
            }
        }
        sleep(lasts).await;
        for proxy in proxies {
            proxy.delay(Duration::ZERO);
            proxy.resume();
        }
    }
}

/// A cluster, its streams, and the ways of all instances to each of its servers.
pub struct Servers<'a> {
    pub name: &'static str,
    pub cluster: &'a mut Cluster,
    pub streams: Vec<String>,
    pub ways: [Vec<&'a Proxy>; THREE],
}

/// The instances and what is needed to make them suffer.
pub struct Instances<'a> {
    pub services: &'a mut [Service],
    pub paths: &'a [Paths],
    pub client: &'a async_nats::Client,
    pub replications: Vec<String>,
}

/// All faults of a plan, and then a restart of everything, one by one.
pub async fn rage(
    plan: &Plan,
    mut instances: Instances<'_>,
    mut source: Servers<'_>,
    mut target: Servers<'_>,
) -> Result<()> {
    let begun = Instant::now();
    tokio::try_join!(
        instances.suffer(&plan.instances, begun),
        source.suffer(&plan.source, begun),
        target.suffer(&plan.target, begun)
    )?;
    let each = [0, 1, 2];
    let (instance, server) =
        (each.map(|which| restart(InstanceFault::Stop(which))), each.map(|which| restart(ServerFault::Stop(which))));
    tokio::try_join!(instances.suffer(&instance, begun), source.suffer(&server, begun), target.suffer(&server, begun))?;
    Ok(())
}

fn restart<F>(fault: F) -> Step<F> {
    Step { pause: Duration::ZERO, fault, lasts: Duration::ZERO }
}

impl Instances<'_> {
    async fn suffer(&mut self, steps: &[Step<InstanceFault>], begun: Instant) -> Result<()> {
        for Step { pause, fault, lasts } in steps {
            sleep(*pause).await;
            println!("{:6.2} instances: {fault:?} for {lasts:?}", begun.elapsed().as_secs_f64());
            self.inflict(*fault, *lasts).await.with_context(|| format!("instances: {fault:?}"))?;
            println!("{:6.2} instances: {fault:?} is over", begun.elapsed().as_secs_f64());
        }
        Ok(())
    }

    async fn inflict(&mut self, fault: InstanceFault, lasts: Duration) -> Result<()> {
        match fault {
            InstanceFault::Kill(which) => {
                self.services[which].kill()?;
                sleep(lasts).await;
                self.services[which].restart().await?;
            }
            InstanceFault::Stop(which) => {
                // Without its servers it may not be able to say good-bye, and exits with an error; but it exits.
                self.services[which].stop().await?;
                sleep(lasts).await;
                self.services[which].restart().await?;
            }
            InstanceFault::Freeze(which) => {
                self.services[which].freeze()?;
                sleep(lasts).await;
                self.services[which].thaw()?;
            }
            InstanceFault::StepDown(number) => {
                let id = &self.replications[number % self.replications.len()];
                let asked = request(self.client, "replicator.stepdown", json!({"replication": id}));
                let _ = timeout(ASKED, asked).await;
            }
            InstanceFault::Network(which, way, trouble) => {
                let proxies: Vec<&Proxy> = self.paths[which].of(way).iter().collect();
                trouble.befall(&proxies, lasts).await;
            }
        }
        Ok(())
    }
}

impl Servers<'_> {
    async fn suffer(&mut self, steps: &[Step<ServerFault>], begun: Instant) -> Result<()> {
        let name = self.name;
        for Step { pause, fault, lasts } in steps {
            sleep(*pause).await;
            println!("{:6.2} {name}: {fault:?} for {lasts:?}", begun.elapsed().as_secs_f64());
            let whole = async {
                self.inflict(*fault, *lasts).await?;
                println!("{:6.2} {name}: {fault:?} is over", begun.elapsed().as_secs_f64());
                self.heal().await
            };
            whole.await.with_context(|| format!("{name}: {fault:?}"))?;
            println!("{:6.2} {name}: healed", begun.elapsed().as_secs_f64());
        }
        Ok(())
    }

    /// Until all replicas have everything: what a majority has confirmed is safe only if the next fault waits for that.
    async fn heal(&self) -> Result<()> {
        let streams: Vec<&str> = self.streams.iter().map(String::as_str).collect();
        self.cluster.wait_leaders(&streams, None).await?;
        self.cluster.wait_current(&streams).await
    }

    async fn inflict(&mut self, fault: ServerFault, lasts: Duration) -> Result<()> {
        match fault {
            ServerFault::Kill(which) => self.end(which, End::Killed, lasts).await?,
            ServerFault::Stop(which) => self.end(which, End::Stopped, lasts).await?,
            ServerFault::Freeze(which) => {
                self.cluster.servers[which].freeze()?;
                sleep(lasts).await;
                self.cluster.servers[which].thaw()?;
            }
            ServerFault::Lose(which) => {
                self.cluster.servers[which].kill()?;
                self.cluster.servers[which].wipe()?;
                sleep(lasts).await;
                self.cluster.servers[which].restart().await?;
            }
            ServerFault::KillAll => self.cluster.restart_all(End::Killed).await?,
            ServerFault::StepDown(number) => {
                let stream = &self.streams[number % self.streams.len()];
                self.cluster.ask(&format!("STREAM.LEADER.STEPDOWN.{stream}"), &Value::Null).await;
            }
            ServerFault::Network(which, trouble) => trouble.befall(&self.ways[which], lasts).await,
        }
        Ok(())
    }

    async fn end(&mut self, which: usize, how: End, lasts: Duration) -> Result<()> {
        self.cluster.end(which, how).await?;
        sleep(lasts).await;
        self.cluster.servers[which].restart().await
    }
}
