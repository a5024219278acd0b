//! The TCP connection under a lane. It is reset when it closes: what the system has not delivered by then is discarded and
//! never reaches the server, also when the process is killed.

use std::{
    fs, io,
    net::{IpAddr, SocketAddr},
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

/// A connected socket; clones are the same socket, of which one reads and writes.
#[derive(Debug, Clone)]
pub(crate) struct Socket(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    tcp: TcpStream,
    /// Bytes that the system has taken.
    written: AtomicU64,
}

impl Socket {
    /// Takes over a connection that nothing was written to.
    pub fn new(tcp: TcpStream) -> io::Result<Self> {
        tcp.set_nodelay(true)?;
        tcp.set_zero_linger()?;
        Ok(Self(Arc::new(Shared { tcp, written: AtomicU64::new(0) })))
    }

    /// Bytes that the system has taken.
    pub fn written(&self) -> u64 {
        self.0.written.load(Ordering::Relaxed)
    }

    /// Bytes that the system has taken and the other end has acknowledged; `None` where the system does not say it.
    pub fn delivered(&self) -> Option<u64> {
        let (local, peer) = (self.0.tcp.local_addr().ok()?, self.0.tcp.peer_addr().ok()?);
        let table = if local.is_ipv4() { "/proc/self/net/tcp" } else { "/proc/self/net/tcp6" };
        let undelivered = undelivered(&fs::read_to_string(table).ok()?, local, peer)?;
        Some(self.written().saturating_sub(undelivered))
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

/// `tx_queue` of one connection in a table as Linux prints it (`proc_pid_net(5)`).
fn undelivered(table: &str, local: SocketAddr, peer: SocketAddr) -> Option<u64> {
    let (local, peer) = (printed(local), printed(peer));
    table.lines().find_map(|line| {
        let mut words = line.split_ascii_whitespace().skip(1);
        if words.next()? != local || words.next()? != peer {
            return None;
        }
        let (queue, _) = words.nth(1)?.split_once(':')?;
        u64::from_str_radix(queue, 16).ok()
    })
}

/// An address as that table has it: words of 32 bits as they are in memory.
fn printed(address: SocketAddr) -> String {
    let bytes = match address.ip() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let words = bytes.chunks_exact(4).map(|word| {
        let word = <[u8; 4]>::try_from(word).unwrap_or_default();
        format!("{:08X}", u32::from_ne_bytes(word))
    });
    format!("{}:{:04X}", words.collect::<String>(), address.port())
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

    #[test]
    fn the_table_as_linux_prints_it() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
                     0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0\n   \
                     1: 0100007F:D431 0100007F:1F90 01 0027F3A1:00000012 01:00000014 00000000     0        0 2 4 0 20 4\n";
        let address = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
        if cfg!(target_endian = "little") {
            assert_eq!(undelivered(table, address(0xD431), address(8080)), Some(0x0027_F3A1));
        }
        assert_eq!(undelivered(table, address(8080), address(0xD431)), None);
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
