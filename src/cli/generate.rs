//! `stream-replicator completions` and `man`: made from the definition of the commands.

use std::{fs, path::PathBuf};

use clap_complete::Shell;
use clap_mangen::Man;

use super::{
    error::{CommandVerdict, Error},
    output::Output,
};
use crate::names;

/// Print completions for a shell
///
/// For example: `stream-replicator completions bash > /etc/bash_completion.d/stream-replicator`
#[derive(Debug, clap::Args)]
pub(super) struct CompletionsArgs {
    shell: Shell,
}

/// Print the manual page
#[derive(Debug, clap::Args)]
pub(super) struct ManArgs {
    /// Write the pages of all commands into this folder instead
    #[arg(long, value_name = "FOLDER")]
    dir: Option<PathBuf>,
}

pub(super) fn completions(args: &CompletionsArgs, mut command: clap::Command, out: &mut Output) -> CommandVerdict {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command, names::PROGRAM, &mut script);
    out.text(&String::from_utf8_lossy(&script));
    CommandVerdict::Good
}

pub(super) fn man(args: &ManArgs, command: clap::Command, out: &mut Output) -> Result<CommandVerdict, Error> {
    match &args.dir {
        None => {
            let mut page = Vec::new();
            Man::new(command).render(&mut page).map_err(|error| Error::Failed(error.to_string()))?;
            out.text(&String::from_utf8_lossy(&page));
        }
        Some(folder) => fs::create_dir_all(folder)
            .and_then(|()| clap_mangen::generate_to(command, folder))
            .map_err(|error| Error::Failed(format!("cannot write to `{}`: {error}", folder.display())))?,
    }
    Ok(CommandVerdict::Good)
}
