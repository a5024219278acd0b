// The picture of the topology: places of the sides, lines between them and where their labels are.
"use strict";

/** Up to so many lines, the place of each label is searched. */
const MOST_SEARCHED = 20;

/** Places of all sides, each behind those that fill it; more than `most` of one column are one. */
function layout(all, most) {
  const next = new Map(), depth = new Map();
  for (const { from, to } of all) {
    for (const name of [from, to]) if (!next.has(name)) next.set(name, new Set());
    if (from !== to) next.get(from).add(to);
  }
  // Without the edges that lead back: depth first, then the longest way.
  const order = [], state = new Map(), forward = new Map();
  for (const root of next.keys()) {
    if (state.has(root)) continue;
    const stack = [[root, [...next.get(root)]]];
    state.set(root, 1);
    forward.set(root, []);
    while (stack.length) {
      const [name, rest] = stack[stack.length - 1];
      const to = rest.pop();
      if (to === undefined) {
        state.set(name, 2);
        order.push(name);
        stack.pop();
      } else if (state.get(to) !== 1) {
        forward.get(name).push(to);
        if (!state.has(to)) {
          state.set(to, 1);
          forward.set(to, []);
          stack.push([to, [...next.get(to)]]);
        }
      }
    }
  }
  for (const name of order) depth.set(name, 0);
  for (const name of order.reverse()) for (const to of forward.get(name)) depth.set(to, Math.max(depth.get(to), depth.get(name) + 1));
  const weight = new Map();
  for (const pair of all) {
    const value = (pair.worst === "running" ? 0 : 1e12) + pair.rate + pair.number / 1e3;
    for (const name of [pair.from, pair.to]) weight.set(name, Math.max(weight.get(name) || 0, value));
  }
  const columns = [];
  for (const [name, at] of depth) (columns[at] ||= []).push(name);
  const shownAs = new Map(), nodes = [];
  columns.forEach((names, column) => {
    names.sort();
    const kept = names.length > most ? [...names].sort((a, b) => weight.get(b) - weight.get(a)).slice(0, most - 1) : names;
    const keep = new Set(kept);
    names.filter((name) => keep.has(name)).forEach((name, row) => {
      const node = { name, column, row, number: 0, bad: false };
      shownAs.set(name, node);
      nodes.push(node);
    });
    if (names.length > kept.length) {
      const node = { name: `${names.length - kept.length} more`, column, row: kept.length, number: 0, bad: false, several: true };
      names.filter((name) => !keep.has(name)).forEach((name) => shownAs.set(name, node));
      nodes.push(node);
    }
  });
  const edges = new Map();
  for (const pair of all) {
    const from = shownAs.get(pair.from), to = shownAs.get(pair.to);
    const key = `${nodes.indexOf(from)} ${nodes.indexOf(to)}`;
    const edge = edges.get(key);
    if (!edge) edges.set(key, { ...pair, from, to });
    else {
      for (const field of ["number", "rate", "unknown", "lag"]) edge[field] += pair[field];
      if (severity(pair.worst) < severity(edge.worst)) edge.worst = pair.worst;
    }
    from.number += pair.number;
    if (to !== from) to.number += pair.number;
    if (severity(pair.worst) < 2) from.bad = to.bad = true;
  }
  const longest = Math.max(...columns.map((names) => Math.min(names.length, most)));
  return { nodes, edges: [...edges.values()], columns: columns.length, longest };
}

function cut(text, most) {
  return text.length > most ? `${text.slice(0, most - 1)}…` : text;
}

/** The point of a curve at 0 (its start) to 1. */
function along(points, at) {
  const weights = [(1 - at) ** 3, 3 * at * (1 - at) ** 2, 3 * at * at * (1 - at), at ** 3];
  return [0, 1].map((axis) => points.reduce((sum, point, index) => sum + weights[index] * point[axis], 0));
}

/** The words of the lines, each where it covers least: no box, no other words, no other line, and its own line only where there is no
    room beside it. */
function labels(lines, boxes, narrow, width, height) {
  const taken = [];
  // The search takes the square of the number of lines, and among very many no place is free.
  const searched = lines.length <= MOST_SEARCHED;
  return lines.map((line) => {
    const half = line.words.length * (narrow ? 3 : 3.3) + 3;
    const sides = [[0, -6], [0, 15], [-half - 4, 4], [half + 4, 4], [0, 4]];
    if (line.first) sides.unshift(...sides.splice(line.first, 1));
    let best = null;
    for (const at of searched ? [line.at, 0.5, 0.4, 0.6, 0.3, 0.7, 0.2, 0.8] : [line.at]) {
      const [x, y] = along(line.points, at);
      for (const [dx, dy] of sides) {
        const label = { left: x + dx - half, right: x + dx + half, top: y + dy - 12, bottom: y + dy + 3 };
        const over = (other) => label.left < other.right && label.right > other.left && label.top < other.bottom && label.bottom > other.top;
        const crossed = (other) => other.path.filter(([px, py]) => px > label.left && px < label.right && py > label.top && py < label.bottom).length;
        let cost = label.left < 0 || label.right > width || label.top < 0 || label.bottom > height ? 1000 : 0;
        cost += 300 * boxes.filter(over).length + 300 * taken.filter(over).length;
        if (searched) for (const other of lines) cost += crossed(other) * (other === line ? 1 : 20);
        if (!best || cost < best.cost) best = { cost, label, x: x + dx, y: y + dy };
      }
      if (best.cost === 0) break;
    }
    taken.push(best.label);
    return shape("text", { x: best.x.toFixed(1), y: best.y.toFixed(1), class: "label" }, line.words);
  });
}

