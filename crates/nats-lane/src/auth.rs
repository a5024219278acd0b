//! From an [`Auth`] to the fields of CONNECT. Files are read at every connection attempt, so that rotated
//! credentials are picked up.

use std::{borrow::Cow, fs, path::Path};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use nkeys::KeyPair;
use serde::{Deserialize, Serialize};

use super::{Error, choria};
use crate::{
    chance,
    config::{Auth, Connection},
};

/// The identity fields of CONNECT. Without `Debug`: they are secrets on their way to the wire.
#[derive(Default, Serialize)]
pub(super) struct Identity {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) user: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) pass: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) auth_token: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) jwt: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) nkey: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) sig: Option<String>,
}

/// Builds the identity for a server that sent `nonce`.
pub(super) fn identity(auth: &Auth, nonce: Option<&str>) -> Result<Identity, Error> {
    let mut identity = Identity::default();
    match auth {
        Auth::Anonymous => {}
        Auth::UserPassword { user, password } => {
            identity.user = Some(user.clone());
            identity.pass = Some(password.reveal().to_owned());
        }
        Auth::Token(token) => identity.auth_token = Some(token.reveal().to_owned()),
        Auth::CredentialsFile(path) => {
            let text = read(path)?;
            let jwt = section(&text, "NATS USER JWT")
                .ok_or_else(|| Error::hold(format!("credentials file `{}` holds no user JWT", path.display())))?;
            let seed = section(&text, "USER NKEY SEED")
                .ok_or_else(|| Error::hold(format!("credentials file `{}` holds no nkey seed", path.display())))?;
            identity.sig = sign(&in_file(path), seed, nonce)?.1;
            identity.jwt = Some(jwt.to_owned());
        }
        Auth::NkeyFile { seed, jwt } => {
            let (public, sig) = sign(&in_file(seed), read(seed)?.trim(), nonce)?;
            identity.sig = sig;
            match jwt {
                Some(path) => identity.jwt = Some(read(path)?.trim().to_owned()),
                None => identity.nkey = Some(public),
            }
        }
        Auth::Jwt { jwt, seed } => {
            identity.jwt = Some(jwt.reveal().to_owned());
            if let Some(seed) = seed {
                identity.sig = sign("the user seed of the context", seed.reveal(), nonce)?.1;
            }
        }
        Auth::Choria(choria) => {
            let token = choria::Token::read(choria)?;
            token.check_time(choria, chance::now().timestamp())?;
            identity.sig = choria::sign(choria, nonce)?;
            (identity.auth_token, identity.jwt) = (Some(token.text.clone()), Some(token.text));
        }
    }
    Ok(identity)
}

/// When the login that the files say now ends, in seconds since the Unix epoch; `None` for one without an end.
pub(super) fn expires(auth: &Auth) -> Option<i64> {
    match auth {
        Auth::CredentialsFile(path) => jwt_expires(section(&read(path).ok()?, "NATS USER JWT")?),
        Auth::NkeyFile { jwt: Some(path), .. } => jwt_expires(read(path).ok()?.trim()),
        Auth::Jwt { jwt, .. } => jwt_expires(jwt.reveal()),
        Auth::Choria(files) => jwt_expires(read(&files.jwt).ok()?.trim()),
        Auth::Anonymous | Auth::UserPassword { .. } | Auth::Token(_) | Auth::NkeyFile { jwt: None, .. } => None,
    }
}

/// The claim `exp` of a JWT; `None` where there is none, or 0, which means no end.
pub(super) fn jwt_expires(jwt: &str) -> Option<i64> {
    #[derive(Deserialize)]
    struct Claims {
        exp: Option<f64>,
    }
    let claims = URL_SAFE_NO_PAD.decode(jwt.split('.').nth(1)?.trim_end_matches('=')).ok()?;
    let claims: Claims = serde_json::from_slice(&claims).ok()?;
    claims.exp.map(|exp| exp as i64).filter(|exp| *exp > 0)
}

/// What the subjects of replies begin with: for an identity of Choria's what its token says now.
pub(super) fn inbox_prefix(connection: &Connection) -> Result<Cow<'_, str>, Error> {
    match &connection.endpoint.auth {
        Auth::Choria(choria) => Ok(choria::Token::read(choria)?.inbox_prefix(&choria.collective).into()),
        _ => Ok(connection.inbox_prefix.as_str().into()),
    }
}

fn in_file(path: &Path) -> String {
    format!("`{}`", path.display())
}

pub(super) fn read(path: &Path) -> Result<String, Error> {
    fs::read_to_string(path).map_err(|error| Error::hold(format!("cannot read `{}`: {error}", path.display())))
}

/// The text between `-----BEGIN <name>-----` and the dashes of its end line.
fn section<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let begin = format!("BEGIN {name}");
    let after = &text[text.find(&begin)? + begin.len()..];
    let body = after.trim_start_matches('-');
    let body = body.split_once("-----").map_or(body, |(body, _)| body).trim();
    (!body.is_empty()).then_some(body)
}

/// Public key of the seed and, for a server that asks, the signature of its nonce. `place` is where the seed is from.
fn sign(place: &str, seed: &str, nonce: Option<&str>) -> Result<(String, Option<String>), Error> {
    // The library's message may quote the seed: it is not passed on.
    let pair = KeyPair::from_seed(seed.trim()).map_err(|_| Error::hold(format!("{place} holds no valid nkey seed")))?;
    let sig = match nonce {
        Some(nonce) => {
            let sig =
                pair.sign(nonce.as_bytes()).map_err(|_| Error::hold(format!("the seed in {place} cannot sign")))?;
            Some(URL_SAFE_NO_PAD.encode(sig))
        }
        None => None,
    };
    Ok((pair.public_key(), sig))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CREDS: &str = "-----BEGIN NATS USER JWT-----\neyJ0eXAi.abc-_.def\n------END NATS USER JWT------\n\n\
        ************************* IMPORTANT *************************\nkeep it\n\n\
        -----BEGIN USER NKEY SEED-----\nSUAXYZ\n------END USER NKEY SEED------\n";

    #[test]
    fn sections_of_a_credentials_file() {
        assert_eq!(section(CREDS, "NATS USER JWT"), Some("eyJ0eXAi.abc-_.def"));
        assert_eq!(section(CREDS, "USER NKEY SEED"), Some("SUAXYZ"));
        assert_eq!(section(CREDS, "OTHER"), None);
        assert_eq!(section("-----BEGIN NATS USER JWT-----\n", "NATS USER JWT"), None);
    }

    #[test]
    fn the_end_of_a_login_is_the_claim_of_its_jwt() {
        let jwt = |claims: &str| format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(claims));
        assert_eq!(jwt_expires(&jwt(r#"{"exp":1800000000}"#)), Some(1_800_000_000));
        for endless in [r#"{"exp":0}"#, "{}", "no json"] {
            assert_eq!(jwt_expires(&jwt(endless)), None, "{endless}");
        }
        assert_eq!(jwt_expires("no jwt"), None);
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("user.creds");
        let auth = Auth::CredentialsFile(file.clone());
        assert_eq!(expires(&auth), None);
        fs::write(&file, CREDS.replace("eyJ0eXAi.abc-_.def", &jwt(r#"{"exp":7}"#))).unwrap();
        assert_eq!(expires(&auth), Some(7));
    }

    #[test]
    fn a_bad_seed_is_named_by_its_file_and_not_shown() {
        let error = sign("`/x/seed`", "SUASECRET", Some("n")).unwrap_err();
        assert!(error.message.contains("/x/seed") && !error.message.contains("SUASECRET"), "{error}");
    }
}
