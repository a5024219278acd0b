//! Subject transforms do what the transforms of the server do: random ones, on streams that have them, with random
//! subjects. `SEED=<number>` runs the same again.

use anyhow::{Context, Result, ensure};
use rand::{RngExt, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use serde_json::json;
use stream_replicator::config::Transform;

use crate::harness::{Outgoing, Raw, Role, Server};

const TRANSFORMS: usize = 500;
const SUBJECTS: usize = 16;
/// Tokens of subjects: short ones, deliminators at all places, letters of several bytes.
const TOKENS: [&str; 18] = [
    "a",
    "ab",
    "abc",
    "abcd",
    "abcdefg",
    "-",
    "--",
    "a-b",
    "-a-b-",
    "a--b",
    "a-b-c-",
    "\u{e9}",
    "a\u{e9}b",
    "\u{20ac}uro",
    "\u{1f980}",
    "0",
    "$1",
    "{{a}}",
];

/// A server of some version and what it knows.
struct SubjectPeer {
    raw: Raw,
    /// `partition` of the whole subject; 2.10 does not know it.
    whole_partition: bool,
    /// `left` and `right`; 2.12 and 2.14 refuse them in a stream, 2.10 and 2.15 do not.
    left_and_right: bool,
    streams: usize,
}

impl SubjectPeer {
    async fn of(server: &Server) -> Result<Self> {
        let raw = Raw::connect(&server.url()).await?;
        let whole_partition = server.at_least(2, 12);
        let left_and_right = !whole_partition || server.at_least(2, 15);
        Ok(Self { raw, whole_partition, left_and_right, streams: 0 })
    }

    /// Whether a server of this version does not know something that is in a destination, by what it says.
    fn is_too_old(&self, dest: &str, words: &str) -> bool {
        let any = |test: fn(&str) -> bool| dest.to_lowercase().split('.').any(test);
        let whole = |token: &str| token.contains("partition") && !token.contains(',');
        let side = |token: &str| {
            let call = token.trim_start_matches(['{', ' ']);
            ["left", "right"].iter().any(|name| call.starts_with(name))
        };
        !self.whole_partition && words.contains("not enough arguments") && any(whole)
            || !self.left_and_right && words.contains("unknown function") && any(side)
    }

    /// Makes a stream with this transform; the words of the refusal, if there is one.
    async fn make(&mut self, listens: &str, src: &str, dest: &str) -> Result<Result<String, String>> {
        self.streams += 1;
        let name = format!("T{}", self.streams);
        let transform = json!({"src": src, "dest": dest});
        let config = json!({"subjects": [listens], "storage": "memory", "subject_transform": transform});
        Ok(match self.raw.create_stream(&name, config).await {
            Ok(_) => Ok(name),
            Err(error) => {
                let words = error.to_string();
                ensure!(words.contains("transform") || words.contains("mapping"), "{src} {dest}: {words}");
                Err(words)
            }
        })
    }

    /// What a message with this subject is stored as, in the words of JSON: what is no text is replaced.
    async fn stored_as(&mut self, stream: &str, subject: &str) -> Result<String> {
        let seq = self.raw.publish(&Outgoing::new(subject, [])).await?;
        let got = self.raw.api(&format!("STREAM.MSG.GET.{stream}"), json!({"seq": seq})).await?;
        Ok(got["message"]["subject"].as_str().context("no subject")?.to_owned())
    }
}

/// As a server writes bytes into JSON: each one that is no part of a letter is replaced.
fn as_json(bytes: &[u8]) -> String {
    let replaced =
        |chunk: std::str::Utf8Chunk<'_>| chunk.valid().to_owned() + &"\u{fffd}".repeat(chunk.invalid().len());
    bytes.utf8_chunks().map(replaced).collect()
}

fn random() -> StdRng {
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(rand::random);
    println!("SEED={seed}");
    StdRng::seed_from_u64(seed)
}

fn pick<'a>(random: &mut StdRng, from: &[&'a str]) -> &'a str {
    from.choose(random).copied().unwrap_or_default()
}

