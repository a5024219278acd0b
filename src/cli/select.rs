//! Which replications a command is for: ids, patterns of ids, or all of them.

use nats_lane::endpoint::nearest;
use wildmatch::WildMatch;

use super::{client::Client, error::Error, output::clean, reply::Reply};
use crate::control::api::List;

/// The replications of a command that changes something: at least one has to be named.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct SelectedIds {
    /// Replications, or patterns of their ids such as `'S0*'`
    #[arg(required_unless_present = "all", value_name = "ID")]
    ids: Vec<String>,

    /// All replications
    #[arg(long, conflicts_with = "ids")]
    all: bool,
}

impl SelectedIds {
    /// The ids, each once. A pattern that matches none is an error, and nothing is done.
    pub(super) async fn resolve(&self, client: &Client) -> Result<Vec<String>, Error> {
        if self.all {
            return expand(client, &["*".to_owned()]).await;
        }
        expand(client, &self.ids).await
    }
}

/// Whether it stands for the ids that it matches.
pub(super) fn is_pattern(id: &str) -> bool {
    id.contains(['*', '?'])
}

/// The ids that these ids and patterns name, each once.
pub(super) async fn expand(client: &Client, wanted: &[String]) -> Result<Vec<String>, Error> {
    if !wanted.iter().any(|id| is_pattern(id)) {
        return matching(wanted, &[]);
    }
    matching(wanted, &all(client).await?)
}

/// All ids.
pub(super) async fn all(client: &Client) -> Result<Vec<String>, Error> {
    let list: Reply<List> = client.pages("config.list").await?;
    Ok(list.value.replications.into_iter().map(|row| row.replication).collect())
}

/// The ids and what the patterns among them match, in this order and each once.
pub(super) fn matching(wanted: &[String], known: &[String]) -> Result<Vec<String>, Error> {
    let mut ids: Vec<String> = Vec::new();
    let mut add = |id: &String| {
        if !ids.contains(id) {
            ids.push(id.clone());
        }
    };
    for one in wanted {
        if !is_pattern(one) {
            add(one);
            continue;
        }
        let pattern = WildMatch::new(one);
        let matched: Vec<_> = known.iter().filter(|id| pattern.matches(id)).collect();
        if matched.is_empty() {
            return Err(Error::Failed(no_match(one, known)));
        }
        matched.into_iter().for_each(&mut add);
    }
    Ok(ids)
}

fn no_match(pattern: &str, known: &[String]) -> String {
    match known.len() {
        0 => "there are no replications".to_owned(),
        number => format!("none of {number} replications matches `{}`", clean(pattern)),
    }
}

/// The error for an id that does not exist, with the nearest one.
pub(super) fn missing(id: &str, known: &[String]) -> Error {
    let near = nearest(id, known.iter().map(String::as_str));
    let near = near.map(|near| format!(", did you mean `{near}`?")).unwrap_or_default();
    Error::Failed(format!("replication `{}` does not exist{near}", clean(id)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(ids: &[&str]) -> Vec<String> {
        ids.iter().map(|id| (*id).to_owned()).collect()
    }

    #[test]
    fn patterns_become_the_ids_that_they_match() {
        let known = texts(&["A", "S01", "S02", "S1.x"]);
        let check = |wanted: &[&str], expect: &[&str]| {
            assert_eq!(matching(&texts(wanted), &known).unwrap(), texts(expect), "{wanted:?}");
        };
        check(&["S0*"], &["S01", "S02"]);
        check(&["S02", "S*", "NEW"], &["S02", "S01", "S1.x", "NEW"]);
        check(&["S0?", "S0?"], &["S01", "S02"]);
        check(&["*"], &["A", "S01", "S02", "S1.x"]);
        let none = matching(&texts(&["S01", "X*"]), &known).unwrap_err().to_string();
        assert_eq!(none, "none of 4 replications matches `X*`");
        assert_eq!(matching(&texts(&["*"]), &[]).unwrap_err().to_string(), "there are no replications");
    }

    #[test]
    fn a_typo_is_answered_with_the_id_that_is_near() {
        let error = missing("ORDRES", &texts(&["EVENTS", "ORDERS"])).to_string();
        assert_eq!(error, "replication `ORDRES` does not exist, did you mean `ORDERS`?");
        assert_eq!(missing("X", &texts(&["ORDERS"])).to_string(), "replication `X` does not exist");
    }
}
