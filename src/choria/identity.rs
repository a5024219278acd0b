//! Choria's identities: a signed token that the server verifies, and the ed25519 seed that it is bound to. Here the
//! token is only read: what the connection has to be like follows from its claims. Both files are read at every
//! attempt to connect.

use std::{
    any::Any,
    path::{Path, PathBuf},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use chrono::DateTime;
use md5::{Digest, Md5};
use nkeys::{KeyPair, KeyPairType};
use serde::Deserialize;

use nats_lane::{
    Auth, ConnectFields, CustomIdentity, Endpoint, Error, Identity, Scheme, Tls,
    auth::{jwt_expires, read_file},
    entropy,
};

/// What Choria calls a client's or server's identity. Connections that carry it are TLS or nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChoriaIdentity {
    /// File that holds the ed25519 seed, 64 hexadecimal digits.
    pub seed: PathBuf,
    /// File that holds the signed token.
    pub jwt: PathBuf,
    /// First token of the subjects that replies come on.
    pub collective: String,
}

impl ChoriaIdentity {
    /// The same servers with this identity. As in Choria, the server's certificate is verified where an authority or a
    /// client certificate is given, and otherwise not.
    pub fn at(self, endpoint: Endpoint) -> Result<Endpoint, String> {
        if endpoint.auth != Auth::Anonymous {
            return Err("the URL has an identity, and `choria` is another one: remove one of them".to_owned());
        }
        if endpoint.scheme == Scheme::Ws {
            return Err("`ws://` is without TLS, and an identity of Choria's needs it: write `wss://`".to_owned());
        }
        let insecure = endpoint.tls.insecure || (endpoint.tls.ca.is_none() && endpoint.tls.cert.is_none());
        let tls = Tls { insecure, ..endpoint.tls };
        Ok(Endpoint { auth: Auth::Custom(CustomIdentity::new(self)), tls, ..endpoint })
    }
}

impl Identity for ChoriaIdentity {
    fn connect_fields(&self, nonce: Option<&str>) -> Result<ConnectFields, Error> {
        let token = SignedToken::read(self)?;
        token.check_time(self, entropy::now().timestamp())?;
        let sig = sign(self, nonce)?;
        Ok(ConnectFields { auth_token: Some(token.text.clone()), jwt: Some(token.text), sig, ..Default::default() })
    }

    fn expires(&self) -> Option<i64> {
        jwt_expires(read_file(&self.jwt).ok()?.trim())
    }

    fn inbox_prefix(&self) -> Result<Option<String>, Error> {
        Ok(Some(SignedToken::read(self)?.inbox_prefix(&self.collective)))
    }

    fn requires_tls(&self) -> bool {
        true
    }

    fn files(&self) -> Vec<(&'static str, &Path)> {
        vec![("seed_file", &self.seed), ("jwt_file", &self.jwt)]
    }

    fn is_same(&self, other: &dyn Any) -> bool {
        other.downcast_ref() == Some(self)
    }
}

/// A token as it lies in its file. Without `Debug`: it is a secret.
struct SignedToken {
    /// The token itself.
    text: String,
    /// Whose it is: the caller of a client, the identity of a server.
    id: String,
    /// Unix seconds, the earlier of its own end and its issuer's; `None` counts as long ago.
    expires: Option<f64>,
}

/// What a token says, not verified.
#[derive(Deserialize)]
#[serde(default)]
#[derive(Default)]
struct TokenClaims {
    purpose: String,
    callerid: String,
    identity: String,
    exp: Option<f64>,
    issexp: Option<f64>,
}

