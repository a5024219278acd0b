//! The subjects of a feed, and what a leaf user needs for them. Pure.

use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::xxh3_64;

/// Characters of the hashes that a server makes of names.
const DIGITS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
/// Length of such a hash.
const HASH: usize = 8;

/// The subjects of one feed. They are made of site and replication, so that no two feeds answer the same requests, and a
/// feed finds the stream that it fed before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FeedSubjects {
    root: String,
}

impl FeedSubjects {
    /// Those of a replication of a site.
    pub fn of(site: &str, replication: &str) -> Self {
        let key = [site.as_bytes(), replication.as_bytes()].join(&0);
        Self { root: format!("$SR.{:016x}", xxh3_64(&key)) }
    }

    /// The API prefix that the mirror asks below: `mirror.external.api` of the target stream.
    pub fn api(&self) -> String {
        format!("{}.API", self.root)
    }

    /// What the subjects begin with that messages are delivered to: `mirror.external.deliver` of the target stream.
    pub fn deliver(&self) -> String {
        format!("{}.D", self.root)
    }

    /// Where a target with a durable consumer always listens.
    pub fn durable(&self) -> String {
        format!("{}.S", self.deliver())
    }

    /// What the subjects begin with on which the target says how far it has come.
    pub fn flow(&self) -> String {
        format!("{}.FC", self.root)
    }

    /// What the header `Nats-Stream-Source` begins with in messages that a target took from this stream over the feed: the
    /// stream, and a hash of the API prefix (`composeIName` of nats-server, 2.10 to 2.15).
    pub fn source_index(&self, stream: &str) -> String {
        let hash = Sha256::digest(self.api().as_bytes());
        let hash = hash.iter().take(HASH).map(|byte| char::from(DIGITS[usize::from(*byte) % DIGITS.len()]));
        format!("{stream}:{}", hash.collect::<String>())
    }

    /// What the leaf subscribes to.
    pub fn subscriptions(&self) -> Vec<String> {
        vec![format!("{}.>", self.api()), format!("{}.>", self.flow())]
    }

    /// The permissions of the leaf user, as a block for the configuration of the target's server. For that user, to
    /// publish is to deliver to the account, and to subscribe is to get what the account publishes.
    pub fn permissions(&self) -> String {
        format!(
            "permissions: {{ publish: {{ allow: [\"{}.>\"] }}, subscribe: {{ allow: [\"{}.>\", \"{}.>\"] }}, allow_responses: \
             {{ max: 1, expires: \"1m\" }} }}",
            self.deliver(),
            self.api(),
            self.flow()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_site_and_replication_has_its_own_subjects() {
        let one = FeedSubjects::of("EAST", "ORDERS");
        assert_eq!(one, FeedSubjects::of("EAST", "ORDERS"));
        for (site, id) in [("WEST", "ORDERS"), ("EAST", "ORDERS.x"), ("EASTO", "RDERS"), ("", "EASTORDERS")] {
            assert_ne!(one, FeedSubjects::of(site, id), "{site} {id}");
        }
        assert!(one.api().starts_with("$SR.") && one.api().ends_with(".API"));
    }

    #[test]
    fn the_permissions_are_those_of_the_subjects() {
        let subjects = FeedSubjects::of("EAST", "ORDERS");
        let block = subjects.permissions();
        for subject in subjects.subscriptions() {
            assert!(block.split("subscribe").nth(1).unwrap().contains(&subject), "{block}");
        }
        assert!(block.split("subscribe").next().unwrap().contains(&format!("{}.>", subjects.deliver())), "{block}");
    }
}
