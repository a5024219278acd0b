// The status page: takes a snapshot and changes from `live` and shows them. Texts of others are only ever set as text.
"use strict";

const ROW = 48;
const SPARE = 12;
const LINE = 30;
/** Milliseconds without scrolling after which more is done. */
const REST = 150;
/** Milliseconds of a frame for what arrived. */
const SLICE = 4;
/** Rows whose lines are lengthened in one frame. */
const PLOTS = 8;
const MOST_EVENTS = 200;
const MOST_ATTENTION = 5;
const WORST = ["held", "invalid", "retrying", "stopped", "paused", "starting", "running"];
const DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
const SVG = "http://www.w3.org/2000/svg";

const byId = (id) => document.getElementById(id);
const page = { texts: [], rows: new Map(), byName: new Map(), shown: [], events: [], instances: [], site: "", since: "", kept: null, lines: 0, order: null, renewed: false, scrolled: 0, steps: new Set(), lastEvent: 0, sees: false, plots: 0 };
const view = { filter: "", sort: "worst", down: true, open: null, range: 0, history: null };
/** Lines of the table by the ids of their rows. */
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
    page.lastEvent = 0;
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
  if (all || message.rows.length + message.gone.length > 0) page.renewed = true;
  const steps = [arrangeNews, showStates, showAttention, showTopology, showDetail];
  if (all || message.events.length) steps.push(showEvents);
  if (all || message.instances) steps.push(showInstances);
  soon(...steps);
}

/** Has these done in the next frames, each of which keeps most of its time for scrolling; what waits already is done once. */
function soon(...steps) {
  if (!page.steps.size) requestAnimationFrame(someSteps);
  for (const step of steps) page.steps.add(step);
}

