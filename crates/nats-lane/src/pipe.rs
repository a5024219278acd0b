//! A lane over a pipe, for unit tests of code that uses a lane: the test holds the other end, and says what was seen at
//! real servers.

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

use crate::{Connection, Endpoint, Lane};

/// The end of the server.
#[derive(Debug)]
pub struct Pipe {
    end: DuplexStream,
    read: Vec<u8>,
}

/// A request as it arrived.
#[derive(Debug)]
pub struct PipeRequest {
    /// Its subject.
    pub subject: String,
    /// Where the answer goes.
    pub reply: String,
}

/// A lane, greeted, and the other end of its pipe.
pub async fn lane() -> (Lane, Pipe) {
    let connection = Connection::to(Endpoint::parse("nats://a").expect("a URL"));
    let (io, mut end) = duplex(1 << 20);
    let greeting = "INFO {\"version\":\"2.15.1\",\"max_payload\":1048576,\"headers\":true}\r\nPONG\r\n";
    end.write_all(greeting.as_bytes()).await.expect("a pipe");
    let lane = Lane::greet(Box::new(io), "pipe", &connection, "test").await.expect("a lane");
    (lane, Pipe { end, read: Vec::new() })
}

impl Pipe {
    /// The next publish with a reply subject; what comes before it is passed over.
    pub async fn asked(&mut self) -> PipeRequest {
        loop {
            while let Some(end) = self.read.windows(2).position(|bytes| bytes == b"\r\n") {
                let line = String::from_utf8_lossy(&self.read[..end]).into_owned();
                self.read.drain(..end + 2);
                let words: Vec<&str> = line.split(' ').collect();
                if let ["PUB", subject, reply, _] = words[..] {
                    return PipeRequest { subject: subject.to_owned(), reply: reply.to_owned() };
                }
            }
            assert!(self.end.read_buf(&mut self.read).await.expect("a pipe") > 0, "the lane is closed");
        }
    }

    /// Answers a request.
    pub async fn answer(&mut self, to: &PipeRequest, payload: &str) {
        let message = format!("MSG {} {} {}\r\n{payload}\r\n", to.reply, Lane::REQUEST_SID, payload.len());
        self.end.write_all(message.as_bytes()).await.expect("a pipe");
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, pin::pin, task::Poll};

    use super::*;

    #[tokio::test]
    async fn a_round_trip_ends_with_its_own_answer() {
        let (mut lane, mut server) = lane().await;
        lane.ping();
        let mut trip = pin!(lane.round_trip());
        server.end.write_all(b"PONG\r\n").await.expect("a pipe");
        assert!(poll_fn(|cx| Poll::Ready(trip.as_mut().poll(cx).is_pending())).await, "that was another PONG");
        server.end.write_all(b"PONG\r\n").await.expect("a pipe");
        trip.await.expect("a PONG");
    }
}
