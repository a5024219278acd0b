//! The harness judges the product, so it is tested itself first.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::harness::checker::compare;
use crate::harness::server::free_port;
use crate::harness::{
    BOTH, Cluster, Direction, Expect, LIMIT, Newcomers, Outgoing, Proxy, Raw, Role, Server, Stored, connect, wait_for,
};

type Alteration = Box<dyn Fn(&mut Stored)>;

/// A source with `count` messages and a faithful copy of it, as a replication would have made it.
async fn pair(server: &Server, count: u64) -> Result<(Vec<Stored>, Vec<Stored>)> {
    let mut raw = Raw::connect(&server.url()).await?;
    raw.create_stream("S", json!({"subjects": ["s.>"]})).await?;
    raw.create_stream("T", json!({"subjects": ["t.>"]})).await?;
    let messages = (1..=count).map(|i| {
        let id = format!("Nats-Msg-Id: m{i}");
        let message = Outgoing::new(format!("s.{}", i % 3), format!("payload {i}"));
        if i % 2 == 0 { message } else { message.with_lines(&["A: 1", &id, "a: 2", "A:  3"]) }
    });
    raw.publish_all(messages).await?;
    let source = raw.read_stream("S").await?;
    raw.publish_all(source.iter().map(copy_of)).await?;
    let target = raw.read_stream("T").await?;
    Ok((source, target))
}

fn copy_of(message: &Stored) -> Outgoing {
    let provenance = format!("Choria-SR-Source: S {} SITE SITE {}", message.seq, message.time / 1_000_000);
    let id = format!("Choria-SR-Msg-Id: m{}", message.seq);
    let mut lines = if message.header.is_empty() { vec![] } else { vec!["A: 1", "a: 2", "A:  3", &id] };
    lines.push(&provenance);
    Outgoing::new(message.subject.replace("s.", "t."), message.payload.clone()).with_lines(&lines)
}

fn expect() -> Expect<'static> {
    Expect::copy_of("S").site("SITE").mapped(|s| s.replace("s.", "t."))
}

#[tokio::test]
async fn checker_accepts_a_right_copy_and_names_each_fault() -> Result<()> {
    let server = Server::start(Role::Source).await?;
    let (source, good) = pair(&server, 20).await?;
    let report = compare(&source, &good, &expect());
    report.verify()?;
    assert_eq!((report.expected, report.copied), (20, 20));

    let mut missing = good.clone();
    missing.remove(6);
    let report = compare(&source, &missing, &expect());
    assert_eq!(report.lost.count, 1, "{report}");
    assert!(report.to_string().contains("1 lost: source 7 `s.1`"), "{report}");

    let mut doubled = good.clone();
    doubled.insert(12, good[9].clone());
    let report = compare(&source, &doubled, &expect());
    assert_eq!((report.duplicated.count, report.out_of_order.count, report.lost.count), (1, 0, 0), "{report}");

    let mut swapped = good.clone();
    swapped.swap(3, 4);
    let report = compare(&source, &swapped, &expect());
    assert_eq!((report.out_of_order.count, report.duplicated.count), (1, 0), "{report}");
    assert!(compare(&source, &swapped, &expect().late_allowed()).is_clean());

    let mut foreign = good.clone();
    foreign[19].header.clear();
    let report = compare(&source, &foreign, &expect());
    assert_eq!((report.foreign.count, report.lost.count), (1, 1), "{report}");
    Ok(())
}

#[tokio::test]
async fn checker_sees_every_altered_byte() -> Result<()> {
    let server = Server::start(Role::Source).await?;
    let (source, good) = pair(&server, 5).await?;
    let change_header = |from: &'static str, to: &'static str| {
        move |m: &mut Stored| m.header = String::from_utf8_lossy(&m.header).replacen(from, to, 1).into_bytes()
    };
    let alterations: Vec<(&str, Alteration)> = vec![
        ("payload", Box::new(|m| m.payload[0] ^= 1)),
        ("subject", Box::new(|m| m.subject.push('x'))),
        ("spelling", Box::new(change_header("a: 2", "A: 2"))),
        ("space", Box::new(change_header("A:  3", "A: 3"))),
        ("order", Box::new(change_header("A: 1\r\na: 2", "a: 2\r\nA: 1"))),
        ("dropped", Box::new(change_header("a: 2\r\n", ""))),
        ("added", Box::new(change_header("a: 2", "a: 2\r\nB: 1"))),
        ("id", Box::new(change_header("Choria-SR-Msg-Id: m3", "Choria-SR-Msg-Id: m4"))),
        ("site", Box::new(change_header("SITE SITE", "OTHER SITE"))),
        ("time", Box::new(change_header("SITE SITE 1", "SITE SITE 2"))),
    ];
    for (what, alter) in alterations {
        let mut target = good.clone();
        alter(&mut target[2]);
        let report = compare(&source, &target, &expect());
        assert_eq!((report.altered.count, report.lost.count), (1, 0), "{what}: {report}");
    }
    Ok(())
}

