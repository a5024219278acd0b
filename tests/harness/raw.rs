//! A small NATS client of its own that leaves every byte alone: it publishes header blocks as they are given
//! and reads a stream exactly as it is stored. Client libraries parse, sort, trim or refuse headers, and the
//! product has a protocol client of its own, which must not be judged by itself.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

use super::LIMIT;

/// What to publish.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outgoing {
    pub subject: String,
    /// The whole header block, from `NATS/1.0` to the empty line, as it shall be stored; `None` for none.
    pub header: Option<Vec<u8>>,
    pub payload: Vec<u8>,
}

impl Outgoing {
    pub fn new(subject: impl Into<String>, payload: impl Into<Vec<u8>>) -> Self {
        Self { subject: subject.into(), header: None, payload: payload.into() }
    }

    /// With a header block made of these lines.
    pub fn with_lines(mut self, lines: &[&str]) -> Self {
        let mut block = "NATS/1.0\r\n".to_owned();
        for line in lines {
            block += line;
            block += "\r\n";
        }
        block += "\r\n";
        self.header = Some(block.into_bytes());
        self
    }

    /// With exactly this header block.
    pub fn with_block(mut self, block: impl Into<Vec<u8>>) -> Self {
        self.header = Some(block.into());
        self
    }
}

/// A message as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    pub seq: u64,
    /// Stored at, in ns since 1970.
    pub time: u64,
    pub subject: String,
    /// The header block; empty when there is none.
    pub header: Vec<u8>,
    pub payload: Vec<u8>,
}

/// A message from the server.
#[derive(Debug)]
struct Frame {
    subject: String,
    reply: String,
    header: Vec<u8>,
    payload: Vec<u8>,
}

/// One connection. Slow and simple: one thing at a time.
#[derive(Debug)]
pub struct Raw {
    read: BufReader<OwnedReadHalf>,
    write: OwnedWriteHalf,
    inbox: String,
    api: String,
    next: u64,
}

impl Raw {
    /// Connects to `nats://[user:password@|token@]host:port`.
    pub async fn connect(url: &str) -> Result<Self> {
        let url = url::Url::parse(url)?;
        let host = url.host_str().context("no host")?;
        let stream = TcpStream::connect((host, url.port().unwrap_or(4222))).await?;
        stream.set_nodelay(true)?;
        let (read, mut write) = stream.into_split();
        let mut options = json!({"verbose": false, "pedantic": false, "headers": true, "no_responders": true,
            "name": "raw", "lang": "rust", "version": "0", "protocol": 1});
        match (url.username(), url.password()) {
            ("", _) => {}
            (token, None) => options["auth_token"] = token.into(),
            (user, Some(password)) => {
                options["user"] = user.into();
                options["pass"] = password.into();
            }
        }
        let inbox = format!("_INBOX.{}", nuid::next());
        write.write_all(format!("CONNECT {options}\r\nSUB {inbox}.* 1\r\nPING\r\n").as_bytes()).await?;
        let mut raw = Self { read: BufReader::new(read), write, inbox, api: "$JS.API".to_owned(), next: 0 };
        tokio::time::timeout(LIMIT, raw.until_pong()).await.context("no PONG")??;
        Ok(raw)
    }

    /// Uses another JetStream API prefix: `$JS.<domain>.API`.
    pub fn with_api(mut self, prefix: &str) -> Self {
        prefix.clone_into(&mut self.api);
        self
    }

    /// Publishes and waits for nothing.
    pub async fn send_only(&mut self, message: &Outgoing) -> Result<()> {
        let reply = self.reply();
        self.send(message, &reply).await
    }

    /// Publishes all of them without a reply subject, in one write, and waits for nothing.
    pub async fn send_all(&mut self, messages: &[Outgoing]) -> Result<()> {
        let mut buffer = Vec::new();
        for message in messages {
            encode(&mut buffer, message, "");
        }
        Ok(self.write.write_all(&buffer).await?)
    }

    /// Publishes with any reply subject and waits for nothing.
    pub async fn send_with_reply(&mut self, message: &Outgoing, reply: &str) -> Result<()> {
        self.send(message, reply).await
    }

    /// Publishes and waits for the ack; returns the sequence in the stream.
    pub async fn publish(&mut self, message: &Outgoing) -> Result<u64> {
        let reply = self.reply();
        self.send(message, &reply).await?;
        self.write.flush().await?;
        ack(&self.next_for(&reply).await?)
    }

