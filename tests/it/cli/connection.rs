//! Flags, environment and contexts of the command line's connection.

use std::{
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::Result;
use serde_json::json;

use crate::harness::cli::failed;
use crate::harness::{Cli, PROMPT, Role, Server, Service, Site};

/// Runs `serve` with nothing of the caller's environment; its exit code and everything that it wrote.
fn serve(arguments: &[&str], home: &Path, environment: &[(&str, &str)]) -> Result<(Option<i32>, String)> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_stream-replicator"));
    command.arg("serve").args(arguments).env_clear().env("XDG_CONFIG_HOME", home);
    let output = command.envs(environment.iter().copied()).output()?;
    let text = [output.stdout, output.stderr].concat();
    Ok((output.status.code(), String::from_utf8_lossy(&text).into_owned()))
}

fn context(home: &Path, name: &str, text: &str) -> Result<()> {
    fs::create_dir_all(home.join("nats/context"))?;
    Ok(fs::write(home.join(format!("nats/context/{name}.json")), text)?)
}

#[test]
fn secrets_of_the_environment_are_not_in_the_help() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let environment = [
        ("NATS_URL", "nats://u:s3cret@h"),
        ("STREAM_REPLICATOR_SERVER", "nats://u:s3cret@h"),
        ("NATS_USER", "s3cret"),
        ("NATS_PASSWORD", "s3cret"),
        ("NATS_CREDS", "/s3cret"),
    ];
    let (code, help) = serve(&["--help"], folder.path(), &environment)?;
    assert_eq!(code, Some(0));
    assert!(!help.contains("s3cret"), "{help}");
    for flag in ["--context", "--creds", "--nkey", "--tlsca", "--js-domain", "--allow-url", "NATS_PASSWORD"] {
        assert!(help.contains(flag), "`{flag}` is not in {help}");
    }
    Ok(())
}

#[test]
fn a_service_has_to_be_told_where_to_go() -> Result<()> {
    let folder = tempfile::tempdir()?;
    context(folder.path(), "selected", "{}")?;
    fs::write(folder.path().join("nats/context.txt"), "selected")?;
    let name = ["--name", "US"];
    let check = |arguments: &[&str], environment: &[(&str, &str)], expect: &str| -> Result<()> {
        let (code, text) = serve(&[&name, arguments].concat(), folder.path(), environment)?;
        assert_eq!(code, Some(2), "{text}");
        assert!(text.contains(expect) && !text.contains("s3cret"), "{text}");
        Ok(())
    };
    check(&[], &[], "`--server` or `--context` is needed")?;
    check(&["--context", "none"], &[], "context `none`")?;
    check(&["--context", "../none"], &[], "`--context`: `../none` is not possible")?;
    check(&["--server", "http://u:s3cret@h"], &[], "`--server`")?;
    check(&[], &[("NATS_URL", "http://u:s3cret@h")], "`NATS_URL`")?;
    check(&[], &[("NATS_CONTEXT", "none")], "context `none`")?;
    check(&["--server", "h", "--tlscert", "/c"], &[], "`--tlscert`")?;
    check(&["--server", "h", "--allow-url", "http://h"], &[], "`--allow-url http://h`")?;
    check(&["--server", "h", "--allow-credentials", "/there/is/none"], &[], "`--allow-credentials /there/is/none`")?;
    context(folder.path(), "broken", "{\"password\": \"s3cret\"")?;
    check(&["--context", "broken"], &[], "broken.json`): it is not a JSON object (line 1")?;
    context(folder.path(), "proxy", "{\"socks_proxy\": \"socks5://u:s3cret@h\"}")?;
    check(&["--context", "proxy"], &[], "`socks_proxy`: a SOCKS proxy is not supported")
}

