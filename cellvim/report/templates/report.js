"use strict";
// The content security policy permits styles with its nonce: give it to the style elements that BokehJS creates.
const NONCE = document.querySelector("style").nonce;
const createElement = document.createElement.bind(document);
document.createElement = (tag, options) => {
  const made = createElement(tag, options);
  if (tag === "style") made.nonce = NONCE;
  return made;
};

const DATA = JSON.parse(document.getElementById("data").textContent);
const views = {}; // Bokeh's views of the figures, by the id of their element
const byId = (id) => document.getElementById(id);
const model = (name) => Bokeh.documents[0].get_model_by_name(name);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value);
  }
  made.append(...children); // strings become text nodes, never HTML
  return made;
}

function fillSelect(select, names, initial, show) {
  select.append(...names.map((name, i) => element("option", { value: String(i) }, name)));
  select.value = String(initial);
  select.addEventListener("change", () => show(Number(select.value)));
}

function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e6) return value.toLocaleString("en");
  if (size !== 0 && (size < 0.001 || size >= 1e6)) return value.toExponential(2);
  return value.toLocaleString("en", { maximumSignificantDigits: 4 });
}

function announce(text) {
  byId("live").textContent = text;
}

// --- Theme and tables

function repaint() {
  for (const view of Object.values(views)) view.request_repaint(); // colours are CSS variables
}

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  byId("theme").textContent = `Theme: ${theme || "system"}`;
  repaint();
}

function setUpTheme() {
  const current = () => document.documentElement.dataset.theme || "";
  const next = { "": "light", light: "dark", dark: "" };
  byId("theme").hidden = false;
  byId("theme").addEventListener("click", () => setTheme(next[current()]));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
  let before = "";
  addEventListener("beforeprint", () => { before = current(); setTheme("light"); });
  addEventListener("afterprint", () => setTheme(before));
  setTheme("");
}

function setUpTables() {
  for (const table of document.querySelectorAll("table.sortable")) {
    table.querySelectorAll("thead th").forEach((heading, column) => {
      const button = element("button", { type: "button" }, ...heading.childNodes);
      heading.replaceChildren(button);
      button.addEventListener("click", () => sortTable(table, heading, column));
    });
  }
  for (const box of document.querySelectorAll("input[data-filters]")) {
    box.closest(".bar").hidden = false;
    const rows = [...byId(box.dataset.filters).tBodies[0].rows];
    box.addEventListener("input", () => {
      const wanted = box.value.trim().toLowerCase();
      for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
      announce(`${rows.filter((row) => !row.hidden).length} rows`);
    });
  }
}

function sortTable(table, heading, column) {
  const isNumber = heading.classList.contains("number");
  const before = heading.getAttribute("aria-sort");
  const down = before ? before === "ascending" : isNumber; // numbers: largest first
  for (const other of table.querySelectorAll("thead th")) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
  const compare = (a, b) => {
    if (!isNumber) return (down ? -1 : 1) * a.localeCompare(b, undefined, { numeric: true });
    if (a === "" || b === "") return (a === "") - (b === ""); // missing values last
    return (down ? -1 : 1) * (Number(a) - Number(b));
  };
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort((a, b) => compare(key(a), key(b))));
}

// --- Crops: one grey image per channel, combined here in the channels' colours

const crops = { planes: [], shown: [], gain: 1, width: 0 };

