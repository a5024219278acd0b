//! Logins that are signed: of an account under an operator, or by an auth callout.

use std::future::Future;

use anyhow::{Context, Result};
use async_nats::Client;
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use chrono::Utc;
use futures_util::StreamExt;
use nkeys::KeyPair;
use serde_json::{Value, json};

use super::site::merged;

/// A JWT as servers read it; `more` are claims beside the usual ones, such as `aud` and `exp`.
pub fn jwt(issuer: &KeyPair, subject: &str, more: Value, nats: Value) -> Result<String> {
    let (id, time) = (nuid::next().to_string(), Utc::now().timestamp());
    let usual = json!({"jti": id, "iat": time, "iss": issuer.public_key(), "sub": subject, "name": "n", "nats": nats});
    let encode = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let header = encode(&json!({"typ": "JWT", "alg": "ed25519-nkey"}));
    let signed = format!("{header}.{}", encode(&merged(usual, more)));
    let signature = URL_SAFE_NO_PAD.encode(issuer.sign(signed.as_bytes())?);
    Ok(format!("{signed}.{signature}"))
}

/// What a JWT claims.
pub fn claims(jwt: &str) -> Result<Value> {
    let claims = jwt.split('.').nth(1).context("a JWT")?;
    Ok(serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims)?)?)
}

/// A user of such an account.
pub struct SignedUser {
    pub jwt: String,
    pub seed: String,
}

impl SignedUser {
    /// Both in one file, as `nsc` writes it.
    pub fn credentials(&self) -> String {
        format!(
            "-----BEGIN NATS USER JWT-----\n{}\n------END NATS USER JWT------\n\n\
             -----BEGIN USER NKEY SEED-----\n{}\n------END USER NKEY SEED------\n",
            self.jwt, self.seed
        )
    }
}

/// An account of an operator, with JetStream; its users are signed by hand.
pub struct SignedAccount {
    account: KeyPair,
    /// For the configuration of a server.
    pub config: String,
}

impl SignedAccount {
    pub fn new() -> Result<Self> {
        let (operator, account, system) = (KeyPair::new_operator(), KeyPair::new_account(), KeyPair::new_account());
        let none = json!({"subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "conn": -1, "leaf": -1});
        let storage = json!({"wildcards": true, "mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1});
        let of = |key: &KeyPair, kind: &str, nats: Value| {
            jwt(&operator, &key.public_key(), json!({}), merged(json!({"type": kind, "version": 2}), nats))
        };
        let (key, sys) = (account.public_key(), system.public_key());
        let config = format!(
            "operator: {}\nsystem_account: {sys}\nresolver: MEMORY\nresolver_preload: {{ {key}: {}, {sys}: {} }}",
            of(&operator, "operator", json!({ "system_account": sys }))?,
            of(&account, "account", json!({ "limits": merged(none.clone(), storage) }))?,
            // The system account may not have JetStream.
            of(&system, "account", json!({ "limits": none }))?
        );
        Ok(Self { account, config })
    }

    /// A user until a time, Unix seconds; `None` for ever.
    pub fn user(&self, until: Option<u64>) -> Result<SignedUser> {
        let user = KeyPair::new_user();
        let ends = until.map_or(json!({}), |until| json!({ "exp": until }));
        let nats = json!({"type": "user", "version": 2, "subs": -1, "data": -1, "payload": -1});
        Ok(SignedUser { jwt: jwt(&self.account, &user.public_key(), ends, nats)?, seed: user.seed()? })
    }

    /// Credentials of a user for ever.
    pub fn credentials(&self) -> Result<String> {
        Ok(self.user(None)?.credentials())
    }
}

/// What an auth callout grants.
#[derive(Default)]
pub struct Granted {
    /// Unix seconds; the server does not announce it to the client.
    pub until: Option<i64>,
    /// `pub` and `sub` of the user's claims.
    pub permissions: Value,
}

/// For the configuration of a server: `auth`, with this password, answers who may log in to account `APP`.
pub fn callout_config(issuer: &KeyPair) -> String {
    format!(
        "accounts {{ AUTH: {{ users: [{{user: auth, password: auth}}] }}, APP: {{ jetstream: enabled }} }}\n\
         authorization {{ auth_callout {{ issuer: {}, auth_users: [auth], account: AUTH }} }}",
        issuer.public_key()
    )
}

/// Answers the server's questions as `auth`, by what `judge` says of `nats` of their claims; until the client is closed.
pub async fn answer_logins<F>(
    client: Client,
    issuer: KeyPair,
    mut judge: impl FnMut(Value) -> F + Send + 'static,
) -> Result<()>
where
    F: Future<Output = Result<Granted, String>> + Send,
{
    let mut requests = client.subscribe("$SYS.REQ.USER.AUTH").await?;
    client.flush().await?;
    tokio::spawn(async move {
        while let Some(request) = requests.next().await {
            let nats = claims(std::str::from_utf8(&request.payload)?)?["nats"].take();
            let user = nats["user_nkey"].as_str().context("user_nkey")?.to_owned();
            let server = nats["server_id"]["id"].as_str().context("server_id")?.to_owned();
            let answer = match judge(nats).await {
                Ok(Granted { until, permissions }) => {
                    let ends = until.map_or(json!({}), |until| json!({ "exp": until }));
                    let user_claims = json!({"type": "user", "version": 2, "subs": -1, "data": -1, "payload": -1});
                    let nats = if permissions.is_null() { user_claims } else { merged(user_claims, permissions) };
                    json!({ "jwt": jwt(&issuer, &user, merged(json!({"aud": "APP"}), ends), nats)? })
                }
                Err(reason) => json!({ "error": reason }),
            };
            let answer = merged(json!({"type": "authorization_response", "version": 2}), answer);
            let answer = jwt(&issuer, &user, json!({ "aud": server }), answer)?;
            client.publish(request.reply.context("reply")?, answer.into()).await?;
        }
        anyhow::Ok(())
    });
    Ok(())
}
