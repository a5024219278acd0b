//! The wire contract: what requests and replies look like, for the service and for those who ask it.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    config::Problem,
    status::{Row, State},
};

/// Names one replication; a request may also be the plain id.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NamedRequest {
    /// Replication id.
    pub replication: String,
}

/// `config.delete`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeleteRequest {
    /// Replication id.
    pub replication: String,
    /// Keeps position and state, so that the replication goes on where it was when it is added again.
    #[serde(default)]
    pub keep: bool,
}

/// `status`; empty for all.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StatusRequest {
    /// Replication id, for one alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replication: Option<String>,
    /// How many rows to leave out at the beginning.
    pub offset: usize,
    /// How many rows to show at most; as many as one message holds by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
}

/// `config.list`; empty for all.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ListRequest {
    /// How many rows to leave out at the beginning.
    pub offset: usize,
    /// How many rows to show at most; as many as one message holds by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
}

/// A change was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changed {
    /// Replication id.
    pub replication: String,
    /// Revision of the document; of its deletion after a delete.
    pub revision: u64,
}

/// Reply of `config.get`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Document {
    /// Replication id.
    pub replication: String,
    /// Revision of the document.
    pub revision: u64,
    /// The document, secrets as `***`; `null` if what is stored is no JSON.
    pub config: Value,
    /// What is wrong with it, if somebody wrote it past the service.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<Problem>,
}

/// Reply of `config.list`. There are more rows if `offset` and those shown are less than `total`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct List {
    /// Sorted by id.
    pub replications: Vec<ListRow>,
    /// Rows left out at the beginning.
    pub offset: usize,
    /// Rows shown at most.
    pub limit: usize,
    /// Rows there are.
    pub total: usize,
}

/// One document.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ListRow {
    /// Replication id.
    pub replication: String,
    /// Revision of the document.
    pub revision: u64,
    /// Where the document lives: `kv`.
    pub origin: String,
    /// What the replication does; `null` in the moment before it is known.
    pub state: Option<State>,
}

/// Reply of `status`. There are more rows if `offset` and those shown are less than `total`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The site's name.
    pub site: String,
    /// Sorted by id.
    pub replications: Vec<Row>,
    /// Rows left out at the beginning.
    pub offset: usize,
    /// Rows shown at most.
    pub limit: usize,
    /// Rows there are.
    pub total: usize,
}

/// Body of an error reply.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorReply {
    /// What went wrong.
    pub error: Failure,
}

/// What went wrong with a request; code and description are also in the headers `Nats-Service-Error-Code` and
/// `Nats-Service-Error`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{description} ({code})")]
pub struct Failure {
    /// 400 the request is wrong, 404 no such replication, 408 past its deadline, 409 not what is there, 500 a bug,
    /// 503 cannot be done now, 504 not done in time: it may still happen.
    pub code: u16,
    /// One line for people.
    pub description: String,
    /// Everything that is wrong with a document.
    #[serde(default)]
    pub problems: Vec<Problem>,
}

impl Failure {
    /// A failure without a list of problems.
    pub fn new(code: u16, description: impl Into<String>) -> Self {
        Self { code, description: description.into(), problems: Vec::new() }
    }
}
