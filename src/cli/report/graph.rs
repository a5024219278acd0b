//! A report as nodes and edges, for the pictures. Pure.

use std::collections::HashMap;

use super::{lag_words, place, replication_kind};
use crate::{
    cli::format::{bytes, counted},
    control::api::{ReportReplication, ReportStream, StreamReport},
};

/// Streams, and what goes from one to another.
#[derive(Debug, Default)]
pub(super) struct Graph {
    pub(super) nodes: Vec<GraphNode>,
    pub(super) edges: Vec<GraphEdge>,
}

/// One stream.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct GraphNode {
    /// Name of the stream.
    pub(super) name: String,
    /// Where it is.
    pub(super) place: String,
    /// What it has, or why that is not known.
    pub(super) facts: String,
    /// Something is wrong with it.
    pub(super) is_bad: bool,
}

/// What fills one stream from another one.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct GraphEdge {
    /// Index of the node that the messages come from.
    pub(super) from: usize,
    /// Index of the node that is filled.
    pub(super) to: usize,
    /// Kind and id.
    pub(super) name: String,
    /// Lag, and the error where there is one.
    pub(super) facts: String,
    /// By the server, not by copying.
    pub(super) is_native: bool,
    /// It has an error.
    pub(super) is_bad: bool,
}

impl Graph {
    /// That of a report. A stream outside of it that a mirror or a source names is a node without facts.
    pub(super) fn of(report: &StreamReport) -> Self {
        let mut graph = Self::default();
        let mut known: HashMap<String, usize> = HashMap::new();
        for row in &report.streams {
            known.insert(row.node.clone(), graph.nodes.len());
            graph.nodes.push(node(row));
        }
        for row in report.replications.iter().chain(&report.native) {
            let Some(to) = row.target.as_ref().and_then(|node| known.get(node)).copied() else { continue };
            let from = row.source.as_ref().and_then(|node| known.get(node)).copied();
            let from = from.unwrap_or_else(|| {
                let place = row.from.clone().unwrap_or_else(|| graph.nodes[to].place.clone());
                // Several streams may have one outside of the report as their source.
                *known.entry(format!("{place} {}", row.source_stream)).or_insert_with(|| {
                    let facts = "not in this report".to_owned();
                    graph.nodes.push(GraphNode { name: row.source_stream.clone(), place, facts, is_bad: false });
                    graph.nodes.len() - 1
                })
            });
            graph.edges.push(edge(row, from, to));
        }
        graph
    }

    /// The column of each node: every stream is right of those that fill it, as far as there is no circle.
    pub(super) fn columns(&self) -> Vec<usize> {
        let mut next: Vec<Vec<usize>> = vec![Vec::new(); self.nodes.len()];
        for edge in &self.edges {
            next[edge.from].push(edge.to);
        }
        // Reverse postorder without the edges that lead back.
        let mut visits = vec![Visit::New; self.nodes.len()];
        let (mut order, mut forward) = (Vec::new(), Vec::new());
        for start in 0..self.nodes.len() {
            if visits[start] != Visit::New {
                continue;
            }
            visits[start] = Visit::Open;
            let mut path = vec![(start, 0)];
            while let Some((node, tried)) = path.last_mut() {
                let (node, index) = (*node, *tried);
                *tried += 1;
                match next[node].get(index) {
                    Some(to) if visits[*to] == Visit::Open => {}
                    Some(to) => {
                        forward.push((node, *to));
                        if visits[*to] == Visit::New {
                            visits[*to] = Visit::Open;
                            path.push((*to, 0));
                        }
                    }
                    None => {
                        visits[node] = Visit::Done;
                        order.push(node);
                        path.pop();
                    }
                }
            }
        }
        let mut successors: Vec<Vec<usize>> = vec![Vec::new(); self.nodes.len()];
        forward.into_iter().for_each(|(from, to)| successors[from].push(to));
        let mut columns = vec![0; self.nodes.len()];
        for node in order.into_iter().rev() {
            for to in &successors[node] {
                columns[*to] = columns[*to].max(columns[node] + 1);
            }
        }
        columns
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Visit {
    New,
    Open,
    Done,
}

fn node(row: &ReportStream) -> GraphNode {
    let facts = match (&row.error, row.messages, row.bytes) {
        (Some(error), ..) => error.clone(),
        (None, Some(messages), Some(size)) => format!("{}, {}", counted(messages, "message"), bytes(size)),
        _ => "unknown".to_owned(),
    };
    GraphNode { name: row.stream.clone(), place: place(row), facts, is_bad: row.error.is_some() }
}

fn edge(row: &ReportReplication, from: usize, to: usize) -> GraphEdge {
    let kind = replication_kind(row.kind);
    GraphEdge {
        from,
        to,
        name: row.replication.as_ref().map_or_else(|| kind.to_owned(), |id| format!("{kind} {id}")),
        facts: match &row.error {
            Some(error) => format!("{}: {error}", lag_words(row)),
            None => lag_words(row),
        },
        is_native: row.replication.is_none(),
        is_bad: row.error.is_some(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// The columns of a graph with these edges.
    fn columns(nodes: usize, edges: &[(usize, usize)]) -> Vec<usize> {
        let node = |_| GraphNode { name: String::new(), place: String::new(), facts: String::new(), is_bad: false };
        let edge = |(from, to): &(usize, usize)| GraphEdge {
            from: *from,
            to: *to,
            name: String::new(),
            facts: String::new(),
            is_native: false,
            is_bad: false,
        };
        Graph { nodes: (0..nodes).map(node).collect(), edges: edges.iter().map(edge).collect() }.columns()
    }

    #[test]
    fn a_stream_is_right_of_all_that_fill_it() {
        assert_eq!(columns(2, &[(0, 1)]), [0, 1]);
        assert_eq!(columns(2, &[(1, 0)]), [1, 0]);
        assert_eq!(columns(4, &[(0, 3), (0, 1), (1, 2), (2, 3)]), [0, 1, 2, 3]);
        assert_eq!(columns(3, &[]), [0, 0, 0]);
    }

    #[test]
    fn circles_have_columns_too() {
        assert_eq!(columns(2, &[(0, 1), (1, 0)]), [0, 1]);
        assert_eq!(columns(1, &[(0, 0)]), [0]);
        assert_eq!(columns(4, &[(3, 0), (0, 1), (1, 2), (2, 0)]), [1, 2, 3, 0]);
    }

    #[test]
    fn a_long_chain_takes_no_stack() {
        let edges: Vec<_> = (0..50_000).map(|node| (node, node + 1)).collect();
        assert_eq!(columns(50_001, &edges)[50_000], 50_000);
    }

    #[test]
    fn an_origin_outside_is_one_node() {
        let native = |target: &str, from: &str| json!({"stream": "T", "kind": "mirror", "from": from, "source_stream": "O", "target": target});
        let report: StreamReport = serde_json::from_value(json!({
            "site": "X", "replications": [], "offset": 0, "limit": 1, "total": 0,
            "streams": [{"node": "a", "stream": "A", "url": "u"}, {"node": "b", "stream": "B", "url": "u"}],
            "native": [native("a", "$JS.hub.API"), native("b", "$JS.hub.API"), native("b", "$JS.x.API"), native("gone", "y")],
        }))
        .unwrap();
        let graph = Graph::of(&report);
        let ends: Vec<_> = graph.edges.iter().map(|edge| (edge.from, edge.to)).collect();
        assert_eq!((graph.nodes.len(), ends), (4, vec![(2, 0), (2, 1), (3, 1)]));
    }
}