#[tokio::test]
async fn a_context_and_flags_before_it_make_the_connection() -> Result<()> {
    let control =
        Server::builder(Role::Control).config("authorization { users: [{user: u, password: right}] }").start().await?;
    let folder = tempfile::tempdir()?;
    let home = folder.path().display().to_string();
    let fields = json!({"url": "nats://127.0.0.1:1", "user": "u", "password": "wr0ng"});
    context(folder.path(), "hub", &fields.to_string())?;
    // The server by the flag that the harness gives, the user by the context, the password by the environment.
    let service = Service::builder(&control.url(), "TEST").args(["--context", "hub"]);
    let service = service.env("XDG_CONFIG_HOME", &home).env("NATS_PASSWORD", "right").start().await?;
    assert!(service.log().contains("ready"));
    Ok(())
}

/// Runs a command that asks, with nothing of the caller's environment; its exit code and everything that it wrote.
fn ask(home: &Path, environment: &[(&str, &str)], arguments: &[&str]) -> Result<(Option<i32>, String)> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_stream-replicator"));
    command.args(arguments).env_clear().env("XDG_CONFIG_HOME", home).envs(environment.iter().copied());
    let output = command.output()?;
    let text = [output.stdout, output.stderr].concat();
    Ok((output.status.code(), String::from_utf8_lossy(&text).into_owned()))
}

#[tokio::test]
async fn a_command_goes_by_flag_environment_or_selected_context() -> Result<()> {
    let site = Site::small().await?;
    let url = site.control().url();
    let folder = tempfile::tempdir()?;
    context(folder.path(), "here", &json!({"url": url}).to_string())?;
    let status = |environment: &[(&str, &str)], arguments: &[&str]| {
        ask(folder.path(), environment, &[&["status"], arguments].concat())
    };
    let finds = |found: Result<(Option<i32>, String)>| -> Result<()> {
        let (code, text) = found?;
        assert!(code == Some(0) && text.starts_with("REPLICATION"), "{text}");
        Ok(())
    };
    finds(status(&[], &["--server", &url]))?;
    finds(status(&[], &["--context", "here"]))?;
    finds(status(&[("NATS_CONTEXT", "here")], &[]))?;
    finds(status(&[("NATS_URL", &url)], &[]))?;
    fs::write(folder.path().join("nats/context.txt"), "here")?;
    finds(status(&[], &[]))?;
    // Flags take precedence over the selected context.
    let (code, text) = status(&[("NATS_URL", "nats://127.0.0.1:1")], &[])?;
    assert!(code == Some(1) && text.contains("127.0.0.1:1"), "{text}");
    Ok(())
}

#[tokio::test]
async fn each_name_of_the_environment_has_its_effect() -> Result<()> {
    let config = "authorization { user: me, password: right }";
    let server = Server::builder(Role::Control).config(config).start().await?;
    let folder = tempfile::tempdir()?;
    let missing = folder.path().join("missing");
    let missing = missing.to_str().unwrap_or_default();
    let url = server.url();
    let check = |more: &[(&str, &str)], code: i32, expect: &str| -> Result<()> {
        let environment = [&[("NATS_URL", url.as_str())], more].concat();
        let (got, text) = ask(folder.path(), &environment, &["status"])?;
        assert_eq!(got, Some(code), "{more:?}: {text}");
        assert!(text.to_lowercase().contains(&expect.to_lowercase()), "`{expect}` is not in {text}");
        Ok(())
    };
    check(&[("NATS_USER", "me"), ("NATS_PASSWORD", "wrong")], 1, "authorization")?;
    // Let in: there is no service that answers.
    check(&[("NATS_USER", "me"), ("NATS_PASSWORD", "right")], 1, "replicator.status")?;
    let me = [("NATS_USER", "me"), ("NATS_PASSWORD", "right")];
    check(&[&me[..], &[("STREAM_REPLICATOR_PREFIX", "acme.copy")]].concat(), 1, "acme.copy.status")?;
    check(&[("NATS_CREDS", missing)], 1, missing)?;
    check(&[("NATS_NKEY", missing)], 1, missing)?;
    check(&[&me[..], &[("NATS_CA", missing)]].concat(), 1, "TLS")?;
    check(&[("NATS_CERT", missing)], 2, "go together")?;
    check(&[("NATS_KEY", missing)], 2, "go together")?;
    check(&[("NATS_CONTEXT", "none")], 2, "context `none`")?;
    check(&[("NATS_JS_DOMAIN", "a"), ("NATS_JS_API_PREFIX", "b")], 2, "NATS_JS_API_PREFIX")?;
    check(&[("NATS_JS_DOMAIN", "a.b")], 2, "NATS_JS_DOMAIN")?;
    check(&[("NATS_INBOX_PREFIX", "a b")], 2, "NATS_INBOX_PREFIX")?;
    check(&[("NATS_TIMEOUT", "soon")], 2, "NATS_TIMEOUT")?;
    Ok(())
}

