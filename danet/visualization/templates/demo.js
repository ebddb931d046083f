// Segments the visitor's pictures. viewer.js, which is there if the network has position
// attention, draws what a pixel attends to; its `page`, `choose` and `point` are used here.
const facts = JSON.parse(document.getElementById("viewer-data").textContent);
const element = Object.fromEntries(
  [...document.querySelectorAll("[id]")].map((node) => [node.id, node]),
);
// At most this many pixels, or those of a training crop, and logits of 256 MiB.
const [rows, columns] = facts.crop || [0, 0];
const mostPixels = Math.min(Math.max(2 ** 18, rows * columns), 2 ** 26 / facts.classes.length);
const colors = facts.palette.map((rgb, index) =>
  facts.untinted.includes(index) ? "transparent" : `rgb(${rgb})`,
);
if (typeof page !== "undefined") page.colors = colors;
const worker = new Worker("demo_worker.js", { type: "module" });
let waiting = null; // for the answer of the worker
let answered = Promise.resolve(); // when it is free
const demo = { picture: null }; // what is shown: its pixels, classes, perhaps queries and keys
window.demo = demo;
let latest = 0; // number of the picture that was asked for last

function say(text, isError = false) {
  element.status.textContent = text;
  element.status.className = isError ? "error" : "";
}

function ask(message, transfer = []) {
  const asked = () =>
    new Promise((resolve, reject) => {
      waiting = { resolve, reject };
      worker.postMessage(message, transfer);
    });
  answered = answered.then(asked, asked);
  return answered;
}

worker.onmessage = ({ data }) => {
  if (data.loaded) {
    const share = Math.min(100, Math.round((100 * data.loaded) / data.total));
    say(`Loading the network: ${share} % of ${(data.total / 2 ** 20).toFixed(0)} MiB`);
  } else if (data.problem) waiting.reject(new Error(data.problem));
  else waiting.resolve(data.result);
};
worker.onerror = (event) => {
  const reason = event.message || "a file of it is missing, or the browser is too old";
  waiting?.reject(new Error(`The program could not be started: ${reason}`));
};

// danet.predict takes pixels as they are stored, and so does this page: a browser turns a picture
// by the tag that begins with these bytes, so they are overwritten.
function withoutTurn(bytes) {
  for (let i = 0; i < Math.min(bytes.length, 2 ** 18) - 6; i++) {
    if (String.fromCharCode(...bytes.subarray(i, i + 6)) === "Exif\0\0") bytes[i] = 0;
  }
  return bytes;
}

async function decode(blob) {
  const bytes = withoutTurn(new Uint8Array(await blob.arrayBuffer()));
  const plain = new Blob([bytes], { type: blob.type });
  const options = { premultiplyAlpha: "none", colorSpaceConversion: "none" };
  let bitmap = await createImageBitmap(plain, options).catch(() => {
    throw new Error("This is not a picture that the browser can read.");
  });
  const { width, height } = bitmap;
  const factor = Math.min(1, Math.sqrt(mostPixels / (width * height)));
  if (factor < 1) {
    const size = [width, height].map((side) => Math.max(1, Math.floor(side * factor)));
    const resized = { resizeWidth: size[0], resizeHeight: size[1], resizeQuality: "high" };
    bitmap = await createImageBitmap(bitmap, { ...options, ...resized });
  }
  if (Math.min(bitmap.width, bitmap.height) < facts.smallest) {
    throw new Error(`The picture has ${width} x ${height} pixels; too narrow for this network.`);
  }
  const note = factor < 1 ? ` Made smaller: ${width} x ${height} became ${bitmap.width} x ${bitmap.height}.` : "";
  return { pixels: pixelsOf(bitmap), note };
}