async function setUpCrops() {
  if (!DATA.crops) return;
  const { channels, sheets } = DATA.crops;
  crops.shown = channels.map(() => true);
  crops.gain = channels.length > 3 ? 0.7 : 1; // many channels add up to white
  for (const sheet of sheets) {
    const image = new Image();
    image.src = sheet;
    await image.decode();
    const canvas = element("canvas", { width: image.width, height: image.height });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    crops.planes.push(context.getImageData(0, 0, image.width, image.height).data.filter((_, i) => i % 4 === 0));
    crops.width = image.width;
  }
  for (const bar of document.querySelectorAll(".channels")) {
    channels.forEach((channel, c) => {
      const box = element("input", { type: "checkbox", "data-channel": String(c) });
      box.checked = true;
      box.addEventListener("change", () => {
        crops.shown[c] = box.checked;
        redrawCrops(`input[data-channel="${c}"]`, (other) => { other.checked = box.checked; });
      });
      const swatch = element("span", { class: "swatch", "aria-hidden": "true" });
      swatch.style.background = `#${channel.color}`;
      bar.append(element("label", {}, box, swatch, channel.name));
    });
    const gain = element("input", { type: "range", min: "0.4", max: "4", step: "0.1", value: String(crops.gain), class: "gain" });
    gain.addEventListener("input", () => {
      crops.gain = Number(gain.value);
      redrawCrops("input.gain", (other) => { other.value = gain.value; });
    });
    bar.append(element("label", {}, "Brightness", gain));
  }
}

function redrawCrops(controls, update) {
  document.querySelectorAll(controls).forEach(update);
  document.querySelectorAll("canvas[data-crop]").forEach(drawCrop);
}

function drawCrop(canvas) {
  const { size, columns, channels } = DATA.crops;
  const index = Number(canvas.dataset.crop);
  const context = canvas.getContext("2d");
  const out = context.createImageData(size, size);
  const start = Math.floor(index / columns) * size * crops.width + (index % columns) * size;
  for (let at = 3; at < out.data.length; at += 4) out.data[at] = 255; // opaque
  channels.forEach((channel, c) => {
    if (!crops.shown[c]) return;
    const weights = [0, 2, 4].map((at) => (parseInt(channel.color.slice(at, at + 2), 16) / 255) * crops.gain);
    for (let i = 0; i < size * size; i++) {
      const value = crops.planes[c][start + Math.floor(i / size) * crops.width + (i % size)];
      for (let k = 0; k < 3; k++) out.data[4 * i + k] += value * weights[k]; // the array's type clamps at 255
    }
  });
  context.putImageData(out, 0, 0);
}

function cropCanvas(index) {
  const { size, names } = DATA.crops;
  const canvas = element("canvas", { role: "img", "aria-label": `Crop of ${names[index]}`, width: size, height: size, "data-crop": index });
  drawCrop(canvas);
  return canvas;
}

// --- Inspection of points by pointer and keyboard, on the map of cells and on plate maps

function move(item, left, top) {
  item.style.left = `${left}px`;
  item.style.top = `${top}px`;
}

/* Make the points of a figure inspectable.

   points() returns {x, y, candidates, reach}: coordinates of all points, the indices to consider, and the largest
   distance from the pointer in px. facts(i) returns pairs of name and value, picture(i) an element or null, and
   choose(i) is called for a click or Enter. */
