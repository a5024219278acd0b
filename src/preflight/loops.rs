//! Whether a replication forms a replication loop with others. Pure.

use std::collections::BTreeSet;

use nats_lane::{ServerRef, jetstream::StreamInfo};

use super::{OtherReplication, subjects::Flow};
use crate::config::{FeedSubjects, NativeKind, OriginTag, Replication, Side};

/// A stream somewhere.
#[derive(Clone, Copy)]
struct StreamPlace<'a> {
    side: &'a Side,
    /// Name of the server; empty if it is not known.
    server: &'a str,
}

impl StreamPlace<'_> {
    fn same_server(&self, other: &Self) -> bool {
        !self.server.is_empty() && self.server == other.server || same_address(&self.side.place, &other.side.place)
    }

    fn same_login(&self, other: &Self) -> bool {
        match (&self.side.place, &other.side.place) {
            (ServerRef::Known(one), ServerRef::Known(other)) => {
                one.endpoint.auth == other.endpoint.auth && one.api_prefix == other.api_prefix
            }
            (one, other) => one == other,
        }
    }
}

fn same_address(one: &ServerRef, other: &ServerRef) -> bool {
    match (one, other) {
        (ServerRef::Known(one), ServerRef::Known(other)) => {
            one.endpoint.hosts.iter().any(|host| other.endpoint.hosts.contains(host))
        }
        (one, other) => one == other,
    }
}

/// The ids of the replications that copy messages of `replication` back to its source, in order, for the shortest loop.
/// Two streams are the same if their names and an address, or the name of the server, are.
pub(super) fn find(
    replication: &Replication,
    servers: (&str, &str),
    flow: &Flow,
    known: &[OtherReplication],
) -> Option<Vec<String>> {
    let source = StreamPlace { side: &replication.source, server: servers.0 };
    let target = StreamPlace { side: &replication.target, server: servers.1 };
    // On one server, only another account or domain makes it another stream: then login or API prefix differ.
    let accounts = source.same_server(&target);
    let same = |one: &StreamPlace<'_>, other: &StreamPlace<'_>| {
        one.side.stream == other.side.stream && one.same_server(other) && (!accounts || one.same_login(other))
    };
    let mut seen = BTreeSet::from([replication.id.as_str()]);
    let mut ways = vec![(target, flow.clone(), Vec::new())];
    while !ways.is_empty() {
        let mut longer = Vec::new();
        for (place, flow, way) in &ways {
            for next in known {
                let from = StreamPlace { side: &next.replication.source, server: &next.source_server };
                if seen.contains(next.replication.id.as_str()) || !same(place, &from) {
                    continue;
                }
                let onward = flow.onward(&next.replication);
                if onward.to.is_empty() {
                    continue;
                }
                seen.insert(&next.replication.id);
                let to = StreamPlace { side: &next.replication.target, server: &next.target_server };
                let mut way = way.clone();
                way.push(next.replication.id.clone());
                if same(&to, &source) {
                    return Some(way);
                }
                longer.push((to, onward, way));
            }
        }
        ways = longer;
    }
    None
}

/// What is to be changed so that no message is stored twice in the loop of `replication` over the others in `way`, if anything
/// is: each of them has to recognise the copies that the next one made of its target.
pub(super) fn unprotected(
    replication: &Replication,
    way: &[String],
    known: &[OtherReplication],
    site: &str,
) -> Option<String> {
    let others = way.iter().filter_map(|id| known.iter().find(|other| other.replication.id == *id));
    let ring: Vec<_> = std::iter::once(replication).chain(others.map(|other| &other.replication)).collect();
    let next = ring.iter().cycle().skip(1);
    ring.iter().zip(next).find_map(|(one, next)| what_helps(one, next, site))
}

/// What is to be changed so that one replication recognises what the `next` one copied from its target.
fn what_helps(one: &Replication, next: &Replication, site: &str) -> Option<String> {
    let (id, next_id) = (&one.id, &next.id);
    let feeds = next.native.as_ref().map(|native| native.kind);
    if feeds == Some(NativeKind::Mirror) {
        return Some(format!("replication `{next_id}` is of kind `mirror`, which marks no copies"));
    }
    let Some(protection) = &one.loop_protection else {
        return Some(format!("`loop_protection` is false for replication `{id}`"));
    };
    let is_named = |tag: &OriginTag| {
        let fed = || protection.target_origin.iter().flat_map(OriginTag::as_fed).any(|origin| origin == *tag);
        protection.target_origin.iter().any(|origin| origin.includes(tag)) || fed()
    };
    let name = if feeds.is_some() { next_id } else { &next.name };
    let place = |side| StreamPlace { side, server: "" };
    let (target, source) = (place(&one.target), place(&next.source));
    let is_known = target.same_server(&source) && target.same_login(&source);
    (!is_known && !next.origin_tags(site).iter().all(is_named)).then(|| {
        format!(
            "replication `{id}` writes to the stream that `{next_id}` reads, under another address or login: add \
             `{site} {name}` to its `target_origin`"
        )
    })
}

