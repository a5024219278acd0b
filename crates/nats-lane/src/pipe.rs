//! A lane over a pipe, for unit tests of code that uses a lane: the test holds the other end, and says what was seen at
//! real servers.

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
#[cfg(test)]
use tokio::net::{TcpListener, TcpStream};

use crate::{Connection, Endpoint, Lane};

/// What a server says until it has let a client in.
const GREETING: &[u8] = b"INFO {\"version\":\"2.15.1\",\"max_payload\":1048576,\"headers\":true}\r\nPONG\r\n";

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
    end.write_all(GREETING).await.expect("a pipe");
    let lane = Lane::greet(Box::new(io), "pipe", &connection, "test").await.expect("a lane");
    (lane, Pipe { end, read: Vec::new() })
}

/// The same over a connection of the system.
#[cfg(test)]
pub(crate) async fn lane_over_tcp() -> (Lane, TcpStream) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
    let address = listener.local_addr().expect("its address");
    let connection = Connection::to(Endpoint::parse(&format!("nats://{address}")).expect("a URL"));
    let accepted = async {
        let (mut end, _) = listener.accept().await.expect("a connection");
        end.write_all(GREETING).await.expect("a connection");
        end
    };
    let (lane, end) = tokio::join!(Lane::connect(&connection, "test"), accepted);
    (lane.expect("a lane"), end)
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

    /// Delivers a stored message with a payload of this many bytes to a pull; `reply` is its ack subject. The second last
    /// token of the inbox is the subscription.
    pub async fn deliver(&mut self, to: &PipeRequest, reply: &str, header: &str, payload: usize) {
        let sid = to.reply.rsplit('.').nth(1).expect("an inbox");
        let (head, all) = (header.len(), header.len() + payload);
        let message = format!("HMSG stored {sid} {reply} {head} {all}\r\n{header}{}\r\n", "x".repeat(payload));
        self.end.write_all(message.as_bytes()).await.expect("a pipe");
    }

    /// Sends a status to a pull.
    pub async fn status(&mut self, to: &PipeRequest, line: &str) {
        let sid = to.reply.rsplit('.').nth(1).expect("an inbox");
        let (header, reply) = (format!("NATS/1.0 {line}\r\n\r\n"), &to.reply);
        let size = header.len();
        let message = format!("HMSG {reply} {sid} {size} {size}\r\n{header}\r\n");
        self.end.write_all(message.as_bytes()).await.expect("a pipe");
    }

    /// Answers a request.
    pub async fn answer(&mut self, to: &PipeRequest, payload: &str) {
        let message = format!("MSG {} {} {}\r\n{payload}\r\n", to.reply, Lane::REQUEST_SID, payload.len());
        self.end.write_all(message.as_bytes()).await.expect("a pipe");
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, pin::pin, task::Poll, time::Duration};

    use tokio::time::timeout;

    use super::*;
    use crate::lane::DELIVERY_EVERY;

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

    /// Drives a lane until the condition holds.
    async fn turn_until(lane: &mut Lane, holds: impl Fn(&Lane) -> bool) {
        let limit = Duration::from_secs(60);
        let turns = async {
            while !holds(lane) {
                lane.check_delivery();
                let _ = timeout(Duration::from_millis(20), lane.turn()).await.map(|turn| turn.expect("a turn"));
            }
        };
        timeout(limit, turns).await.expect("the condition within the limit");
    }

    #[tokio::test]
    async fn the_system_is_not_asked_about_a_ping_alone() {
        let (mut lane, mut server) = lane_over_tcp().await;
        // The subscription of the login goes out, and an answer shows that it arrived.
        lane.ping();
        turn_until(&mut lane, |lane| lane.unwritten() == 0).await;
        server.write_all(b"PONG\r\n").await.expect("a connection");
        turn_until(&mut lane, |lane| lane.answered_pings() == lane.pings()).await;
        let before = lane.asked();
        lane.ping();
        turn_until(&mut lane, |lane| lane.unwritten() == 0).await;
        lane.check_delivery();
        assert_eq!(lane.asked(), before);
    }

    #[tokio::test]
    async fn the_system_is_asked_until_everything_has_arrived() {
        if !cfg!(target_os = "linux") {
            return;
        }
        let (mut lane, mut server) = lane_over_tcp().await;
        // More than fits into the buffers on the way.
        const MUCH: usize = 32 << 20;
        lane.output().resize(MUCH, b' ');
        lane.ping();
        turn_until(&mut lane, |lane| lane.asked() >= 3).await;
        assert!(lane.unwritten() > 0, "the buffers are larger than expected");
        let drained = lane.drained();
        let read = tokio::spawn(async move {
            let mut left = vec![0; 1 << 20];
            // It is reset in the end.
            while server.read(&mut left).await.is_ok_and(|count| count > 0) {}
        });
        turn_until(&mut lane, |lane| lane.unwritten() == 0 && !lane.waits_for_delivery()).await;
        assert!(lane.drained() > drained);
        let asked = lane.asked();
        // No answer comes, and nothing is left to ask about.
        tokio::time::sleep(2 * DELIVERY_EVERY).await;
        lane.check_delivery();
        assert_eq!(lane.asked(), asked);
        drop(lane);
        read.await.expect("the other end");
    }
}
