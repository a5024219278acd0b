//! `stream-replicator dlq`: dead letters, the messages that the target could not store.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::Value;

use super::{
    client::Client,
    error::{CommandVerdict, Error},
    format::{bytes, count, counted, time},
    global::Global,
    output::{self, Colour, Output, Table, clean},
    reply::Reply,
};
use crate::control::api::{
    LetterChange, LetterDone, LetterList, LetterRefused, LetterRequest, LetterShown, LettersChanged, LettersRequest,
};

/// Dead letters that one request replays or removes.
const AT_ONCE: usize = 50;

/// List, show, replay or remove dead letters: the messages that the target could not store
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    verb: DlqVerb,
}

#[derive(Debug, clap::Subcommand)]
enum DlqVerb {
    /// List the dead letters of a replication
    #[command(visible_alias = "ls")]
    List(DlqListArgs),
    /// Show a dead letter: subject, headers, payload and error
    Show(DlqShowArgs),
    /// Store the messages of dead letters at the target, and remove the letters
    Replay(DlqChangeArgs),
    /// Remove dead letters: nothing else has their messages once the source has removed them
    #[command(visible_alias = "rm")]
    Drop(DlqDropArgs),
}

#[derive(Debug, clap::Args)]
struct DlqListArgs {
    /// Replication
    #[arg(value_name = "ID")]
    id: String,

    #[command(flatten)]
    global: Global,
}

#[derive(Debug, clap::Args)]
struct DlqShowArgs {
    /// Replication
    #[arg(value_name = "ID")]
    id: String,

    /// Its sequence in the stream of dead letters
    #[arg(value_name = "LETTER")]
    letter: u64,

    #[command(flatten)]
    global: Global,
}

#[derive(Debug, clap::Args)]
struct DlqChangeArgs {
    /// Replication
    #[arg(value_name = "ID")]
    id: String,

    /// Their sequences in the stream of dead letters
    #[arg(value_name = "LETTER", required_unless_present = "all")]
    letters: Vec<u64>,

    /// All dead letters of the replication
    #[arg(long, conflicts_with = "letters")]
    all: bool,

    #[command(flatten)]
    global: Global,
}

#[derive(Debug, clap::Args)]
struct DlqDropArgs {
    #[command(flatten)]
    change: DlqChangeArgs,

    /// Do not ask; required without a terminal
    #[arg(long, visible_alias = "yes")]
    force: bool,
}

impl Args {
    pub(super) fn global(&self) -> &Global {
        match &self.verb {
            DlqVerb::List(args) => &args.global,
            DlqVerb::Show(args) => &args.global,
            DlqVerb::Replay(args) => &args.global,
            DlqVerb::Drop(args) => &args.change.global,
        }
    }
}

/// Carries out the command.
pub(super) async fn run(args: &Args, out: &mut Output) -> Result<CommandVerdict, Error> {
    let client = Client::connect(args.global()).await?;
    match &args.verb {
        DlqVerb::List(args) => list(&client, &args.id, out).await,
        DlqVerb::Show(args) => show(&client, args, out).await,
        DlqVerb::Replay(args) => {
            let letters = wanted(&client, args).await?;
            change(&client, "dlq.replay", args, letters, out).await
        }
        DlqVerb::Drop(args) => {
            let letters = wanted(&client, &args.change).await?;
            if !args.force && !letters.is_empty() {
                confirm(&args.change.id, letters.len() as u64, out)?;
            }
            change(&client, "dlq.drop", &args.change, letters, out).await
        }
    }
}

/// All pages, joined into one answer.
async fn all(client: &Client, id: &str) -> Result<Reply<LetterList>, Error> {
    let ask = async |after| {
        let request = LettersRequest { replication: id.to_owned(), after, limit: None };
        client.query::<Value>("dlq.list", &request).await
    };
    let mut joined = ask(0).await?.value;
    while let Some(after) = joined["next"].as_u64() {
        let mut page = ask(after).await?.value;
        if let (Value::Array(rows), Some(more)) = (&mut joined["letters"], page["letters"].as_array_mut()) {
            rows.append(more);
        }
        joined["next"] = page["next"].take();
    }
    let raw = joined.to_string().into();
    let value = serde_json::from_value(joined);
    Ok(Reply { raw, value: value.map_err(|error| Error::Failed(format!("the answer is not understood: {error}")))? })
}

async fn list(client: &Client, id: &str, out: &mut Output) -> Result<CommandVerdict, Error> {
    let reply = all(client, id).await?;
    if out.json() {
        out.reply(&reply, |_| String::new());
        return Ok(CommandVerdict::Good);
    }
    let mut table = Table::new(&["LETTER", "SINCE", "SOURCE SEQ", "SUBJECT", "SIZE", "ERROR"]).right(&[0, 2, 4]);
    for row in &reply.value.letters {
        let cells = vec![
            row.letter.to_string(),
            time(row.at),
            count(row.source_seq),
            row.subject.clone(),
            bytes(row.bytes),
            row.error.clone(),
        ];
        table.row(Colour::Plain, cells);
    }
    out.table(&table);
    Ok(CommandVerdict::Good)
}

