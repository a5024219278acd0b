//! Which address of a server an async-nats client tries. The client takes the addresses of a name one after the other and gives
//! each of them the whole connect timeout; over a websocket it tries no address but the first.
//!
//! So where names have several addresses, they are tried here first, each on its own, until a server says INFO. If that is not
//! the first address of its name, the client gets the address itself. Its certificate is verified for the name, but the
//! handshake does not carry the name (SNI): after an address failed, the name is tried again.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use async_nats::{Server, ServerAddr};
use futures_util::future::join_all;
use rustls_pki_types::ServerName;
use tokio::{net::lookup_host, time::timeout};

use crate::{
    Connection, Endpoint, Error, Host, Lane,
    lane::{NEXT_ADDRESS, race},
};

/// How long a name may take to be resolved; after it the client resolves the name itself.
const RESOLVE: Duration = Duration::from_secs(1);
/// How long the addresses are waited for before all of them are tried again, the first time: one that refused may be back
/// long before another one is given up. Each round is twice as long.
const ROUND: Duration = Duration::from_secs(1);

/// The servers of a connection, of which at least one has several addresses.
#[derive(Debug)]
pub(crate) struct Routes {
    connection: Connection,
    servers: Vec<RoutedServer>,
}

#[derive(Debug)]
struct RoutedServer {
    host: Host,
    /// Its URL as the connection has it.
    name: ServerAddr,
    /// The same with each of its addresses of now, if there are several.
    addresses: Vec<(SocketAddr, ServerAddr)>,
}

impl Routes {
    /// `None` where no name has several addresses: there the client needs no help.
    pub async fn find(connection: &Connection) -> Result<Option<Self>, Error> {
        let endpoint = &connection.endpoint;
        let resolved = join_all(endpoint.hosts.iter().map(resolve)).await;
        if resolved.iter().all(|addresses| addresses.len() < 2) {
            return Ok(None);
        }
        let servers = endpoint.hosts.iter().zip(resolved).map(|(host, found)| RoutedServer::new(endpoint, host, found));
        let servers = servers.collect::<Result<_, _>>()?;
        Ok(Some(Self { connection: connection.clone(), servers }))
    }

    /// Everything that [`Self::next`] may name.
    pub fn pool(&self) -> Vec<ServerAddr> {
        let names = self.servers.iter().map(|server| &server.name);
        let addresses = self.servers.iter().flat_map(|server| &server.addresses).map(|(_, url)| url);
        names.chain(addresses).cloned().collect()
    }

    /// What to try in which order, for a client that does not ask again.
    pub async fn in_order(&self) -> Vec<ServerAddr> {
        let first = self.next(&[]).await;
        let others = self.servers.iter().map(|server| server.name.clone()).filter(|name| *name != first);
        std::iter::once(first.clone()).chain(others).collect()
    }

    /// What to try next; `pool` has the failures so far.
    pub async fn next(&self, pool: &[Server]) -> ServerAddr {
        let failures = |url: &ServerAddr| {
            pool.iter().find(|server| server.addr == *url).map_or(0, |server| server.failed_attempts)
        };
        let mut servers: Vec<&RoutedServer> = self.servers.iter().collect();
        servers.sort_by_key(|server| failures(&server.name));
        let Some((server, address)) = self.nearest(&servers).await else { return servers[0].name.clone() };
        let url = address.and_then(|address| server.addresses.iter().find(|(known, _)| *known == address));
        match url {
            Some((_, url)) if failures(url) <= failures(&server.name) => url.clone(),
            _ => server.name.clone(),
        }
    }

    /// The server that says INFO first, with the address unless that is the first one of its name; `None` when all of them
    /// fail, or none does so within the connect timeout.
    async fn nearest<'a>(&self, servers: &[&'a RoutedServer]) -> Option<(&'a RoutedServer, Option<SocketAddr>)> {
        let within = self.connection.endpoint.connect_timeout;
        let mut round = ROUND.min(within);
        loop {
            match timeout(round, self.race(servers)).await {
                Ok(nearest) => return nearest,
                Err(_) if round == within => return None,
                Err(_) => round = (2 * round).min(within),
            }
        }
    }

    async fn race<'a>(&self, servers: &[&'a RoutedServer]) -> Option<(&'a RoutedServer, Option<SocketAddr>)> {
        let resolved = join_all(servers.iter().map(|server| resolve(&server.host))).await;
        let ways = servers.iter().zip(resolved).flat_map(|(server, addresses)| {
            addresses.into_iter().enumerate().map(|(n, address)| (*server, address, n > 0))
        });
        let attempt = async |(server, address, later): (&'a RoutedServer, SocketAddr, bool)| {
            let lane = Lane::greeted(&self.connection, &server.host, address).await;
            lane.map(|_| (server, later.then_some(address)))
        };
        race(ways, NEXT_ADDRESS, attempt).await.ok()
    }

    /// What the certificate of this address is verified for: the names that have it, and the address where it is configured.
    pub fn names(&self, address: IpAddr) -> Vec<ServerName<'static>> {
        let has = |server: &&RoutedServer| {
            let written = server.host.host.parse() == Ok(address);
            written || server.addresses.iter().any(|(known, _)| known.ip() == address)
        };
        let names = self.servers.iter().filter(has).map(|server| ServerName::try_from(server.host.host.clone()));
        names.filter_map(Result::ok).collect()
    }
}

impl RoutedServer {
    fn new(endpoint: &Endpoint, host: &Host, found: Vec<SocketAddr>) -> Result<Self, Error> {
        let several = found.len() > 1;
        let addresses = found.into_iter().filter(|_| several).map(|address| {
            let host = Host { host: address.ip().to_string(), port: address.port() };
            Ok((address, server_addr(endpoint, &host)?))
        });
        let addresses = addresses.collect::<Result<_, Error>>()?;
        Ok(Self { host: host.clone(), name: server_addr(endpoint, host)?, addresses })
    }
}

/// The URL by which async-nats knows a server.
pub(crate) fn server_addr(endpoint: &Endpoint, host: &Host) -> Result<ServerAddr, Error> {
    let server = endpoint.server(host);
    server.parse().map_err(|error| Error::hold(format!("server `{server}`: {error}")))
}

/// The addresses of a host; none where they are not known in time.
async fn resolve(host: &Host) -> Vec<SocketAddr> {
    let found = timeout(RESOLVE, lookup_host((host.host.as_str(), host.port))).await;
    found.ok().and_then(Result::ok).map_or_else(Vec::new, Iterator::collect)
}