function picture({ nodes, edges, columns, longest }, narrow, width) {
  // Sideways on a wide screen, downwards on a narrow one.
  const high = 46;
  const wide = narrow
    ? Math.min(200, Math.floor((width - 10 - 10 * (longest - 1)) / longest))
    : Math.min(230, Math.max(120, Math.floor((width - 20) / columns - 70)));
  const sizes = [];
  for (const node of nodes) sizes[node.column] = Math.max(sizes[node.column] || 0, node.row + 1);
  const far = (edge) => !narrow && Math.abs(edge.to.column - edge.from.column) > 1;
  const height = narrow ? columns * (high + 70) - 70 + 20 : longest * (high + 18) + 22 + (edges.some(far) ? 30 : 0);
  for (const node of nodes) {
    if (narrow) {
      node.x = (width - sizes[node.column] * (wide + 10) + 10) / 2 + node.row * (wide + 10);
      node.y = 10 + node.column * (high + 70);
    } else {
      const step = columns > 1 ? (width - wide - 20) / (columns - 1) : 0;
      node.x = 10 + node.column * step;
      node.y = 10 + ((longest - sizes[node.column]) * (high + 18)) / 2 + node.row * (high + 18);
    }
  }
  const drawing = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-labelledby": "topology-title", class: narrow ? "narrow" : "" });
  const lines = [];
  const degree = (node) => edges.filter((edge) => edge.from === node || edge.to === node).length;
  for (const edge of edges) {
    const { from, to } = edge;
    const back = to.column <= from.column;
    const thick = Math.min(5, 1.2 + Math.log10(1 + edge.rate) * 0.7);
    // Start, end, and how far the line leaves both; a line that leads back is beside the one that leads there.
    let ends, leave, tip;
    if (from === to) {
      const x = from.x + wide / 2, y = from.y + high;
      ends = [x - 30, y, x + 30, y + 7];
      leave = [0, 24];
      tip = [-5, 7, 0, 0, 5, 7];
    } else if (narrow) {
      const x1 = from.x + wide / 2, x2 = to.x + wide / 2;
      ends = back ? [x1 + 20, from.y, x2 + 20, to.y + high + 7] : [x1 - 14, from.y + high, x2 - 14, to.y - 7];
      leave = [0, back ? -34 : 34];
      tip = back ? [-5, 0, 0, -7, 5, 0] : [-5, 0, 0, 7, 5, 0];
    } else {
      const y1 = from.y + high / 2, y2 = to.y + high / 2;
      ends = back ? [from.x, y1 + 10, to.x + wide + 7, y2 + 10] : [from.x + wide, y1 - 6, to.x - 7, y2 - 6];
      leave = [(ends[2] - ends[0]) / 2, 0];
      tip = back ? [0, -5, -7, 0, 0, 5] : [0, -5, 7, 0, 0, 5];
    }
    const [x1, y1, x2, y2] = ends, [lx, ly] = leave;
    const turn = from === to ? -1 : 1;
    // A line to a column that is not the next one is a bow around what is between.
    const bow = far(edge) ? (back ? 60 : -60) : 0;
    const points = [[x1, y1], [x1 + lx * (bow ? 0.6 : 1), y1 + ly + bow], [x2 - lx * (bow ? 0.6 : 1), y2 - turn * ly + bow], [x2, y2]];
    const path = `M${points[0]}C${points.slice(1).join(" ")}`;
    const head = from === to ? `M${x2 - 5} ${y2}L${x2} ${y2 - 7}L${x2 + 5} ${y2}z`
      : `M${x2 + tip[0]} ${y2 + tip[1]}L${x2 + tip[2]} ${y2 + tip[3]}L${x2 + tip[4]} ${y2 + tip[5]}z`;
    // The label is near the end that fewer lines share.
    const at = back ? 0.5 : degree(to) >= degree(from) ? 0.25 : 0.75;
    const words = `${pairRate(edge)}/s${edge.number > 1 ? ` · ${edge.number}` : ""}`;
    const title = `${edge.number} from ${from.name} to ${to.name}: ${pairRate(edge)} messages/s, lag ${count(edge.lag)}, worst ${edge.worst}`;
    drawing.append(shape("g", { class: edge.worst, role: "img", "aria-label": title },
      shape("title", {}, title), shape("path", { d: path, "stroke-width": thick.toFixed(1) }), shape("path", { d: head, class: "tip" })));
    lines.push({ words, at, path: Array.from({ length: 61 }, (_, step) => along(points, step / 60)), points, first: back ? 1 : 0 });
  }
  for (const node of nodes) {
    const room = Math.floor((wide - 16) / (narrow ? 6.1 : 6.6));
    const box = shape("g", {}, shape("title", {}, node.name),
      shape("rect", { x: node.x, y: node.y, width: wide, height: high, rx: 7 }),
      shape("text", { x: node.x + 8, y: node.y + 19 }, cut(node.name, room)),
      shape("text", { x: node.x + 8, y: node.y + 36, class: "dim" }, node.number === 1 ? "1 replication" : `${node.number} replications`));
    if (node.several) box.setAttribute("class", node.bad ? "node bad" : "node");
    else {
      const link = shape("a", { href: hash({ filter: node.name.split(/\s/)[0] }), class: node.bad ? "node bad" : "node" }, box);
      link.setAttribute("aria-label", `Show the replications of ${node.name}`);
      drawing.append(link);
      continue;
    }
    drawing.append(box);
  }
  drawing.append(...labels(lines, nodes.map(({ x, y }) => ({ left: x, right: x + wide, top: y, bottom: y + high })), narrow, width, height));
  return drawing;
}
