// The map of cells: a canvas of dots, or of shaded pixels where there are many, coloured by any column.
const SHADED_FROM = 20000;
const cells = { zoom: 1, left: 0, top: 0, column: 0, category: null, well: null, hovered: -1 };

function setUpCells() {
  const about = DATA.map;
  if (!about) return;
  cells.canvas = document.getElementById("cells");
  cells.x = unpack(about.x);
  cells.y = unpack(about.y);
  cells.codes = about.columns.map((column) => unpack(column.codes));
  cells.order = shuffled(about.n);
  cells.cropOf = new Map((about.cropped || []).map((point, crop) => [point, crop])); // point -1: not on the map
  cells.cropOf.delete(-1);
  cells.cropped = [...cells.cropOf.keys()];
  const choice = document.getElementById("color-by");
  about.columns.forEach((column, i) => choice.append(element("option", { value: String(i) }, column.name)));
  cells.column = about.initial;
  choice.value = String(about.initial);
  choice.addEventListener("change", () => {
    cells.column = Number(choice.value);
    cells.category = null;
    drawLegend();
    drawCells();
  });
  for (const [id, factor] of [["zoom-in", 1.5], ["zoom-out", 1 / 1.5]]) {
    document.getElementById(id).addEventListener("click", () => zoomAt(0.5, 0.5, factor));
  }
  document.getElementById("zoom-reset").addEventListener("click", resetZoom);
  listenToCells();
  plateState.listeners.push((plate, well) => {
    cells.well = well === null ? null : `${plate}\u0000${well}`;
    drawCells();
  });
  themeListeners.push(() => { drawLegend(); drawCells(); });
  new ResizeObserver(drawCells).observe(cells.canvas);
  drawLegend();
  drawCells();
}

function shuffled(n) {
  // The same every time; so that no group is drawn on top of another.
  const order = Uint32Array.from({ length: n }, (_, i) => i);
  let state = 12345;
  for (let i = n - 1; i > 0; i--) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    const j = state % (i + 1);
    [order[i], order[j]] = [order[j], order[i]];
  }
  return order;
}

function place(i, width, height) {
  const margin = 0.04;
  const x = margin + (1 - 2 * margin) * (cells.x[i] / 65534);
  const y = 1 - margin - (1 - 2 * margin) * (cells.y[i] / 65534);
  return [(x - cells.left) * cells.zoom * width, (y - cells.top) * cells.zoom * height];
}

function isMissing(column, code) {
  return code === (column.codes.type === "u8" ? 255 : 65535);
}

function value(column, code) {
  const most = column.codes.type === "u8" ? 254 : 65534;
  const found = column.low + (code / most) * (column.high - column.low);
  return column.whole ? Math.round(found) : found;
}

function colorTable(column) {
  // A colour for every code, so that a dot costs one look-up.
  const most = column.codes.type === "u8" ? 256 : 65536;
  if (column.kind === "category") return (code) => (isMissing(column, code) ? null : categoryColor(code));
  const width = column.bright - column.dark;
  const table = Array.from({ length: 256 }, (_, i) => viridis(i / 255));
  return (code) => {
    if (code === most - 1) return null;
    const share = width > 0 ? (value(column, code) - column.dark) / width : 0.5;
    return table[Math.round(255 * Math.min(1, Math.max(0, share)))];
  };
}

function highlighted() {
  // A test of points, or null when all are alike.
  const tests = [];
  if (cells.category !== null) {
    const codes = cells.codes[cells.column];
    tests.push((i) => codes[i] === cells.category);
  }
  if (cells.well !== null && DATA.map.wells) {
    cells.wellCodes = cells.wellCodes || unpack(DATA.map.wells.codes);
    const code = DATA.map.wells.names.indexOf(cells.well);
    tests.push((i) => cells.wellCodes[i] === code);
  }
  return tests.length ? (i) => tests.every((test) => test(i)) : null;
}

function drawCells() {
  const scale = window.devicePixelRatio || 1;
  const width = Math.round(cells.canvas.clientWidth * scale);
  const height = Math.round(cells.canvas.clientHeight * scale);
  if (!width || !height) return;
  cells.base = cells.base || document.createElement("canvas"); // without the ring, which moves with the pointer
  cells.base.width = width;
  cells.base.height = height;
  const context = cells.base.getContext("2d");
  const column = DATA.map.columns[cells.column];
  const color = column ? colorTable(column) : () => null;
  const chosen = highlighted();
  if (DATA.map.n > SHADED_FROM) shade(context, width, height, color, chosen);
  else dots(context, width, height, color, chosen, scale);
  drawRing();
}

function drawRing() {
  const { canvas, base } = cells;
  if (!base) return;
  if (canvas.width !== base.width || canvas.height !== base.height) {
    canvas.width = base.width;
    canvas.height = base.height;
  }
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.drawImage(base, 0, 0);
  if (cells.hovered < 0) return;
  const scale = window.devicePixelRatio || 1;
  const [x, y] = place(cells.hovered, canvas.width, canvas.height);
  context.lineWidth = 2 * scale;
  context.strokeStyle = variable("--halo");
  context.beginPath();
  context.arc(x, y, 6 * scale, 0, 2 * Math.PI);
  context.stroke();
}

