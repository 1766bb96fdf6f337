// Colours that everyone can tell apart: viridis for numbers, Okabe and Ito's and some of Tol's for categories.
const VIRIDIS = [
  [68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141], [39, 173, 129], [92, 200, 99],
  [170, 220, 50], [253, 231, 37],
];
const CATEGORIES = [
  [0, 114, 178], [230, 159, 0], [0, 158, 115], [204, 121, 167], [86, 180, 233], [213, 94, 0], [148, 103, 189],
  [140, 150, 20], [170, 68, 85], [68, 170, 153], [120, 120, 220], [150, 100, 60],
];

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function viridis(share) {
  // The dark end is hardly seen on a dark page; there it begins a little later.
  const from = isDark() ? 0.14 : 0;
  const place = (from + (1 - from) * Math.min(1, Math.max(0, share))) * (VIRIDIS.length - 1);
  const i = Math.min(VIRIDIS.length - 2, Math.floor(place));
  return VIRIDIS[i].map((low, c) => Math.round(low + (place - i) * (VIRIDIS[i + 1][c] - low)));
}

function categoryColor(code) {
  const color = CATEGORIES[code % CATEGORIES.length];
  if (isDark() && code < CATEGORIES.length) return color.map((v) => Math.round(v + 0.18 * (255 - v)));
  const round = Math.floor(code / CATEGORIES.length) % 3; // further rounds are lighter, then darker
  if (round === 1) return color.map((v) => Math.round(v + 0.45 * (255 - v)));
  return round === 2 ? color.map((v) => Math.round(0.6 * v)) : color;
}

function css(color) {
  return `rgb(${color[0]},${color[1]},${color[2]})`;
}

function variable(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function hexColor(hex) {
  return [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16));
}

function ramp() {
  const canvas = element("canvas", { class: "ramp", width: "256", height: "1", "aria-hidden": "true" });
  canvas.style.width = "100%";
  const context = canvas.getContext("2d");
  for (let x = 0; x < 256; x++) {
    context.fillStyle = css(viridis(x / 255));
    context.fillRect(x, 0, 1, 1);
  }
  return canvas;
}

const themeListeners = [];

function setUpTheme() {
  const button = document.getElementById("theme");
  const names = { "": "System", light: "Light", dark: "Dark" };
  const show = () => {
    button.textContent = `Theme: ${names[document.documentElement.dataset.theme || ""]}`;
    for (const listener of themeListeners) listener();
  };
  const set = (theme) => {
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    show();
  };
  button.hidden = false;
  button.addEventListener("click", () => {
    const order = ["", "light", "dark"];
    set(order[(order.indexOf(document.documentElement.dataset.theme || "") + 1) % 3]);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
  let before;
  addEventListener("beforeprint", () => { before = document.documentElement.dataset.theme || ""; set("light"); });
  addEventListener("afterprint", () => set(before));
  button.textContent = "Theme: System";
}
