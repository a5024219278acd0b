//! An identity of Choria's in a document, for replications and for heartbeats.

use nats_lane::server_ref::{looks_like_url, no_url};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    Problem,
    patterns::{Wildcards, wrong_subject},
    schema::shorten,
};
use crate::choria::ChoriaIdentity;

/// Choria's identity: a signed token and the seed that it is bound to. Both files or none are named, and read at every
/// attempt to connect. Without a `tls` the server's certificate is not verified, as in Choria.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[schemars(rename = "Choria")]
pub struct ChoriaDocument {
    /// File of the ed25519 seed, 64 hexadecimal digits.
    #[schemars(length(max = 4096))]
    pub seed_file: String,
    /// File of the token, a JWT.
    #[schemars(length(max = 4096))]
    pub jwt_file: String,
    /// Collective, the first token of the subjects that replies come on. Required with the files.
    #[schemars(length(max = 128))]
    pub collective: String,
}

impl ChoriaDocument {
    /// The identity, if files are named, and what is wrong with it; `field` is where the document has it.
    pub(super) fn identity(&self, field: &str) -> (Option<ChoriaIdentity>, Vec<Problem>) {
        let Self { seed_file, jwt_file, collective } = self;
        let mut problems = Vec::new();
        let missing = match (seed_file.is_empty(), jwt_file.is_empty()) {
            (true, true) => return (None, problems),
            (true, false) => "seed_file",
            (false, true) => "jwt_file",
            (false, false) => "",
        };
        if !missing.is_empty() {
            let message = format!("`{field}` has no `{missing}`: `seed_file` and `jwt_file` go together");
            problems.push(Problem::new(format!("/{field}"), message));
        }
        let wrong = match collective.as_str() {
            "" => Some(format!("`{field}.collective` is required")),
            name if looks_like_url(name) => no_url(name).err().map(|wrong| format!("`{field}.collective`: {wrong}")),
            name => {
                let wrong = wrong_subject(name, Wildcards::Refused);
                wrong.map(|wrong| format!("`{field}.collective` is `{}`: {wrong}", shorten(name)))
            }
        };
        if let Some(wrong) = wrong {
            problems.push(Problem::new(format!("/{field}/collective"), wrong));
        }
        let identity = ChoriaIdentity { seed: seed_file.into(), jwt: jwt_file.into(), collective: collective.clone() };
        (Some(identity), problems)
    }
}
