//! Many idle copies, and a target that stops answering while it keeps its connections.

use std::fs;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};

use crate::harness::Site;

const COPIES: usize = 30;
/// Connections that other processes have on this host.
const OTHERS: usize = 400;
/// What the service may read from files meanwhile: certificates, identities and the like. A table of connections is read
/// through the same calls, and one with [`OTHERS`] in it is larger than 60 kB.
const FILES: u64 = 256 * 1024;

fn id(index: usize) -> String {
    format!("F.c{index}")
}

/// Bytes that a process has read from files, those of `/proc` included; sockets are not counted.
fn read_from_files(pid: u32) -> Result<u64> {
    let io = fs::read_to_string(format!("/proc/{pid}/io"))?;
    let read = io.lines().find_map(|line| line.strip_prefix("rchar: ")).context("rchar")?;
    Ok(read.trim().parse()?)
}

/// Waits until every copy has a row for which `when` holds. Each check asks the service for its status.
async fn every(site: &Site, what: &str, when: impl Fn(&Value) -> bool) -> Result<()> {
    for index in 0..COPIES {
        site.row_when(&id(index), what, &when).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_copies_read_no_table_of_connections() -> Result<()> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    let mut others = Vec::new();
    for _ in 0..OTHERS {
        let connecting = TcpStream::connect(listener.local_addr()?);
        others.push(tokio::try_join!(connecting, listener.accept())?);
    }
    let site = Site::small().await?;
    site.source_stream("F", json!({})).await?;
    site.publish("F", 1..=10).await?;
    for index in 0..COPIES {
        let name = format!("c{index}");
        site.add("F", json!({"name": name, "target_stream": name, "target_subject_prefix": name})).await?;
    }
    every(&site, "to be settled", |row| row["position"]["source_seq"] == 10).await?;
    let pid = site.service.pid().context("a running service")?;
    let before = read_from_files(pid)?;
    site.target.freeze()?;
    let silent = |row: &Value| row["last_error"]["message"].as_str().is_some_and(|error| error.contains("is silent"));
    every(&site, "to find its target silent", silent).await?;
    let read = read_from_files(pid)? - before;
    site.target.thaw()?;
    site.publish("F", 11..=20).await?;
    every(&site, "to continue", |row| row["position"]["source_seq"] == 20).await?;
    assert!(read < FILES, "{read} bytes were read from files by {COPIES} idle copies");
    Ok(())
}