impl SignedToken {
    /// Reads the token and what it claims.
    fn read(files: &ChoriaIdentity) -> Result<Self, Error> {
        let path = files.jwt.display();
        let text = read_file(&files.jwt)?.trim().to_owned();
        // Not the parser's words: they may quote what is no business of a log.
        let claims = claims(&text).ok_or_else(|| Error::hold(format!("`{path}` holds no JWT")))?;
        let (claim, id) = match claims.purpose.as_str() {
            "choria_client_id" => ("callerid", claims.callerid),
            "choria_server" => ("identity", claims.identity),
            _ => {
                let message = "is neither that of a client (`choria_client_id`) nor that of a server (`choria_server`)";
                return Err(Error::hold(format!("the purpose of the token in `{path}` {message}")));
            }
        };
        if id.is_empty() {
            return Err(Error::hold(format!("the token in `{path}` has no `{claim}`")));
        }
        let expires = match (claims.exp, claims.issexp) {
            (Some(own), Some(issuer)) => Some(own.min(issuer)),
            (own, issuer) => own.or(issuer),
        };
        Ok(Self { text, id, expires })
    }

    /// What the server lets such a client subscribe to.
    fn inbox_prefix(&self, collective: &str) -> String {
        let digest = Md5::digest(self.id.as_bytes());
        let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{collective}.reply.{hex}")
    }

    /// Refuses a token that is over at `now`, unix seconds: the server would too, without saying why.
    fn check_time(&self, files: &ChoriaIdentity, now: i64) -> Result<(), Error> {
        let path = files.jwt.display();
        match self.expires {
            Some(expires) if expires > now as f64 => Ok(()),
            Some(expires) => {
                let time = DateTime::from_timestamp(expires as i64, 0).unwrap_or_default();
                Err(Error::hold(format!("the token in `{path}` expired at {}", time.format("%FT%TZ"))))
            }
            None => Err(Error::hold(format!("the token in `{path}` has no end, which counts as expired"))),
        }
    }
}

fn claims(token: &str) -> Option<TokenClaims> {
    let mut parts = token.split('.');
    let (_, claims, _, None) = (parts.next()?, parts.next()?, parts.next()?, parts.next()) else { return None };
    let json = URL_SAFE_NO_PAD.decode(claims.trim_end_matches('=')).ok()?;
    serde_json::from_slice(&json).ok()
}

/// The signature of the server's nonce, where it sent one.
fn sign(files: &ChoriaIdentity, nonce: Option<&str>) -> Result<Option<String>, Error> {
    let Some(nonce) = nonce else { return Ok(None) };
    let place = files.seed.display();
    let wrong = || Error::hold(format!("`{place}` holds no ed25519 seed: 64 hexadecimal digits"));
    let seed = seed(read_file(&files.seed)?.trim()).ok_or_else(wrong)?;
    let pair = KeyPair::new_from_raw(KeyPairType::User, seed).map_err(|_| wrong())?;
    let signature = pair.sign(nonce.as_bytes()).map_err(|_| wrong())?;
    Ok(Some(URL_SAFE_NO_PAD.encode(signature)))
}

fn seed(hex: &str) -> Option<[u8; 32]> {
    let mut seed = [0; 32];
    if hex.len() != 64 || !hex.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    for (index, byte) in seed.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&hex[2 * index..2 * index + 2], 16).ok()?;
    }
    Some(seed)
}

#[cfg(test)]
mod tests {
    use nats_lane::{
        Connection,
        auth::{connect_fields, inbox_prefix},
    };
    use serde_json::{Value, json};

    use super::*;

    const SEED: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";
    const NONCE: &str = "toomanysecrets";
    /// Of `NONCE` by `SEED`, as Choria's own library makes it.
    const SIGNATURE: &str = "PJ5Rj6L-llZQQOE0HTYMb_a4aKzk9NfwPDlJMV3ORO7njWK9ZtTrUV3Kvlh_xiB7GgWoCjl9acooL7AfY5MmDQ";
    const NEVER: i64 = 4_102_444_800;

    fn files(claims: &Value, seed: &str) -> (tempfile::TempDir, ChoriaIdentity) {
        let folder = tempfile::tempdir().unwrap();
        let (jwt, path) = (folder.path().join("jwt"), folder.path().join("seed"));
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let token = format!("{}.{}.c2ln\n", part(&json!({"alg": "EdDSA"})), part(claims));
        std::fs::write(&jwt, token).unwrap();
        std::fs::write(&path, seed).unwrap();
        (folder, ChoriaIdentity { seed: path, jwt, collective: "choria".to_owned() })
    }

