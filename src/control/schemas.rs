//! The JSON schemas of requests, replies and events, generated from the types that go over the wire. The folder `schemas/`
//! has them as files.
//!
//! Requests are strict, as the service is. Replies and events may get more fields later: readers ignore unknown ones.

use std::collections::BTreeMap;

use schemars::{JsonSchema, Schema, SchemaGenerator, generate::SchemaSettings, transform::RecursiveTransform};
use serde_json::{Map, Value, json};

use super::api::{
    AdapterChanged, AdapterList, AdapterNamed, AdapterShown, AdapterStatus, AdapterStatusRequest, AdapterValidation,
    Changed, ConsumersRequest, DeleteRequest, DriftReport, DriftRequest, ErrorReply, ExportedConsumers, GetRequest,
    HeartbeatsChanged, HeartbeatsShown, ImportRequest, ImportedConsumers, Instances, InstancesRequest, LetterChange,
    LetterList, LetterRequest, LetterShown, LettersChanged, LettersRequest, LinkChanged, LinkList, LinkNamed,
    LinkShown, LinkValidation, List, ListRequest, NamedRequest, PositionMove, PositionRequest, PromoteRequest,
    Promoted, ReportRequest, SchemaRequest, SchemaShown, SendersPage, SendersRequest, SkipRequest, Skipped, Status,
    StatusRequest, SteppedDown, StoredDocument, StreamReport, Validation, VerifyRequest, VerifyShown, VerifyStarted,
};
use crate::{config, events::Notice, sampling::AgeAdvisory};

/// The dialect of all schemas.
const DIALECT: &str = "https://json-schema.org/draft/2020-12/schema";
/// Id of the schema of replication documents, `schemas/replication.json`.
const REPLICATION: &str = "urn:stream-replicator:replication:1";

/// Every file of `schemas/` but `replication.json`, which is written by hand: path and content.
pub fn files() -> BTreeMap<String, Value> {
    let mut files = BTreeMap::new();
    for (endpoint, request, reply) in endpoints() {
        for (direction, schema) in [("request", request), ("reply", reply)] {
            let name = format!("{endpoint}.{direction}");
            files.insert(format!("{name}.json"), file(&name, &format!("{endpoint} {direction}"), schema));
        }
    }
    files.insert("error.json".to_owned(), file("error", "error reply", reply::<ErrorReply>()));
    let advisory = reply::<AgeAdvisory>();
    files.insert("age_advisory.json".to_owned(), file("age_advisory", "advisory about a sender", advisory));
    for (kind, schema) in events() {
        files.insert(format!("event/{kind}.json"), file(&format!("event.{kind}"), &format!("event {kind}"), schema));
    }
    files
}

/// Name, request and reply of every endpoint.
fn endpoints() -> Vec<(&'static str, Value, Value)> {
    vec![
        ("config.add", document("The document to add."), reply::<Changed>()),
        ("config.update", document("The document that replaces the stored one as a whole."), reply::<Changed>()),
        (
            "config.validate",
            document("The document to check; everything that does not follow the schema is reported in `problems`."),
            reply::<Validation>(),
        ),
        ("config.delete", request::<DeleteRequest>(), reply::<Changed>()),
        ("config.get", request::<GetRequest>(), config_get_reply()),
        ("config.list", request::<ListRequest>(), reply::<List>()),
        ("config.schema", json!({"description": "Empty; the payload is ignored."}), config_schema_reply()),
        ("status", request::<StatusRequest>(), reply::<Status>()),
        ("report", request::<ReportRequest>(), reply::<StreamReport>()),
        ("drift", request::<DriftRequest>(), reply::<DriftReport>()),
        ("consumers.export", request::<ConsumersRequest>(), reply::<ExportedConsumers>()),
        ("consumers.import", import_request(), reply::<ImportedConsumers>()),
        ("dlq.list", request::<LettersRequest>(), reply::<LetterList>()),
        ("dlq.show", request::<LetterRequest>(), reply::<LetterShown>()),
        ("dlq.replay", letter_change(), reply::<LettersChanged>()),
        ("dlq.drop", letter_change(), reply::<LettersChanged>()),
        ("verify", request::<VerifyRequest>(), reply::<VerifyStarted>()),
        ("verify.status", request::<NamedRequest>(), reply::<VerifyShown>()),
        ("verify.cancel", request::<NamedRequest>(), reply::<Changed>()),
        ("pause", request::<NamedRequest>(), reply::<Changed>()),
        ("resume", request::<NamedRequest>(), reply::<Changed>()),
        ("position", position_request(), reply::<PositionMove>()),
        ("promote", request::<PromoteRequest>(), reply::<Promoted>()),
        ("retry", request::<NamedRequest>(), reply::<Changed>()),
        ("skip", request::<SkipRequest>(), reply::<Skipped>()),
        ("stepdown", request::<NamedRequest>(), reply::<SteppedDown>()),
        ("senders", request::<SendersRequest>(), reply::<SendersPage>()),
        ("instances", request::<InstancesRequest>(), reply::<Instances>()),
        ("schema", request::<SchemaRequest>(), reply::<SchemaShown>()),
        ("adapter.add", adapter_document("The adapter to add."), reply::<AdapterChanged>()),
        (
            "adapter.update",
            adapter_document("The document that replaces the stored one as a whole."),
            reply::<AdapterChanged>(),
        ),
        ("adapter.validate", adapter_document("The document to check."), reply::<AdapterValidation>()),
        ("adapter.get", request::<AdapterNamed>(), reply::<AdapterShown>()),
        ("adapter.list", request::<ListRequest>(), reply::<AdapterList>()),
        ("adapter.delete", request::<AdapterNamed>(), reply::<AdapterChanged>()),
        ("adapter.status", request::<AdapterStatusRequest>(), reply::<AdapterStatus>()),
        ("adapter.pause", request::<AdapterNamed>(), reply::<AdapterChanged>()),
        ("adapter.resume", request::<AdapterNamed>(), reply::<AdapterChanged>()),
        ("link.add", link_document("The link to add."), reply::<LinkChanged>()),
        ("link.update", link_document("The document that replaces the stored one as a whole."), reply::<LinkChanged>()),
        ("link.validate", link_document("The document to check."), reply::<LinkValidation>()),
        ("link.get", request::<LinkNamed>(), reply::<LinkShown>()),
        ("link.list", request::<ListRequest>(), reply::<LinkList>()),
        ("link.delete", request::<LinkNamed>(), reply::<LinkChanged>()),
        ("heartbeat.get", json!({"description": "Empty; the payload is ignored."}), reply::<HeartbeatsShown>()),
        ("heartbeat.set", config::heartbeats_schema().clone(), reply::<HeartbeatsChanged>()),
    ]
}

