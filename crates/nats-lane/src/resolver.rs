//! Names to addresses, with a deadline.
//!
//! The system's lookup cannot be cancelled, and takes as long as its name servers are silent. So it runs on a thread of its
//! own: neither a runtime that shuts down nor other blocking work waits for it. There is one thread for each name, however
//! many connections ask for the name meanwhile; an attempt after a deadline finds the answer of the lookup that was late.

use std::{
    collections::HashMap,
    fmt, io,
    net::{IpAddr, SocketAddr, ToSocketAddrs},
    sync::{Arc, LazyLock, Mutex, PoisonError},
    thread,
    time::Duration,
};

use tokio::{sync::watch, time::timeout};

use crate::{Error, Host};

static SYSTEM: LazyLock<Resolver> = LazyLock::new(|| Resolver::new(system_lookup));

type Lookup = Result<Vec<IpAddr>, String>;
type NameLookup = dyn Fn(&str) -> io::Result<Vec<IpAddr>> + Send + Sync;
type Lookups = Arc<Mutex<HashMap<String, watch::Receiver<Option<Lookup>>>>>;

/// The addresses of a host, in the order of the system; at least one. Errors: the name has no address or is not known, or
/// the lookup takes longer than `within`.
pub(crate) async fn resolve(host: &Host, within: Duration) -> Result<Vec<SocketAddr>, Error> {
    let addresses = match host.host.parse() {
        Ok(address) => vec![address],
        Err(_) => SYSTEM.resolve(&host.host, within).await?,
    };
    Ok(addresses.into_iter().map(|address| SocketAddr::new(address, host.port)).collect())
}

fn system_lookup(name: &str) -> io::Result<Vec<IpAddr>> {
    Ok((name, 0).to_socket_addrs()?.map(|address| address.ip()).collect())
}

struct Resolver {
    lookup: Arc<NameLookup>,
    /// Lookups that have not ended, by name.
    running: Lookups,
}

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resolver").field("running", &self.running).finish_non_exhaustive()
    }
}

impl Resolver {
    fn new(lookup: impl Fn(&str) -> io::Result<Vec<IpAddr>> + Send + Sync + 'static) -> Self {
        Self { lookup: Arc::new(lookup), running: Lookups::default() }
    }

    async fn resolve(&self, name: &str, within: Duration) -> Result<Vec<IpAddr>, Error> {
        let failed = |reason: String| Error::retry(format!("cannot be resolved: {reason}"));
        let mut lookup = self.join(name).map_err(|error| failed(error.to_string()))?;
        let found = match timeout(within, lookup.wait_for(Option::is_some)).await {
            Ok(Ok(found)) => found.clone().unwrap_or_else(|| Ok(Vec::new())),
            Ok(Err(_)) => Err("the lookup ended without an answer".to_owned()),
            Err(_) => return Err(Error::retry(format!("cannot be resolved within {within:?}"))),
        };
        match found {
            Ok(addresses) if addresses.is_empty() => Err(Error::retry("it has no address")),
            Ok(addresses) => Ok(addresses),
            Err(reason) => Err(failed(reason)),
        }
    }

    /// The lookup of a name that is running, or a new one.
    fn join(&self, name: &str) -> io::Result<watch::Receiver<Option<Lookup>>> {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        // The other end of one that panicked is gone.
        if let Some(lookup) = running.get(name).filter(|lookup| lookup.has_changed().is_ok()) {
            return Ok(lookup.clone());
        }
        let (sender, receiver) = watch::channel(None);
        let (lookup, ended, owned) = (self.lookup.clone(), self.running.clone(), name.to_owned());
        thread::Builder::new().name("resolver".to_owned()).spawn(move || {
            let found = lookup(&owned).map_err(|error| error.to_string());
            ended.lock().unwrap_or_else(PoisonError::into_inner).remove(&owned);
            sender.send_replace(Some(found));
        })?;
        running.insert(name.to_owned(), receiver.clone());
        Ok(receiver)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            atomic::{AtomicUsize, Ordering},
            mpsc,
        },
        time::Instant,
    };

    use super::*;

    const SHORT: Duration = Duration::from_millis(50);
    const LONG: Duration = Duration::from_secs(30);
    const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    /// A resolver whose lookups of `slow` hang until something is sent; how many lookups of it began.
    fn hanging() -> (Resolver, mpsc::Sender<io::Result<Vec<IpAddr>>>, Arc<AtomicUsize>) {
        let (answer, answers) = mpsc::channel();
        let (answers, begun) = (Mutex::new(answers), Arc::new(AtomicUsize::new(0)));
        let count = begun.clone();
        let resolver = Resolver::new(move |name| {
            if name != "slow" {
                return Ok(vec![HERE]);
            }
            count.fetch_add(1, Ordering::SeqCst);
            answers.lock().unwrap().recv().unwrap_or_else(|_| Err(io::Error::other("the test is over")))
        });
        (resolver, answer, begun)
    }

    #[tokio::test]
    async fn a_lookup_that_hangs_has_a_deadline_and_one_thread() {
        let (resolver, answer, begun) = hanging();
        let attempts = (0..100).map(|_| resolver.resolve("slow", SHORT));
        for error in futures_util::future::join_all(attempts).await {
            assert_eq!(error.unwrap_err().message, "cannot be resolved within 50ms");
        }
        // Other names do not wait for it.
        assert_eq!(resolver.resolve("quick", LONG).await.unwrap(), [HERE]);
        assert_eq!(begun.load(Ordering::SeqCst), 1);
        // The next attempt gets the late answer.
        let (late, ()) = tokio::join!(resolver.resolve("slow", LONG), async {
            answer.send(Ok(vec![HERE])).unwrap();
        });
        assert_eq!(late.unwrap(), [HERE]);
        assert_eq!(begun.load(Ordering::SeqCst), 1);
        // What is known is never older than its lookup.
        answer.send(Err(io::Error::other("no such name"))).unwrap();
        let error = resolver.resolve("slow", LONG).await.unwrap_err().message;
        assert_eq!(error, "cannot be resolved: no such name");
        answer.send(Ok(Vec::new())).unwrap();
        assert_eq!(resolver.resolve("slow", LONG).await.unwrap_err().message, "it has no address");
        assert_eq!(begun.load(Ordering::SeqCst), 3);
    }

    #[test]
    fn a_runtime_ends_while_a_lookup_hangs() {
        let (resolver, answer, begun) = hanging();
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let started = Instant::now();
        runtime.block_on(resolver.resolve("slow", SHORT)).unwrap_err();
        drop(runtime);
        assert_eq!(begun.load(Ordering::SeqCst), 1);
        assert!(started.elapsed() < LONG);
        drop(answer);
    }

    #[tokio::test]
    async fn a_lookup_that_panicked_is_begun_again() {
        let begun = AtomicUsize::new(0);
        let resolver = Resolver::new(move |_| {
            assert!(begun.fetch_add(1, Ordering::SeqCst) > 0, "the first lookup fails");
            Ok(vec![HERE])
        });
        resolver.resolve("name", LONG).await.unwrap_err();
        assert_eq!(resolver.resolve("name", LONG).await.unwrap(), [HERE]);
    }

    #[tokio::test]
    async fn addresses_are_not_looked_up() {
        for (host, address) in [("127.0.0.1", "127.0.0.1:1"), ("::1", "[::1]:1")] {
            let found = resolve(&Host { host: host.to_owned(), port: 1 }, Duration::ZERO).await;
            assert_eq!(found.unwrap(), [address.parse().unwrap()]);
        }
    }
}
