//! Commands of Choria's replicator in its forms: senders in state files, and the gossip about senders.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use chrono::{DateTime, TimeDelta, Utc};
use clap::{ArgAction, Args as ClapArgs};
use futures_util::StreamExt;
use nats_lane::{Connection, ServerRef, context, parse_duration};
use regex::Regex;
use serde_json::Value;

use super::{
    client::Client,
    error::{CommandVerdict, Error},
    global::Global,
    output::{Output, clean},
};
use crate::choria::{ChoriaIdentity, GOSSIP_PREFIX, TrackedSender, read_state};

/// An identity of Choria's for a command.
#[derive(Debug, Clone, ClapArgs)]
#[command(next_help_heading = "Connection")]
pub(super) struct ChoriaFlags {
    /// File of the seed that `--choria-token` is bound to
    #[arg(long, value_name = "FILE", requires = "choria_token")]
    choria_seed: Option<PathBuf>,

    /// File of a token of Choria's: the connection has this identity, over TLS
    #[arg(long, value_name = "FILE", requires = "choria_seed")]
    choria_token: Option<PathBuf>,

    /// Collective, the first token of the subjects that replies come on
    #[arg(long, value_name = "NAME", default_value = "choria")]
    choria_collective: String,
}

impl ChoriaFlags {
    /// The same servers with this identity, if one is given. An error shows no secret.
    pub(super) fn over(&self, place: ServerRef) -> Result<ServerRef, String> {
        let (Some(seed), Some(jwt)) = (self.choria_seed.clone(), self.choria_token.clone()) else { return Ok(place) };
        let connection = context::resolve(&place).map_err(|error| error.to_string())?;
        let identity = ChoriaIdentity { seed, jwt, collective: self.choria_collective.clone() };
        let endpoint = identity.at(connection.endpoint).map_err(|wrong| format!("`--choria-token`: {wrong}"))?;
        Ok(ServerRef::Known(Box::new(Connection { endpoint, ..connection })))
    }
}

/// Show the senders of the state files of Choria's replicator, or of `replicate` with `state_store`
#[derive(Debug, ClapArgs)]
pub(super) struct StateArgs {
    /// State file, or the folder with all of them
    path: PathBuf,

    /// Only senders seen in this time, such as `1h`
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    since: Option<Duration>,

    /// Also senders that are missing: unseen for `warn_duration`; this is the default
    #[arg(long, action = ArgAction::SetTrue, overrides_with = "no_advised")]
    advised: bool,

    /// No senders that are missing
    #[arg(long, action = ArgAction::SetTrue, overrides_with = "advised")]
    no_advised: bool,

    /// Only senders that match this regular expression
    #[arg(long, value_name = "REGEX", value_parser = Regex::new)]
    value: Option<Regex>,

    /// Names of senders alone, each once
    #[arg(long)]
    values: bool,

    /// Print JSON
    #[arg(long)]
    pub(super) json: bool,
}

/// Show the senders that replicators of mixed groups publish as seen
#[derive(Debug, ClapArgs)]
pub(super) struct GossipArgs {
    #[command(flatten)]
    pub(super) global: Global,

    #[command(flatten)]
    pub(super) choria: ChoriaFlags,
}

