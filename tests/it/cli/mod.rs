//! The command line.

mod admin;
mod apply;
mod config;
mod connection;
mod edit;
mod events;
mod generate;
mod status;
mod steer;