/// A function, right more often than not.
fn function(random: &mut StdRng, wildcards: usize) -> String {
    let index = |random: &mut StdRng| {
        // Sometimes one too many.
        let most = wildcards.max(1) + usize::from(random.random_bool(0.05));
        random.random_range(1..=most).to_string()
    };
    let number = |random: &mut StdRng| pick(random, &["1", "2", "3", "4", "7", "100", "0", "-1", "2147483647", "+2"]);
    let known = [
        "wildcard",
        "partition",
        "split",
        "splitFromLeft",
        "splitFromRight",
        "sliceFromLeft",
        "sliceFromRight",
        "left",
        "right",
    ];
    let name = pick(random, &known);
    let mut arguments = match name {
        "wildcard" => vec![index(random)],
        "partition" => {
            let mut all = vec![random.random_range(1..20).to_string()];
            all.extend((0..random.random_range(0..4)).map(|_| index(random)));
            all
        }
        "split" => vec![index(random), pick(random, &["-", "--", "b", "\u{e9}", "", ")", "ab"]).to_owned()],
        _ => vec![index(random), number(random).to_owned()],
    };
    match random.random_range(0..60) {
        0 => drop(arguments.pop()),
        1 => arguments.push("1".to_owned()),
        2 => arguments[0] = pick(random, &["a", "", "1x", "1_0", "99999999999999999999"]).to_owned(),
        _ => {}
    }
    if name == "wildcard" && random.random_bool(0.3) {
        return format!("${}", arguments.first().map_or("", String::as_str));
    }
    let name = match random.random_range(0..20) {
        0..3 => name[..1].to_uppercase() + &name[1..],
        3..6 => name.replace("From", "from"),
        6..9 => name.replace("Left", "left").replace("Right", "right"),
        9 if random.random_bool(0.5) => name.to_uppercase(),
        10 if random.random_bool(0.5) => format!("{name}s"),
        _ => name.to_owned(),
    };
    let comma = pick(random, &[",", ",", ", ", ",  "]);
    let blank = |random: &mut StdRng| pick(random, &["", "", "", " ", "  "]);
    let (a, b, c) = (blank(random), blank(random), blank(random));
    format!("{{{{{a}{name}{b}({}){c}}}}}", arguments.join(comma))
}

/// A source pattern below `root`, and a destination for it.
fn transform(random: &mut StdRng, root: &str) -> (String, String) {
    let mut src = vec![root.to_owned()];
    for _ in 0..random.random_range(0..4) {
        src.push(if random.random_bool(0.8) { "*".to_owned() } else { pick(random, &TOKENS[..4]).to_owned() });
    }
    let rest = random.random_bool(0.3);
    let wildcards = src.iter().filter(|token| *token == "*").count();
    let mut dest = vec![format!("x{root}")];
    for _ in 0..random.random_range(0..4) {
        dest.push(match random.random_range(0..40) {
            0 => pick(random, &["", "*", ">"]).to_owned(),
            1..8 => pick(random, &["a", "$a", "$", "{a}", "a$1", "\u{e9}", "b-c"]).to_owned(),
            _ => function(random, wildcards),
        });
    }
    if rest {
        src.push(">".to_owned());
    }
    if rest != random.random_bool(0.03) {
        dest.push(">".to_owned());
    }
    // Without the fixed beginning, too.
    if dest.len() > 1 && !dest[1].is_empty() && random.random_bool(0.3) {
        dest.remove(0);
    }
    (src.join("."), dest.join("."))
}