function dots(context, width, height, color, chosen, scale) {
  const n = DATA.map.n;
  const codes = cells.codes[cells.column];
  const radius = scale * Math.min(5, Math.max(1.3, 160 / Math.sqrt(n))) * Math.sqrt(Math.min(3, cells.zoom));
  const grey = variable("--grey-dot");
  for (const front of chosen ? [false, true] : [true]) {
    context.globalAlpha = front ? 0.85 : 0.5;
    for (const i of cells.order) {
      if (chosen && chosen(i) !== front) continue;
      const [x, y] = place(i, width, height);
      if (x < -9 || y < -9 || x > width + 9 || y > height + 9) continue;
      const own = front && codes ? color(codes[i]) : null;
      context.fillStyle = own ? css(own) : grey;
      context.beginPath();
      context.arc(x, y, chosen && front ? 1.4 * radius : radius, 0, 2 * Math.PI);
      context.fill();
    }
  }
  context.globalAlpha = 1;
}

function shade(context, width, height, color, chosen) {
  // Every pixel has the mean colour of its cells, and is the more opaque the more there are.
  const codes = cells.codes[cells.column];
  const grey = hexColor(variable("--grey-dot").slice(1));
  const sums = new Float32Array(4 * width * height);
  for (let i = 0; i < DATA.map.n; i++) {
    const [px, py] = place(i, width, height);
    const x = Math.floor(px), y = Math.floor(py);
    if (x < 0 || y < 0 || x + 1 >= width || y + 1 >= height) continue;
    const front = !chosen || chosen(i);
    const own = (front && codes && color(codes[i])) || grey;
    const weight = chosen && front ? 20 : 1;
    for (const at of [4 * (y * width + x), 4 * (y * width + x + 1), 4 * ((y + 1) * width + x), 4 * ((y + 1) * width + x + 1)]) {
      sums[at] += weight * own[0];
      sums[at + 1] += weight * own[1];
      sums[at + 2] += weight * own[2];
      sums[at + 3] += weight;
    }
  }
  let most = 1;
  for (let at = 3; at < sums.length; at += 4) most = Math.max(most, sums[at]);
  const picture = context.createImageData(width, height);
  const top = Math.log1p(Math.min(most, 30));
  for (let at = 0; at < sums.length; at += 4) {
    const count = sums[at + 3];
    if (!count) continue;
    picture.data[at] = sums[at] / count;
    picture.data[at + 1] = sums[at + 1] / count;
    picture.data[at + 2] = sums[at + 2] / count;
    picture.data[at + 3] = 255 * Math.min(1, 0.45 + 0.55 * (Math.log1p(count) / top));
  }
  context.putImageData(picture, 0, 0);
}

function drawLegend() {
  const legend = document.getElementById("legend");
  const column = DATA.map.columns[cells.column];
  legend.replaceChildren();
  if (!column) return;
  legend.append(element("h3", {}, column.name));
  const codes = cells.codes[cells.column];
  let missing = 0;
  const counts = new Map();
  for (const code of codes) {
    if (isMissing(column, code)) missing++;
    else if (column.kind === "category") counts.set(code, (counts.get(code) || 0) + 1);
  }
  if (column.kind === "number") {
    legend.append(ramp(), element("div", { class: "ends" },
      element("span", {}, `≤ ${number(column.dark)}`), element("span", {}, `≥ ${number(column.bright)}`)));
    legend.append(element("p", { class: "soft small" }, "1st to 99th percentile."));
  } else {
    if (column.categories.length > CATEGORIES.length) {
      legend.append(element("p", { class: "soft small" },
        `${column.categories.length} values: colours come again. Choose one to see where it lies.`));
    }
    column.categories.forEach((name, code) => legend.append(legendButton(name, code, counts.get(code) || 0)));
  }
  if (missing) legend.append(element("p", { class: "soft small" }, `${number(missing)} without a value, in grey.`));
}

function legendButton(name, code, count) {
  const swatch = element("span", { class: "swatch", "aria-hidden": "true" });
  swatch.style.background = css(categoryColor(code));
  const button = element("button", { type: "button", "aria-pressed": String(cells.category === code) },
    swatch, element("span", { class: "name" }, name), element("span", { class: "n" }, number(count)));
  button.addEventListener("click", () => {
    cells.category = cells.category === code ? null : code;
    for (const other of document.querySelectorAll("#legend button")) other.setAttribute("aria-pressed", "false");
    button.setAttribute("aria-pressed", String(cells.category === code));
    drawCells();
  });
  return button;
}

function zoomAt(x, y, factor) {
  const zoom = Math.min(60, Math.max(1, cells.zoom * factor));
  cells.left = Math.min(1 - 1 / zoom, Math.max(0, cells.left + x / cells.zoom - x / zoom));
  cells.top = Math.min(1 - 1 / zoom, Math.max(0, cells.top + y / cells.zoom - y / zoom));
  cells.zoom = zoom;
  drawCells();
}

function resetZoom() {
  Object.assign(cells, { zoom: 1, left: 0, top: 0 });
  drawCells();
}
