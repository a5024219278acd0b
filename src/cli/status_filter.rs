//! Which rows of the status are shown, and in which order.

use std::cmp::Reverse;

use serde::Deserialize;
use serde_json::Value;

use super::{
    error::Error,
    reply::Reply,
    select::{is_pattern, matching, missing},
};
use crate::{
    control::api::Status,
    status::{Row, State},
};

/// Order of the rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum StatusSort {
    /// By state: held, invalid, stopped, retrying, in need of attention, starting, paused, running; then by lag
    Worst,
    /// By id
    Id,
    /// The greatest lag first
    Lag,
    /// The oldest waiting message first
    Behind,
    /// The most errors first
    Errors,
}

/// Which rows, and how they are sorted.
#[derive(Debug, Clone, Default)]
pub(super) struct StatusFilter {
    /// Ids and patterns; empty for all.
    pub(super) ids: Vec<String>,
    /// Empty for all.
    pub(super) states: Vec<State>,
    /// `None`: as sent.
    pub(super) sort: Option<StatusSort>,
}

impl StatusFilter {
    /// The one id, if nothing else is asked for.
    pub(super) fn only_id(&self) -> Option<&str> {
        match &self.ids[..] {
            [id] if !is_pattern(id) && self.states.is_empty() => Some(id),
            _ => None,
        }
    }

    /// Whether each replication is named by its id.
    pub(super) fn names_each(&self) -> bool {
        !self.ids.is_empty() && !self.ids.iter().any(|id| is_pattern(id))
    }

    /// The wanted rows of an answer with all of them. An answer that needs no change stays as it was sent.
    pub(super) fn apply(&self, reply: Reply<Status>) -> Result<Reply<Status>, Error> {
        if self.ids.is_empty() && self.states.is_empty() && self.sort.is_none() {
            return Ok(reply);
        }
        let order = self.order(&reply.value.replications)?;
        let mut raw: Value = serde_json::from_slice(&reply.raw).unwrap_or_default();
        let rows = raw_rows(&reply);
        raw["replications"] = order.iter().filter_map(|index| rows.get(*index).cloned()).collect();
        (raw["total"], raw["limit"], raw["offset"]) = (order.len().into(), order.len().into(), 0.into());
        let all = reply.value;
        let replications = order.iter().map(|index| all.replications[*index].clone()).collect();
        let value = Status { replications, offset: 0, limit: order.len(), total: order.len(), ..all };
        Ok(Reply { raw: raw.to_string().into(), value })
    }

    /// Indices of the wanted rows, in their order.
    fn order(&self, rows: &[Row]) -> Result<Vec<usize>, Error> {
        let known: Vec<_> = rows.iter().map(|row| row.replication.clone()).collect();
        let wanted = matching(&self.ids, &known)?;
        if let Some(id) = wanted.iter().find(|id| !known.contains(id)) {
            return Err(missing(id, &known));
        }
        let in_state = |row: &Row| self.states.is_empty() || self.states.contains(&row.state);
        let named = |row: &Row| self.ids.is_empty() || wanted.contains(&row.replication);
        let mut order: Vec<_> =
            (0..rows.len()).filter(|index| in_state(&rows[*index]) && named(&rows[*index])).collect();
        let behind = |row: &Row| row.copy.lag.and_then(|lag| lag.seconds).map(|seconds| (seconds * 1e3) as u64);
        let lag = |row: &Row| row.copy.lag.map(|lag| lag.messages);
        let id = |index: &usize| rows[*index].replication.clone();
        match self.sort {
            None => {}
            Some(StatusSort::Id) => order.sort_by_key(id),
            Some(StatusSort::Worst) => {
                order.sort_by_key(|index| (rank(&rows[*index]), Reverse(lag(&rows[*index])), id(index)));
            }
            Some(StatusSort::Lag) => order.sort_by_key(|index| (Reverse(lag(&rows[*index])), id(index))),
            Some(StatusSort::Behind) => order.sort_by_key(|index| (Reverse(behind(&rows[*index])), id(index))),
            Some(StatusSort::Errors) => {
                order.sort_by_key(|index| (Reverse(rows[*index].copy.counters.errors), id(index)));
            }
        }
        Ok(order)
    }
}

