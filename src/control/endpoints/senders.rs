//! `senders`: the senders of one sampled replication, from memory, newest first.

use std::{cmp::Reverse, time::Duration};

use chrono::{DateTime, SubsecRound, Utc};
use nats_lane::parse_duration;
use regex::{Regex, RegexBuilder};
use tokio::{task::spawn_blocking, time::sleep};

use super::{DEFAULT_LIMIT, Page, RequestContext, named, page};
use crate::{
    control::{
        api::{Failure, SenderRow, SendersPage, SendersRequest},
        service::Request,
    },
    copy::Samples,
    sampling::Listed,
};

/// Senders that are visited before the copy may continue.
const TOGETHER: usize = 8_192;
/// Smallest size of a row in bytes.
const ROW: usize = 64;
/// Memory that the compiled form of an expression may take.
const EXPRESSION: usize = 1 << 20;
/// An instance that does not lead delays its answer: the leader's knowledge is newer, and its answer should win.
const HEAD_START: Duration = Duration::from_millis(300);

/// The filter of a request.
struct Wanted {
    value: Option<Regex>,
    since_ns: i64,
    advised: Option<bool>,
}

pub(super) async fn senders(context: &RequestContext, request: Request) -> Result<SendersPage, Failure> {
    let request = named(&request.body, |replication| SendersRequest { replication, ..SendersRequest::default() })?;
    let SendersRequest { replication, value, since, advised, offset, limit } = request;
    super::check_id(&replication)?;
    let value = value.as_deref().map(expression).transpose()?;
    // Senders were seen by the clock of the source server.
    let known = context.supervisor.row_and_time(&replication);
    let now = known.as_ref().map_or_else(Utc::now, |(_, now)| *now);
    let since_ns = since.as_deref().map(|text| time(text, now)).transpose()?.unwrap_or(i64::MIN);
    let wanted = Wanted { value, since_ns, advised };
    if known.is_none() {
        return Err(context.not_found(&replication).await);
    }
    let Some((samples, leads)) = context.supervisor.samples(&replication) else {
        return Err(Failure::new(409, format!("replication `{replication}` is not sampled, so no senders are known")));
    };
    if !leads {
        sleep(HEAD_START).await;
    }
    let room = context.room();
    let (site, limit) = (context.site.clone(), limit.unwrap_or(DEFAULT_LIMIT));
    // More would not fit into the reply.
    let rows = limit.min(room / ROW);
    let found = spawn_blocking(move || find(&samples, &wanted, offset, rows)).await;
    let (rows, total) = found.map_err(|error| Failure::new(500, error.to_string()))?;
    let Page { rows: senders, .. } = page(rows, 0, Some(limit), room);
    let now = Some(now.trunc_subsecs(3));
    Ok(SendersPage { site, replication, now, senders, offset, limit, total })
}

fn expression(text: &str) -> Result<Regex, Failure> {
    RegexBuilder::new(text)
        .size_limit(EXPRESSION)
        .build()
        .map_err(|error| Failure::new(400, format!("`value` is no regular expression: {error}")))
}

/// A time, or how long ago it was.
fn time(text: &str, now: DateTime<Utc>) -> Result<i64, Failure> {
    let ago = parse_duration(text).ok().and_then(|ago| now.checked_sub_signed(chrono::Duration::from_std(ago).ok()?));
    let time = ago.or_else(|| Some(DateTime::parse_from_rfc3339(text).ok()?.to_utc()));
    time.and_then(|time| time.timestamp_nanos_opt()).ok_or_else(|| {
        Failure::new(400, "`since` is neither a time such as `2026-01-31T08:00:00Z` nor a duration such as `1h`")
    })
}

/// The rows from `offset` on, newest first, and how many match. A few at a time, so that the copy is not held up.
fn find(samples: &Samples, wanted: &Wanted, offset: usize, limit: usize) -> (Vec<SenderRow>, usize) {
    let slots = samples.lock().slots();
    let mut matching = Vec::new();
    for from in (0..slots).step_by(TOGETHER) {
        let mut part = Vec::new();
        {
            let senders = samples.lock();
            let listed = senders.list(from..from + TOGETHER).filter(|(_, sender)| wanted.may_match(sender));
            // Only the fields to match are needed outside of the lock.
            let name = |sender: &Listed<'_>| wanted.value.as_ref().map(|_| sender.sender.to_owned());
            part.extend(listed.map(|(slot, sender)| (sender.seen_ns, slot, name(&sender))));
        }
        part.retain(|(.., name)| wanted.is_match(name.as_deref()));
        matching.extend(part.into_iter().map(|(seen, slot, _)| (seen, slot)));
    }
    let total = matching.len();
    let end = offset.saturating_add(limit).min(total);
    // Only this many have to be sorted.
    if end > 0 && end < total {
        matching.select_nth_unstable_by_key(end - 1, |(seen, slot)| (Reverse(*seen), *slot));
    }
    matching.truncate(end);
    matching.sort_unstable_by_key(|(seen, slot)| (Reverse(*seen), *slot));
    let mut rows = Vec::new();
    for part in matching.get(offset..).unwrap_or_default().chunks(TOGETHER) {
        let senders = samples.lock();
        rows.extend(part.iter().filter_map(|(_, slot)| Some(row(senders.list(*slot..*slot + 1).next()?.1))));
    }
    (rows, total)
}

impl Wanted {
    /// All but the expression.
    fn may_match(&self, sender: &Listed<'_>) -> bool {
        sender.seen_ns >= self.since_ns && self.advised.is_none_or(|advised| advised == sender.advised)
    }

    fn is_match(&self, sender: Option<&str>) -> bool {
        self.value.as_ref().is_none_or(|value| sender.is_some_and(|sender| value.is_match(sender)))
    }
}

fn row(sender: Listed<'_>) -> SenderRow {
    SenderRow {
        sender: sender.sender.to_owned(),
        seen: DateTime::from_timestamp_nanos(sender.seen_ns),
        copied: sender.copied_ns.map(DateTime::from_timestamp_nanos),
        size: sender.copied_ns.map(|_| sender.size),
        advised: sender.advised,
        sequence: sender.copied_ns.map(|_| sender.sequence),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_a_time_or_how_long_ago_it_was() {
        let now = DateTime::parse_from_rfc3339("2026-01-02T03:04:05Z").unwrap().to_utc();
        let at = now.timestamp_nanos_opt().unwrap();
        assert_eq!(time("1h", now), Ok(at - 3_600_000_000_000));
        assert_eq!(time("2026-01-02T04:04:05+01:00", now), Ok(at));
        for wrong in ["", "yesterday", "-1h"] {
            assert_eq!(time(wrong, now).map_err(|failure| failure.code), Err(400), "{wrong}");
        }
    }

    #[test]
    fn an_expression_is_bounded() {
        assert!(expression("^n[0-9]+\\.example").is_ok());
        assert_eq!(expression("(").unwrap_err().code, 400);
        assert_eq!(expression("((a{1000}){1000}){1000}").unwrap_err().code, 400);
    }
}