    #[test]
    fn connections_carry_token_and_signature_of_the_nonce() {
        let client = json!({"purpose": "choria_client_id", "callerid": "choria=sr.example.net", "exp": NEVER});
        let server = json!({"purpose": "choria_server", "identity": "ginkgo.example.net", "exp": NEVER});
        for (claims, seed, expect) in [
            (client, SEED.to_owned(), "choria.reply.02c204b39fb9fba618388c8ac0877850"),
            (server, format!("{SEED}\n"), "choria.reply.3f7c3a791b0eb10da51dca4cdedb9418"),
        ] {
            let (_folder, files) = files(&claims, &seed);
            let token = std::fs::read_to_string(&files.jwt).unwrap().trim().to_owned();
            let auth = Auth::Custom(CustomIdentity::new(files));
            let sent = connect_fields(&auth, Some(NONCE)).unwrap();
            assert_eq!((sent.auth_token.as_ref(), sent.jwt.as_ref()), (Some(&token), Some(&token)));
            assert_eq!((sent.sig.as_deref(), sent.nkey, sent.user), (Some(SIGNATURE), None, None));
            assert_eq!(connect_fields(&auth, None).unwrap().sig, None);
            let mut connection = Connection::to(Endpoint::parse("h").unwrap());
            connection.endpoint.auth = auth;
            assert_eq!(inbox_prefix(&connection).unwrap(), expect);
        }
    }

    #[test]
    fn unusable_tokens_are_refused_with_file_and_reason() {
        let check = |claims: Value, now: i64, expect: &str| {
            let (_folder, files) = files(&claims, SEED);
            let checked = SignedToken::read(&files).and_then(|token| token.check_time(&files, now));
            match checked {
                Ok(()) => assert_eq!(expect, "", "{claims}"),
                Err(error) => {
                    let named = error.message.contains(&files.jwt.display().to_string());
                    assert!(!expect.is_empty() && named && error.message.contains(expect), "{claims}: {error}");
                }
            }
        };
        let client = |more: Value| {
            let mut claims = json!({"purpose": "choria_client_id", "callerid": "ginkgo"});
            claims.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            claims
        };
        check(client(json!({"exp": 100})), 99, "");
        check(client(json!({"exp": 100.5})), 100, "");
        check(client(json!({"issexp": 100})), 99, "");
        check(client(json!({"exp": 100, "issexp": 50})), 60, "expired at 1970-01-01T00:00:50Z");
        check(client(json!({"exp": 50, "issexp": 100})), 60, "expired at 1970-01-01T00:00:50Z");
        check(client(json!({"exp": 100})), 100, "expired at 1970-01-01T00:01:40Z");
        check(client(json!({})), 0, "no end");
        check(client(json!({"exp": NEVER, "callerid": ""})), 0, "no `callerid`");
        check(json!({"purpose": "choria_server", "callerid": "x", "exp": NEVER}), 0, "no `identity`");
        check(json!({"purpose": "choria_provisioning", "callerid": "x", "exp": NEVER}), 0, "neither");
        check(json!({"callerid": "x", "exp": NEVER}), 0, "neither");
        check(json!([1]), 0, "no JWT");
    }

    #[test]
    fn what_is_no_token_or_no_seed_is_refused_and_not_shown() {
        let (_folder, files) = files(&json!({}), "hunter2");
        let error = sign(&files, Some(NONCE)).unwrap_err();
        assert!(error.message.contains("64 hexadecimal digits") && !error.message.contains("hunter2"), "{error}");
        for text in ["", "hunter2", "a.hunter2.c", "a.b.c.d", "\u{e9}"] {
            std::fs::write(&files.jwt, text).unwrap();
            let error = SignedToken::read(&files).err().unwrap();
            assert!(error.message.contains("no JWT") && !error.message.contains("hunter2"), "{error}");
        }
        for hex in [&SEED[1..], "+0010203", &"\u{e9}".repeat(32)] {
            assert_eq!(seed(hex), None, "{hex}");
        }
    }
}
