//! A copying process: what leases and a supervisor do with one replication, in a shell that can be killed at an exact
//! step, stopped like a process by a signal, asked to end, and started again.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll},
};

use futures_util::future::BoxFuture;
use tokio::{
    io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf},
    sync::Notify,
    time::{Duration, Instant, Sleep, sleep, sleep_until},
};

use super::{keys::Link, plan::Step};

/// Something that lasts for a while.
#[derive(Debug, Default)]
pub struct Until(Mutex<Option<Instant>>);

impl Until {
    pub fn begin(&self, time: Duration) {
        *self.0.lock().expect("until") = Some(Instant::now() + time);
    }

    pub fn end(&self) {
        *self.0.lock().expect("until") = None;
    }

    pub fn lasts(&self) -> bool {
        self.when().is_some()
    }

    /// When it ends, if that is not over.
    fn when(&self) -> Option<Instant> {
        self.0.lock().expect("until").filter(|until| *until > Instant::now())
    }
}

/// What others can do to a process.
#[derive(Debug, Default)]
pub struct Hands {
    kill: Notify,
    /// It is asked to end gracefully.
    pub leaving: Notify,
    /// How long it stays away when it is killed or has ended.
    away: Mutex<Duration>,
    pub frozen: Until,
    pub link: Arc<Link>,
    /// Polls and bytes that are left; 0 for no end.
    polls: AtomicU64,
    bytes: AtomicU64,
    dead: AtomicBool,
}

impl Hands {
    /// Ends the process now, wherever it stands; it starts again after a while.
    pub fn kill(&self, away: Duration) {
        *self.away.lock().expect("away") = away;
        self.kill.notify_one();
    }

    /// Ends it at a step.
    pub fn kill_at(&self, step: Step, away: Duration) {
        *self.away.lock().expect("away") = away;
        match step {
            Step::Polls(polls) => self.polls.store(polls, Ordering::Relaxed),
            Step::Bytes(bytes) => self.bytes.store(bytes, Ordering::Relaxed),
        }
    }

    /// Asks it to end gracefully; it starts again after a while.
    pub fn leave(&self, away: Duration) {
        *self.away.lock().expect("away") = away;
        self.leaving.notify_one();
    }

    /// No more of that.
    pub fn heal(&self) {
        self.polls.store(0, Ordering::Relaxed);
        self.bytes.store(0, Ordering::Relaxed);
        self.frozen.end();
        self.link.cut.end();
        self.link.deaf.end();
    }

    fn is_last(left: &AtomicU64) -> bool {
        let before = left.load(Ordering::Relaxed);
        left.store(before.saturating_sub(1), Ordering::Relaxed);
        before == 1
    }
}

/// On or off. Who waits wakes up in the order in which it came: a watch of tokio's draws lots.
#[derive(Debug, Default)]
pub struct Switch {
    on: AtomicBool,
    changed: Notify,
}

impl Switch {
    pub fn set(&self, on: bool) {
        self.on.store(on, Ordering::Relaxed);
        self.changed.notify_waiters();
    }

    pub fn now(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    /// Waits until it is so.
    pub async fn is(&self, on: bool) {
        while self.now() != on {
            self.changed.notified().await;
        }
    }
}

/// Lives again and again.
pub async fn process(hands: Arc<Hands>, life: impl Fn() -> BoxFuture<'static, ()>) {
    loop {
        let steps = Steps { life: Some(life()), hands: hands.clone(), thaw: None };
        tokio::select! {
            biased;
            () = hands.kill.notified() => {}
            () = steps => {}
        }
        let away = *hands.away.lock().expect("away");
        sleep(away).await;
        hands.dead.store(false, Ordering::Relaxed);
    }
}

/// Polls a process as far as it may run.
struct Steps {
    life: Option<BoxFuture<'static, ()>>,
    hands: Arc<Hands>,
    thaw: Option<Pin<Box<Sleep>>>,
}

impl Future for Steps {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(until) = self.hands.frozen.when() {
            let thaw = self.thaw.insert(Box::pin(sleep_until(until)));
            if thaw.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
        }
        let killed = Hands::is_last(&self.hands.polls);
        let Some(life) = self.life.as_mut().filter(|_| !killed) else {
            self.life = None;
            return Poll::Ready(());
        };
        let over = life.as_mut().poll(cx);
        if self.hands.dead.load(Ordering::Relaxed) {
            self.life = None;
            return Poll::Ready(());
        }
        over
    }
}

/// Counts the bytes to the target, and ends the process after the last byte that it may send.
#[derive(Debug)]
pub struct Meter {
    pub pipe: DuplexStream,
    pub hands: Option<Arc<Hands>>,
}

impl AsyncRead for Meter {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.pipe).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Meter {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let Some(hands) = self.hands.clone() else { return Pin::new(&mut self.pipe).poll_write(cx, bytes) };
        if hands.dead.load(Ordering::Relaxed) {
            return Poll::Pending;
        }
        let left = hands.bytes.load(Ordering::Relaxed);
        if left == 0 {
            return Pin::new(&mut self.pipe).poll_write(cx, bytes);
        }
        let some = bytes.len().min(left as usize);
        let written = Pin::new(&mut self.pipe).poll_write(cx, &bytes[..some]);
        if let Poll::Ready(Ok(written)) = written {
            hands.bytes.store(left - written as u64, Ordering::Relaxed);
            hands.dead.store(written as u64 == left, Ordering::Relaxed);
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.pipe).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.pipe).poll_shutdown(cx)
    }
}
