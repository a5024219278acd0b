//! Several instances: leases, failover, faults of all kinds at once.

mod bucket_settings;
mod buckets_vanish;
mod chaos;
mod cut_off;
mod leases;
mod lost_buckets;
mod site_name;
mod stepdown;
mod wrong_clock;
