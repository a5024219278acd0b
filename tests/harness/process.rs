//! A child process that is ours to stop: signals, resource use, log file.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use rustix::process::{Pid, Signal, kill_process};

use super::LIMIT;
use super::client::wait_value;

/// Names and their addresses.
pub const HOSTS: &str = "/etc/hosts";
/// Name servers.
pub const RESOLV: &str = "/etc/resolv.conf";

/// A shell, to which a program and its arguments are added, in which `file` replaces a file of the system; `None` where the
/// system does not let us.
pub fn with_file(file: &Path, replaced: &str) -> Option<Command> {
    let script = format!("mount --bind \"$0\" {replaced} && exec \"$@\"");
    let shell = |flags: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(flags).args(["sh", "-c", &script]).arg(file);
        command
    };
    let all: [&[&str]; 2] = [&["-m"], &["-rm"]];
    all.into_iter().find(|flags| shell(flags).arg("true").output().is_ok_and(|done| done.status.success())).map(shell)
}

/// A running child; killed by its own pid when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command` with stdout and stderr appended to `log`.
    pub fn spawn(command: &mut Command, log: &Path) -> Result<Self> {
        let file = open_log(log)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("cannot start {:?}", command.get_program()))?;
        Ok(Self { child, log: log.to_owned() })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The exit status, if it ended.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).context("no pid")?;
        kill_process(pid, signal).with_context(|| format!("signal {signal:?} to {}", self.child.id()))
    }

    /// SIGSTOP, and waits until every thread has stopped: the signal takes a moment, in which a request is still
    /// answered. Systems without `/proc` do not tell.
    pub fn freeze(&self) -> Result<()> {
        self.signal(Signal::STOP)?;
        let end = Instant::now() + LIMIT;
        while !self.is_stopped() {
            ensure!(Instant::now() < end, "process {} does not stop", self.pid());
            std::thread::yield_now();
        }
        Ok(())
    }

    fn is_stopped(&self) -> bool {
        let Ok(threads) = std::fs::read_dir(format!("/proc/{}/task", self.pid())) else { return true };
        threads.flatten().all(|thread| {
            let stat = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
            stat.rsplit(')').next().is_none_or(|rest| rest.trim_start().starts_with('T') || rest.is_empty())
        })
    }

    /// SIGKILL, and waits until it is gone.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// SIGTERM, and waits for the exit.
    pub async fn terminate(&mut self, limit: Duration) -> Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        self.wait(limit).await
    }

    /// Waits for the exit.
    pub async fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let what = format!("process {} to exit", self.pid());
        let ended = wait_value(&what, limit, async || self.exited()).await;
        ended.map_err(|e| anyhow!("{e}\n{}", tail(&self.log, 20)))
    }

    /// The last lines that it wrote.
    pub fn tail(&self, lines: usize) -> String {
        tail(&self.log, lines)
    }

    /// All that it wrote, over restarts too.
    pub fn output(&self) -> String {
        read_lossy(&self.log)
    }

    pub fn usage(&self) -> Usage {
        Usage::of(self.pid())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Also ends a frozen process. An error means that it is gone already.
        let _ = self.kill();
    }
}

/// What a process used so far; zero where there is no `/proc`.
#[derive(Debug, Default, Clone, Copy)]
pub struct Usage {
    /// User and system time.
    pub cpu_seconds: f64,
    /// Resident now, in bytes.
    pub rss: u64,
    /// Highest resident ever, in bytes.
    pub rss_peak: u64,
}

impl Usage {
    pub fn of(pid: u32) -> Self {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let kib = |name: &str| {
            let line = status.lines().find_map(|l| l.strip_prefix(name));
            line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
        };
        Self { cpu_seconds: cpu_seconds(pid).unwrap_or(0.0), rss: kib("VmRSS:"), rss_peak: kib("VmHWM:") }
    }
}

fn cpu_seconds(pid: u32) -> Option<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the name in parentheses and may have any text; count from its end.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let user: f64 = fields.next()?.parse().ok()?;
    let system: f64 = fields.next()?.parse().ok()?;
    Some((user + system) / rustix::param::clock_ticks_per_second() as f64)
}

/// CPU seconds that the whole machine spent on anything, since it started.
pub fn machine_cpu_seconds() -> f64 {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    let fields =
        stat.lines().next().unwrap_or_default().split_whitespace().skip(1).map_while(|f| f.parse::<f64>().ok());
    // user nice system idle iowait irq softirq steal; what follows is counted in these already.
    let busy: f64 = fields.take(8).enumerate().filter(|(i, _)| !matches!(i, 3 | 4)).map(|(_, ticks)| ticks).sum();
    busy / rustix::param::clock_ticks_per_second() as f64
}

/// CPU seconds that this process and all that it started spent, as far as they run.
pub fn own_cpu_seconds() -> f64 {
    let running = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = running.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let parent = |pid: u32| -> Option<u32> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
    };
    let parents: BTreeMap<u32, u32> = pids.filter_map(|pid| Some((pid, parent(pid)?))).collect();
    let own = |pid: &&u32| {
        std::iter::successors(Some(**pid), |pid| parents.get(pid).copied()).any(|pid| pid == std::process::id())
    };
    parents.keys().filter(own).filter_map(|pid| cpu_seconds(*pid)).sum()
}

fn open_log(path: &Path) -> Result<File> {
    OpenOptions::new().create(true).append(true).open(path).with_context(|| path.display().to_string())
}

fn read_lossy(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

fn tail(path: &Path, lines: usize) -> String {
    let text = read_lossy(path);
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