/// The id of the replication that feeds the source stream as a mirror of the target stream.
pub(super) fn mirrored(
    replication: &Replication,
    source: &StreamInfo,
    known: &[OtherReplication],
    site: &str,
) -> Option<String> {
    let api = source.config["mirror"]["external"]["api"].as_str()?;
    let feeds = |other: &&OtherReplication| {
        let Replication { id, source, .. } = &other.replication;
        let is_target =
            source.stream == replication.target.stream && same_address(&source.place, &replication.target.place);
        is_target && FeedSubjects::of(site, id).api() == api
    };
    known.iter().find(feeds).map(|other| other.replication.id.clone())
}

/// The ids of the others that write to the same target stream with the same login. `server` is the name of the server
/// there.
pub(super) fn into_same_target(replication: &Replication, server: &str, known: &[OtherReplication]) -> Vec<String> {
    let target = StreamPlace { side: &replication.target, server };
    let same = |other: &&OtherReplication| {
        let there = StreamPlace { side: &other.replication.target, server: &other.target_server };
        there.side.stream == target.side.stream && there.same_server(&target) && there.same_login(&target)
    };
    known.iter().filter(same).map(|other| other.replication.id.clone()).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config;

    /// `STREAM@host STREAM@host [filter [prefix]]`, with an id of its own.
    fn copy(text: &str) -> Replication {
        let mut words = text.split(' ');
        let mut place = || words.next().unwrap().split_once('@').unwrap();
        let ((stream, from), (target, to)) = (place(), place());
        let name = text.replace(|c: char| !c.is_ascii_alphanumeric(), "-");
        let document = json!({
            "stream": stream, "target_stream": target, "source_url": from, "target_url": to, "name": name,
            "filter_subject": words.next().unwrap_or_default(), "target_subject_prefix": words.next().unwrap_or_default(),
        });
        config::parse_value(&document, "SITE").unwrap()
    }

    fn known(text: &str) -> OtherReplication {
        OtherReplication { replication: copy(text), source_server: String::new(), target_server: String::new() }
    }

    fn check(text: &str, others: &[&str], expect: Option<&[&str]>) {
        let replication = copy(text);
        let others: Vec<_> = others.iter().map(|text| known(text)).collect();
        let flow = Flow::of(&replication, None, &Default::default());
        let expect = expect.map(|ids| ids.iter().map(|text| copy(text).id).collect::<Vec<_>>());
        assert_eq!(find(&replication, ("", ""), &flow, &others), expect, "{text}");
    }

    #[test]
    fn a_ring_is_found_over_any_number_of_hops() {
        check("S@a S@b", &[], None);
        check("S@a S@b", &["S@b S@a"], Some(&["S@b S@a"]));
        check("S@a T@b", &["T@b X@c", "X@c S@a", "T@b Y@d"], Some(&["T@b X@c", "X@c S@a"]));
        check("S@a S@b", &["S@b S@c", "S@c S@d"], None);
        check("S@a S@b", &["T@b T@a"], None);
        // A ring of others that does not come back here.
        check("S@a S@b", &["S@b S@c", "S@c S@b"], None);
        // The document that is replaced.
        check("S@a S@b", &["S@a S@b"], None);
    }

    #[test]
    fn what_does_not_come_back_is_no_ring() {
        check("S@a S@b east.>", &["S@b S@a west.>"], None);
        check("S@a S@b > east", &["S@b S@a west.>"], None);
        check("S@a S@b > east", &["S@b S@a east.>"], Some(&["S@b S@a east.>"]));
    }

    #[test]
    fn places_are_told_by_server_name_and_on_one_server_by_login() {
        let one = copy("S@a S@b");
        let back =
            OtherReplication { source_server: "n2".to_owned(), target_server: "n1".to_owned(), ..known("S@x S@y") };
        let flow = Flow::of(&one, None, &Default::default());
        let ring = |servers| find(&one, servers, &flow, std::slice::from_ref(&back)).is_some();
        assert!(ring(("n1", "n2")));
        assert!(!ring(("n1", "n3")));
        assert!(!ring(("", "")));
        check("S@u:p@a S@v:p@a", &["S@v:p@a S@w:p@a"], None);
        check("S@u:p@a S@v:p@a", &["S@v:p@a S@u:p@a"], Some(&["S@v:p@a S@u:p@a"]));
    }
}
