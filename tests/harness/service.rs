//! The real binary, `stream-replicator serve`, as a child process.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::Signal;
use tempfile::TempDir;

use super::client::{http_get, wait_value};
use super::process::{Process, Usage};
use super::{LIMIT, secrets};

/// In the log once the service takes requests.
const READY: &str = "ready";

/// How to start the service.
#[derive(Debug, Clone)]
pub struct Builder {
    /// Another one than [`binary`].
    program: Option<PathBuf>,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    /// What the shell says to its limits first.
    ulimit: Option<String>,
}

/// The service, running or stopped; killed when dropped.
#[derive(Debug)]
pub struct Service {
    how: Builder,
    folder: TempDir,
    process: Option<Process>,
    starts: usize,
}

impl Builder {
    /// `--instance`
    pub fn instance(self, id: &str) -> Self {
        self.args(["--instance", id])
    }

    /// More arguments to `serve`.
    pub fn args<A: Into<OsString>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// Another build than the one that is tested.
    pub fn program(mut self, program: &Path) -> Self {
        self.program = Some(program.to_owned());
        self
    }

    /// Under the limits that the shell's `ulimit` sets with these arguments.
    pub fn ulimit(mut self, arguments: &str) -> Self {
        self.ulimit = Some(arguments.to_owned());
        self
    }

    /// Starts it and waits until it is ready.
    pub async fn start(self) -> Result<Service> {
        let mut service = self.spawn()?;
        service.wait_ready().await?;
        Ok(service)
    }

    /// Starts it and waits for nothing: for tests of a start that fails or takes long.
    pub fn spawn(self) -> Result<Service> {
        let texts = self.arguments.iter().chain(self.environment.iter().map(|(_, value)| value));
        texts.filter_map(|text| text.to_str()).for_each(secrets::register_url);
        let folder = tempfile::Builder::new().prefix("service-").tempdir()?;
        let mut service = Service { how: self, folder, process: None, starts: 0 };
        service.spawn()?;
        Ok(service)
    }
}

impl Service {
    /// `serve --server <url> --name <site>`, to be refined.
    pub fn builder(url: &str, site: &str) -> Builder {
        let arguments = ["serve", "--server", url, "--name", site].map(OsString::from).to_vec();
        Builder { program: None, arguments, environment: Vec::new(), ulimit: None }
    }

    /// `replicate --config <file>`.
    pub fn replicate(file: &Path) -> Builder {
        Self::with_arguments([OsStr::new("replicate"), OsStr::new("--config"), file.as_os_str()])
    }

    /// With these arguments.
    pub fn with_arguments<A: Into<OsString>>(arguments: impl IntoIterator<Item = A>) -> Builder {
        let arguments = arguments.into_iter().map(Into::into).collect();
        Builder { program: None, arguments, environment: Vec::new(), ulimit: None }
    }

    /// A service of site `TEST` on this control server.
    pub async fn start(url: &str) -> Result<Self> {
        Self::builder(url, "TEST").start().await
    }

