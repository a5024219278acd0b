//! `stream-replicator top`, on a terminal of the size that most have.

use anyhow::{Context, Result};
use rustix::process::Signal;
use serde_json::json;

use crate::harness::cli::Running;
use crate::harness::{LIMIT, Site, wait_for, wait_value};

/// What the terminal is sent when its screen is taken, and given back.
const TAKEN: &str = "\x1b[?1049h";
const GIVEN_BACK: &str = "\x1b[?1049l";

/// The lines of an 80 by 24 terminal that was sent this: positions, clearing and text; colours do not matter.
fn picture(sent: &str) -> Vec<String> {
    let mut lines = vec![vec![' '; 80]; 24];
    let (mut x, mut y) = (0, 0);
    let mut rest = sent.chars();
    while let Some(character) = rest.next() {
        if character != '\x1b' {
            if character.is_control() {
                continue;
            }
            if let Some(cell) = lines.get_mut(y).and_then(|line: &mut Vec<char>| line.get_mut(x)) {
                *cell = character;
            }
            x += 1;
            continue;
        }
        // `[`, numbers, and the letter that ends it.
        let mut sequence = String::new();
        for part in rest.by_ref() {
            sequence.push(part);
            if part.is_ascii_alphabetic() {
                break;
            }
        }
        let sequence = sequence.trim_start_matches('[');
        match sequence.split_at(sequence.len().saturating_sub(1)) {
            (at, "H") => {
                let numbers: Vec<usize> = at.split(';').filter_map(|number| number.parse().ok()).collect();
                (y, x) = (numbers.first().map_or(0, |y| y - 1), numbers.get(1).map_or(0, |x| x - 1));
            }
            ("2", "J") => lines.iter_mut().for_each(|line| line.fill(' ')),
            _ => {}
        }
    }
    lines.into_iter().map(|line| line.into_iter().collect::<String>().trim_end().to_owned()).collect()
}

/// Waits until the terminal shows this.
async fn sees(running: &Running, text: &str) -> Result<Vec<String>> {
    let probe = async || {
        let picture = picture(&running.shown());
        picture.join("\n").contains(text).then_some(picture)
    };
    let seen = wait_value(&format!("`{text}` on the terminal"), LIMIT, probe).await;
    seen.with_context(|| format!("{:#?}", picture(&running.shown())))
}

/// It has ended, and the terminal is as before.
async fn ended(running: Running, code: i32) -> Result<()> {
    running.shows(GIVEN_BACK).await?;
    wait_for("the terminal to echo again", LIMIT, async || running.echoes().unwrap_or_default()).await?;
    let cursor = async || {
        let shown = running.shown();
        shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l")
    };
    wait_for("the cursor to be shown", LIMIT, cursor).await.with_context(|| running.shown())?;
    let ended = running.end().await?;
    assert_eq!(ended.code, Some(code), "{ended:?}");
    Ok(())
}

#[tokio::test]
async fn replications_are_watched_and_steered() -> Result<()> {
    let site = Site::small().await?;
    site.replicate("ORDERS", 10).await?;
    site.add("MISSING", json!({})).await?;
    site.row_when("MISSING", "is held", |row| row["state"] == "held").await?;
    let mut top = site.cli().on_terminal_of((80, 24), ["top"])?;
    top.shows(TAKEN).await?;
    for text in ["REPLICATION", "MISSING", "held", "MISSING, do: fix the cause", "?: help", "q: quit"] {
        sees(&top, text).await?;
    }
    assert!(!top.echoes()?);
    let lines = sees(&top, "0/s").await?;
    assert!(lines[2].starts_with("MISSING ") && lines[3].starts_with("ORDERS "), "{lines:#?}");

    top.types("/orders\r")?;
    top.types("p")?;
    sees(&top, "pause ORDERS? y: yes").await?;
    top.types("y")?;
    site.row_when("ORDERS", "is paused", |row| row["state"] == "paused").await?;
    sees(&top, "ORDERS is paused").await?;
    sees(&top, "1: 1 paused").await?;
    top.types("r")?;
    sees(&top, "resume").await?;
    top.types("n")?;
    top.types("\r")?;
    sees(&top, "transport").await?;
    assert_eq!(site.row("ORDERS").await.unwrap_or_default()["state"], "paused");
    top.types("ry")?;
    site.row_when("ORDERS", "runs", |row| row["state"] == "running").await?;
    top.types("q")?;
    ended(top, 0).await
}

#[tokio::test]
async fn the_terminal_is_given_back_after_a_signal() -> Result<()> {
    let site = Site::small().await?;
    for (signal, code) in [(Signal::TERM, 143), (Signal::INT, 130), (Signal::HUP, 129)] {
        let top = site.cli().on_terminal_of((80, 24), ["top"])?;
        sees(&top, "REPLICATION").await?;
        top.signal(signal)?;
        ended(top, code).await?;
    }
    // As a key it is no signal.
    let mut top = site.cli().on_terminal_of((80, 24), ["top"])?;
    sees(&top, "REPLICATION").await?;
    top.types("\x03")?;
    ended(top, 0).await
}

#[tokio::test]
async fn a_service_that_is_away_is_waited_for() -> Result<()> {
    let mut site = Site::small().await?;
    site.replicate("ORDERS", 10).await?;
    let mut top = site.cli().on_terminal_of((80, 24), ["top", "--timeout", "1s"])?;
    sees(&top, "ORDERS").await?;
    site.stop().await?;
    sees(&top, "this is old").await?;
    site.service.restart().await?;
    site.source_stream("LATER", json!({})).await?;
    site.add("LATER", json!({})).await?;
    sees(&top, "LATER").await?;
    top.types("q")?;
    ended(top, 0).await
}

#[tokio::test]
async fn without_a_terminal_it_says_so() -> Result<()> {
    let site = Site::small().await?;
    for (arguments, expect) in [(&["top"][..], "`status --watch`"), (&["top", "--json"], "`status --json`")] {
        let ended = site.cli().run(arguments).await?;
        assert!(ended.code == Some(2) && ended.stderr.contains(expect), "{ended:?}");
        assert!(!ended.stdout.contains('\x1b'), "{ended:?}");
    }
    // What is wrong is printed, and the screen is not taken for it.
    let wrong = site.cli().on_terminal_of((80, 24), ["top", "X*"])?.end().await?;
    assert!(
        wrong.code == Some(1) && wrong.stdout.contains("there are no replications") && !wrong.stdout.contains(TAKEN),
        "{wrong:?}"
    );
    Ok(())
}
