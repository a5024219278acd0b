//! `position`.