// As danet.predict, which drops alpha: a canvas multiplies colours by it, WebGL does not.
function pixelsOf(bitmap) {
  const { width, height } = bitmap;
  const ink = new OffscreenCanvas(width, height).getContext("2d");
  ink.drawImage(bitmap, 0, 0);
  const pixels = ink.getImageData(0, 0, width, height);
  let isOpaque = true;
  for (let i = 3; i < pixels.data.length; i += 4) {
    isOpaque &&= pixels.data[i] === 255;
    pixels.data[i] = 255;
  }
  const gl = isOpaque ? null : new OffscreenCanvas(1, 1).getContext("webgl");
  if (!gl || Math.max(width, height) > gl.getParameter(gl.MAX_TEXTURE_SIZE)) return pixels;
  gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
  gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, gl.RGBA, gl.UNSIGNED_BYTE, bitmap);
  gl.bindFramebuffer(gl.FRAMEBUFFER, gl.createFramebuffer());
  const texture = gl.getParameter(gl.TEXTURE_BINDING_2D);
  gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, texture, 0);
  const read = new Uint8Array(pixels.data.length);
  gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, read);
  for (let i = 3; i < read.length; i += 4) read[i] = 255;
  pixels.data.set(read);
  return pixels;
}

function turned({ data, width, height }) {
  const result = new ImageData(height, width);
  const [from, to] = [new Uint32Array(data.buffer), new Uint32Array(result.data.buffer)];
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) to[x * height + height - 1 - y] = from[y * width + x];
  }
  return result;
}

function planes({ data }) {
  const count = data.length / 4;
  const image = new Uint8Array(3 * count);
  for (let i = 0; i < count; i++) {
    for (let c = 0; c < 3; c++) image[c * count + i] = data[4 * i + c];
  }
  return image;
}

async function show({ pixels, note }) {
  const number = ++latest;
  const { width, height } = pixels;
  const image = planes(pixels);
  say("Computing ...");
  const found = await ask({ image, height, width }, [image.buffer]);
  if (number !== latest) return; // another picture was chosen meanwhile
  demo.picture = { pixels, width, height, note, ...found };
  element.result.hidden = false;
  element.result.classList.toggle("wide", width > 2 * height);
  element.here.textContent = "";
  drawClasses();
  fillLegend();
  if (found.keys) await showAttention();
  say(`${width} x ${height} pixels in ${found.seconds.toFixed(1)} s.${note}`);
}

function canvasOf(pixels) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [pixels.width, pixels.height];
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return canvas;
}

function drawClasses() {
  const { picture } = demo;
  const { pixels, classes, width, height } = picture;
  picture.image ??= canvasOf(pixels);
  if (!picture.colours) {
    const colours = new ImageData(width, height);
    classes.forEach((index, i) => {
      const alpha = facts.untinted.includes(index) ? 0 : 255;
      colours.data.set([...facts.palette[index], alpha], 4 * i);
    });
    picture.colours = canvasOf(colours);
  }
  const scale = Math.max(1, Math.ceil(960 / width));
  const canvas = element.classes;
  [canvas.width, canvas.height] = [width * scale, height * scale];
  const ink = canvas.getContext("2d");
  ink.imageSmoothingEnabled = false;
  ink.drawImage(picture.image, 0, 0, canvas.width, canvas.height);
  ink.globalAlpha = element.opacity.value;
  ink.drawImage(picture.colours, 0, 0, canvas.width, canvas.height);
}

function fillLegend() {
  const { picture } = demo;
  const counts = new Map();
  for (const index of picture.classes) counts.set(index, (counts.get(index) || 0) + 1);
  const lines = [...counts].sort((a, b) => b[1] - a[1]).map(([index, count]) => {
    const line = document.createElement("li");
    const [swatch, share] = [document.createElement("span"), document.createElement("span")];
    swatch.className = "swatch";
    swatch.style.background = colors[index];
    share.textContent = `${((100 * count) / picture.classes.length).toFixed(1)} %`;
    line.append(swatch, facts.classes[index], share);
    return line;
  });
  element.legend.replaceChildren(...lines);
  picture.counts = counts;
}

