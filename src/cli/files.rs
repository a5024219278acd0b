//! Documents in files and on stdin.

use std::{
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use serde_json::Value;

use super::{error::Error, output::clean};
use crate::config::{Json, why_not_json};

/// Stands for stdin.
const STDIN: &str = "-";

/// A document and where it was found.
#[derive(Debug)]
pub(super) struct FoundFiles {
    /// The file, and which of its documents it is if there are several.
    pub(super) place: String,
    pub(super) document: Value,
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

/// All documents of files and of the `*.json` in folders, in order. Everything that cannot be read is reported at once.
pub(super) fn documents(paths: &[PathBuf]) -> Result<Vec<FoundFiles>, Vec<String>> {
    let (mut found, mut problems) = (Vec::new(), Vec::new());
    for path in paths {
        let files = if path.is_dir() { folder(path) } else { Ok(vec![path.clone()]) };
        for file in files.unwrap_or_else(|problem| {
            problems.push(problem);
            Vec::new()
        }) {
            match read(&file) {
                Ok(text) => match split(&text, &name(&file)) {
                    Ok(documents) => found.extend(documents),
                    Err(problem) => problems.push(problem),
                },
                Err(error) => problems.push(error.to_string()),
            }
        }
    }
    if problems.is_empty() { Ok(found) } else { Err(problems) }
}

fn folder(path: &Path) -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir(path).and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect());
    let mut files: Vec<PathBuf> = entries.map_err(|error| unreadable(path, &error).to_string())?;
    files.retain(|file| file.extension().is_some_and(|extension| extension == "json") && !file.is_dir());
    files.sort();
    Ok(files)
}

/// One document, an array of them, or several one after another.
fn split(text: &[u8], file: &str) -> Result<Vec<FoundFiles>, String> {
    let mut documents = Vec::new();
    for json in serde_json::Deserializer::from_slice(text).into_iter::<Json>() {
        let Json { value, problems } =
            json.map_err(|error| format!("`{file}` is not valid JSON: {}", why_not_json(text, &error)))?;
        if let Some(problem) = problems.first() {
            return Err(format!("`{file}`: {}: {problem}", problem.path));
        }
        match value {
            Value::Array(values) => documents.extend(values),
            value => documents.push(value),
        }
    }
    let several = documents.len() > 1;
    let place = |index: usize| if several { format!("{file}, document {}", index + 1) } else { file.to_owned() };
    let documents = documents.into_iter().enumerate();
    Ok(documents.map(|(index, document)| FoundFiles { place: place(index), document }).collect())
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

    #[test]
    fn a_file_holds_one_document_or_an_array_or_several() {
        let check = |text: &str, expect: &[(&str, Value)]| {
            let found = split(text.as_bytes(), "F").unwrap();
            let found: Vec<_> = found.iter().map(|found| (found.place.as_str(), found.document.clone())).collect();
            assert_eq!(found, expect, "{text}");
        };
        check("", &[]);
        check("[]\n", &[]);
        check(r#"{"a":1}"#, &[("F", json!({"a": 1}))]);
        check(r#"[{"a":1}]"#, &[("F", json!({"a": 1}))]);
        check(
            "{}\n{}[{}]",
            &[("F, document 1", json!({})), ("F, document 2", json!({})), ("F, document 3", json!({}))],
        );
    }

    #[test]
    fn invalid_json_is_reported_by_position_without_its_content() {
        let error = split(b"{\"a\": 1}\n{\"source_url\": \"nats://u:hunter2@h\" x", "F").unwrap_err();
        assert!(error.starts_with("`F` is not valid JSON: ") && error.contains("line 2 column"), "{error}");
        assert!(!error.contains("hunter2"), "{error}");
    }

    #[test]
    fn a_folder_stands_for_its_json_files_in_order() {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in [("b.json", r#"{"b":1}"#), ("a.json", r#"{"a":1}"#), ("c.txt", "no"), ("d.json", "")] {
            fs::write(folder.path().join(name), text).unwrap();
        }
        fs::create_dir(folder.path().join("e.json")).unwrap();
        let found = documents(&[folder.path().to_owned()]).unwrap();
        let found: Vec<_> = found.into_iter().map(|found| found.document).collect();
        assert_eq!(found, [json!({"a": 1}), json!({"b": 1})]);
        fs::write(folder.path().join("a.json"), "{").unwrap();
        let missing = folder.path().join("missing");
        let problems = documents(&[folder.path().to_owned(), missing]).unwrap_err();
        assert_eq!(problems.len(), 2, "{problems:?}");
    }
}
