//! The protocol parser must take any bytes, in any pieces, and so must the writer and the readers that use it:
//! `cargo +nightly fuzz run parser`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nats_lane::parser::parse;

#[path = "../../tests/it/limits/properties.rs"]
#[allow(dead_code, reason = "each target uses a part of it")]
mod properties;

fuzz_target!(|input: (Vec<u8>, u16)| {
    let (bytes, cut) = input;
    properties::wire(&bytes);
    let (mut frames, mut controls) = (Vec::new(), Vec::new());
    let whole = parse(&bytes, &mut frames, &mut controls);
    for frame in &frames {
        for span in [frame.subject, frame.reply, frame.header, frame.payload] {
            assert_eq!(span.of(&bytes).len(), span.len());
        }
    }
    // Two pieces give what the whole gives.
    let cut = usize::from(cut).min(bytes.len());
    let (mut first, mut rest) = (Vec::new(), Vec::new());
    let (mut first_controls, mut rest_controls) = (Vec::new(), Vec::new());
    if let Ok(parsed) = parse(&bytes[..cut], &mut first, &mut first_controls) {
        assert!(parsed.consumed <= cut);
        if let (Ok(whole), Ok(second)) = (whole, parse(&bytes[parsed.consumed..], &mut rest, &mut rest_controls)) {
            assert_eq!(whole.consumed, parsed.consumed + second.consumed);
            assert_eq!(frames.len(), first.len() + rest.len());
            first_controls.extend(rest_controls);
            assert_eq!(controls, first_controls);
        }
    }
});
