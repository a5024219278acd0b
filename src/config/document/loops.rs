//! What a document says of replication loops.

use super::{Checker, Document, shorten};
use crate::config::{LoopProtection, OriginTag, Problem};

impl Checker {
    /// `None` where loop protection is switched off.
    pub(super) fn loop_protection(&mut self, document: &Document, target: Option<&str>) -> Option<LoopProtection> {
        let is_on = document.loop_protection.unwrap_or(true);
        if !is_on && !document.target_origin.is_empty() {
            let message = "`target_origin` has no effect, because `loop_protection` is false".to_owned();
            self.problem("target_origin", message);
        }
        let mut target_origin = Vec::new();
        for (index, text) in document.target_origin.iter().enumerate() {
            let tag = OriginTag::parse(text, target.unwrap_or_default());
            if tag.is_none() && self.problems.iter().all(|problem| problem.path != format!("/target_origin/{index}")) {
                let message = format!(
                    "`target_origin` has `{}`: write the name of a site, or of a site and one of its replications with a blank \
                     between",
                    shorten(text)
                );
                self.problems.push(Problem::new(format!("/target_origin/{index}"), message));
            }
            target_origin.extend(tag);
        }
        is_on.then_some(LoopProtection { target_origin })
    }
}
