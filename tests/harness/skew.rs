//! A process whose host clock is wrong: a small library in front of the C library shifts the time of day that it reads.
//! Monotonic clocks stay right.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

/// `SHIFT` is replaced by seconds.
const LIBRARY: &str = r#"
use std::ffi::{c_char, c_int, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};

#[repr(C)]
pub struct Time {
    seconds: i64,
    nanos: i64,
}

unsafe extern "C" {
    fn dlsym(handle: *mut c_void, name: *const c_char) -> *mut c_void;
}

static REAL: AtomicUsize = AtomicUsize::new(0);

#[unsafe(no_mangle)]
pub unsafe extern "C" fn clock_gettime(clock: c_int, time: *mut Time) -> c_int {
    if REAL.load(Ordering::Relaxed) == 0 {
        let next = -1isize as *mut c_void;
        REAL.store(unsafe { dlsym(next, c"clock_gettime".as_ptr()) } as usize, Ordering::Relaxed);
    }
    let real: extern "C" fn(c_int, *mut Time) -> c_int = unsafe { std::mem::transmute(REAL.load(Ordering::Relaxed)) };
    let result = real(clock, time);
    // CLOCK_REALTIME and its coarse sibling.
    if result == 0 && (clock == 0 || clock == 5) {
        unsafe { (*time).seconds += SHIFT };
    }
    result
}
"#;

/// A clock that is wrong by so many seconds, for as long as this lives.
#[derive(Debug)]
pub struct Skew {
    folder: TempDir,
}

impl Skew {
    pub fn of(seconds: i64) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("skew-").tempdir()?;
        let skew = Self { folder };
        let source = skew.folder.path().join("skew.rs");
        std::fs::write(&source, LIBRARY.replace("SHIFT", &seconds.to_string()))?;
        let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        let made = Command::new(rustc)
            .args(["--edition=2024", "--crate-type=cdylib", "-Cpanic=abort", "-o"])
            .args([skew.library().as_ref(), source.as_os_str()])
            .output()
            .context("rustc")?;
        ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        Ok(skew)
    }

    fn library(&self) -> std::path::PathBuf {
        self.folder.path().join("libskew.so")
    }

    /// What the environment of the process needs.
    pub fn variable(&self) -> (&'static str, String) {
        ("LD_PRELOAD", self.library().display().to_string())
    }
}
