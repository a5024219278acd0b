//! `stream-replicator instances`.

use chrono::Utc;

use super::{
    client::Client,
    error::{CommandVerdict, Error},
    format::seconds,
    global::Global,
    output::{Colour, Output, Table},
    reply::Reply,
};
use crate::control::api::Instances;

/// Show the instances and which replications each runs
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    pub(super) global: Global,
}

pub(super) async fn run(args: &Args, out: &mut Output) -> Result<CommandVerdict, Error> {
    let reply: Reply<Instances> = Client::connect(&args.global).await?.pages("instances").await?;
    if out.json() {
        out.reply(&reply, |_| String::new());
        return Ok(CommandVerdict::Good);
    }
    let mut table =
        Table::new(&["INSTANCE", "VERSION", "HOST", "UP", "SILENT", "LEADS", "REPLICATIONS"]).right(&[3, 4, 5]);
    for row in reply.value.instances {
        let up = (Utc::now() - row.started).as_seconds_f64();
        let leads = row.leads.to_string();
        let cells = vec![
            row.instance,
            row.version,
            row.host,
            seconds(up),
            seconds(row.silent_seconds),
            leads,
            beginning(&row.replications, row.leads),
        ];
        table.row(Colour::Plain, cells);
    }
    out.table(&table);
    Ok(CommandVerdict::Good)
}

/// The first ids and how many more there are.
fn beginning(ids: &[String], all: usize) -> String {
    const MOST: usize = 5;
    let shown = ids.len().min(MOST);
    let more = if all > shown { format!(", {} more", all - shown) } else { String::new() };
    format!("{}{more}", ids[..shown].join(", "))
}