#[tokio::test]
async fn a_command_takes_no_longer_than_it_may_to_connect() -> Result<()> {
    let site = Site::small().await?;
    site.target.freeze()?;
    let silent = site.target.url();
    let begun = Instant::now();
    let ended = Cli::new(&format!("{silent},{silent}")).run(["status", "--timeout", "1s"]).await?;
    let took = begun.elapsed();
    failed(&ended, &["cannot connect to `", &format!("127.0.0.1:{}", site.target.port()), "no answer within 1s"]);
    assert!(took < Duration::from_secs(1) + PROMPT, "{took:?}");
    // Each server gets its part of the time.
    Cli::new(&format!("{silent},{}", site.service_url())).ok(["status", "--timeout", "3s"]).await?;
    Ok(())
}

#[tokio::test]
async fn flags_are_taken_before_and_after_the_command() -> Result<()> {
    let config = "authorization { token: \"right-t0ken\" }";
    let server = Server::builder(Role::Control).config(config).start().await?;
    let cli = Cli::new("nats://127.0.0.1:1");
    let (url, refused) = (server.url(), "no service answers on `elsewhere.status`");
    let flags = ["--server", &url, "--token", "right-t0ken", "--prefix", "elsewhere", "--trace"];
    let verb = ["status"];
    for arguments in [flags.iter().chain(&verb).collect::<Vec<_>>(), verb.iter().chain(&flags).collect()] {
        let ended = cli.run(arguments).await?;
        assert!(ended.code == Some(1) && ended.stderr.contains(refused), "{ended:?}");
        assert!(
            ended.stderr.contains(">>> elsewhere.status: 0 bytes\n<<< ") && !ended.stderr.contains("t0ken"),
            "{ended:?}"
        );
    }
    let by_environment = Cli::new(&url).env("NATS_TOKEN", "right-t0ken");
    let ended = by_environment.run(["--prefix", "elsewhere", "config", "ls"]).await?;
    assert!(ended.stderr.contains("no service answers on `elsewhere.config.list`"), "{ended:?}");
    // A context that is named in the environment, and does not exist.
    let context = Cli::new(&url).env("NATS_CONTEXT", "none").env("NATS_TOKEN", "right-t0ken");
    assert!(context.run(["status"]).await?.stderr.contains("there is no such file"));
    let ended = context.run(["--no-context", "status", "--prefix", "elsewhere"]).await?;
    assert!(ended.stderr.contains(refused), "{ended:?}");
    for (arguments, told) in [
        (&["--json", "serve", "--name", "X"][..], "`--json` has no effect with `serve`"),
        (&["completions", "bash", "--server", "nats://h"], "`--server` has no effect with `completions`"),
        (&["status", "--socks-proxy", "socks5://h"], "a SOCKS proxy is not supported"),
    ] {
        let ended = cli.run(arguments).await?;
        assert!(ended.code == Some(2) && ended.stderr.contains(told), "{arguments:?}: {ended:?}");
    }
    Ok(())
}
