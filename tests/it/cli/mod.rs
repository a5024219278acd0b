//! The command line.

mod admin;
mod apply;
mod check;
mod config;
mod connection;
mod containers;
mod doc_commands;
mod doctor;
mod edit;
mod events;
mod generate;
mod install;
mod nats_tool;
mod packages;
mod status;
mod steer;
mod top;