function someSteps() {
  const end = performance.now() + SLICE;
  try {
    for (const step of page.steps) {
      page.steps.delete(step);
      step();
      if (performance.now() > end) break;
    }
  } finally {
    // Also after a step that failed: the others do not wait for it.
    if (page.steps.size) requestAnimationFrame(someSteps);
  }
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

/** Rows do not change places while they are scrolled because of a number: they do after that. */
function arrangeNews() {
  if (!page.renewed && performance.now() - page.scrolled < REST) {
    draw();
    return;
  }
  arrange(page.renewed);
}

function arrange(renewed) {
  page.renewed = false;
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
  page.shown.forEach((row, at) => { row.at = at; });
  byId("rows").style.height = `${page.shown.length * ROW}px`;
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

/** Puts the rows around what is in view in place. Each is laid out and painted alone, and the lines of rows that left are used again. */
function draw() {
  const body = byId("rows");
  const top = body.getBoundingClientRect().top;
  const most = Math.ceil(innerHeight / ROW) + 1 + 2 * SPARE;
  const start = Math.max(0, Math.min(Math.floor(-top / ROW) - SPARE, page.shown.length - most));
  const wanted = page.shown.slice(start, start + most);
  const ids = new Set(wanted.map((row) => row.id));
  const focused = body.contains(document.activeElement) ? document.activeElement.closest("tr") : null;
  const free = [];
  page.plots = PLOTS;
  for (const [id, line] of drawn) {
    if (ids.has(id)) continue;
    const kept = line.tr === focused && page.shown.find((row) => row.id === id);
    if (kept) {
      // The focus stays where it is, in view or not.
      wanted.push(kept);
      continue;
    }
    drawn.delete(id);
    if (line.tr === focused) line.tr.remove();
    else free.push(line);
  }
  for (const row of wanted) {
    let line = drawn.get(row.id);
    if (!line) {
      line = free.pop();
      if (!line) {
        line = newLine();
        body.append(line.tr);
      }
      drawn.set(row.id, line);
      orderLater();
    }
    fill(line, row);
  }
  for (const line of free) line.tr.remove();
  if (page.plots <= 0) soon(draw);
}

/** Brings the lines of the document into the order that is seen, for the Tab key and for screen readers, without moving the focused. */
function order() {
  clearTimeout(page.order);
  page.order = null;
  const lines = [...drawn.values()].sort((a, b) => a.at - b.at);
  if (!lines.length) return;
  const pivot = Math.max(0, lines.findIndex((line) => line.tr.contains(document.activeElement)));
  for (let at = pivot - 1; at >= 0; at -= 1) {
    const next = lines[at + 1].tr;
    if (next.previousSibling !== lines[at].tr) next.before(lines[at].tr);
  }
  for (let at = pivot + 1; at < lines.length; at += 1) {
    const before = lines[at - 1].tr;
    if (before.nextSibling !== lines[at].tr) before.after(lines[at].tr);
  }
}

/** Not while rows are scrolled. */
function orderLater() {
  clearTimeout(page.order);
  page.order = setTimeout(order, REST);
}

/** Moves the focus to a row, and scrolls only where it is not in view as a whole, below the head of the table. */
function focusRow(row) {
  const top = byId("rows").getBoundingClientRect().top + row.at * ROW;
  const head = byId("table").tHead.offsetHeight;
  if (top < head) scrollBy(0, top - head);
  else if (top + ROW > innerHeight) scrollBy(0, top + ROW - innerHeight);
  draw();
  drawn.get(row.id).link.focus({ preventScroll: true });
}

function newLine() {
  const text = () => document.createTextNode("");
  const id = text(), second = text(), state = text(), from = text(), to = text(), rate = text(), lag = text(), age = text(), leader = text();
  const link = element("a", {}, id), under = element("span", { class: "dim" }, second);
  const plot = () => {
    const area = shape("path", { class: "area" }), curve = shape("path", { class: "curve" });
    return { area, curve, svg: shape("svg", { viewBox: `0 0 ${LINE - 1} 20`, preserveAspectRatio: "none", "aria-hidden": "true" }, area, curve) };
  };
  const ratePlot = plot(), lagPlot = plot();
  const cell = (name, ...children) => element("td", { class: name, role: "cell" }, ...children);
  const dot = element("span", {}, element("span", {}, state)), leaderCell = cell("c-leader", leader);
  const tr = element("tr", { role: "row" },
    element("th", { scope: "row", role: "rowheader" }, link, element("br"), under), cell("", dot), cell("c-route", from, element("br"), to),
    cell("c-line", ratePlot.svg), cell("n", rate), cell("c-line", lagPlot.svg), cell("n", lag, element("span", { class: "age" }, age)), leaderCell);
  return { tr, link, id, second, under, dot, state, from, to, ratePlot, lagPlot, rate, lag, age, leader, leaderCell, row: null, version: -1, at: -1, lines: -1, open: null };
}

function put(node, text) {
  if (node.data !== text) node.data = text;
}

function fill(line, row) {
  if (line.at !== row.at) {
    line.at = row.at;
    line.tr.style.transform = `translateY(${row.at * ROW}px)`;
    line.tr.setAttribute("aria-rowindex", String(row.at + 2));
  }
  const open = view.open === row.id, fresh = line.row !== row;
  if (line.open !== open) {
    line.open = open;
    line.tr.classList.toggle("open", open);
    if (open) line.link.setAttribute("aria-current", "true"); else line.link.removeAttribute("aria-current");
  }
  if (line.version !== row.version || line.row !== row) {
    line.version = row.version;
    if (line.row !== row) {
      line.row = row;
      const set = (node, name, value) => { if (node[name] !== value) node[name] = value; };
      set(line.tr, "title", row.error || "");
      put(line.id, row.id);
      line.link.href = `#/replication/${encodeURIComponent(row.id)}`;
      put(line.second, row.todo ? `do: ${row.todo}` : row.drift ? `drift: ${row.drift}` : `${row.kind}, ${streams(row)}`);
      set(line.under, "className", row.drift && !row.todo ? "drift" : "dim");
      set(line.dot, "className", `s ${row.state}`);
      put(line.state, row.state);
      put(line.from, row.from || "?");
      put(line.to, row.to ? `→ ${row.to}` : "");
      put(line.leader, row.leader || "none");
      set(line.leaderCell, "title", row.leader || "");
      line.lines = -1;
    }
    put(line.rate, count(row.rate));
    put(line.lag, count(row.lag));
    put(line.age, row.lagSeconds ? ` · ${duration(row.lagSeconds)}` : "");
  }
  const news = Boolean(row.news);
  if (news || line.news) line.tr.classList.toggle("news", news);
  line.news = news;
  row.news = false;
  if (line.lines !== page.lines && (fresh || page.plots > 0)) {
    page.plots -= 1;
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
  soon(draw);
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
  // It is drawn when it is seen again.
  if (!page.sees) return;
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

// ---- below the table

function showEvents() {
  const list = byId("events");
  const added = page.events.filter((event) => event.number > page.lastEvent), all = page.lastEvent === 0;
  page.lastEvent = page.events.length ? page.events[page.events.length - 1].number : 0;
  const item = (event) => {
    const known = page.byName.has(event.replication);
    const subject = known
      ? element("a", { href: `#/replication/${encodeURIComponent(event.replication)}` }, event.replication)
      : element("span", {}, event.replication);
    const when = new Date(event.time);
    const time = element("time", { title: event.time }, Number.isNaN(when.getTime()) ? event.time : shortTime(when));
    return element("li", {}, time, element("b", {}, event.kind), subject, element("span", {}, event.text));
  };
  if (all) list.replaceChildren(...added.map(item).reverse());
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
    const line = drawn.get(id);
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
    if (page.order) order();
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = ["INPUT", "SELECT"].includes(event.target.tagName);
    if (event.key === "/" && !typing) {
      event.preventDefault();
      byId("filter").focus();
    } else if (event.key === "Escape" && view.open !== null) {
      close();
    } else if (["ArrowDown", "ArrowUp"].includes(event.key) && byId("rows").contains(event.target)) {
      const line = [...drawn.values()].find((one) => one.tr.contains(event.target));
      const row = page.shown[line.at + (event.key === "ArrowDown" ? 1 : -1)];
      if (!row) return;
      event.preventDefault();
      focusRow(row);
    }
  });
  let waits = false;
  const later = () => {
    if (waits) return;
    waits = true;
    requestAnimationFrame(() => { waits = false; draw(); });
  };
  addEventListener("scroll", () => { page.scrolled = performance.now(); later(); }, { passive: true });
  addEventListener("resize", () => { later(); showTopology(); });
  new IntersectionObserver((seen) => { page.sees = seen[seen.length - 1].isIntersecting; soon(showTopology); }).observe(byId("topology").parentElement);
  addEventListener("hashchange", follow);
  setInterval(lengthenLines, 10000);
  setInterval(loadDetail, 5000);
  follow();
  connect();
}

start();
