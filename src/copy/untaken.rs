//! A message that no stream took: transient while the target's stream has no leader, permanent where its stream is there
//! and does not listen on the subject. Asked after the run that sent it, on connections of its own: nothing of that run
//! may reach the target any more.

use tokio::time::{Duration, timeout};

use super::{Error, ErrorKind, Job};
use crate::{
    config::patterns,
    names, nats,
    nats::jetstream::{Api, StreamInfo},
    store::SourceMessage,
};

/// Limit for both questions together: without a leader there is no answer, and the next run waits for one anyway.
const ASKED_FOR: Duration = Duration::from_secs(2);

/// The error itself, or what an operator has to do about it.
pub(super) async fn explain(job: &Job, error: Error, message: SourceMessage) -> Error {
    match timeout(ASKED_FOR, untaken(job, message)).await {
        Ok(Ok(Some(held))) => Error::new(ErrorKind::Hold, held),
        // The next run shows what is the matter.
        _ => error,
    }
}

async fn untaken(job: &Job, message: SourceMessage) -> Result<Option<String>, nats::Error> {
    let (source, target) = (&job.replication.source, &job.replication.target);
    let name = format!("{} {}", names::PROGRAM, job.replication.id);
    let mut lane = job.dial.dial(&target.place, &name).await?;
    let Some(stream) = Api::new(&mut lane).stream_info(&target.stream).await? else { return Ok(None) };
    let mut lane = job.dial.dial(&source.place, &name).await?;
    let stored = Api::new(&mut lane).message(&source.stream, message.seq).await?;
    let Some(stored) = stored.filter(|stored| stored.time_ns == message.time_ns) else { return Ok(None) };
    let mut room = Vec::new();
    let subject = job.replication.mapping.apply(stored.subject.as_bytes(), &mut room);
    Ok(held(&target.stream, &stream, &String::from_utf8_lossy(subject), message.seq))
}

/// What to say of a message whose subject the stream does not listen on.
fn held(name: &str, stream: &StreamInfo, subject: &str, seq: u64) -> Option<String> {
    let listens = stream.subjects();
    if listens.iter().any(|pattern| patterns::holds(pattern, subject)) {
        return None;
    }
    let listens: Vec<_> = listens.iter().map(|pattern| format!("`{pattern}`")).collect();
    Some(format!(
        "target: no stream takes subject `{subject}` of the message with source sequence {seq} (no responders): target \
         stream `{name}` listens on {}: add the subject to it, by hand or with `target_update`, map it with \
         `subject_transforms`, or skip it with `exclude_subjects`",
        listens.join(", ")
    ))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_subject_beside_the_stream_is_named_with_its_sequence() {
        let stream = json!({"config": {"subjects": ["a.*", "b"]}, "state": {}});
        let stream: StreamInfo = serde_json::from_value(stream).unwrap();
        assert_eq!(held("T", &stream, "a.x", 7), None);
        assert_eq!(held("T", &stream, "b", 7), None);
        let text = held("T", &stream, "a.x.y", 7).unwrap();
        for part in ["`a.x.y`", "sequence 7", "`T`", "`a.*`, `b`", "target_update"] {
            assert!(text.contains(part), "{text}");
        }
    }
}
