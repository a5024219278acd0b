//! Documents that cannot run: each is reported once, and the document that runs instead is kept.

use bytes::Bytes;
use tracing::{error, warn};

use super::{
    context::Context,
    desired::{RejectedDocument, RunnableDocument},
};
use crate::{config::Problems, events::Event, store::MarkKind};

/// Reports and keeps documents of one replication.
#[derive(Default)]
pub(super) struct RefusedDocuments {
    /// What was reported last, unless that is over: revision and problems. Problems of a link come with the same revision.
    reported: Option<(u64, Problems)>,
    /// The document that was kept last.
    kept: Option<Bytes>,
}

impl RefusedDocuments {
    /// Keeps the document that runs while newer ones cannot: after many of these, the history of the bucket loses it.
    pub(super) fn keep(&mut self, context: &Context, work: &RunnableDocument, rejected: Option<&RejectedDocument>) {
        if rejected.is_none() || self.kept.as_ref() == Some(&work.document) {
            return;
        }
        self.kept = Some(work.document.clone());
        let (context, document) = (context.clone(), work.document.clone());
        // In a task of its own: it must not block the copy.
        tokio::spawn(async move {
            if let Err(error) = context.deps.config.mark(&context.id, MarkKind::Valid, document).await {
                warn!(replication = context.id, "the newest valid document was not kept: {error}");
            }
        });
    }

    /// The newest document can run: what was reported is over.
    pub(super) fn accept(&mut self, context: &Context) {
        self.reported = None;
        context.cell.accepted();
    }

    /// Reports, once, why a document does not run.
    pub(super) fn report(&mut self, context: &Context, rejected: Option<RejectedDocument>) {
        let Some(rejected) = rejected else { return };
        let news = (rejected.revision, rejected.problems.clone());
        if self.reported.as_ref() == Some(&news) {
            return;
        }
        self.reported = Some(news);
        let message = rejected.message();
        error!(replication = context.id, "document refused: {message}");
        context.cell.rejected(&message);
        context.emit(Event::ConfigRejected { revision: rejected.revision, problems: rejected.problems.0 });
    }
}
