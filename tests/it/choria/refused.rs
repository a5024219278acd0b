//! Files that cannot run, and what the exit code says.

use anyhow::{Result, ensure};
use serde_json::json;
use tokio::net::TcpListener;

use super::{Place, copied, messages};
use crate::harness::{Cli, LIMIT, Service};

#[tokio::test]
async fn a_wrong_file_ends_with_2_and_creates_nothing() -> Result<()> {
    let place = Place::start().await?;
    let file =
        place.write(&format!("name: A\nstreams:\n{}", place.stream("    filter_subjcts: s.>\n    max_age: 10\n")))?;
    let mut service = Service::replicate(&file).spawn()?;
    let status = service.wait(LIMIT).await?;
    ensure!(status.code() == Some(2), "{status}: {}", service.log());
    let at = file.display();
    for expect in [
        format!(
            "error: {at}:6: streams[0].filter_subjcts: `filter_subjcts` is unknown here; did you mean `filter_subject`?"
        ),
        format!("error: {at}:7: streams[0].max_age: `max_age` is `10`: it must be a duration with its unit"),
    ] {
        ensure!(service.log().contains(&expect), "{expect}\n{}", service.log());
    }
    for mut raw in [place.source().await?, place.target().await?] {
        let streams = raw.api("STREAM.NAMES", json!({})).await?;
        ensure!(streams["total"] == 0, "{streams}");
    }
    Ok(())
}

#[tokio::test]
async fn a_file_that_is_missing_and_a_port_that_is_taken() -> Result<()> {
    let place = Place::start().await?;
    let mut service = Service::replicate(&place.path("none.yaml")).spawn()?;
    ensure!(service.wait(LIMIT).await?.code() == Some(2), "{}", service.log());
    let taken = TcpListener::bind("0.0.0.0:0").await?;
    let port = taken.local_addr()?.port();
    let file = place.write(&format!("name: A\nmonitor_port: {port}\nstreams:\n{}", place.stream("")))?;
    let mut service = Service::replicate(&file).spawn()?;
    ensure!(service.wait(LIMIT).await?.code() == Some(1), "{}", service.log());
    Ok(())
}

#[tokio::test]
async fn check_says_what_both_sides_say() -> Result<()> {
    let place = Place::start().await?;
    let file = place.write(&format!("name: A\nstreams:\n{}", place.stream("")))?;
    let (cli, path) = (Cli::new(&place.source.url()), file.display().to_string());
    let missing = cli.run(["replicate", "--check", path.as_str()]).await?;
    ensure!(missing.code == Some(1), "{missing:?}");
    ensure!(missing.stdout.contains(&format!("{path}:3: streams[0].stream: ")), "{missing:?}");
    place.source().await?.create_stream("S", json!({"subjects": ["s.>"]})).await?;
    let fine = cli.run(["--check", path.as_str()]).await?;
    ensure!(fine.code == Some(0) && fine.stdout.contains("can run; streams: 1"), "{fine:?}");
    let made = place.target().await?.api("STREAM.NAMES", json!({})).await?;
    ensure!(made["total"] == 0, "a check creates nothing: {made}");
    Ok(())
}

#[tokio::test]
async fn the_command_may_be_omitted_and_keys_may_be_unknown() -> Result<()> {
    let place = Place::start().await?;
    place.source().await?.create_stream("S", json!({"subjects": ["s.>"]})).await?;
    place.source().await?.publish_all(messages("s", 1, 4)).await?;
    let file = place.write(&format!("name: A\nstreams:\n{}", place.stream("    filter_subjcts: s.1\n")))?;
    let bare = ["--lenient", "--config", &file.display().to_string()].map(str::to_owned);
    let service = Service::with_arguments(bare).spawn()?;
    copied(&mut place.target().await?, "S", 4, &service).await?;
    ensure!(service.log().contains("`filter_subjcts` is unknown here"), "{}", service.log());
    Ok(())
}
