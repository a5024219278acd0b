//! The begin of a run: reports and saves before anything is sent.

use nats_lane::jetstream::StreamInfo;
use tokio::time::{Duration, Instant};
use tracing::info;

use super::Run;
use crate::{
    copy::{
        Error,
        flow::position::PositionWriter,
        resume::{Resume, is_consumed},
        source::gap::Gaps,
        target::dedup_window::IdWindowCheck,
    },
    events::Event,
};

impl Run<'_> {
    /// Reports where the run resumes and the findings on the way there. A position that `goes_back` is saved at once.
    pub(in crate::copy) async fn begin(
        &mut self,
        target: &StreamInfo,
        resume: Resume,
        goes_back: bool,
        positions: &mut PositionWriter,
    ) -> Result<(), Error> {
        let now = self.times.began;
        self.report.knows_saves(positions);
        self.bounds.limit = self.report.copy_limit(positions, now);
        self.source_says(self.source.info.clone(), now)?;
        self.remembered(target, resume.unseen, positions);
        self.resumed(resume, positions);
        if goes_back {
            // Reported now, and saved before anything is sent: where few messages of a subject are kept, a message that
            // is copied again replaces the one that would show the next start that the saved target sequence is no
            // longer valid.
            positions.save_now(self.witnesses(), self.report.row()).await?;
        }
        Ok(())
    }

    /// Reports, once per start, that the target may forget ids too soon.
    fn remembered(&mut self, target: &StreamInfo, unseen: u64, positions: &mut PositionWriter) {
        if !self.target.writer.relies_on_ids() || std::mem::replace(&mut positions.window_reported, true) {
            return;
        }
        let window = Duration::from_nanos(target.number("duplicate_window").unsigned_abs());
        let unseen = if is_consumed(target) { unseen } else { 0 };
        let now = self.source.clock.now(Instant::now());
        let look = IdWindowCheck { window, unseen, saved_at: positions.record().saved_at, now };
        for event in [look.short_window(), look.long_downtime()].into_iter().flatten() {
            self.report.found(event);
        }
    }

    /// Reports where the run resumes and the findings on the way there.
    fn resumed(&mut self, resume: Resume, positions: &mut PositionWriter) {
        self.explain(std::mem::take(&mut positions.gaps), &resume);
        for event in resume.findings {
            if matches!(event, Event::TargetShared { .. }) {
                positions.chain_explained();
            }
            self.report.found(event);
        }
        info!(
            replication = self.report.replication.id,
            source_seq = resume.position.seq,
            target_seq = self.target.writer.last_seq(),
            transport = ?self.report.copy.transport,
            target_mode = ?self.report.copy.target_mode,
            stored_already = resume.already.len(),
            "copying"
        );
        self.target.known_to = resume.already.last();
        self.target.already = resume.already;
        self.bounds.window.limit_target(self.target.limit());
    }

    /// Reports the gaps that the run before could not explain: it ended before the source had answered.
    fn explain(&mut self, mut gaps: Gaps, resume: &Resume) {
        if resume.findings.iter().any(|finding| matches!(finding, Event::SourceReset { .. })) {
            return;
        }
        let told =
            |seq| matches!(resume.findings.last(), Some(Event::Gap { from, to, .. }) if (*from..=*to).contains(&seq));
        gaps.left_over(resume.position.seq, told);
        for (from, to) in gaps.first_is(self.source.reported_first) {
            self.report.found(Event::Gap { from, to, messages: to - from + 1 });
        }
    }
}