function inspect(name, { points, facts, picture = () => null, choose }) {
  const view = views[name];
  const holder = view.el.parentElement;
  const ring = byId("ring");
  let current = -1;

  const toScreen = () => { // both scales are linear
    const box = view.canvas_view.el.getBoundingClientRect();
    const [sx, sy] = [view.frame.x_scale, view.frame.y_scale];
    const [x0, y0] = [sx.compute(0), sy.compute(0)];
    const [dx, dy] = [sx.compute(1) - x0, sy.compute(1) - y0];
    const { left, right, top, bottom } = view.frame.bbox;
    return {
      place: (x, y) => [box.left + x0 + x * dx, box.top + y0 + y * dy],
      inside: (x, y) => x >= box.left + left && x <= box.left + right && y >= box.top + top && y <= box.top + bottom,
    };
  };
  const show = (i, screen, { x, y } = {}) => {
    const tip = byId("tip");
    current = i;
    ring.hidden = tip.hidden = i < 0;
    if (i < 0) return;
    const [left, top] = screen.place(x[i], y[i]);
    const image = picture(i);
    const lines = facts(i).map(([key, value]) => element("div", {}, element("span", { class: "soft" }, `${key} `), value));
    tip.replaceChildren(...(image ? [image] : []), ...lines);
    const { width, height } = tip.getBoundingClientRect();
    move(ring, left, top);
    move(tip, Math.max(4, left + 18 + width > innerWidth ? left - 18 - width : left + 18), Math.max(4, Math.min(top + 12, innerHeight - height - 4)));
  };
  const search = (cost) => { // the candidate with the least cost
    const screen = toScreen(), all = points();
    let best = -1, least = Infinity;
    for (const i of all.candidates) {
      const [x, y] = screen.place(all.x[i], all.y[i]);
      const found = screen.inside(x, y) ? cost(x, y, all, i) : Infinity;
      if (found < least) { least = found; best = i; }
    }
    return [best, screen, all];
  };
  const atPointer = (event) => {
    if (!toScreen().inside(event.clientX, event.clientY)) return [-1];
    return search((x, y, all) => {
      const distance = Math.hypot(x - event.clientX, y - event.clientY);
      return distance <= all.reach ? distance : Infinity;
    });
  };
  const directions = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const step = ([dx, dy]) => {
    const box = view.canvas_view.el.getBoundingClientRect();
    const screen = toScreen(), all = points();
    const from = current >= 0 ? screen.place(all.x[current], all.y[current]) : [box.left + box.width / 2, box.top + box.height / 2];
    const found = search((x, y, _, i) => {
      const along = (x - from[0]) * dx + (y - from[1]) * dy;
      const aside = Math.abs((x - from[0]) * dy) + Math.abs((y - from[1]) * dx);
      return i !== current && along > 0.5 ? along + 3 * aside : Infinity;
    });
    if (found[0] < 0) return;
    show(...found);
    announce(facts(current).map((pair) => pair.join(" ")).join(", "));
  };
  let pressed = null;
  holder.addEventListener("pointerdown", (event) => { pressed = [event.clientX, event.clientY]; });
  holder.addEventListener("pointermove", (event) => show(...(event.buttons ? [-1] : atPointer(event))));
  holder.addEventListener("pointerleave", () => show(-1));
  holder.addEventListener("blur", () => show(-1));
  holder.addEventListener("click", (event) => {
    const still = pressed && Math.hypot(event.clientX - pressed[0], event.clientY - pressed[1]) < 4;
    const [i] = still ? atPointer(event) : [-1];
    if (i >= 0) choose(i, event);
  });
  holder.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && current >= 0) choose(current, event);
    else if (event.key === "Escape") show(-1);
    else if (directions[event.key]) { event.preventDefault(); step(directions[event.key]); }
  });
}

// --- Plate maps: the same wells in every panel, with one selection

