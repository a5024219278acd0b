//! `stream-replicator drift`: how target streams differ from what they would be created with now.

use serde_json::Value;

use super::{
    client::Client,
    error::{CommandVerdict, Error},
    format::counted,
    global::Global,
    output::{self, Colour, Output, Table, clean},
    reply::Reply,
};
use crate::{
    control::api::{DriftClass, DriftField, DriftReport, DriftRequest, DriftRow},
    status::setting_words,
};

/// Compare the stream configurations of both sides
///
/// It shows the settings in which a target stream differs from what it would be created with now. Exit codes: 0 no drift,
/// 1 a drift, or streams that could not be compared, 2 wrong usage.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Replications, or patterns of their ids such as `'S0*'`; all without
    #[arg(value_name = "ID")]
    ids: Vec<String>,

    /// All replications
    #[arg(long, conflicts_with = "ids")]
    all: bool,

    /// Make the safe changes where the document has `target_update`
    #[arg(long)]
    fix: bool,

    /// With --fix, do not ask; required without a terminal
    #[arg(long, visible_alias = "yes", requires = "fix")]
    force: bool,

    /// Show the differences that are meant to be, too
    #[arg(long)]
    expected: bool,

    #[command(flatten)]
    pub(super) global: Global,
}

pub(super) async fn run(args: &Args, out: &mut Output) -> Result<CommandVerdict, Error> {
    if args.ids.is_empty() && args.fix && !args.all {
        return Err(Error::Usage("`drift --fix` needs ids, or `--all`".to_owned()));
    }
    let client = Client::connect(&args.global).await?;
    let mut report = all(&client, &args.ids).await?;
    if args.fix {
        let wanted: Vec<_> = report.value.replications.iter().filter(|row| can_be_fixed(row)).collect();
        let fields: usize = wanted.iter().map(|row| row.fields.iter().filter(|field| is_safe(field)).count()).sum();
        if fields > 0 && !args.force {
            show(&report.value, args.expected, out);
            confirm(fields, wanted.len(), out)?;
        }
        let ids: Vec<_> = wanted.iter().map(|row| row.replication.clone()).collect();
        fix(&client, &ids, &mut report).await?;
    }
    if out.json() {
        out.reply(&report, |_| String::new());
    } else {
        show(&report.value, args.expected, out);
    }
    let is_good = report.value.replications.iter().all(|row| row.drift == Some(0));
    Ok(if is_good { CommandVerdict::Good } else { CommandVerdict::Bad })
}

fn is_safe(field: &DriftField) -> bool {
    field.class == DriftClass::Safe
}

fn can_be_fixed(row: &DriftRow) -> bool {
    row.not_fixed.is_none() && row.fields.iter().any(is_safe)
}

/// What all ids and patterns name, each replication once, as one answer.
async fn all(client: &Client, ids: &[String]) -> Result<Reply<DriftReport>, Error> {
    let mut wanted: Vec<_> = ids.iter().cloned().map(Some).collect();
    if wanted.is_empty() {
        wanted.push(None);
    }
    let mut joined = Value::Null;
    for replication in wanted {
        let mut offset = 0;
        loop {
            let request = DriftRequest { replication: replication.clone(), offset, ..DriftRequest::default() };
            let mut page: Value = client.query::<Value>("drift", &request).await?.value;
            let total = page["total"].as_u64().unwrap_or_default();
            let rows = page["replications"].as_array_mut().map(std::mem::take).unwrap_or_default();
            let more = rows.len();
            if joined.is_null() {
                page["replications"] = Value::Array(Vec::new());
                joined = page;
            }
            if let Some(known) = joined["replications"].as_array_mut() {
                let is_new = |row: &Value| known.iter().all(|known| known["replication"] != row["replication"]);
                let new: Vec<_> = rows.into_iter().filter(is_new).collect();
                known.extend(new);
                let all = known.len();
                (joined["limit"], joined["total"]) = (all.into(), all.into());
            }
            offset += more;
            if more == 0 || offset as u64 >= total {
                break;
            }
        }
    }
    understood(joined)
}

