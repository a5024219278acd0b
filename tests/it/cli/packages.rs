//! The packages of `make packages`, installed, upgraded and removed, where the tools for them are here.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};

use super::install::ROOT;
use crate::harness::service::binary;

/// A shell script that notes its call in the file `called` beside it.
const NOTES_ITS_CALL: &str = "#!/bin/sh\necho \"${0##*/} $*\" >>\"${0%/*}/called\"\n";

/// Standard output of a command that works.
pub fn output(command: &mut Command) -> Result<String> {
    let Output { status, stdout, stderr } = command.output().with_context(|| format!("{command:?}"))?;
    let (said, errors) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    ensure!(status.success(), "{command:?}: {status}\n{said}{errors}");
    Ok(said.into_owned())
}

/// Whether all of these programs can be started; the one that is missing is printed.
pub fn have(programs: &[&str]) -> bool {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let here = |program: &&str| std::env::split_paths(&paths).any(|folder| folder.join(program).is_file());
    let missing = programs.iter().find(|program| !here(program));
    if let Some(program) = missing {
        println!("skipped: there is no {program} here");
    }
    missing.is_none()
}

/// Builds a package of this kind below `folder`, with the program of this build.
fn build(kind: &str, folder: &Path) -> Result<Command> {
    let mut command = Command::new(Path::new(ROOT).join("contrib/packages"));
    command.arg(kind).env("PROGRAM", binary()?).env("CARGO_TARGET_DIR", folder).env("FAST", "1");
    Ok(command)
}

/// The only file of a folder with this ending.
fn only_file(folder: &Path, ending: &str) -> Result<PathBuf> {
    let files = std::fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let mut found: Vec<_> = files.map(|file| Ok(file?.path())).collect::<Result<_>>()?;
    found.retain(|file| file.to_string_lossy().ends_with(ending));
    ensure!(found.len() == 1, "{found:?}");
    found.pop().context("no file")
}

