//! The YAML file of Choria's replicator, `sr.yaml`, and what stands beside it for us. Its streams become documents, with
//! the fields that documents have; where each value is in the file is kept, so that whatever is found to be wrong with a
//! document later is reported with its line.
//!
//! What the Go program takes is taken (keys in any case, booleans of YAML 1.1, merge keys, its durations), with two
//! exceptions: it ignores unknown keys, and of two equal ones it takes the last.

mod fields;
mod node;
mod reader;
mod scalar;

use std::{collections::BTreeMap, fmt, path::PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};

use self::{fields::FILE, node::NodeContent, reader::YamlReader};

/// Something that is wrong with a file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct YamlProblem {
    /// From 1.
    pub line: usize,
    /// The field as in `streams[0].source_url`; empty for the file as a whole.
    pub field: String,
    /// Description, without secrets.
    pub message: String,
}

impl YamlProblem {
    /// A problem of the field at a JSON pointer.
    pub fn new(line: usize, path: &str, message: impl Into<String>) -> Self {
        let mut field = String::new();
        for part in path.split('/').filter(|part| !part.is_empty()) {
            let part = part.replace("~1", "/").replace("~0", "~");
            if part.bytes().all(|byte| byte.is_ascii_digit()) {
                field += &format!("[{part}]");
            } else {
                field += if field.is_empty() { "" } else { "." };
                field += &part;
            }
        }
        Self { line, field, message: message.into() }
    }
}

/// `line: field: message`, to go after the name of the file and a colon.
impl fmt::Display for YamlProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let separator = if self.field.is_empty() { "" } else { ": " };
        write!(f, "{}: {}{separator}{}", self.line, self.field, self.message)
    }
}

/// Our own object `control` in the file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct YamlControl {
    /// Servers that hold the buckets and carry the service.
    pub server: Option<String>,
    /// Credentials file to use there.
    pub credentials: Option<PathBuf>,
    /// Prefix of the names of the buckets.
    pub bucket_prefix: Option<String>,
    /// Subject prefix of the service and of events.
    pub prefix: Option<String>,
}

/// What a file says.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct ReplicatorYaml {
    /// Name of the site; never empty.
    pub name: String,
    /// `debug`, `warn`, or anything else for `info`.
    pub loglevel: String,
    /// Where the log goes instead of standard error.
    pub logfile: Option<PathBuf>,
    /// TCP port of `/metrics` on all addresses; 0 for none.
    pub monitor_port: u16,
    /// Folder of the files with what sampling knows.
    pub state_store: Option<PathBuf>,
    /// Heartbeats as the service has them; `null` for none.
    pub heartbeats: Value,
    /// Links, which streams of this file name. With the TLS files and the identity that apply to each.
    pub links: Vec<Map<String, Value>>,
    /// Replication documents, with the TLS files and the identity that apply to each.
    pub streams: Vec<Map<String, Value>>,
    /// Choria's data adapters, as the service has them.
    pub adapters: Vec<Value>,
    /// Our own settings.
    pub control: YamlControl,
    /// Where each value is.
    #[serde(skip)]
    lines: BTreeMap<String, usize>,
    /// What is right and has no effect, or what the Go program refuses.
    #[serde(skip)]
    pub notices: Vec<YamlProblem>,
}

impl ReplicatorYaml {
    /// Reads a file. Everything that is wrong comes at once, sorted by line. If `lenient`, unknown keys are notices.
    pub fn read(text: &str, lenient: bool) -> Result<Self, Vec<YamlProblem>> {
        let root = node::compose(text).map_err(|problem| vec![problem])?;
        let mut reader = YamlReader::default();
        let fields = match root.map(|root| (root.line, root.content)) {
            Some((_, NodeContent::Mapping(entries))) => reader.group("", &entries, FILE),
            Some((line, NodeContent::List(_))) => {
                return Err(vec![YamlProblem::new(line, "", "the file is a list: it must be a mapping, `name: ...`")]);
            }
            Some((_, NodeContent::Scalar { plain: true, text })) if text.is_empty() => Map::new(),
            Some((line, NodeContent::Scalar { .. })) => {
                return Err(vec![YamlProblem::new(line, "", "the file is a text: it must be a mapping, `name: ...`")]);
            }
            None => Map::new(),
        };
        if lenient {
            reader.notices.append(&mut reader.unknown);
        }
        reader.problems.append(&mut reader.unknown);
        let mut file: Self = serde_json::from_value(Value::Object(fields.clone())).unwrap_or_else(|_| {
            // Not the parser's words: they may quote a secret. Values of a wrong type are left out by then.
            reader.problems.push(YamlProblem::new(1, "", "the file cannot be read"));
            Self::default()
        });
        file.complete(&fields, &mut reader);
        let refused = file.refused_by_go(&reader.lines);
        reader.notices.extend(refused);
        if !reader.problems.is_empty() {
            reader.problems.sort();
            return Err(reader.problems);
        }
        reader.notices.sort();
        (file.lines, file.notices) = (reader.lines, reader.notices);
        Ok(file)
    }

