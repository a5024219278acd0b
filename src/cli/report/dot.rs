//! A graph in the language of Graphviz. Pure.

use std::fmt::Write;

use super::graph::{Graph, GraphEdge, GraphNode};
use crate::cli::output::clean;

/// The whole file.
pub(super) fn write(graph: &Graph) -> String {
    let mut text = String::from(
        "digraph replications {\n  rankdir=LR;\n  node [shape=box, style=rounded, fontname=\"sans-serif\"];\n  edge \
         [fontname=\"sans-serif\", fontsize=10];\n",
    );
    for (index, GraphNode { name, place, facts, is_bad }) in graph.nodes.iter().enumerate() {
        let colour = if *is_bad { ", color=\"red\"" } else { "" };
        let _ = writeln!(text, "  n{index} [label={}{colour}];", lines(&[name, place, facts]));
    }
    for GraphEdge { from, to, name, facts, is_native, is_bad } in &graph.edges {
        let colour = if *is_bad { ", color=\"red\"" } else { "" };
        let style = if *is_native { ", style=dashed" } else { "" };
        let _ = writeln!(text, "  n{from} -> n{to} [label={}{style}{colour}];", lines(&[name, facts]));
    }
    text.push_str("}\n");
    text
}

/// A quoted text of several lines. A backslash begins an escape of a label, such as `\N` for the name of the node.
fn lines(lines: &[&str]) -> String {
    let line = |line: &&str| clean(line).replace('\\', "\\\\").replace('"', "\\\"");
    format!("\"{}\"", lines.iter().map(line).collect::<Vec<_>>().join("\\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_cannot_leave_their_quotes() {
        for (text, expect) in [
            ("a", r#""a""#),
            (r#"a" ]; x [label="b"#, r#""a\" ]; x [label=\"b""#),
            (r"a\", r#""a\\""#),
            (r#"\" "#, r#""\\\" ""#),
            ("a\nb\u{0}", r#""a b ""#),
        ] {
            assert_eq!(lines(&[text]), expect);
        }
        assert_eq!(lines(&["a", "b"]), r#""a\nb""#);
    }

    #[test]
    fn nodes_and_edges_are_lines() {
        let node = |name: &str, is_bad| GraphNode { name: name.into(), place: "C".into(), facts: "f".into(), is_bad };
        let edge =
            GraphEdge { from: 0, to: 1, name: "Copy S".into(), facts: "lag 0".into(), is_native: true, is_bad: true };
        let text = write(&Graph { nodes: vec![node("S", false), node("T", true)], edges: vec![edge] });
        for line in [
            r#"  n0 [label="S\nC\nf"];"#,
            r#"  n1 [label="T\nC\nf", color="red"];"#,
            r#"  n0 -> n1 [label="Copy S\nlag 0", style=dashed, color="red"];"#,
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
        assert!(text.starts_with("digraph replications {\n") && text.ends_with("}\n"));
    }
}
