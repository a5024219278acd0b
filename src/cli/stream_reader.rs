//! Reads what a stream keeps, in its order, and what comes if that is wanted.

use std::{fmt::Display, time::Duration};

use async_nats::{
    Message, datetime,
    jetstream::consumer::{Consumer, DeliverPolicy, pull},
};
use chrono::{DateTime, Utc};
use futures_util::StreamExt;

use super::{client::Client, error::Error, output::Output};

/// A consumer that was lost is made again within this time.
const QUIET: Duration = Duration::from_secs(20);

/// Time limit for the deletion of the consumer.
const DELETED: Duration = Duration::from_secs(1);

/// The messages to read.
#[derive(Debug)]
pub(super) struct StoredMessages<'a> {
    /// Its name in errors.
    pub(super) what: &'a str,
    /// Where it is kept.
    pub(super) stream: &'a str,
    /// Empty for all.
    pub(super) subjects: Vec<String>,
    /// Only messages stored since then.
    pub(super) since: Option<DateTime<Utc>>,
    /// Where to begin without that.
    pub(super) from: DeliverPolicy,
    /// Whether to continue with new messages.
    pub(super) follow: bool,
}

/// Shows each message, with the number of those after it, until there are no more or the output is closed.
pub(super) async fn read(
    client: &Client,
    stored: StoredMessages<'_>,
    out: &mut Output,
    show: impl Fn(&Message, u64, &mut Output),
) -> Result<(), Error> {
    let StoredMessages { what, stream, subjects, since, from, follow } = stored;
    let failed = |error: &dyn Display| Error::Failed(format!("{what} in stream `{stream}`: {error}"));
    let deliver_policy = match since {
        Some(since) => {
            let start_time = datetime::parse_rfc3339(&since.to_rfc3339()).map_err(|error| failed(&error))?;
            DeliverPolicy::ByStartTime { start_time }
        }
        None => from,
    };
    let config = pull::OrderedConfig { filter_subjects: subjects, deliver_policy, ..pull::OrderedConfig::default() };
    let consumer = client.jetstream().create_consumer_on_stream(config, stream).await;
    let consumer = consumer.map_err(|error| failed(&error))?;
    let (name, pending) = (consumer.cached_info().name.clone(), consumer.cached_info().num_pending);
    let shown = match follow || pending > 0 {
        true => show_all(client, (what, stream), consumer, follow, out, show).await,
        false => Ok(()),
    };
    // The server would delete it too, half a minute later.
    let context = client.jetstream();
    let _ = tokio::time::timeout(DELETED, context.delete_consumer_from_stream(name, stream)).await;
    shown
}

async fn show_all(
    client: &Client,
    (what, stream): (&str, &str),
    consumer: Consumer<pull::OrderedConfig>,
    follow: bool,
    out: &mut Output,
    show: impl Fn(&Message, u64, &mut Output),
) -> Result<(), Error> {
    let failed = |error: &dyn Display| Error::Failed(format!("{what} in stream `{stream}`: {error}"));
    let mut messages = consumer.messages().await.map_err(|error| failed(&error))?;
    while !out.closed() {
        let next = messages.next();
        let next = if follow {
            next.await
        } else {
            let within = client.answer_within().max(QUIET);
            tokio::time::timeout(within, next).await.map_err(|_| failed(&format!("no answer within {within:?}")))?
        };
        let Some(message) = next else { break };
        let message = message.map_err(|error| failed(&error))?;
        let left = message.info().map(|info| info.pending).map_err(|error| failed(&error))?;
        show(&message.message, left, out);
        if left == 0 && !follow {
            break;
        }
    }
    Ok(())
}
