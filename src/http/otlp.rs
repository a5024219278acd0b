//! The way to a collector of OpenTelemetry: one HTTP request at a time, without TLS.

use std::time::Duration;

use async_trait::async_trait;
use axum::body::{Body, to_bytes};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use tokio::{net::TcpStream, runtime::Handle, time::timeout};

/// Time for one request.
const WITHIN: Duration = Duration::from_secs(10);
/// Bytes of an answer, at most.
const ANSWER: usize = 1 << 20;
/// Port of a collector.
const PORT: u16 = 4318;

/// Sends requests on this runtime: they are made in a thread that has none.
#[derive(Debug)]
pub struct OtlpClient(Handle);

impl OtlpClient {
    /// For a thread without a runtime.
    pub fn new(runtime: Handle) -> Self {
        Self(runtime)
    }
}

/// Why this is not the address of a collector.
pub fn check_url(url: &str) -> Result<(), String> {
    let right =
        "write the address of an OpenTelemetry collector that takes OTLP over HTTP, such as `http://127.0.0.1:4318`";
    let uri: axum::http::Uri = url.parse().map_err(|error| format!("{error}: {right}"))?;
    match (uri.scheme_str(), uri.host()) {
        (Some("http"), Some(_)) if uri.authority().is_some_and(|authority| !authority.as_str().contains('@')) => Ok(()),
        (Some("https"), _) => Err(format!("TLS is not supported here: {right}, on this host or in this cluster")),
        _ => Err(right.to_owned()),
    }
}

#[async_trait]
impl HttpClient for OtlpClient {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        self.0.spawn(async move { timeout(WITHIN, send(request)).await? }).await?
    }
}

async fn send(request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
    let (mut head, body) = request.into_parts();
    let authority = head.uri.authority().ok_or("the address of the collector has no host")?.clone();
    let stream = TcpStream::connect((authority.host(), authority.port_u16().unwrap_or(PORT))).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    head.headers.insert(axum::http::header::HOST, authority.as_str().parse()?);
    let path = head.uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
    head.uri = path.parse()?;
    let answer = sender.send_request(Request::from_parts(head, Body::from(body))).await?;
    let (head, body) = answer.into_parts();
    let body = to_bytes(Body::new(body), ANSWER).await?;
    connection.abort();
    Ok(Response::from_parts(head, body))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_address_of_a_collector_is_one() {
        for url in ["http://127.0.0.1:4318", "http://collector/agent"] {
            assert_eq!(check_url(url), Ok(()), "{url}");
        }
        for url in ["", "collector:4318", "nats://c", "https://c:4318", "http://u:p@c", "http://"] {
            assert!(check_url(url).is_err(), "{url}");
        }
    }
}
