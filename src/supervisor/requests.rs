//! The requests of operators for one replication, as the marks beside its document have them. Pure.

use bytes::Bytes;

use crate::store::{Mark, MarkKind, ReleaseMark, SourceMessage};

/// The requests for one replication.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Requests {
    /// Copying is paused.
    pub(super) paused: bool,
    /// A held replication may try again.
    pub(super) release: Option<Release>,
    /// Both streams are to be compared: revision and value of the mark.
    pub(super) verify: Option<(u64, Bytes)>,
}

/// What a held replication may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Release {
    /// Revision of the mark: a newer one is news.
    pub(super) revision: u64,
    /// The message to skip; without one the replication just tries again.
    pub(super) skip: Option<SourceMessage>,
}

impl Requests {
    /// Applies a mark that was put or removed.
    pub(super) fn apply(&mut self, mark: &Mark) {
        match mark.kind {
            MarkKind::Paused => self.paused = mark.value.is_some(),
            MarkKind::Release => {
                let release = |value: &_| Release { revision: mark.revision, skip: ReleaseMark::skip_in(value) };
                self.release = mark.value.as_deref().map(release);
            }
            MarkKind::Verify => self.verify = mark.value.clone().map(|value| (mark.revision, value)),
            MarkKind::Valid | MarkKind::Streams => {}
        }
    }

    /// Removes the request of a kind: its mark no longer exists.
    pub(super) fn remove(&mut self, kind: MarkKind) {
        match kind {
            MarkKind::Paused => self.paused = false,
            MarkKind::Release => self.release = None,
            MarkKind::Verify => self.verify = None,
            MarkKind::Valid | MarkKind::Streams => {}
        }
    }

    /// Whether there is a request of this kind.
    pub(super) fn has(&self, kind: MarkKind) -> bool {
        match kind {
            MarkKind::Paused => self.paused,
            MarkKind::Release => self.release.is_some(),
            MarkKind::Verify => self.verify.is_some(),
            MarkKind::Valid | MarkKind::Streams => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_value_pauses_and_releases() {
        let mut requests = Requests::default();
        let mark = |kind, revision, value: Option<&'static str>| Mark {
            id: "A".to_owned(),
            kind,
            revision,
            value: value.map(|value| value.as_bytes().into()),
        };
        for garbage in ["", "{", "no"] {
            requests.apply(&mark(MarkKind::Paused, 1, Some(garbage)));
            assert!(requests.paused, "{garbage}");
            requests.apply(&mark(MarkKind::Release, 2, Some(garbage)));
            assert_eq!(requests.release, Some(Release { revision: 2, skip: None }), "{garbage}");
            requests.apply(&mark(MarkKind::Paused, 3, None));
            requests.apply(&mark(MarkKind::Release, 4, None));
            assert_eq!(requests, Requests::default());
        }
    }
}
