// The status page: takes a snapshot and changes from `live` and shows them. Texts of others are only ever set as text.
"use strict";

const ROW = 48;
const SPARE = 12;
const LINE = 30;
const MOST_EVENTS = 200;
const MOST_ATTENTION = 5;
const WORST = ["held", "invalid", "retrying", "stopped", "paused", "starting", "running"];
const DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
const SVG = "http://www.w3.org/2000/svg";

const byId = (id) => document.getElementById(id);
const page = { texts: [], rows: new Map(), byName: new Map(), shown: [], events: [], instances: [], site: "", since: "", kept: null, lines: 0 };
const view = { filter: "", sort: "worst", down: true, open: null, range: 0, history: null };
const drawn = new Map();

function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key === "class") made.className = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

function shape(name, attributes, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// ---- words

function count(value) {
  if (value === null || value === undefined) return "?";
  const units = [[1e9, "G"], [1e6, "M"], [1e4, "k"]];
  for (const [size, unit] of units) {
    if (value >= size) return (value / (unit === "k" ? 1e3 : size)).toFixed(1) + unit;
  }
  return value >= 100 || Number.isInteger(value) ? String(Math.round(value)) : value.toFixed(1);
}

function duration(seconds) {
  if (seconds < 60) return `${seconds} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.floor(seconds / 3600)} h`;
  return `${Math.floor(seconds / 86400)} d`;
}

function lagWords(row) {
  if (row.lag === null) return "?";
  return row.lagSeconds ? `${count(row.lag)} · ${duration(row.lagSeconds)}` : count(row.lag);
}

const streams = (row) => (row.fromStream === row.toStream ? row.fromStream : `${row.fromStream} → ${row.toStream}`);
const severity = (state) => { const at = WORST.indexOf(state); return at < 0 ? 0 : at; };

// ---- the wire

function readRow(wire) {
  const [[number, id, state, kind, from, fromStream, to], toStream, leader, todo, error, [rate, lag, lagSeconds], line, lagLine, drift] = wire;
  const text = (index) => (index === null ? null : page.texts[index]);
  const before = page.rows.get(number);
  return {
    number, id, state: text(state), kind: text(kind), from: text(from), fromStream, to: text(to),
    toStream: toStream || fromStream, leader: text(leader), todo: text(todo), error: text(error), drift: text(drift), rate, lag, lagSeconds,
    line: line ? readLine(line) : before ? before.line : [],
    lagLine: lagLine ? readLine(lagLine) : before ? before.lagLine : [], version: before ? before.version + 1 : 0,
  };
}

function readLine(text) {
  const [most, digits] = text.split("|");
  return [...digits].map((digit) => (digit === "-" ? null : (DIGITS.indexOf(digit) / 63) * Number(most)));
}

function take(message, all) {
  if (all) {
    page.rows.clear();
    page.byName.clear();
    page.texts = [];
    page.events = [];
    drawn.forEach((line) => line.tr.remove());
    drawn.clear();
    page.site = message.site;
    setText(byId("site"), message.site);
    document.title = `${message.site} · stream-replicator`;
    byId("link").title = `from instance ${message.instance}`;
    page.since = message.since;
    page.kept = message.kept;
  }
  page.texts.length = message.first;
  page.texts.push(...message.texts);
  const news = [];
  for (const wire of message.rows) {
    const row = readRow(wire);
    const before = page.rows.get(row.number);
    if (!all && (!before || before.state !== row.state)) {
      news.push(before ? `${row.id} is ${row.state}` : `${row.id} is new, ${row.state}`);
      row.news = true;
    }
    page.rows.set(row.number, row);
    page.byName.set(row.id, row);
  }
  for (const [number, rate, lag, lagSeconds] of message.numbers) {
    const row = page.rows.get(number);
    if (row) Object.assign(row, { rate, lag, lagSeconds, version: row.version + 1 });
  }
  for (const number of message.gone) {
    const row = page.rows.get(number);
    page.rows.delete(number);
    if (row && page.byName.get(row.id) === row) page.byName.delete(row.id);
    if (row) news.push(`${row.id} was removed`);
  }
  if (message.instances) page.instances = message.instances;
  page.events.push(...message.events);
  page.events.splice(0, page.events.length - MOST_EVENTS);

  announce(news);
  arrange(all || message.rows.length + message.gone.length > 0);
  showStates();
  showAttention();
  showTopology();
  if (all || message.events.length) showEvents(message.events, all);
  if (all || message.instances) showInstances();
  showDetail();
}

function announce(news) {
  if (!news.length) return;
  const more = news.length > 3 ? ` and ${news.length - 3} more` : "";
  byId("announce").textContent = news.slice(0, 3).join(", ") + more;
}

function connect() {
  const source = new EventSource("live");
  const state = (text, name) => { setText(byId("link"), text); byId("link").className = `link ${name}`; };
  let heard = Date.now();
  const on = (name, act) => source.addEventListener(name, (event) => {
    heard = Date.now();
    state("live", "live");
    act(JSON.parse(event.data));
  });
  on("snapshot", (message) => take(message, true));
  on("delta", (message) => take(message, false));
  on("quiet", () => {});
  const again = (after) => {
    clearInterval(watch);
    source.close();
    state("connection lost, trying again", "lost");
    setTimeout(connect, after);
  };
  const watch = setInterval(() => { if (Date.now() - heard > 35000) again(0); }, 5000);
  source.onerror = () => again(3000);
}

// ---- the table

function arrange(renewed) {
  const words = view.filter.toLowerCase().split(/\s+/).filter(Boolean);
  const fits = (row) => {
    if (!words.length) return true;
    const text = [row.id, row.state, row.kind, row.fromStream, row.toStream, row.from, row.to, row.leader || ""].join("\n").toLowerCase();
    return words.every((word) => {
      if (word === "has:drift") return Boolean(row.drift);
      return word.startsWith("state:") ? row.state === word.slice(6) : text.includes(word);
    });
  };
  const inside = byId("rows").contains(document.activeElement);
  if (renewed || !inside) {
    const by = {
      worst: (a, b) => severity(a.state) - severity(b.state) || (b.lag ?? -1) - (a.lag ?? -1),
      id: () => 0,
      state: (a, b) => severity(a.state) - severity(b.state),
      rate: (a, b) => (a.rate ?? -1) - (b.rate ?? -1),
      lag: (a, b) => (a.lag ?? -1) - (b.lag ?? -1),
      leader: (a, b) => (a.leader || "").localeCompare(b.leader || ""),
    }[view.sort];
    const turn = view.down || view.sort === "worst" ? 1 : -1;
    const names = (a, b) => (a.id < b.id ? -1 : a.id > b.id ? 1 : 0);
    page.shown = [...page.rows.values()].filter(fits);
    page.shown.sort((a, b) => turn * by(a, b) || (view.sort === "id" ? turn : 1) * names(a, b));
  } else {
    page.shown = page.shown.map((row) => page.rows.get(row.number)).filter(Boolean);
  }
  const all = page.rows.size;
  setText(byId("count"), page.shown.length === all ? String(all) : `${page.shown.length} of ${all}`);
  byId("table").setAttribute("aria-rowcount", String(page.shown.length + 1));
  byId("empty").hidden = page.shown.length > 0;
  setText(byId("empty"), all ? "No replication fits the filter." : "There are no replications.");
  for (const head of document.querySelectorAll("#table th")) {
    const button = head.querySelector("button");
    const sorted = button && button.dataset.sort === view.sort;
    if (sorted) head.setAttribute("aria-sort", view.down ? "ascending" : "descending");
    else head.removeAttribute("aria-sort");
  }
  draw();
}

function draw() {
  const body = byId("rows");
  const top = byId("above").getBoundingClientRect().top;
  const from = Math.max(0, Math.floor(-top / ROW) - SPARE);
  const to = Math.min(page.shown.length, Math.ceil((innerHeight - top) / ROW) + SPARE);
  const start = Math.min(from, page.shown.length), end = Math.max(start, to);
  const wanted = new Set();
  for (let at = start; at < end; at += 1) wanted.add(page.shown[at].number);
  for (const [number, line] of drawn) {
    if (!wanted.has(number)) {
      line.tr.remove();
      drawn.delete(number);
    }
  }
  let next = body.firstChild;
  for (let at = start; at < end; at += 1) {
    const row = page.shown[at];
    let line = drawn.get(row.number);
    if (!line) {
      line = newLine();
      drawn.set(row.number, line);
    }
    fill(line, row, at);
    if (line.tr === next) next = next.nextSibling;
    else body.insertBefore(line.tr, next);
  }
  byId("above").style.height = `${start * ROW}px`;
  byId("below").style.height = `${(page.shown.length - end) * ROW}px`;
}

function newLine() {
  const link = element("a", {});
  const second = element("span", { class: "two dim" });
  const state = element("span", {}), stateText = element("span", {});
  state.append(stateText);
  const from = element("span", { class: "two" }), to = element("span", { class: "two" });
  const plot = () => {
    const area = shape("path", { class: "area" }), curve = shape("path", { class: "curve" });
    return { area, curve, svg: shape("svg", { viewBox: `0 0 ${LINE - 1} 20`, preserveAspectRatio: "none", "aria-hidden": "true" }, area, curve) };
  };
  const ratePlot = plot(), lagPlot = plot();
  const rate = element("td", { class: "n" }), leader = element("td", {});
  const lag = element("span", {}), age = element("span", { class: "age" });
  const tr = element("tr", {},
    element("th", { scope: "row" }, element("span", { class: "two" }, link), second), element("td", {}, state),
    element("td", {}, from, to), element("td", { class: "plot" }, ratePlot.svg), rate,
    element("td", { class: "plot" }, lagPlot.svg), element("td", { class: "n" }, lag, age), leader);
  return { tr, link, second, state, stateText, from, to, ratePlot, lagPlot, rate, lag, age, leader, version: -1, at: -1, lines: -1, open: null };
}

function fill(line, row, at) {
  if (line.at !== at) {
    line.at = at;
    line.tr.setAttribute("aria-rowindex", String(at + 2));
  }
  const open = view.open === row.id;
  if (line.open !== open) {
    line.open = open;
    line.tr.classList.toggle("open", open);
    if (open) line.link.setAttribute("aria-current", "true"); else line.link.removeAttribute("aria-current");
  }
  if (line.version !== row.version || line.row !== row) {
    line.version = row.version;
    if (line.row !== row) {
      line.row = row;
      line.tr.title = row.error || "";
      setText(line.link, row.id);
      line.link.href = `#/replication/${encodeURIComponent(row.id)}`;
      setText(line.second, row.todo ? `do: ${row.todo}` : row.drift ? `drift: ${row.drift}` : `${row.kind}, ${streams(row)}`);
      line.second.className = row.drift && !row.todo ? "two drift" : "two dim";
      line.state.className = `s ${row.state}`;
      setText(line.stateText, row.state);
      setText(line.from, row.from || "?");
      setText(line.to, row.to ? `→ ${row.to}` : "");
      setText(line.leader, row.leader || "none");
      line.leader.title = row.leader || "";
      line.lines = -1;
    }
    setText(line.rate, count(row.rate));
    setText(line.lag, count(row.lag));
    setText(line.age, row.lagSeconds ? ` · ${duration(row.lagSeconds)}` : "");
  }
  line.tr.classList.toggle("news", Boolean(row.news));
  row.news = false;
  if (line.lines !== page.lines) {
    line.lines = page.lines;
    for (const [plot, values] of [[line.ratePlot, row.line], [line.lagPlot, row.lagLine]]) {
      plotLine(plot.curve, plot.area, values, LINE, Math.max(1, ...values.map((value) => value ?? 0)), 20);
    }
  }
}

/** Draws values from the right edge on; what is not known is a gap. */
function plotLine(curve, area, values, length, most, height) {
  let path = "", fillPath = "", run = [];
  const flush = () => {
    if (run.length) {
      path += `M${run.join("L")}`;
      const [first] = run[0].split(" "), [last] = run[run.length - 1].split(" ");
      if (run.length === 1) path += `l.4 0`;
      fillPath += `M${first} ${height}L${run.join("L")}L${last} ${height}z`;
    }
    run = [];
  };
  values.forEach((value, at) => {
    if (value === null) return flush();
    const x = length - values.length + at, y = height - 1 - (value / most) * (height - 2);
    run.push(`${x} ${y.toFixed(2)}`);
  });
  flush();
  curve.setAttribute("d", path);
  area.setAttribute("d", fillPath);
}

function lengthenLines() {
  for (const row of page.rows.values()) {
    for (const [values, value] of [[row.line, row.rate], [row.lagLine, row.lag]]) {
      values.push(value);
      if (values.length > LINE) values.shift();
    }
  }
  page.lines += 1;
  draw();
}

// ---- above the table

function showStates() {
  const counts = new Map(WORST.map((state) => [state, 0]));
  for (const row of page.rows.values()) counts.set(row.state, (counts.get(row.state) || 0) + 1);
  const box = byId("states");
  const known = new Map([...box.querySelectorAll("[data-state]")].map((button) => [button.dataset.state, button]));
  for (const [state, number] of counts) {
    let button = known.get(state);
    if (!button) {
      button = element("button", { type: "button", "data-state": state }, element("b", {}), element("span", { class: `s ${state}` }, element("span", {}, state)));
      button.addEventListener("click", () => go({ filter: view.filter === `state:${state}` ? "" : `state:${state}` }));
      box.insertBefore(button, byId("drifted"));
    }
    button.hidden = number === 0;
    setText(button.firstChild, String(number));
    button.setAttribute("aria-pressed", String(view.filter === `state:${state}`));
  }
  const drifted = [...page.rows.values()].filter((row) => row.drift).length;
  const button = byId("drifted");
  button.hidden = drifted === 0;
  setText(button.firstChild, String(drifted));
  button.setAttribute("aria-pressed", String(view.filter === "has:drift"));
}

function showAttention() {
  const rows = [...page.rows.values()].filter((row) => row.todo);
  rows.sort((a, b) => severity(a.state) - severity(b.state) || (a.id < b.id ? -1 : 1));
  const key = rows.slice(0, MOST_ATTENTION).map((row) => [row.id, row.state, row.todo, row.error].join("\u0000")).join("\u0001") + rows.length;
  const box = byId("attention");
  if (box.dataset.key === key) return;
  box.dataset.key = key;
  box.hidden = rows.length === 0;
  const items = rows.slice(0, MOST_ATTENTION).map((row) => {
    const link = element("a", { href: `#/replication/${encodeURIComponent(row.id)}` }, row.id);
    const state = element("span", { class: `s ${row.state}` }, element("span", {}, row.state));
    const item = element("li", {}, link, state, `do: ${row.todo}`);
    if (row.error) item.append(element("span", { class: "why" }, row.error));
    return item;
  });
  if (rows.length > MOST_ATTENTION) items.push(element("li", {}, `and ${rows.length - MOST_ATTENTION} more: worst first in the table`));
  byId("attention-list").replaceChildren(...items);
}

function pairs() {
  const all = new Map();
  for (const row of page.rows.values()) {
    if (!row.from || !row.to) continue;
    const key = `${row.from}\u0000${row.to}`;
    let pair = all.get(key);
    if (!pair) all.set(key, pair = { from: row.from, to: row.to, number: 0, rate: 0, unknown: 0, lag: 0, worst: "running" });
    pair.number += 1;
    if (row.rate === null) pair.unknown += 1; else pair.rate += row.rate;
    pair.lag += row.lag || 0;
    if (severity(row.state) < severity(pair.worst)) pair.worst = row.state;
  }
  return [...all.values()];
}

const pairRate = (pair) => (pair.unknown === pair.number ? "?" : count(pair.rate));

function showTopology() {
  const all = pairs();
  const narrow = byId("topology").clientWidth < 640;
  const key = JSON.stringify([narrow, byId("topology").clientWidth, all]);
  const box = byId("topology");
  if (box.dataset.key === key) return;
  box.dataset.key = key;
  const rows = all.map((pair) => element("tr", {},
    element("td", { class: "name" }, pair.from), element("td", { class: "name" }, pair.to),
    element("td", { class: "n" }, String(pair.number)), element("td", { class: "n" }, pairRate(pair)),
    element("td", { class: "n" }, count(pair.lag)), element("td", {}, element("span", { class: `s ${pair.worst}` }, element("span", {}, pair.worst)))));
  byId("pairs").tBodies[0].replaceChildren(...rows);
  byId("pairs-box").hidden = all.length === 0;
  if (!all.length) {
    box.replaceChildren(element("p", { class: "empty" }, "No replication has two sides yet."));
    return;
  }
  box.replaceChildren(picture(layout(all, narrow ? 3 : 8), narrow, box.clientWidth));
}

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

function picture({ nodes, edges, columns, longest }, narrow, width) {
  // Sideways on a wide screen, downwards on a narrow one.
  const high = 46;
  const wide = narrow
    ? Math.min(200, Math.floor((width - 10 - 10 * (longest - 1)) / longest))
    : Math.min(230, Math.max(120, Math.floor((width - 20) / columns - 70)));
  const sizes = [];
  for (const node of nodes) sizes[node.column] = Math.max(sizes[node.column] || 0, node.row + 1);
  const height = narrow ? columns * (high + 70) - 70 + 20 : longest * (high + 18) + 22;
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
  const labels = [];
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
    const points = [[x1, y1], [x1 + lx, y1 + ly], [x2 - lx, y2 - turn * ly], [x2, y2]];
    const path = `M${points[0]}C${points.slice(1).join(" ")}`;
    const head = from === to ? `M${x2 - 5} ${y2}L${x2} ${y2 - 7}L${x2 + 5} ${y2}z`
      : `M${x2 + tip[0]} ${y2 + tip[1]}L${x2 + tip[2]} ${y2 + tip[3]}L${x2 + tip[4]} ${y2 + tip[5]}z`;
    // The label is near the end that fewer lines share.
    const at = back ? 0.5 : degree(to) >= degree(from) ? 0.25 : 0.75;
    const weights = [(1 - at) ** 3, 3 * at * (1 - at) ** 2, 3 * at * at * (1 - at), at ** 3];
    const along = (axis) => points.reduce((sum, point, index) => sum + weights[index] * point[axis], 0);
    const middle = [along(0), along(1) + (back && !narrow ? 15 : narrow ? 4 : -6)];
    const words = `${pairRate(edge)}/s${edge.number > 1 ? ` · ${edge.number}` : ""}`;
    const title = `${edge.number} from ${from.name} to ${to.name}: ${pairRate(edge)} messages/s, lag ${count(edge.lag)}, worst ${edge.worst}`;
    drawing.append(shape("g", { class: edge.worst, role: "img", "aria-label": title },
      shape("title", {}, title), shape("path", { d: path, "stroke-width": thick.toFixed(1) }), shape("path", { d: head, class: "tip" })));
    labels.push(shape("text", { x: middle[0], y: middle[1], class: "label" }, words));
  }
  for (const node of nodes) {
    const room = Math.floor((wide - 16) / (narrow ? 6 : 6.6));
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
  drawing.append(...labels);
  return drawing;
}

// ---- below the table

function showEvents(added, all) {
  const list = byId("events");
  const item = (event) => {
    const known = page.byName.has(event.replication);
    const subject = known
      ? element("a", { href: `#/replication/${encodeURIComponent(event.replication)}` }, event.replication)
      : element("span", {}, event.replication);
    const when = new Date(event.time);
    const time = element("time", { title: event.time }, Number.isNaN(when.getTime()) ? event.time : shortTime(when));
    return element("li", {}, time, element("b", {}, event.kind), subject, element("span", {}, event.text));
  };
  if (all) list.replaceChildren(...page.events.map(item).reverse());
  else list.prepend(...added.map(item).reverse());
  while (list.children.length > MOST_EVENTS) list.lastChild.remove();
  byId("no-events").hidden = list.children.length > 0;
  const since = new Date(page.since);
  setText(byId("events-from"), page.kept
    ? `The last ${MOST_EVENTS}; those before this process started are from stream ${page.kept}.`
    : `Since ${shortTime(since)}, when this process started: earlier ones are not known here.`);
}

/** The time of day, with the date where it is another day. */
function shortTime(when) {
  const time = when.toLocaleTimeString([], { hour12: false });
  const date = when.toLocaleDateString([], { month: "short", day: "numeric" });
  return when.toDateString() === new Date().toDateString() ? time : `${date} ${time}`;
}

function showInstances() {
  const rows = page.instances.map((one) => element("tr", {},
    element("td", { class: "name" }, one.instance), element("td", { class: "name" }, one.host), element("td", {}, one.version),
    element("td", {}, new Date(one.started).toLocaleString()), element("td", { class: "n" }, String(one.leads)),
    element("td", {}, one.silent ? `${duration(one.silent)} ago` : "now")));
  byId("instances").tBodies[0].replaceChildren(...rows);
}

// ---- one replication

function showDetail() {
  const box = byId("detail");
  if (view.open === null) {
    box.hidden = true;
    return;
  }
  const row = page.byName.get(view.open);
  box.hidden = false;
  setText(byId("detail-title"), view.open);
  const say = (id, text) => { byId(id).hidden = !text; setText(byId(id), text || ""); };
  if (!row) {
    setText(byId("detail-route"), page.rows.size ? "There is no such replication." : "");
    say("detail-todo", "");
    say("detail-error", "");
    return;
  }
  const state = element("span", { class: `s ${row.state}` }, element("span", {}, row.state));
  byId("detail-route").replaceChildren(state, ` ${row.kind} of ${row.fromStream} at ${row.from || "?"} to ${row.toStream} at ${row.to || "?"}`);
  say("detail-todo", row.todo && `do: ${row.todo}`);
  const full = view.history && view.history.row.last_error;
  say("detail-error", row.error && (full && full.current ? full.message : row.error));
  setText(byId("now-rate"), count(row.rate));
  setText(byId("now-lag"), lagWords(row));
}

async function loadDetail() {
  const id = view.open;
  if (id === null) return;
  try {
    const answer = await fetch(`replication/${encodeURIComponent(id)}`);
    const history = answer.ok ? await answer.json() : null;
    if (view.open !== id) return;
    view.history = history;
  } catch {
    return;
  }
  showDetail();
  showCharts();
  showFacts();
  showDrift();
}

function showCharts() {
  const series = view.history && view.history.history[view.range];
  for (const name of ["rate", "lag"]) {
    const box = byId(`chart-${name}`);
    const values = series ? series[name] : [];
    const known = values.filter((value) => value !== null);
    if (!known.length) {
      box.replaceChildren(element("p", { class: "empty" }, "Nothing is known of this time yet."));
      continue;
    }
    const length = Math.max(2, view.range === 2 ? 48 : 60), most = Math.max(...known, 1);
    const area = shape("path", { class: "area" }), curve = shape("path", { class: "curve" });
    const words = `at most ${count(Math.max(...known))}, last ${count(known[known.length - 1])}`;
    const plot = shape("svg", { viewBox: `0 0 ${length - 1} 100`, preserveAspectRatio: "none", role: "img", "aria-label": words },
      shape("line", { x1: 0, x2: length, y1: 1, y2: 1 }), shape("line", { x1: 0, x2: length, y1: 99, y2: 99 }), area, curve);
    plotLine(curve, area, values, length, most, 100);
    const span = ["10 min", "1 h", "8 h"][view.range];
    box.replaceChildren(element("div", { class: "axis" }, element("span", {}, count(most))), plot,
      element("div", { class: "axis" }, element("span", {}, `${span} ago`), element("span", {}, "now")));
  }
}

function showFacts() {
  const facts = [];
  const add = (name, value) => { if (value !== null && value !== undefined && value !== "") facts.push(element("div", {}, element("dt", {}, name), element("dd", {}, String(value)))); };
  const row = view.history && view.history.row;
  if (row) {
    add("Leader", row.leader || "none");
    add("Source server", row.source.server);
    add("Target server", row.target.server);
    add("Source position", row.position.source_seq);
    add("Source last sequence", row.source.last_seq);
    add("Target last sequence", row.target.last_seq);
    add("In flight", `${row.in_flight.messages} messages, ${row.in_flight.bytes} bytes`);
    add("Copied by this leader", row.counters.copied);
    add("Transport", row.transport);
    add("Target mode", row.target_mode);
    add("Document", `${row.origin}, revision ${row.config_revision}`);
    if (row.headroom) add("Source keeps messages for", duration(Math.floor(row.headroom.seconds)));
    if (row.last_error && !row.last_error.current) add("Last error, over", `${row.last_error.at}: ${row.last_error.message}`);
  }
  byId("facts").replaceChildren(...facts);
}

function showDrift() {
  const drift = view.history && view.history.drift;
  const box = byId("drift");
  const key = JSON.stringify([view.open, Boolean(view.history), drift]);
  if (box.dataset.key === key) return;
  box.dataset.key = key;
  let words = "";
  if (view.history && !drift) words = "The configurations of both streams were not compared yet.";
  else if (drift) {
    const at = ` at ${shortTime(new Date(drift.at))}`;
    const more = drift.count > drift.settings.length ? `, the first ${drift.settings.length} are` : "";
    if (drift.count === null) words = `Not compared${at}: ${drift.error}`;
    else if (!drift.count) words = `None${at}: the target is as it would be created now.`;
    else words = `${drift.count === 1 ? "1 setting differs" : `${drift.count} settings differ`}${at}${more}${drift.not_fixed ? `; not changed by drift --fix: ${drift.not_fixed}` : ""}`;
  }
  setText(byId("drift-words"), words);
  const settings = drift ? drift.settings : [];
  byId("drift-table").hidden = settings.length === 0;
  const rows = settings.map((one) => element("tr", {},
    element("th", { scope: "row" }, one.field), element("td", {}, one.source), element("td", {}, one.target), element("td", {}, one.wanted),
    element("td", {}, element("span", { class: one.class === "unsafe" ? "s held" : "s retrying" }, element("span", {}, one.class))),
    element("td", {}, one.reason)));
  byId("drift-table").tBodies[0].replaceChildren(...rows);
}

// ---- addresses and keys

/** `#/replication/ID` or `#filter=...&sort=...&down=0`. */
function hash(changes) {
  const now = { filter: view.filter, sort: view.sort, down: view.down, ...changes };
  const words = new URLSearchParams();
  if (now.filter) words.set("filter", now.filter);
  if (now.sort !== "worst") words.set("sort", now.sort);
  if (!now.down) words.set("down", "0");
  return `#${words}`;
}

function go(changes) {
  location.hash = hash(changes);
}

function follow() {
  const one = /^#\/replication\/(.+)$/.exec(location.hash);
  if (one) {
    let id = one[1];
    try { id = decodeURIComponent(id); } catch { /* as it is */ }
    const changed = view.open !== id;
    view.open = id;
    if (changed) {
      view.history = null;
      showDetail();
      showCharts();
      showFacts();
      showDrift();
      loadDetail();
      byId("detail-title").focus({ preventScroll: true });
      byId("detail").scrollIntoView({ block: "start" });
    }
  } else {
    const words = new URLSearchParams(location.hash.replace(/^#/, ""));
    view.open = null;
    view.filter = words.get("filter") || "";
    view.sort = words.get("sort") || "worst";
    if (![...byId("sort").options].some((option) => option.value === view.sort)) view.sort = "worst";
    view.down = words.get("down") !== "0";
    if (document.activeElement !== byId("filter")) byId("filter").value = view.filter;
    byId("sort").value = view.sort;
    showDetail();
  }
  showStates();
  arrange(true);
}

function start() {
  byId("filter").addEventListener("input", (event) => {
    history.replaceState(null, "", hash({ filter: event.target.value.trim() }));
    follow();
  });
  byId("tools").addEventListener("submit", (event) => event.preventDefault());
  byId("sort").addEventListener("change", (event) => go({ sort: event.target.value, down: !["rate", "lag"].includes(event.target.value) }));
  for (const button of document.querySelectorAll("#table th button")) {
    button.addEventListener("click", () => {
      const sort = button.dataset.sort;
      go({ sort, down: view.sort === sort ? !view.down : !["rate", "lag"].includes(sort) });
    });
  }
  for (const button of document.querySelectorAll("[data-range]")) {
    button.addEventListener("click", () => {
      view.range = Number(button.dataset.range);
      for (const other of document.querySelectorAll("[data-range]")) other.setAttribute("aria-pressed", String(other === button));
      showCharts();
    });
  }
  const close = () => {
    const id = view.open;
    go({});
    const line = [...drawn.values()].find((one) => one.row && one.row.id === id);
    if (line) line.link.focus();
  };
  byId("drifted").addEventListener("click", () => go({ filter: view.filter === "has:drift" ? "" : "has:drift" }));
  byId("close").addEventListener("click", close);
  byId("skip").addEventListener("click", (event) => {
    event.preventDefault();
    byId("replications").focus();
    byId("replications").scrollIntoView();
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = ["INPUT", "SELECT"].includes(event.target.tagName);
    if (event.key === "/" && !typing) {
      event.preventDefault();
      byId("filter").focus();
    } else if (event.key === "Escape" && view.open !== null) {
      close();
    } else if (["ArrowDown", "ArrowUp"].includes(event.key) && byId("rows").contains(event.target)) {
      const tr = event.target.closest("tr");
      const next = event.key === "ArrowDown" ? tr.nextElementSibling : tr.previousElementSibling;
      if (!next) return;
      event.preventDefault();
      next.querySelector("a").focus({ preventScroll: true });
      next.scrollIntoView({ block: "nearest" });
    }
  });
  let waits = false;
  const later = () => {
    if (waits) return;
    waits = true;
    requestAnimationFrame(() => { waits = false; draw(); });
  };
  addEventListener("scroll", later, { passive: true });
  addEventListener("resize", () => { later(); showTopology(); });
  addEventListener("hashchange", follow);
  setInterval(lengthenLines, 10000);
  setInterval(loadDetail, 5000);
  follow();
  connect();
}

start();
