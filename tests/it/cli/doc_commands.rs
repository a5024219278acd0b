//! Every command of the pages that a newcomer follows, run with the real programs by a shell. One that needs what a test cannot have
//! (root, systemd, a network, minutes of building) is named with the reason, and with the test that shows the same.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::install::ROOT;
use super::packages::{have, output};
use crate::harness::server::free_port;
use crate::harness::service::binary;
use crate::harness::{LIMIT, Outgoing, Raw, Role, Server, connect, wait_for, wait_value};

/// One command of a page.
#[derive(Debug, Clone)]
struct DocCommand {
    line: usize,
    text: String,
    /// What the page shows after it.
    shown: String,
}

/// All commands in the console blocks of a page.
fn commands(page: &str) -> Result<Vec<DocCommand>> {
    let text = fs::read_to_string(Path::new(ROOT).join(page)).with_context(|| page.to_owned())?;
    let (mut found, mut in_console) = (Vec::<DocCommand>::new(), false);
    let mut lines = text.lines().enumerate();
    while let Some((number, line)) = lines.next() {
        if line.starts_with("```") {
            in_console = line == "```console";
        } else if let Some(command) = line.strip_prefix("$ ").filter(|_| in_console) {
            let mut text = command.to_owned();
            while let Some(begun) = text.strip_suffix('\\') {
                let (_, more) = lines.next().context("a command ends with a backslash")?;
                text = format!("{begun}{}", more.trim_start());
            }
            // A remark for the reader.
            let text = text.split(" # ").next().unwrap_or_default().trim_end().to_owned();
            found.push(DocCommand { line: number + 1, text, shown: String::new() });
        } else if in_console && let Some(command) = found.last_mut() {
            command.shown += &format!("{line}\n");
        }
    }
    ensure!(!found.is_empty(), "{page} has no commands");
    Ok(found)
}

/// A process that ends with the test.
pub(super) struct Background(pub(super) Child);

