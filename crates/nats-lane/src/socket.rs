//! The TCP connection under a lane. It is reset when it closes: what the system has not delivered by then is discarded and
//! never reaches the server, also when the process is killed.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use crate::sock_diag;

/// A connected socket; clones are the same socket, of which one reads and writes.
#[derive(Debug, Clone)]
pub(crate) struct Socket(Arc<SharedSocket>);

#[derive(Debug)]
struct SharedSocket {
    tcp: TcpStream,
    /// Bytes that the system has taken.
    written: AtomicU64,
    #[cfg(test)]
    asked: AtomicU64,
}

impl Socket {
    /// Takes over a connection that nothing was written to.
    pub fn new(tcp: TcpStream) -> io::Result<Self> {
        tcp.set_nodelay(true)?;
        tcp.set_zero_linger()?;
        let shared = SharedSocket {
            tcp,
            written: AtomicU64::new(0),
            #[cfg(test)]
            asked: AtomicU64::new(0),
        };
        Ok(Self(Arc::new(shared)))
    }

    /// Bytes that the system has taken.
    pub fn written(&self) -> u64 {
        self.0.written.load(Ordering::Relaxed)
    }

    /// Bytes that the system has taken and the other end has acknowledged; `None` where the system does not say it.
    pub fn delivered(&self) -> Option<u64> {
        #[cfg(test)]
        self.0.asked.fetch_add(1, Ordering::Relaxed);
        let (local, peer) = (self.0.tcp.local_addr().ok()?, self.0.tcp.peer_addr().ok()?);
        Some(self.written().saturating_sub(sock_diag::unacknowledged(local, peer)?))
    }

    /// How often the system was asked.
    #[cfg(test)]
    pub fn asked(&self) -> u64 {
        self.0.asked.load(Ordering::Relaxed)
    }
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.0.tcp.poll_read_ready(cx))?;
            match self.0.tcp.try_read_buf(buf) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => return Poll::Ready(read.map(|_| ())),
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.0.tcp.poll_write_ready(cx))?;
            match self.0.tcp.try_write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                written => {
                    let count = written.as_ref().map_or(0, |count| *count as u64);
                    self.0.written.fetch_add(count, Ordering::Relaxed);
                    return Poll::Ready(written);
                }
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// Nothing is left to do: what counts was answered by then.
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    async fn pair(host: &str) -> (Socket, TcpStream) {
        let listener = TcpListener::bind((host, 0)).await.unwrap();
        let connecting = TcpStream::connect(listener.local_addr().unwrap());
        let (ours, theirs) = tokio::join!(connecting, listener.accept());
        (Socket::new(ours.unwrap()).unwrap(), theirs.unwrap().0)
    }

    /// Writes until the system takes no more; returns how many bytes it took.
    async fn fill(socket: &mut Socket) -> u64 {
        let piece = vec![b'x'; 1 << 20];
        let limit = std::time::Duration::from_millis(300);
        while let Ok(written) = tokio::time::timeout(limit, socket.write(&piece)).await {
            written.unwrap();
        }
        socket.written()
    }

    #[tokio::test]
    async fn what_the_other_end_does_not_read_is_undelivered() {
        if !cfg!(target_os = "linux") {
            return;
        }
        for host in ["127.0.0.1", "::1"] {
            if TcpListener::bind((host, 0)).await.is_err() {
                continue;
            }
            let (mut ours, mut theirs) = pair(host).await;
            assert_eq!(ours.delivered(), Some(0));
            let written = fill(&mut ours).await;
            let delivered = ours.delivered().unwrap();
            assert!(delivered < written, "{delivered} of {written} on {host}");
            let mut left = vec![0; written as usize];
            theirs.read_exact(&mut left).await.unwrap();
            let end = tokio::time::Instant::now() + std::time::Duration::from_secs(20);
            while ours.delivered() != Some(written) {
                assert!(tokio::time::Instant::now() < end, "{:?} of {written}", ours.delivered());
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
        }
    }

    #[tokio::test]
    async fn what_is_undelivered_when_it_closes_never_arrives() {
        let (mut ours, mut theirs) = pair("127.0.0.1").await;
        let written = fill(&mut ours).await;
        drop(ours);
        let mut read = Vec::new();
        let error = theirs.read_to_end(&mut read).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        assert!((read.len() as u64) < written, "all {written} bytes arrived");
    }
}
