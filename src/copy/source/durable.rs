//! The durable consumer of a replication at a source that removes acknowledged messages (interest and work-queue
//! retention): whether it exists, whether it can be used, and its creation.
//!
//! An existing one, such as that of Choria's replicator, is used as it is. Ours has [`MARK`] in its metadata: only such
//! a consumer is ever changed, and deleted with its replication. One of another replication, or of another
//! installation, is not used: two readers of one consumer get a part of the messages each.
//!
//! No consumer is deleted to read messages again, with one exception. A stream that lost its end may have a consumer
//! that did not. Servers from 2.14 on lower its delivered sequence and its ack floor to the stream's last sequence.
//! Older ones leave it ahead: messages that the stream stores next, up to the old delivered sequence, are never
//! delivered, and the ack floor is about messages that are gone. Such a consumer of ours is deleted and created again,
//! also where it only may be ahead: the stream may have grown past it before anyone read again, and then only the times
//! of its last delivery and of the messages show that.
//! An interest stream would remove its messages with the consumer: a second one keeps them until the new one exists.

use nats_lane::{
    Dial, Error, ErrorKind, Lane,
    jetstream::{Api, ConsumerInfo, StreamInfo},
};
use serde_json::{Value, json};
use tokio::time::Duration;
use tracing::{info, warn};

use crate::{
    config::{Replication, Start},
    copy::{
        source::locate,
        target::{stream::API_LEVEL_2_14, target_limits},
    },
    names,
};

/// Metadata of the consumers that we create; the value is the id of the replication.
const MARK: &str = names::PROGRAM;
/// Metadata of the consumers that we create: the site, for people, and the identity of the installation. Consumers that
/// earlier versions created have neither: the first instance that uses them adds it.
const SITE: &str = "stream-replicator.site";
const INSTALLATION: &str = "stream-replicator.installation";
/// Time after which unacknowledged messages are redelivered: of no use here, where redelivery is requested when needed.
const ACK_WAIT: Duration = Duration::from_secs(300);
/// A push consumer sends a heartbeat this often while it has no message to deliver, and asks for the acks of its last
/// deliveries.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// Least `max_ack_pending`.
const LEAST_PENDING: u64 = 16;
/// What the names begin with of consumers that keep the messages of an interest stream while the durable one is recreated.
/// No durable consumer of a replication has such a name: its own name would be that of another replication.
const KEEPERS: [&str; 4] = ["sr_keep_", "sr_keep2_", "sr_keep3_", "sr_keep4_"];

/// The advice for everyone who reads that a consumer is in the way.
const KEEP: &str = "Do not delete the consumer while messages wait for it: an interest stream removes them with it";

/// How a consumer wants its acks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// One for each message, which is pulled.
    Explicit,
    /// By the flow control of a push consumer: server 2.14.
    FlowControl,
}

impl Way {
    /// The way of a consumer that we create.
    pub(crate) fn of(source: &StreamInfo) -> Self {
        if source.api_level() >= API_LEVEL_2_14 { Self::FlowControl } else { Self::Explicit }
    }
}

/// The owner of our consumers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Owner<'a> {
    /// The site, as it is now.
    pub(crate) site: &'a str,
    /// The identity of the installation.
    pub(crate) installation: &'a str,
}

/// A durable consumer at the source.
#[derive(Debug, Clone)]
pub(crate) struct Durable {
    pub(in crate::copy) name: String,
    pub(in crate::copy) way: Way,
    pub(in crate::copy) info: ConsumerInfo,
}

impl Durable {
    /// Whether a source is read with a durable consumer.
    pub(crate) fn is_needed(source: &StreamInfo) -> bool {
        !target_limits::limits(source)
    }

    /// Name of the durable consumer of a replication.
    pub(crate) fn name(replication: &Replication) -> String {
        names::choria_consumer(&replication.name)
    }

