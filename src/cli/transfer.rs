//! `stream-replicator config import` and `config export`: the file of Choria's replicator into the configuration bucket,
//! and the configuration into such a file.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value, json};

use super::{
    apply,
    client::Client,
    document::{link_as_document, site, stored, stored_link},
    error::{CommandVerdict, Error},
    files::FoundFiles,
    global::Global,
    output::{Output, clean},
    reply::Reply,
    select::{all, expand},
    yaml,
};
use crate::{
    app::ReplicatorFile,
    config::{adapter_name, named_link, pretty_document},
    control::api::{AdapterChanged, AdapterList, AdapterNamed, AdapterShown, HeartbeatsChanged, HeartbeatsShown, List},
};

/// Add what a YAML file of Choria's stream-replicator says to the stored configuration
///
/// Its streams become replications, its links stored links, its heartbeats the stored heartbeats, its adapters stored adapters. What is stored under the
/// same id or name is updated, everything else stays. Replications are checked before anything is changed; each change
/// is shown, secrets as `***`.
#[derive(Debug, clap::Args)]
pub(super) struct ImportArgs {
    /// File, such as `/etc/stream-replicator/sr.yaml`
    file: PathBuf,

    /// Only show the changes
    #[arg(long)]
    dry_run: bool,

    /// Warn of keys that are unknown instead of refusing them
    #[arg(long)]
    lenient: bool,

    #[command(flatten)]
    pub(super) global: Global,
}

/// Write the documents into a folder for `config apply`, or print a YAML file that `replicate` and `config import` read
///
/// With `--json` it prints JSON. Secrets are `***`: `config apply` and `config import` keep the stored ones, `replicate` needs
/// them written.
#[derive(Debug, clap::Args)]
pub(super) struct ExportArgs {
    /// Replications, or patterns of their ids such as `'S0*'` [default: all; with heartbeats and adapters where no folder is
    /// named]
    #[arg(value_name = "ID")]
    ids: Vec<String>,

    /// Write a file ID.json for each replication, and one for each link that they name, into this folder, which is made if there is none
    #[arg(long, value_name = "FOLDER")]
    dir: Option<PathBuf>,

    #[command(flatten)]
    pub(super) global: Global,
}

/// Carries out `config import`.
pub(super) async fn import(args: &ImportArgs, out: &mut Output) -> Result<CommandVerdict, Error> {
    let file = ReplicatorFile::read_masked(&args.file, args.lenient).map_err(|problems| {
        problems.iter().for_each(|problem| out.note(problem));
        Error::Usage("the file cannot be imported, nothing was changed".to_owned())
    })?;
    let path = args.file.display();
    for notice in &file.notices {
        out.note(&clean(&format!("{path}:{notice}")));
    }
    let client = Client::connect(&args.global).await?;
    let own = site(&client).await?;
    if own != file.yaml.name {
        let message = format!("`name` is `{}` in the file, and the service is of site `{own}`", file.yaml.name);
        return Err(Error::Failed(message));
    }
    let documents = [("links", file.links()), ("streams", file.streams())];
    let found = documents.into_iter().flat_map(|(list, documents)| {
        let place = |index| clean(&format!("{path}:{}", file.yaml.line(&format!("/{list}/{index}"))));
        let found = documents.into_iter().enumerate();
        found.map(|(index, document)| FoundFiles { place: place(index), document }).collect::<Vec<_>>()
    });
    let verdict = apply::apply_found(client, found.collect(), args.dry_run, out).await?;
    if args.dry_run || verdict == CommandVerdict::Bad {
        return Ok(verdict);
    }
    let client = Client::connect(&args.global).await?;
    if !file.yaml.heartbeats.is_null() {
        let body = file.yaml.heartbeats.to_string().into();
        let changed: Reply<HeartbeatsChanged> = client.change_at("heartbeat.set", body, None).await?;
        if !out.json() {
            out.line(&format!("heartbeats are at revision {}", changed.value.revision));
        }
    }
    import_adapters(&client, &file.yaml.adapters, out).await
}

/// Adds adapters, or updates them. One that is refused is reported, and the others are imported.
async fn import_adapters(client: &Client, adapters: &[Value], out: &mut Output) -> Result<CommandVerdict, Error> {
    let mut verdict = CommandVerdict::Good;
    if adapters.is_empty() {
        return Ok(verdict);
    }
    let stored = stored_adapters(client).await?;
    for document in adapters {
        let is_stored = adapter_name(document).is_some_and(|name| stored.contains(&name));
        let endpoint = if is_stored { "adapter.update" } else { "adapter.add" };
        let changed: Result<Reply<AdapterChanged>, Error> =
            client.change_at(endpoint, document.to_string().into(), None).await;
        match changed {
            Ok(changed) if !out.json() => {
                let AdapterChanged { adapter, revision, .. } = changed.value;
                out.line(&format!("adapter {adapter} is at revision {revision}"));
            }
            Ok(_) => {}
            Err(error) => {
                error.print(out);
                verdict = CommandVerdict::Bad;
            }
        }
    }
    Ok(verdict)
}

