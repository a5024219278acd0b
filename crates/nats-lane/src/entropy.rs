//! Random numbers, unique names and the time of day in one place, so that a test can replace them and repeat what it did
//! byte for byte.

use std::{cell::RefCell, fmt, rc::Rc};

use chrono::{DateTime, Utc};

/// Stands in for the system.
pub trait Entropy: fmt::Debug {
    /// 64 random bits.
    fn random(&self) -> u64;
    /// The wall clock.
    fn now(&self) -> DateTime<Utc>;
}

thread_local! {
    static STAND_IN: RefCell<Option<Rc<dyn Entropy>>> = const { RefCell::new(None) };
}

/// From now on this thread asks `entropy` instead of the system; `None` for the system again.
pub fn stand_in(entropy: Option<Rc<dyn Entropy>>) {
    STAND_IN.set(entropy);
}

/// 64 random bits.
pub fn random() -> u64 {
    asked(|entropy| entropy.random()).unwrap_or_else(rand::random)
}

/// A unique name: 22 letters and digits.
pub fn name() -> String {
    asked(|entropy| format!("{:022x}", entropy.random())).unwrap_or_else(|| nuid::next().to_string())
}

/// The wall clock.
pub fn now() -> DateTime<Utc> {
    asked(|entropy| entropy.now()).unwrap_or_else(Utc::now)
}

fn asked<T>(ask: impl FnOnce(&dyn Entropy) -> T) -> Option<T> {
    STAND_IN.with_borrow(|entropy| entropy.as_deref().map(ask))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Always;

    impl Entropy for Always {
        fn random(&self) -> u64 {
            0xabc
        }

        fn now(&self) -> DateTime<Utc> {
            DateTime::UNIX_EPOCH
        }
    }

    #[test]
    fn a_stand_in_is_asked_instead_of_the_system() {
        assert_ne!(name(), name());
        assert!(now() > DateTime::UNIX_EPOCH);
        stand_in(Some(Rc::new(Always)));
        assert_eq!((random(), name().as_str(), now()), (0xabc, "0000000000000000000abc", DateTime::UNIX_EPOCH));
        stand_in(None);
        assert_eq!(name().len(), 22);
        assert_ne!(random(), random());
    }
}
