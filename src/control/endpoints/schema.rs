//! `schema`: the JSON schemas by name; and how the endpoints describe themselves in `$SRV.INFO`.

use std::collections::BTreeMap;

use super::{RequestContext, options};
use crate::{
    config,
    control::{
        api::{Failure, SchemaRequest, SchemaShown},
        schemas,
        service::Request,
    },
};

/// The schema of replication documents is written by hand.
const REPLICATION: &str = "replication";

/// What each endpoint does, for `nats micro info`.
const DESCRIPTIONS: [(&str, &str); 46] = [
    ("config-add", "Adds a replication"),
    ("config-update", "Replaces the document of a replication"),
    ("config-delete", "Deletes a replication; what it copied stays"),
    ("config-validate", "Checks a document, and both clusters for it, without a change"),
    ("config-get", "Shows one document, secrets as ***"),
    ("config-list", "Lists the documents"),
    ("config-schema", "Shows the schema of replication documents"),
    ("status", "Shows state, position, lag and errors of replications"),
    ("report", "Shows the streams of both sides and what feeds them, as nats stream report does"),
    ("drift", "Compares the configurations of both streams, and applies the safe changes"),
    ("instances", "Lists the instances of the group"),
    ("senders", "Lists the senders that a sampled replication knows"),
    ("consumers-export", "Shows durable consumers of the source with their positions at the target"),
    ("consumers-import", "Creates consumers at the target, or moves those that are not used"),
    ("dlq-list", "Lists the dead letters of a replication"),
    ("dlq-show", "Shows one dead letter: the message with headers and payload, and the error"),
    ("dlq-replay", "Stores the messages of dead letters at the target, and removes the letters"),
    ("dlq-drop", "Removes dead letters"),
    ("verify", "Compares both streams of a replication, and copies what is missing if asked"),
    ("verify-status", "Shows the newest comparison of both streams, or how far it is"),
    ("verify-cancel", "Ends a comparison of both streams"),
    ("pause", "Stops a replication and keeps its position"),
    ("resume", "Continues a replication that is paused"),
    ("position", "Moves the position of a replication"),
    ("promote", "Ends a replication and lets others write to its target"),
    ("stepdown", "Hands a replication over to another instance"),
    ("retry", "Tries a held replication again at once"),
    ("skip", "Skips the message that holds a replication"),
    ("schema", "Shows a schema by name, or lists the names"),
    ("adapter-add", "Adds an adapter"),
    ("adapter-update", "Replaces the document of an adapter"),
    ("adapter-validate", "Checks the document of an adapter without a change"),
    ("adapter-get", "Shows the document of an adapter, secrets as ***"),
    ("adapter-list", "Lists the adapters"),
    ("adapter-delete", "Deletes an adapter"),
    ("adapter-status", "Shows queue, counters and connections of adapters"),
    ("adapter-pause", "Stops an adapter"),
    ("adapter-resume", "Continues an adapter that is paused"),
    ("link-add", "Adds a link: servers, logins and defaults for the replications that name it"),
    ("link-update", "Replaces the document of a link"),
    ("link-validate", "Checks the document of a link without a change"),
    ("link-get", "Shows the document of a link, secrets as ***"),
    ("link-list", "Lists the links"),
    ("link-delete", "Deletes a link that no replication names"),
    ("heartbeat-get", "Shows the heartbeats"),
    ("heartbeat-set", "Sets the heartbeats"),
];

/// What `$SRV.INFO` says of an endpoint: its description, and the names under which `schema` has those of its request and
/// reply.
pub(super) fn metadata(endpoint: &str) -> BTreeMap<&'static str, String> {
    let name = endpoint.replace('-', ".");
    let described = DESCRIPTIONS.iter().find(|(known, _)| *known == endpoint).map_or("", |(_, text)| *text);
    BTreeMap::from([
        ("description", described.to_owned()),
        ("request_schema", format!("{name}.request")),
        ("reply_schema", format!("{name}.reply")),
    ])
}

pub(super) async fn schema(_: &RequestContext, request: Request) -> Result<SchemaShown, Failure> {
    let SchemaRequest { name } = options(&request.body)?;
    let mut files = schemas::files();
    let names = || {
        let names = files.keys().filter_map(|path| path.strip_suffix(".json")).map(str::to_owned);
        let mut names: Vec<_> = names.chain([REPLICATION.to_owned()]).collect();
        names.sort();
        names
    };
    let Some(name) = name else { return Ok(SchemaShown { names: names(), schema: None }) };
    let wanted = name.strip_suffix(".json").unwrap_or(&name);
    if wanted == REPLICATION {
        return Ok(SchemaShown { names: vec![name], schema: Some(config::replication_schema().clone()) });
    }
    match files.remove(&format!("{wanted}.json")) {
        Some(schema) => Ok(SchemaShown { names: vec![name], schema: Some(schema) }),
        None => {
            Err(Failure::new(404, format!("schema `{name}` does not exist; without a name this request lists all")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_schema_that_an_endpoint_names_is_there() {
        let files = schemas::files();
        for (endpoint, description) in DESCRIPTIONS {
            let metadata = metadata(endpoint);
            assert_eq!(metadata["description"], description);
            for which in ["request_schema", "reply_schema"] {
                assert!(files.contains_key(&format!("{}.json", metadata[which])), "{endpoint}: {metadata:?}");
            }
        }
        let requests = files.keys().filter(|path| path.ends_with(".request.json")).count();
        assert_eq!(requests, DESCRIPTIONS.len(), "an endpoint has no description");
    }
}
