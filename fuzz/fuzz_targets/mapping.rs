//! Subjects are mapped as a second, naive implementation has it: `cargo +nightly fuzz run mapping`.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../tests/it/properties.rs"]
#[allow(dead_code, reason = "each target uses a part of it")]
mod properties;

fuzz_target!(|texts: (String, String, String)| {
    let (prefix, remove, subject) = texts;
    properties::mapping(&prefix, &remove, &subject);
});
