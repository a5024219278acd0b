//! The bytes that all replications of the process may have read ahead together.

use std::sync::{Arc, Mutex, PoisonError};

/// Smallest piece that is worth asking a server for.
pub const PIECE_MIN: usize = 64 * 1024;

/// A process-wide bound on bytes that were requested or are unsent in memory; cheap to clone.
#[derive(Debug, Clone)]
pub struct Budget {
    free: Arc<Mutex<i64>>,
}

impl Budget {
    /// A budget of so many bytes.
    pub fn new(bytes: usize) -> Self {
        Self { free: Arc::new(Mutex::new(i64::try_from(bytes).unwrap_or(i64::MAX))) }
    }

    /// Reserves `bytes` if there is room. A request above the smallest piece is granted only up to a quarter
    /// of the free bytes, so that replications whose targets stall cannot starve the others.
    pub fn reserve(&self, bytes: usize) -> Option<Reservation> {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let bound = if bytes <= PIECE_MIN { *free } else { *free / 4 };
        if i64::try_from(bytes).is_ok_and(|bytes| bytes <= bound) {
            drop(free);
            return Some(self.force(bytes));
        }
        None
    }

    /// Reserves `bytes` whether there is room or not: the least that keeps one replication going.
    pub fn force(&self, bytes: usize) -> Reservation {
        *self.free.lock().unwrap_or_else(PoisonError::into_inner) -= bytes as i64;
        Reservation { budget: self.clone(), bytes }
    }
}

/// Reserved bytes; released when dropped.
#[derive(Debug)]
pub struct Reservation {
    budget: Budget,
    bytes: usize,
}

impl Reservation {
    /// Size of the reservation.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Adds another reservation to this one.
    pub fn join(&mut self, mut other: Reservation) {
        self.bytes += std::mem::take(&mut other.bytes);
    }

    /// Releases everything above `bytes`.
    pub fn shrink_to(&mut self, bytes: usize) {
        let back = self.bytes.saturating_sub(bytes);
        self.bytes -= back;
        *self.budget.free.lock().unwrap_or_else(PoisonError::into_inner) += back as i64;
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.shrink_to(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_pieces_never_take_the_last_room() {
        let budget = Budget::new(1 << 20);
        let mut held: Vec<_> = std::iter::from_fn(|| budget.reserve(PIECE_MIN * 2)).collect();
        assert!(!held.is_empty() && held.len() < 8);
        assert!(budget.reserve(PIECE_MIN).is_some());
        let mut first = held.remove(0);
        first.shrink_to(1);
        drop(held);
        drop(first);
        assert!(budget.reserve(1 << 18).is_some());
        assert!(budget.reserve((1 << 18) + 1).is_none());
        let forced = budget.force(2 << 20);
        assert!(budget.reserve(1).is_none());
        drop(forced);
        assert!(budget.reserve(1).is_some());
    }
}
