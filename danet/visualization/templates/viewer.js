// The attention viewer: what a pixel attends to, computed here from the queries and keys of the
// position attention, as softmax over j of query_i . key_j. No network is asked for anything.
"use strict";

const page = JSON.parse(document.getElementById("viewer-data").textContent);
const canvas = document.getElementById("attention");
const readout = document.getElementById("readout");
const ink = canvas.getContext("2d");
const viewer = { number: -1, wanted: -1, cell: -1, weights: null };
window.viewer = viewer;

function floats(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Float32Array(bytes.buffer);
}

function classesOf(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return page.classes.length > 255 ? new Uint16Array(bytes.buffer) : bytes;
}

function attend(picture, cell) {
  const { queries, keys, depth } = picture;
  const count = picture.rows * picture.columns;
  const weights = new Float64Array(count);
  let top = -Infinity;
  for (let j = 0; j < count; j++) {
    let energy = 0;
    for (let d = 0; d < depth; d++) energy += queries[d * count + cell] * keys[d * count + j];
    weights[j] = energy;
    top = Math.max(top, energy);
  }
  let sum = 0;
  for (let j = 0; j < count; j++) sum += weights[j] = Math.exp(weights[j] - top);
  for (let j = 0; j < count; j++) weights[j] /= sum;
  return weights;
}

function describe(picture, x, y, weights) {
  const count = weights.length;
  const shares = new Map();
  for (let j = 0; j < count; j++) {
    const name = picture.cells[j];
    shares.set(name, (shares.get(name) || 0) + weights[j]);
  }
  const own = page.classes[picture.cells[viewer.cell]];
  const seen = [...shares].filter(([, share]) => share >= 0.0005); // not shown as 0.0 %
  const lines = seen.sort((a, b) => b[1] - a[1]).slice(0, 6);
  readout.replaceChildren();
  const head = document.createElement("p");
  head.textContent = `Pixel (${x}, ${y}), predicted as ${own}, attends to`;
  const table = document.createElement("table");
  for (const [index, share] of lines) {
    const row = table.insertRow();
    const swatch = document.createElement("span");
    swatch.className = "swatch";
    swatch.style.background = page.colors[index];
    const name = row.insertCell();
    name.append(swatch, page.classes[index]);
    const value = row.insertCell();
    value.className = "number";
    value.textContent = `${(100 * share).toFixed(1)} %`;
  }
  const most = weights.reduce((a, b) => Math.max(a, b)) * count;
  const foot = document.createElement("p");
  foot.className = "note";
  foot.textContent = `The strongest cell has ${most.toFixed(1)} times the mean weight.`;
  readout.append(head, table, foot);
}

// Colours of "inferno" of matplotlib, evenly spaced, and the 256 between them.
const STOPS = [
  [0, 0, 4], [33, 12, 74], [87, 16, 110], [138, 34, 106], [188, 55, 84],
  [227, 89, 51], [249, 140, 10], [249, 201, 50], [252, 255, 164],
];
const INFERNO = Array.from({ length: 256 }, (_, value) => {
  const place = (value / 255) * (STOPS.length - 1);
  const below = Math.min(Math.floor(place), STOPS.length - 2);
  return STOPS[below].map((low, c) => low + (place - below) * (STOPS[below + 1][c] - low));
});

function layerOf(pixels) {
  const layer = document.createElement("canvas");
  layer.width = pixels.width;
  layer.height = pixels.height;
  layer.getContext("2d").putImageData(pixels, 0, 0);
  return layer;
}

// The pixels of an image at the size of the picture, or of eight a cell if that is less.
function pixelsOf(image, picture) {
  const layer = document.createElement("canvas");
  layer.width = Math.min(picture.width, 8 * picture.columns);
  layer.height = Math.min(picture.height, 8 * picture.rows);
  const context = layer.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0, layer.width, layer.height);
  return context.getImageData(0, 0, layer.width, layer.height);
}

// The picture with half of its colour, dimmed: what the heat is drawn over.
function dimmed(picture) {
  const { data } = pixelsOf(picture.shown, picture);
  for (let i = 0; i < data.length; i += 4) {
    const grey = 0.299 * data[i] + 0.587 * data[i + 1] + 0.114 * data[i + 2];
    for (let c = 0; c < 3; c++) data[i + c] = 0.35 * (data[i + c] + grey);
  }
  return data;
}

// Weights up to the mean show the picture alone; the root lets small ones be seen, too.
function strengths(weights) {
  const mean = 1 / weights.length;
  const top = Math.max(weights.reduce((a, b) => Math.max(a, b)) - mean, 1e-12);
  return Array.from(weights, (weight) => Math.sqrt(Math.max(weight - mean, 0) / top));
}