    /// Starts it again after [`Self::kill`] or [`Self::stop`], with the same arguments.
    pub async fn restart(&mut self) -> Result<()> {
        if self.process.is_some() {
            bail!("the service is still running");
        }
        self.spawn()?;
        self.wait_ready().await
    }

    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Process::pid)
    }

    pub fn usage(&self) -> Usage {
        self.process.as_ref().map(Process::usage).unwrap_or_default()
    }

    /// All that this start wrote.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.log_file()).unwrap_or_default()).into_owned()
    }

    /// All that it wrote, over all starts; without a last line that a kill cut off.
    pub fn logs(&self) -> String {
        let whole = |start| {
            let text = std::fs::read(self.folder.path().join(format!("log.{start}"))).unwrap_or_default();
            let end = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
            String::from_utf8_lossy(&text[..end]).into_owned()
        };
        (1..=self.starts).map(whole).collect()
    }

    /// kill -9
    pub fn kill(&mut self) -> Result<()> {
        self.process.take().context("the service is not running")?.kill()
    }

    /// SIGTERM, and waits for the exit.
    pub async fn stop(&mut self) -> Result<ExitStatus> {
        self.process.take().context("the service is not running")?.terminate(LIMIT).await
    }

    /// Waits until it ends by itself.
    pub async fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        self.process.take().context("the service is not running")?.wait(limit).await
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.process.as_ref().context("the service is not running")?.signal(signal)
    }

    /// SIGSTOP
    pub fn freeze(&self) -> Result<()> {
        self.process.as_ref().context("the service is not running")?.freeze()
    }

    /// SIGCONT
    pub fn thaw(&self) -> Result<()> {
        self.process.as_ref().context("the service is not running")?.signal(Signal::CONT)
    }

    /// Waits until the log says that it takes requests.
    pub async fn wait_ready(&mut self) -> Result<()> {
        let log = self.log_file();
        let process = self.process.as_mut().context("the service is not running")?;
        let probe = async || match process.exited() {
            Some(status) => Some(Err(anyhow!("the service ended with {status}"))),
            None => has_word(&std::fs::read_to_string(&log).unwrap_or_default(), READY).then_some(Ok(())),
        };
        let ready = wait_value("the service to be ready", LIMIT, probe).await.and_then(|r| r);
        ready.map_err(|e| anyhow!("{e}\n{}", process.tail(30)))
    }

    /// Where the monitor listens (`--monitor 127.0.0.1:0`).
    pub async fn monitor(&self) -> Result<String> {
        wait_value("the monitor's address in the log", LIMIT, async || monitor_address(&self.log())).await
    }

    /// GET from the monitor; its status code and body.
    pub async fn get(&self, path: &str) -> Result<(u16, String)> {
        http_get(&self.monitor().await?, path).await
    }

    fn spawn(&mut self) -> Result<()> {
        // A log for each start, so that an old ready line says nothing about a new start.
        self.starts += 1;
        let program = self.how.program.clone().map_or_else(binary, Ok)?;
        let mut command = match &self.how.ulimit {
            None => Command::new(program),
            Some(ulimit) => {
                let mut shell = Command::new("sh");
                shell.args(["-c", &format!("ulimit {ulimit} && exec \"$0\" \"$@\"")]).arg(program);
                shell
            }
        };
        command.args(&self.how.arguments).envs(self.how.environment.iter().cloned());
        self.process = Some(Process::spawn(&mut command, &self.log_file())?);
        Ok(())
    }

    fn log_file(&self) -> PathBuf {
        self.folder.path().join(format!("log.{}", self.starts))
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // Without the log a failed test says nothing about the reason.
        if std::thread::panicking() || std::env::var_os("SHOW_LOGS").is_some() {
            for start in 1..=self.starts {
                let text = std::fs::read_to_string(self.folder.path().join(format!("log.{start}")));
                let text = text.unwrap_or_default();
                let lines: Vec<&str> = text.lines().collect();
                let tail = lines[lines.len().saturating_sub(40)..].join("\n");
                eprintln!("--- service {:?}, start {start}, last lines ---\n{tail}", self.how.arguments);
            }
        }
        if !std::thread::panicking() {
            for start in 1..=self.starts {
                let log = std::fs::read(self.folder.path().join(format!("log.{start}"))).unwrap_or_default();
                secrets::check("a log", &String::from_utf8_lossy(&log));
            }
        }
    }
}

/// Our binary: cargo names it for tests and benches, for examples it lies one folder up. `STREAM_REPLICATOR` names
/// another one, such as that of a release.
pub fn binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("STREAM_REPLICATOR").filter(|path| !path.is_empty()) {
        return Ok(path.into());
    }
    if let Some(path) = option_env!("CARGO_BIN_EXE_stream-replicator") {
        return Ok(path.into());
    }
    let own = std::env::current_exe()?;
    let folder = own.parent().and_then(|f| f.parent()).context("no target folder")?;
    let path = folder.join("stream-replicator");
    if path.exists() { Ok(path) } else { bail!("there is no {}: run cargo build first", path.display()) }
}

fn has_word(text: &str, word: &str) -> bool {
    text.split(|c: char| !c.is_ascii_alphanumeric()).any(|w| w == word)
}

fn monitor_address(log: &str) -> Option<String> {
    let line = log.lines().find(|line| line.contains("monitor listens"))?;
    Some(line.split("address=").nth(1)?.split_whitespace().next()?.to_owned())
}
