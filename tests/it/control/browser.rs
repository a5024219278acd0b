//! A headless Chromium that shows the status page, driven by its DevTools protocol.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use futures_util::{SinkExt, StreamExt};
use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_websockets::{ClientBuilder, Limits, MaybeTlsStream, Message, WebSocketStream};

use crate::harness::{LIMIT, wait_value};

const PROGRAMS: [&str; 3] = ["chromium", "chromium-browser", "google-chrome"];

/// A browser with one tab; all of its processes end when this is dropped.
pub struct Browser {
    child: Child,
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    /// The tab.
    session: String,
    next: u64,
    /// Its profile.
    _folder: TempDir,
}

/// The program, if there is one.
fn program() -> Option<PathBuf> {
    let path: OsString = std::env::var_os("PATH")?;
    let folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    let all = PROGRAMS.iter().flat_map(|name| folders.iter().map(move |folder| folder.join(name)));
    all.into_iter().find(|file| file.is_file())
}

impl Browser {
    /// Starts one; `None`, said aloud, where none is installed.
    pub async fn start() -> Result<Option<Self>> {
        let Some(program) = program() else {
            eprintln!("SKIPPED: none of {} is in PATH", PROGRAMS.join(", "));
            return Ok(None);
        };
        let folder = tempfile::Builder::new().prefix("browser-").tempdir()?;
        let profile = folder.path().join("profile");
        let mut command = Command::new(program);
        command
            .args(["--headless=new", "--no-sandbox", "--no-first-run", "--disable-gpu", "--disable-extensions"])
            .args(["--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update"])
            .args([
                "--disable-sync",
                "--disable-default-apps",
                "--hide-scrollbars",
                "--no-proxy-server",
                "--remote-debugging-port=0",
            ])
            .args(["--remote-debugging-address=127.0.0.1", "about:blank"])
            .arg(format!("--user-data-dir={}", profile.display()))
            .env("HOME", folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(folder.path().join("log"))?)
            // So that the processes that it starts end with it.
            .process_group(0);
        let mut child = command.spawn()?;
        let connected = Self::connect(&profile).await;
        let socket = match connected {
            Ok(socket) => socket,
            Err(error) => {
                end(&mut child);
                let log = fs::read_to_string(folder.path().join("log")).unwrap_or_default();
                return Err(anyhow!("{error:#}\n{log}"));
            }
        };
        let mut browser = Self { child, socket, session: String::new(), next: 0, _folder: folder };
        let target = browser.call("Target.createTarget", json!({"url": "about:blank"})).await?;
        let attach = json!({"targetId": target["targetId"], "flatten": true});
        let attached = browser.call("Target.attachToTarget", attach).await?;
        browser.session = attached["sessionId"].as_str().context("a session")?.to_owned();
        for domain in ["Page.enable", "Runtime.enable"] {
            browser.call(domain, json!({})).await?;
        }
        Ok(Some(browser))
    }

    /// The browser writes where it listens.
    async fn connect(profile: &std::path::Path) -> Result<WebSocketStream<MaybeTlsStream<TcpStream>>> {
        let file = profile.join("DevToolsActivePort");
        let port = async || {
            let text = fs::read_to_string(&file).ok()?;
            let (port, path) = text.trim().split_once('\n')?;
            Some(format!("ws://127.0.0.1:{port}{path}"))
        };
        let uri = wait_value("the browser to listen", LIMIT, port).await?;
        let limits = Limits::default().max_payload_len(Some(256 << 20));
        let (socket, _) = ClientBuilder::new().uri(&uri)?.limits(limits).connect().await?;
        Ok(socket)
    }

    /// One command of the protocol.
    pub async fn call(&mut self, method: &str, params: Value) -> Result<Value> {
        self.next += 1;
        let mut request = json!({"id": self.next, "method": method, "params": params});
        if !self.session.is_empty() {
            request["sessionId"] = self.session.clone().into();
        }
        self.socket.send(Message::text(request.to_string())).await?;
        loop {
            let message =
                timeout(2 * LIMIT, self.socket.next()).await.with_context(|| format!("{method}: no answer"))?;
            let message = message.context("the browser ended")??;
            let Some(text) = message.as_text() else { continue };
            let answer: Value = serde_json::from_str(text)?;
            if answer["id"] == self.next {
                ensure!(answer["error"].is_null(), "{method}: {}", answer["error"]);
                return Ok(answer["result"].clone());
            }
        }
    }