#[test]
fn the_debian_package_installs_upgrades_and_purges() -> Result<()> {
    if !have(&["cargo-deb", "dpkg", "deb-systemd-helper", "systemd-sysusers"]) {
        return Ok(());
    }
    if !rustix::process::geteuid().is_root() {
        println!("skipped: dpkg installs for root only");
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    output(&mut build("deb", folder.path())?)?;
    let package = only_file(&folder.path().join("debian"), ".deb")?;

    // Scripts of a package act below DPKG_ROOT, but for the commands that reach the system's own systemd.
    let stubs = folder.path().join("stubs");
    std::fs::create_dir(&stubs)?;
    for name in ["systemctl", "deb-systemd-invoke"] {
        use std::os::unix::fs::PermissionsExt;
        std::fs::write(stubs.join(name), NOTES_ITS_CALL)?;
        std::fs::set_permissions(stubs.join(name), std::fs::Permissions::from_mode(0o755))?;
    }
    let path = format!("{}:{}", stubs.display(), std::env::var("PATH")?);
    let root = folder.path().join("root");
    let dpkg = |arguments: &[&str]| {
        let mut command = Command::new("dpkg");
        command.env("PATH", &path).env("DEBIAN_FRONTEND", "noninteractive").arg(format!("--root={}", root.display()));
        command.arg(format!("--log={}", folder.path().join("log").display()));
        output(command.args(["--force-script-chrootless", "--force-depends", "--force-confdef"]).args(arguments))
    };
    let called = || std::fs::read_to_string(stubs.join("called")).unwrap_or_default();

    std::fs::create_dir_all(root.join("var/lib/dpkg"))?;
    std::fs::write(root.join("var/lib/dpkg/status"), "")?;
    let deb = package.to_str().context("a path that is no text")?;
    dpkg(&["--install", deb])?;
    let version = output(Command::new(root.join("usr/bin/stream-replicator")).arg("--version"))?;
    ensure!(version.starts_with("stream-replicator "), "{version}");
    for file in [
        "etc/logrotate.d/stream-replicator",
        "etc/stream-replicator/sr.yaml",
        "usr/lib/systemd/system/stream-replicator.service",
        "usr/share/bash-completion/completions/stream-replicator",
        "usr/share/doc/stream-replicator/copyright",
        "usr/share/fish/vendor_completions.d/stream-replicator.fish",
        "usr/share/man/man1/stream-replicator.1",
        "usr/share/zsh/vendor-completions/_stream-replicator",
    ] {
        ensure!(root.join(file).metadata().with_context(|| file.to_owned())?.len() > 0, "{file} is empty");
    }
    let users = std::fs::read_to_string(root.join("etc/passwd"))?;
    ensure!(users.contains("stream-replicator:"), "{users}");
    ensure!(!called().contains("start"), "{}", called());
    let enabled = root.join("etc/systemd/system/multi-user.target.wants/stream-replicator.service");
    ensure!(!enabled.exists(), "the unit is enabled");

    let options = root.join("etc/stream-replicator/stream-replicator.env");
    std::fs::write(&options, "STREAM_REPLICATOR_NAME=OURS\n")?;
    dpkg(&["--install", deb])?;
    ensure!(std::fs::read_to_string(&options)? == "STREAM_REPLICATOR_NAME=OURS\n");
    let script = std::fs::read_to_string(root.join("var/lib/dpkg/info/stream-replicator.postinst"))?;
    ensure!(script.contains("try-restart stream-replicator.service"), "{script}");
    // The script calls it only where systemd runs.
    if Path::new("/run/systemd/system").exists() {
        ensure!(called().contains("deb-systemd-invoke try-restart stream-replicator.service"), "{}", called());
    }

    dpkg(&["--remove", "stream-replicator"])?;
    ensure!(options.exists() && !root.join("usr/bin/stream-replicator").exists());
    dpkg(&["--purge", "stream-replicator"])?;
    ensure!(!root.join("etc/stream-replicator").exists() && !root.join("etc/logrotate.d/stream-replicator").exists());
    Ok(())
}

#[test]
fn the_rpm_installs_and_is_removed() -> Result<()> {
    if !have(&["cargo-generate-rpm", "rpm"]) {
        return Ok(());
    }
    if !rustix::process::geteuid().is_root() {
        println!("skipped: rpm installs for root only");
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    output(&mut build("rpm", folder.path())?)?;
    let package = only_file(&folder.path().join("generate-rpm"), ".rpm")?;
    let root = folder.path().join("root");
    std::fs::create_dir(&root)?;
    let rpm = |arguments: &[&str]| output(Command::new("rpm").arg("--root").arg(&root).args(arguments));

    let scripts = rpm(&["--query", "--package", "--scripts", package.to_str().context("a path that is no text")?])?;
    for command in
        ["systemd-sysusers stream-replicator.conf", "disable --now stream-replicator", "try-restart stream-replicator"]
    {
        ensure!(scripts.contains(command), "{command} is missing in {scripts}");
    }
    for script in ["post-install", "pre-uninstall", "post-uninstall"] {
        output(Command::new("sh").arg("-n").arg(Path::new(ROOT).join("contrib/rpm").join(script)))?;
    }
    // There is no shell in this root.
    rpm(&["--install", "--nodeps", "--noscripts", "--ignoreos", package.to_str().context("a path that is no text")?])?;
    let version = output(Command::new(root.join("usr/bin/stream-replicator")).arg("--version"))?;
    ensure!(version.starts_with("stream-replicator "), "{version}");
    let configuration = rpm(&["--query", "--configfiles", "stream-replicator"])?;
    let files: BTreeSet<_> = configuration.lines().collect();
    let expected = [
        "/etc/logrotate.d/stream-replicator",
        "/etc/stream-replicator/sr.yaml",
        "/etc/stream-replicator/stream-replicator.env",
    ];
    ensure!(files == BTreeSet::from(expected), "{files:?}");
    rpm(&["--erase", "--noscripts", "stream-replicator"])?;
    ensure!(!root.join("usr/bin/stream-replicator").exists() && !root.join(&expected[2][1..]).exists());
    Ok(())
}

/// With a `PATH` on which they are not.
#[test]
fn missing_package_tools_are_named() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let bin = folder.path().join("bin");
    std::fs::create_dir(&bin)?;
    for program in ["bash", "dirname"] {
        let paths = std::env::var_os("PATH").context("no PATH")?;
        let found = std::env::split_paths(&paths).map(|folder| folder.join(program)).find(|file| file.is_file());
        std::os::unix::fs::symlink(found.with_context(|| format!("no {program}"))?, bin.join(program))?;
    }
    for (kind, tool) in [("deb", "cargo-deb"), ("rpm", "cargo-generate-rpm")] {
        let done = build(kind, folder.path())?.env("PATH", &bin).output()?;
        let said = String::from_utf8(done.stderr)?;
        ensure!(said.contains(&format!("cargo install --locked {tool}")), "{said}");
        ensure!(done.status.code() == Some(1), "{said}");
    }
    Ok(())
}
