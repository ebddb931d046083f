// Runs the network, so that the page answers while it computes. Of one thread, since a plain
// server does not send the headers that a browser wants for more.
import * as ort from "./ort.wasm.bundle.min.mjs";

let session;

async function read(name, tell) {
  const answer = await fetch(name);
  if (!answer.ok) throw new Error(`${name}: the server answers ${answer.status}`);
  const reader = answer.body.getReader();
  const parts = [];
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return await new Blob(parts).arrayBuffer();
    parts.push(value);
    tell(value.length);
  }
}

async function load(names, total) {
  let loaded = 0;
  const tell = (length) => postMessage({ loaded: (loaded += length), total });
  const [runtime, network] = await Promise.all(names.map((name) => read(name, tell)));
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
    if (data.names) await load(data.names, data.total);
    postMessage({ result: data.names ? {} : await run(data.image, data.height, data.width) });
  } catch (error) {
    postMessage({ problem: String(error.message || error).split("\n")[0] });
  }
};
