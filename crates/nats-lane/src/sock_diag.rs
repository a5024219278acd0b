//! What the Linux kernel says of one TCP connection (`sock_diag(7)`). It finds the connection by its addresses: what it costs
//! does not depend on how many connections there are, and nothing waits.

use std::net::SocketAddr;

/// Bytes that were written to a connection and that the other end has not acknowledged; `None` where the kernel does not
/// say it.
#[cfg(target_os = "linux")]
pub(crate) fn unacknowledged(local: SocketAddr, peer: SocketAddr) -> Option<u64> {
    linux::unacknowledged(local, peer)
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn unacknowledged(_local: SocketAddr, _peer: SocketAddr) -> Option<u64> {
    None
}

#[cfg(target_os = "linux")]
mod linux {
    use std::{
        io,
        net::{IpAddr, SocketAddr},
        sync::atomic::{AtomicU8, Ordering},
    };

    use rustix::{
        io::Errno,
        net::{
            AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink::SOCK_DIAG, recv, send, socket_with,
        },
    };
    use tracing::warn;

    /// `NLMSG_HDRLEN`.
    const HEADER: usize = 16;
    /// A header and `struct inet_diag_req_v2`.
    const QUESTION: usize = HEADER + 56;
    /// Where `idiag_state` is in the answer.
    const STATE: usize = HEADER + 1;
    /// `TCP_LISTEN`.
    const LISTEN: u8 = 10;
    /// Offset of `idiag_wqueue` in the answer: after the header, four bytes, the addresses, and two numbers.
    const WRITE_QUEUE: usize = HEADER + 4 + 48 + 8;
    const SOCK_DIAG_BY_FAMILY: u16 = 20;
    const NLM_F_REQUEST: u16 = 1;
    const TCP: u8 = 6;

    /// Questions in a row that a kernel refuses before its first answer until it is not asked any more: one that lacks the
    /// module looks for it each time.
    const REFUSALS: u8 = 3;
    const ANSWERS: u8 = u8::MAX;
    /// Refusals so far, or [`ANSWERS`].
    static REFUSED: AtomicU8 = AtomicU8::new(0);

    pub(crate) fn unacknowledged(local: SocketAddr, peer: SocketAddr) -> Option<u64> {
        let refused = REFUSED.load(Ordering::Relaxed);
        if refused != ANSWERS && refused >= REFUSALS {
            return None;
        }
        match ask(local, peer) {
            Ok(count) => {
                REFUSED.store(ANSWERS, Ordering::Relaxed);
                Some(count)
            }
            Err(error) if is_transient(&error) => None,
            Err(error) => {
                let counted = |n: u8| (n < REFUSALS).then(|| n + 1);
                let before = REFUSED.fetch_update(Ordering::Relaxed, Ordering::Relaxed, counted);
                if before == Ok(REFUSALS - 1) {
                    warn!(
                        "the kernel does not say what of a connection is acknowledged: {error}; a connection that sends and \
                         receives nothing for long is given up sooner. Allow netlink sockets (AF_NETLINK, sock_diag)"
                    );
                }
                None
            }
        }
    }

    /// Too many open files, or no memory: it says nothing about the kernel.
    fn is_transient(error: &io::Error) -> bool {
        let transient = [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::NOBUFS, Errno::AGAIN, Errno::INTR];
        Errno::from_io_error(error).is_some_and(|error| transient.contains(&error))
    }

    pub(crate) fn ask(local: SocketAddr, peer: SocketAddr) -> io::Result<u64> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let kernel = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(SOCK_DIAG))?;
        send(&kernel, &question(local, peer), SendFlags::empty())?;
        // The answer is there when the question is sent. More than its beginning is not needed.
        let mut answer = [0; WRITE_QUEUE + 4];
        let (count, _) = recv(&kernel, &mut answer, RecvFlags::empty())?;
        write_queue(&answer[..count])
    }

    /// `SOCK_DIAG_BY_FAMILY` for one connection in any state.
    fn question(local: SocketAddr, peer: SocketAddr) -> [u8; QUESTION] {
        let mut bytes = [0; QUESTION];
        let mut put = |at: usize, part: &[u8]| bytes[at..at + part.len()].copy_from_slice(part);
        put(0, &(QUESTION as u32).to_ne_bytes());
        put(4, &SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        put(6, &NLM_F_REQUEST.to_ne_bytes());
        let family = if local.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        put(HEADER, &[family.as_raw() as u8, TCP, 0, 0]);
        put(HEADER + 4, &u32::MAX.to_ne_bytes());
        let id = HEADER + 8;
        for (n, address) in [local, peer].into_iter().enumerate() {
            put(id + 2 * n, &address.port().to_be_bytes());
            match address.ip() {
                IpAddr::V4(ip) => put(id + 4 + 16 * n, &ip.octets()),
                IpAddr::V6(ip) => put(id + 4 + 16 * n, &ip.octets()),
            }
        }
        if let SocketAddr::V6(local) = local {
            put(id + 36, &local.scope_id().to_ne_bytes());
        }
        // `INET_DIAG_NOCOOKIE`: whichever connection has these addresses.
        put(id + 40, &[0xff; 8]);
        bytes
    }

    /// `idiag_wqueue` of an answer: bytes that were written and are not acknowledged.
    pub(crate) fn write_queue(answer: &[u8]) -> io::Result<u64> {
        let word = |at: usize| answer.get(at..at + 4).and_then(|word| <[u8; 4]>::try_from(word).ok());
        let kind = answer.get(4..6).and_then(|kind| <[u8; 2]>::try_from(kind).ok()).map(u16::from_ne_bytes);
        if kind == Some(SOCK_DIAG_BY_FAMILY) {
            // Without such a connection, the kernel finds the socket that would accept it.
            let queue = word(WRITE_QUEUE).filter(|_| answer[STATE] != LISTEN);
            return queue.map(|queue| u64::from(u32::from_ne_bytes(queue))).ok_or(io::ErrorKind::NotFound.into());
        }
        // `NLMSG_ERROR` carries a negative `errno`.
        let errno = word(HEADER).map(i32::from_ne_bytes).and_then(i32::checked_neg).filter(|errno| *errno > 0);
        Err(errno.map_or_else(|| io::ErrorKind::InvalidData.into(), io::Error::from_raw_os_error))
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::{
        io::{self, Write},
        net::{TcpListener, TcpStream},
    };

    use super::linux::{ask, write_queue};

    #[test]
    fn one_connection_of_several_is_found_by_its_addresses() {
        for host in ["127.0.0.1", "::1"] {
            let Ok(listener) = TcpListener::bind((host, 0)) else { continue };
            let address = listener.local_addr().unwrap();
            let connect = || (TcpStream::connect(address).unwrap(), listener.accept().unwrap().0);
            let ((mut full, _kept), (idle, _)) = (connect(), connect());
            full.set_nonblocking(true).unwrap();
            let mut written = 0;
            while let Ok(count) = full.write(&[0; 1 << 16]) {
                written += count as u64;
            }
            let asked = |tcp: &TcpStream| ask(tcp.local_addr().unwrap(), tcp.peer_addr().unwrap());
            let waiting = asked(&full).unwrap();
            assert!(waiting > 0 && waiting <= written, "{waiting} of {written} on {host}");
            assert_eq!(asked(&idle).unwrap(), 0);
        }
    }

    #[test]
    fn a_connection_that_is_not_there_is_an_error() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let error = ask(address, address).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound, "{error}");
        drop(listener);
        let error = ask(address, address).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound, "{error}");
    }

    #[test]
    fn an_answer_that_is_cut_is_an_error() {
        // Its type is in the fifth byte.
        let answer = |length: usize| (0..length).map(|at| if at == 4 { 20 } else { 0 }).collect::<Vec<u8>>();
        for length in [0, 5, 20, 79] {
            assert!(write_queue(&answer(length)).is_err(), "{length}");
        }
        assert_eq!(write_queue(&answer(80)).unwrap(), 0);
    }
}
