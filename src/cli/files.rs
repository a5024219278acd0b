//! Documents in files and on stdin: JSON and YAML, one or several in each.

use std::{
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use serde::Deserialize;
use serde_json::Value;

use super::{error::Error, output::clean};
use crate::config::{Json, why_not_json};

/// Stands for stdin.
const STDIN: &str = "-";

/// For editors; it is not part of a document.
const SCHEMA_FIELD: &str = "$schema";

/// A document and where it was found.
#[derive(Debug)]
pub(super) struct FoundFiles {
    /// The file, and which of its documents it is if there are several.
    pub(super) place: String,
    pub(super) document: Value,
}

/// All documents of the files and folders that were named.
#[derive(Debug, Default)]
pub(super) struct FoundDocuments {
    pub(super) documents: Vec<FoundFiles>,
    /// What is in a folder and was not read.
    pub(super) skipped: Vec<String>,
}

/// All of one file, or of stdin.
pub(super) fn read(path: &Path) -> Result<Bytes, Error> {
    let read = if path == Path::new(STDIN) {
        let mut text = Vec::new();
        io::stdin().lock().read_to_end(&mut text).map(|_| text)
    } else {
        fs::read(path)
    };
    read.map(Bytes::from).map_err(|error| unreadable(path, &error))
}

/// The one document of a file, or of stdin, as JSON. JSON that is wrong is passed on for the service to say what is wrong
/// with it.
pub(super) fn read_document(path: &Path) -> Result<Bytes, Error> {
    let text = read(path)?;
    let name = name(path);
    if text.trim_ascii().is_empty() {
        return Err(Error::Failed(format!("`{name}` is empty: there is no document in it")));
    }
    if !is_yaml(path, &text) {
        let has_schema = |json: &Json| json.problems.is_empty() && json.value.get(SCHEMA_FIELD).is_some();
        let json = serde_json::from_slice::<Json>(&text).ok().filter(has_schema);
        return Ok(json.map_or(text, |json| without_schema(json.value).to_string().into()));
    }
    let mut found = yaml(&text, &name).map_err(Error::Failed)?;
    match (found.pop(), found.len()) {
        (Some(document), 0) => Ok(document.to_string().into()),
        (_, more) => Err(Error::Failed(format!("`{name}` has {} documents: `config apply` takes several", more + 1))),
    }
}

/// All documents of files and of the files in folders, in order. Everything that cannot be read is reported at once.
pub(super) fn documents(paths: &[PathBuf]) -> Result<FoundDocuments, Vec<String>> {
    let (mut found, mut problems) = (FoundDocuments::default(), Vec::new());
    for path in paths {
        let files = match path.is_dir() {
            true => folder(path, &mut found.skipped),
            false => Ok(vec![path.clone()]),
        };
        let files = files.unwrap_or_else(|problem| {
            problems.push(problem);
            Vec::new()
        });
        for file in files {
            let split = read(&file).map_err(|error| error.to_string()).and_then(|text| split(&file, &text));
            match split {
                Ok(documents) => found.documents.extend(documents),
                Err(problem) => problems.push(problem),
            }
        }
    }
    if problems.is_empty() { Ok(found) } else { Err(problems) }
}

/// The documents in a folder, by their names; everything else is skipped by name.
fn folder(path: &Path, skipped: &mut Vec<String>) -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir(path).and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect());
    let mut files: Vec<PathBuf> = entries.map_err(|error| unreadable(path, &error).to_string())?;
    files.sort();
    let is_document = |file: &PathBuf| !file.is_dir() && extension(file).is_some();
    skipped.extend(files.iter().filter(|file| !is_document(file)).map(|file| name(file)));
    files.retain(is_document);
    Ok(files)
}

/// `json` or `yaml`, by the name of a file.
fn extension(path: &Path) -> Option<&'static str> {
    match path.extension()?.to_str()? {
        "json" => Some("json"),
        "yaml" | "yml" => Some("yaml"),
        _ => None,
    }
}

/// By the name of the file, else by how the text begins: JSON documents begin with a bracket.
fn is_yaml(path: &Path, text: &[u8]) -> bool {
    match extension(path) {
        Some(extension) => extension == "yaml",
        None => !matches!(text.trim_ascii_start(), [b'{' | b'[', ..]),
    }
}

/// One document, an array of them, or several one after another. There is at least one.
fn split(path: &Path, text: &[u8]) -> Result<Vec<FoundFiles>, String> {
    let file = name(path);
    let values = match () {
        () if text.trim_ascii().is_empty() => Vec::new(),
        () if is_yaml(path, text) => yaml(text, &file)?,
        () => json(text, &file)?,
    };
    let mut documents = Vec::new();
    for value in values {
        match value {
            Value::Array(values) => documents.extend(values),
            value => documents.push(value),
        }
    }
    if documents.is_empty() {
        return Err(format!("`{file}` is empty: there is no document in it"));
    }
    let several = documents.len() > 1;
    let place = |index: usize| if several { format!("{file}, document {}", index + 1) } else { file.clone() };
    let documents = documents.into_iter().enumerate();
    let found = |(index, document)| FoundFiles { place: place(index), document: without_schema(document) };
    Ok(documents.map(found).collect())
}

fn json(text: &[u8], file: &str) -> Result<Vec<Value>, String> {
    let mut values = Vec::new();
    for json in serde_json::Deserializer::from_slice(text).into_iter::<Json>() {
        let Json { value, problems } =
            json.map_err(|error| format!("`{file}` is not valid JSON: {}", why_not_json(text, &error)))?;
        if let Some(problem) = problems.first() {
            return Err(format!("`{file}`: {}: {problem}", problem.path));
        }
        values.push(value);
    }
    Ok(values)
}