/// The worst is 0.
pub(super) fn rank(row: &Row) -> u8 {
    match row.state {
        State::Held => 0,
        State::Invalid => 1,
        State::Stopped => 2,
        State::Retrying => 3,
        State::Running if row.todo.is_some() => 4,
        State::Starting => 5,
        State::Paused => 6,
        State::Running => 7,
    }
}

/// The rows of a status as they were sent.
pub(super) fn raw_rows(reply: &Reply<Status>) -> Vec<Value> {
    #[derive(Deserialize)]
    struct RawStatus {
        replications: Vec<Value>,
    }
    serde_json::from_slice::<RawStatus>(&reply.raw).map(|raw| raw.replications).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn reply() -> Reply<Status> {
        let row = |id: &str, state: &str, lag: Value, errors: u64| {
            json!({"replication": id, "state": state, "origin": "kv", "leader": "i", "epoch": 1, "config_revision": 1,
                "lag": lag, "counters": {"errors": errors}, "do": null, "new": 1})
        };
        let rows = [
            row("A", "running", json!({"messages": 5, "seconds": 1.0}), 0),
            row("B", "held", Value::Null, 7),
            row("C", "running", json!({"messages": 9, "seconds": 0.5}), 2),
            row("D", "retrying", Value::Null, 1),
        ];
        let raw = json!({"site": "X", "replications": rows, "offset": 0, "limit": 9, "total": 4});
        Reply { value: serde_json::from_value(raw.clone()).unwrap(), raw: raw.to_string().into() }
    }

    #[test]
    fn rows_are_chosen_and_sorted() {
        let check = |ids: &[&str], states: &[State], sort: Option<StatusSort>, expect: &[&str]| {
            let ids = ids.iter().map(|id| (*id).to_owned()).collect();
            let filtered = StatusFilter { ids, states: states.to_vec(), sort }.apply(reply()).unwrap();
            let found: Vec<_> = filtered.value.replications.iter().map(|row| row.replication.as_str()).collect();
            assert_eq!(found, expect);
            let raw: Vec<_> = raw_rows(&filtered).iter().map(|row| row["replication"].clone()).collect();
            assert_eq!(raw, expect);
        };
        check(&[], &[], None, &["A", "B", "C", "D"]);
        check(&[], &[], Some(StatusSort::Worst), &["B", "D", "C", "A"]);
        check(&[], &[], Some(StatusSort::Lag), &["C", "A", "B", "D"]);
        check(&[], &[], Some(StatusSort::Behind), &["A", "C", "B", "D"]);
        check(&[], &[], Some(StatusSort::Errors), &["B", "C", "D", "A"]);
        check(&["C", "A"], &[], Some(StatusSort::Id), &["A", "C"]);
        check(&["*"], &[State::Running, State::Held], None, &["A", "B", "C"]);
        check(&["D"], &[State::Running], None, &[]);
    }

    #[test]
    fn an_id_that_does_not_exist_is_an_error() {
        let filter = StatusFilter { ids: vec!["A".into(), "E".into()], ..StatusFilter::default() };
        assert_eq!(filter.apply(reply()).unwrap_err().to_string(), "replication `E` does not exist");
    }

    #[test]
    fn what_this_program_does_not_know_is_passed_on() {
        let filter = StatusFilter { states: vec![State::Held], ..StatusFilter::default() };
        let raw: Value = serde_json::from_slice(&filter.apply(reply()).unwrap().raw).unwrap();
        assert_eq!((&raw["total"], &raw["site"], &raw["replications"][0]["new"]), (&json!(1), &json!("X"), &json!(1)));
    }
}
