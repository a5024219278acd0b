//! The commands of the real binary, run as a script runs them.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow, ensure};
use rustix::process::{Pid, Signal, kill_process};
use rustix::{pty, termios};
use serde_json::Value;
use tempfile::TempDir;

use super::client::wait_value;
use super::service::binary;
use super::{LIMIT, secrets};

/// How to call a command.
#[derive(Debug, Clone)]
pub struct Cli {
    server: String,
    environment: Vec<(String, String)>,
}

/// What a command left behind.
#[derive(Debug)]
pub struct Ended {
    /// Exit code; `None` after a signal.
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// A command that runs; killed when dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    folder: TempDir,
    terminal: Option<Terminal>,
}

/// The other end of a command's terminal.
#[derive(Debug)]
struct Terminal {
    keyboard: File,
    /// Everything that was shown.
    screen: PathBuf,
    /// Writes it; ends when nobody has the terminal open any more.
    camera: Option<JoinHandle<()>>,
}

impl Cli {
    /// Commands that ask at this server.
    pub fn new(server: &str) -> Self {
        Self { server: server.to_owned(), environment: Vec::new() }
    }

    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Runs a command to its end.
    pub async fn run<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Result<Ended> {
        self.run_with(arguments, "").await
    }

    /// The same with something on stdin.
    pub async fn run_with<A: AsRef<OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = A>,
        stdin: &str,
    ) -> Result<Ended> {
        self.start(arguments, stdin)?.end().await
    }

    /// Runs a command that has to succeed; what it printed.
    pub async fn ok<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Result<String> {
        let ended = self.run(arguments).await?;
        ensure!(ended.code == Some(0), "{ended:?}");
        Ok(ended.stdout)
    }

    /// Runs a command with `--json`; what it printed, one line.
    pub async fn json<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Result<Value> {
        let mut all: Vec<_> = arguments.into_iter().map(|argument| argument.as_ref().to_owned()).collect();
        all.push("--json".into());
        let printed = self.ok(all).await?;
        ensure!(printed.ends_with('\n') && printed.lines().count() == 1, "not one line: {printed}");
        Ok(serde_json::from_str(&printed)?)
    }

    /// Starts a command and waits for nothing.
    pub fn start<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>, stdin: &str) -> Result<Running> {
        let folder = tempfile::Builder::new().prefix("cli-").tempdir()?;
        let file = |name: &str| folder.path().join(name);
        fs::write(file("stdin"), stdin)?;
        let mut command = self.command(arguments)?;
        command.stdin(File::open(file("stdin"))?);
        command.stdout(File::create(file("stdout"))?).stderr(File::create(file("stderr"))?);
        Ok(Running { child: command.spawn()?, folder, terminal: None })
    }

    /// Starts a command on a terminal that does not know its size.
    pub fn on_terminal<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Result<Running> {
        self.on_terminal_of((0, 0), arguments)
    }

    /// Starts a command on a terminal with so many columns and lines.
    pub fn on_terminal_of<A: AsRef<OsStr>>(
        &self,
        (columns, lines): (u16, u16),
        arguments: impl IntoIterator<Item = A>,
    ) -> Result<Running> {
        let folder = tempfile::Builder::new().prefix("cli-").tempdir()?;
        let keyboard = pty::openpt(pty::OpenptFlags::RDWR | pty::OpenptFlags::NOCTTY)?;
        pty::grantpt(&keyboard)?;
        pty::unlockpt(&keyboard)?;
        let name = pty::ptsname(&keyboard, Vec::new())?.into_string()?;
        let device = File::options().read(true).write(true).open(name)?;
        let size = termios::Winsize { ws_col: columns, ws_row: lines, ws_xpixel: 0, ws_ypixel: 0 };
        termios::tcsetwinsize(&device, size)?;
        let mut command = self.command(arguments)?;
        command.env("TERM", "xterm").stdin(device.try_clone()?).stdout(device.try_clone()?).stderr(device);
        let child = command.spawn()?;
        let keyboard = File::from(keyboard);
        let screen = folder.path().join("screen");
        let (mut from, mut to) = (keyboard.try_clone()?, File::create(&screen)?);
        // That the last one who had it open is gone reads as an error.
        let camera = Some(std::thread::spawn(move || drop(std::io::copy(&mut from, &mut to))));
        Ok(Running { child, folder, terminal: Some(Terminal { keyboard, screen, camera }) })
    }

    /// Runs a command whose stdout nobody reads.
    pub async fn unread<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Result<Ended> {
        let folder = tempfile::Builder::new().prefix("cli-").tempdir()?;
        let (_, stdout) = std::io::pipe()?;
        let mut command = self.command(arguments)?;
        command.stdout(stdout).stderr(File::create(folder.path().join("stderr"))?);
        let child = command.spawn()?;
        // Else the pipe lives as long as the command that is to be started.
        drop(command);
        Running { child, folder, terminal: None }.end().await
    }

    /// The environment of whoever runs the tests has no say.
    fn command<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Result<Command> {
        let mut command = Command::new(binary()?);
        command.args(arguments).env_clear().stdin(Stdio::null());
        command.env("PATH", std::env::var_os("PATH").unwrap_or_default()).env("HOME", "/nonexistent");
        command.env("NATS_URL", &self.server);
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        Ok(command)
    }
}

impl Running {
    /// Waits for the end.
    pub async fn end(mut self) -> Result<Ended> {
        let ended = wait_value("a command to end", LIMIT, async || self.child.try_wait().ok().flatten()).await;
        let status = ended.with_context(|| format!("{:?}", self.shown()))?;
        if let Some(camera) = self.terminal.as_mut().and_then(|terminal| terminal.camera.take()) {
            tokio::task::spawn_blocking(move || camera.join())
                .await?
                .map_err(|_| anyhow!("the terminal was not read"))?;
        }
        let ended =
            Ended { code: status.code(), stdout: self.shown(), stderr: read(&self.folder.path().join("stderr")) };
        secrets::check("stdout of a command", &ended.stdout);
        secrets::check("stderr of a command", &ended.stderr);
        Ok(ended)
    }

    /// What it printed so far; on a terminal everything that is seen there.
    pub fn shown(&self) -> String {
        match &self.terminal {
            None => read(&self.folder.path().join("stdout")),
            Some(terminal) => read(&terminal.screen),
        }
    }

    /// Waits until it printed this.
    pub async fn shows(&self, text: &str) -> Result<()> {
        let what = format!("`{text}` to be printed");
        let shown = wait_value(&what, LIMIT, async || self.shown().contains(text).then_some(())).await;
        shown.with_context(|| self.shown())
    }

    /// Whether its terminal shows what is typed, line by line: not while a program draws on it.
    pub fn echoes(&self) -> Result<bool> {
        let terminal = self.terminal.as_ref().context("there is no terminal")?;
        let modes = termios::tcgetattr(&terminal.keyboard)?.local_modes;
        Ok(modes.contains(termios::LocalModes::ECHO | termios::LocalModes::ICANON))
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).context("no pid")?;
        Ok(kill_process(pid, signal)?)
    }

    /// Types at its terminal.
    pub fn types(&mut self, text: &str) -> Result<()> {
        let terminal = self.terminal.as_mut().context("there is no terminal")?;
        Ok(terminal.keyboard.write_all(text.as_bytes())?)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // An error means that it is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

/// The command failed, and said all of these texts.
#[track_caller]
pub fn failed(ended: &Ended, expect: &[&str]) {
    assert_eq!(ended.code, Some(1), "{ended:?}");
    for text in expect {
        assert!(ended.stderr.contains(text), "`{text}` is not in {ended:?}");
    }
}
