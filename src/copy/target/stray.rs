//! A message that no stream stored, or another one than the target: whether the target listens on its subject at all,
//! and the remedy if it does not.

use nats_lane::{
    Error as NatsError, Lane,
    jetstream::{Api, StreamInfo},
};
use tokio::time::{Duration, Instant, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use crate::{
    config::patterns,
    copy::{
        Error, ErrorKind, Job,
        source::{learn, locate},
        target::stream::{Extent, Opened, Opening, quoted},
    },
    names,
};

/// Deadline for connecting to both sides.
const DIAL_WITHIN: Duration = Duration::from_secs(5);
/// Deadline for their answers, at the least, and as a multiple of the connection time: on a slow line both take long.
const ASK_WITHIN: Duration = Duration::from_secs(1);
const DIALS: u32 = 4;

/// Makes the target listen on the subject of a source message, if it does not and may be changed: `true` if it does
/// now. `false` if the subject is not the reason, or the reason could not be determined; an error if an operator has to
/// act.
pub(in crate::copy) async fn mended(job: &Job, seq: u64, stop: &CancellationToken) -> Result<bool, Error> {
    let mended = tokio::select! {
        biased;
        () = stop.cancelled() => return Ok(false),
        mended = mend(job, seq) => mended,
    };
    match mended {
        Ok(mended) => Ok(mended),
        Err(error) => match Error::from(error) {
            held if held.kind == ErrorKind::Hold => Err(held),
            // The error that led here is more precise.
            other => {
                debug!(replication = job.replication.id, "the target was not asked for its subjects: {other}");
                Ok(false)
            }
        },
    }
}

/// Both sides, with the subject of the message at the source.
struct SubjectCheck {
    from: Lane,
    to: Lane,
    source: StreamInfo,
    target: StreamInfo,
    subject: String,
}

/// Connects to both sides.
async fn dial(job: &Job) -> Result<(Lane, Lane), NatsError> {
    let Job { replication, dial, .. } = job;
    let name = format!("{} {} subjects", names::PROGRAM, replication.id);
    tokio::try_join!(dial.dial(&replication.source.place, &name), dial.dial(&replication.target.place, &name))
}

/// `None` if a stream or the message is missing: the next run reports that.
async fn read_both(job: &Job, (mut from, mut to): (Lane, Lane), seq: u64) -> Result<Option<SubjectCheck>, NatsError> {
    let Job { replication, .. } = job;
    let source = Api::new(&mut from).stream_info(&replication.source.stream).await?;
    let target = Api::new(&mut to).stream_info(&replication.target.stream).await?;
    let (Some(source), Some(target)) = (source, target) else { return Ok(None) };
    let mut names = locate::question_names(&job.consumers);
    let message = locate::message_at(&mut from, &replication.source.stream, &source, &mut names, seq).await?;
    let Some(message) = message else { return Ok(None) };
    Ok(Some(SubjectCheck { from, to, source, target, subject: message.subject }))
}

async fn mend(job: &Job, seq: u64) -> Result<bool, NatsError> {
    let Job { replication, dial: dials, site, .. } = job;
    let began = Instant::now();
    let Ok(lanes) = timeout(DIAL_WITHIN, dial(job)).await else { return Ok(false) };
    let within = ASK_WITHIN.max(began.elapsed() * DIALS);
    // A stream without a leader does not answer, and the next run asks anyway.
    let Ok(sides) = timeout(within, read_both(job, lanes?, seq)).await else { return Ok(false) };
    let Some(SubjectCheck { mut from, mut to, source, target, subject: original }) = sides? else { return Ok(false) };
    let mut room = Vec::new();
    let subject = replication.mapping.apply(original.as_bytes(), &mut room);
    if listens(&target, subject) {
        return Ok(false);
    }
    let subject = String::from_utf8_lossy(subject).into_owned();
    let stray = format!(
        "no stream takes the message with source sequence {seq} of stream `{}`: it would be stored as `{subject}`, and target \
         stream `{}` listens only on {}",
        replication.source.stream,
        replication.target.stream,
        quoted(&target.subjects())
    );
    if Extent::of(replication, &target, site).is_none() {
        let mut help = "add the subject to the stream, or set `target_update`".to_owned();
        if let Ok(others) = Api::new(&mut to).stream_names(&subject).await
            && !others.is_empty()
        {
            help = format!("it belongs to stream {} there; {help}", quoted(&others));
        }
        return Err(NatsError::hold(format!("{stray}: {help}")));
    }
    let learned = learn::all(&**dials, &mut from, replication, &source, Some(&original)).await?;
    let opened = Opening::new(job, &mut from, &mut to, &source, Some(learned)).open().await;
    let (target, opened) = opened.map_err(|error| error.context(&stray))?;
    if !listens(&target, subject.as_bytes()) {
        return Err(NatsError::hold(format!("{stray}: add the subject to the stream")));
    }
    if let Opened::Updated(what) = opened {
        info!(replication = replication.id, stream = replication.target.stream, what, "target stream updated");
    }
    Ok(true)
}

fn listens(target: &StreamInfo, subject: &[u8]) -> bool {
    target.subjects().iter().any(|pattern| patterns::matches(pattern, subject))
}