    /// The same, and then the names that it had while the site had other names, newest first: messages that one of them
    /// has acknowledged are settled, and messages that wait for it have to be read.
    pub(crate) fn names(replication: &Replication) -> impl Iterator<Item = String> + '_ {
        let former = replication.former.iter().rev().map(|former| former.name.as_str());
        let former = former.filter(|name| *name != replication.name);
        std::iter::once(Self::name(replication)).chain(former.map(names::choria_consumer))
    }

    /// The existing consumer; an error if it cannot be used.
    pub(crate) async fn find(
        lane: &mut Lane,
        replication: &Replication,
        owner: Owner<'_>,
    ) -> Result<Option<Self>, Error> {
        for name in Self::names(replication) {
            if let Some(info) = Api::new(lane).consumer_info(&replication.source.stream, &name).await? {
                return Ok(Some(Self { way: judge(replication, owner, &name, &info.config)?, name, info }));
            }
        }
        Ok(None)
    }

    /// Whether it delivered messages that the stream does not have: the stream lost its end.
    pub(in crate::copy) fn is_ahead(&self, source: &StreamInfo) -> bool {
        self.info.delivered.stream_seq > source.state.last_seq
    }

    /// Up to where the source has everything acknowledged; 0 if the consumer shows that these were other messages, which the
    /// stream has lost. It may show that where neither the record nor the target does: all that was acknowledged may have
    /// been skipped, and not saved.
    pub(in crate::copy) fn floor(&self, source: &StreamInfo) -> u64 {
        let floor = self.info.ack_floor.stream_seq;
        let gone = floor > source.state.last_seq || self.is_ahead(source) && self.is_stale(source);
        if gone { 0 } else { floor }
    }

    /// Whether it has never had an ack. (One that pushes is reset at each start, and then counts from 0 again.)
    fn is_unused(&self) -> bool {
        self.way == Way::Explicit && self.info.ack_floor.consumer_seq == 0
    }

    /// Keeps the consumer, unless it is ahead of its stream, which lost its end: it never delivers the messages that
    /// the stream stores next, up to the sequence that was delivered before. Servers before 2.14 leave it so. `lost` if
    /// the loss of the end was observed; otherwise the stream has not grown yet.
    pub(crate) async fn unless_ahead(
        self,
        lane: &mut Lane,
        replication: &Replication,
        source: &StreamInfo,
        position: u64,
        lost: bool,
    ) -> Result<Option<Self>, Error> {
        let (delivered, state) = (self.info.delivered.stream_seq, &source.state);
        let doubted = !lost && self.may_pass_over(lane, replication, source, position).await?;
        let grown = (lost || doubted) && stays_ahead(source) && state.first_seq <= delivered;
        if self.way != Way::Explicit || delivered <= position || !(grown || delivered > state.last_seq) {
            return Ok(Some(self));
        }
        // The stream may have stored more since `source` was read, and the consumer delivered that.
        let now = Api::new(lane).stream_info(&replication.source.stream).await?;
        if !grown && now.is_some_and(|now| delivered <= now.state.last_seq) {
            return Ok(Some(self));
        }
        self.give_up(lane, replication, source, position, !doubted).await.map(|()| None)
    }

    /// Whether messages after `position` may wait where it does not deliver them: they were stored after the stream had lost
    /// its end, and take sequences of messages that it delivered before. They are later than its last delivery. Where it
    /// does not say when that was, because its server was restarted since, or where it has never had an ack, any message
    /// there counts: those that it delivered are there as well, and to deliver them again costs nothing. (At or below the
    /// position, the message there shows the loss.) If so, its ack floor says nothing of them either.
    pub(in crate::copy) async fn may_pass_over(
        &self,
        lane: &mut Lane,
        replication: &Replication,
        source: &StreamInfo,
        position: u64,
    ) -> Result<bool, Error> {
        let delivered = self.info.delivered.stream_seq;
        if !stays_ahead(source) || !is_ours(&self.info.config) || delivered <= position {
            return Ok(false);
        }
        let stream = &replication.source.stream;
        let Some(last) = self.info.delivered.last_active.filter(|_| !self.is_unused()) else {
            let first = Api::new(lane).message_from(stream, position + 1).await?;
            return Ok(first.is_some_and(|first| first.sequence <= delivered));
        };
        let newest = Api::new(lane).message_from(stream, delivered).await?;
        if let Some(newest) = newest.filter(|newest| newest.sequence == delivered) {
            return Ok(last.timestamp_nanos_opt().is_some_and(|last| newest.time_ns > last));
        }
        // That one was removed since.
        let before = locate::search_time(lane, stream, &source.state, last).await?;
        Ok(before < delivered)
    }

    /// Whether the ack floor proves nothing about the messages of the stream, because the stream lost its end.
    pub(in crate::copy) fn is_stale(&self, source: &StreamInfo) -> bool {
        self.way == Way::Explicit && stays_ahead(source) && source.state.first_seq <= self.info.ack_floor.stream_seq
    }

    /// Deletes a consumer that is ahead of its stream, so that the next one delivers all messages after
    /// `position`. A work queue loses nothing by that. An interest stream would remove the messages that no other
    /// consumer wants: until the next one exists, a second consumer keeps them.
    async fn give_up(
        self,
        lane: &mut Lane,
        replication: &Replication,
        source: &StreamInfo,
        position: u64,
        certain: bool,
    ) -> Result<(), Error> {
        let stream = &replication.source.stream;
        let delivered = self.info.delivered.stream_seq;
        if !is_ours(&self.info.config) {
            let todo = if source.text("retention") == "workqueue" {
                "Delete this consumer: the replication creates its own, and the stream keeps its messages"
            } else {
                "Create a second consumer, which keeps the messages that wait, then delete this one: the replication creates its \
                 own. Delete the second one when the replication copies again"
            };
            return Err(Error::hold(format!(
                "source stream `{stream}` lost its end, and durable consumer `{}`, which this replication did not create, is ahead \
                 of it: it never delivers what the stream stored since then, up to sequence {delivered}. {todo}",
                self.name
            )));
        }
        if source.text("retention") != "workqueue" {
            self.keep_messages(lane, replication, position).await?;
        }
        let (id, consumer) = (&replication.id, &self.name);
        if certain {
            let why = "the durable consumer is ahead of its stream, which lost its end";
            warn!(replication = id, stream, consumer, delivered, position, "{why}: recreating it");
        } else {
            let why = "it may be ahead of its stream";
            info!(replication = id, stream, consumer, delivered, position, "recreating the durable consumer: {why}");
        }
        Api::new(lane).delete_consumer(stream, &self.name).await
    }

    /// Creates a second consumer that keeps the messages after `position`. It stays until the durable consumer exists
    /// again or the replication is deleted, however long the process is down meanwhile: the stream removes messages that
    /// no consumer wants. An earlier try may have left one. One that begins earlier keeps as much; beside one that begins later,
    /// another is needed: no server changes where a consumer begins, and servers before 2.14 remove messages when any
    /// consumer ends beside one that is ahead.
    async fn keep_messages(&self, lane: &mut Lane, replication: &Replication, position: u64) -> Result<(), Error> {
        let stream = &replication.source.stream;
        let mut left = Vec::new();
        let name = loop {
            let Some(name) = keepers(&self.name).nth(left.len()) else {
                return Err(Error::retry(format!(
                    "consumers {} of source stream `{stream}` were left by runs that were interrupted, and keep no messages before \
                     sequence {}",
                    left.join(", "),
                    position + 1
                )));
            };
            let Some(there) = Api::new(lane).consumer_info(stream, &name).await? else { break name };
            if there.config["opt_start_seq"].as_u64().is_none_or(|from| from <= position + 1) {
                return Ok(());
            }
            left.push(name);
        };
        let mut config = json!({
            "name": name,
            "durable_name": name,
            "description": format!("keeps messages while `{}` is recreated", self.name),
            "ack_policy": "explicit",
            "max_ack_pending": 1,
            "metadata": { MARK: replication.id },
        });
        begin_after(&mut config, position);
        take_subjects(&mut config, replication);
        Api::new(lane).create_consumer(stream, &name, &config).await.map(|_| ())
    }

    /// Opens the consumer that was found, or creates one that begins after `position`. A push consumer delivers to
    /// `subject` from now on, beginning after its ack floor.
    pub(in crate::copy) async fn open(
        lane: &mut Lane,
        replication: &Replication,
        owner: Owner<'_>,
        source: &StreamInfo,
        found: Option<Self>,
        subject: Option<&str>,
        position: u64,
    ) -> Result<Self, Error> {
        let stream = &replication.source.stream;
        let Some(Self { name, way, info }) = found else {
            let (name, way) = (Self::name(replication), Way::of(source));
            let mut config = new_config(replication, source, &name, position);
            change(&mut config, replication, owner, source, subject);
            // Another instance may create it at the same moment.
            let created = Api::new(lane).create_new_consumer(stream, &name, &config).await;
            let info = created.map_err(|error| not_made(error, &name, source, stream))?;
            // Also where the server is newer by now than the one that needed it.
            if source.text("retention") != "workqueue" {
                remove_keepers(lane, stream, &name).await?;
            }
            return Ok(Self { name, way, info });
        };
        let mut config = info.config.clone();
        if !is_ours(&config) {
            return Ok(Self { name, way, info });
        }
        change(&mut config, replication, owner, source, subject);
        let keeps = way == Way::Explicit && source.text("retention") != "workqueue";
        if keeps && info.delivered.stream_seq <= position {
            // A process that ended too soon may have left one. This consumer delivers all that it keeps.
            remove_keepers(lane, stream, &name).await?;
        }
        let mut info = if config == info.config {
            info
        } else {
            let changed = Api::new(lane).create_consumer(stream, &name, &config).await;
            changed.map_err(|error| not_made(error, &name, source, stream))?
        };
        if way == Way::FlowControl {
            let from = begin_again(source, info.ack_floor.stream_seq, position);
            info = Api::new(lane).reset_consumer(stream, &name, from).await?;
        }
        Ok(Self { name, way, info })
    }
}

