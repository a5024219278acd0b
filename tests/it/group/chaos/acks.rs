//! Logs of all instances about the acks that they took, compared with each other.
//!
//! An ack is taken while the lease is held, and the next holder first reads the end of the target and then writes after
//! it. So of one replication all that an epoch had confirmed is before all that a later epoch gets confirmed, whatever
//! arrives late: with the chain it is refused; with ids it may be stored, but no former holder gets the ack, or the next
//! holder gets it, as of a duplicate, and the message is after the end that this holder read when it began. The log of a batch
//! into a shared target has the sequence of its last message alone.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};

/// In each line about an ack.
const MARK: &str = "TRACE stream_replicator::settled:";

/// What one epoch of a replication had confirmed.
#[derive(Debug)]
struct Tenure {
    instance: String,
    first: u64,
    last: u64,
}

/// What the logs tell.
#[derive(Debug, Default)]
pub struct Acks {
    tenures: BTreeMap<String, BTreeMap<u64, Tenure>>,
    pub lines: usize,
}

impl Acks {
    /// Takes all that an instance wrote.
    pub fn read(&mut self, instance: &str, log: &str) -> Result<()> {
        for line in log.lines() {
            let Some((_, fields)) = line.split_once(MARK) else { continue };
            let field = |name: &str| {
                let value = fields.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
                value.with_context(|| format!("no `{name}` in `{line}`"))
            };
            let replication = field("replication")?.trim_matches('"').to_owned();
            let (epoch, first, last) = (field("epoch")?.parse()?, field("first")?.parse()?, field("last")?.parse()?);
            ensure!(first <= last, "{line}");
            self.lines += 1;
            let tenures = self.tenures.entry(replication).or_default();
            let tenure = tenures.entry(epoch).or_insert_with(|| Tenure { instance: instance.to_owned(), first, last });
            ensure!(tenure.instance == instance, "`{}` has the same epoch: `{instance}`: {line}", tenure.instance);
            tenure.first = tenure.first.min(first);
            tenure.last = tenure.last.max(last);
        }
        Ok(())
    }

    /// Ranges of different epochs do not interleave.
    pub fn verify(&self) -> Result<()> {
        for (replication, tenures) in &self.tenures {
            let pairs = tenures.iter().zip(tenures.iter().skip(1));
            for ((epoch, before), (next, after)) in pairs {
                ensure!(
                    before.last < after.first,
                    "{replication}: epoch {epoch} wrote up to {} ({before:?}), epoch {next} from {} on ({after:?})",
                    before.last,
                    after.first
                );
            }
        }
        Ok(())
    }

    /// The last sequence that was confirmed; 0 if nothing was.
    pub fn last(&self, replication: &str) -> u64 {
        let tenures = self.tenures.get(replication).into_iter().flat_map(BTreeMap::values);
        tenures.map(|tenure| tenure.last).max().unwrap_or_default()
    }

    /// How often another instance followed, over all replications.
    pub fn takeovers(&self) -> usize {
        let moves = |tenures: &BTreeMap<u64, Tenure>| {
            tenures.values().zip(tenures.values().skip(1)).filter(|(a, b)| a.instance != b.instance).count()
        };
        self.tenures.values().map(moves).sum()
    }

    /// Epochs in which something was confirmed, over all replications.
    pub fn epochs(&self) -> usize {
        self.tenures.values().map(BTreeMap::len).sum()
    }
}

fn line(epoch: u64, first: u64, last: u64) -> String {
    format!("2026-01-01T00:00:00.0Z {MARK} replication=\"A\" epoch={epoch} first={first} last={last}\n")
}

#[track_caller]
fn check(one: &[(u64, u64, u64)], two: &[(u64, u64, u64)], expect: Result<usize, &str>) {
    let mut acks = Acks::default();
    let log = |ranges: &[(u64, u64, u64)]| ranges.iter().map(|(e, f, l)| line(*e, *f, *l)).collect::<String>();
    let read = acks.read("one", &log(one)).and_then(|()| acks.read("two", &log(two)));
    let found = read.and_then(|()| acks.verify()).map(|()| acks.takeovers());
    match (found, expect) {
        (Ok(found), Ok(expect)) => assert_eq!(found, expect),
        (Err(found), Err(expect)) => assert!(found.to_string().contains(expect), "{found}"),
        (found, expect) => panic!("{found:?} instead of {expect:?}"),
    }
}

#[test]
fn epochs_may_follow_each_other_and_must_not_interleave() {
    check(&[(1, 1, 5), (1, 6, 9), (4, 30, 30)], &[(3, 10, 12)], Ok(2));
    check(&[(1, 1, 5)], &[], Ok(0));
    check(&[(1, 1, 5), (1, 9, 9)], &[(2, 6, 8)], Err("epoch 1 wrote up to 9"));
    check(&[(2, 5, 5)], &[(1, 5, 5)], Err("epoch 1 wrote up to 5"));
    check(&[(1, 1, 5)], &[(1, 6, 8)], Err("has the same epoch"));
}
