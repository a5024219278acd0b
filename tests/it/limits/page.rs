//! The status page with a thousand replications: what it transfers, what it keeps in the browser, and how it scrolls.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures_util::{StreamExt, stream};
use serde_json::{Value, json};
use tokio::time::{MissedTickBehavior, interval};

use super::scale::{all_run, fill, stream_name};
use crate::control::browser::Browser;
use crate::control::page::{IN_ORDER, Viewer, get, opened};
use crate::harness::process::{machine_cpu_seconds, own_cpu_seconds};
use crate::harness::{Site, connect};

const THOUSAND: usize = 1_000;
/// Files and everything about a thousand replications, as they are sent.
const TRANSFERRED: usize = 300 << 10;

/// How long the CPU time is measured.
const WATCHED: Duration = Duration::from_secs(10);
const EVENTS: usize = 200_000;

/// Scrolls through all rows in 5 s; frames, the longest in ms, those that took longer than two frames at 60 Hz, and the most rows
/// that were in the document.
const SCROLL: &str = "new Promise(resolve => {
    const times = [], end = document.documentElement.scrollHeight - innerHeight, from = performance.now();
    let rows = 0;
    const step = now => {
        times.push(now);
        rows = Math.max(rows, document.querySelectorAll('#rows tr').length);
        scrollTo(0, end * Math.min(1, (now - from) / 5000));
        if (now - from < 5000) return requestAnimationFrame(step);
        const took = times.slice(1).map((time, at) => time - times[at]);
        resolve({frames: took.length, seconds: (times[times.length - 1] - times[0]) / 1000, longest: Math.max(...took),
            late: took.filter(time => time > 33.4).length, rows});
    };
    requestAnimationFrame(step);
})";

/// How often a tenth of the replications gets messages.
const UPDATED_EVERY: Duration = Duration::from_millis(500);
/// Rounds of scrolling; one that others disturb does not count alone.
const ROUNDS: usize = 5;
/// CPU time of the page's main thread for one frame, in ms, in the middle of all: half of what a frame at 60 Hz has.
const FRAME_WORK: f64 = 16.7 / 2.0;

/// Categories of what the browser traces of frames.
const FRAMES: [&str; 5] = [
    "devtools.timeline",
    "devtools.timeline.frame",
    "disabled-by-default-devtools.timeline",
    "disabled-by-default-devtools.timeline.frame",
    "cc",
];

/// CPU time of the page's main thread for each frame of a trace, in ms and sorted, and what most of it is for. It is the page's own
/// cost, whatever else the machine does; drawing pixels is not part of it.
fn main_thread(traced: &[Value]) -> Result<(Vec<f64>, String)> {
    const PARTS: [&str; 7] =
        ["FunctionCall", "FireAnimationFrame", "UpdateLayoutTree", "Layout", "PrePaint", "Paint", "Layerize"];
    let thread = |event: &Value| (event["pid"].as_u64(), event["tid"].as_u64());
    let frame = traced.iter().find(|event| event["name"] == "FireAnimationFrame").context("no frame was traced")?;
    let own: Vec<&Value> = traced.iter().filter(|event| thread(event) == thread(frame)).collect();
    let mut starts: Vec<f64> = Vec::new();
    for event in own.iter().filter(|event| event["name"] == "FireAnimationFrame") {
        let at = event["ts"].as_f64().context("ts")?;
        // A frame may have several callbacks.
        if starts.last().is_none_or(|last| at - last > 4_000.0) {
            starts.push(at);
        }
    }
    let mut work = vec![0.0; starts.len()];
    for task in own.iter().filter(|event| event["name"] == "RunTask") {
        let (Some(at), Some(took)) = (task["ts"].as_f64(), task["dur"].as_f64()) else { continue };
        let frame = starts.partition_point(|start| *start <= at + took);
        if frame > 0 {
            work[frame - 1] += task["tdur"].as_f64().unwrap_or_default() / 1e3;
        }
    }
    let part = |name: &&str| {
        let of_name = own.iter().filter(|event| event["name"] == **name);
        let all: f64 = of_name.filter_map(|event| event["tdur"].as_f64()).sum();
        format!("{name} {:.2}", all / 1e3 / starts.len() as f64)
    };
    let parts = PARTS.iter().map(part).collect::<Vec<_>>().join(", ");
    work.sort_by(f64::total_cmp);
    ensure!(work.len() > 10, "{} frames", work.len());
    Ok((work, parts))
}

