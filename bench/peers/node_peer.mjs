// The contract on Node's own `http`: an async function, a write per event, and backpressure.
//
// A client that leaves closes the response; its 'close' event aborts a signal, which everything that
// waits is given. Run as `node node_peer.mjs`.

import { randomBytes } from "node:crypto";
import { once } from "node:events";
import http from "node:http";
import net from "node:net";
import { setTimeout as sleep } from "node:timers/promises";

const TEXT = "The quick brown fox jumps over the dog";

const counter = { started: 0, entered: 0, gone: 0, tasks: null };
const times = new Map();

const monotonic = () => process.hrtime.bigint(); // CLOCK_MONOTONIC, in nanoseconds

function orderOf(query) {
  return {
    events: Number(query.get("events")),
    gap: 1000 * Number(query.get("gap") ?? 0),
    hold: 1000 * Number(query.get("hold") ?? 0),
    key: query.get("key"),
    upstream: query.get("upstream"),
    stamp: query.get("stamp") === "1",
    runId: randomBytes(16).toString("base64url"),
  };
}

let formatted = { at: 0, text: "" };

// A time is formatted once per millisecond, as everywhere: that is not what is compared.
function moment() {
  const at = Date.now();
  if (at !== formatted.at) formatted = { at, text: new Date(at).toISOString() };
  return formatted.text;
}

function frame(order, n) {
  const event = {
    type: order.stamp ? "part_delta" : "custom",
    run_id: order.runId,
    seq: n,
    ts: moment(),
    ...(order.stamp
      ? { part_id: "p1", delta: `${monotonic()};` }
      : { name: "tick", value: { n, text: TEXT } }),
  };
  return `id: ${n}\nevent: ${event.type}\ndata: ${JSON.stringify(event)}\n\n`;
}

// `write` may return a promise, where whoever reads is slower than this.
async function agent(order, write, signal) {
  counter.started += 1;
  let upstream = null;
  try {
    if (order.upstream !== null) {
      upstream = net.connect({ host: "127.0.0.1", port: Number(order.upstream) });
      upstream.on("error", () => {}); // it may break off at any time
      await once(upstream, "connect", { signal });
      upstream.write(`${order.key ?? ""}\n`);
    }
    const start = performance.now();
    for (let n = 1; n <= order.events; n += 1) {
      const delay = start + (n - 1) * order.gap - performance.now();
      if (delay > 0) await sleep(delay, undefined, { signal });
      const full = write(frame(order, n));
      if (full) await full;
    }
    if (order.hold) await sleep(order.hold, undefined, { signal });
  } finally {
    counter.entered += 1;
    if (order.key !== null) times.set(order.key, [monotonic(), null]);
    if (upstream !== null) {
      upstream.destroy();
      if (!upstream.closed) await once(upstream, "close");
    }
    counter.gone += 1;
    if (order.key !== null) times.get(order.key)[1] = monotonic();
  }
}

function begin(response) {
  response.writeHead(200, { "Content-Type": "text/event-stream", "Cache-Control": "no-store" });
  response.flushHeaders();
}

async function run(query, response) {
  const leaving = new AbortController();
  const { signal } = leaving;
  response.on("close", () => leaving.abort());
  begin(response);
  const write = (data) => (response.write(data) ? null : once(response, "drain", { signal }));
  try {
    await agent(orderOf(query), write, signal);
    response.end();
  } catch (error) {
    if (error.name !== "AbortError") console.error(error);
    response.destroy(); // a stream that is not complete must not look so
  }
}

const readers = new Set();
let isProducing = false;

function startFan(query, response) {
  const order = { ...orderOf(query), stamp: true };
  const tell = (data) => {
    for (const reader of readers) reader.write(data);
  };
  isProducing = true;
  agent(order, tell, new AbortController().signal).finally(() => {
    isProducing = false;
    for (const reader of readers) reader.end();
  });
  answer(response, 202, { id: order.runId });
}

function watchFan(response) {
  begin(response);
  if (!isProducing) {
    response.end();
    return;
  }
  readers.add(response);
  response.on("close", () => readers.delete(response));
}

function showCounter(query, response) {
  const shown = { ...counter };
  if (query.has("times")) {
    shown.times = Object.fromEntries(
      [...times].map(([key, both]) => [key, both.map((at) => (at === null ? null : Number(at)))]),
    );
    for (const [key, both] of times) if (both[1] !== null) times.delete(key);
  }
  answer(response, 200, shown);
}

function answer(response, status, value) {
  response.writeHead(status, { "Content-Type": "application/json" }).end(JSON.stringify(value));
}

const server = http.createServer((request, response) => {
  const { pathname, searchParams } = new URL(request.url, "http://127.0.0.1");
  switch (`${request.method} ${pathname}`) {
    case "POST /run":
      return run(searchParams, response);
    case "POST /fan":
      return startFan(searchParams, response);
    case "GET /fan":
      return watchFan(response);
    case "GET /counter":
      return showCounter(searchParams, response);
    default:
      return answer(response, 404, null);
  }
});

server.listen({ host: "127.0.0.1", port: 0, backlog: 4096 }, () => {
  const { address, port } = server.address();
  console.log(JSON.stringify({ host: address, port }));
});