    /// Publishes all in order, with many in flight; returns the sequence of the last. Any refusal is an error.
    pub async fn publish_all(&mut self, messages: impl IntoIterator<Item = Outgoing>) -> Result<u64> {
        const IN_THE_AIR: usize = 1000;
        let mut waiting = 0;
        let mut last = 0;
        let reply = self.reply();
        let mut buffer = Vec::with_capacity(256 * 1024);
        for message in messages {
            encode(&mut buffer, &message, &reply);
            waiting += 1;
            if waiting >= IN_THE_AIR || buffer.len() >= 256 * 1024 {
                self.write.write_all(&buffer).await?;
                buffer.clear();
                while waiting > IN_THE_AIR / 2 {
                    last = last.max(ack(&self.next_for(&reply).await?)?);
                    waiting -= 1;
                }
            }
        }
        self.write.write_all(&buffer).await?;
        for _ in 0..waiting {
            last = last.max(ack(&self.next_for(&reply).await?)?);
        }
        Ok(last)
    }

    /// Publishes all of them at once and waits for the acks for this time: the sequence of each that was confirmed, `None` where
    /// that is refused or not known. Then the connection is of no use any more.
    pub async fn publish_each(&mut self, messages: &[Outgoing], limit: Duration) -> Vec<Option<u64>> {
        let mut sequences = vec![None; messages.len()];
        let mut waiting = HashMap::new();
        let mut buffer = Vec::new();
        for (index, message) in messages.iter().enumerate() {
            let reply = self.reply();
            encode(&mut buffer, message, &reply);
            waiting.insert(reply, index);
        }
        let acks = async {
            self.write.write_all(&buffer).await?;
            while !waiting.is_empty() {
                let frame = self.read_frame().await?;
                let Some(index) = waiting.remove(&frame.subject) else { continue };
                // Sequence 0: a duplicate of what is not stored yet.
                sequences[index] = ack(&frame).ok().filter(|sequence| *sequence > 0);
            }
            anyhow::Ok(())
        };
        let _ = tokio::time::timeout(limit, acks).await;
        sequences
    }

    /// Sends a request and returns the reply's payload.
    pub async fn request(&mut self, subject: &str, payload: &[u8]) -> Result<Vec<u8>> {
        let reply = self.reply();
        self.send(&Outgoing::new(subject, payload), &reply).await?;
        let frame = self.next_for(&reply).await?;
        ensure!(!frame.header.starts_with(b"NATS/1.0 503"), "no responders on `{subject}`");
        Ok(frame.payload)
    }

    /// A JetStream API request, for example `api("STREAM.INFO.ORDERS", json!({}))`; an error reply is an error.
    pub async fn api(&mut self, what: &str, body: Value) -> Result<Value> {
        let subject = format!("{}.{what}", self.api);
        let body = if body.is_null() { Vec::new() } else { serde_json::to_vec(&body)? };
        let reply: Value = serde_json::from_slice(&self.request(&subject, &body).await?)?;
        match reply.get("error") {
            Some(error) => bail!("`{subject}`: {error}"),
            None => Ok(reply),
        }
    }

