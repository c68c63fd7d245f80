"use strict";
// One question, two searches side by side. All text from the server is set as text, never as markup.

const byId = (id) => document.getElementById(id);
const columns = ["left", "right"].map((id) => {
  const root = byId(id);
  root.append(byId("column").content.cloneNode(true));
  const part = (name) => root.querySelector("." + name);
  return { root, index: part("index"), mode: part("mode"), thought: part("thought"), cost: part("cost"), hits: part("hits") };
});
columns[1].mode.value = "reason";
let running = null; // AbortController of the present question
let asked = null; // what the map shows

function headers() {
  const key = sessionStorage.getItem("key");
  return { "Content-Type": "application/json", ...(key ? { Authorization: "Bearer " + key } : {}) };
}

async function post(path, body, signal) {
  const response = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
  if (!response.ok) await refuse(response);
  return response;
}

async function refuse(response) {
  if (response.status === 401) byId("key-line").hidden = false;
  const body = await response.json().catch(() => null);
  throw new Error(body?.error?.message ?? "the server answered " + response.status);
}

function say(problem) {
  byId("problem").hidden = !problem;
  byId("problem").textContent = problem ?? "";
}

async function loadIndexes() {
  const response = await fetch("/indexes", { headers: headers() });
  if (!response.ok) await refuse(response);
  const indexes = await response.json();
  for (const column of columns) {
    column.index.replaceChildren(
      ...indexes.map(({ name, documents }) => new Option(`${name} (${documents.toLocaleString()})`, name)),
    );
  }
  byId("key-line").hidden = true;
}

function request(column, query) {
  const mode = column.mode.value;
  return {
    query,
    index: column.index.value,
    k: 10,
    reason: mode === "reason",
    hybrid: mode === "hybrid",
    ...(mode === "fused" ? { fuse: 0.5 } : {}),
  };
}

// The events of a stream: [name, data].
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += value;
    let end;
    while ((end = rest.indexOf("\n\n")) >= 0) {
      const lines = rest.slice(0, end).split("\n");
      rest = rest.slice(end + 2);
      const field = (name) => lines.filter((l) => l.startsWith(name + ": ")).map((l) => l.slice(name.length + 2)).join("\n");
      if (field("event")) yield [field("event"), JSON.parse(field("data"))];
    }
  }
}

async function search(column, query, signal) {
  const thinks = ["reason", "fused"].includes(column.mode.value);
  column.thought.textContent = "";
  column.thought.hidden = !thinks;
  column.cost.textContent = thinks ? "thinking…" : "searching…";
  column.hits.replaceChildren();
  for await (const [name, data] of events(await post("/search/stream", request(column, query), signal))) {
    if (name === "reasoning") column.thought.textContent += data.text;
    else if (name === "error") throw new Error(data.error.message);
    else if (name === "hits") return data;
  }
  throw new Error("the server ended the answer early");
}

function show(column, found, other) {
  if (found.reasoning) column.thought.textContent = found.reasoning.text || "(nothing)";
  column.cost.textContent = `${found.milliseconds.toLocaleString()} ms, ${found.tokens.toLocaleString()} tokens`;
  column.hits.replaceChildren(...found.hits.map((hit) => card(hit, other)));
  if (!found.hits.length) column.cost.textContent += "; no hits";
}

