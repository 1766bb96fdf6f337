// Plate maps: one panel a measure; a well that is chosen is highlighted in all of them and on the map of cells.
const plateState = { plate: 0, selected: null, listeners: [] };
const PITCH = 20;

function setUpPlates() {
  if (!DATA.plates) return;
  const holder = document.getElementById("platemaps");
  const choice = document.getElementById("plate");
  if (choice) {
    DATA.plates.list.forEach((plate, i) => choice.append(element("option", { value: String(i) }, plate.name)));
    choice.addEventListener("change", () => {
      plateState.plate = Number(choice.value);
      selectWell(null);
      draw();
    });
  }
  const draw = () => {
    holder.replaceChildren(...DATA.plates.measures.map((measure, m) => platePanel(measure, m)));
  };
  themeListeners.push(draw);
  draw();
}

function selectWell(name) {
  plateState.selected = plateState.selected === name ? null : name;
  for (const well of document.querySelectorAll("#platemaps .well")) {
    well.classList.toggle("selected", name !== null && well.dataset.well === plateState.selected);
  }
  const chosen = document.getElementById("chosen-well");
  const plate = DATA.plates.list[plateState.plate];
  chosen.hidden = plateState.selected === null;
  chosen.replaceChildren();
  if (plateState.selected !== null) {
    chosen.append(
      `Well ${plateState.selected} is highlighted, here and on the map of cells. `,
      element("button", { type: "button", onclick: () => selectWell(null) }, "Clear"),
    );
  }
  for (const listener of plateState.listeners) listener(plate.name, plateState.selected);
}

function platePanel(measure, m) {
  const plate = DATA.plates.list[plateState.plate];
  const values = plate.values[m];
  const known = values.filter((v) => v !== null);
  const panel = element("div", { class: "card" }, element("h3", {}, measure.label));
  if (!known.length) {
    panel.append(element("p", { class: "soft small" }, "Not known for this plate."));
    return panel;
  }
  const low = measure.zero ? Math.min(0, ...known) : Math.min(...known);
  const high = Math.max(...known);
  const svg = svgElement("svg", {
    viewBox: `0 0 ${(plate.columns + 1) * PITCH + 4} ${(plate.rows + 1) * PITCH}`,
    tabindex: "0",
    role: "img",
    "aria-label": `Plate map of ${plate.name}: ${measure.label}, from ${number(low)} to ${number(high)}. Arrow keys move from well to well, Enter highlights one.`,
  });
  drawLabels(svg, plate);
  plate.wells.forEach((well, i) => {
    const value = values[i];
    const shape = svgElement("rect", {
      x: (well.column + 1) * PITCH + 1, y: (well.row + 1) * PITCH - 1, width: PITCH - 2.5, height: PITCH - 2.5,
      rx: plate.columns > 24 ? 2 : 5, class: value === null ? "well empty" : "well", "data-well": well.name, "data-index": i,
    });
    if (value !== null) shape.setAttribute("fill", css(viridis(high > low ? (value - low) / (high - low) : 0.5)));
    if (well.name === plateState.selected) shape.classList.add("selected");
    svg.append(shape);
    if (well.mark) drawMark(svg, well, value === null ? null : (value - low) / (high - low || 1));
  });
  listenToWells(svg, plate, measure, values);
  panel.append(svg, ramp());
  const ends = element("div", { class: "ends" }, element("span", {}, number(low)), element("span", {}, number(high)));
  panel.append(ends);
  if (measure.help) panel.append(element("p", { class: "soft small" }, measure.help));
  return panel;
}

function drawLabels(svg, plate) {
  const every = plate.columns > 24 ? 4 : plate.columns > 12 ? 2 : 1;
  for (let c = 0; c < plate.columns; c += every) {
    const text = svgElement("text", { x: (c + 1.5) * PITCH, y: PITCH * 0.65, "text-anchor": "middle" });
    text.textContent = c + 1;
    svg.append(text);
  }
  for (let r = 0; r < plate.rows; r += plate.rows > 16 ? 2 : 1) {
    const text = svgElement("text", { x: PITCH * 0.5, y: (r + 1.65) * PITCH, "text-anchor": "middle" });
    text.textContent = r < 26 ? String.fromCharCode(65 + r) : "A" + String.fromCharCode(65 + r - 26);
    svg.append(text);
  }
}

function drawMark(svg, well, share) {
  // Controls are marked by shape, so that the mark does not need a colour of its own.
  const x = (well.column + 1) * PITCH + 1 + (PITCH - 2.5) / 2;
  const y = (well.row + 1) * PITCH - 1 + (PITCH - 2.5) / 2;
  const ink = share === null ? variable("--soft") : share > 0.55 ? "#000" : "#fff";
  const shape = well.mark === "negative"
    ? svgElement("circle", { cx: x, cy: y, r: 3, fill: "none", stroke: ink, "stroke-width": 1.4 })
    : svgElement("path", { d: `M${x} ${y - 3.4}L${x + 3.4} ${y + 2.6}H${x - 3.4}Z`, fill: ink });
  shape.setAttribute("pointer-events", "none");
  svg.append(shape);
}

function listenToWells(svg, plate, measure, values) {
  const cursor = svgElement("rect", { class: "cursor", width: PITCH, height: PITCH, visibility: "hidden", "pointer-events": "none" });
  svg.append(cursor);
  const describe = (i) => {
    const well = plate.wells[i];
    const lines = [element("b", {}, well.name), line(measure.label, number(values[i]))];
    for (const [name, value] of well.about) lines.push(line(name, value));
    return lines;
  };
  svg.addEventListener("pointermove", (event) => {
    const i = event.target.dataset.index;
    if (i === undefined) hideTip();
    else showTip(event.clientX, event.clientY, ...describe(Number(i)));
  });
  svg.addEventListener("pointerleave", hideTip);
  svg.addEventListener("click", (event) => {
    if (event.target.dataset.well) selectWell(event.target.dataset.well);
  });
  let at = -1;
  svg.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (event.key === "Enter" && at >= 0) selectWell(plate.wells[at].name);
    if (!steps[event.key]) return;
    event.preventDefault();
    at = at < 0 ? 0 : nextWell(plate, at, steps[event.key]);
    const well = plate.wells[at];
    cursor.setAttribute("x", (well.column + 1) * PITCH - 0.2);
    cursor.setAttribute("y", (well.row + 1) * PITCH - 2.2);
    cursor.setAttribute("visibility", "visible");
    say(describe(at).map((part) => part.textContent).join(", "));
    const box = cursor.getBoundingClientRect();
    showTip(box.right, box.bottom, ...describe(at));
  });
  svg.addEventListener("blur", () => { cursor.setAttribute("visibility", "hidden"); hideTip(); });
}

function nextWell(plate, at, [rows, columns]) {
  // The nearest well in that direction, in the same row or column if there is one.
  const from = plate.wells[at];
  let best = at, least = Infinity;
  plate.wells.forEach((well, i) => {
    const along = (well.row - from.row) * rows + (well.column - from.column) * columns;
    const aside = Math.abs((well.row - from.row) * columns) + Math.abs((well.column - from.column) * rows);
    if (along > 0 && along + 10 * aside < least) { least = along + 10 * aside; best = i; }
  });
  return best;
}
