//! `status --wait-caught-up`.

use std::time::{Duration, Instant};

use tokio::time::{sleep, timeout};

use super::{
    client::Client,
    error::{CommandVerdict, Error},
    format::counted,
    output::Output,
    progress::ProgressMeter,
    status_filter::StatusFilter,
    status_view::{StatusView, lag, state_name},
};
use crate::status::{Row, State};

const EVERY: Duration = Duration::from_millis(250);

/// Nothing is left to copy only when that was so all this time: a leader tells its status once a second, and the
/// instance that answers hears of it later.
const SETTLED: Duration = Duration::from_secs(2);

/// How a replication stands to being caught up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stand {
    CaughtUp,
    Behind,
    /// It will not catch up by itself.
    Stuck,
    /// It is not asked to copy.
    Paused,
}

/// Time limit for one answer while waiting for the result.
pub(super) const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// How long a replication that was added may take to have a row.
const APPEARS_WITHIN: Duration = Duration::from_secs(10);

/// Waits for a replication that was added just now.
pub(super) async fn added(
    client: Client,
    id: &str,
    limit: Option<Duration>,
    out: &mut Output,
) -> Result<CommandVerdict, Error> {
    let client = client.answering_within(ANSWER_WITHIN);
    let filter = StatusFilter { ids: vec![id.to_owned()], ..StatusFilter::default() };
    let begun = Instant::now();
    while let Err(error) = StatusView::request(&client, &filter).await {
        // The instance that answers may not know it yet.
        if error.code() != Some(404) || begun.elapsed() > APPEARS_WITHIN {
            return Err(error);
        }
        sleep(EVERY).await;
    }
    until_caught_up(&client, &filter, limit, out).await
}

/// Waits for all that are wanted and that are to copy.
pub(super) async fn until_caught_up(
    client: &Client,
    filter: &StatusFilter,
    limit: Option<Duration>,
    out: &mut Output,
) -> Result<CommandVerdict, Error> {
    let mut behind = String::new();
    let shown = out.shows_progress().then_some(&*out);
    let waited = match limit {
        None => Ok(caught_up(client, filter, &mut behind, shown).await),
        Some(limit) => timeout(limit, caught_up(client, filter, &mut behind, shown)).await,
    };
    if let Some(out) = shown {
        out.progress("");
    }
    let view = match limit {
        None => waited.map_err(|_| Error::Failed(behind))??,
        Some(limit) => match waited {
            Ok(view) => view?,
            Err(_) if behind.is_empty() => {
                return Err(Error::Failed(format!("not caught up for {SETTLED:?} within {limit:?}")));
            }
            Err(_) => return Err(Error::Failed(format!("not caught up within {limit:?}: {behind}"))),
        },
    };
    print(&view, out);
    Ok(CommandVerdict::Good)
}

/// Polls until nothing was left to copy for a while. A service that has answered once may be silent for a while.
/// Shows the progress where there is a terminal.
async fn caught_up(
    client: &Client,
    filter: &StatusFilter,
    behind: &mut String,
    shown: Option<&Output>,
) -> Result<StatusView, Error> {
    let mut meter = ProgressMeter::begin(Instant::now());
    let mut answered = false;
    let mut since: Option<Instant> = None;
    loop {
        let asked = Instant::now();
        match StatusView::request(client, filter).await {
            Ok(view) => {
                answered = true;
                let progress = meter.update(view.rows(), Instant::now());
                if let Some(out) = shown {
                    out.progress(&progress.words());
                }
                *behind = check(view.rows(), filter.names_each())?;
                if !behind.is_empty() {
                    since = None;
                } else if since.get_or_insert(asked).elapsed() >= SETTLED {
                    return Ok(view);
                }
            }
            Err(error) if answered && passes(&error) => {
                *behind = error.to_string();
                since = None;
            }
            Err(error) => return Err(error),
        }
        sleep(EVERY).await;
    }
}

/// Whether to ask again: there were no responders, or the service is temporarily unable.
fn passes(error: &Error) -> bool {
    matches!(error, Error::Failed(_)) || matches!(error.code(), Some(503 | 504))
}

/// The replications that lag, in words; an error if one will not catch up. One that is paused is an error only if it
/// was named.
fn check(rows: &[Row], named_each: bool) -> Result<String, Error> {
    let (mut stuck, mut behind) = (Vec::new(), Vec::new());
    for row in rows {
        match stand(row) {
            Stand::Stuck => stuck.push(row),
            Stand::Paused if named_each => stuck.push(row),
            Stand::Behind => behind.push(row),
            Stand::Paused | Stand::CaughtUp => {}
        }
    }
    if stuck.is_empty() {
        Ok(named(&behind))
    } else {
        Err(Error::Failed(format!("will not catch up: {}", named(&stuck))))
    }
}

fn stand(row: &Row) -> Stand {
    match row.state {
        State::Running if row.copy.lag.is_some_and(|lag| lag.messages == 0) => Stand::CaughtUp,
        State::Running | State::Starting | State::Retrying => Stand::Behind,
        State::Held | State::Invalid | State::Stopped => Stand::Stuck,
        State::Paused => Stand::Paused,
    }
}

fn print(view: &StatusView, out: &mut Output) {
    out.reply(&view.reply, |status| {
        let paused = status.replications.iter().filter(|row| stand(row) == Stand::Paused).count();
        let running = status.replications.len() - paused;
        let paused = if paused > 0 { format!(" ({paused} paused)") } else { String::new() };
        format!("caught up: {}{paused}", counted(running as u64, "replication"))
    });
}

/// Ids and why, the first of many.
fn named(rows: &[&Row]) -> String {
    const MOST: usize = 10;
    let one = |row: &&Row| {
        let (id, state, copy) = (&row.replication, state_name(row.state), &row.copy);
        match (row.state, &copy.last_error) {
            (State::Running, _) => {
                format!("`{id}` is behind by {}", lag(copy.lag, ", "))
            }
            (State::Starting | State::Paused, _) | (_, None) => format!("`{id}` is {state}"),
            (_, Some(error)) => format!("`{id}` is {state}: {}", error.message),
        }
    };
    let mut names: Vec<_> = rows.iter().take(MOST).map(one).collect();
    if rows.len() > MOST {
        names.push(format!("{} more", rows.len() - MOST));
    }
    names.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::api::Failure;

    #[test]
    fn a_service_that_cannot_just_now_ends_no_wait() {
        let refused = |code| passes(&Failure::new(code, "no").into());
        assert_eq!([503, 504, 400, 404, 500].map(refused), [true, true, false, false, false]);
        assert!(passes(&Error::Failed("no answer".to_owned())) && !passes(&Error::Usage("no".to_owned())));
    }
}