#[tokio::test]
async fn server_keeps_port_and_data_over_kill_stop_and_restart() -> Result<()> {
    let mut server = Server::start(Role::Source).await?;
    let (url, pid) = (server.url(), server.pid());
    let (source, _) = pair(&server, 10).await?;
    server.kill()?;
    server.restart().await?;
    assert_eq!(server.url(), url);
    assert_ne!(server.pid(), pid);
    assert_eq!(Raw::connect(&url).await?.read_stream("S").await?, source);

    server.stop().await?;
    server.snapshot("before")?;
    server.restart().await?;
    Raw::connect(&url).await?.publish(&Outgoing::new("s.new", "later")).await?;
    assert_eq!(Raw::connect(&url).await?.read_stream("S").await?.len(), 11);
    server.stop().await?;
    server.rollback("before")?;
    server.restart().await?;
    assert_eq!(Raw::connect(&url).await?.read_stream("S").await?, source);

    server.stop().await?;
    server.wipe()?;
    server.restart().await?;
    assert!(Raw::connect(&url).await?.read_stream("S").await.is_err());
    Ok(())
}

#[tokio::test]
async fn a_frozen_server_answers_again_after_the_thaw() -> Result<()> {
    let server = Server::start(Role::Source).await?;
    let jetstream = async_nats::jetstream::new(connect(&server.url()).await?);
    server.freeze()?;
    assert!(tokio::time::timeout(Duration::from_millis(300), jetstream.query_account()).await.is_err());
    server.thaw()?;
    jetstream.query_account().await?;
    Ok(())
}

#[tokio::test]
async fn servers_take_users_and_further_configuration() -> Result<()> {
    let config = "max_payload: 2048\nauthorization { users: [{user: a, password: b}] }";
    let server = Server::builder(Role::Target).name("named").domain("hub").config(config).start().await?;
    assert!(Raw::connect(&server.url()).await.is_err());
    let mut raw = Raw::connect(&server.url_as("a:b")).await?.with_api("$JS.hub.API");
    raw.create_stream("S", json!({"subjects": ["s.>"]})).await?;
    raw.publish(&Outgoing::new("s.1", "x")).await?;
    assert_eq!(raw.read_stream("S").await?.len(), 1);
    assert!(raw.publish(&Outgoing::new("s.1", vec![0; 4096])).await.is_err());
    assert!(server.at_least(2, 10), "{}", server.version());
    Ok(())
}

#[test]
fn a_port_is_given_to_one_test_only() -> Result<()> {
    let ports = (0..500).map(|_| free_port()).collect::<Result<Vec<_>, _>>()?;
    let different: BTreeSet<_> = ports.iter().collect();
    assert_eq!(different.len(), ports.len());
    Ok(())
}

#[tokio::test]
async fn raw_client_stores_and_reads_odd_headers_byte_for_byte() -> Result<()> {
    let server = Server::start(Role::Source).await?;
    let mut raw = Raw::connect(&server.url()).await?;
    raw.create_stream("S", json!({"subjects": ["s.>"]})).await?;
    let blocks: [&[u8]; 6] = [
        b"NATS/1.0\r\n\r\n",
        b"NATS/1.0\r\nA: 1\r\na:2\r\nA:   3  \r\n\r\n",
        b"NATS/1.0\r\nno colon here\r\n: no name\r\nB:\r\n\r\n",
        b"NATS/1.0\r\nBytes: \xff\xfe\x00\x01\r\n\r\n",
        b"NATS/1.0\r\nUmlaut-\xc3\xa4: \xe2\x82\xac\r\n\r\n",
        b"NATS/1.0\r\nbare\nline feed: x\r\n\r\n",
    ];
    let messages: Vec<_> = blocks.iter().map(|b| Outgoing::new("s.1", "p").with_block(*b)).collect();
    raw.publish_all(messages).await?;
    raw.publish(&Outgoing::new("s.2", "")).await?;
    let stored = raw.read_stream("S").await?;
    for (block, message) in blocks.iter().zip(&stored) {
        assert_eq!(block, &message.header.as_slice());
    }
    assert_eq!((stored[6].seq, stored[6].header.len(), stored[6].payload.len()), (7, 0, 0));

    // The one thing that a server changes by itself, which the checker therefore allows.
    raw.publish(&Outgoing::new("s.3", "p").with_block(*b"NATS/1.0 503 Gone\r\nA: 1\r\n\r\n")).await?;
    let kept: &[u8] = if server.at_least(2, 12) { b"NATS/1.0\r\n" } else { b"NATS/1.0 503 Gone\r\n" };
    let found = raw.read_stream_from("S", 8).await?.remove(0).header;
    assert!(found.starts_with(kept), "{:?}", String::from_utf8_lossy(&found));
    Ok(())
}

