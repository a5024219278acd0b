//! Which address of a server an async-nats client tries. The client takes the addresses of a name one after the other and gives
//! each of them the whole connect timeout; over a websocket it tries no address but the first.
//!
//! So if a name has several addresses, this module tries them first, each on its own, until a server sends INFO. If that is not
//! the first address of its name, the client gets the address itself. Its certificate is verified for the name, but the
//! handshake does not carry the name (SNI): after an address failed, the name is tried again.
//!
//! The client's own lookup of a name has no deadline. So several servers are tried here first too, unless all of them are
//! addresses: a name whose lookup hangs does not keep the client from the other servers.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use async_nats::{Server, ServerAddr};
use futures_util::future::join_all;
use rustls_pki_types::ServerName;
use tokio::time::timeout;

use crate::{
    Connection, Endpoint, Error, Host, Lane,
    lane::{NEXT_ADDRESS, race},
    resolver::resolve,
};

/// How long a name may take to be resolved where the other names wait for it.
pub(crate) const RESOLVE: Duration = Duration::from_secs(1);
/// Length of the first round of attempts; after it all addresses are tried again, because an address that refused may be back
/// long before another attempt times out. Each round is twice as long.
const ROUND: Duration = Duration::from_secs(1);

/// The servers of a connection: several servers, or one with several addresses.
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
    /// `None` for a single address, and for servers that are all written as addresses: there the client needs no help.
    pub async fn find(connection: &Connection) -> Result<Option<Self>, Error> {
        let endpoint = &connection.endpoint;
        let resolved = join_all(endpoint.hosts.iter().map(addresses)).await;
        let is_name = |host: &Host| host.host.parse::<IpAddr>().is_err();
        let several_servers = endpoint.hosts.len() > 1 && endpoint.hosts.iter().any(is_name);
        if !several_servers && resolved.iter().all(|addresses| addresses.len() < 2) {
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

    /// All servers in the order in which to try them, for a client that does not call [`Self::next`].
    pub async fn in_order(&self) -> Vec<ServerAddr> {
        let first = self.next(&[]).await;
        let others = self.servers.iter().map(|server| server.name.clone()).filter(|name| *name != first);
        std::iter::once(first.clone()).chain(others).collect()
    }

    /// The server or address to try next; `pool` has the failures so far.
    pub async fn next(&self, pool: &[Server]) -> ServerAddr {
        let failures = |url: &ServerAddr| {
            pool.iter().find(|server| server.addr == *url).map_or(0, |server| server.failed_attempts)
        };
        let mut servers: Vec<&RoutedServer> = self.servers.iter().collect();
        servers.sort_by_key(|server| failures(&server.name));
        let Some((server, address)) = self.nearest(&servers).await else {
            // All of them failed. The client would wait for a lookup that hangs, so a name that is known takes precedence.
            let resolved = join_all(servers.iter().map(|server| addresses(&server.host))).await;
            let known = resolved.iter().position(|addresses| !addresses.is_empty());
            return servers[known.unwrap_or(0)].name.clone();
        };
        let url = address.and_then(|address| server.addresses.iter().find(|(known, _)| *known == address));
        match url {
            Some((_, url)) if failures(url) <= failures(&server.name) => url.clone(),
            _ => server.name.clone(),
        }
    }

    /// The server that sends INFO first, with the address unless that is the first one of its name; `None` when all of them
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
        let attempt = async |server: &'a RoutedServer| {
            // The round ends the wait; the next one finds a late answer.
            let found = resolve(&server.host, self.connection.endpoint.connect_timeout).await?;
            let connect = async |(n, address): (usize, SocketAddr)| {
                let lane = Lane::greeted(&self.connection, &server.host, address).await;
                lane.map(|_| (n > 0).then_some(address))
            };
            let address = race(found.into_iter().enumerate(), NEXT_ADDRESS, connect).await?;
            Ok((server, address))
        };
        race(servers.iter().copied(), NEXT_ADDRESS, attempt).await.ok()
    }

    /// Names for which the certificate of this address is verified: the names that have it, and the address itself if it is
    /// configured.
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

/// The addresses of a host; none if they are not known in time.
async fn addresses(host: &Host) -> Vec<SocketAddr> {
    resolve(host, RESOLVE).await.unwrap_or_default()
}