/// The JSON files of a folder and of the folders in it, or the file itself.
fn state_files(path: &Path) -> io::Result<Vec<PathBuf>> {
    if !fs::metadata(path)?.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let (mut folders, mut files) = (vec![path.to_owned()], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let entry = entry?;
            let path = entry.path();
            // A link to a folder is not followed: it may lead back.
            if entry.file_type()?.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "json") {
                files.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}

impl StateArgs {
    fn wants(&self, sender: &TrackedSender, now: DateTime<Utc>) -> bool {
        let recent = self.since.is_none_or(|since| (now - sender.seen).to_std().unwrap_or_default() < since);
        let named = self.value.as_ref().is_none_or(|value| value.is_match(&sender.value));
        recent && named && !(self.no_advised && sender.advised)
    }

    fn senders(&self, now: DateTime<Utc>) -> Result<Vec<TrackedSender>, Error> {
        let failed = |path: &Path, error: &dyn std::fmt::Display| Error::Failed(format!("{}: {error}", path.display()));
        let mut senders = Vec::new();
        for path in state_files(&self.path).map_err(|error| failed(&self.path, &error))? {
            let text = fs::read(&path).map_err(|error| failed(&path, &error))?;
            let items = read_state(&text).map_err(|error| failed(&path, &error))?;
            let items = items.into_iter().map(|(value, sender)| TrackedSender { value, ..sender });
            senders.extend(items.filter(|sender| self.wants(sender, now)));
        }
        if self.values {
            senders.sort_by(|one, other| one.value.cmp(&other.value));
            senders.dedup_by(|one, other| one.value == other.value);
        }
        Ok(senders)
    }
}

/// Shows the senders of state files.
pub(super) fn state(args: &StateArgs, out: &mut Output) -> Result<CommandVerdict, Error> {
    let now = Utc::now();
    let senders = args.senders(now)?;
    match (args.values, args.json) {
        (true, json) => {
            let names: Vec<_> = senders.into_iter().map(|sender| sender.value).collect();
            match json {
                true => out.line(&Value::from(names).to_string()),
                false => names.iter().for_each(|name| out.line(&clean(name))),
            }
        }
        (false, true) => out.line(&serde_json::to_string(&senders).unwrap_or_default()),
        (false, false) if senders.is_empty() => out.line("No items matched"),
        (false, false) => senders.iter().for_each(|sender| out.text(&block(sender, now))),
    }
    Ok(CommandVerdict::Good)
}

/// One sender in lines, and an empty line.
fn block(sender: &TrackedSender, now: DateTime<Utc>) -> String {
    let time = |time: Option<DateTime<Utc>>| match time {
        Some(time) => {
            let ago = TimeDelta::seconds(((now - time).as_seconds_f64()).round() as i64);
            format!("{} ({})", time.format("%Y-%m-%d %H:%M:%S%.f +0000 UTC"), go_duration(ago))
        }
        None => "never".to_owned(),
    };
    let TrackedSender { size, advised, value, .. } = sender;
    format!(
        "           Value: {}\n       Seen Time: {}\n     Copied Time: {}\n    Payload Size: {size}\n         Advised: {advised}\n\n",
        clean(value),
        time(sender.seen()),
        time(sender.copied())
    )
}

/// Shows gossip until the output is closed or the connection ends.
pub(super) async fn gossip(args: &GossipArgs, client: &Client, out: &mut Output) -> Result<CommandVerdict, Error> {
    let subscribed = client.nats().subscribe(format!("{GOSSIP_PREFIX}>")).await;
    let mut gossip = subscribed.map_err(|error| Error::Failed(error.to_string()))?;
    while !out.closed() {
        let Some(message) = gossip.next().await else { break };
        if args.global.json {
            out.line(String::from_utf8_lossy(&message.payload).trim());
        } else if let Ok(sender) = serde_json::from_slice::<TrackedSender>(&message.payload) {
            let entry = message.subject.strip_prefix(GOSSIP_PREFIX).unwrap_or(&message.subject).to_owned();
            out.line(&gossip_line(&entry, &sender, Utc::now()));
        }
        out.flush();
    }
    Ok(CommandVerdict::Good)
}

fn gossip_line(entry: &str, sender: &TrackedSender, now: DateTime<Utc>) -> String {
    let copied = sender.copied().map(|copied| TimeDelta::milliseconds((now - copied).num_milliseconds()));
    let copied = copied.map_or_else(|| "never".to_owned(), go_duration);
    let TrackedSender { size, advised, value, .. } = sender;
    format!("[{}] size: {size} advised: {advised}: copied: {copied} {}", clean(entry), clean(value))
}

/// A duration as Go prints it: `0s`, `5.021s`, `11m0s`, `1h0m5s`.
pub(super) fn go_duration(duration: TimeDelta) -> String {
    let ms = duration.num_milliseconds();
    let (sign, ms) = (if ms < 0 { "-" } else { "" }, ms.unsigned_abs());
    if ms > 0 && ms < 1_000 {
        return format!("{sign}{ms}ms");
    }
    let (hours, minutes) = (ms / 3_600_000, ms / 60_000 % 60);
    let seconds = (ms % 60_000) as f64 / 1e3;
    match (hours, minutes) {
        (0, 0) => format!("{sign}{seconds}s"),
        (0, minutes) => format!("{sign}{minutes}m{seconds}s"),
        (hours, minutes) => format!("{sign}{hours}h{minutes}m{seconds}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sender() -> TrackedSender {
        let text =
            r#"{"seen":"2026-11-29T09:48:32.522283932Z","copied":"0001-01-01T00:00:00Z","size":39,"value":"n1"}"#;
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn durations_are_those_of_go() {
        let check = |ms: i64, expect: &str| assert_eq!(go_duration(TimeDelta::milliseconds(ms)), expect);
        check(0, "0s");
        check(4_000, "4s");
        check(5_021, "5.021s");
        check(350, "350ms");
        check(660_000, "11m0s");
        check(3_605_500, "1h0m5.5s");
        check(-1_000, "-1s");
    }

    #[test]
    fn a_sender_is_shown_in_chorias_form() {
        let now = "2026-11-29T09:48:36.6Z".parse().unwrap();
        let expect = "           Value: n1\n       Seen Time: 2026-11-29 09:48:32.522283932 +0000 UTC (4s)\n     \
                      Copied Time: never\n    Payload Size: 39\n         Advised: false\n\n";
        assert_eq!(block(&sender(), now), expect);
        let copied = TrackedSender { copied: "2026-11-29T09:48:31.579Z".parse().unwrap(), size: 19, ..sender() };
        assert_eq!(gossip_line("SAMP.P1", &copied, now), "[SAMP.P1] size: 19 advised: false: copied: 5.021s n1");
    }
}