// The class in the middle of each cell of the head, and the cell to begin with: of the rarest
// class that fills 1/500 of the picture, the one nearest to their mean.
async function showAttention() {
  const { picture } = demo;
  const { width, height, rows, columns, classes, counts } = picture;
  const cells = new Uint16Array(rows * columns);
  const middle = (j) => [
    Math.floor((((j % columns) + 0.5) * width) / columns),
    Math.floor(((Math.floor(j / columns) + 0.5) * height) / rows),
  ];
  cells.forEach((_, j) => {
    const [x, y] = middle(j);
    cells[j] = classes[y * width + x];
  });
  const seen = [...counts].filter(([index, n]) => n >= classes.length / 500 && cells.includes(index));
  const rarest = seen.sort((a, b) => a[1] - b[1])[0][0];
  const own = [...cells.keys()].filter((j) => cells[j] === rarest).map(middle);
  const mean = [0, 1].map((axis) => own.reduce((sum, at) => sum + at[axis], 0) / own.length);
  const far = ([x, y]) => (x - mean[0]) ** 2 + (y - mean[1]) ** 2;
  const start = own.sort((a, b) => far(a) - far(b))[0];
  page.pictures = [{ ...picture, cells, start, shown: picture.image }];
  await choose(0);
}

async function open(source) {
  const number = ++latest;
  try {
    await ready;
    const decoded = await decode(await source());
    if (number === latest) await show(decoded);
  } catch (error) {
    say(error.message, true);
  }
}

async function fetched(name) {
  const answer = await fetch(name);
  if (!answer.ok) throw new Error(`There is no ${name} beside this page.`);
  return answer.blob();
}

function pointed(event) {
  const { picture } = demo;
  const box = element.classes.getBoundingClientRect();
  const x = Math.floor(((event.clientX - box.left) / box.width) * picture.width);
  const y = Math.floor(((event.clientY - box.top) / box.height) * picture.height);
  const index = picture.classes[y * picture.width + x];
  if (index === undefined) return;
  element.here.textContent = `Pixel (${x}, ${y}): ${facts.classes[index]}`;
  if (picture.keys) point(x, y);
}

const prevent = (event) => event.preventDefault();
element.file.addEventListener("change", ({ target }) => {
  const [file] = target.files;
  if (file) open(async () => file);
  target.value = ""; // so that the same file can be chosen once more
});
for (const button of document.querySelectorAll(".example")) {
  button.addEventListener("click", () => open(() => fetched(button.dataset.picture)));
}
for (const name of ["dragover", "dragleave", "drop"]) {
  addEventListener(name, (event) => {
    prevent(event);
    document.body.classList.toggle("over", name === "dragover");
  });
}
addEventListener("drop", ({ dataTransfer }) => {
  const [file] = dataTransfer.files;
  if (file) open(async () => file);
});
addEventListener("paste", ({ clipboardData }) => {
  const [file] = clipboardData.files;
  if (file) open(async () => file);
});
element.opacity.addEventListener("input", drawClasses);
element.turn.addEventListener("click", () => {
  const { pixels, note } = demo.picture;
  show({ pixels: turned(pixels), note }).catch((error) => say(error.message, true));
});
for (const name of ["pointermove", "pointerdown"]) element.classes.addEventListener(name, pointed);

say("Loading the network ...");
const ready = ask({ names: facts.files });
ready.then(
  () => latest || say("Ready: choose a picture."),
  (error) => say(error.message, true),
);
const wanted = new URLSearchParams(location.search); // ?picture=example_1.png&pixel=120,40
const first = wanted.get("picture") || document.querySelector(".example")?.dataset.picture;
if (first) {
  await open(() => fetched(first));
  const pixel = (wanted.get("pixel") || "").split(",").map(Number);
  if (pixel.length === 2 && demo.picture?.keys) point(...pixel);
}