function draw(picture, x, y, weights) {
  const { width, rows, columns } = picture;
  const scale = canvas.width / width;
  const cells = new ImageData(columns, rows);
  strengths(weights).forEach((strength, j) => {
    cells.data.set([255 * strength, 0, 0, 255], 4 * j);
  });
  const heat = pixelsOf(layerOf(cells), picture);
  for (let i = 0; i < heat.data.length; i += 4) {
    const value = heat.data[i];
    const rest = 1 - value / 255;
    const color = INFERNO[value];
    for (let c = 0; c < 3; c++) heat.data[i + c] = color[c] + rest * picture.dimmed[i + c];
  }
  ink.drawImage(layerOf(heat), 0, 0, canvas.width, canvas.height);
  const dot = canvas.width / (canvas.clientWidth || canvas.width); // a pixel of the screen
  const [left, top] = [(x + 0.5) * scale, (y + 0.5) * scale];
  const cross = () => {
    ink.beginPath();
    ink.moveTo(left - 8 * dot, top);
    ink.lineTo(left + 8 * dot, top);
    ink.moveTo(left, top - 8 * dot);
    ink.lineTo(left, top + 8 * dot);
    ink.stroke();
  };
  ink.lineWidth = 4 * dot;
  ink.strokeStyle = "#000";
  cross();
  ink.lineWidth = 1.5 * dot;
  ink.strokeStyle = "#fff";
  cross();
}

function point(x, y) {
  const picture = page.pictures[viewer.number];
  viewer.x = Math.min(Math.max(Math.floor(x), 0), picture.width - 1);
  viewer.y = Math.min(Math.max(Math.floor(y), 0), picture.height - 1);
  const row = Math.floor((viewer.y * picture.rows) / picture.height);
  const column = Math.floor((viewer.x * picture.columns) / picture.width);
  const cell = row * picture.columns + column;
  if (cell !== viewer.cell) {
    viewer.cell = cell;
    viewer.weights = attend(picture, cell);
  }
  draw(picture, viewer.x, viewer.y, viewer.weights);
  describe(picture, viewer.x, viewer.y, viewer.weights);
}

async function choose(number) {
  const picture = page.pictures[number];
  if (!picture.shown) {
    picture.queries = floats(picture.queries);
    picture.keys = floats(picture.keys);
    picture.cells = classesOf(picture.cells);
    picture.shown = new Image();
    picture.shown.src = picture.image;
  }
  viewer.wanted = number;
  await picture.shown.decode?.(); // a canvas, in the page of an exported network, needs none
  if (viewer.wanted !== number) return; // another one was chosen meanwhile
  picture.dimmed = picture.dimmed || dimmed(picture);
  viewer.number = number;
  viewer.cell = -1;
  const scale = Math.max(1, Math.ceil(960 / picture.width));
  canvas.width = picture.width * scale;
  canvas.height = picture.height * scale;
  ink.imageSmoothingQuality = "high";
  const buttons = document.querySelectorAll("#choices button");
  buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(i === number)));
  point(...picture.start);
}

function follow(event) {
  if (viewer.number < 0) return; // the first picture is still being decoded
  const picture = page.pictures[viewer.number];
  const box = canvas.getBoundingClientRect();
  point(
    ((event.clientX - box.left) / box.width) * picture.width,
    ((event.clientY - box.top) / box.height) * picture.height,
  );
}

// A finger sends no moves before it touches, and a tap sends none at all.
for (const kind of ["pointerdown", "pointermove"]) canvas.addEventListener(kind, follow);
canvas.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  if (viewer.number < 0 || !(event.key in step)) return;
  event.preventDefault();
  const picture = page.pictures[viewer.number];
  const [dx, dy] = step[event.key];
  point(
    viewer.x + (dx * picture.width) / picture.columns,
    viewer.y + (dy * picture.height) / picture.rows,
  );
});
page.pictures.forEach((picture, number) => {
  const button = document.createElement("button");
  button.title = picture.name;
  button.type = "button";
  const image = document.createElement("img");
  image.src = picture.image;
  image.alt = picture.name;
  button.append(image);
  button.addEventListener("click", () => choose(number));
  document.getElementById("choices").append(button);
});
// The first picture with a class that was asked for, if there is one. The page of an exported
// network begins without any.
const first = Math.max(0, page.pictures.findIndex((picture) => picture.wanted));
if (page.pictures.length) choose(first);