/// Whether a consumer of this stream stays ahead when the stream loses its end: servers from 2.14 on (API level 4)
/// lower its delivered sequence and its ack floor to the stream's last sequence.
fn stays_ahead(source: &StreamInfo) -> bool {
    Way::of(source) == Way::Explicit
}

/// Names of consumers that keep the messages of an interest stream while this one is recreated, in the order of their use.
fn keepers(name: &str) -> impl DoubleEndedIterator<Item = String> + '_ {
    KEEPERS.iter().map(move |prefix| format!("{prefix}{name}"))
}

/// Deletes them, the last one first: there is none after one that does not exist.
async fn remove_keepers(lane: &mut Lane, stream: &str, name: &str) -> Result<(), Error> {
    let (mut api, mut there) = (Api::new(lane), Vec::new());
    for keeper in keepers(name) {
        if api.consumer_info(stream, &keeper).await?.is_none() {
            break;
        }
        there.push(keeper);
    }
    for keeper in there.iter().rev() {
        api.delete_consumer(stream, keeper).await?;
    }
    Ok(())
}

/// The sequence to which a push consumer is reset; `None` for its ack floor.
fn begin_again(source: &StreamInfo, floor: u64, position: u64) -> Option<u64> {
    let state = &source.state;
    if floor > state.last_seq {
        // The stream lost its end, and with it the acknowledged messages.
        return Some(position + 1);
    }
    // A work queue has no acknowledged messages, unless its server was killed and forgot their removal: they are
    // delivered, skipped and acknowledged again.
    let left = source.text("retention") == "workqueue" && state.messages > 0 && state.first_seq <= floor;
    left.then_some(state.first_seq)
}