function setUpPlates() {
  if (!DATA.plates) return;
  const { list, measures } = DATA.plates;
  const wells = model("wells");
  let plate = list[0];
  const show = (i) => {
    plate = list[i];
    const values = Object.fromEntries(plate.values.map((column, m) => [`value${m}`, column.map((v) => v ?? NaN)]));
    wells.selected.indices = [];
    wells.data = {
      x: plate.wells.map((well) => well.column + 1),
      y: plate.wells.map((well) => well.row + 1),
      marker: plate.wells.map((well) => (well.mark === "positive" ? "triangle" : "circle")),
      mark_size: plate.wells.map((well) => (well.mark ? (plate.columns > 24 ? 3 : plate.columns > 12 ? 5 : 7) : 0)),
      ...values,
    };
    model("plate-columns").setv({ start: 0.4, end: plate.columns + 0.6 });
    model("plate-rows").setv({ start: plate.rows + 0.6, end: 0.4 });
    for (const [axis, size] of [["column", plate.columns], ["row", plate.rows]]) {
      const every = size > 24 ? 4 : size > 12 ? 2 : 1;
      model(`plate-${axis}-ticks`).ticks = Array.from({ length: Math.ceil(size / every) }, (_, t) => 1 + t * every);
    }
    measures.forEach((measure, m) => {
      const known = plate.values[m].filter((v) => v !== null);
      const [low, high] = known.length ? [Math.min(...(measure.zero ? [0] : []), ...known), Math.max(...known)] : [0, 1];
      const margin = high > low ? 0 : Math.abs(low) / 2 || 0.5; // a constant has the colour in the middle
      model(`plate-colors-${m}`).setv({ low: low - margin, high: high + margin });
      byId(`plate-map-${m}`).setAttribute("aria-label", `${measure.label} of plate ${plate.name}, from ${number(low)} to ${number(high)}. Arrow keys move between wells, Enter selects one.`);
      byId(`plate-unknown-${m}`).hidden = known.length > 0;
    });
  };
  if (list.length > 1) fillSelect(byId("plate"), list.map((one) => one.name), 0, show);
  show(0);
  wells.selected.change.connect(() => {
    const names = wells.selected.indices.map((i) => plate.wells[i].name);
    byId("chosen-well").textContent = names.length ? `Selected: ${names.join(", ")}` : "";
    const chosen = new Set(DATA.map ? DATA.map.wells.flatMap(([p, w], code) => (p === plate.name && names.includes(w) ? [code] : [])) : []);
    if (DATA.map) selectCells(names.length ? (row) => chosen.has(cells.arrays.well[row]) : null);
  });
  measures.forEach((measure, m) => inspect(`plate-map-${m}`, {
    points: () => ({ x: wells.data.x, y: wells.data.y, candidates: plate.wells.keys(), reach: 12 }),
    facts: (i) => [["Well", plate.wells[i].name], [measure.label, number(plate.values[m][i])], ...plate.wells[i].about],
    choose: (i, event) => { if (event.key) wells.selected.indices = [i]; }, // clicks are handled by Bokeh's tap tool
  }));
}

// --- Map of cells

const cells = { column: 0, category: null, texts: null };
const KEPT_AT_MOST = 24;

function setUpMap() {
  if (!DATA.map) return;
  const { n, columns, cropped = [] } = DATA.map;
  const tags = model("map").tags[0];
  cells.arrays = tags instanceof Map ? Object.fromEntries(tags) : tags;
  cells.source = model("cells");
  const rank = (row) => Math.imul(row, 0x9e3779b1) >>> 0; // mixes the rows, so that no group covers another
  cells.order = Array.from({ length: n }, (_, row) => row).sort((a, b) => rank(a) - rank(b));
  cells.cropOf = new Map(cropped.map((row, crop) => [row, crop]).filter(([row]) => row >= 0));
  const everything = cells.cropOf.size ? [...cells.cropOf.keys()] : [...cells.order];
  let candidates = everything;
  cells.column = DATA.map.initial;
  fillSelect(byId("color-by"), columns.map((column) => column.name), cells.column, (c) => {
    cells.column = c;
    colorCells();
  });
  cells.source.data = {
    x: cells.order.map((row) => cells.arrays.x[row]),
    y: Float32Array.from(cells.order, (row) => cells.arrays.y[row]),
    color: new Float32Array(n),
  };
  colorCells();
  cells.source.selected.change.connect(() => {
    const { indices } = cells.source.selected;
    const rows = new Set(indices.map((p) => cells.order[p]));
    candidates = indices.length ? everything.filter((row) => rows.has(row)) : everything;
    byId("selection").hidden = !indices.length;
    byId("selected").textContent = `${number(indices.length)} of ${number(n)} selected`;
    announce(byId("selected").textContent);
    if (!cells.selecting) showCategory(null);
  });
  byId("download").addEventListener("click", downloadCsv);
  byId("clear").addEventListener("click", () => {
    if (DATA.plates) model("wells").selected.indices = [];
    selectCells(null);
  });
  inspect("map-figure", {
    points: () => ({ ...cells.arrays, candidates, reach: 24 }),
    facts: cellFacts,
    picture: (row) => (cells.cropOf.has(row) ? cropCanvas(cells.cropOf.get(row)) : null),
    choose: keepCrop,
  });
  byId("map-figure").addEventListener("keydown", (event) => {
    const factor = { "+": 1.5, "=": 1.5, "-": 1 / 1.5 }[event.key];
    if (factor) zoom(factor);
    else if (event.key === "0") views["map-figure"].reset();
  });
}

