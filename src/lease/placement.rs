//! The preferred instance for each replication: rendezvous hashing, so that an instance that comes or goes moves hardly
//! more than its own share, with a bound on each instance's load, so that chance overloads no instance.

use std::collections::HashMap;

use xxhash_rust::xxh3::xxh3_64;

/// Hundredths of the even share that an instance gets at the most, rounded up to whole replications.
const MOST: usize = 125;

/// The best instance for each replication, as an index into `instances`. The same names give the same result, in whatever
/// order they come. Empty without instances.
pub(super) fn place<'a>(ids: impl IntoIterator<Item = &'a str>, instances: &[&str]) -> HashMap<&'a str, usize> {
    if instances.is_empty() {
        return HashMap::new();
    }
    let mut ids: Vec<&str> = ids.into_iter().collect();
    // The first replication gets its first choice, so the order must not depend on the names.
    ids.sort_unstable_by_key(|id| (xxh3_64(id.as_bytes()), *id));
    let most = (ids.len() * MOST).div_ceil(100 * instances.len());
    let mut load = vec![0; instances.len()];
    let mut places = HashMap::with_capacity(ids.len());
    let mut order: Vec<usize> = (0..instances.len()).collect();
    for id in ids {
        order.sort_unstable_by_key(|instance| {
            let name = instances[*instance];
            (std::cmp::Reverse(weight(id, name)), name)
        });
        if let Some(instance) = order.iter().copied().find(|instance| load[*instance] < most) {
            load[instance] += 1;
            places.insert(id, instance);
        }
    }
    places
}

/// The first choice for one replication, independent of the load. Every instance computes the same from the same names.
pub(super) fn first<'a>(id: &str, instances: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    instances.max_by_key(|instance| (weight(id, instance), std::cmp::Reverse(*instance)))
}

fn weight(id: &str, instance: &str) -> u64 {
    xxh3_64([id.as_bytes(), b"\0", instance.as_bytes()].concat().as_slice())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(count: usize) -> Vec<String> {
        (0..count).map(|n| format!("STREAM-{n}")).collect()
    }

    fn names<'a>(ids: &'a [String], instances: &[&'a str]) -> HashMap<&'a str, &'a str> {
        let places = place(ids.iter().map(String::as_str), instances);
        places.into_iter().map(|(id, at)| (id, instances[at])).collect()
    }

    #[test]
    fn every_replication_is_placed_and_shares_are_even() {
        for (count, instances) in [(0, 3), (1, 3), (3, 3), (20, 3), (200, 3), (1_000, 7), (5, 1)] {
            let all = ["a", "b", "c", "d", "e", "f", "g"];
            let ids = ids(count);
            let places = names(&ids, &all[..instances]);
            assert_eq!(places.len(), count);
            let even = count as f64 / instances as f64;
            for instance in &all[..instances] {
                let load = places.values().filter(|at| *at == instance).count();
                assert!(load as f64 <= (even * 1.25).ceil(), "{instance} has {load} of {count} on {instances}");
            }
        }
    }

    #[test]
    fn the_order_of_the_names_does_not_matter() {
        let ids = ids(50);
        let turned: Vec<_> = ids.iter().rev().cloned().collect();
        assert_eq!(names(&ids, &["a", "b", "c"]), names(&turned, &["c", "a", "b"]));
    }

    #[test]
    fn a_coming_or_going_instance_moves_little_but_its_share() {
        let ids = ids(300);
        let (three, four) = (names(&ids, &["a", "b", "c"]), names(&ids, &["a", "b", "c", "d"]));
        let moved = ids.iter().filter(|id| three[id.as_str()] != four[id.as_str()]).count();
        let new = four.values().filter(|at| **at == "d").count();
        assert!(new >= 50 && moved <= new + 45, "{moved} moved for {new}");
    }
}
