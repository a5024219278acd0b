//! A websocket as a stream of bytes: the protocol's commands go through it as if it were a socket, and where frames
//! begin and end means nothing.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes, BytesMut};
use futures_util::{Sink, Stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_websockets::{ClientBuilder, Error, Limits, Message, WebSocketStream};

/// Largest frame that is sent.
const FRAME_OUT: usize = 64 * 1024;
/// Largest frame that is taken: more than any message, with what may stand around it.
const FRAME_IN: usize = 128 << 20;

/// The client's end of a websocket over any connection.
pub(crate) struct WebSocket<S> {
    inner: WebSocketStream<S>,
    /// What was received and not read yet.
    received: Bytes,
}

impl<S: AsyncRead + AsyncWrite + Unpin> WebSocket<S> {
    /// Asks the server at the other end of `io` for a websocket at this URL.
    pub(crate) async fn open(io: S, url: &str) -> Result<Self, String> {
        let builder = ClientBuilder::new().uri(url).map_err(|error| error.to_string())?;
        let builder = builder.limits(Limits::default().max_payload_len(Some(FRAME_IN)));
        let (inner, _) = builder.connect_on(io).await.map_err(|error| error.to_string())?;
        Ok(Self { inner, received: Bytes::new() })
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for WebSocket<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        while self.received.is_empty() {
            let Some(message) = ready!(Pin::new(&mut self.inner).poll_next(cx)) else { return Poll::Ready(Ok(())) };
            // Pings are answered and closes confirmed by the library, the next time it is polled.
            let message = message.map_err(failed)?;
            if message.is_binary() || message.is_text() {
                self.received = message.into_payload().into();
            }
        }
        let count = self.received.len().min(buffer.remaining());
        buffer.put_slice(&self.received[..count]);
        self.received.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for WebSocket<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        // Ready when little is left of the frames before: what is queued is bounded by about one frame.
        ready!(Pin::new(&mut self.inner).poll_ready(cx)).map_err(failed)?;
        let count = bytes.len().min(FRAME_OUT);
        let frame = Message::binary(BytesMut::from(&bytes[..count]));
        Pin::new(&mut self.inner).start_send(frame).map_err(failed)?;
        Poll::Ready(Ok(count))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx).map_err(failed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_close(cx).map_err(failed)
    }
}

fn failed(error: Error) -> io::Error {
    match error {
        Error::Io(error) => error,
        other => io::Error::other(format!("websocket: {other}")),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    /// The client's end after the handshake, and the socket of its server.
    fn open() -> (WebSocket<tokio::io::DuplexStream>, tokio::io::DuplexStream) {
        let (io, server) = duplex(1 << 20);
        (WebSocket { inner: ClientBuilder::new().take_over(io), received: Bytes::new() }, server)
    }

    #[tokio::test]
    async fn frames_end_anywhere_and_a_close_ends_the_stream() {
        let (mut socket, mut server) = open();
        let begin = b"\x02\x03INF";
        let ping = b"\x89\x02hi";
        let rest = b"\x80\x05O {}\r\x82\x00\x82\x01\n";
        let close = b"\x88\x02\x03\xe8";
        // Byte by byte: no read of the library meets a whole frame.
        let sent = [begin.as_slice(), ping, rest, close].concat();
        let serve = async {
            for byte in &sent {
                server.write_all(std::slice::from_ref(byte)).await.unwrap();
                tokio::task::yield_now().await;
            }
            let mut pong = [0; 8];
            server.read_exact(&mut pong).await.unwrap();
            let payload: Vec<_> = (0..2).map(|i| pong[6 + i] ^ pong[2 + i]).collect();
            assert_eq!((pong[0], pong[1], payload.as_slice()), (0x8a, 0x82, b"hi".as_slice()));
        };
        let read = async {
            let mut text = Vec::new();
            socket.read_to_end(&mut text).await.unwrap();
            text
        };
        let ((), text) = tokio::join!(serve, read);
        assert_eq!(text, b"INFO {}\r\n");
    }

    #[tokio::test]
    async fn what_is_written_goes_out_in_bounded_frames() {
        let (mut socket, mut server) = open();
        let bytes: Vec<u8> = (0..FRAME_OUT + 1000).map(|i| i as u8).collect();
        socket.write_all(&bytes).await.unwrap();
        socket.flush().await.unwrap();
        let mut received = Vec::new();
        for length in [FRAME_OUT, 1000] {
            let mut kind = [0; 2];
            server.read_exact(&mut kind).await.unwrap();
            let told = match kind[1] & 0x7f {
                126 => usize::from(server.read_u16().await.unwrap()),
                127 => server.read_u64().await.unwrap() as usize,
                short => usize::from(short),
            };
            assert_eq!((kind[0], told), (0x82, length));
            let mut mask = [0; 4];
            server.read_exact(&mut mask).await.unwrap();
            let mut payload = vec![0; length];
            server.read_exact(&mut payload).await.unwrap();
            received.extend(payload.iter().enumerate().map(|(i, byte)| byte ^ mask[i % 4]));
        }
        assert_eq!(received, bytes);
    }
}
