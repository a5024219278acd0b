//! The subjects of a replication: by the configuration of a source, by those of the streams that it copies
//! itself, and by its stored messages. Pure.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use nats_lane::{Error, jetstream::StreamInfo};
use serde_json::Value;

use crate::config::{Mapping, Replication, Transform, outline::Outline, patterns};

/// Most hops of mirrors of mirrors that are followed.
const MOST_HOPS: usize = 4;

/// Streams that a source takes messages from, by the prefix of their API (empty for that of the source) and name.
#[derive(Debug, Clone, Default)]
pub(crate) struct Origins(BTreeMap<(String, String), StreamInfo>);

impl Origins {
    /// Adds the answer to one of [`Origins::missing`].
    pub(crate) fn add(&mut self, prefix: &str, origin: &str, info: StreamInfo) {
        self.0.insert((prefix.to_owned(), origin.to_owned()), info);
    }

    /// Streams that would show more of a source's subjects: API prefix and name of each.
    pub(crate) fn missing(&self, source: &StreamInfo) -> Vec<(String, String)> {
        let feeds =
            |info: &StreamInfo, prefix: &str| feeds(info).map(|feed| origin_of(feed, prefix)).collect::<Vec<_>>();
        let known = self.0.iter().flat_map(|((prefix, _), info)| feeds(info, prefix));
        feeds(source, "").into_iter().chain(known).filter(|origin| !self.0.contains_key(origin)).collect()
    }
}

/// The `mirror` and the `sources` of a stream.
fn feeds(stream: &StreamInfo) -> impl Iterator<Item = &Value> {
    let mirror = stream.config.get("mirror").filter(|mirror| mirror.is_object());
    mirror.into_iter().chain(stream.config.get("sources").and_then(Value::as_array).into_iter().flatten())
}

/// Where the origin of a feed is, for a stream below this prefix.
fn origin_of(feed: &Value, prefix: &str) -> (String, String) {
    let external = feed.pointer("/external/api").and_then(Value::as_str).filter(|api| !api.is_empty());
    (external.unwrap_or(prefix).to_owned(), feed["name"].as_str().unwrap_or_default().to_owned())
}

/// The subjects that a stream stores by its configuration.
struct Configured {
    patterns: BTreeSet<String>,
    /// It may store others too.
    partial: bool,
}

impl Configured {
    fn of(stream: &StreamInfo, prefix: &str, origins: &Origins, hops: usize) -> Self {
        let mut patterns: BTreeSet<String> = stream.subjects().into_iter().map(str::to_owned).collect();
        let mut partial = patterns.is_empty() && feeds(stream).next().is_none();
        for feed in feeds(stream) {
            let origin = origin_of(feed, prefix);
            let origin = origins.0.get(&origin).filter(|_| hops > 0).map(|info| (info, origin.0));
            let origin = origin.map(|(info, prefix)| Self::of(info, &prefix, origins, hops - 1));
            let all = || Self { patterns: [">".to_owned()].into(), partial: false };
            let fed = Self::fed(feed, origin.unwrap_or_else(all));
            partial |= fed.partial || fed.patterns.contains(">");
            patterns.extend(fed.patterns.into_iter().filter(|pattern| pattern != ">"));
        }
        match stream.config.get("subject_transform").filter(|transform| transform.is_object()).map(transform) {
            Some(Some(transform)) => {
                let mapping = Mapping { transforms: vec![transform], ..Mapping::default() };
                patterns = mapping.patterns(&patterns);
            }
            // A transform that the server knows and we do not.
            Some(None) => partial = true,
            None => {}
        }
        Self { patterns, partial }
    }