    /// Opens an address.
    pub async fn open(&mut self, url: &str) -> Result<()> {
        self.call("Page.navigate", json!({"url": url})).await?;
        self.until("document.readyState === 'complete'").await?;
        Ok(())
    }

    /// The value of an expression on the page; a promise is waited for.
    pub async fn value(&mut self, expression: &str) -> Result<Value> {
        let params = json!({"expression": expression, "returnByValue": true, "awaitPromise": true});
        let result = self.call("Runtime.evaluate", params).await?;
        ensure!(result["exceptionDetails"].is_null(), "{expression}: {}", result["exceptionDetails"]);
        Ok(result["result"]["value"].clone())
    }

    /// The value of an expression, and the events that the browser traced meanwhile, of these categories.
    pub async fn traced(&mut self, expression: &str, categories: &[&str]) -> Result<(Value, Vec<Value>)> {
        let config = json!({"includedCategories": categories, "excludedCategories": ["*"]});
        let tab = std::mem::take(&mut self.session);
        self.call("Tracing.start", json!({"transferMode": "ReportEvents", "traceConfig": config})).await?;
        self.session = tab;
        let value = self.value(expression).await?;
        self.next += 1;
        self.socket.send(Message::text(json!({"id": self.next, "method": "Tracing.end"}).to_string())).await?;
        let mut traced = Vec::new();
        loop {
            let message = timeout(2 * LIMIT, self.socket.next()).await.context("the trace does not end")?;
            let message = message.context("the browser ended")??;
            let Some(text) = message.as_text() else { continue };
            let mut event: Value = serde_json::from_str(text)?;
            ensure!(event["error"].is_null(), "Tracing.end: {}", event["error"]);
            if event["method"] == "Tracing.tracingComplete" {
                return Ok((value, traced));
            }
            if event["method"] == "Tracing.dataCollected"
                && let Value::Array(some) = event["params"]["value"].take()
            {
                traced.extend(some);
            }
        }
    }

    /// Waits until an expression is true.
    pub async fn until(&mut self, expression: &str) -> Result<()> {
        let end = tokio::time::Instant::now() + LIMIT;
        while self.value(expression).await? != true {
            if tokio::time::Instant::now() > end {
                let text = self.value("document.body.innerText").await?;
                return Err(anyhow!("`{expression}` did not become true; the page says: {text}"));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// The size of the window and the colours that its user prefers.
    pub async fn look(&mut self, width: u32, height: u32, colours: &str) -> Result<()> {
        let size = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600});
        self.call("Emulation.setDeviceMetricsOverride", size).await?;
        let media = json!({"features": [{"name": "prefers-color-scheme", "value": colours}]});
        self.call("Emulation.setEmulatedMedia", media).await?;
        Ok(())
    }

    /// Presses one key.
    pub async fn press(&mut self, key: &str) -> Result<()> {
        let code = match key {
            "Tab" => 9,
            "Enter" => 13,
            "Escape" => 27,
            "ArrowDown" => 40,
            _ => 0,
        };
        let text = match key {
            "Enter" => "\r",
            key if key.chars().count() == 1 => key,
            _ => "",
        };
        for kind in ["keyDown", "keyUp"] {
            let mut event = json!({"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code});
            if kind == "keyDown" && !text.is_empty() {
                event["text"] = text.into();
            }
            self.call("Input.dispatchKeyEvent", event).await?;
        }
        Ok(())
    }

    /// A picture of the whole page, kept below `target/`.
    pub async fn picture(&mut self, name: &str) -> Result<()> {
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("status-page");
        fs::create_dir_all(&folder)?;
        let picture = self.call("Page.captureScreenshot", json!({"captureBeyondViewport": true})).await?;
        let png = BASE64_STANDARD.decode(picture["data"].as_str().context("a picture")?)?;
        fs::write(folder.join(format!("{name}.png")), png)?;
        Ok(())
    }
}

/// Ends the browser and all that it started.
fn end(child: &mut Child) {
    if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        // An error means that they are gone.
        let _ = kill_process_group(pid, Signal::KILL);
    }
    let _ = child.wait();
}

impl Drop for Browser {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}
