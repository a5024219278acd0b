//! `retry` and `skip`.