/// Names of the adapters in the configuration bucket.
async fn stored_adapters(client: &Client) -> Result<BTreeSet<String>, Error> {
    let list: Reply<AdapterList> = client.pages("adapter.list").await?;
    Ok(list.value.adapters.into_iter().filter(|row| row.origin == "kv").map(|row| row.adapter).collect())
}

/// Carries out `config export`.
pub(super) async fn export(args: &ExportArgs, out: &mut Output) -> Result<CommandVerdict, Error> {
    let client = Client::connect(&args.global).await?;
    if let Some(folder) = &args.dir {
        return export_files(&client, args, folder, out).await;
    }
    let mut file = Map::new();
    file.insert("name".to_owned(), site(&client).await?.into());
    let ids = match &args.ids[..] {
        [] => {
            let shown: Reply<HeartbeatsShown> = client.query("heartbeat.get", &json!({})).await?;
            if !shown.value.config.is_null() {
                file.insert("heartbeats".to_owned(), shown.value.config);
            }
            let mut adapters = Vec::new();
            for adapter in stored_adapters(&client).await? {
                let shown: Reply<AdapterShown> = client.query("adapter.get", &AdapterNamed { adapter }).await?;
                adapters.push(shown.value.config);
            }
            if !adapters.is_empty() {
                file.insert("adapters".to_owned(), adapters.into());
            }
            let list: Reply<List> = client.pages("config.list").await?;
            list.value.replications.into_iter().map(|row| row.replication).collect()
        }
        ids => expand(&client, ids).await?,
    };
    let mut streams = Vec::new();
    for id in ids {
        streams.push(stored(&client, &id).await?.value.config);
    }
    let links = links_of(&client, &streams).await?;
    if !links.is_empty() {
        file.insert("links".to_owned(), links.into_values().collect());
    }
    file.insert("streams".to_owned(), streams.into());
    if out.json() {
        out.value(&Value::Object(file));
    } else {
        out.text(&yaml::write(&Value::Object(file)));
    }
    Ok(CommandVerdict::Good)
}

/// One file for each replication, as `config get` prints it.
async fn export_files(
    client: &Client,
    args: &ExportArgs,
    folder: &Path,
    out: &mut Output,
) -> Result<CommandVerdict, Error> {
    let failed = |path: &Path, error: &io::Error| {
        Error::Failed(format!("cannot write `{}`: {error}", clean(&path.display().to_string())))
    };
    fs::create_dir_all(folder).map_err(|error| failed(folder, &error))?;
    let ids = if args.ids.is_empty() { all(client).await? } else { expand(client, &args.ids).await? };
    let write = |path: &Path, document: &Value| {
        fs::write(path, pretty_document(document) + "\n").map_err(|error| failed(path, &error))
    };
    let mut documents = Vec::new();
    for id in ids {
        let reply = stored(client, &id).await?;
        let path = folder.join(format!("{id}.json"));
        write(&path, &reply.value.config)?;
        out.reply(&reply, |_| clean(&path.display().to_string()));
        documents.push(reply.value.config);
    }
    for (name, link) in links_of(client, &documents).await? {
        // No id has a blank, so this is the name of no replication's file.
        let path = folder.join(format!("link {name}.json"));
        write(&path, &link)?;
        if out.json() {
            out.value(&json!({"link": name, "config": link}));
        } else {
            out.line(&clean(&path.display().to_string()));
        }
    }
    Ok(CommandVerdict::Good)
}

/// The links that documents name, by name. One that does not exist is left to the replication that names it.
async fn links_of(client: &Client, documents: &[Value]) -> Result<BTreeMap<String, Value>, Error> {
    let names: BTreeSet<_> = documents.iter().filter_map(named_link).collect();
    let mut links = BTreeMap::new();
    for name in names {
        match stored_link(client, name).await {
            Ok(reply) => _ = links.insert(name.to_owned(), link_as_document(reply.value).config),
            Err(error) if error.code() == Some(404) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(links)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::choria::ReplicatorYaml;

    #[test]
    fn what_is_exported_reads_as_it_was() {
        let stream = json!({"stream": "S", "name": "no", "source_url": "nats://a", "target_url": "nats://b",
            "filter_subjects": ["a.>", "b.*"], "limits": {"messages_in_flight": 5}, "description": "it's \"x\"\n y: #z",
            "subject_transforms": [{"src": "a.>", "dest": "c.>"}], "start_at_end": true});
        let beats = json!({"url": "nats://a", "headers": {"X-a b": "yes"}, "subjects": [{"subject": "b"}]});
        let file = json!({"name": "A", "streams": [stream, {"stream": "T"}], "heartbeats": beats});
        let text = yaml::write(&file);
        let read = ReplicatorYaml::read(&text, false).unwrap_or_else(|problems| panic!("{text}\n{problems:?}"));
        assert_eq!(Value::Object(read.streams[0].clone()), stream, "{text}");
        assert_eq!((read.name.as_str(), &read.heartbeats, read.streams.len()), ("A", &beats, 2));
        assert_eq!(yaml::write(&json!({"streams": [], "a": {}})), "a: {}\nstreams: []\n");
    }
}