    /// The subjects that a feed takes from an origin, after its transform.
    fn fed(feed: &Value, origin: Self) -> Self {
        let filter = feed["filter_subject"].as_str().filter(|filter| !filter.is_empty());
        let transforms: Vec<&Value> = feed["subject_transforms"].as_array().into_iter().flatten().collect();
        let Self { patterns, mut partial } = origin;
        let only = |filter: &str| -> BTreeSet<String> {
            patterns.iter().filter_map(|pattern| patterns::intersection(pattern, filter)).collect()
        };
        if transforms.is_empty() {
            return Self {
                patterns: filter.map_or_else(|| patterns.clone(), only),
                partial: partial && filter.is_none(),
            };
        }
        let mut made = BTreeSet::new();
        for entry in transforms {
            let src = entry["src"].as_str().filter(|src| !src.is_empty()).unwrap_or(">");
            let is_filter = entry["dest"].as_str().is_none_or(str::is_empty);
            match transform(entry) {
                _ if is_filter => made.extend(only(src)),
                Some(transform) => made.extend(only(src).iter().filter_map(|pattern| transform.image(pattern))),
                None => partial = true,
            }
        }
        Self { patterns: made, partial }
    }
}

/// A transform as a stream has it.
fn transform(entry: &Value) -> Option<Transform> {
    let src = entry["src"].as_str().filter(|src| !src.is_empty()).unwrap_or(">");
    let dest = entry["dest"].as_str().filter(|dest| !dest.is_empty()).unwrap_or(src);
    Transform::parse(src, dest).ok()
}

/// Subjects of a source that are in scope.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct InScope {
    /// Patterns that hold all of them.
    pub(crate) from: BTreeSet<String>,
    /// Whether these are only bounds: the source takes over or changes subjects that its configuration does not show.
    pub(crate) vague: bool,
}

impl InScope {
    /// For an unknown stream every subject is possible.
    pub(crate) fn of(replication: &Replication, source: Option<&StreamInfo>, origins: &Origins) -> Self {
        let known = source.map(|source| Configured::of(source, "", origins, MOST_HOPS));
        match known.filter(|known| !known.partial) {
            Some(Configured { patterns, .. }) => {
                Self { from: replication.scope.of(patterns.iter().map(String::as_str)), vague: false }
            }
            None => Self { from: replication.scope.of([">"]), vague: true },
        }
    }
}

/// Knowledge about the subjects of a source beside its configuration.
#[derive(Debug, Clone, Default)]
pub(crate) struct Learned {
    /// The streams that it takes messages from.
    pub(crate) origins: Origins,
    /// Target subjects of stored messages in scope that the configuration does not show.
    pub(crate) stored: Outline,
    /// One of them, with its subject at the source.
    pub(crate) example: Option<(String, String)>,
}

/// Collects stored subjects, and keeps those that the configuration does not show.
pub(crate) struct Learning<'a> {
    replication: &'a Replication,
    /// Literal subjects and patterns that are known to be needed at the target.
    literal: HashSet<String>,
    patterns: Vec<String>,
    room: Vec<u8>,
    learned: Learned,
}

impl<'a> Learning<'a> {
    pub(crate) fn begin(replication: &'a Replication, source: &StreamInfo, origins: Origins) -> Self {
        let known = by_configuration(replication, source, &origins);
        let known = replication.mapping.patterns(&known);
        let (patterns, literal): (Vec<_>, Vec<_>) = known.into_iter().partition(|known| known.contains(['*', '>']));
        let learned = Learned { origins, ..Learned::default() };
        Self { replication, literal: literal.into_iter().collect(), patterns, room: Vec::new(), learned }
    }

    /// Adds the subject of a stored message.
    pub(crate) fn add_subject(&mut self, subject: &str) {
        let Replication { scope, mapping, .. } = self.replication;
        let is_let_through = || scope.filters().iter().any(|filter| patterns::matches(filter, subject.as_bytes()));
        if scope.excludes(subject.as_bytes()) || scope.is_filtered() && !is_let_through() {
            return;
        }
        let mapped = String::from_utf8_lossy(mapping.apply(subject.as_bytes(), &mut self.room));
        let is_known = self.literal.contains(mapped.as_ref())
            || self.patterns.iter().any(|pattern| patterns::matches(pattern, mapped.as_bytes()));
        if !is_known && !mapped.is_empty() {
            self.learned.stored.add(&mapped);
            let smaller = |(known, _): &(String, String)| mapped.as_ref() < known.as_str();
            if self.learned.example.as_ref().is_none_or(smaller) {
                self.learned.example = Some((mapped.into_owned(), subject.to_owned()));
            }
        }
    }

