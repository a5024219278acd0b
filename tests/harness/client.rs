//! Helpers on async-nats, and waiting with a limit.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{LIMIT, secrets, wire};

/// How often a condition is checked.
const POLL: Duration = Duration::from_millis(15);

/// Waits until `probe` is true; never longer than `limit`.
pub async fn wait_for(what: &str, limit: Duration, mut probe: impl AsyncFnMut() -> bool) -> Result<()> {
    wait_value(what, limit, async || probe().await.then_some(())).await
}

/// Waits until `probe` has a value; never longer than `limit`, even when a probe hangs.
pub async fn wait_value<T>(what: &str, limit: Duration, mut probe: impl AsyncFnMut() -> Option<T>) -> Result<T> {
    let end = Instant::now() + limit;
    while let Ok(found) = tokio::time::timeout(end.saturating_duration_since(Instant::now()), probe()).await {
        if let Some(value) = found {
            return Ok(value);
        }
        if Instant::now() >= end {
            break;
        }
        tokio::time::sleep(POLL).await;
    }
    bail!("waited {limit:?} for {what}")
}

/// Waits until `probe` says that it is done (`Ok`); never longer than `limit` without any change of what it measures
/// (`Err`), nor than ten times `limit`: work that moves on a busy machine is not given up.
pub async fn wait_while_moving<T, P: PartialEq>(
    what: &str,
    limit: Duration,
    mut probe: impl AsyncFnMut() -> Result<T, P>,
) -> Result<T> {
    let (mut last, mut end) = (None, Instant::now() + limit);
    let latest = Instant::now() + limit * 10;
    while let Ok(found) = tokio::time::timeout(end.saturating_duration_since(Instant::now()), probe()).await {
        let now = Instant::now();
        match found {
            Ok(value) => return Ok(value),
            Err(measured) if last.as_ref() != Some(&measured) => {
                (last, end) = (Some(measured), latest.min(now + limit));
            }
            Err(_) => {}
        }
        if now >= end {
            break;
        }
        tokio::time::sleep(POLL).await;
    }
    bail!("waited {limit:?} without any progress for {what}")
}

/// The time that something takes.
pub async fn timed<T>(work: impl Future<Output = Result<T>>) -> Result<(T, Duration)> {
    let begun = Instant::now();
    let result = work.await?;
    Ok((result, begun.elapsed()))
}

/// Connects, trying again until [`LIMIT`]. The client itself ignores the user in a URL.
pub async fn connect(url: &str) -> Result<async_nats::Client> {
    let parsed = url::Url::parse(url)?;
    let options = || match (parsed.username(), parsed.password()) {
        ("", _) => async_nats::ConnectOptions::new(),
        (token, None) => async_nats::ConnectOptions::with_token(token.to_owned()),
        (user, Some(password)) => {
            async_nats::ConnectOptions::with_user_and_password(user.to_owned(), password.to_owned())
        }
    };
    let connect = async || options().connect(url).await.ok();
    wait_value(&format!("a connection to {url}"), LIMIT, connect).await
}

/// The reply to a service request.
#[derive(Debug, Clone)]
pub struct Reply {
    /// `Nats-Service-Error-Code`; `None` when the request was served.
    pub error: Option<u16>,
    pub body: Value,
}

/// Sends `body` and returns the reply, error replies too. One that breaks its schema ends the test.
pub async fn ask(client: &async_nats::Client, subject: &str, payload: &[u8]) -> Result<Reply> {
    secrets::register_document(&serde_json::from_slice(payload).unwrap_or_default());
    let request = client.request(subject.to_owned(), payload.to_vec().into());
    let reply = tokio::time::timeout(Duration::from_secs(10), request)
        .await
        .with_context(|| format!("no reply to `{subject}`"))?
        .with_context(|| format!("request `{subject}`"))?;
    check_reply(subject, &reply);
    let header = |name: &str| reply.headers.as_ref().and_then(|h| h.get(name)).map(|v| v.as_str().to_owned());
    let error = header("Nats-Service-Error-Code").map(|code| code.parse().unwrap_or(500));
    let body = if reply.payload.is_empty() {
        Value::Null
    } else {
        serde_json::from_slice(&reply.payload).with_context(|| format!("reply to `{subject}` is not JSON"))?
    };
    checked(subject, payload, error.is_some(), &body);
    Ok(Reply { error, body })
}

/// Panics if the service took or sent something that its schemas do not describe: a test that only checks whether there is
/// an answer must not miss that.
#[track_caller]
pub fn checked(subject: &str, request: &[u8], failed: bool, reply: &Value) {
    // A validation is served whatever it is asked about, and says whether that is a document.
    let refused = failed || reply["valid"] == false;
    let taken = if refused { Ok(()) } else { wire::check_request(subject, request) };
    if let Err(error) = wire::check_reply(subject, failed, reply).and(taken) {
        panic!("{error:#}");
    }
}

/// No secret is in a reply.
pub fn check_reply(subject: &str, reply: &async_nats::Message) {
    let (body, headers) = (String::from_utf8_lossy(&reply.payload), format!("{:?}", reply.headers));
    secrets::check(&format!("the reply to `{subject}`"), &body);
    secrets::check(&format!("the headers of the reply to `{subject}`"), &headers);
}

/// Sends a JSON request (`Null` sends nothing) and returns the body; an error reply is an error.
pub async fn request(client: &async_nats::Client, subject: &str, body: Value) -> Result<Value> {
    let bytes = if body.is_null() { Vec::new() } else { serde_json::to_vec(&body)? };
    let reply = ask(client, subject, &bytes).await?;
    match reply.error {
        None => Ok(reply.body),
        Some(code) => bail!("`{subject}` was refused with {code}: {}", reply.body),
    }
}

/// GET from `host:port`; status code and body.
pub async fn http_get(address: &str, path: &str) -> Result<(u16, String)> {
    let mut stream = TcpStream::connect(address).await?;
    // 1.0: the answer comes in one piece and ends with the connection.
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: x\r\n\r\n").as_bytes()).await?;
    let mut answer = String::new();
    tokio::time::timeout(LIMIT, stream.read_to_string(&mut answer)).await??;
    let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP")?;
    let code = head.split(' ').nth(1).context("no status code")?.parse()?;
    secrets::check(path, &answer);
    Ok((code, body.to_owned()))
}

/// The status row of one replication; `None` when there is none, or nothing answers yet.
pub async fn status(client: &async_nats::Client, replication: &str) -> Option<Value> {
    let reply = request(client, "replicator.status", Value::Null).await.ok()?;
    let rows = reply.get("replications")?.as_array()?;
    rows.iter().find(|r| r["replication"] == replication).cloned()
}

/// The request was refused with this code and these words.
#[track_caller]
pub fn refused(reply: &Reply, code: u16, expect: &str) {
    assert_eq!(reply.error, Some(code), "{reply:?}");
    let description = reply.body["error"]["description"].as_str().unwrap_or_default();
    assert!(description.contains(expect), "`{expect}` is not in {reply:?}");
}