    /// Creates a stream: `config` needs no `name`. While the server still removes what a deleted one of this name left on
    /// the disk (10049, which says other things too), it is asked again.
    pub async fn create_stream(&mut self, name: &str, mut config: Value) -> Result<Value> {
        config["name"] = name.into();
        let begun = Instant::now();
        loop {
            match self.api(&format!("STREAM.CREATE.{name}"), config.clone()).await {
                Err(error) if is_still_removed(&error.to_string()) && begun.elapsed() < LIMIT => {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                made => return made,
            }
        }
    }

    /// `state` of a stream: `messages`, `first_seq`, `last_seq`, ...
    pub async fn stream_state(&mut self, stream: &str) -> Result<Value> {
        Ok(self.api(&format!("STREAM.INFO.{stream}"), Value::Null).await?["state"].take())
    }

    /// Reads a whole stream as it is stored.
    pub async fn read_stream(&mut self, stream: &str) -> Result<Vec<Stored>> {
        self.read_stream_from(stream, 1).await
    }

    /// Reads what is stored from sequence `first` on.
    pub async fn read_stream_from(&mut self, stream: &str, first: u64) -> Result<Vec<Stored>> {
        self.read(stream, first, false).await
    }

    /// Reads a whole stream without the payloads.
    pub async fn read_headers(&mut self, stream: &str) -> Result<Vec<Stored>> {
        self.read(stream, 1, true).await
    }

    async fn read(&mut self, stream: &str, first: u64, headers_only: bool) -> Result<Vec<Stored>> {
        let config = json!({"deliver_policy": "by_start_sequence", "opt_start_seq": first.max(1),
            "ack_policy": "none", "replay_policy": "instant", "mem_storage": true, "num_replicas": 1,
            "inactive_threshold": 60_000_000_000u64, "headers_only": headers_only});
        let body = json!({"stream_name": stream, "config": config});
        let created = self.api(&format!("CONSUMER.CREATE.{stream}"), body).await?;
        let name = created["name"].as_str().context("no consumer name")?.to_owned();
        let pending = created["num_pending"].as_u64().unwrap_or(0);
        let batch = self.batch_size(stream).await?;

        let mut all = Vec::new();
        let mut left = pending;
        while left > 0 {
            left = self.read_batch(stream, &name, batch.min(left), &mut all).await?;
        }
        self.api(&format!("CONSUMER.DELETE.{stream}.{name}"), Value::Null).await?;
        Ok(all)
    }

    /// So many messages at a time that the server need not buffer more than some MiB for us.
    async fn batch_size(&mut self, stream: &str) -> Result<u64> {
        let state = self.stream_state(stream).await?;
        let (bytes, messages) = (state["bytes"].as_u64().unwrap_or(0), state["messages"].as_u64().unwrap_or(0));
        let average = bytes / messages.max(1) + 1;
        Ok((16 * 1024 * 1024 / average).clamp(1, 5000))
    }

    /// One pull; returns how many are still to come.
    async fn read_batch(&mut self, stream: &str, consumer: &str, batch: u64, all: &mut Vec<Stored>) -> Result<u64> {
        let reply = self.reply();
        let body = serde_json::to_vec(&json!({"batch": batch, "expires": LIMIT.as_nanos() as u64}))?;
        let subject = format!("{}.CONSUMER.MSG.NEXT.{stream}.{consumer}", self.api);
        self.send(&Outgoing::new(subject, body), &reply).await?;
        let mut left = 0;
        for _ in 0..batch {
            let frame = self.next_frame().await?;
            // Only what has no ack subject is a status: a stored message may look like one.
            if !frame.reply.starts_with("$JS.ACK.") {
                bail!("reading `{stream}`: {}", String::from_utf8_lossy(&frame.header));
            }
            let meta = Meta::parse(&frame.reply)?;
            left = meta.pending;
            all.push(Stored {
                seq: meta.seq,
                time: meta.time,
                subject: frame.subject,
                header: frame.header,
                payload: frame.payload,
            });
        }
        Ok(left)
    }

    fn reply(&mut self) -> String {
        self.next += 1;
        format!("{}.{}", self.inbox, self.next)
    }

    async fn send(&mut self, message: &Outgoing, reply: &str) -> Result<()> {
        let mut buffer = Vec::new();
        encode(&mut buffer, message, reply);
        self.write.write_all(&buffer).await?;
        Ok(())
    }

    /// The next message on `reply`; late answers to earlier requests are skipped.
    async fn next_for(&mut self, reply: &str) -> Result<Frame> {
        loop {
            let frame = self.next_frame().await?;
            if frame.subject == reply {
                return Ok(frame);
            }
        }
    }

    async fn next_frame(&mut self) -> Result<Frame> {
        tokio::time::timeout(LIMIT, self.read_frame()).await.context("no message from the server")?
    }

    async fn until_pong(&mut self) -> Result<()> {
        loop {
            let line = self.read_line().await?;
            if line == "PONG" {
                return Ok(());
            }
            self.handle(&line).await?;
        }
    }

    async fn read_frame(&mut self) -> Result<Frame> {
        loop {
            let line = self.read_line().await?;
            let mut words = line.split_whitespace();
            match words.next().unwrap_or_default().to_ascii_uppercase().as_str() {
                // MSG <subject> <sid> [reply] <size>
                "MSG" => {
                    let words: Vec<&str> = words.collect();
                    let (subject, reply, sizes) = split(&words, 1)?;
                    return self.body(subject, reply, 0, sizes[0]).await;
                }
                // HMSG <subject> <sid> [reply] <header size> <size>
                "HMSG" => {
                    let words: Vec<&str> = words.collect();
                    let (subject, reply, sizes) = split(&words, 2)?;
                    return self.body(subject, reply, sizes[0], sizes[1]).await;
                }
                _ => self.handle(&line).await?,
            }
        }
    }

    async fn body(&mut self, subject: String, reply: String, header: usize, total: usize) -> Result<Frame> {
        let mut bytes = vec![0; total + 2];
        self.read.read_exact(&mut bytes).await?;
        bytes.truncate(total);
        let payload = bytes.split_off(header);
        Ok(Frame { subject, reply, header: bytes, payload })
    }

    /// Everything that is not a message.
    async fn handle(&mut self, line: &str) -> Result<()> {
        match line.split_whitespace().next().unwrap_or_default() {
            "PING" => self.write.write_all(b"PONG\r\n").await?,
            "-ERR" => bail!("server: {line}"),
            _ => {}
        }
        Ok(())
    }

    async fn read_line(&mut self) -> Result<String> {
        let mut line = String::new();
        ensure!(self.read.read_line(&mut line).await? > 0, "the server closed the connection");
        Ok(line.trim_end().to_owned())
    }
}

/// Position of a delivered message, from the subject that it would be acknowledged on.
struct Meta {
    seq: u64,
    time: u64,
    pending: u64,
}

impl Meta {
    fn parse(reply: &str) -> Result<Self> {
        let tokens: Vec<&str> = reply.split('.').collect();
        // $JS.ACK.<stream>.<consumer>.<delivered>.<stream seq>.<consumer seq>.<time>.<pending>; newer servers
        // and domains put <domain>.<account> before the stream.
        let at = if tokens.len() > 9 { 7 } else { 5 };
        let number = |i: usize| -> Result<u64> { Ok(tokens.get(i).context("short ack subject")?.parse()?) };
        Ok(Self { seq: number(at)?, time: number(at + 2)?, pending: number(at + 3)? })
    }
}

/// Whether a stream cannot be made because the folder of a deleted one is on its way out.
fn is_still_removed(error: &str) -> bool {
    error.contains("\"err_code\":10049") && error.contains("directory")
}

fn encode(buffer: &mut Vec<u8>, message: &Outgoing, reply: &str) {
    let Outgoing { subject, header, payload } = message;
    match header {
        None => buffer.extend_from_slice(format!("PUB {subject} {reply} {}\r\n", payload.len()).as_bytes()),
        Some(block) => {
            let total = block.len() + payload.len();
            buffer.extend_from_slice(format!("HPUB {subject} {reply} {} {total}\r\n", block.len()).as_bytes());
            buffer.extend_from_slice(block);
        }
    }
    buffer.extend_from_slice(payload);
    buffer.extend_from_slice(b"\r\n");
}

/// Subject, reply and the `count` sizes of a message line.
fn split(words: &[&str], count: usize) -> Result<(String, String, Vec<usize>)> {
    ensure!(words.len() >= 2 + count, "bad message line");
    let (head, sizes) = words.split_at(words.len() - count);
    let sizes: Result<Vec<usize>, _> = sizes.iter().map(|s| s.parse()).collect();
    Ok((head[0].to_owned(), head.get(2).copied().unwrap_or_default().to_owned(), sizes?))
}

fn ack(frame: &Frame) -> Result<u64> {
    ensure!(!frame.header.starts_with(b"NATS/1.0 503"), "no stream takes this subject");
    let reply: Value = serde_json::from_slice(&frame.payload)?;
    match reply.get("error") {
        Some(error) => bail!("publish was refused: {error}"),
        None => reply["seq"].as_u64().context("an ack without a sequence"),
    }
}

/// The lines of a header block after the first one, without line ends.
pub fn header_lines(block: &[u8]) -> Vec<&[u8]> {
    let mut lines: Vec<&[u8]> = split_lines(block).collect();
    while lines.last().is_some_and(|l| l.is_empty()) {
        lines.pop();
    }
    lines.drain(..lines.len().min(1));
    lines
}

/// All lines of a header block, the first too.
pub fn split_lines(block: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = Some(block);
    std::iter::from_fn(move || {
        let bytes = rest?;
        match bytes.windows(2).position(|w| w == b"\r\n") {
            Some(at) => {
                rest = Some(&bytes[at + 2..]);
                Some(&bytes[..at])
            }
            None => rest.take(),
        }
    })
}

/// The values of a header in a block, in order, trimmed.
pub fn header_values(block: &[u8], name: &str) -> Vec<String> {
    let pairs = header_lines(block).into_iter().filter_map(|l| {
        let at = l.iter().position(|b| *b == b':')?;
        (&l[..at] == name.as_bytes()).then(|| String::from_utf8_lossy(&l[at + 1..]).trim().to_owned())
    });
    pairs.collect()
}

/// Waits until a stream holds at least `messages`; no longer than `limit` without another one.
pub async fn wait_messages(raw: &mut Raw, stream: &str, messages: u64, limit: Duration) -> Result<()> {
    let what = format!("`{stream}` to hold {messages} messages");
    super::client::wait_while_moving(&what, limit, async || {
        let state = raw.stream_state(stream).await.unwrap_or_default();
        let holds = state["messages"].as_u64().unwrap_or(0);
        if holds >= messages { Ok(()) } else { Err((holds, state["last_seq"].clone())) }
    })
    .await
}