impl Drop for Background {
    fn drop(&mut self) {
        // An error means that it is gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A host with the program in its `PATH`, as a shell sees it.
struct Host {
    folder: TempDir,
    path: String,
}

impl Host {
    fn new() -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("host-").tempdir()?;
        let bin = folder.path().join("bin");
        fs::create_dir(&bin)?;
        symlink(binary()?, bin.join("stream-replicator"))?;
        let path = format!("{}:{}", bin.display(), std::env::var("PATH")?);
        Ok(Self { folder, path })
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn shell(&self, text: &str) -> Command {
        let mut command = Command::new("sh");
        command.arg("-c").arg(text).current_dir(self.folder.path()).env_clear().stdin(Stdio::null());
        command.env("PATH", &self.path).env("HOME", self.folder.path()).env("TERM", "dumb");
        // The `nats` tool asks the system, not `HOME`, where the user lives.
        command.env("XDG_CONFIG_HOME", self.at(".config"));
        command
    }

    /// Runs a command to its end, beside the servers of the test.
    async fn run(&self, text: &str) -> Result<String> {
        let mut command = self.shell(text);
        tokio::task::spawn_blocking(move || output(&mut command)).await?
    }

    /// Starts a command that ends with the test; what it prints is in the file.
    fn start(&self, text: &str, log: &str) -> Result<Background> {
        let file = File::create(self.at(log))?;
        let mut command = self.shell(&format!("exec {text}"));
        Ok(Background(command.stdout(file.try_clone()?).stderr(file).spawn()?))
    }

    async fn logs(&self, log: &str, text: &str) -> Result<()> {
        let shown = || fs::read_to_string(self.at(log)).unwrap_or_default();
        let found = wait_for(&format!("`{text}` in {log}"), LIMIT, async || shown().contains(text)).await;
        found.with_context(shown)
    }
}

/// A command of the page as the `nats` tool takes it here: with the servers of the test, which have no logins, and without
/// questions.
fn for_nats_tool(text: &str, document: &Value, server: impl Fn(&str) -> Result<String>) -> Result<String> {
    let mut text = text.replace("'{\"stream\":\"ORDERS\", ...}'", &format!("'{document}'"));
    if let Some((before, _)) = text.clone().split_once(" --creds ") {
        let (before, url) = before.rsplit_once(' ').context("no URL")?;
        text = format!("{before} {}", server(url)?);
    }
    Ok(if text.starts_with("nats kv del") { text + " --force" } else { text })
}

/// What the `nats` tool does with a context: a file, and the selected one.
fn nats_context(host: &Host, words: &[&str], server: impl Fn(&str) -> Result<String>) -> Result<()> {
    let folder = host.at(".config/nats");
    fs::create_dir_all(folder.join("context"))?;
    match words {
        ["add", name, "--server", url, "--creds", _] => {
            let context = json!({"url": server(url)?, "description": "of a test"});
            Ok(fs::write(folder.join(format!("context/{name}.json")), context.to_string())?)
        }
        ["select", name] => Ok(fs::write(folder.join("context.txt"), name)?),
        other => bail!("`nats context {}` is not known", other.join(" ")),
    }
}

/// What the `nats` tool does with an entry of a bucket.
async fn nats_kv(client: &async_nats::Client, words: &[&str], document: &Value) -> Result<()> {
    let bucket = async |name: &str| async_nats::jetstream::new(client.clone()).get_key_value(name).await;
    match words {
        ["get", name, key, "--raw"] => {
            let entry = bucket(name).await?.get(*key).await?.context("an entry")?;
            let shown: Value = serde_json::from_slice(&entry)?;
            ensure!(shown["stream"] == document["stream"], "{shown}");
        }
        ["put", name, key, value @ ..] => {
            let value = value.join(" ");
            let value = if value.contains("...") { document.to_string() } else { value };
            bucket(name).await?.put(*key, value.into()).await?;
        }
        ["del", name, key] => bucket(name).await?.delete(*key).await?,
        other => bail!("`nats kv {}` is not known", other.join(" ")),
    }
    Ok(())
}

/// From top to bottom, as the page says. Where the `nats` tool is not here, it is replaced by what it would write.
#[tokio::test]
async fn the_quick_start_works_command_by_command() -> Result<()> {
    let (east, central) = tokio::try_join!(Server::start(Role::Source), Server::start(Role::Target))?;
    let mut raw = Raw::connect(&east.url()).await?;
    raw.create_stream("ORDERS", json!({"subjects": ["orders.>"]})).await?;
    raw.publish_all((0..20).map(|n| Outgoing::new("orders.new", n.to_string()))).await?;
    let client = connect(&central.url()).await?;
    let host = Host::new()?;
    let text = fs::read_to_string(Path::new(ROOT).join("docs/quickstart.md"))?;
    let (_, document) = text.split_once("```json\n").context("no document")?;
    let document: Value = serde_json::from_str(document.split("```").next().unwrap_or_default())?;
    fs::write(host.at("orders.json"), document.to_string())?;
    let place = |url: &str| match url {
        "tls://east.example.net" => Ok(east.url()),
        "tls://central.example.net" => Ok(central.url()),
        other => bail!("`{other}` is none of the page's servers"),
    };
    let has_nats_tool = have(&["nats"]);
    let mut instances = Vec::new();
    for DocCommand { line, text, shown } in commands("docs/quickstart.md")? {
        let at = || format!("docs/quickstart.md:{line}: `{text}`");
        let words: Vec<_> = text.split_whitespace().collect();
        match words.as_slice() {
            ["nats", ..] if has_nats_tool => {
                let own = for_nats_tool(&text, &document, place).with_context(at)?;
                let printed = host.run(&own).await.with_context(at)?;
                let shows = |field: &str| printed.contains(field);
                ensure!(!text.contains("kv get") || shows("\"stream\""), "{}: {printed} is printed", at());
            }
            ["nats", "context", rest @ ..] => nats_context(&host, rest, place).with_context(at)?,
            ["nats", "kv", rest @ ..] => {
                let rest: Vec<_> = rest.iter().map(|word| word.trim_matches('\'')).collect();
                nats_kv(&client, &rest, &document).await.with_context(at)?;
            }
            ["stream-replicator", "serve", ..] => {
                let log = format!("serve-{}.log", instances.len());
                // Both are on this host.
                let own = text.replace("127.0.0.1:8222", &format!("127.0.0.1:{}", free_port()?));
                instances.push(host.start(&own, &log).with_context(at)?);
                host.logs(&log, "ready").await.with_context(at)?;
                if instances.len() == 2 {
                    let both = async || {
                        host.run("stream-replicator instances").await.is_ok_and(|all| all.lines().count() == 3)
                    };
                    wait_for("two instances", LIMIT, both).await.with_context(at)?;
                }
            }
            ["stream-replicator", "status", "--watch"] => {
                let watch = host.start(&text, "watch.log")?;
                host.logs("watch.log", "ORDERS").await.with_context(at)?;
                drop(watch);
            }
            ["stream-replicator", "config", "rm", ..] => {
                // The page's reader answers the question; without a terminal it is this flag.
                host.run(&format!("{text} --force")).await.with_context(at)?;
            }
            ["stream-replicator", verb, ..] => {
                if *verb == "pause" {
                    // The section before has deleted it by hand, to show how.
                    let added = async || host.run("stream-replicator config add orders.json").await.ok();
                    wait_value("it to be added again", LIMIT, added).await.with_context(at)?;
                }
                let printed = host.run(&text).await.with_context(at)?;
                ensure!(shown.is_empty() || printed == shown, "{}: {printed} is printed", at());
            }
            _ => bail!("{}: nothing runs it", at()),
        }
    }
    ensure!(instances.len() == 2, "{} instances were started", instances.len());
    let mut copies = Raw::connect(&central.url()).await?;
    ensure!(copies.read_stream("ORDERS").await?.len() == 20, "not all are copied, or some twice");
    Ok(())
}

/// What cannot be run here, and where the same is shown.
const NOT_HERE: &[(&str, &str)] = &[
    ("cargo install --locked --path .", "builds everything again: `make install` has the same program"),
    ("cargo install --locked cargo-deb", "needs a network: the tools are used by cli::packages where they are here"),
    ("make packages", "cli::packages builds both packages"),
    ("sudo apt install", "cli::packages installs, upgrades and purges the package below a root of its own"),
    ("sudo dnf install", "cli::packages installs and removes the package below a root of its own"),
    ("sudo systemd-sysusers", "changes the users of this host: cli::packages runs it below a root of its own"),
    ("sudoedit", "cli::install starts the service with the sample that is edited here"),
    ("sudo systemctl", "needs systemd: cli::install checks the unit, control::process what it is notified of"),
    ("systemctl", "needs systemd: control::process checks the status line"),
    ("docker", "needs a network and a daemon: cli::containers checks the Dockerfile"),
    ("cargo vendor", "needs a network"),
    ("rustup target add", "needs a network"),
    ("cargo build --locked --release --target x86_64-unknown-linux-musl", "needs a C compiler for musl"),
    ("kubectl create secret", "run without a cluster below"),
    ("kubectl apply", "needs a cluster: cli::containers checks the manifest"),
    ("helm install", "needs a cluster: cli::containers renders the chart where helm is here"),
];

#[tokio::test]
async fn the_installation_works_as_far_as_it_can_here() -> Result<()> {
    let host = Host::new()?;
    let root = host.at("root");
    let mut ran = 0;
    for DocCommand { line, text, .. } in commands("docs/install.md")? {
        let at = || format!("docs/install.md:{line}: `{text}`");
        match text.as_str() {
            "sudo make install" => {
                let binary = binary()?;
                let make = format!(
                    "make -C {ROOT} install DESTDIR={} PREFIX=/usr PROGRAM={}",
                    root.display(),
                    binary.display()
                );
                host.run(&make).await.with_context(at)?;
                let installed = host.run(&format!("{}/usr/bin/stream-replicator --version", root.display())).await?;
                ensure!(installed.starts_with("stream-replicator 0."), "{installed}");
                ran += 1;
            }
            _ if text.starts_with("kubectl create secret") && have(&["kubectl"]) => {
                fs::write(host.at("control.creds"), "a credentials file")?;
                let made = host.run(&format!("{text} --dry-run=client -o json")).await.with_context(at)?;
                let secret: Value = serde_json::from_str(&made)?;
                ensure!(secret["data"]["control.creds"].is_string(), "{secret}");
                ran += 1;
            }
            _ => {
                let known = NOT_HERE.iter().find(|(begin, _)| text.starts_with(begin));
                let (_, why) = known.with_context(|| format!("{}: nothing runs it", at()))?;
                println!("skipped: {}: {why}", at());
            }
        }
    }
    ensure!(ran > 0, "nothing was run");
    Ok(())
}

/// A package, or `make install`, then two contexts, a replication from flags, and everything is copied.
#[tokio::test]
async fn what_is_installed_copies_by_two_contexts() -> Result<()> {
    let (east, central) = tokio::try_join!(Server::start(Role::Source), Server::start(Role::Target))?;
    let mut raw = Raw::connect(&east.url()).await?;
    raw.create_stream("ORDERS", json!({"subjects": ["orders.>"]})).await?;
    raw.publish_all((0..20).map(|n| Outgoing::new("orders.new", n.to_string()))).await?;
    let host = Host::new()?;
    let root = host.at("root");
    let binary = binary()?;
    let make = format!("make -C {ROOT} install DESTDIR={} PREFIX=/usr PROGRAM={}", root.display(), binary.display());
    host.run(&make).await?;
    for (name, url) in [("east", east.url()), ("central", central.url())] {
        nats_context(&host, &["add", name, "--server", &url, "--creds", ""], |url| Ok(url.to_owned()))?;
    }
    nats_context(&host, &["select", "central"], |url| Ok(url.to_owned()))?;
    // As the unit starts it: the command of the unit, with the options of the environment file.
    let unit = fs::read_to_string(root.join("usr/lib/systemd/system/stream-replicator.service"))?;
    let start = unit.lines().find_map(|line| line.strip_prefix("ExecStart=")).context("no ExecStart")?;
    let environment = root.join("etc/stream-replicator/stream-replicator.env");
    let options = fs::read_to_string(&environment)?;
    let options = options + "\nSTREAM_REPLICATOR_NAME=US-EAST\nNATS_CONTEXT=central\nSTREAM_REPLICATOR_INSTANCE=one\n";
    let is_option = |line: &&str| !line.starts_with('#') && line.contains('=') && !line.contains("_MONITOR");
    let options: Vec<_> =
        options.lines().filter(is_option).filter(|line| !line.starts_with("STREAM_REPLICATOR_SERVER")).collect();
    // What is below /etc of the package is below that of the root here.
    let below = |line: &&str| format!("'{}' ", line.replace("=/etc/", &format!("={}/etc/", root.display())));
    let exports: String = options.iter().map(below).collect();
    // The service may use contexts below the folder of its credentials only, see the page.
    let own = root.join("etc/stream-replicator/nats");
    fs::create_dir_all(own.parent().context("a folder")?)?;
    host.run(&format!("cp -r .config/nats {}", own.display())).await?;
    let contexts = own.parent().context("a folder")?.display();
    let start = format!("env XDG_CONFIG_HOME={contexts} {exports}{}{start}", root.display());
    let _service = host.start(&start, "service.log")?;
    host.logs("service.log", "ready").await?;
    let added = host.run("stream-replicator config add ORDERS --source east --target central").await?;
    ensure!(added.starts_with("ORDERS is at revision "), "{added}");
    let waited = host.run("stream-replicator status ORDERS --wait-caught-up --timeout 60s").await?;
    ensure!(waited == "caught up: 1 replication\n", "{waited}");
    let examined = host.run("stream-replicator doctor").await?;
    ensure!(examined.ends_with("nothing to do\n"), "{examined}");
    let mut copies = Raw::connect(&central.url()).await?;
    ensure!(copies.read_stream("ORDERS").await?.len() == 20);
    Ok(())
}