/// Deletes the durable consumer of a replication at its source, if we created it; returns whether it existed.
pub(crate) async fn remove(dial: &dyn Dial, replication: &Replication, owner: Owner<'_>) -> Result<bool, Error> {
    let connection = format!("{} {}", names::PROGRAM, replication.id);
    let mut lane = dial.dial(&replication.source.place, &connection).await?;
    let stream = &replication.source.stream;
    let (mut api, mut removed) = (Api::new(&mut lane), false);
    for name in Durable::names(replication) {
        let ours = |config: &Value| is_ours(config) && other_owner(replication, owner, config).is_none();
        for name in keepers(&name).rev().chain([name.clone()]) {
            if api.consumer_info(stream, &name).await?.is_some_and(|info| ours(&info.config)) {
                api.delete_consumer(stream, &name).await?;
                removed = true;
            }
        }
    }
    Ok(removed)
}

/// Why a first start cannot begin where the document says: a work queue is consumed from its beginning.
pub(crate) fn start_refused(replication: &Replication, source: &StreamInfo) -> Option<String> {
    let field = match &replication.start {
        Start::All => return None,
        Start::Sequence(first) if *first <= source.state.first_seq.max(1) => return None,
        Start::AtEnd => "start_at_end",
        Start::Sequence(_) => "start_sequence",
        Start::Delta(_) => "start_delta",
        Start::Time(_) => "start_time",
    };
    (source.text("retention") == "workqueue").then(|| {
        format!(
            "source stream `{}` is a work queue, which is copied from its beginning: `{field}` would take messages out of \
             it without a copy",
            replication.source.stream
        )
    })
}

/// Whether a replication of this program created it.
fn is_ours(config: &Value) -> bool {
    config["metadata"].get(MARK).is_some()
}