fn understood(raw: Value) -> Result<Reply<DriftReport>, Error> {
    let value = serde_json::from_value(raw.clone());
    let value = value.map_err(|error| Error::Failed(format!("the answer is not understood: {error}")))?;
    Ok(Reply { raw: raw.to_string().into(), value })
}

/// Asks for the changes of one replication after the other, and replaces its row by the answer.
async fn fix(client: &Client, ids: &[String], report: &mut Reply<DriftReport>) -> Result<(), Error> {
    let mut raw: Value = serde_json::from_slice(&report.raw).unwrap_or_default();
    for id in ids {
        let request = DriftRequest { replication: Some(id.clone()), fix: true, ..DriftRequest::default() };
        let mut reply = client.change::<Value>("drift", &request).await?.value;
        let rows = raw["replications"].as_array_mut().into_iter().flatten();
        for row in rows.filter(|row| row["replication"] == id.as_str()) {
            *row = reply["replications"][0].take();
        }
    }
    *report = understood(raw)?;
    Ok(())
}

fn confirm(fields: usize, streams: usize, out: &Output) -> Result<(), Error> {
    if !output::can_ask() {
        return Err(Error::Usage("no terminal to ask on: `drift --fix --force` changes without asking".to_owned()));
    }
    out.note(&format!(
        "{} of {} would be changed",
        counted(fields as u64, "setting"),
        counted(streams as u64, "stream")
    ));
    match output::confirm("change them? [y/N]") {
        Some(true) => Ok(()),
        _ => Err(Error::Failed("nothing was changed".to_owned())),
    }
}

fn show(report: &DriftReport, expected: bool, out: &mut Output) {
    let headers = ["REPLICATION", "TARGET STREAM", "FIELD", "SOURCE", "TARGET", "WANTED", "CLASS", "REASON"];
    let mut table = Table::new(&headers).painted(6);
    let mut shown = 0;
    for row in &report.replications {
        if let Some(error) = &row.error {
            let blank = String::new;
            let cells = vec![
                row.replication.clone(),
                row.target_stream.clone(),
                blank(),
                blank(),
                blank(),
                blank(),
                "unknown".to_owned(),
                error.clone(),
            ];
            table.row(Colour::Red, cells);
            shown += 1;
        }
        for field in row.fields.iter().filter(|field| expected || field.class != DriftClass::Expected) {
            let name = match &field.setting {
                Some(setting) => format!("{} ({setting})", field.field),
                None => field.field.clone(),
            };
            let (colour, class) = class(field);
            let cells = vec![
                row.replication.clone(),
                row.target_stream.clone(),
                name,
                value(field, &field.source),
                value(field, &field.target),
                value(field, &field.wanted),
                class.to_owned(),
                reason(row, field),
            ];
            table.row(colour, cells);
            shown += 1;
        }
    }
    if shown > 0 {
        out.table(&table);
    }
    let count = |wanted: fn(&DriftRow) -> bool| report.replications.iter().filter(|row| wanted(row)).count() as u64;
    let (drift, unknown) = (count(|row| row.drift.is_some_and(|drift| drift > 0)), count(|row| row.drift.is_none()));
    let mut words =
        format!("{} compared: {drift} with a drift", counted(count(|row| row.drift.is_some()), "replication"));
    if unknown > 0 {
        words.push_str(&format!(", {unknown} not compared"));
    }
    out.line(&words);
}

fn class(field: &DriftField) -> (Colour, &'static str) {
    match field.class {
        DriftClass::Safe if field.fixed => (Colour::Plain, "fixed"),
        DriftClass::Safe => (Colour::Yellow, "safe"),
        DriftClass::Unsafe => (Colour::Red, "unsafe"),
        DriftClass::Expected => (Colour::Plain, "expected"),
    }
}

fn reason(row: &DriftRow, field: &DriftField) -> String {
    let also = match (&field.failed, &row.not_fixed) {
        (Some(failed), _) => format!("; not changed: {failed}"),
        (None, Some(why)) if is_safe(field) => format!("; not changed by --fix: {why}"),
        _ => String::new(),
    };
    clean(&format!("{}{also}", field.reason))
}

fn value(field: &DriftField, value: &Value) -> String {
    clean(&setting_words(&field.field, value))
}
