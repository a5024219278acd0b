//! Messages of the source that came from the target stream, through a replication loop: what they carry, as far as it is
//! known. Pure, but for [`WaysBack`], which others keep up to date.

use std::{fmt, sync::Arc};

use nats_lane::jetstream::StreamInfo;
use tokio::sync::watch;

use super::target::provenance;
use crate::{
    config::{LoopProtection, OriginTag},
    store::FromTarget,
};

/// What the copies of the other replications of the service carry, of those that read a stream of the target's name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KnownOrigins {
    /// They read the target stream.
    pub target: Vec<OriginTag>,
    /// They read another stream: the copies of a deleted replication look like theirs.
    pub others: Vec<OriginTag>,
    /// API prefixes of the mirrors that are fed from the target stream.
    pub mirrors: Vec<String>,
}

/// The replications that may copy messages back from the target of a run, as known at any time.
#[derive(Clone)]
pub struct WaysBack {
    changed: watch::Receiver<u64>,
    current: Arc<dyn Fn() -> KnownOrigins + Send + Sync>,
}

impl WaysBack {
    /// `changed` changes after `current` has.
    pub fn new(changed: watch::Receiver<u64>, current: impl Fn() -> KnownOrigins + Send + Sync + 'static) -> Self {
        Self { changed, current: Arc::new(current) }
    }

    /// What is always the same.
    pub fn fixed(known: KnownOrigins) -> Self {
        Self::new(watch::Sender::default().subscribe(), move || known.clone())
    }

    /// Whether a stream is a mirror that is fed from the target.
    pub fn mirrors_target(&self, info: &StreamInfo) -> bool {
        let api = info.config["mirror"]["external"]["api"].as_str();
        api.is_some_and(|api| (self.current)().mirrors.iter().any(|known| known == api))
    }

    fn now(&mut self) -> KnownOrigins {
        self.changed.mark_unchanged();
        (self.current)()
    }
}

impl fmt::Debug for WaysBack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("WaysBack").field(&(self.current)()).finish()
    }
}

/// Recognises messages that came from the target stream.
#[derive(Debug, Clone, Default)]
pub struct ReturnedMessages {
    /// `None` where loop protection is off.
    ways_back: Option<WaysBack>,
    /// By the document.
    configured: Vec<OriginTag>,
    /// By the other replications, now or earlier.
    known: Vec<OriginTag>,
}

impl ReturnedMessages {
    /// What a document and the other replications say now, and what was `remembered` of the target stream, if that was
    /// `created` at the same time. Without `protection`, nothing. To be saved before anything is read.
    pub fn new(
        protection: Option<&LoopProtection>,
        ways_back: &WaysBack,
        remembered: Option<&FromTarget>,
        created: &str,
    ) -> Self {
        let Some(protection) = protection else { return Self::default() };
        let remembered = remembered.filter(|remembered| remembered.created == created);
        let known = remembered.map(|remembered| remembered.tags.clone()).unwrap_or_default();
        let mut ways_back = ways_back.clone();
        let now = ways_back.now();
        let fed = protection.target_origin.iter().flat_map(OriginTag::as_fed);
        let configured = protection.target_origin.iter().cloned().chain(fed).collect();
        let mut new = Self { ways_back: Some(ways_back), configured, known };
        new.learn(now);
        new
    }

    /// Whether a message came from there.
    pub fn includes(&self, header: &[u8]) -> bool {
        provenance::came_from(header, &self.known) || provenance::came_from(header, &self.configured)
    }

    /// Recognizes messages that carry these, too.
    pub fn add(&mut self, tags: Vec<OriginTag>) {
        self.configured.extend(tags);
    }

    /// Whether there can be any.
    pub fn is_empty(&self) -> bool {
        self.known.is_empty() && self.configured.is_empty()
    }

    /// Takes over what has changed; cheap where nothing has.
    pub fn update(&mut self) {
        if let Some(ways_back) = &mut self.ways_back
            && ways_back.changed.has_changed().unwrap_or(false)
        {
            let now = ways_back.now();
            self.learn(now);
        }
    }

    /// What to remember.
    pub fn remembered(&self, created: &str) -> Option<FromTarget> {
        let tags = self.known.clone();
        (!tags.is_empty()).then(|| FromTarget { created: created.to_owned(), tags })
    }

    fn learn(&mut self, now: KnownOrigins) {
        self.known.extend(now.target);
        self.known.sort();
        self.known.dedup();
        // A message too many is better than one that is lost.
        self.known.retain(|tag| !now.others.contains(tag));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tag(site: &str) -> OriginTag {
        OriginTag { stream: "S".to_owned(), site: site.to_owned(), name: Some("w".to_owned()), fed: None }
    }

    fn known(target: &[&str], others: &[&str]) -> KnownOrigins {
        let tags = |sites: &[&str]| sites.iter().map(|site| tag(site)).collect();
        KnownOrigins { target: tags(target), others: tags(others), mirrors: Vec::new() }
    }

    fn message(site: &str) -> Vec<u8> {
        format!("NATS/1.0\r\nChoria-SR-Source: S 1 {site} w 5\r\n\r\n").into_bytes()
    }

    #[test]
    fn what_was_known_stays_unless_another_stream_has_its_copies() {
        let mut returned = ReturnedMessages::default();
        let mut check = |now: KnownOrigins, expect: &[&str]| {
            returned.learn(now);
            let found: Vec<_> = ["A", "B"].into_iter().filter(|site| returned.includes(&message(site))).collect();
            assert_eq!(found, expect);
        };
        check(known(&[], &[]), &[]);
        check(known(&["A"], &["B"]), &["A"]);
        check(known(&["B"], &[]), &["A", "B"]);
        check(known(&[], &[]), &["A", "B"]);
        check(known(&["B"], &["A"]), &["B"]);
        check(known(&["B"], &["B"]), &[]);
    }

    #[test]
    fn changes_are_seen_and_what_is_remembered_is_of_one_stream() {
        let (news, changed) = watch::channel(0);
        let count = changed.clone();
        let ways_back =
            WaysBack::new(changed, move || if *count.borrow() == 0 { known(&[], &[]) } else { known(&["A"], &[]) });
        let protection = |tags: &[OriginTag]| LoopProtection { target_origin: tags.to_vec() };
        let on = protection(&[]);
        let mut returned = ReturnedMessages::new(Some(&on), &ways_back, None, "c");
        returned.update();
        assert!(returned.is_empty() && returned.remembered("c").is_none());
        news.send_replace(1);
        assert!(!returned.includes(&message("A")));
        returned.update();
        assert!(returned.includes(&message("A")));
        let saved = returned.remembered("c").unwrap();
        let none = WaysBack::fixed(KnownOrigins::default());
        let includes = |protection: Option<&LoopProtection>, created| {
            ReturnedMessages::new(protection, &none, Some(&saved), created).includes(&message("A"))
        };
        assert!(includes(Some(&on), "c"));
        assert!(!includes(Some(&on), "d"));
        assert!(!includes(None, "c"));
        assert!(ReturnedMessages::new(Some(&protection(&[tag("A")])), &none, None, "c").includes(&message("A")));
    }
}