/// The creator of a consumer, if that was another replication of this program.
fn other_owner(replication: &Replication, owner: Owner<'_>, config: &Value) -> Option<String> {
    let text = |name: &str| config["metadata"][name].as_str();
    let (id, installation) = (text(MARK)?, text(INSTALLATION));
    if installation.is_some_and(|installation| installation != owner.installation) {
        let site = text(SITE).unwrap_or_default();
        let installation = installation.unwrap_or_default();
        return Some(format!(
            "replication `{id}` of site `{site}` (installation {installation}) uses it, and this is replication `{}` of site `{}` \
             (installation {}); each would copy a part of the messages. Give one of the two a `name` of its own. If the buckets \
             of installation {installation} are lost, so that it runs nowhere, stop all instances of this one and take its \
             consumers over: `stream-replicator site adopt {installation}`",
            replication.id, owner.site, owner.installation
        ));
    }
    (id != replication.id).then(|| {
        format!(
            "replication `{id}` of this site, `{}`, uses it, and this is replication `{}`; each would copy a part of the \
             messages. Give one of the two a `name` of its own",
            owner.site, replication.id
        )
    })
}

/// The way an existing consumer is used; an error if it cannot be.
pub(crate) fn judge(replication: &Replication, owner: Owner<'_>, name: &str, config: &Value) -> Result<Way, Error> {
    if let Some(other) = other_owner(replication, owner, config) {
        let stream = &replication.source.stream;
        return Err(Error::hold(format!(
            "durable consumer `{name}` of source stream `{stream}` is not this replication's: {other}. {KEEP}"
        )));
    }
    let text = |field: &str| config[field].as_str().unwrap_or_default();
    let ours = is_ours(config);
    let pushes = !text("deliver_subject").is_empty();
    let way = match (pushes, text("ack_policy")) {
        (false, "explicit") => Way::Explicit,
        (true, "flow_control") if ours => Way::FlowControl,
        (true, _) => return Err(unusable(replication, name, "it delivers to a subject of another client")),
        (false, policy) => {
            let what = format!("its `ack_policy` is `{policy}`, and only `explicit` acknowledges each copied message");
            return Err(unusable(replication, name, &what));
        }
    };
    if config["max_deliver"].as_i64().is_some_and(|most| most > 0) {
        return Err(unusable(replication, name, "its `max_deliver` makes it give up messages"));
    }
    if config["headers_only"] == true {
        return Err(unusable(replication, name, "it delivers headers only (`headers_only`)"));
    }
    if config["priority_groups"].as_array().is_some_and(|groups| !groups.is_empty()) {
        return Err(unusable(replication, name, "it has `priority_groups`"));
    }
    let wanted: Vec<&str> = replication.scope.filters().iter().map(String::as_str).collect();
    if !ours && filters(config) != wanted {
        let what = format!("it is filtered by {:?}, and the document by {wanted:?}", filters(config));
        return Err(unusable(replication, name, &what));
    }
    Ok(way)
}

fn unusable(replication: &Replication, name: &str, why: &str) -> Error {
    let stream = &replication.source.stream;
    Error::hold(format!(
        "durable consumer `{name}` of source stream `{stream}` cannot be used: {why}. Give the replication another `name`, or \
         change the consumer. {KEEP}"
    ))
}

/// The subject filters of a consumer; empty for all subjects.
pub(crate) fn filters(config: &Value) -> Vec<&str> {
    let one = config["filter_subject"].as_str().filter(|filter| !filter.is_empty());
    let many = config["filter_subjects"].as_array().into_iter().flatten().filter_map(Value::as_str);
    one.into_iter().chain(many).collect()
}

/// The settings that never change in a consumer of ours.
fn new_config(replication: &Replication, source: &StreamInfo, name: &str, position: u64) -> Value {
    let mut config = json!({
        "name": name,
        "durable_name": name,
        "description": format!("replication {}", replication.id),
        "replay_policy": "instant",
        "metadata": { MARK: replication.id },
    });
    // A work queue supports no other beginning.
    begin_after(&mut config, if source.text("retention") == "workqueue" { 0 } else { position });
    match Way::of(source) {
        Way::Explicit => {
            config["ack_policy"] = "explicit".into();
            config["ack_wait"] = (ACK_WAIT.as_nanos() as u64).into();
        }
        Way::FlowControl => {
            config["ack_policy"] = "flow_control".into();
            config["flow_control"] = true.into();
            config["idle_heartbeat"] = (HEARTBEAT.as_nanos() as u64).into();
        }
    }
    config
}

