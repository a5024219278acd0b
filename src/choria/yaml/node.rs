//! YAML as nodes with line numbers. Anchors and merge keys are resolved here; what a value means is decided by the field
//! that it is for.

use std::collections::HashMap;

use saphyr_parser::{Event, Parser, ScalarStyle, Span};

use super::YamlProblem;

/// Nodes of one file after aliases are resolved: a few lines of aliases of aliases would be more than memory holds.
const MAX_NODES: usize = 200_000;
/// Lists and mappings within each other.
const MAX_DEPTH: usize = 32;

/// One value and where it begins.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct YamlNode {
    /// From 1.
    pub(super) line: usize,
    pub(super) content: NodeContent,
}

/// What a node is.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum NodeContent {
    /// A text, a number, a boolean or nothing. `plain` is without quotes, and not a block.
    Scalar { text: String, plain: bool },
    /// A list.
    List(Vec<YamlNode>),
    /// A mapping, keys as written and in their order.
    Mapping(Vec<MappingEntry>),
}

/// One key of a mapping.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct MappingEntry {
    pub(super) key: String,
    /// Of the key, from 1.
    pub(super) line: usize,
    pub(super) value: YamlNode,
    /// It came by a merge key: an entry that is written out takes precedence.
    pub(super) merged: bool,
}

/// The first document of a text; `None` for an empty one.
pub(super) fn compose(text: &str) -> Result<Option<YamlNode>, YamlProblem> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut composer = Composer { events: Parser::new_from_str(text), anchors: HashMap::new(), nodes: 0 };
    composer.document()
}

struct Composer<'a> {
    events: Parser<'a, saphyr_parser::StrInput<'a>>,
    anchors: HashMap<usize, YamlNode>,
    nodes: usize,
}

impl<'a> Composer<'a> {
    fn next(&mut self) -> Result<(Event<'a>, usize), YamlProblem> {
        match self.events.next_event() {
            Some(Ok((event, Span { start, .. }))) => Ok((event, start.line())),
            // Not the parser's words alone: some of them quote the text, which may be a password.
            Some(Err(error)) => {
                let (line, column) = (error.marker().line(), error.marker().col() + 1);
                Err(YamlProblem::new(line, "", format!("it is not valid YAML at column {column}: {}", reason(&error))))
            }
            None => Ok((Event::StreamEnd, 0)),
        }
    }

    fn document(&mut self) -> Result<Option<YamlNode>, YamlProblem> {
        loop {
            match self.next()? {
                (Event::DocumentStart(_), _) => break,
                (Event::StreamEnd, _) => return Ok(None),
                _ => {}
            }
        }
        let (first, line) = self.next()?;
        let node = self.node(first, line, 0)?;
        loop {
            match self.next()? {
                (Event::StreamEnd, _) => return Ok(Some(node)),
                (Event::DocumentStart(_), line) => {
                    let message = "a second YAML document begins here: write everything into one";
                    return Err(YamlProblem::new(line, "", message));
                }
                _ => {}
            }
        }
    }

    fn node(&mut self, event: Event<'a>, line: usize, depth: usize) -> Result<YamlNode, YamlProblem> {
        self.count(line, 1)?;
        if depth > MAX_DEPTH {
            return Err(YamlProblem::new(line, "", format!("more than {MAX_DEPTH} levels")));
        }
        let (anchor, content) = match event {
            Event::Scalar(text, style, anchor, tag) => {
                // `!!str 5` is a text.
                let is_text = tag.is_some_and(|tag| tag.is_yaml_core_schema() && tag.suffix == "str");
                let plain = style == ScalarStyle::Plain && !is_text;
                (anchor, NodeContent::Scalar { text: text.into_owned(), plain })
            }
            Event::SequenceStart(anchor, _) => (anchor, self.list(depth)?),
            Event::MappingStart(anchor, _) => (anchor, self.mapping(depth)?),
            Event::Alias(anchor) => {
                let Some(node) = self.anchors.get(&anchor).cloned() else {
                    return Err(YamlProblem::new(line, "", "an alias refers to the value that it is part of"));
                };
                self.count(line, size(&node))?;
                return Ok(node);
            }
            _ => return Err(YamlProblem::new(line, "", "it is not valid YAML")),
        };
        let node = YamlNode { line, content };
        if anchor > 0 {
            self.anchors.insert(anchor, node.clone());
        }
        Ok(node)
    }

    fn count(&mut self, line: usize, nodes: usize) -> Result<(), YamlProblem> {
        self.nodes += nodes;
        if self.nodes > MAX_NODES {
            return Err(YamlProblem::new(line, "", format!("more than {MAX_NODES} values, aliases resolved")));
        }
        Ok(())
    }

    fn list(&mut self, depth: usize) -> Result<NodeContent, YamlProblem> {
        let mut list = Vec::new();
        loop {
            match self.next()? {
                (Event::SequenceEnd, _) => return Ok(NodeContent::List(list)),
                (event, line) => list.push(self.node(event, line, depth + 1)?),
            }
        }
    }

    fn mapping(&mut self, depth: usize) -> Result<NodeContent, YamlProblem> {
        let (mut entries, mut merged) = (Vec::new(), Vec::new());
        loop {
            let (key, line) = match self.next()? {
                (Event::MappingEnd, _) => break,
                (Event::Scalar(key, style, ..), line) => ((key.into_owned(), style), line),
                (_, line) => return Err(YamlProblem::new(line, "", "a key is a word, not a list or a mapping")),
            };
            let (event, at) = self.next()?;
            let value = self.node(event, at, depth + 1)?;
            match key {
                (key, ScalarStyle::Plain) if key == "<<" => merge(value, line, &mut merged)?,
                (key, _) => entries.push(MappingEntry { key, line, value, merged: false }),
            }
        }
        for entry in merged {
            if !entries.iter().any(|own: &MappingEntry| own.key.eq_ignore_ascii_case(&entry.key)) {
                entries.push(entry);
            }
        }
        Ok(NodeContent::Mapping(entries))
    }
}

/// What `<<` brings: a mapping, or a list of them of which the first takes precedence.
fn merge(value: YamlNode, line: usize, into: &mut Vec<MappingEntry>) -> Result<(), YamlProblem> {
    match value.content {
        NodeContent::Mapping(entries) => into.extend(entries.into_iter().map(|e| MappingEntry { merged: true, ..e })),
        NodeContent::List(list) => list.into_iter().try_for_each(|one| merge(one, line, into))?,
        NodeContent::Scalar { .. } => {
            return Err(YamlProblem::new(line, "", "`<<` merges a mapping: write `<<: *name` of an anchor on one"));
        }
    }
    Ok(())
}

fn size(node: &YamlNode) -> usize {
    1 + match &node.content {
        NodeContent::Scalar { .. } => 0,
        NodeContent::List(list) => list.iter().map(size).sum(),
        NodeContent::Mapping(entries) => entries.iter().map(|entry| size(&entry.value)).sum(),
    }
}

/// The parser's reason without what it quotes.
fn reason(error: &saphyr_parser::ScanError) -> String {
    let info = error.info();
    let end = info.find(['\'', '"', '`']).unwrap_or(info.len());
    info[..end].trim_end_matches([' ', ':']).to_owned()
}
