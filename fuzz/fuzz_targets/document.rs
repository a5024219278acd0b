//! Any bytes are accepted as a document or refused with an error: `cargo +nightly fuzz run document`.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../tests/it/limits/properties.rs"]
#[allow(dead_code, reason = "each target uses a part of it")]
mod properties;

fuzz_target!(|bytes: &[u8]| properties::document(bytes));
