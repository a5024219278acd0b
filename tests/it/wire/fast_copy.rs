//! The example of the crate `nats-lane`, as a newcomer would run it.

use anyhow::{Result, bail};
use nats_lane::ErrorKind;
use serde_json::json;

use crate::harness::{Outgoing, Raw, Role, Server};

#[allow(dead_code, reason = "its `main` reads the arguments of a program")]
#[path = "../../../crates/nats-lane/examples/fast_copy.rs"]
mod example;

/// Several pulls and acks, and a pull that is not full.
const MESSAGES: u64 = 2345;

#[tokio::test]
async fn the_example_copies_a_stream_byte_for_byte() -> Result<()> {
    let (source, target) = (Server::start(Role::Source).await?, Server::start(Role::Target).await?);
    let mut raw = Raw::connect(&source.url()).await?;
    raw.create_stream("ORDERS", json!({"subjects": ["orders.>"]})).await?;
    let message = |number: u64| {
        let message = Outgoing::new(format!("orders.{}", number % 7), vec![b'x'; number as usize % 99]);
        if number.is_multiple_of(3) { message.with_lines(&["Color: blue", "color:  2"]) } else { message }
    };
    raw.publish_all((1..=MESSAGES).map(message)).await?;
    for hole in [1, 700, MESSAGES] {
        raw.api("STREAM.MSG.DELETE.ORDERS", json!({"seq": hole})).await?;
    }
    let copied = example::copy(&source.url(), "ORDERS", &target.url()).await;
    if !target.at_least(2, 14) {
        let error = copied.unwrap_err();
        // A server up to 2.11 ignores the field, and its ack is another one; 2.12 refuses the field.
        let expected = ["does not know fast-ingest", "allow_batched"];
        assert!(expected.iter().any(|text| error.message.contains(text)), "{error}");
        return Ok(());
    }
    assert_eq!(copied?, MESSAGES - 3);
    let (there, here) =
        (Raw::connect(&target.url()).await?.read_stream("ORDERS").await?, raw.read_stream("ORDERS").await?);
    assert_eq!(there.len(), here.len());
    for (copy, original) in there.iter().zip(&here) {
        let parts = |message: &crate::harness::Stored| {
            (message.subject.clone(), message.header.clone(), message.payload.clone())
        };
        assert_eq!(parts(copy), parts(original), "{}", original.seq);
    }
    Ok(())
}

#[tokio::test]
async fn the_example_names_what_is_missing() -> Result<()> {
    let source = Server::start(Role::Source).await?;
    let Err(error) = example::copy(&source.url(), "NONE", &source.url()).await else { bail!("there is such a stream") };
    assert_eq!(error.kind, ErrorKind::Hold);
    assert!(error.message.contains("no stream `NONE`"), "{error}");
    // The stream would be copied onto itself.
    let mut raw = Raw::connect(&source.url()).await?;
    raw.create_stream("S", json!({"subjects": ["s"]})).await?;
    raw.publish(&Outgoing::new("s", "x")).await?;
    assert!(example::copy(&source.url(), "S", &source.url()).await.is_err());
    Ok(())
}
