//! Any text is accepted as a URL or refused with an error, and no password is shown: `cargo +nightly fuzz run url`.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../tests/it/limits/properties.rs"]
#[allow(dead_code, reason = "each target uses a part of it")]
mod properties;

fuzz_target!(|texts: (String, String, String)| {
    let (first, second, third) = texts;
    properties::url(&first);
    properties::secret_url(&first, &second, &third);
});