async fn show(client: &Client, args: &DlqShowArgs, out: &mut Output) -> Result<CommandVerdict, Error> {
    let request = LetterRequest { replication: args.id.clone(), letter: args.letter };
    let reply: Reply<LetterShown> = client.query("dlq.show", &request).await?;
    out.reply(&reply, shown_words);
    Ok(CommandVerdict::Good)
}

fn shown_words(shown: &LetterShown) -> String {
    let LetterShown { letter, headers, payload, truncated, stream, .. } = shown;
    let mut lines = vec![
        format!("letter   {} of stream {stream}, since {}", letter.letter, time(letter.at)),
        format!("error    {}", letter.error),
        format!("message  {}, stored {}", count(letter.source_seq), time(letter.stored)),
        format!("subject  {}", letter.subject),
        format!("size     {}", bytes(letter.bytes)),
    ];
    lines.extend(headers.iter().map(|header| format!("header   {header}")));
    let mut lines: Vec<_> = lines.iter().map(|line| clean(line)).collect();
    lines.push(String::new());
    // Bytes that are no text stay as they were sent.
    let text = STANDARD.decode(payload).ok().and_then(|bytes| String::from_utf8(bytes).ok());
    match text {
        Some(text) => lines.extend(text.lines().map(clean)),
        None => lines.push(format!("base64: {payload}")),
    }
    if *truncated {
        lines.push("(the rest of the payload is not shown)".to_owned());
    }
    lines.join("\n")
}

async fn wanted(client: &Client, args: &DlqChangeArgs) -> Result<Vec<u64>, Error> {
    if !args.all {
        return Ok(args.letters.clone());
    }
    Ok(all(client, &args.id).await?.value.letters.iter().map(|row| row.letter).collect())
}

fn confirm(id: &str, letters: u64, out: &Output) -> Result<(), Error> {
    if !output::can_ask() {
        return Err(Error::Usage(format!("no terminal to ask on: `dlq drop {id} .. --force` removes without asking")));
    }
    out.note(&format!("{id}: {} of messages that the target does not have", counted(letters, "dead letter")));
    match output::confirm("remove? [y/N]") {
        Some(true) => Ok(()),
        _ => Err(Error::Failed("nothing was removed".to_owned())),
    }
}

/// Asks for parts of the letters, one after the other; the first error ends it, but for letters that are refused alone.
async fn change(
    client: &Client,
    endpoint: &str,
    args: &DlqChangeArgs,
    mut letters: Vec<u64>,
    out: &mut Output,
) -> Result<CommandVerdict, Error> {
    if letters.is_empty() && !out.json() {
        out.line(&format!("{}: no dead letters", clean(&args.id)));
    }
    let mut stay = 0;
    while !letters.is_empty() {
        let part: Vec<u64> = letters.drain(..letters.len().min(AT_ONCE)).collect();
        let request = LetterChange { replication: args.id.clone(), letters: part };
        let reply: Reply<LettersChanged> = client.change(endpoint, &request).await?;
        let LettersChanged { replication, done, refused, left, failed } = &reply.value;
        if out.json() {
            out.reply(&reply, |_| String::new());
        } else {
            for one in done {
                out.line(&clean(&done_words(replication, one)));
            }
            for LetterRefused { letter, reason } in refused {
                out.line(&clean(&format!("{replication}: letter {letter} stays: {reason}")));
            }
        }
        stay += refused.len() as u64;
        if let Some(why) = failed {
            return Err(Error::Failed(clean(&format!("{replication}: {why}"))));
        }
        if done.is_empty() && refused.is_empty() {
            return Err(Error::Failed(clean(&format!("{replication}: no letter was handled in time, try again"))));
        }
        letters.splice(..0, left.iter().copied());
    }
    if stay > 0 {
        return Err(Error::Failed(clean(&format!(
            "{}: {} could not be replayed",
            args.id,
            counted(stay, "dead letter")
        ))));
    }
    Ok(CommandVerdict::Good)
}

fn done_words(id: &str, done: &LetterDone) -> String {
    let LetterDone { letter, target_seq, duplicate } = done;
    match target_seq {
        Some(seq) if *duplicate => format!("{id}: letter {letter} was at the target already, sequence {}", count(*seq)),
        Some(seq) => format!("{id}: letter {letter} is at the target now, sequence {}", count(*seq)),
        None => format!("{id}: letter {letter} is removed"),
    }
}
