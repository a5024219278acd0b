//! What `make install` puts where, and whether it works there.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use regex::Regex;

use crate::harness::{LIMIT, Role, Server, Service, connect, request, service::binary, wait_for};

pub const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// `contrib/install` with these variables and the program of this build.
fn install(variables: &[(&str, &Path)]) -> Result<String> {
    let mut command = Command::new(Path::new(ROOT).join("contrib/install"));
    let output = command.env("PROGRAM", binary()?).envs(variables.iter().copied()).output()?;
    ensure!(output.status.success(), "{output:?}");
    Ok(String::from_utf8(output.stdout)?)
}

/// Names and values of the options of an environment file; with those that are commented out.
fn options(file: &Path) -> Result<Vec<(String, String)>> {
    let text = std::fs::read_to_string(file)?;
    let line = Regex::new(r"(?m)^#?([A-Z_]+)=(.*)$")?;
    Ok(line.captures_iter(&text).map(|found| (found[1].to_owned(), found[2].to_owned())).collect())
}

/// The variables of the options of `serve`.
pub fn known_options() -> Result<BTreeSet<String>> {
    let help = String::from_utf8(Command::new(binary()?).args(["serve", "--help"]).output()?.stdout)?;
    Ok(Regex::new(r"\[env: ([A-Z_]+)")?.captures_iter(&help).map(|found| found[1].to_owned()).collect())
}

#[test]
fn everything_is_installed_and_options_are_kept() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let variables = [("PREFIX", Path::new("/usr")), ("DESTDIR", folder.path())];
    let said = install(&variables)?;
    for file in [
        "usr/bin/stream-replicator",
        "usr/share/man/man1/stream-replicator.1",
        "usr/share/bash-completion/completions/stream-replicator",
        "usr/share/zsh/site-functions/_stream-replicator",
        "usr/share/fish/vendor_completions.d/stream-replicator.fish",
        "usr/lib/systemd/system/stream-replicator.service",
        "usr/lib/sysusers.d/stream-replicator.conf",
        "etc/stream-replicator/stream-replicator.env",
    ] {
        let length = std::fs::metadata(folder.path().join(file)).with_context(|| file.to_owned())?.len();
        ensure!(length > 0, "{file} is empty");
    }
    ensure!(said.contains("etc/stream-replicator/stream-replicator.env"), "{said}");
    // A second time it is an upgrade.
    let file = folder.path().join("etc/stream-replicator/stream-replicator.env");
    std::fs::write(&file, "STREAM_REPLICATOR_NAME=OURS\n")?;
    install(&variables)?;
    ensure!(std::fs::read_to_string(&file)? == "STREAM_REPLICATOR_NAME=OURS\n");
    Ok(())
}

/// Installed below a folder of its own without `DESTDIR`, so that the program of the unit exists.
#[test]
fn systemd_finds_nothing_wrong_with_the_unit() -> Result<()> {
    if Command::new("systemd-analyze").arg("--version").output().is_err() {
        println!("skipped: there is no systemd-analyze here");
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let prefix = folder.path().join("usr");
    install(&[("PREFIX", &prefix), ("SYSCONFDIR", &folder.path().join("etc"))])?;
    let unit = prefix.join("lib/systemd/system/stream-replicator.service");
    let output = Command::new("systemd-analyze").args(["--man=no", "verify"]).arg(&unit).output()?;
    let said = String::from_utf8(output.stderr)?;
    ensure!(output.status.success() && !said.contains("stream-replicator.service"), "{said}");
    Ok(())
}

#[tokio::test]
async fn the_sample_options_are_options_and_start_the_service() -> Result<()> {
    let file = Path::new(ROOT).join("contrib/systemd/stream-replicator.env");
    let options = options(&file)?;
    let known = known_options()?;
    ensure!(options.len() > 5, "{options:?}");
    for (name, _) in &options {
        ensure!(known.contains(name), "`{name}` is no option of {known:?}");
    }

    let control = Server::start(Role::Control).await?;
    let credentials = tempfile::tempdir()?;
    let mut service = Service::with_arguments(["serve"]);
    for (name, value) in &options {
        service = match name.as_str() {
            "STREAM_REPLICATOR_SERVER" => service.env(name, &control.url()),
            "STREAM_REPLICATOR_MONITOR" => service.env(name, "127.0.0.1:0"),
            "STREAM_REPLICATOR_ALLOW_CREDENTIALS" => service.env(name, &credentials.path().to_string_lossy()),
            // In a cluster only; a file that is not here.
            "STREAM_REPLICATOR_BUCKET_REPLICAS" | "NATS_CREDS" => service,
            _ => service.env(name, value),
        };
    }
    let service = service.start().await?;
    let client = connect(&control.url()).await?;
    wait_for("the status", LIMIT, async || {
        request(&client, "replicator.status", serde_json::Value::Null)
            .await
            .is_ok_and(|status| status["site"] == "SITE")
    })
    .await
    .with_context(|| service.log())
}
