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
pub(super) struct WebSocket<S> {
    inner: WebSocketStream<S>,
    /// What was received and not read yet.
    received: Bytes,
}

impl<S: AsyncRead + AsyncWrite + Unpin> WebSocket<S> {
    /// Asks the server at the other end of `io` for a websocket at this URL.
    pub(super) async fn open(io: S, url: &str) -> Result<Self, String> {
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