function element(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

function card(hit, other) {
  const item = element("li");
  const head = element("h2");
  head.append(element("span", "rank", hit.rank + "."), ` ${hit.title || hit.id} `, element("span", "score", hit.score.toFixed(3)), " ");
  if (other) {
    const before = other.hits.find((h) => h.id === hit.id)?.rank;
    const step = before - hit.rank;
    if (before === undefined) head.append(element("span", "moved new", "new"));
    else if (step > 0) head.append(element("span", "moved up", `▲ up ${step}`));
    else if (step < 0) head.append(element("span", "moved down", `▼ down ${-step}`));
  }
  const text = element("p");
  // Ranges count code points, as the server does; JavaScript's strings count UTF-16 units.
  const letters = Array.from(hit.snippet);
  let place = 0;
  for (const [start, end] of hit.highlights) {
    text.append(letters.slice(place, start).join(""), element("mark", "", letters.slice(start, end).join("")));
    place = end;
  }
  text.append(letters.slice(place).join(""));
  item.append(head, text);
  return item;
}

async function ask(event) {
  event?.preventDefault();
  const query = byId("query").value.trim();
  if (!query) return;
  if (byId("key").value) sessionStorage.setItem("key", byId("key").value);
  running?.abort();
  const mine = (running = new AbortController());
  byId("stop").hidden = false;
  say(null);
  try {
    if (!columns[0].index.options.length) await loadIndexes();
    const [left, right] = columns;
    const first = search(left, query, mine.signal).then((found) => (show(left, found, null), found));
    const second = search(right, query, mine.signal);
    const [one, two] = await Promise.all([first, second]);
    show(right, two, one);
    asked = { query, index: right.index.value, reason: ["reason", "fused"].includes(right.mode.value) };
    if (byId("map").open) await draw();
  } catch (error) {
    if (running !== mine) return;
    const stopped = error.name === "AbortError";
    if (!stopped) mine.abort();
    for (const { cost } of columns) if (cost.textContent.endsWith("…")) cost.textContent = stopped ? "stopped" : "";
    if (!stopped) say(error.message);
  } finally {
    if (running === mine) {
      running = null;
      byId("stop").hidden = true;
    }
  }
}

async function draw() {
  const mine = asked;
  if (!mine) return;
  const found = await (await post("/map", mine)).json();
  if (asked !== mine) return; // a newer question has been asked
  const plot = byId("plot");
  const spots = [...found.points.map(({ x, y }) => [x, y]), found.direct, ...(found.reasoned ? [found.reasoned] : [])];
  const scale = (axis, size) => {
    const values = spots.map((spot) => spot[axis]);
    const low = Math.min(...values), high = Math.max(...values);
    return (value) => 20 + ((value - low) / (high - low || 1)) * (size - 40);
  };
  const across = scale(0, 640), up = scale(1, 400);
  const place = ([x, y]) => [across(x), 400 - up(y)];
  const shape = (tag, values, title) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(values)) made.setAttribute(name, value);
    if (title) made.append(Object.assign(document.createElementNS("http://www.w3.org/2000/svg", "title"), { textContent: title }));
    return made;
  };
  const dot = (spot, r, name, title) => {
    const [cx, cy] = place(spot);
    return shape("circle", { cx, cy, r, class: name }, title);
  };
  const label = (spot, words, below) => {
    const [x, y] = place(spot);
    const made = shape("text", { x: Math.min(x + 8, 540), y: below ? Math.min(y + 18, 394) : Math.max(y - 6, 14) });
    made.textContent = words;
    return made;
  };
  const drawn = found.points.map((point) => dot([point.x, point.y], 3, "", point.title || point.id));
  if (found.reasoned) {
    const [x1, y1] = place(found.direct), [x2, y2] = place(found.reasoned);
    drawn.push(shape("line", { x1, y1, x2, y2, class: "path" }), dot(found.reasoned, 6, "reasoned"), label(found.reasoned, "after reasoning", true));
  }
  drawn.push(dot(found.direct, 6, "asked"), label(found.direct, "direct", false));
  plot.replaceChildren(plot.querySelector("title"), ...drawn);
  plot.removeAttribute("hidden"); // SVG elements have no property of that name
  byId("map-note").textContent =
    `${found.points.length.toLocaleString()} passages; the plane shows ${Math.round(100 * found.explained)} % of how they differ.`;
}

byId("ask").addEventListener("submit", ask);
byId("stop").addEventListener("click", () => running?.abort());
byId("map").addEventListener("toggle", () => byId("map").open && draw().catch((error) => say(error.message)));
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = ["INPUT", "SELECT", "TEXTAREA"].includes(document.activeElement?.tagName);
  if (event.key === "/" && !typing) {
    event.preventDefault();
    byId("query").focus();
  } else if (event.key === "Escape" && running) {
    event.preventDefault(); // it would also clear the question
    running.abort();
  }
});
loadIndexes().catch((error) => say(error.message));
byId("query").focus();
