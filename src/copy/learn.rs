//! Asks a source which subjects it stores, where its configuration does not say so.

use std::collections::HashMap;

use serde::{Deserialize, de::IgnoredAny};
use serde_json::json;
use tokio::time::{Duration, timeout};
use tracing::debug;

use super::subjects::{InScope, Learned, Learning, Origins};
use crate::{
    config::{Replication, Start},
    names,
    nats::{
        Dial, Error, ErrorKind, Lane,
        jetstream::{StreamInfo, decode},
    },
};

/// Streams that are asked for at most where a source takes messages from others.
const MOST_ORIGINS: usize = 64;
/// Deadline for all of them: a domain that is not reachable must not hold up the copy.
const ORIGINS_WITHIN: Duration = Duration::from_secs(3);
/// Pages of stored subjects (of 100,000 each) that are read at most where the configuration tells too little.
const MOST_PAGES: usize = 10;

/// Everything that can be learned of the subjects of a source; `also` is a subject that it stored at some time. What is
/// not learned here shows when a message is refused.
pub(super) async fn all(
    dial: &dyn Dial,
    lane: &mut Lane,
    replication: &Replication,
    source: &StreamInfo,
    also: Option<&str>,
) -> Result<Learned, Error> {
    let origins = on_lane_of_its_own(dial, replication, source).await;
    stored(lane, replication, source, origins, also).await
}

/// A user who may not ask for these streams loses the connection by it: it is not that of the copy.
async fn on_lane_of_its_own(dial: &dyn Dial, replication: &Replication, source: &StreamInfo) -> Origins {
    let mut found = Origins::default();
    if found.missing(source).is_empty() {
        return found;
    }
    let name = format!("{} {} origins", names::PROGRAM, replication.id);
    let asked = async {
        let mut lane = dial.dial(&replication.source.place, &name).await?;
        origins(&mut lane, source, &mut found).await
    };
    if let Ok(Err(error)) = timeout(ORIGINS_WITHIN, asked).await {
        debug!(replication = replication.id, "the streams that the source takes messages from are not known: {error}");
    }
    found
}

/// Asks for the streams that a source takes messages from, and for those that these take theirs from.
pub(crate) async fn origins(lane: &mut Lane, source: &StreamInfo, found: &mut Origins) -> Result<(), Error> {
    let mut asked: Vec<(String, String)> = Vec::new();
    loop {
        let mut next = found.missing(source);
        next.retain(|origin| !asked.contains(origin));
        let Some((prefix, name)) = next.pop().filter(|_| asked.len() < MOST_ORIGINS) else { return Ok(()) };
        asked.push((prefix.clone(), name.clone()));
        let api = if prefix.is_empty() { lane.api_prefix().to_owned() } else { prefix.clone() };
        let answer = lane.request(&format!("{api}.STREAM.INFO.{name}"), b"").await;
        match answer.and_then(|answer| decode::<StreamInfo>(&answer)) {
            Ok(info) => found.add(&prefix, &name, info),
            // Another account, or a domain that is not there.
            Err(error) if error.kind != ErrorKind::Hold => {}
            Err(error) => return Err(error),
        }
    }
}

/// Reads the subjects of what a source stores. Of a source whose configuration tells its subjects, one page is enough, and
/// none where not everything that it stores is copied.
pub(crate) async fn stored(
    lane: &mut Lane,
    replication: &Replication,
    source: &StreamInfo,
    origins: Origins,
    also: Option<&str>,
) -> Result<Learned, Error> {
    let vague = InScope::of(replication, Some(source), &origins).vague;
    let filter = match replication.scope.filters() {
        [filter] => filter,
        _ => ">",
    };
    let mut learning = Learning::begin(replication, source, origins);
    also.into_iter().for_each(|subject| learning.take(subject));
    let mut offset = 0;
    let pages = match replication.start {
        _ if vague => MOST_PAGES,
        Start::All => 1,
        _ => 0,
    };
    for _ in 0..pages {
        let page = page(lane, &replication.source.stream, filter, offset).await?;
        page.subjects.keys().for_each(|subject| learning.take(subject));
        offset += page.subjects.len();
        if page.subjects.is_empty() || offset >= page.total {
            break;
        }
    }
    Ok(learning.end())
}

struct Page {
    subjects: HashMap<String, IgnoredAny>,
    total: usize,
}

async fn page(lane: &mut Lane, stream: &str, filter: &str, offset: usize) -> Result<Page, Error> {
    #[derive(Deserialize)]
    struct Answer {
        state: State,
        #[serde(default)]
        total: usize,
    }
    #[derive(Deserialize)]
    struct State {
        subjects: Option<HashMap<String, IgnoredAny>>,
    }
    let subject = format!("{}.STREAM.INFO.{stream}", lane.api_prefix());
    let body = json!({"subjects_filter": filter, "offset": offset}).to_string();
    let answer = lane.request(&subject, body.as_bytes()).await?;
    let Answer { state, total } = decode(&answer).map_err(|error| error.context("subjects of the source stream"))?;
    Ok(Page { subjects: state.subjects.unwrap_or_default(), total })
}
