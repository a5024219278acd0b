//! Identities that this crate does not know by itself.

use std::{any::Any, fmt, ops::Deref, path::Path, sync::Arc};

use serde::Serialize;

use crate::Error;

/// The fields of CONNECT that say who connects. Without `Debug`: they are secrets on their way to the wire.
#[derive(Default, Serialize)]
pub struct ConnectFields {
    /// User name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Password of the user.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pass: Option<String>,
    /// Bearer token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auth_token: Option<String>,
    /// User JWT.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jwt: Option<String>,
    /// Public nkey.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nkey: Option<String>,
    /// Signature of the server's nonce, base64 (URL-safe, without padding).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sig: Option<String>,
}

/// An identity whose files and rules are the caller's. It is asked again for every connection, so that rotated
/// credentials are picked up. `Debug` must not show secrets.
pub trait Identity: Any + fmt::Debug + Send + Sync {
    /// The fields of CONNECT for a server that sent `nonce`.
    fn connect_fields(&self, nonce: Option<&str>) -> Result<ConnectFields, Error>;

    /// When a login with these credentials ends, in seconds since the Unix epoch; `None` for never.
    fn expires(&self) -> Option<i64> {
        None
    }

    /// What reply subjects begin with, where the identity sets that.
    fn inbox_prefix(&self) -> Result<Option<String>, Error> {
        Ok(None)
    }

    /// Whether it must not be sent in plain text.
    fn requires_tls(&self) -> bool {
        false
    }

    /// The files that it reads, each under the name of the setting that names it.
    fn files(&self) -> Vec<(&'static str, &Path)> {
        Vec::new()
    }

    /// Whether `other` is the same identity; it may be of another type.
    fn is_same(&self, other: &dyn Any) -> bool;
}

/// An [`Identity`] that can be cloned and compared.
#[derive(Debug, Clone)]
pub struct CustomIdentity(Arc<dyn Identity>);

impl CustomIdentity {
    /// Wraps an identity.
    pub fn new(identity: impl Identity) -> Self {
        Self(Arc::new(identity))
    }

    /// The identity itself, if it is of this type.
    pub fn downcast<T: Identity>(&self) -> Option<&T> {
        let identity: &dyn Any = self.0.as_ref();
        identity.downcast_ref()
    }
}

impl Deref for CustomIdentity {
    type Target = dyn Identity;

    fn deref(&self) -> &Self::Target {
        self.0.as_ref()
    }
}

impl PartialEq for CustomIdentity {
    fn eq(&self, other: &Self) -> bool {
        self.0.is_same(other.0.as_ref())
    }
}

impl Eq for CustomIdentity {}
