//! The copy core on simulated servers, a simulated bucket and a simulated clock. Everything random comes from a
//! seed: a seed that fails is printed and fails again in the same way.
//!
//! `SEEDS=10000 cargo test --test sim` runs so many, `FIRST=n` begins with that one; `SEED=n` runs only it, and with
//! `RUST_LOG=debug` it tells what it does. `STOP=1` ends with the first that fails.

mod durable;
mod feed;
mod feed_plan;
mod history;
mod ingest;
mod jetstream;
mod judge;
mod keys;
mod leases;
mod life;
mod plan;
mod process;
mod run;
mod senders;
mod server;
mod stream;
mod traffic;
mod world;

use std::ops::RangeInclusive;

/// So many where nobody says how many.
const SEEDS: u64 = 300;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Those that are asked for.
fn seeds() -> RangeInclusive<u64> {
    match number("SEED") {
        Some(seed) => seed..=seed,
        None => {
            let first = number("FIRST").unwrap_or(1);
            first..=first + number("SEEDS").unwrap_or(SEEDS) - 1
        }
    }
}

/// Tells what happens, where that is asked for.
fn trace() {
    if std::env::var_os("RUST_LOG").is_some() {
        let subscriber = tracing_subscriber::fmt().with_env_filter(tracing_subscriber::EnvFilter::from_default_env());
        // An error means that another test was faster.
        let _ = subscriber.try_init();
    }
}

#[test]
fn guarantees_hold_whatever_happens() {
    trace();
    let (mut failed, mut slowest) = (Vec::new(), (0.0, 0));
    for seed in seeds() {
        match run::run(seed) {
            Ok(told) => {
                let share = told.took.as_secs_f64() / told.limit.as_secs_f64();
                slowest = if share > slowest.0 { (share, seed) } else { slowest };
            }
            Err(error) => {
                println!("{error}\n");
                failed.push(seed);
                if std::env::var_os("STOP").is_some() {
                    break;
                }
            }
        }
    }
    println!("seed {} took {:.0} % of the time it had", slowest.1, slowest.0 * 100.0);
    assert!(failed.is_empty(), "seeds that fail: {failed:?}");
}

#[test]
fn feeds_are_exact_whatever_happens() {
    trace();
    let (mut failed, mut slowest) = (Vec::new(), (std::time::Duration::ZERO, 0));
    for seed in seeds() {
        match feed::run(seed) {
            Ok(took) => slowest = slowest.max((took, seed)),
            Err(error) => {
                println!("{error}\n");
                failed.push(seed);
                if std::env::var_os("STOP").is_some() {
                    break;
                }
            }
        }
    }
    println!("seed {} took {:?} until all was right", slowest.1, slowest.0);
    assert!(failed.is_empty(), "seeds that fail: {failed:?}");
}

/// Runs these seeds by a plan of a feed; the longest time that one took until all was right.
fn feeds(seeds: RangeInclusive<u64>, plan: impl Fn(&world::World) -> feed_plan::FeedPlan) -> std::time::Duration {
    trace();
    let run = |seed| feed::run_plan(seed, &plan).unwrap_or_else(|error| panic!("{error}"));
    seeds.map(run).max().unwrap_or_default()
}

#[test]
fn a_durable_consumer_is_fed_as_soon_as_the_feed_is_back() {
    let took = feeds(1..=40, feed_plan::FeedPlan::away);
    let late = took.saturating_sub(feed_plan::BACK_AFTER);
    assert!(late < std::time::Duration::from_secs(12), "seed 1 to 40: one was right {late:?} after the feed was back");
}

#[test]
fn what_no_consumer_takes_is_not_refused() {
    feeds(370..=370, feed_plan::FeedPlan::draw);
}

#[test]
fn a_feed_samples_the_same_over_crashes() {
    feeds(1..=60, feed_plan::FeedPlan::sampled);
}

#[test]
fn what_a_target_refuses_is_settled_one_by_one() {
    feeds(1..=40, feed_plan::FeedPlan::rejects);
}

#[test]
fn what_a_broken_connection_took_away_is_not_refused() {
    feeds(1..=60, feed_plan::FeedPlan::cut);
}

#[test]
fn a_new_leader_of_the_target_is_fed_nothing_twice() {
    feeds(1..=100, feed_plan::FeedPlan::elected);
}