/// A new consumer delivers what is after `position`.
fn begin_after(config: &mut Value, position: u64) {
    if position == 0 {
        config["deliver_policy"] = "all".into();
    } else {
        config["deliver_policy"] = "by_start_sequence".into();
        config["opt_start_seq"] = (position + 1).into();
    }
}

/// Sets the filters of a consumer to the subjects that the document names.
fn take_subjects(config: &mut Value, replication: &Replication) {
    match replication.scope.filters() {
        [] => {}
        [filter] => config["filter_subject"] = filter.as_str().into(),
        filters => config["filter_subjects"] = filters.into(),
    }
}

/// Sets everything that follows from the document and the connection.
fn change(config: &mut Value, replication: &Replication, owner: Owner<'_>, source: &StreamInfo, subject: Option<&str>) {
    let Some(fields) = config.as_object_mut() else { return };
    if let Some(metadata) = fields.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.insert(SITE.to_owned(), owner.site.into());
        metadata.insert(INSTALLATION.to_owned(), owner.installation.into());
    }
    fields.remove("filter_subject");
    fields.remove("filter_subjects");
    fields.insert("max_ack_pending".to_owned(), max_ack_pending(replication, source, subject.is_some()).into());
    if let Some(subject) = subject {
        fields.insert("deliver_subject".to_owned(), subject.into());
    }
    take_subjects(config, replication);
}

/// Twice the most messages in flight, so that the next ones are here when those settle. Pull consumers are bounded in
/// bytes by the pulls; push consumers by this alone, for messages of the average size of the stream.
fn max_ack_pending(replication: &Replication, source: &StreamInfo, pushed: bool) -> u64 {
    let limits = &replication.limits;
    let most = (limits.messages_in_flight as u64).saturating_mul(2).max(LEAST_PENDING);
    let average = source.state.bytes.checked_div(source.state.messages).unwrap_or_default();
    let wanted = match (limits.bytes_in_flight as u64).saturating_mul(2).checked_div(average) {
        Some(fits) if pushed => most.min(fits.max(LEAST_PENDING)),
        _ => most,
    };
    let allowed = source.config.pointer("/consumer_limits/max_ack_pending").and_then(Value::as_u64);
    allowed.filter(|allowed| *allowed > 0).map_or(wanted, |allowed| wanted.min(allowed))
}