    pub(crate) fn end(self) -> Learned {
        self.learned
    }
}

/// Source subjects that are known to be copied: the filters, where the configuration of the source shows too little.
fn by_configuration(replication: &Replication, source: &StreamInfo, origins: &Origins) -> BTreeSet<String> {
    let InScope { from, vague } = InScope::of(replication, Some(source), origins);
    if vague && !replication.scope.is_filtered() {
        let known = Configured::of(source, "", origins, MOST_HOPS).patterns;
        return replication.scope.of(known.iter().map(String::as_str));
    }
    from
}

/// Whether messages of different subjects keep different subjects at the target: headers and limits for one subject
/// (rollup, messages per subject) must not affect messages of another one. If the source shows too little, the subjects
/// of the transforms are checked.
pub(crate) fn stay_apart(replication: &Replication, source: &StreamInfo) -> bool {
    let mapping: &Mapping = &replication.mapping;
    let InScope { from, vague } = InScope::of(replication, Some(source), &Origins::default());
    if vague && !replication.scope.is_filtered() {
        let known = mapping.transforms.iter().map(|transform| transform.src().to_owned()).collect();
        return mapping.keeps_apart(&known);
    }
    mapping.keeps_apart(&from)
}

/// The subjects that a target has to listen on for a source; an error if they are not known.
pub(crate) fn of_target(
    replication: &Replication,
    source: &StreamInfo,
    learned: &Learned,
) -> Result<Vec<String>, Error> {
    let name = &replication.source.stream;
    let cannot = |why: String| {
        Err(Error::hold(format!("target stream `{}` cannot be created: {why}", replication.target.stream)))
    };
    let from = by_configuration(replication, source, &learned.origins);
    let Some(stored) = learned.stored.patterns() else {
        return cannot(format!(
            "the subjects that source stream `{name}` stores begin with too many different tokens to name them; create the \
             target or set `filter_subject`"
        ));
    };
    if from.is_empty() && stored.is_empty() {
        let own = source.subjects();
        return cannot(match own.is_empty() {
            true => format!(
                "source stream `{name}` has no subjects of its own and stores nothing that is in scope; create the target or \
                 set `filter_subject`"
            ),
            false => format!(
                "filters and exclusions leave nothing of the subjects of source stream `{name}`, which are `{}`",
                own.join("`, `")
            ),
        });
    }
    Ok(patterns::disjoint(replication.mapping.patterns(&from).into_iter().chain(stored)))
}