#[test]
fn a_seed_gives_the_same_run_to_the_byte() {
    for seed in 1..=20 {
        assert_eq!(run::run(seed).expect("a run"), run::run(seed).expect("a run"), "seed {seed}");
    }
}

#[test]
fn lost_copies_that_a_batch_confirmed_are_copied_again() {
    for seed in 1..=200 {
        run::run_plan(seed, plan::Plan::forgetting).unwrap_or_else(|error| panic!("{error}"));
    }
}

#[test]
fn a_killed_reader_takes_nothing_with_it() {
    for seed in 1..=40 {
        run::run_plan(seed, plan::Plan::killed).unwrap_or_else(|error| panic!("{error}"));
    }
}

#[test]
fn a_clock_that_is_set_back_makes_no_message_older() {
    run::run(330_724).unwrap_or_else(|error| panic!("{error}"));
    for seed in 1..=60 {
        run::run_plan(seed, plan::Plan::set_back).unwrap_or_else(|error| panic!("{error}"));
    }
}

#[test]
fn a_clock_that_is_set_back_is_no_loss_of_the_source() {
    run::run(219_338).unwrap_or_else(|error| panic!("{error}"));
    for seed in 1..=60 {
        run::run_plan(seed, plan::Plan::set_back_queue).unwrap_or_else(|error| panic!("{error}"));
    }
}

#[test]
fn a_batch_of_known_messages_is_no_loss_of_the_target() {
    for seed in 1..=60 {
        run::run_plan(seed, plan::Plan::replaced).unwrap_or_else(|error| panic!("{error}"));
    }
}

#[test]
fn a_chain_over_holes_proves_only_its_own_messages() {
    for seed in 1..=100 {
        run::run_plan(seed, plan::Plan::holes).unwrap_or_else(|error| panic!("{error}"));
    }
}

#[test]
fn records_of_senders_are_not_ahead_of_the_saved_position() {
    for seed in 1..=200 {
        run::run_plan(seed, plan::Plan::unsaved_records).unwrap_or_else(|error| panic!("{error}"));
    }
}

#[test]
fn a_source_that_shrinks_under_its_consumer_is_noticed() {
    for seed in 1..=10 {
        run::run_plan(seed, plan::Plan::shrinking).unwrap_or_else(|error| panic!("{error}"));
    }
}

#[test]
fn a_target_that_is_deleted_had_what_replaced_a_message() {
    run::run(36_841).unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn a_copy_without_a_record_may_be_a_dead_letter() {
    // One is copied again that was skipped, and one is acknowledged of which the record says that it was seen.
    for seed in [27_440, 27_015] {
        run::run(seed).unwrap_or_else(|error| panic!("{error}"));
    }
}

#[test]
fn acks_of_messages_that_are_gone_prove_nothing() {
    run::run(26_377).unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn a_consumer_that_is_recreated_reads_again_what_sampling_needs() {
    run::run(100_540).unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn copies_that_were_found_wait_for_the_saved_position() {
    run::run(93_726).unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn a_copy_of_a_forgotten_sender_counts_when_it_is_read_again() {
    run::run(143_564).unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn a_mute_consumer_makes_no_sender_unseen() {
    run::run(57_173).unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn a_durable_that_its_stream_outgrew_is_recreated() {
    // It passes over new messages of an interest stream, or takes one that another subject has for one of its own.
    for seed in [41_373, 74_030, 45_546] {
        run::run(seed).unwrap_or_else(|error| panic!("{error}"));
    }
}

#[test]
fn acks_of_a_durable_that_its_stream_outgrew_prove_nothing() {
    for seed in [160_073, 170_559] {
        run::run(seed).unwrap_or_else(|error| panic!("{error}"));
    }
}

#[test]
fn what_is_sent_again_gets_an_ack_of_its_own() {
    for seed in [168_628, 202_620, 225_513] {
        run::run(seed).unwrap_or_else(|error| panic!("{error}"));
    }
}

#[test]
fn a_left_keeper_that_begins_too_late_keeps_nothing() {
    run::run(133_206).unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn a_target_that_was_refilled_is_another_one() {
    run::run(41_671).unwrap_or_else(|error| panic!("{error}"));
}