#[tokio::test]
async fn proxy_cuts_stalls_and_lets_through_again() -> Result<()> {
    let server = Server::start(Role::Source).await?;
    let proxy = Proxy::start(server.port()).await?;
    let mut raw = Raw::connect(&proxy.url()).await?;
    raw.create_stream("S", json!({"subjects": ["s.>"]})).await?;

    proxy.stall();
    let message = Outgoing::new("s.1", "x");
    assert!(tokio::time::timeout(Duration::from_millis(200), raw.publish(&message)).await.is_err());
    proxy.resume();
    let mut direct = Raw::connect(&server.url()).await?;
    wait_for("the stalled message", LIMIT, async || direct.read_stream("S").await.is_ok_and(|s| s.len() == 1)).await?;

    proxy.cut();
    assert!(raw.publish(&Outgoing::new("s.1", "x")).await.is_err());
    assert!(Raw::connect(&proxy.url()).await.is_err());
    proxy.resume();
    Raw::connect(&proxy.url()).await?.publish(&Outgoing::new("s.1", "x")).await?;
    Ok(())
}

/// Both ends of a connection through a proxy, without NATS.
struct ProxyPipe {
    proxy: Proxy,
    listener: TcpListener,
}

impl ProxyPipe {
    async fn start() -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        Ok(Self { proxy: Proxy::start(listener.local_addr()?.port()).await?, listener })
    }

    /// Client and server.
    async fn connect(&self) -> Result<(TcpStream, TcpStream)> {
        let client = TcpStream::connect((Ipv4Addr::LOCALHOST, self.proxy.port())).await?;
        let (server, _) = self.listener.accept().await?;
        client.set_nodelay(true)?;
        server.set_nodelay(true)?;
        Ok((client, server))
    }
}

/// The time from the first byte sent to the last one received.
async fn transfer(from: &mut TcpStream, to: &mut TcpStream, bytes: usize) -> Result<Duration> {
    let begun = Instant::now();
    let (data, mut received) = (vec![7; bytes], vec![0; bytes]);
    tokio::try_join!(from.write_all(&data), to.read_exact(&mut received))?;
    assert_eq!(data, received);
    Ok(begun.elapsed())
}

/// Nothing is there to be read for a while, not even an end.
async fn silent(stream: &mut TcpStream) -> bool {
    tokio::time::timeout(Duration::from_millis(200), stream.read(&mut [0; 16])).await.is_err()
}

#[tokio::test]
async fn latency_is_added_in_each_direction_at_the_same_rate() -> Result<()> {
    const MIB: usize = 1 << 20;
    let pipe = ProxyPipe::start().await?;
    let (mut client, mut server) = pipe.connect().await?;
    for (directions, there, back) in [(BOTH, 25, 25), (&[Direction::ToServer], 25, 0), (&[Direction::ToClient], 0, 25)]
    {
        pipe.proxy.latency(BOTH, Duration::ZERO);
        pipe.proxy.latency(directions, Duration::from_millis(25));
        let (mut fastest_there, mut fastest_back) = (LIMIT, LIMIT);
        for _ in 0..10 {
            fastest_there = fastest_there.min(transfer(&mut client, &mut server, 1).await?);
            fastest_back = fastest_back.min(transfer(&mut server, &mut client, 1).await?);
        }
        for (took, asked) in [(fastest_there, there), (fastest_back, back)] {
            let range = Duration::from_millis(asked)..Duration::from_millis(asked + 10);
            assert!(range.contains(&took), "{directions:?}: {took:?} instead of {asked} ms");
        }
    }
    pipe.proxy.latency(BOTH, Duration::from_millis(25));
    let took = transfer(&mut client, &mut server, 64 * MIB).await?;
    println!("64 MiB with 25 ms of latency in {took:?}");
    // Held back one after the other, pieces of 64 KiB would make 2.5 MiB/s.
    assert!(took < Duration::from_secs(4), "64 MiB in {took:?}");
    Ok(())
}