/// The same with everything that the source stores, also what is not in scope; `None` where its configuration does not show
/// that.
pub(crate) fn of_whole_source(
    replication: &Replication,
    source: &StreamInfo,
    learned: &Learned,
) -> Option<Vec<String>> {
    let copied = of_target(replication, source, learned).ok()?;
    let known = Configured::of(source, "", &learned.origins, MOST_HOPS);
    let whole = (!known.partial).then(|| replication.mapping.patterns(&known.patterns))?;
    Some(patterns::disjoint(whole.into_iter().chain(copied)))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::config;

    fn replication(fields: Value) -> Replication {
        let mut document = json!({"stream": "S", "source_url": "nats://a", "target_url": "nats://b"});
        document.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        config::parse_value(&document, "SITE").unwrap()
    }

    fn stream(config: Value) -> StreamInfo {
        serde_json::from_value(json!({"config": config, "state": {}})).unwrap()
    }

    #[test]
    fn a_target_listens_on_what_is_in_scope_mapped() {
        let check = |fields: Value, config: Value, expect: &[&str]| {
            let found = of_target(&replication(fields.clone()), &stream(config.clone()), &Learned::default()).unwrap();
            assert_eq!(found, expect, "{fields} {config}");
        };
        let orders = json!({"subjects": ["orders.>", "returns"]});
        check(json!({}), orders.clone(), &["orders.>", "returns"]);
        check(json!({"filter_subject": "orders.eu.>"}), orders.clone(), &["orders.eu.>"]);
        check(json!({"filter_subjects": ["*.eu", "returns"]}), orders.clone(), &["orders.eu", "returns"]);
        check(json!({"exclude_subjects": ["returns", "orders.x"]}), orders.clone(), &["orders.>"]);
        let transforms = |src: &str, dest: &str| json!({"subject_transforms": [{"src": src, "dest": dest}]});
        check(transforms("orders.*", "o.{{partition(9,1)}}.$1"), orders.clone(), &["o.*.*", "orders.>", "returns"]);
        check(transforms("orders.>", "eu.>"), orders.clone(), &["eu.>", "returns"]);
        // What overlaps after the mapping is one.
        check(transforms("returns", "orders.returns"), orders.clone(), &["orders.>"]);
        check(json!({"target_subject_prefix": "p", "filter_subject": "returns"}), orders, &["p.returns"]);
        check(json!({"filter_subject": "a.>"}), json!({"sources": [{}], "subjects": ["x"]}), &["a.>"]);
        check(json!({}), json!({"sources": [{}], "subjects": ["x"]}), &["x"]);
        check(json!({"filter_subjects": ["a", "b"]}), json!({"mirror": {"name": "M"}}), &["a", "b"]);
    }

    #[test]
    fn a_target_like_its_source_listens_on_what_is_not_copied_too() {
        let check = |fields: Value, config: Value, expect: Option<&[&str]>| {
            let found = of_whole_source(&replication(fields.clone()), &stream(config.clone()), &Learned::default());
            let expect = expect.map(|expect| expect.iter().map(|subject| (*subject).to_owned()).collect());
            assert_eq!(found, expect, "{fields} {config}");
        };
        let nodes = json!({"subjects": ["NODE_DATA.>", "other.*"]});
        let fleet = json!({"target_subject_prefix": "FLEET", "target_subject_remove": "NODE_DATA",
            "filter_subject": "NODE_DATA.eu"});
        // Choria's replicator asks for both, which the server refuses.
        check(fleet, nodes.clone(), Some(&["FLEET.>"]));
        check(json!({"filter_subject": "other.x"}), nodes, Some(&["NODE_DATA.>", "other.*"]));
        check(json!({"filter_subject": "a.>"}), json!({"mirror": {"name": "M"}}), None);
    }

    #[test]
    fn a_target_without_subjects_is_not_made() {
        let check = |fields: Value, config: Value, expect: &str| {
            let error = of_target(&replication(fields), &stream(config), &Learned::default()).unwrap_err();
            assert!(error.message.contains(expect), "{error}");
        };
        check(json!({}), json!({"mirror": {"name": "M"}}), "has no subjects of its own");
        check(json!({"filter_subject": "x"}), json!({"subjects": ["a", "b"]}), "leave nothing");
        check(json!({"exclude_subjects": ["*"]}), json!({"subjects": ["a", "b"]}), "which are `a`, `b`");
    }

    #[test]
    fn subjects_that_become_one_are_told() {
        let check = |src: &str, dest: &str, config: Value, expect| {
            let fields = json!({"subject_transforms": [{"src": src, "dest": dest}]});
            assert_eq!(stay_apart(&replication(fields), &stream(config.clone())), expect, "{src} {dest} {config}");
        };
        check("$KV.A.>", "$KV.B.>", json!({"subjects": ["$KV.A.>"]}), true);
        check("$KV.A.>", "$KV.B.>", json!({"mirror": {"name": "KV_A"}}), true);
        check("a.*.*", "a.$1", json!({"subjects": ["a.>"]}), false);
        check("a.x", "a.y", json!({"subjects": ["a.*"]}), false);
        check("a.*.*", "a.$1", json!({"mirror": {"name": "M"}}), false);
    }
}
