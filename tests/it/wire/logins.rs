//! Logins that end while a copy runs.

use std::time::Duration;

use anyhow::{Context, Result};
use async_nats::ConnectOptions;
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use chrono::Utc;
use futures_util::StreamExt;
use nkeys::KeyPair;
use serde_json::{Value, json};

use crate::harness::{Expect, Role, SITE, Server, Site};

/// How long a login of the copy lasts.
const LASTS: i64 = 5;

/// A JWT as servers read it.
fn jwt(issuer: &KeyPair, subject: &str, audience: &str, expires: Option<i64>, claims: Value) -> Result<String> {
    let (id, time) = (nuid::next().to_string(), Utc::now().timestamp());
    let mut body =
        json!({"jti": id, "iat": time, "iss": issuer.public_key(), "sub": subject, "aud": audience, "nats": claims});
    if let Some(expires) = expires {
        body["exp"] = expires.into();
    }
    let encode = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let signed = format!("{}.{}", encode(&json!({"typ": "JWT", "alg": "ed25519-nkey"})), encode(&body));
    let signature = URL_SAFE_NO_PAD.encode(issuer.sign(signed.as_bytes())?);
    Ok(format!("{signed}.{signature}"))
}

/// Lets every client in; the first connections of the copy only for a time that the server does not announce.
async fn let_in(client: async_nats::Client, issuer: KeyPair) -> Result<()> {
    let mut requests = client.subscribe("$SYS.REQ.USER.AUTH").await?;
    client.flush().await?;
    tokio::spawn(async move {
        let mut first: Option<i64> = None;
        while let Some(request) = requests.next().await {
            let claims = request.payload.split(|byte| *byte == b'.').nth(1).context("a JWT")?;
            let claims: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims)?)?;
            let nats = &claims["nats"];
            let user = nats["user_nkey"].as_str().context("user_nkey")?;
            let server = nats["server_id"]["id"].as_str().context("server_id")?;
            let of_copy =
                nats["connect_opts"]["name"].as_str().is_some_and(|name| name.starts_with("stream-replicator L"));
            let now = Utc::now().timestamp();
            let ends = of_copy.then(|| *first.get_or_insert(now) + LASTS).filter(|at| *at > now + 1);
            let user_claims = json!({"type": "user", "version": 2, "subs": -1, "data": -1, "payload": -1});
            let token = jwt(&issuer, user, "APP", ends, user_claims)?;
            let answer = json!({"type": "authorization_response", "version": 2, "jwt": token});
            let answer = jwt(&issuer, user, server, None, answer)?;
            client.publish(request.reply.context("reply")?, answer.into()).await?;
        }
        anyhow::Ok(())
    });
    Ok(())
}

#[tokio::test]
async fn a_login_that_the_server_ends_is_followed_by_another_at_once() -> Result<()> {
    let issuer = KeyPair::new_account();
    let config = format!(
        "accounts {{ AUTH: {{ users: [{{user: auth, password: auth}}] }}, APP: {{ jetstream: enabled }} }}\n\
         authorization {{ auth_callout {{ issuer: {}, auth_users: [auth], account: AUTH }} }}",
        issuer.public_key()
    );
    let source = Server::builder(Role::Source).config(&config).start().await?;
    let client = ConnectOptions::with_user_and_password("auth".into(), "auth".into()).connect(source.url()).await?;
    let_in(client, issuer).await?;
    let site = Site::builder().on(source, Server::start(Role::Target).await?).start().await?;
    site.filled("L", 10).await?;
    site.add("L", json!({})).await?;
    site.settled("L", 10).await?;
    let ended = async || site.service.log().contains("the login ended");
    crate::harness::wait_for("the login to end", Duration::from_secs(40), ended)
        .await
        .with_context(|| site.service.log())?;
    assert!(site.service.log().contains("User Authentication Expired"), "{}", site.service.log());
    site.publish("L", 11..=20).await?;
    let row = site.settled("L", 20).await?;
    assert_eq!(row["counters"]["errors"], 0, "{row}\n{}", site.service.log());
    site.events.quiet(&["stalled", "held"])?;
    site.verify("L", &Expect::copy_of("L").site(SITE)).await
}
