//! Where a copy resumes, what it reports, and what it survives.

mod addresses;
mod consumers;
mod going_back;
mod headroom;
mod hostile;
mod loops;
mod positions_unsaved;
mod resume;
mod states;
