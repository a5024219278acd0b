//! The contexts of the `nats` tool: which one is selected, and what the file of one says. Files are read at every
//! attempt to connect, so that a context that was changed is followed.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

use crate::{Connection, ContextFields, Error, ServerRef, check_context_name};

/// The context that was selected with `nats context select`, if there is one.
pub fn selected() -> Result<Option<String>, Error> {
    folder().map_or(Ok(None), |folder| selected_in(&folder))
}

fn selected_in(folder: &Path) -> Result<Option<String>, Error> {
    let path = folder.join("context.txt");
    match fs::read_to_string(&path) {
        Ok(name) => Ok(Some(name.trim().to_owned()).filter(|name| !name.is_empty())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::hold(format!("cannot read `{}`: {error}", path.display()))),
    }
}

/// Everything that a connection needs; the file of a context is read now.
pub fn resolve(server: &ServerRef) -> Result<Connection, Error> {
    let (name, over, under) = match server {
        ServerRef::Known(connection) => return Ok(connection.as_ref().clone()),
        ServerRef::Context { name, over, under } => (name, over, under),
    };
    let path = file(name)?;
    let wrong = |message: String| Error::hold(format!("context `{name}` (`{}`): {message}", path.display()));
    let json = fs::read(&path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => wrong("there is no such file".to_owned()),
        _ => wrong(error.to_string()),
    })?;
    let mut fields = ContextFields::of_context(&json).map_err(wrong)?;
    fields.files_mut().for_each(expand);
    let fields = over.as_ref().clone().over(fields).over(under.as_ref().clone());
    fields.connection().map_err(|error| wrong(format!("`{}`: {}", error.field, error.message)))
}

/// Path of the file of a context.
pub fn file(name: &str) -> Result<PathBuf, Error> {
    check_context_name(name).map_err(|right| Error::hold(format!("context `{name}` is not possible: {right}")))?;
    Ok(folder()?.join("context").join(format!("{name}.json")))
}

/// `~` at the beginning of a path is the home folder, as the `nats` tool has it.
pub fn expand(path: &mut PathBuf) {
    if let (Ok(rest), Some(home)) = (path.strip_prefix("~"), home()) {
        *path = home.join(rest);
    }
}

fn folder() -> Result<PathBuf, Error> {
    let config = match set("XDG_CONFIG_HOME") {
        Some(folder) => folder,
        None => home().map(|home| home.join(".config")).ok_or_else(|| {
            Error::hold("contexts cannot be found: neither `XDG_CONFIG_HOME` nor `HOME` is set in the environment")
        })?,
    };
    Ok(Path::new(&config).join("nats"))
}

fn home() -> Option<PathBuf> {
    set("HOME")
}

fn set(name: &str) -> Option<PathBuf> {
    env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_selected_context_is_the_one_that_the_file_names() {
        let folder = tempfile::tempdir().unwrap();
        let selected = || selected_in(folder.path()).unwrap();
        assert_eq!(selected(), None);
        fs::write(folder.path().join("context.txt"), "hub\n").unwrap();
        assert_eq!(selected(), Some("hub".to_owned()));
        fs::write(folder.path().join("context.txt"), "\n").unwrap();
        assert_eq!(selected(), None);
        fs::remove_file(folder.path().join("context.txt")).unwrap();
        fs::create_dir(folder.path().join("context.txt")).unwrap();
        let error = selected_in(folder.path()).unwrap_err();
        assert!(error.message.contains("context.txt"), "{error}");
    }

    #[test]
    fn a_tilde_is_the_home_folder() {
        let expanded = |path: &str| {
            let mut path = PathBuf::from(path);
            expand(&mut path);
            path
        };
        let home = home().expect("tests run with a home folder");
        assert_eq!(expanded("~/a/b"), home.join("a/b"));
        assert_eq!(expanded("/~/a"), PathBuf::from("/~/a"));
        assert_eq!(expanded("~other/a"), PathBuf::from("~other/a"));
    }
}
