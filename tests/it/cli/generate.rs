//! What is made from the definition of the commands: help, completions, manual pages.

use anyhow::Result;
use serde_json::json;

use crate::harness::{Cli, Site};

/// Every command that there is.
const COMMANDS: [&str; 56] = [
    "serve",
    "replicate",
    "config",
    "config add",
    "config update",
    "config get",
    "config ls",
    "config rm",
    "config validate",
    "config schema",
    "config edit",
    "config set",
    "config apply",
    "config import",
    "config export",
    "status",
    "report",
    "drift",
    "check",
    "doctor",
    "pause",
    "resume",
    "position",
    "retry",
    "skip",
    "promote",
    "consumers",
    "consumers export",
    "consumers import",
    "dlq",
    "dlq list",
    "dlq show",
    "dlq replay",
    "dlq drop",
    "verify",
    "instances",
    "events",
    "link",
    "link add",
    "link update",
    "link validate",
    "link get",
    "link ls",
    "link rm",
    "link edit",
    "admin",
    "admin senders",
    "admin advisories",
    "admin state",
    "admin gossip",
    "admin watch",
    "heartbeat",
    "heartbeat get",
    "heartbeat set",
    "completions",
    "man",
];

fn cli() -> Cli {
    Cli::new("nats://127.0.0.1:1")
}

#[tokio::test]
async fn help_names_every_command_and_the_exit_codes() -> Result<()> {
    let help = cli().ok(["--help"]).await?;
    let mut groups = Vec::new();
    for group in ["config", "admin", "heartbeat", "link", "consumers", "dlq"] {
        groups.push((group, cli().ok([group, "--help"]).await?));
    }
    for command in COMMANDS {
        let (text, name) = match command.split_once(' ') {
            Some((group, name)) => (&groups.iter().find(|(of, _)| *of == group).expect("a group").1, name),
            None => (&help, command),
        };
        let line = text.lines().find(|line| line.trim_start().split(' ').next() == Some(name));
        let words = line.map(|line| line.split_whitespace().count());
        assert!(words > Some(3), "`{command}` is not explained in\n{text}");
        let arguments = command.split(' ').chain(["--help"]);
        assert!(cli().ok(arguments).await?.contains(&format!("Usage: stream-replicator {command}")), "{command}");
    }
    assert!(help.contains("Exit codes: 0 done, 1 failed, refused or not valid, 2 wrong usage"), "{help}");
    assert!(help.lines().all(|line| line.chars().count() <= 120), "{help}");
    Ok(())
}

#[tokio::test]
async fn completions_name_every_command_and_its_options() -> Result<()> {
    for shell in ["bash", "zsh", "fish"] {
        let script = cli().ok(["completions", shell]).await?;
        for command in COMMANDS {
            let name = command.rsplit(' ').next().unwrap_or_default();
            let found = script.split(|c: char| !c.is_ascii_alphanumeric() && c != '-').any(|word| word == name);
            assert!(found, "`{command}` is not in the completions for {shell}");
        }
        for option in ["wait-caught-up", "dry-run", "source-seq", "prune", "follow"] {
            assert!(script.contains(option), "--{option} is not in the completions for {shell}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn ids_are_completed_from_the_service() -> Result<()> {
    let site = Site::small().await?;
    for id in ["ORDERS", "OTHER", "EVENTS"] {
        site.add(id, json!({})).await?;
    }
    let folder = tempfile::tempdir()?;
    let script = folder.path().join("completions");
    std::fs::write(&script, site.cli().ok(["completions", "bash"]).await?)?;
    let program = crate::harness::service::binary()?;
    let complete = |words: &str| -> Result<Vec<String>> {
        let call = format!(
            "source {}; COMP_WORDS=({} {words}); COMP_CWORD=$((${{#COMP_WORDS[@]}}-1)); _stream__replicator_with_ids \
             \"${{COMP_WORDS[0]}}\" \"${{COMP_WORDS[COMP_CWORD]}}\" \"${{COMP_WORDS[COMP_CWORD-1]}}\"; printf '%s\\n' \"${{COMPREPLY[@]}}\"",
            script.display(),
            program.display()
        );
        let mut bash = std::process::Command::new("bash");
        let output =
            bash.args(["-c", &call]).env("NATS_URL", site.service_url()).env("HOME", "/nonexistent").output()?;
        assert!(output.status.success() && output.stderr.is_empty(), "{words}: {output:?}");
        Ok(String::from_utf8(output.stdout)?.lines().map(str::to_owned).collect())
    };
    assert_eq!(complete("pause O")?, ["ORDERS", "OTHER"]);
    assert_eq!(complete("config get E")?, ["EVENTS"]);
    assert_eq!(complete("status ORDERS OT")?, ["OTHER"]);
    assert!(complete("adapter pause O")?.iter().all(|word| word != "ORDERS"));
    assert!(complete("link get O")?.iter().all(|word| word != "ORDERS"));
    assert!(complete("pause --j")?.contains(&"--json".to_owned()));
    for (shell, expect) in
        [("zsh", ":_stream_replicator_ids"), ("fish", "-n \"__fish_seen_subcommand_from pause; and not")]
    {
        assert!(site.cli().ok(["completions", shell]).await?.contains(expect), "{shell}");
    }
    Ok(())
}

#[tokio::test]
async fn there_is_a_manual_page_for_every_command() -> Result<()> {
    let page = cli().ok(["man"]).await?;
    for command in COMMANDS.iter().filter(|command| !command.contains(' ')) {
        assert!(page.contains(&format!("stream\\-replicator\\-{command}(1)")), "`{command}` is not in\n{page}");
    }
    let folder = tempfile::tempdir()?;
    let pages = folder.path().join("man1");
    let pages = pages.to_str().expect("a path");
    assert_eq!(cli().ok(["man", "--dir", pages]).await?, "");
    for command in COMMANDS {
        let file = format!("{pages}/stream-replicator-{}.1", command.replace(' ', "-"));
        let text = std::fs::read_to_string(&file)?;
        assert!(text.contains(".SH SYNOPSIS"), "{file}:\n{text}");
    }
    let ended = cli().run(["man", "--dir", "/dev/null/x"]).await?;
    assert!(ended.code == Some(1) && ended.stderr.contains("`/dev/null/x`"), "{ended:?}");
    Ok(())
}
