//! The service over NATS: requests, documents, events, heartbeats.

mod adapter_logins;
mod adapters;
mod allow;
mod config;
mod configuration;
mod deleted_and_added;
mod docs;
mod events;
mod hand_edits;
mod heartbeats;
mod heartbeats_choria;
mod instances;
mod links;
mod monitoring;
mod own_buckets;
mod pause;
mod position;
mod process;
mod release;
mod schemas;
mod secrets;
mod service;
mod stream_patterns;
mod validate;
mod validate_bridge;
mod written_json;
