//! A graph as a picture: streams in columns, from left to right as the messages go. Pure.

use std::fmt::Write;

use super::graph::{Graph, GraphEdge, GraphNode};

/// Size of a box, and the space between two.
const WIDTH: usize = 240;
const HEIGHT: usize = 66;
const ACROSS: usize = 220;
const DOWN: usize = 30;
const MARGIN: usize = 20;
/// Room for a text in a box, and on the line between two.
const BOX_ROOM: usize = WIDTH - 2 * 8;
const EDGE_ROOM: usize = ACROSS - 2 * 10;
/// How far a line that leads back leaves its boxes.
const BEND: usize = 60;

/// The whole file.
pub(super) fn write(graph: &Graph) -> String {
    let at = positions(graph);
    let right = at.iter().map(|(x, _)| x + WIDTH).max().unwrap_or_default();
    let low = at.iter().map(|(_, y)| y + HEIGHT).max().unwrap_or_default();
    // A line that leads back needs room at both sides.
    let (width, height) = (right + MARGIN + BEND, low + MARGIN + DOWN);
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<title>Replications</title>\n<defs><marker id=\"end\" viewBox=\"0 0 8 8\" \
         refX=\"8\" refY=\"4\" markerWidth=\"8\" markerHeight=\"8\" orient=\"auto\"><path d=\"M0 0L8 4L0 8z\" \
         fill=\"context-stroke\"/></marker></defs>\n<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n"
    );
    for (index, edge) in graph.edges.iter().enumerate() {
        // Lines between the same two boxes are side by side.
        let before = graph.edges[..index].iter().filter(|other| (other.from, other.to) == (edge.from, edge.to)).count();
        draw_edge(&mut text, edge, at[edge.from], at[edge.to], before);
    }
    for (node, place) in graph.nodes.iter().zip(&at) {
        draw_node(&mut text, node, *place);
    }
    text.push_str("</svg>\n");
    text
}

/// The left upper corner of each box. In a column, a box is near those that its messages come from.
fn positions(graph: &Graph) -> Vec<(usize, usize)> {
    let columns = graph.columns();
    let mut sources: Vec<Vec<usize>> = vec![Vec::new(); graph.nodes.len()];
    for edge in graph.edges.iter().filter(|edge| columns[edge.from] < columns[edge.to]) {
        sources[edge.to].push(edge.from);
    }
    let mut by_column: Vec<Vec<usize>> = vec![Vec::new(); columns.iter().max().map_or(0, |last| last + 1)];
    columns.iter().enumerate().for_each(|(node, column)| by_column[*column].push(node));
    let mut at = vec![(0, 0); graph.nodes.len()];
    for (column, nodes) in by_column.iter_mut().enumerate() {
        let middle = |node: &usize| {
            let rows = sources[*node].iter().map(|source| at[*source].1);
            (rows.clone().sum::<usize>() / rows.len().max(1), &graph.nodes[*node].place, &graph.nodes[*node].name)
        };
        nodes.sort_by(|one, other| middle(one).cmp(&middle(other)));
        for (row, node) in nodes.iter().enumerate() {
            at[*node] = (MARGIN + BEND + column * (WIDTH + ACROSS), MARGIN + DOWN + row * (HEIGHT + DOWN));
        }
    }
    at
}

fn draw_node(text: &mut String, node: &GraphNode, (x, y): (usize, usize)) {
    let GraphNode { name, place, facts, is_bad } = node;
    let (line, fill) = if *is_bad { ("#c62828", "#ffebee") } else { ("#455a64", "#eceff1") };
    let _ = write!(
        text,
        "<g><title>{}</title><rect x=\"{x}\" y=\"{y}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" rx=\"6\" fill=\"{fill}\" \
         stroke=\"{line}\"/>",
        escaped(&format!("{name}, {place}: {facts}"))
    );
    for (row, (words, style)) in
        [(name, " font-weight=\"bold\""), (place, " fill=\"#546e7a\""), (facts, "")].into_iter().enumerate()
    {
        let (left, base) = (x + 10, y + 20 + row * 18);
        let words = escaped(&cut(words, BOX_ROOM));
        let _ = write!(text, "<text x=\"{left}\" y=\"{base}\"{style}>{words}</text>");
    }
    text.push_str("</g>\n");
}

