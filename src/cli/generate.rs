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
    out.text(&with_ids(args.shell, &String::from_utf8_lossy(&script), &verbs_with_ids(&command)));
    CommandVerdict::Good
}

/// The commands that take ids of replications, such as `pause` and `config get`.
fn verbs_with_ids(command: &clap::Command) -> Vec<String> {
    let takes_ids = |verb: &clap::Command| {
        let mut names = verb.get_positionals().filter_map(|argument| argument.get_value_names());
        names.any(|names| names.iter().any(|name| name == "ID"))
    };
    let mut verbs = Vec::new();
    for verb in command.get_subcommands() {
        let below = verb.get_subcommands().filter(|below| takes_ids(below));
        verbs.extend(below.map(|below| format!("{} {}", verb.get_name(), below.get_name())));
        if takes_ids(verb) {
            verbs.push(verb.get_name().to_owned());
        }
    }
    verbs
}

/// Arguments of the program that print the ids which a shell offers.
const LIST_IDS: &str = "config ls --ids --timeout 1s 2>/dev/null";

/// The script, and what completes ids with those that the service knows.
fn with_ids(shell: Shell, script: &str, verbs: &[String]) -> String {
    match shell {
        Shell::Bash => bash(script, verbs),
        Shell::Zsh => zsh(script),
        Shell::Fish => fish(script, verbs),
        _ => script.to_owned(),
    }
}

/// A function around the generated one. Adapters and links have verbs of the same names, and names of
/// their own.
fn bash(script: &str, verbs: &[String]) -> String {
    let patterns: Vec<_> = verbs.iter().map(|verb| format!("*\" {verb} \"*")).collect();
    let (program, patterns) = (names::PROGRAM, patterns.join("|"));
    // As the generator names its function. It looks verbs up under another name, if that of the program has a hyphen.
    let named = program.replace('-', "__");
    let script = script.replace(&program.replace('-', "__subcmd__"), &named);
    let function = format!("_{named}");
    format!(
        r#"{script}
{function}_with_ids() {{
    {function} "$@"
    local word="${{COMP_WORDS[COMP_CWORD]}}"
    [[ $word == -* || ${{COMP_WORDS[COMP_CWORD-1]}} == -* ]] && return
    case " ${{COMP_WORDS[*]:1:COMP_CWORD-1}} " in
        *" adapter "*|*" link "*) ;;
        {patterns})
            COMPREPLY=($(compgen -W "$("${{COMP_WORDS[0]}}" {LIST_IDS})" -- "$word")) ;;
    esac
}}
complete -F {function}_with_ids -o bashdefault -o default {program}
"#
    )
}

/// The generated positionals complete files; those that are ids get a function of their own.
fn zsh(script: &str) -> String {
    let function = "_stream_replicator_ids() {\n    local -a ids\n    \
                    ids=(${(f)\"$(${words[1]:-PROGRAM} LIST)\"})\n    compadd -a ids\n}\n";
    let function = function.replace("PROGRAM", names::PROGRAM).replace("LIST", LIST_IDS);
    let mut text = String::new();
    for (index, line) in script.lines().enumerate() {
        let is_ids = ["::ids -- ", ":id -- ", "::id -- "].iter().any(|begin| line.contains(begin));
        text += &if is_ids { line.replace(":_default", ":_stream_replicator_ids") } else { line.to_owned() };
        text.push('\n');
        if index == 0 {
            text += &function;
        }
    }
    text
}

fn fish(script: &str, verbs: &[String]) -> String {
    let program = names::PROGRAM;
    let lines = verbs.iter().map(|verb| {
        let seen: Vec<_> = verb.split(' ').map(|word| format!("__fish_seen_subcommand_from {word}")).collect();
        let seen = format!("{}; and not __fish_seen_subcommand_from adapter link", seen.join("; and "));
        format!("complete -c {program} -n \"{seen}\" -f -a \"({program} {LIST_IDS})\"\n")
    });
    format!("{script}{}", lines.collect::<String>())
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
