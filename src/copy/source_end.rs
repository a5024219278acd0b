//! Whether the source still reaches as far as it was read. Pure. A consumer can survive a source that lost its end, such as
//! a cluster in which a damaged replica became the leader: it waits until the stream has grown as far again, and what is
//! stored until then would never be copied.

/// What was read, held against the last sequence of the source.
#[derive(Debug, Default)]
pub(super) struct SourceEnd {
    /// The newest sequence that was read when the source was asked.
    read: u64,
    /// The answer before was below what was read.
    is_doubted: bool,
}

impl SourceEnd {
    /// The source is asked now; everything up to `read` was stored there.
    pub fn ask(&mut self, read: u64) {
        self.read = read;
    }

    /// Whether the source should be asked again soon.
    pub fn is_doubted(&self) -> bool {
        self.is_doubted
    }

    /// The source answered. Two answers in a row prove a loss: a new leader may answer before it has applied everything that
    /// another replica delivered.
    pub fn answered(&mut self, last: u64) -> Option<String> {
        let short = last < self.read;
        let again = std::mem::replace(&mut self.is_doubted, short);
        (short && again)
            .then(|| format!("the source lost its end: its last sequence is {last}, below {} that was read", self.read))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_is_two_answers_in_a_row_below_what_was_read() {
        let mut end = SourceEnd::default();
        // What was read before the first question is nobody's claim.
        assert_eq!((end.answered(0), end.is_doubted()), (None, false));
        end.ask(10);
        assert_eq!((end.answered(10), end.is_doubted()), (None, false));
        assert_eq!((end.answered(9), end.is_doubted()), (None, true));
        // A leader that had not applied everything.
        end.ask(12);
        assert_eq!((end.answered(12), end.is_doubted()), (None, false));
        assert_eq!(end.answered(6), None);
        end.ask(12);
        let why = end.answered(7).unwrap();
        assert!(why.contains("last sequence is 7") && why.contains("12"), "{why}");
    }
}
