//! From an [`Auth`] to the fields of CONNECT. Files are read at every connection attempt, so that rotated
//! credentials are picked up.

use std::{borrow::Cow, fs, path::Path};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use nkeys::KeyPair;
use serde::Deserialize;

use crate::{Auth, ConnectFields, Connection, Error};

/// The fields of CONNECT for a server that sent `nonce`.
pub fn connect_fields(auth: &Auth, nonce: Option<&str>) -> Result<ConnectFields, Error> {
    let mut fields = ConnectFields::default();
    match auth {
        Auth::Anonymous => {}
        Auth::UserPassword { user, password } => {
            fields.user = Some(user.clone());
            fields.pass = Some(password.reveal().to_owned());
        }
        Auth::Token(token) => fields.auth_token = Some(token.reveal().to_owned()),
        Auth::CredentialsFile(path) => {
            let text = read_file(path)?;
            let jwt = section(&text, "NATS USER JWT")
                .ok_or_else(|| Error::hold(format!("credentials file `{}` holds no user JWT", path.display())))?;
            let seed = section(&text, "USER NKEY SEED")
                .ok_or_else(|| Error::hold(format!("credentials file `{}` holds no nkey seed", path.display())))?;
            fields.sig = sign(&in_file(path), seed, nonce)?.1;
            fields.jwt = Some(jwt.to_owned());
        }
        Auth::NkeyFile { seed, jwt } => {
            let (public, sig) = sign(&in_file(seed), read_file(seed)?.trim(), nonce)?;
            fields.sig = sig;
            match jwt {
                Some(path) => fields.jwt = Some(read_file(path)?.trim().to_owned()),
                None => fields.nkey = Some(public),
            }
        }
        Auth::Jwt { jwt, seed } => {
            fields.jwt = Some(jwt.reveal().to_owned());
            if let Some(seed) = seed {
                fields.sig = sign("the user seed of the context", seed.reveal(), nonce)?.1;
            }
        }
        Auth::Custom(identity) => return identity.connect_fields(nonce),
    }
    Ok(fields)
}

/// When the login that the files say now ends, in seconds since the Unix epoch; `None` for one without an end.
pub fn login_expires(auth: &Auth) -> Option<i64> {
    match auth {
        Auth::CredentialsFile(path) => jwt_expires(section(&read_file(path).ok()?, "NATS USER JWT")?),
        Auth::NkeyFile { jwt: Some(path), .. } => jwt_expires(read_file(path).ok()?.trim()),
        Auth::Jwt { jwt, .. } => jwt_expires(jwt.reveal()),
        Auth::Custom(identity) => identity.expires(),
        Auth::Anonymous | Auth::UserPassword { .. } | Auth::Token(_) | Auth::NkeyFile { jwt: None, .. } => None,
    }
}

/// The claim `exp` of a JWT; `None` where there is none, or 0, which means no end.
pub fn jwt_expires(jwt: &str) -> Option<i64> {
    #[derive(Deserialize)]
    struct Expiry {
        exp: Option<f64>,
    }
    let claims = URL_SAFE_NO_PAD.decode(jwt.split('.').nth(1)?.trim_end_matches('=')).ok()?;
    let claims: Expiry = serde_json::from_slice(&claims).ok()?;
    claims.exp.map(|exp| exp as i64).filter(|exp| *exp > 0)
}

/// What the subjects of replies begin with: what the identity sets, else what the connection says.
pub fn inbox_prefix(connection: &Connection) -> Result<Cow<'_, str>, Error> {
    let by_identity = match &connection.endpoint.auth {
        Auth::Custom(identity) => identity.inbox_prefix()?,
        _ => None,
    };
    Ok(by_identity.map_or(Cow::Borrowed(connection.inbox_prefix.as_str()), Cow::Owned))
}

fn in_file(path: &Path) -> String {
    format!("`{}`", path.display())
}

/// Reads a file of an identity; the error names it.
pub fn read_file(path: &Path) -> Result<String, Error> {
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
        assert_eq!(login_expires(&auth), None);
        fs::write(&file, CREDS.replace("eyJ0eXAi.abc-_.def", &jwt(r#"{"exp":7}"#))).unwrap();
        assert_eq!(login_expires(&auth), Some(7));
    }

    #[test]
    fn a_bad_seed_is_named_by_its_file_and_not_shown() {
        let error = sign("`/x/seed`", "SUASECRET", Some("n")).unwrap_err();
        assert!(error.message.contains("/x/seed") && !error.message.contains("SUASECRET"), "{error}");
    }
}
