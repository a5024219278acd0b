//! The command line.

mod admin;
mod apply;
mod check;
mod config;
mod connection;
mod containers;
mod edit;
mod events;
mod generate;
mod install;
mod packages;
mod status;
mod steer;
