//! What a document says that is right and changes nothing, or not what one might think.

use super::{Document, text};

/// One sentence each, to be logged once.
pub(super) fn notices(document: &Document) -> Vec<String> {
    let mut notices = Vec::new();
    if document.target_initiated == Some(true) {
        notices.push(
            "`target_initiated` puts our provenance before that of earlier hops, and has no other effect: the copy is equally \
             fast from either side"
                .to_owned(),
        );
    }
    if document.ephemeral == Some(true) {
        notices.push("`ephemeral` has no effect: every copy resumes where it stopped".to_owned());
    }
    notices.extend(incomplete_sampling(document));
    notices
}

/// What a document says of sampling that changes nothing. Choria's replicator takes it and copies everything.
fn incomplete_sampling(document: &Document) -> Option<String> {
    let mode = [
        ("inspect_field", text(&document.inspect_field).is_some()),
        ("inspect_header", text(&document.inspect_header).is_some()),
        ("inspect_subject_token", document.inspect_subject_token.is_some_and(|token| token != 0)),
    ];
    let mode = mode.into_iter().find(|(_, set)| *set);
    let others = [
        ("inspect_duration", text(&document.inspect_duration).is_some()),
        ("warn_duration", text(&document.warn_duration).is_some()),
        ("size_trigger", document.size_trigger.is_some_and(|bytes| bytes > 0)),
        ("inspect_force_field", text(&document.inspect_force_field).is_some()),
        ("advisory", document.advisory.is_some()),
        ("compat", text(&document.compat).is_some()),
    ];
    match (mode, others.into_iter().find(|(_, set)| *set)) {
        (Some((mode, _)), _) if text(&document.inspect_duration).is_none() => {
            Some(format!("`{mode}` has no effect without `inspect_duration`: every message is copied"))
        }
        (None, Some((field, _))) => Some(format!(
            "`{field}` has no effect without `inspect_field`, `inspect_header` or `inspect_subject_token`: every message is copied"
        )),
        _ => None,
    }
}