    /// What is missing, and what every stream inherits: the most specific object applies, as a whole.
    fn complete(&mut self, fields: &Map<String, Value>, reader: &mut YamlReader) {
        let known: Vec<_> = reader.problems.iter().map(|problem| problem.field.clone()).collect();
        let is_known = |field: &str| known.iter().any(|known| known == field);
        if self.name.is_empty() && !is_known("name") {
            let line = reader.lines.get("/name").copied().unwrap_or(1);
            let message = "`name`, the name of the site, is required";
            reader.problems.push(YamlProblem::new(line, "/name", message));
        }
        let work = ["streams", "heartbeats", "adapters"];
        let nothing = self.streams.is_empty() && self.heartbeats.is_null() && self.adapters.is_empty();
        if nothing && !work.into_iter().any(is_known) {
            let line = reader.lines.get("/streams").copied().unwrap_or(1);
            let message = "there is nothing to do: write `streams`, `heartbeats` or `adapters`";
            reader.problems.push(YamlProblem::new(line, "/streams", message));
        }
        for inherited in ["tls", "choria"] {
            let Some(general) = fields.get(inherited) else { continue };
            let own: Vec<_> = reader.lines.iter().filter(|(path, _)| is_below(path, inherited)).collect();
            let own: Vec<_> = own.into_iter().map(|(path, line)| (path.clone(), *line)).collect();
            let streams = self.streams.iter_mut().enumerate().map(|(index, stream)| ("streams", index, stream));
            let links = self.links.iter_mut().enumerate().map(|(index, link)| ("links", index, link));
            // A stream that names a link has those of the link.
            for (list, index, fields) in streams.filter(|(_, _, stream)| !stream.contains_key("link")).chain(links) {
                if !fields.contains_key(inherited) {
                    fields.insert(inherited.to_owned(), general.clone());
                    reader.lines.extend(own.iter().map(|(path, line)| (format!("/{list}/{index}{path}"), *line)));
                }
            }
        }
        // An empty text in a mapping of files is as good as none.
        for stream in self.streams.iter_mut().chain(&mut self.links) {
            for files in ["tls", "source_tls", "target_tls"] {
                if let Some(Value::Object(files)) = stream.get_mut(files) {
                    files.retain(|_, file| file.as_str().is_none_or(|file| !file.is_empty()));
                }
            }
        }
    }

    /// What works here, and not after going back.
    fn refused_by_go(&self, lines: &BTreeMap<String, usize>) -> Vec<YamlProblem> {
        let mut notices = Vec::new();
        for (index, stream) in self.streams.iter().enumerate() {
            if stream.get("target_initiated") != Some(&Value::Bool(true)) {
                continue;
            }
            let has = |field: &str| match stream.get(field) {
                None => false,
                Some(Value::String(text)) => !text.is_empty(),
                Some(value) => *value != Value::Bool(false) && value.as_i64() != Some(0),
            };
            let mut note = |field: &str, message: &str| {
                let path = format!("/streams/{index}/{field}");
                let message = format!("{message}; Choria's replicator refuses that");
                notices.push(YamlProblem::new(line_of(lines, &path), &path, message));
            };
            if !has("filter_subject") {
                note("filter_subject", "`target_initiated` without `filter_subject`");
            }
            for field in ["max_age", "inspect_field", "inspect_header", "inspect_subject_token", "no_target_create"] {
                if has(field) {
                    note(field, &format!("`target_initiated` together with `{field}`"));
                }
            }
        }
        notices
    }

    /// The line of the value at a JSON pointer, or of the nearest one around it.
    pub fn line(&self, path: &str) -> usize {
        line_of(&self.lines, path)
    }
}

fn line_of(lines: &BTreeMap<String, usize>, path: &str) -> usize {
    let mut path = path;
    loop {
        if let Some(line) = lines.get(path) {
            return *line;
        }
        match path.rfind('/') {
            Some(end) => path = &path[..end],
            None => return 1,
        }
    }
}

/// Whether a path is that of a field of the first level, or is inside it.
fn is_below(path: &str, field: &str) -> bool {
    path.strip_prefix('/').and_then(|path| path.strip_prefix(field)).is_some_and(|r| r.is_empty() || r.starts_with('/'))
}
