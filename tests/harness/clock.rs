//! A server whose clock is wrong: what passes between it and a client is changed as if another clock had been read. A
//! change keeps the length of what it changes.

use chrono::{NaiveDateTime, TimeDelta};

use super::proxy::Direction;

/// What the clock of a server shows, compared with the real one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Clock {
    #[default]
    Right,
    /// Wrong by so many seconds, and it was when messages were stored.
    Wrong(i64),
    /// Set by so many seconds after messages were stored.
    Set(i64),
    /// The server does not report its time.
    Hidden,
}

/// Digits of a time to the second: `2026-11-29T12:17:28`.
const TIME: usize = 19;
const FORMAT: &str = "%Y-%m-%dT%H:%M:%S";
/// What stands before a time of the server in its answers, and before a time in a question.
const NOW: &[u8] = br#""ts":""#;
const STORED: &[u8] = br#""time":""#;
const START: &[u8] = br#""opt_start_time":""#;
/// The reply subject of a delivery has the stored time as its second last token, in nanoseconds.
const DELIVERY: &[u8] = b"$JS.ACK.";

/// One direction of one connection.
pub struct Rewriter {
    patterns: &'static [&'static [u8]],
    /// What may be the beginning of a time that has not passed yet.
    held: Vec<u8>,
}

impl Rewriter {
    pub fn new(direction: Direction) -> Self {
        let patterns: &[&[u8]] = match direction {
            Direction::ToServer => &[START],
            Direction::ToClient => &[NOW, STORED, DELIVERY],
        };
        Self { patterns, held: Vec::new() }
    }

    /// What to pass on now. A line ends what is held back.
    pub fn pass(&mut self, bytes: &[u8], clock: Clock) -> Vec<u8> {
        let mut data = std::mem::take(&mut self.held);
        data.extend_from_slice(bytes);
        if clock == Clock::Right {
            return data;
        }
        let mut at = 0;
        while at < data.len() {
            let rest = &data[at..];
            let begun = self.patterns.iter().find(|p| rest.starts_with(p) || p.starts_with(rest));
            let Some(pattern) = begun.copied() else {
                at += 1;
                continue;
            };
            let Some(end) = end_of(pattern, rest) else {
                self.held = data.split_off(at);
                break;
            };
            change(pattern, &mut data[at..at + end], clock);
            at += end;
        }
        data
    }
}

/// Where what a pattern begins ends; `None` if it is not complete.
fn end_of(pattern: &[u8], data: &[u8]) -> Option<usize> {
    match pattern == DELIVERY {
        true => data.iter().position(|byte| byte.is_ascii_whitespace()),
        false => Some(pattern.len() + TIME).filter(|end| *end <= data.len()),
    }
}

fn change(pattern: &[u8], data: &mut [u8], clock: Clock) {
    let (now, stored) = match clock {
        Clock::Right => (0, 0),
        Clock::Wrong(by) => (by, by),
        Clock::Set(by) => (by, 0),
        Clock::Hidden => {
            if pattern == NOW {
                data[1..3].copy_from_slice(b"no");
            }
            return;
        }
    };
    match pattern {
        NOW => shift(&mut data[NOW.len()..], now),
        STORED => shift(&mut data[STORED.len()..], stored),
        START => shift(&mut data[START.len()..], -stored),
        _ => shift_delivery(data, stored),
    }
}

fn shift(time: &mut [u8], by: i64) {
    let text = std::str::from_utf8(time).expect("a time");
    let moved = NaiveDateTime::parse_from_str(text, FORMAT).expect("a time") + TimeDelta::seconds(by);
    time.copy_from_slice(moved.format(FORMAT).to_string().as_bytes());
}

fn shift_delivery(subject: &mut [u8], by: i64) {
    let text = std::str::from_utf8(subject).expect("a subject").to_owned();
    let mut tokens: Vec<&str> = text.split('.').collect();
    let at = tokens.len() - 2;
    let moved = tokens[at].parse::<i64>().expect("a stored time") + by * 1_000_000_000;
    let moved = moved.to_string();
    tokens[at] = &moved;
    subject.copy_from_slice(tokens.join(".").as_bytes());
}
