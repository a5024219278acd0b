//! What is sent to the source: messages of all kinds, and what their copies have to look like.

use std::sync::{Arc, atomic::Ordering};

use tokio::time::{Instant, sleep, sleep_until};

use super::{
    plan::Fault,
    run::{LARGE, Scene},
    world::Host,
};

/// A time to live; its copy's is less by the age of the message.
pub const LIFE: &str = "Nats-TTL: 1h\r\n";
/// Header lines as they are sent, and as they have to arrive: by the rules of the documents, on a target that takes
/// neither lives nor rollups.
const LINES: [(&str, &str); 12] = [
    ("Plain: a\r\nPlain: b\r\n", "Plain: a\r\nPlain: b\r\n"),
    ("x-odd:no blank\r\nX-Odd:  two  \r\n", "x-odd:no blank\r\nX-Odd:  two  \r\n"),
    ("no colon at all\r\n", "no colon at all\r\n"),
    ("Nats-Msg-Id: of the source\r\n", "Choria-SR-Msg-Id: of the source\r\n"),
    ("Nats-Expected-Last-Sequence: 7\r\n", ""),
    ("Nats-Expected-Last-Msg-Id: x\r\n", ""),
    (LIFE, ""),
    ("Nats-Rollup: sub\r\n", ""),
    ("Nats-Stream-Source: A\r\n", "Choria-SR-Nats-Stream-Source: A\r\n"),
    ("Nats-Schedule-Next: purge\r\n", "Choria-SR-Nats-Schedule-Next: purge\r\n"),
    ("KV-Operation: DEL\r\n", "KV-Operation: DEL\r\n"),
    ("Choria-SR-Source: X 1 OTHER OTHER 5\r\n", "Choria-SR-Source: X 1 OTHER OTHER 5\r\n"),
];
/// What came through this replication before is not copied again.
const OURS: &str = "Choria-SR-Source: S 5 SITE SITE 123\r\n";

/// Sends the messages of the plan.
pub async fn publish(scene: Arc<Scene>) {
    let world = &scene.world;
    let loops = !scene.plan.has(|fault| matches!(fault, Fault::Purge(_)));
    let mut number = 0;
    for (at, messages) in scene.plan.bursts.clone() {
        sleep_until(Instant::now() + at.saturating_sub(world.elapsed())).await;
        for _ in 0..messages {
            number += 1;
            let (mut sent, mut lines) = (String::new(), String::new());
            if world.once_in(3) {
                for _ in 0..world.between(1, 3) {
                    let (one, other) = LINES[world.between(0, LINES.len() as u64 - 1) as usize];
                    // The first id stays, others go.
                    if !sent.contains(one) {
                        sent.push_str(one);
                        lines.push_str(if one == LIFE && scene.plan.lives { LIFE } else { other });
                    }
                }
            }
            let passed = loops && world.once_in(100);
            if passed {
                sent.push_str(OURS);
            }
            let header = if sent.is_empty() { String::new() } else { format!("NATS/1.0\r\n{sent}\r\n") };
            let mut payload = format!("{number} \r\n\0").into_bytes();
            let poison = scene.plan.poison.is_some() && world.once_in(100);
            let size = |more: u64| payload.len() + more as usize * if number % 7 == 0 { scene.plan.large } else { 1 };
            payload.resize(if poison { LARGE + 1 } else { size(world.between(0, 100)) }, 255);
            // No two at the same time.
            let time_ns = world.now_ns(Host::Source) + number + 1_000_000 * scene.cuts.load(Ordering::Relaxed) as i64;
            scene.source.with("S", |stream| {
                stream.store(&format!("s.{}", number % scene.plan.senders), header.as_bytes(), &payload, time_ns);
                scene.history().sent(stream, &lines, passed);
            });
            if world.once_in(20) {
                sleep(world.millis(0, 50)).await;
            }
        }
    }
}

/// Another replication of the site writes into the same target: the same sequences of the same stream, under another name.
pub async fn neighbour(scene: Arc<Scene>) {
    let (world, mut number) = (&scene.world, 0);
    for (at, messages) in scene.plan.neighbour.clone() {
        sleep_until(Instant::now() + at.saturating_sub(world.elapsed())).await;
        for _ in 0..messages {
            number += 1;
            let (time_ms, now_ns) = (world.now_ns(Host::Source) / 1_000_000, world.now_ns(Host::Target));
            let header = format!(
                "NATS/1.0\r\nNats-Msg-Id: {number:032x}\r\nChoria-SR-Source: S {number} SITE OTHER {time_ms}\r\n\r\n"
            );
            // Refused while the target is full.
            scene.target.with("T", |stream| _ = stream.publish("t.other", header.as_bytes(), b"other", now_ns));
        }
    }
}
