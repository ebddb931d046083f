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
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
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
  const lines = [...shares].sort((a, b) => b[1] - a[1]).slice(0, 6);
  readout.replaceChildren();
  const head = document.createElement("p");
  head.textContent = `Pixel (${x}, ${y}), predicted as ${own}, attends to`;
  const table = document.createElement("table");
  for (const [index, share] of lines) {
    const row = table.insertRow();
    const swatch = document.createElement("span");
    swatch.className = "swatch";
    swatch.style.background = `rgb(${page.palette[index]})`;
    const name = row.insertCell();
    name.append(swatch, page.classes[index]);
    const value = row.insertCell();
    value.className = "number";
    value.textContent = `${(100 * share).toFixed(1)} %`;
  }
  const most = Math.max(...weights) * count;
  const foot = document.createElement("p");
  foot.className = "note";
  foot.textContent = `The strongest cell has ${most.toFixed(1)} times the mean weight.`;
  readout.append(head, table, foot);
}

function draw(picture, x, y, weights) {
  const { width, height, rows, columns } = picture;
  const scale = canvas.width / width;
  ink.imageSmoothingEnabled = false;
  ink.drawImage(picture.shown, 0, 0, canvas.width, canvas.height);
  const heat = new ImageData(columns, rows);
  const top = Math.max(...weights);
  for (let j = 0; j < weights.length; j++) {
    const strength = Math.sqrt(weights[j] / top); // so that small shares can be seen, too
    heat.data.set([255, 60, 0, Math.round(230 * strength)], 4 * j);
  }
  const layer = document.createElement("canvas");
  layer.width = columns;
  layer.height = rows;
  layer.getContext("2d").putImageData(heat, 0, 0);
  ink.fillStyle = "rgba(255, 255, 255, 0.35)";
  ink.fillRect(0, 0, canvas.width, canvas.height);
  ink.imageSmoothingEnabled = true;
  ink.drawImage(layer, 0, 0, canvas.width, canvas.height);
  ink.lineWidth = 3;
  ink.strokeStyle = "#fff";
  const cross = () => {
    ink.beginPath();
    ink.moveTo((x + 0.5) * scale - 9, (y + 0.5) * scale);
    ink.lineTo((x + 0.5) * scale + 9, (y + 0.5) * scale);
    ink.moveTo((x + 0.5) * scale, (y + 0.5) * scale - 9);
    ink.lineTo((x + 0.5) * scale, (y + 0.5) * scale + 9);
    ink.stroke();
  };
  cross();
  ink.lineWidth = 1.5;
  ink.strokeStyle = "#111";
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
  await picture.shown.decode?.(); // the page of an exported network has a canvas here
  if (viewer.wanted !== number) return; // another one was chosen meanwhile
  viewer.number = number;
  viewer.cell = -1;
  const scale = Math.max(1, Math.ceil(960 / picture.width));
  canvas.width = picture.width * scale;
  canvas.height = picture.height * scale;
  const buttons = document.querySelectorAll("#choices button");
  buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(i === number)));
  point(...picture.start);
}

canvas.addEventListener("pointermove", (event) => {
  if (viewer.number < 0) return; // the first picture is still being decoded
  const picture = page.pictures[viewer.number];
  const box = canvas.getBoundingClientRect();
  point(
    ((event.clientX - box.left) / box.width) * picture.width,
    ((event.clientY - box.top) / box.height) * picture.height,
  );
});
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
if (page.pictures.length) choose(0);
