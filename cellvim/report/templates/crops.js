// Crops of cells: one grey picture a channel in the page, put together in the channels' colours here.
const crops = { ready: false, planes: [], shown: [], gain: 1, listeners: [] };

async function loadCrops() {
  const about = DATA.crops;
  if (!about) return;
  for (const sheet of about.sheets) {
    const image = new Image();
    image.src = sheet;
    await image.decode();
    const canvas = document.createElement("canvas");
    canvas.width = image.width;
    canvas.height = image.height;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    const pixels = context.getImageData(0, 0, image.width, image.height).data;
    const plane = new Uint8Array(image.width * image.height);
    for (let i = 0; i < plane.length; i++) plane[i] = pixels[4 * i];
    crops.planes.push(plane);
    crops.width = image.width;
  }
  crops.ready = true;
}

function drawCrop(canvas, index) {
  const about = DATA.crops;
  const size = about.size;
  canvas.width = canvas.height = size;
  const context = canvas.getContext("2d");
  if (!crops.ready) return;
  const out = context.createImageData(size, size);
  const left = (index % about.columns) * size;
  const top = Math.floor(index / about.columns) * size;
  const colors = about.channels.map((channel) => hexColor(channel.color));
  for (let y = 0; y < size; y++) {
    for (let x = 0; x < size; x++) {
      const from = (top + y) * crops.width + left + x;
      const to = 4 * (y * size + x);
      let r = 0, g = 0, b = 0;
      for (let c = 0; c < colors.length; c++) {
        if (!crops.shown[c]) continue;
        const value = (crops.planes[c][from] / 255) * crops.gain;
        r += value * colors[c][0];
        g += value * colors[c][1];
        b += value * colors[c][2];
      }
      out.data[to] = r; // clamped at 255 by the array's type
      out.data[to + 1] = g;
      out.data[to + 2] = b;
      out.data[to + 3] = 255;
    }
  }
  context.putImageData(out, 0, 0);
}

function cropCanvas(index, label) {
  const canvas = element("canvas", { role: "img", "aria-label": label });
  canvas.dataset.crop = index;
  drawCrop(canvas, index);
  return canvas;
}

function redrawCrops() {
  for (const canvas of document.querySelectorAll("canvas[data-crop]")) drawCrop(canvas, Number(canvas.dataset.crop));
}

function setUpChannels() {
  const about = DATA.crops;
  if (!about) return;
  crops.shown = about.channels.map(() => true);
  crops.gain = about.channels.length > 3 ? 0.7 : 1; // many channels add up to white
  for (const bar of document.querySelectorAll(".channels")) {
    about.channels.forEach((channel, c) => {
      const box = element("input", { type: "checkbox", "data-channel": String(c) });
      box.checked = true;
      box.addEventListener("change", () => {
        crops.shown[c] = box.checked;
        for (const other of document.querySelectorAll(`input[data-channel="${c}"]`)) other.checked = box.checked;
        redrawCrops();
      });
      const swatch = element("span", { class: "swatch", "aria-hidden": "true" });
      swatch.style.background = `#${channel.color}`;
      bar.append(element("label", {}, box, swatch, channel.name));
    });
    const gain = element("input", { type: "range", min: "0.4", max: "4", step: "0.1", value: String(crops.gain), class: "gain" });
    gain.addEventListener("input", () => {
      crops.gain = Number(gain.value);
      for (const other of document.querySelectorAll("input.gain")) other.value = gain.value;
      redrawCrops();
    });
    bar.append(element("label", {}, "Brightness", gain));
  }
}
