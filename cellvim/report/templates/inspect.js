// Looking at single cells of the map: by pointer or by arrow keys, with their crops; a click keeps one below the map.
const KEPT_AT_MOST = 24;

function listenToCells() {
  const canvas = cells.canvas;
  let drag = null;
  canvas.addEventListener("pointerdown", (event) => { drag = { x: event.clientX, y: event.clientY, moved: false }; });
  addEventListener("pointerup", () => { drag = drag && drag.moved ? { over: true } : null; });
  canvas.addEventListener("pointermove", (event) => {
    if (drag && !drag.over && event.buttons) {
      const box = canvas.getBoundingClientRect();
      const [dx, dy] = [event.clientX - drag.x, event.clientY - drag.y];
      if (drag.moved || Math.hypot(dx, dy) > 4) {
        Object.assign(drag, { x: event.clientX, y: event.clientY, moved: true });
        cells.left = Math.min(1 - 1 / cells.zoom, Math.max(0, cells.left - dx / box.width / cells.zoom));
        cells.top = Math.min(1 - 1 / cells.zoom, Math.max(0, cells.top - dy / box.height / cells.zoom));
        hover(-1);
        requestAnimationFrame(drawCells);
      }
      return;
    }
    const box = canvas.getBoundingClientRect();
    hover(nearest(event.clientX - box.left, event.clientY - box.top, box), event.clientX, event.clientY);
  });
  canvas.addEventListener("pointerleave", () => hover(-1));
  canvas.addEventListener("click", () => {
    if (drag && drag.over) drag = null;
    else keep(cells.hovered);
  });
  canvas.addEventListener("dblclick", (event) => {
    const box = canvas.getBoundingClientRect();
    zoomAt((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height, 2);
  });
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return; // the page scrolls
    event.preventDefault();
    const box = canvas.getBoundingClientRect();
    zoomAt((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height, event.deltaY < 0 ? 1.2 : 1 / 1.2);
  }, { passive: false });
  canvas.addEventListener("keydown", onKey);
  canvas.addEventListener("blur", () => hover(-1));
}

function onKey(event) {
  const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  if (event.key === "Enter") keep(cells.hovered);
  else if (event.key === "Escape") hover(-1);
  else if (event.key === "+" || event.key === "=") zoomAt(0.5, 0.5, 1.5);
  else if (event.key === "-") zoomAt(0.5, 0.5, 1 / 1.5);
  else if (event.key === "0") resetZoom();
  else if (ways[event.key]) {
    event.preventDefault();
    const box = cells.canvas.getBoundingClientRect();
    const at = cells.hovered >= 0 ? place(cells.hovered, box.width, box.height) : [box.width / 2, box.height / 2];
    const found = nextPoint(at, ways[event.key], box);
    if (found < 0) return;
    const [x, y] = place(found, box.width, box.height);
    hover(found, box.left + x, box.top + y);
    say(facts(found).map(([name, text]) => `${name} ${text}`).join(", "));
  }
}

function candidates() {
  return cells.cropped.length ? cells.cropped : cells.order;
}

function nearest(x, y, box) {
  let best = -1, least = 24 ** 2;
  const chosen = highlighted();
  for (const i of candidates()) {
    const [px, py] = place(i, box.width, box.height);
    const distance = (px - x) ** 2 + (py - y) ** 2;
    if (distance < least && (!chosen || chosen(i))) { least = distance; best = i; }
  }
  return best;
}

function nextPoint([x, y], [dx, dy], box) {
  let best = -1, least = Infinity;
  for (const i of candidates()) {
    if (i === cells.hovered) continue;
    const [px, py] = place(i, box.width, box.height);
    if (px < 0 || py < 0 || px > box.width || py > box.height) continue;
    const along = (px - x) * dx + (py - y) * dy;
    const aside = Math.abs((px - x) * dy) + Math.abs((py - y) * dx);
    if (along > 0.5 && along + 2 * aside < least) { least = along + 2 * aside; best = i; }
  }
  return best;
}

function facts(i) {
  // What identifies the cell, and the value that the map is coloured by.
  const found = [];
  const told = new Set();
  for (const c of [...DATA.map.identity, cells.column]) {
    const column = DATA.map.columns[c];
    if (!column || told.has(c)) continue;
    told.add(c);
    const code = cells.codes[c][i];
    const text = isMissing(column, code) ? "–" : column.kind === "category" ? column.categories[code] : number(value(column, code));
    found.push([column.name.replace(/^Metadata_/, ""), text]);
  }
  return found;
}

function hover(i, x, y) {
  if (i !== cells.hovered) {
    cells.hovered = i;
    requestAnimationFrame(drawRing);
  }
  if (i < 0) { hideTip(); return; }
  const children = facts(i).map(([name, text]) => line(name, text));
  const crop = cells.cropOf.get(i);
  if (crop !== undefined) children.unshift(cropCanvas(crop, `Crop of ${DATA.crops.names[crop]}`));
  showTip(x, y, ...children);
}

function keep(i) {
  const crop = cells.cropOf.get(i);
  if (crop === undefined) return;
  const list = document.getElementById("kept");
  if ([...list.children].some((item) => item.dataset.point === String(i))) return;
  const canvas = cropCanvas(crop, `Crop of ${DATA.crops.names[crop]}`);
  const caption = element("figcaption", {}, facts(i).map(([, text]) => text).join(" · "), " ");
  const item = element("figure", { "data-point": String(i) }, canvas, caption);
  caption.append(element("button", { type: "button", "aria-label": `Remove ${DATA.crops.names[crop]}`, onclick: () => item.remove() }, "×"));
  list.prepend(item);
  document.getElementById("kept-hint").hidden = true;
  while (list.children.length > KEPT_AT_MOST) list.lastChild.remove();
  say(`Kept ${DATA.crops.names[crop]} below the map.`);
}