fn request<T: JsonSchema>() -> Value {
    generate::<T>(SchemaSettings::draft2020_12().for_deserialize())
}

/// Replies and events always have all fields: defaults would have no meaning.
fn reply<T: JsonSchema>() -> Value {
    let without_defaults = RecursiveTransform(|schema: &mut Schema| {
        schema.remove("default");
    });
    generate::<T>(SchemaSettings::draft2020_12().for_serialize().with_transform(without_defaults))
}

fn generate<T: JsonSchema>(settings: SchemaSettings) -> Value {
    SchemaGenerator::new(settings).into_root_schema_for::<T>().to_value()
}

fn document(description: &str) -> Value {
    json!({
        "description": format!("{description} `***` instead of a secret keeps the stored secret."),
        "$ref": REPLICATION,
    })
}

fn adapter_document(description: &str) -> Value {
    let description = format!("{description} `***` instead of a secret keeps the stored secret.");
    with(config::adapter_schema().clone(), [("description", description.into())])
}

fn link_document(description: &str) -> Value {
    let description = format!("{description} `***` instead of a secret keeps the stored secret.");
    with(config::link_schema().clone(), [("description", description.into())])
}

fn position_request() -> Value {
    let either = json!([{"required": ["source_seq"]}, {"required": ["time"]}, {"required": ["ago"]}]);
    with(request::<PositionRequest>(), [("anyOf", either)])
}

fn import_request() -> Value {
    let mut schema = request::<ImportRequest>();
    schema["properties"]["consumers"]["minItems"] = 1.into();
    schema["properties"]["consumers"]["maxItems"] = 500.into();
    schema
}

fn letter_change() -> Value {
    let mut schema = request::<LetterChange>();
    schema["properties"]["letters"]["minItems"] = 1.into();
    schema["properties"]["letters"]["maxItems"] = 100.into();
    schema
}

/// What is shown without problems is a document.
fn config_get_reply() -> Value {
    with(
        reply::<StoredDocument>(),
        [
            ("if", json!({"not": {"required": ["problems"]}})),
            ("then", json!({"properties": {"config": {"$ref": REPLICATION}}})),
        ],
    )
}

fn config_schema_reply() -> Value {
    json!({
        "description": "The JSON schema of a replication document, with titles, descriptions, defaults and examples.",
        "$ref": DIALECT,
        "type": "object",
        "required": ["$schema", "$id", "title", "properties"],
    })
}

/// One schema for each kind of event: what is the same in all of them, and what the kind says besides.
fn events() -> BTreeMap<String, Value> {
    let mut notice = reply::<Notice>();
    let definitions = notice["$defs"].take();
    let kinds = notice["oneOf"].take();
    let mut common = notice.as_object().cloned().unwrap_or_default();
    common.retain(|_, value| !value.is_null());
    let schemas = kinds.as_array().into_iter().flatten().map(|kind| {
        let name = kind["properties"]["kind"]["const"].as_str().unwrap_or_default().to_owned();
        let mut schema = common.clone();
        schema.insert("description".to_owned(), kind["description"].clone());
        if let (Some(all), Some(own)) = (schema["properties"].as_object_mut(), kind["properties"].as_object()) {
            all.extend(own.clone());
        }
        if let (Some(all), Some(own)) = (schema["required"].as_array_mut(), kind["required"].as_array()) {
            all.splice(0..0, own.clone());
        }
        let used = used_definitions(&schema, &definitions);
        if !used.is_empty() {
            schema.insert("$defs".to_owned(), used.into());
        }
        (name, schema.into())
    });
    schemas.collect()
}

/// Those definitions that a schema refers to; none of ours refers to another one.
fn used_definitions(schema: &Map<String, Value>, definitions: &Value) -> Map<String, Value> {
    let text = Value::from(schema.clone()).to_string();
    let used = definitions.as_object().into_iter().flatten();
    let used = used.filter(|(name, _)| text.contains(&format!("\"#/$defs/{name}\"")));
    used.map(|(name, definition)| (name.clone(), definition.clone())).collect()
}

fn file(id: &str, title: &str, schema: Value) -> Value {
    let id = format!("urn:stream-replicator:{id}:1");
    with(schema, [("$schema", DIALECT.into()), ("$id", id.into()), ("title", title.into())])
}

fn with<const N: usize>(mut schema: Value, keywords: [(&str, Value); N]) -> Value {
    for (keyword, value) in keywords {
        schema[keyword] = value;
    }
    schema
}
