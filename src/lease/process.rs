//! The identity of this process, and whether another process of the same host is gone.

use std::{fs, io};

use rustix::{
    io::Errno,
    process::{Pid, test_kill_process},
};

/// The identity of a process.
#[derive(Debug, Clone)]
pub struct ProcessIdentity {
    /// Its `--instance`.
    pub instance: String,
    /// Name of its host.
    pub host: String,
    /// Version of its program.
    pub program: String,
    /// Its process id on that host.
    pub pid: u32,
    /// The scope of its process id, and when the process started; empty where the system does not report that.
    pub mark: String,
}

impl ProcessIdentity {
    /// Of this process.
    pub fn own(instance: String, host: String, program: String) -> Self {
        let pid = std::process::id();
        Self { instance, host, program, pid, mark: mark(pid) }
    }
}

/// The scope of a process id, and when the process started: `<boot>/<pid namespace>/<ticks since boot>`. Empty where the
/// system does not report that. Process ids of another boot or of another container mean nothing here.
fn mark(pid: u32) -> String {
    match (place(), began(pid)) {
        (Some(place), Ok(Some(began))) => format!("{place}/{began}"),
        _ => String::new(),
    }
}

/// Whether the process of a session is known to be gone.
pub(super) fn is_gone(pid: u32, mark: &str) -> bool {
    let Some((of, there)) = mark.rsplit_once('/') else { return false };
    let gone = || began(pid).map_or_else(|_| !answers(pid), |began| began.is_none_or(|began| began != there));
    place().is_some_and(|place| place == of) && gone()
}

/// Whether a process id is in use, also where the system hides processes of other users (`hidepid`, `ProtectProc=`).
fn answers(pid: u32) -> bool {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    pid.is_some_and(|pid| test_kill_process(pid) != Err(Errno::SRCH))
}

fn place() -> Option<String> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let space = fs::read_link("/proc/self/ns/pid").ok()?;
    Some(format!("{}/{}", boot.trim(), space.to_string_lossy()))
}

/// When a process started, in ticks since the boot; `None` if it is dead, an error where that cannot be seen.
fn began(pid: u32) -> io::Result<Option<String>> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name of the program, in brackets, may have blanks and brackets in it (proc_pid_stat(5): field 22).
    let (_, fields) = stat.rsplit_once(')').ok_or(io::ErrorKind::InvalidData)?;
    // A dead process that its parent has not collected yet (field 3) does nothing more.
    let dead = fields.trim_start().starts_with(['Z', 'X']);
    Ok(fields.split_ascii_whitespace().nth(19).filter(|_| !dead).map(str::to_owned))
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::process::{Command, id};

    use super::*;

    #[test]
    fn a_process_is_gone_when_its_id_is_another_ones_or_nobodys() {
        let own = mark(id());
        assert!(!own.is_empty() && !is_gone(id(), &own), "{own}");
        let (place, began) = own.rsplit_once('/').unwrap();
        assert!(is_gone(id(), &format!("{place}/1{began}")));
        let mut child = Command::new("sleep").arg("0.2").spawn().unwrap();
        let (pid, of_child) = (child.id(), mark(child.id()));
        assert!(answers(pid) && !is_gone(pid, &of_child));
        child.wait().unwrap();
        assert!(!answers(pid));
        assert!(!of_child.is_empty() && is_gone(pid, &of_child));
    }

    #[test]
    fn what_another_host_says_tells_nothing() {
        assert!(!is_gone(u32::MAX, "") && !is_gone(u32::MAX, "other-boot/pid:[1]/5") && !is_gone(u32::MAX, "x"));
    }
}