fn middle(sorted: &mut [f64]) -> f64 {
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

/// The frames of a trace: drawn, dropped, and the rate of those that were drawn.
fn traced_frames(traced: &[Value]) -> Result<(f64, String)> {
    let times = |name: &str| -> Vec<f64> {
        let of_name = traced.iter().filter(|event| event["name"] == name && event["ph"] == "I");
        let mut times: Vec<_> = of_name.filter_map(|event| event["ts"].as_f64()).collect();
        times.sort_by(f64::total_cmp);
        times
    };
    let (drawn, begun, dropped) = (times("DrawFrame"), times("BeginFrame"), times("DroppedFrame"));
    let (first, last) = drawn.first().zip(drawn.last()).context("no frame was traced")?;
    let seconds = (last - first) / 1e6;
    let within = |times: &[f64]| times.iter().filter(|time| (*first..=*last).contains(time)).count();
    let longest = drawn.windows(2).map(|pair| (pair[1] - pair[0]) / 1e3).fold(0.0, f64::max);
    ensure!(drawn.len() > 10 && seconds > 1.0, "{} frames in {seconds} s", drawn.len());
    let rate = (drawn.len() - 1) as f64 / seconds;
    let text = format!(
        "trace: {} frames drawn in {seconds:.2} s = {rate:.1}/s, {} begun, {} dropped, longest time between two {longest:.1} ms",
        drawn.len(),
        within(&begun),
        within(&dropped)
    );
    Ok((rate, text))
}

#[tokio::test]
#[ignore = "takes a minute"]
async fn the_page_holds_a_thousand_replications() -> Result<()> {
    let site = Site::builder().control_at_source().args(["--monitor", "127.0.0.1:0"]).start().await?;
    fill(&site, THOUSAND).await?;
    all_run(&site, THOUSAND).await?;
    let address = site.service.monitor().await?;
    let mut transferred = 0;
    for path in ["/", "/page.css", "/page.js", "/topology.js", "/icon.svg"] {
        let (_, head, body) = get(&address, path, "").await?;
        println!("{path}: {} bytes", body.len());
        transferred += head.len() + body.len();
    }
    println!("without viewers: {:.1} % of a core", busy(&site).await * 100.0);
    events_do_not_grow_it(&site).await?;
    let viewer = Viewer::join(&address).await?;
    println!("snapshot of {THOUSAND}: {} bytes", viewer.got[0].1);
    transferred += viewer.got[0].1;
    println!("transferred: {transferred} bytes");
    ensure!(transferred < TRANSFERRED, "{transferred} bytes");
    drop(viewer);

    let Some(mut browser) = Browser::start().await? else { return Ok(()) };
    browser.look(1440, 900, "light").await?;
    opened(&mut browser, &address).await?;
    browser.until(&format!("page.rows.size === {THOUSAND}")).await?;
    println!("with one: {:.1} % of a core", busy(&site).await * 100.0);
    // A tenth of the rows changes with each update of the page. As fast as the servers can, they would take what the browser needs.
    let publishes = async {
        let mut updates = interval(UPDATED_EVERY);
        updates.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            updates.tick().await;
            let site = &site;
            let all = stream::iter(0..100).map(|index| async move { site.publish(&stream_name(index), 1..=20).await });
            all.buffer_unordered(4).collect::<Vec<_>>().await;
        }
    };
    let measured = async {
        let (mut rates, mut works) = (Vec::new(), Vec::new());
        for round in 0..ROUNDS {
            let (all, own, begun) = (machine_cpu_seconds(), own_cpu_seconds(), Instant::now());
            let (value, traced) = browser.traced(SCROLL, &FRAMES).await?;
            let took = begun.elapsed().as_secs_f64();
            let own = (own_cpu_seconds() - own) / took;
            let others = (machine_cpu_seconds() - all) / took - own;
            let number = |name: &str| value[name].as_f64().with_context(|| format!("{value}"));
            println!("round {round}: {:.1} callbacks/s, {value}", number("frames")? / number("seconds")?);
            let (rate, frames) = traced_frames(&traced)?;
            let (work, parts) = main_thread(&traced)?;
            let share = |part: usize| work[(work.len() - 1) * part / 100];
            println!("round {round}: {frames}; this test takes {own:.2} cores, others {others:.2}");
            println!(
                "round {round}: main thread, CPU ms/frame: {:.1} at 50 %, {:.1} at 95 %, {:.1} at most; {parts}",
                share(50),
                share(95),
                share(100)
            );
            rates.push(rate);
            works.push(share(50));
            ensure!(number("rows")? < 100.0, "{value}");
            // What is scrolled is put in order afterwards.
            browser.until(IN_ORDER).await?;
            browser.value("scrollTo(0, 0)").await?;
        }
        let (rate, work) = (middle(&mut rates), middle(&mut works));
        println!("middle of {ROUNDS} rounds: {rate:.1} frames/s, {work:.1} ms of the main thread for a frame");
        ensure!(work < FRAME_WORK, "{work} ms");
        browser.picture("thousand-1440-light").await?;
        let shown = browser.value("document.getElementById('count').textContent").await?;
        ensure!(shown == THOUSAND.to_string().as_str(), "{shown}");
        Ok(())
    };
    tokio::select! {
        () = publishes => Ok(()),
        result = measured => result,
    }
}

/// The part of a core that the service takes.
async fn busy(site: &Site) -> f64 {
    let (before, begun) = (site.service.usage().cpu_seconds, Instant::now());
    tokio::time::sleep(WATCHED).await;
    (site.service.usage().cpu_seconds - before) / begun.elapsed().as_secs_f64()
}

/// As many as in hours of a bad day.
async fn events_do_not_grow_it(site: &Site) -> Result<()> {
    let events = async |numbers: std::ops::Range<usize>| {
        let client = connect(&site.service_url()).await?;
        for number in numbers {
            let body = json!({"kind": "held", "replication": format!("R{number}"), "time": "2026-01-01T00:00:00Z",
                "site": "TEST", "instance": "i", "message": format!("{number:0>200}"), "id": "1",
                "type": "io.stream_replicator.event.v1.held", "timestamp": "2026-01-01T00:00:00Z"});
            client.publish(format!("replicator.event.held.R{number}"), body.to_string().into()).await?;
        }
        client.flush().await?;
        anyhow::Ok(())
    };
    events(0..EVENTS / 10).await?;
    let before = site.service.usage().rss;
    events(EVENTS / 10..EVENTS).await?;
    let after = site.service.usage().rss;
    println!("{EVENTS} events: {} KiB resident before, {} KiB after", before >> 10, after >> 10);
    ensure!(after < before + (16 << 20), "{before} {after}");
    Ok(())
}
