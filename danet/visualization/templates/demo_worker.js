// Runs the network, so that the page answers while it computes. Of one thread, since a plain
// server does not send the headers that a browser wants for more.
import * as ort from "./ort.wasm.bundle.min.mjs";

let session;

async function read(names) {
  const answers = await Promise.all(names.map((name) => fetch(name)));
  const bad = answers.find((answer) => !answer.ok);
  if (bad) throw new Error(`${bad.url}: the server answers ${bad.status}`);
  const sizes = answers.map((answer) => Number(answer.headers.get("content-length")));
  const total = sizes.reduce((a, b) => a + b);
  let loaded = 0;
  const whole = async ({ body }) => {
    const [reader, parts] = [body.getReader(), []];
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return new Blob(parts).arrayBuffer();
      parts.push(value);
      loaded += value.length;
      postMessage({ loaded, total });
    }
  };
  return Promise.all(answers.map(whole));
}

async function load(names) {
  const [runtime, network] = await read(names);
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmBinary = runtime;
  const options = { executionProviders: ["wasm"] };
  session = await ort.InferenceSession.create(network, options);
}

async function run(image, height, width) {
  const start = performance.now();
  const found = await session.run({ image: new ort.Tensor("uint8", image, [1, 3, height, width]) });
  const seconds = (performance.now() - start) / 1000;
  const result = { classes: found.classes.data, seconds };
  if (found.keys) {
    const [, depth, rows, columns] = found.keys.dims;
    Object.assign(result, { queries: found.queries.data, keys: found.keys.data });
    Object.assign(result, { depth, rows, columns });
  }
  return result;
}

onmessage = async ({ data }) => {
  try {
    if (data.names) await load(data.names);
    postMessage({ result: data.names ? {} : await run(data.image, data.height, data.width) });
  } catch (error) {
    postMessage({ problem: String(error.message || error).split("\n")[0] });
  }
};
