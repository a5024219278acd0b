//! The listener of the monitor: a connection whose client takes nothing ends, so that it does not count as a viewer for ever.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::serve::Listener;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    time::{Sleep, sleep},
};

/// How long a client may take nothing of what is written to it.
const WRITE_LIMIT: Duration = Duration::from_secs(15);

/// Accepts connections that end when they cannot be written to.
pub(super) struct LimitedListener(pub(super) TcpListener);

impl Listener for LimitedListener {
    type Io = LimitedWrites<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        let (stream, address) = Listener::accept(&mut self.0).await;
        (LimitedWrites::new(stream, WRITE_LIMIT), address)
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.0.local_addr()
    }
}

/// A connection on which no write waits longer than the limit.
pub(super) struct LimitedWrites<C> {
    connection: C,
    limit: Duration,
    /// Runs while a write waits.
    waits: Option<Pin<Box<Sleep>>>,
}

impl<C> LimitedWrites<C> {
    fn new(connection: C, limit: Duration) -> Self {
        Self { connection, limit, waits: None }
    }

    /// Passes on what a write came to, or the error that it waited too long.
    fn judge<T>(&mut self, context: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.waits = None;
            return written;
        }
        let limit = self.limit;
        let waits = self.waits.get_or_insert_with(|| Box::pin(sleep(limit)));
        ready!(waits.as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<C: AsyncRead + Unpin> AsyncRead for LimitedWrites<C> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_read(context, buffer)
    }
}

impl<C: AsyncWrite + Unpin> AsyncWrite for LimitedWrites<C> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.connection).poll_write(context, bytes);
        self.judge(context, written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.connection).poll_flush(context);
        self.judge(context, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let closed = Pin::new(&mut self.connection).poll_shutdown(context);
        self.judge(context, closed)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_client_that_takes_nothing_is_given_up() {
        let (here, mut there) = duplex(10);
        let mut limited = LimitedWrites::new(here, Duration::from_secs(15));
        // Slow, but it takes something.
        let reader = tokio::spawn(async move {
            let mut some = [0; 5];
            for _ in 0..4 {
                sleep(Duration::from_secs(10)).await;
                there.read_exact(&mut some).await.unwrap();
            }
            there
        });
        limited.write_all(&[0; 30]).await.unwrap();
        let _there = reader.await.unwrap();
        let stuck = limited.write_all(&[0; 30]).await;
        assert_eq!(stuck.unwrap_err().kind(), io::ErrorKind::TimedOut);
    }
}