function zoom(factor) {
  const { x_range, y_range } = model("map");
  for (const range of [x_range, y_range]) {
    const [middle, half] = [(range.start + range.end) / 2, (range.end - range.start) / 2 / factor];
    range.setv({ start: middle - half, end: middle + half });
  }
}

function valueOf(c, row) {
  // A number, the name of a category, or null
  const column = DATA.map.columns[c], code = cells.arrays[`code${c}`][row];
  if (code === column.missing) return null;
  if (column.kind === "category") return column.categories[code];
  const value = column.levels ? column.levels[code] : column.low + code * column.step;
  return column.whole ? Math.round(value) : value;
}

function colorCells() {
  const c = cells.column, column = DATA.map.columns[c];
  if (!column) return;
  const isNumber = column.kind === "number";
  const mapper = model("cell-colors");
  const { colors, numbers } = DATA.palettes;
  const count = isNumber ? 0 : column.categories.length;
  const range = isNumber ? { low: column.dark, high: Math.max(column.bright, column.dark + 1e-9) } : { low: -0.5, high: count - 0.5 };
  mapper.setv({ palette: isNumber ? numbers : Array.from({ length: count }, (_, i) => colors[i % colors.length]), ...range });
  const own = cells.arrays[`code${c}`];
  cells.source.data = {
    ...cells.source.data,
    color: Float32Array.from(cells.order, (row) => (own[row] === column.missing ? NaN : isNumber ? valueOf(c, row) : own[row])),
  };
  model("cell-color-bar").visible = isNumber;
  if (cells.category !== null) selectCells(null);
  drawLegend(column, own);
}

function drawLegend(column, own) {
  const legend = byId("legend");
  legend.replaceChildren(element("h3", {}, column.name));
  const counts = new Uint32Array(column.missing + 1);
  for (const code of own) counts[code]++;
  if (column.kind === "number") {
    legend.append(element("p", { class: "soft small" }, `${number(column.dark)} to ${number(column.bright)} (1st to 99th percentile)`));
  } else {
    const { colors } = DATA.palettes;
    if (column.categories.length > colors.length) {
      legend.append(element("p", { class: "soft small" }, `${column.categories.length} values, so colours repeat. Click one to select its cells.`));
    }
    const toggle = (code) => (cells.category === code ? selectCells(null) : selectCells((row) => own[row] === code, code));
    column.categories.forEach((name, code) => {
      const swatch = element("span", { class: "swatch", "aria-hidden": "true" });
      swatch.style.background = colors[code % colors.length];
      legend.append(element("button", { type: "button", "aria-pressed": "false", onclick: () => toggle(code) },
        swatch, element("span", { class: "name" }, name), element("span", { class: "n" }, number(counts[code]))));
    });
  }
  const missing = counts[column.missing];
  if (missing) legend.append(element("p", { class: "soft small" }, `${number(missing)} without a value, in grey`));
}

function showCategory(code) {
  cells.category = code;
  document.querySelectorAll("#legend button").forEach((button, i) => button.setAttribute("aria-pressed", String(i === code)));
}

function selectCells(test, category = null) {
  // Select the rows that pass a test, or none
  const chosen = [];
  if (test) cells.order.forEach((row, place) => { if (test(row)) chosen.push(place); });
  cells.selecting = true;
  cells.source.selected.indices = chosen;
  cells.selecting = false;
  showCategory(category);
}

function exported(name) {
  // A column of the CSV: texts are JSON lists in UTF-8
  const stored = cells.arrays[name];
  return name.startsWith("text") ? JSON.parse(new TextDecoder().decode(stored)) : stored;
}