#[tokio::test]
async fn a_throttle_passes_on_what_was_asked_in_its_direction() -> Result<()> {
    const RATE: usize = 4 << 20;
    let pipe = ProxyPipe::start().await?;
    let (mut client, mut server) = pipe.connect().await?;
    pipe.proxy.throttle(&[Direction::ToServer], Some(RATE as u64));
    let took = transfer(&mut client, &mut server, 2 * RATE).await?.as_secs_f64();
    assert!((1.6..2.4).contains(&took), "two seconds' worth took {took} s");
    let back = transfer(&mut server, &mut client, 2 * RATE).await?.as_secs_f64();
    assert!(back < 1.0, "the other direction took {back} s");
    pipe.proxy.throttle(BOTH, None);
    let free = transfer(&mut client, &mut server, 2 * RATE).await?.as_secs_f64();
    assert!(free < 1.0, "without a throttle it took {free} s");
    Ok(())
}

#[tokio::test]
async fn half_open_connections_stay_open_and_never_recover() -> Result<()> {
    let pipe = ProxyPipe::start().await?;
    for (directions, newcomers) in [
        (BOTH, Newcomers::Work),
        (BOTH, Newcomers::Hang),
        (&[Direction::ToServer], Newcomers::Hang),
        (&[Direction::ToClient], Newcomers::Work),
    ] {
        let lost = |direction| directions.contains(&direction);
        let (mut client, mut server) = pipe.connect().await?;
        transfer(&mut client, &mut server, 1000).await?;
        pipe.proxy.half_open(directions, newcomers);
        let (mut late_client, mut late_server) = pipe.connect().await?;
        for during in [true, false] {
            client.write_all(b"there").await?;
            server.write_all(b"back").await?;
            assert_eq!(silent(&mut server).await, lost(Direction::ToServer), "{directions:?}, {during}");
            assert_eq!(silent(&mut client).await, lost(Direction::ToClient), "{directions:?}, {during}");
            late_client.write_all(b"there").await?;
            let hangs = newcomers == Newcomers::Hang && lost(Direction::ToServer);
            assert_eq!(silent(&mut late_server).await, hangs, "{directions:?}, {newcomers:?}, {during}");
            pipe.proxy.resume();
        }
        // Nor does the other end get a sign.
        drop(client);
        assert_eq!(silent(&mut server).await, lost(Direction::ToServer), "{directions:?}");
        let (mut client, mut server) = pipe.connect().await?;
        transfer(&mut client, &mut server, 1000).await?;
        transfer(&mut server, &mut client, 1000).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_connection_is_cut_after_as_many_bytes_as_asked() -> Result<()> {
    let pipe = ProxyPipe::start().await?;
    for (direction, bytes) in [(Direction::ToServer, 1), (Direction::ToServer, 100_001), (Direction::ToClient, 70_000)]
    {
        let (client, server) = pipe.connect().await?;
        let (mut from, mut to) = if direction == Direction::ToServer { (client, server) } else { (server, client) };
        pipe.proxy.cut_after(direction, bytes);
        let (sent, mut received) = (vec![7; 200_000], Vec::new());
        // What is written after the end may fail.
        let (_, read) = tokio::join!(from.write_all(&sent), to.read_to_end(&mut received));
        assert!(read.is_ok() || !received.is_empty(), "{read:?}");
        assert_eq!(received.len() as u64, bytes, "{direction:?}");
    }
    let (mut client, mut server) = pipe.connect().await?;
    transfer(&mut client, &mut server, 200_000).await?;
    Ok(())
}

#[tokio::test]
async fn a_large_stream_is_read_whole_and_in_order() -> Result<()> {
    let server = Server::start(Role::Source).await?;
    let mut raw = Raw::connect(&server.url()).await?;
    raw.create_stream("S", json!({"subjects": ["s.>"]})).await?;
    let last = raw.publish_all((0..20_000).map(|i| Outgoing::new(format!("s.{i}"), vec![b'x'; 100]))).await?;
    let stored = raw.read_stream("S").await?;
    assert_eq!((last, stored.len()), (20_000, 20_000));
    assert!(stored.iter().zip(1..).all(|(m, seq)| m.seq == seq));
    Ok(())
}

#[tokio::test]
async fn a_cluster_replicates_and_changes_its_leader() -> Result<()> {
    let mut cluster = Cluster::start(Role::Target).await?;
    let mut raw = Raw::connect(&cluster.servers[0].url()).await?;
    raw.create_stream("S", json!({"subjects": ["s.>"], "num_replicas": 3})).await?;
    raw.publish_all((0..100).map(|i| Outgoing::new("s.1", i.to_string()))).await?;
    cluster.step_down("S").await?;
    let leader = cluster.leader("S").await.expect("a leader");
    cluster.servers[leader].kill()?;
    let next = async || cluster.leader("S").await.is_some_and(|now| now != leader);
    wait_for("a leader among the two", LIMIT, next).await?;
    assert_eq!(cluster.read_stream("S").await?.len(), 100);
    Ok(())
}
