//! Configuration, in two types and one direction: a [`Document`] is what people write, a
//! [`Replication`] is what runs and cannot be wrong. [`parse`] goes from one to the other and reports
//! every [`Problem`] at once.

mod adapters;
mod choria_document;
mod document;
mod feed_subjects;
mod file;
mod heartbeats;
mod json;
mod links;
mod loops;
mod mapping;
mod ordered;
pub(crate) mod outline;
pub(crate) mod patterns;
mod problems;
mod replication;
mod schema;
mod scope;
mod secrets;
mod stream_patterns;
mod tls;
mod transform;
mod verification;

pub use adapters::{
    Adapter, AdapterCreateDocument, AdapterDocument, AdapterIngestDocument, AdapterSide, AdapterStreamDocument,
    adapter_name, adapter_schema, parse_adapter, wrong_name as wrong_adapter_name,
};
pub use choria_document::ChoriaDocument;
pub use document::{
    AdvisoryDocument, DeadLetterDocument, Document, LimitsDocument, VerifyDocument, document_id, parse, parse_judged,
    parse_value,
};
pub use feed_subjects::FeedSubjects;
pub use file::{SiteFile, parse_file};
pub use heartbeats::{
    Heartbeat, HeartbeatDocument, Heartbeats, HeartbeatsDocument, heartbeats_schema, parse_heartbeats,
};
pub use json::{Json, MAX_DOCUMENT, why_not_json};
pub use links::{LinkUse, Links, UsableLink, link_name, link_schema, named_link, parse_link, resolve, wrong_link_name};
pub use loops::{LoopProtection, OriginTag};
pub use mapping::Mapping;
pub use ordered::{compact_document, pretty_document};
pub use problems::{Problem, Problems};
pub(crate) use problems::{one_line, shorten};
pub use replication::{
    AdvisorySettings, Former, Inspect, Limits, NativeFeed, NativeKind, OnReject, OnSourceLoss, Replication, Sampling,
    SenderBounds, Sharing, Side, Start,
};
pub use schema::{field_type, replication_schema};
pub use scope::Scope;
pub use secrets::{
    URLS, has_adapter_mask, has_heartbeats_mask, has_mask, mask_adapter, mask_document, mask_heartbeats, mask_link,
    unmask_adapter, unmask_document, unmask_heartbeats, unmask_link,
};
pub use stream_patterns::{StreamPatterns, member_document, member_id};
pub use tls::TlsDocument;
pub use transform::{Transform, TransformDocument, Wrong as WrongTransform};
pub use verification::{SamplePart, VerifyEffort, VerifyRange, VerifySchedule};