function downloadCsv() {
  const quote = (value) => {
    if (value === null || Number.isNaN(value)) return "";
    const text = typeof value === "number" ? String(Number(value.toPrecision(7))) : value; // of float32
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const columns = DATA.map.export.map(([, name]) => exported(name));
  const rows = cells.source.selected.indices.map((place) => cells.order[place]).sort((a, b) => a - b);
  const lines = [DATA.map.export.map(([name]) => quote(name)), ...rows.map((row) => columns.map((column) => quote(column[row])))];
  const blob = new Blob([lines.map((line) => line.join(",") + "\n").join("")], { type: "text/csv" });
  const link = element("a", { href: URL.createObjectURL(blob), download: "selected_cells.csv" });
  link.click();
  URL.revokeObjectURL(link.href);
}

function cellFacts(row) {
  // What identifies the cell, and the value that colours the map
  const { export: columns, identity } = DATA.map;
  cells.texts ??= columns.filter(([, name]) => name.startsWith("text")).slice(1).map(([name, stored]) => [name, exported(stored)]);
  const facts = cells.texts.map(([name, values]) => [name, values[row]]);
  for (const c of [...identity, cells.column]) {
    const column = DATA.map.columns[c];
    if (!column || facts.some(([name]) => name === column.name)) continue;
    const value = valueOf(c, row);
    facts.push([column.name, typeof value === "number" ? number(value) : value]);
  }
  return facts.map(([name, value]) => [name.replace(/^Metadata_/, ""), value ?? "–"]);
}

function keepCrop(row) {
  const crop = cells.cropOf.get(row);
  const list = byId("kept");
  if (crop === undefined || [...list.children].some((item) => item.dataset.row === String(row))) return;
  const name = DATA.crops.names[crop];
  const caption = element("figcaption", {}, cellFacts(row).map(([, text]) => text).join(" · "), " ");
  const item = element("figure", { "data-row": String(row) }, cropCanvas(crop), caption);
  caption.append(element("button", { type: "button", "aria-label": `Remove ${name}`, onclick: () => item.remove() }, "×"));
  list.prepend(item);
  byId("kept-hint").hidden = true;
  while (list.children.length > KEPT_AT_MOST) list.lastChild.remove();
  announce(`Kept ${name} below the map.`);
}

// --- Nearest perturbations

function setUpNeighbors() {
  if (!DATA.neighbors) return;
  const { list, initial } = DATA.neighbors;
  const show = (i) => byId("nearest").replaceChildren(
    neighborRow(list[i], null), ...list[i].nearest.map(([j, similarity]) => neighborRow(list[j], similarity)));
  fillSelect(byId("perturbation"), list.map((one) => one.name), initial, show);
  show(initial);
}

function neighborRow(one, similarity) {
  const lines = one.about.map(([name, value]) => `${name}: ${value}`);
  if (similarity !== null) lines.unshift(`cosine similarity ${similarity.toFixed(2)}`);
  const pictures = one.crops.length ? one.crops.map(cropCanvas) : [element("span", { class: "soft small" }, "There are no crops of it on this page.")];
  return element("div", { class: similarity === null ? "neighbor self" : "neighbor" },
    element("div", {}, element("div", { class: "name" }, one.name), ...lines.map((text) => element("div", { class: "soft small" }, text))),
    element("div", { class: "crops" }, ...pictures));
}

async function loadBokeh() {
  const compressed = Uint8Array.from(atob(byId("library").textContent), (character) => character.charCodeAt(0));
  const stream = new Blob([compressed]).stream().pipeThrough(new DecompressionStream("gzip"));
  document.head.append(element("script", {}, await new Response(stream).text()));
}

async function main() {
  setUpTables();
  await loadBokeh();
  Bokeh.logger.set_level("error");
  const { document: report, roots } = DATA.figures;
  const [manager] = await Bokeh.embed.embed_items({ report }, [{ docid: "report", roots, root_ids: Object.keys(roots) }]);
  for (const [id, name] of Object.entries(roots)) views[name] = manager.get_by_id(id);
  setUpTheme();
  await setUpCrops();
  setUpMap();
  setUpPlates();
  setUpNeighbors();
  document.documentElement.dataset.ready = "true";
}
addEventListener("DOMContentLoaded", main);