fn draw_edge(text: &mut String, edge: &GraphEdge, from: (usize, usize), to: (usize, usize), before: usize) {
    let GraphEdge { name, facts, is_native, is_bad, .. } = edge;
    let colour = if *is_bad { "#c62828" } else { "#455a64" };
    let dashes = if *is_native { " stroke-dasharray=\"5 4\"" } else { "" };
    let shift = before * 22 % HEIGHT;
    let (x1, y1) = (from.0 + WIDTH, (from.1 + HEIGHT / 2 + shift).min(from.1 + HEIGHT));
    let (x2, y2) = (to.0, (to.1 + HEIGHT / 2 + shift).min(to.1 + HEIGHT));
    let (path, label) = if x1 < x2 {
        let half = (x2 - x1) / 2;
        (format!("M{x1} {y1}C{} {y1} {} {y2} {x2} {y2}", x1 + half, x2 - half), (x1 + half, (y1 + y2) / 2))
    } else {
        // Back, above both.
        let top = from.1.min(to.1).saturating_sub(DOWN / 2 + shift / 4);
        let (out, back) = (x1 + BEND, x2.saturating_sub(BEND));
        (
            format!("M{x1} {y1}C{out} {y1} {out} {top} {x1} {top}L{x2} {top}C{back} {top} {back} {y2} {x2} {y2}"),
            ((x1 + x2) / 2, top),
        )
    };
    let _ = write!(
        text,
        "<g><title>{}</title><path d=\"{path}\" fill=\"none\" stroke=\"{colour}\"{dashes} marker-end=\"url(#end)\"/>",
        escaped(&format!("{name}: {facts}"))
    );
    for (words, base) in [(name, label.1.saturating_sub(4)), (facts, label.1 + 13)] {
        let words = escaped(&cut(words, EDGE_ROOM));
        let _ = write!(
            text,
            "<text x=\"{}\" y=\"{base}\" text-anchor=\"middle\" font-size=\"11\" fill=\"{colour}\" stroke=\"#ffffff\" \
             stroke-width=\"3\" paint-order=\"stroke\">{words}</text>",
            label.0
        );
    }
    text.push_str("</g>\n");
}

/// The beginning of a text that is wider than the room; the whole is in the title.
fn cut(text: &str, room: usize) -> String {
    if text.chars().map(width_of).sum::<usize>() <= room {
        return text.to_owned();
    }
    let mut left = room.saturating_sub(width_of('…'));
    let fits = |character: &char| match left.checked_sub(width_of(*character)) {
        Some(rest) => {
            left = rest;
            true
        }
        None => false,
    };
    text.chars().take_while(fits).chain(['…']).collect()
}

/// How wide a character is at most in the usual fonts of this size.
fn width_of(character: char) -> usize {
    match character {
        'i' | 'j' | 'l' | ' ' | '.' | ',' | ':' | '|' | '\'' => 5,
        'm' | 'w' | 'M' | 'W' | '@' | '%' => 12,
        'A'..='Z' | '…' => 10,
        character if character.is_ascii() => 8,
        _ => 14,
    }
}

/// A text that is no markup, with only those characters that XML 1.0 has.
fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&apos;"),
            '\u{fffe}' | '\u{ffff}' => safe.push('\u{fffd}'),
            character if character.is_control() => safe.push(' '),
            character => safe.push(character),
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_text_ends_inside_its_box() {
        for text in ["N".repeat(56), "i".repeat(90), "W".repeat(30), "\u{6f22}".repeat(40)] {
            let shown = cut(&text, BOX_ROOM);
            assert!(shown.ends_with('…') && shown.chars().map(width_of).sum::<usize>() <= BOX_ROOM, "{shown}");
        }
        assert_eq!(cut("ORDERS", BOX_ROOM), "ORDERS");
    }

    fn graph(name: &str, edges: &[(usize, usize)]) -> Graph {
        let node = |_| GraphNode { name: name.into(), place: name.into(), facts: name.into(), is_bad: true };
        let edge = |(from, to): &(usize, usize)| GraphEdge {
            from: *from,
            to: *to,
            name: name.into(),
            facts: name.into(),
            is_native: true,
            is_bad: false,
        };
        Graph { nodes: (0..3).map(node).collect(), edges: edges.iter().map(edge).collect() }
    }

    #[test]
    fn no_text_becomes_markup() {
        let evil = "</title><script>alert('&\"')</script>\u{0}\u{1b}[2J\u{ffff}";
        let harmless = write(&graph("harmless", &[(0, 1), (1, 2), (2, 0)]));
        let picture = write(&graph(evil, &[(0, 1), (1, 2), (2, 0)]));
        let tags = |text: &str| text.matches('<').count();
        assert_eq!(tags(&picture), tags(&harmless), "{picture}");
        assert!(!picture.contains("<script") && picture.contains("&lt;script&gt;"), "{picture}");
        assert!(picture.chars().all(|c| c == '\n' || (!c.is_control() && c != '\u{ffff}')), "{picture:?}");
    }

    #[test]
    fn long_texts_are_cut_and_whole_in_the_title() {
        let long = "ä".repeat(100);
        let picture = write(&graph(&long, &[]));
        assert!(picture.contains(&format!(">{}</text>", cut(&long, BOX_ROOM))), "{picture}");
        assert!(picture.contains(&format!("<title>{long}, {long}: {long}</title>")), "{picture}");
    }

    #[test]
    fn boxes_do_not_overlap() {
        let graph = graph("n", &[(0, 1), (0, 2), (2, 0)]);
        let at = positions(&graph);
        for (index, (x, y)) in at.iter().enumerate() {
            for (left, top) in &at[index + 1..] {
                assert!(x.abs_diff(*left) >= WIDTH || y.abs_diff(*top) >= HEIGHT, "{at:?}");
            }
        }
        assert!(at[1].0 > at[0].0 && at[2].0 > at[0].0, "{at:?}");
    }

    #[test]
    fn an_empty_report_is_a_picture_too() {
        let picture = write(&Graph::default());
        assert!(picture.starts_with("<svg ") && picture.ends_with("</svg>\n"), "{picture}");
    }
}