/// A subject below `root` that the pattern matches more often than not.
fn subject(random: &mut StdRng, root: &str, src: &str) -> String {
    let mut tokens = vec![root.to_owned()];
    for token in src.split('.').skip(1) {
        match token {
            "*" => tokens.push(pick(random, &TOKENS).to_owned()),
            ">" => tokens.extend((0..random.random_range(1..4)).map(|_| pick(random, &TOKENS).to_owned())),
            token => tokens.push(token.to_owned()),
        }
    }
    if random.random_bool(0.15) {
        tokens.push(pick(random, &TOKENS).to_owned());
    }
    // The stream listens below the root.
    if tokens.len() == 1 {
        tokens.push("z".to_owned());
    }
    tokens.join(".")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_transforms_make_the_subjects_that_the_server_stores() -> Result<()> {
    let server = Server::start(Role::Source).await?;
    let mut peer = SubjectPeer::of(&server).await?;
    let mut random = random();
    let (mut pairs, mut matched, mut refused) = (0, 0, 0);
    for round in 0..TRANSFORMS {
        let root = format!("s{round}");
        let (src, dest) = transform(&mut random, &root);
        let ours = Transform::parse(&src, &dest);
        let theirs = peer.make(&format!("{root}.>"), &src, &dest).await?;
        let (ours, stream) = match (ours, theirs) {
            (Ok(ours), Ok(stream)) => (ours, stream),
            (Err(_), Err(_)) => {
                refused += 1;
                continue;
            }
            (Ok(_), Err(words)) if peer.is_too_old(&dest, &words) => continue,
            // Of no wildcards at all, newer servers take numbers that mean nothing.
            (Err(_), Ok(_)) if !src.contains(['*', '>']) && dest.to_lowercase().contains("partition") => {
                refused += 1;
                continue;
            }
            (ours, theirs) => panic!("{src:?} to {dest:?}: {ours:?}, the server: {theirs:?}"),
        };
        for _ in 0..SUBJECTS {
            let subject = subject(&mut random, &root, &src);
            let stored = peer.stored_as(&stream, &subject).await?;
            let mut mapped = Vec::new();
            let matches = ours.apply(subject.as_bytes(), &mut mapped);
            let mapped = if matches { mapped } else { subject.clone().into_bytes() };
            assert_eq!(as_json(&mapped), stored, "{src:?} to {dest:?}: {subject:?}");
            pairs += 1;
            matched += usize::from(matches);
        }
    }
    println!("{}: {pairs} subjects equal, {matched} of them mapped; {refused} transforms refused", server.version());
    ensure!(matched > 2_000 && refused > 20, "{matched} mapped, {refused} refused: too few to say anything");
    Ok(())
}

#[tokio::test]
async fn transforms_that_servers_refuse_are_refused_and_explained() -> Result<()> {
    let server = Server::start(Role::Source).await?;
    let mut peer = SubjectPeer::of(&server).await?;
    let three = "r.*.*.*";
    let mut wrong: Vec<(&str, &str)> = [
        "x..y",
        ".x",
        "x.",
        "x.*",
        "x.>.y",
        "x.>",
        "$4",
        "{{wildcard(4)}}",
        "{{WILDCARD(1)}}",
        "{{wildcard 1}}",
        "{{wildcard(1}}",
        "{{wildcard}}",
        "{{wildcard()}}",
        "{{wildcard(1,2)}}",
        "{{wildcard(a)}}",
        "{{wildcard(1_0)}}",
        "{{wildcard(99999999999999999999)}}",
        "{{wild card(1)}}",
        "{{foo(1)}}",
        "{{a}}",
        "{{wildcard(1)}}{{wildcard(2)}}",
        "{{partition()}}",
        "{{partition(3,)}}",
        "{{partition(a,1)}}",
        "{{partition(3,4)}}",
        "{{split(1)}}",
        "{{split(1,-,-)}}",
        "{{split(1,- )}}",
        "{{split(1,- -)}}",
        "{{split(4,-)}}",
        "{{splitFromLeft(1)}}",
        "{{splitFromLeft(1,a)}}",
        "{{sliceFromRight(1,2,3)}}",
        "{{left()}}",
        "{{right(1,0x2)}}",
        "{{SPLITFROMLEFT(1,2)}}",
    ]
    .map(|dest| (three, dest))
    .to_vec();
    wrong.extend([
        ("r.>", "x"),
        ("r.a", "x.>"),
        ("r.a", "$1"),
        ("r.a", "{{left(1,1)}}"),
        ("r.>", "$1.>"),
        ("r.a", "{{foo}}"),
    ]);
    if server.at_least(2, 12) {
        // Before, such numbers lost their upper half, and blanks were stored.
        wrong.extend([
            (three, "{{partition(2147483648,1)}}"),
            (three, "{{left(1,4294967298)}}"),
            (three, "x. y"),
            (three, "$1 "),
        ]);
    }
    for (src, dest) in wrong {
        let theirs = peer.make("r.>", src, dest).await?;
        assert!(theirs.is_err(), "the server takes {src:?} to {dest:?}");
        assert!(Transform::parse(src, dest).is_err(), "we take {src:?} to {dest:?}");
    }
    Ok(())
}

/// What a server takes and nobody can mean; see `src/config/transform.rs`.
#[tokio::test]
async fn a_few_transforms_that_servers_take_are_refused_on_purpose() -> Result<()> {
    let server = Server::start(Role::Source).await?;
    let mut peer = SubjectPeer::of(&server).await?;
    let mut stricter = vec![
        "$0",
        "$-1",
        "{{wildcard(0)}}",
        "{{wildcard(-1)}}",
        "{{partition(3,0)}}",
        "{{partition(0,1)}}",
        "{{partition(-3,1)}}",
        "a{{wildcard(1)}}",
        "{{wildcard(1)}}a",
        "{{left(1,1.5)}}",
        "{{}}",
        "{{a}}{{wildcard(1)}}",
        "a*",
        "x.\u{1}",
    ];
    if server.at_least(2, 12) {
        stricter.push("{{random(3)}}");
    }
    if server.at_least(2, 12) {
        assert!(peer.make("p.>", "p.a", "{{partition(3,1)}}").await?.is_ok());
        assert!(Transform::parse("p.a", "{{partition(3,1)}}").is_err());
    }
    for (index, dest) in stricter.into_iter().enumerate() {
        let root = format!("q{index}");
        let src = format!("{root}.*.*");
        // Without a message: the first one through no buckets is the end of a 2.10 server.
        let theirs = peer.make(&format!("{root}.>"), &src, dest).await?;
        assert!(theirs.is_ok(), "{dest:?}: {theirs:?}");
        assert!(Transform::parse(&src, dest).is_err(), "we take {dest:?}");
    }
    Ok(())
}
