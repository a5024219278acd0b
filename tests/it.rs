//! The integration tests: one binary, real nats-servers, the real service.

#[path = "harness/mod.rs"]
mod harness;

#[path = "it/control_config.rs"]
mod control_config;
#[path = "it/control_service.rs"]
mod control_service;
#[path = "it/events.rs"]
mod events;
#[path = "it/fuzz_twins.rs"]
mod fuzz_twins;
#[path = "it/hand_edits.rs"]
mod hand_edits;
#[path = "it/harness_self.rs"]
mod harness_self;
#[path = "it/process.rs"]
mod process;
#[path = "it/properties.rs"]
mod properties;
#[path = "it/random_requests.rs"]
mod random_requests;
#[path = "it/response_times.rs"]
mod response_times;
#[path = "it/resume.rs"]
mod resume;
#[path = "it/scale.rs"]
mod scale;
#[path = "it/secrets.rs"]
mod secrets;
#[path = "it/wire_auth.rs"]
mod wire_auth;
#[path = "it/wire_faults.rs"]
mod wire_faults;
#[path = "it/wire_fidelity.rs"]
mod wire_fidelity;
#[path = "it/wire_kv.rs"]
mod wire_kv;
#[path = "it/wire_limits.rs"]
mod wire_limits;