/// The error of a consumer that cannot be created or changed, with the remedy.
fn not_made(error: Error, name: &str, source: &StreamInfo, stream: &str) -> Error {
    // During an election a consumer that is just being created is not found and cannot be created again (10013).
    let refused = error.api.as_ref().is_some_and(|api| api.code == 400) && !error.is_api(10013);
    let kind = if refused { ErrorKind::Hold } else { error.kind };
    let doing = match (error.is_api(10099) || error.is_api(10100), source.text("retention")) {
        (true, "workqueue") => format!(
            "work-queue stream `{stream}` gives each message to one consumer, and another one takes those of this \
             replication: durable consumer `{name}` cannot be made"
        ),
        _ => format!("durable consumer `{name}` of source stream `{stream}` cannot be made or changed"),
    };
    Error { kind, ..error.context(doing) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWNER: Owner<'_> = Owner { site: "SITE", installation: "7" };

    fn replication(fields: Value) -> Replication {
        let mut document = json!({"stream": "S", "source_url": "nats://a", "target_url": "nats://b", "name": "x"});
        for (name, value) in fields.as_object().unwrap() {
            document[name] = value.clone();
        }
        crate::config::parse(document.to_string().as_bytes(), "SITE").unwrap()
    }

    fn stream(retention: &str, level: &str, messages: u64, bytes: u64) -> StreamInfo {
        let config = json!({"name": "S", "retention": retention, "metadata": {"_nats.level": level}});
        let state = json!({"messages": messages, "bytes": bytes, "first_seq": 10, "last_seq": 10 + messages});
        serde_json::from_value(json!({"config": config, "state": state})).unwrap()
    }

    /// What is asked for until a consumer that is ahead of its stream is deleted, where an earlier try left this
    /// keeper.
    async fn given_up(keeper: Option<u64>) -> Vec<String> {
        let (mut lane, mut server) = nats_lane::pipe::lane().await;
        let (replication, source) = (replication(json!({})), stream("interest", "1", 5, 50));
        let info = json!({"config": {"metadata": {MARK: "S.x"}}, "delivered": {"stream_seq": 20}});
        let info = serde_json::from_value(info).unwrap();
        let durable = Durable { name: "SR_x".to_owned(), way: Way::Explicit, info };
        let give_up = durable.give_up(&mut lane, &replication, &source, 12, true);
        let mut asked = Vec::new();
        let answer = async {
            loop {
                let question = server.asked().await;
                let subject = question.subject.strip_prefix("$JS.API.CONSUMER.").unwrap_or_default().to_owned();
                let reply = match (subject.as_str(), keeper) {
                    ("INFO.S.sr_keep_SR_x", Some(from)) => json!({"config": {"opt_start_seq": from}}),
                    ("INFO.S.sr_keep_SR_x", None) => json!({"error": {"code": 404, "err_code": 10014}}),
                    ("CREATE.S.sr_keep_SR_x", Some(_)) => json!({"error": {"code": 500, "err_code": 10012,
                        "description": "start sequence can not be updated"}}),
                    ("CREATE.S.sr_keep_SR_x", None) => json!({"config": {}}),
                    _ => json!({"success": true}),
                };
                server.answer(&question, &reply.to_string()).await;
                asked.push(subject);
            }
        };
        tokio::select! {
            given_up = give_up => given_up.unwrap(),
            () = answer => unreachable!(),
        }
        asked
    }

    #[tokio::test]
    async fn what_an_earlier_try_left_keeps_the_messages() {
        let (info, delete) = ("INFO.S.sr_keep_SR_x", "DELETE.S.SR_x");
        assert_eq!(given_up(None).await, [info, "CREATE.S.sr_keep_SR_x", delete]);
        for from in [13, 11] {
            assert_eq!(given_up(Some(from)).await, [info, delete]);
        }
    }

    #[test]
    fn what_is_there_is_used_if_it_loses_nothing() {
        let check = |config: Value, expect: Result<Way, &str>| {
            let judged = judge(&replication(json!({"filter_subject": "s.a"})), OWNER, "SR_x", &config);
            match (judged, expect) {
                (Ok(way), Ok(expect)) => assert_eq!(way, expect, "{config}"),
                (Err(error), Err(expect)) => {
                    assert_eq!(error.kind, ErrorKind::Hold);
                    assert!(error.message.contains(expect), "{error}");
                }
                (judged, _) => panic!("{config}: {judged:?}"),
            }
        };
        let choria =
            json!({"ack_policy": "explicit", "max_deliver": -1, "max_ack_pending": 1, "filter_subject": "s.a"});
        let with = |field: &str, value: Value| {
            let mut config = choria.clone();
            config[field] = value;
            config
        };
        check(choria.clone(), Ok(Way::Explicit));
        check(with("max_deliver", json!(5)), Err("max_deliver"));
        check(with("headers_only", json!(true)), Err("headers_only"));
        check(with("ack_policy", json!("none")), Err("`none`"));
        check(with("ack_policy", json!("all")), Err("`all`"));
        check(with("filter_subject", json!("s.b")), Err("s.b"));
        check(with("deliver_subject", json!("d")), Err("another client"));
        check(with("priority_groups", json!(["g"])), Err("priority_groups"));
        let ours = json!({"ack_policy": "flow_control", "deliver_subject": "d", "metadata": {MARK: "S.x"}});
        check(ours, Ok(Way::FlowControl));
        check(json!({"ack_policy": "flow_control", "deliver_subject": "d"}), Err("another client"));
    }

    #[test]
    fn what_another_replication_or_installation_made_is_not_used() {
        let check = |metadata: Value, expect: Option<&[&str]>| {
            let config = json!({"ack_policy": "explicit", "metadata": metadata});
            let judged = judge(&replication(json!({})), OWNER, "SR_x", &config);
            let Some(expect) = expect else { return assert_eq!(judged.ok(), Some(Way::Explicit), "{config}") };
            let error = judged.unwrap_err();
            assert_eq!(error.kind, ErrorKind::Hold);
            assert!(expect.iter().all(|text| error.message.contains(text)), "{error}");
        };
        check(json!({}), None);
        check(json!({MARK: "S.x"}), None);
        check(json!({MARK: "S.x", SITE: "FORMER", INSTALLATION: "7"}), None);
        check(json!({MARK: "S.x", SITE: "OTHER", INSTALLATION: "8"}), Some(&["`OTHER` (installation 8)", "`SITE`"]));
        check(json!({MARK: "S.x", SITE: "SITE", INSTALLATION: "8"}), Some(&["installation 8", "installation 7"]));
        check(json!({MARK: "S.y"}), Some(&["`S.y`", "`S.x`"]));
    }

    #[test]
    fn what_we_make_follows_the_server_and_the_document() {
        let config = |retention: &str, level: &str, position: u64| {
            let source = stream(retention, level, 0, 0);
            new_config(&replication(json!({})), &source, "SR_x", position)
        };
        let new = config("interest", "4", 7);
        assert_eq!((&new["ack_policy"], &new["opt_start_seq"]), (&json!("flow_control"), &json!(8)));
        let old = config("interest", "3", 0);
        assert_eq!((&old["ack_policy"], &old["deliver_policy"]), (&json!("explicit"), &json!("all")));
        assert_eq!(config("workqueue", "4", 7)["deliver_policy"], "all");
        assert!(is_ours(&new));
        let mut changed = new.clone();
        change(
            &mut changed,
            &replication(json!({"filter_subject": "s.a"})),
            OWNER,
            &stream("interest", "4", 0, 0),
            Some("d"),
        );
        assert_eq!((&changed["filter_subject"], &changed["deliver_subject"]), (&json!("s.a"), &json!("d")));
        change(&mut changed, &replication(json!({})), OWNER, &stream("interest", "4", 0, 0), Some("e"));
        assert_eq!((changed.get("filter_subject"), &changed["deliver_subject"]), (None, &json!("e")));
    }

    #[test]
    fn unacknowledged_messages_are_bounded_by_number_and_bytes() {
        let check = |messages: u64, bytes: u64, pushed: bool, expect: u64| {
            let replication = replication(json!({"limits": {"messages_in_flight": 1000, "bytes_in_flight": 1048576}}));
            let source = stream("interest", "4", messages, bytes);
            assert_eq!(max_ack_pending(&replication, &source, pushed), expect, "{messages} {bytes} {pushed}");
        };
        check(0, 0, true, 2000);
        check(10, 1000, true, 2000);
        check(10, 100_000, true, 209);
        check(10, 10_000_000, true, LEAST_PENDING);
        check(10, 10_000_000, false, 2000);
        let limited = |limit: Value| {
            let mut source = stream("interest", "4", 0, 0);
            source.config["consumer_limits"] = json!({ "max_ack_pending": limit });
            max_ack_pending(&replication(json!({})), &source, false)
        };
        assert_eq!((limited(json!(7)), limited(json!(0)) > 7, limited(json!(1_000_000)) < 1_000_000), (7, true, true));
    }

    #[test]
    fn a_consumer_restarts_after_its_acks_if_the_stream_agrees() {
        let check = |retention: &str, floor: u64, expect: Option<u64>| {
            assert_eq!(begin_again(&stream(retention, "4", 5, 5), floor, 12), expect, "{retention} {floor}");
        };
        check("workqueue", 9, None);
        check("workqueue", 11, Some(10));
        check("interest", 11, None);
        check("interest", 16, Some(13));
    }

    #[test]
    fn acks_count_unless_the_stream_lost_its_end() {
        // The stream has sequences 10 to 15.
        let check = |level: &str, delivered: u64, floor: u64, expect: u64| {
            let info =
                json!({"config": {}, "delivered": {"stream_seq": delivered}, "ack_floor": {"stream_seq": floor}});
            let info = serde_json::from_value(info).unwrap();
            let durable = Durable { name: "SR_x".to_owned(), way: Way::Explicit, info };
            assert_eq!(durable.floor(&stream("interest", level, 5, 50)), expect, "{level} {delivered} {floor}");
        };
        check("1", 15, 12, 12);
        check("1", 20, 16, 0);
        check("1", 20, 12, 0);
        // All of them are gone from the stream.
        check("1", 20, 9, 9);
        // The server lowers the floor with the end of its stream: what was delivered was stored since `source` was read.
        check("4", 20, 12, 12);
    }

    #[test]
    fn a_work_queue_begins_at_its_beginning() {
        let check = |fields: Value, retention: &str, refused: bool| {
            let source = stream(retention, "4", 5, 5);
            assert_eq!(start_refused(&replication(fields.clone()), &source).is_some(), refused, "{fields} {retention}");
        };
        check(json!({}), "workqueue", false);
        check(json!({"start_sequence": 10}), "workqueue", false);
        check(json!({"start_sequence": 11}), "workqueue", true);
        check(json!({"start_at_end": true}), "workqueue", true);
        check(json!({"start_delta": "1h"}), "workqueue", true);
        check(json!({"start_at_end": true}), "interest", false);
    }
}