/// The documents of a YAML text, without the empty ones between two `---`. The parser's words may quote a secret.
fn yaml(text: &[u8], file: &str) -> Result<Vec<Value>, String> {
    let wrong = |error: yaml_serde::Error| match error.location() {
        Some(at) => format!("`{file}` is not valid YAML (line {}, column {})", at.line(), at.column()),
        None => format!("`{file}` is not valid YAML"),
    };
    let text = std::str::from_utf8(text).map_err(|_| format!("`{file}` is not UTF-8"))?;
    let mut values = Vec::new();
    for document in yaml_serde::Deserializer::from_str(text) {
        let mut value = yaml_serde::Value::deserialize(document).map_err(wrong)?;
        value.apply_merge().map_err(wrong)?;
        match serde_json::to_value(value) {
            Ok(Value::Null) => {}
            Ok(value @ (Value::Object(_) | Value::Array(_))) => values.push(value),
            Ok(_) => return Err(format!("`{file}` is neither JSON nor YAML with fields, `stream: ORDERS` and so on")),
            Err(_) => return Err(format!("`{file}` has keys or values that JSON cannot express")),
        }
    }
    Ok(values)
}

fn without_schema(mut document: Value) -> Value {
    if let Value::Object(fields) = &mut document {
        fields.remove(SCHEMA_FIELD);
    }
    document
}

fn name(path: &Path) -> String {
    if path == Path::new(STDIN) { "stdin".to_owned() } else { clean(&path.display().to_string()) }
}

fn unreadable(path: &Path, error: &io::Error) -> Error {
    Error::Failed(format!("cannot read `{}`: {error}", name(path)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn found(file: &str, text: &str) -> Result<Vec<(String, Value)>, String> {
        let found = split(Path::new(file), text.as_bytes())?;
        Ok(found.into_iter().map(|found| (found.place, found.document)).collect())
    }

    #[test]
    fn a_file_holds_one_document_or_an_array_or_several() {
        let check = |file: &str, text: &str, expect: &[(&str, Value)]| {
            let expect: Vec<_> = expect.iter().map(|(place, value)| ((*place).to_owned(), value.clone())).collect();
            assert_eq!(found(file, text), Ok(expect), "{text}");
        };
        check("F", r#"{"a":1}"#, &[("F", json!({"a": 1}))]);
        check("F", r#"[{"a":1, "$schema": "urn:x"}]"#, &[("F", json!({"a": 1}))]);
        let three = [("F, document 1", json!({})), ("F, document 2", json!({})), ("F, document 3", json!({}))];
        check("F", "{}\n{}[{}]", &three);
        check("F", "stream: S\nlist: [a]\n", &[("F", json!({"stream": "S", "list": ["a"]}))]);
        let two = [("F.yml, document 1", json!({"a": 1})), ("F.yml, document 2", json!({"b": "x: y"}))];
        check("F.yml", "---\n$schema: s\na: 1\n---\nb: \"x: y\"\n---\n", &two);
        check("F.yml", "- a: 1\n- b: 'x: y'\n", &two);
    }

    #[test]
    fn a_file_without_a_document_is_an_error() {
        for text in ["", " \n", "[]\n", "# nothing\n", "---\n"] {
            assert_eq!(found("F", text).unwrap_err(), "`F` is empty: there is no document in it", "{text:?}");
        }
    }

    #[test]
    fn wrong_text_is_reported_by_position_without_its_content() {
        let error = found("F", "{\"a\": 1}\n{\"source_url\": \"nats://u:hunter2@h\" x").unwrap_err();
        assert!(error.starts_with("`F` is not valid JSON: ") && error.contains("line 2 column"), "{error}");
        let wrong = found("F.yaml", "a: 1\nb: [nats://u:hunter2@h\n").unwrap_err();
        assert!(wrong.starts_with("`F.yaml` is not valid YAML (line "), "{wrong}");
        let twice = found("F.yaml", "url: nats://u:hunter2@h\nurl: x\n").unwrap_err();
        assert!(twice.starts_with("`F.yaml` is not valid YAML"), "{twice}");
        assert!(![error, wrong, twice].iter().any(|error| error.contains("hunter2")));
        assert!(found("F", "hello").unwrap_err().contains("neither JSON nor YAML"));
    }

    #[test]
    fn a_folder_stands_for_its_documents_in_order() {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in [("b.json", r#"{"b":1}"#), ("a.yaml", "a: 1"), ("c.txt", "no"), ("d.yml", "d: 1")] {
            fs::write(folder.path().join(name), text).unwrap();
        }
        fs::create_dir(folder.path().join("e.json")).unwrap();
        let found = documents(&[folder.path().to_owned()]).unwrap();
        let skipped: Vec<_> = ["c.txt", "e.json"].iter().map(|name| folder.path().join(name)).collect();
        assert_eq!(found.skipped, skipped.iter().map(|path| path.display().to_string()).collect::<Vec<_>>());
        let found: Vec<_> = found.documents.into_iter().map(|found| found.document).collect();
        assert_eq!(found, [json!({"a": 1}), json!({"b": 1}), json!({"d": 1})]);
        fs::write(folder.path().join("b.json"), "{").unwrap();
        fs::write(folder.path().join("f.json"), "").unwrap();
        let missing = folder.path().join("missing");
        let problems = documents(&[folder.path().to_owned(), missing]).unwrap_err();
        assert_eq!(problems.len(), 3, "{problems:?}");
    }
}
