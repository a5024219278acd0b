//! Memory, scale, response times, random input.

mod fuzz_twins;
mod memory;
mod page;
mod properties;
mod random_requests;
mod response_times;
mod scale;
