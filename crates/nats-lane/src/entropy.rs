//! What a program cannot know beforehand: random numbers, fresh names and the time of day. The copy asks for them here
//! and nowhere else, so that a simulation can put its own in their place and repeat a run to the byte.

use std::{cell::RefCell, fmt, rc::Rc};

use chrono::{DateTime, Utc};

/// Stands in for the system.
pub trait Chance: fmt::Debug {
    /// 64 random bits.
    fn random(&self) -> u64;
    /// The wall clock.
    fn now(&self) -> DateTime<Utc>;
}

thread_local! {
    static STAND_IN: RefCell<Option<Rc<dyn Chance>>> = const { RefCell::new(None) };
}

/// From now on this thread asks `chance` instead of the system; `None` for the system again.
pub fn stand_in(chance: Option<Rc<dyn Chance>>) {
    STAND_IN.set(chance);
}

/// 64 random bits.
pub fn random() -> u64 {
    asked(|chance| chance.random()).unwrap_or_else(rand::random)
}

/// A name that nobody else has: 22 letters and digits.
pub fn name() -> String {
    asked(|chance| format!("{:022x}", chance.random())).unwrap_or_else(|| nuid::next().to_string())
}

/// The wall clock.
pub fn now() -> DateTime<Utc> {
    asked(|chance| chance.now()).unwrap_or_else(Utc::now)
}

fn asked<T>(ask: impl FnOnce(&dyn Chance) -> T) -> Option<T> {
    STAND_IN.with_borrow(|chance| chance.as_deref().map(ask))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Always;

    impl Chance for Always {
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
