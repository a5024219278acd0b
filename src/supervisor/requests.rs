//! What people asked of one replication beside its document, as last heard. Pure.

use crate::store::{Mark, MarkKind, ReleaseMark, SourceMessage};

/// The marks of one replication.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Marks {
    /// Nothing may be copied.
    pub(super) paused: bool,
    /// A held replication may go on.
    pub(super) release: Option<Release>,
}

/// What a held replication may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Release {
    /// Revision of the mark: a newer one is news.
    pub(super) revision: u64,
    /// The message to leave out; without one it is just tried again.
    pub(super) skip: Option<SourceMessage>,
}

impl Marks {
    /// Takes over a mark that was put or removed.
    pub(super) fn apply(&mut self, mark: &Mark) {
        match mark.kind {
            MarkKind::Paused => self.paused = mark.value.is_some(),
            MarkKind::Release => {
                let release = |value: &_| Release { revision: mark.revision, skip: ReleaseMark::skip_in(value) };
                self.release = mark.value.as_deref().map(release);
            }
            MarkKind::Valid => {}
        }
    }

    /// Takes back every mark of a kind: it is not there any more.
    pub(super) fn remove(&mut self, kind: MarkKind) {
        match kind {
            MarkKind::Paused => self.paused = false,
            MarkKind::Release => self.release = None,
            MarkKind::Valid => {}
        }
    }

    /// Whether the mark of this kind is there.
    pub(super) fn has(&self, kind: MarkKind) -> bool {
        match kind {
            MarkKind::Paused => self.paused,
            MarkKind::Release => self.release.is_some(),
            MarkKind::Valid => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_value_pauses_and_releases() {
        let mut marks = Marks::default();
        let mark = |kind, revision, value: Option<&'static str>| Mark {
            id: "A".to_owned(),
            kind,
            revision,
            value: value.map(|value| value.as_bytes().into()),
        };
        for garbage in ["", "{", "no"] {
            marks.apply(&mark(MarkKind::Paused, 1, Some(garbage)));
            assert!(marks.paused, "{garbage}");
            marks.apply(&mark(MarkKind::Release, 2, Some(garbage)));
            assert_eq!(marks.release, Some(Release { revision: 2, skip: None }), "{garbage}");
            marks.apply(&mark(MarkKind::Paused, 3, None));
            marks.apply(&mark(MarkKind::Release, 4, None));
            assert_eq!(marks, Marks::default());
        }
    }
}
