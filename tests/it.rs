//! The integration tests: one binary, real nats-servers, the real service.

#[path = "harness/mod.rs"]
mod harness;

#[path = "it/advisories.rs"]
mod advisories;
#[path = "it/buckets_vanish.rs"]
mod buckets_vanish;
#[path = "it/chaos.rs"]
mod chaos;
#[path = "it/cli_admin.rs"]
mod cli_admin;
#[path = "it/cli_apply.rs"]
mod cli_apply;
#[path = "it/cli_config.rs"]
mod cli_config;
#[path = "it/cli_connection.rs"]
mod cli_connection;
#[path = "it/cli_edit.rs"]
mod cli_edit;
#[path = "it/cli_events.rs"]
mod cli_events;
#[path = "it/cli_generate.rs"]
mod cli_generate;
#[path = "it/cli_status.rs"]
mod cli_status;
#[path = "it/cli_steer.rs"]
mod cli_steer;
#[path = "it/configuration.rs"]
mod configuration;
#[path = "it/consumers.rs"]
mod consumers;
#[path = "it/control_allow.rs"]
mod control_allow;
#[path = "it/control_config.rs"]
mod control_config;
#[path = "it/control_instances.rs"]
mod control_instances;
#[path = "it/control_pause.rs"]
mod control_pause;
#[path = "it/control_position.rs"]
mod control_position;
#[path = "it/control_release.rs"]
mod control_release;
#[path = "it/control_service.rs"]
mod control_service;
#[path = "it/control_validate.rs"]
mod control_validate;
#[path = "it/cut_off.rs"]
mod cut_off;
#[path = "it/deleted_and_added.rs"]
mod deleted_and_added;
#[path = "it/docs.rs"]
mod docs;
#[path = "it/events.rs"]
mod events;
#[path = "it/fuzz_twins.rs"]
mod fuzz_twins;
#[path = "it/going_back.rs"]
mod going_back;
#[path = "it/hand_edits.rs"]
mod hand_edits;
#[path = "it/harness_self.rs"]
mod harness_self;
#[path = "it/headroom.rs"]
mod headroom;
#[path = "it/heartbeats.rs"]
mod heartbeats;
#[path = "it/heartbeats_choria.rs"]
mod heartbeats_choria;
#[path = "it/hostile.rs"]
mod hostile;
#[path = "it/leases.rs"]
mod leases;
#[path = "it/loops.rs"]
mod loops;
#[path = "it/memory.rs"]
mod memory;
#[path = "it/own_buckets.rs"]
mod own_buckets;
#[path = "it/positions_unsaved.rs"]
mod positions_unsaved;
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
#[path = "it/schemas.rs"]
mod schemas;
#[path = "it/secrets.rs"]
mod secrets;
#[path = "it/site_name.rs"]
mod site_name;
#[path = "it/states.rs"]
mod states;
#[path = "it/stepdown.rs"]
mod stepdown;
#[path = "it/wire_acks.rs"]
mod wire_acks;
#[path = "it/wire_auth.rs"]
mod wire_auth;
#[path = "it/wire_clock.rs"]
mod wire_clock;
#[path = "it/wire_clusters.rs"]
mod wire_clusters;
#[path = "it/wire_connections.rs"]
mod wire_connections;
#[path = "it/wire_durable.rs"]
mod wire_durable;
#[path = "it/wire_election.rs"]
mod wire_election;
#[path = "it/wire_faults.rs"]
mod wire_faults;
#[path = "it/wire_fidelity.rs"]
mod wire_fidelity;
#[path = "it/wire_foreign_durable.rs"]
mod wire_foreign_durable;
#[path = "it/wire_holds.rs"]
mod wire_holds;
#[path = "it/wire_kinds.rs"]
mod wire_kinds;
#[path = "it/wire_kv.rs"]
mod wire_kv;
#[path = "it/wire_limits.rs"]
mod wire_limits;
#[path = "it/wire_logins.rs"]
mod wire_logins;
#[path = "it/wire_networks.rs"]
mod wire_networks;
#[path = "it/wire_objects.rs"]
mod wire_objects;
#[path = "it/wire_order.rs"]
mod wire_order;
#[path = "it/wire_quotas.rs"]
mod wire_quotas;
#[path = "it/wire_rates.rs"]
mod wire_rates;
#[path = "it/wire_refusals.rs"]
mod wire_refusals;
#[path = "it/wire_rejects.rs"]
mod wire_rejects;
#[path = "it/wire_sampling.rs"]
mod wire_sampling;
#[path = "it/wire_scope.rs"]
mod wire_scope;
#[path = "it/wire_search.rs"]
mod wire_search;
#[path = "it/wire_second_stream.rs"]
mod wire_second_stream;
#[path = "it/wire_senders.rs"]
mod wire_senders;
#[path = "it/wire_shared.rs"]
mod wire_shared;
#[path = "it/wire_slow.rs"]
mod wire_slow;
#[path = "it/wire_slow_reads.rs"]
mod wire_slow_reads;
#[path = "it/wire_source_back.rs"]
mod wire_source_back;
#[path = "it/wire_source_headers.rs"]
mod wire_source_headers;
#[path = "it/wire_source_loss.rs"]
mod wire_source_loss;
#[path = "it/wire_stalls.rs"]
mod wire_stalls;
#[path = "it/wire_subjects.rs"]
mod wire_subjects;
#[path = "it/wire_target_limits.rs"]
mod wire_target_limits;
#[path = "it/wire_target_subjects.rs"]
mod wire_target_subjects;
#[path = "it/wire_target_update.rs"]
mod wire_target_update;
#[path = "it/written_json.rs"]
mod written_json;
