//! Logins that end while a copy runs.

use std::{future::ready, time::Duration};

use anyhow::{Context, Result};
use async_nats::ConnectOptions;
use chrono::Utc;
use nkeys::KeyPair;
use serde_json::{Value, json};

use crate::harness::signed::{Granted, answer_logins, callout_config};
use crate::harness::{Expect, Role, SITE, Server, Site};

/// How long a login of the copy lasts.
const LASTS: i64 = 5;

/// Lets every client in; the first connections of the copy only for a time that the server does not announce.
async fn let_in(client: async_nats::Client, issuer: KeyPair) -> Result<()> {
    let mut first: Option<i64> = None;
    let judge = move |nats: Value| {
        let name = nats["connect_opts"]["name"].as_str().unwrap_or_default();
        let now = Utc::now().timestamp();
        let of_copy = name.starts_with("stream-replicator L");
        let until = of_copy.then(|| *first.get_or_insert(now) + LASTS).filter(|at| *at > now + 1);
        ready(Ok(Granted { until, ..Default::default() }))
    };
    answer_logins(client, issuer, judge).await
}

#[tokio::test]
async fn a_login_that_the_server_ends_is_followed_by_another_at_once() -> Result<()> {
    let issuer = KeyPair::new_account();
    let source = Server::builder(Role::Source).config(&callout_config(&issuer)).start().await?;
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
