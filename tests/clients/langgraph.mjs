// LangGraph's own client for JavaScript. What it has seen is said in one line per command, in the same words that the
// Python client's side of test_langgraph_clients.py uses.

import { Client } from "@langchain/langgraph-sdk";
import { listen, say } from "./driver.mjs";

const clients = new Map();

function clientOf(url) {
  if (!clients.has(url)) clients.set(url, new Client({ apiUrl: `${url}/langgraph`, apiKey: null }));
  return clients.get(url);
}

function problem(error) {
  return { name: error.name, status: error.status ?? null, message: error.message };
}

let go;

// Reads a stream until it ends, or until something that says `enough` has come; `pause` is waited for behind the first
// event.
async function read({ url, of, method, args, options, enough, pause }) {
  const stop = new AbortController();
  const seen = { events: [], run: null, error: null };
  const onRunCreated = (run) => (seen.run = run.run_id);
  try {
    const stream = clientOf(url)[of][method](...args, { ...options, signal: stop.signal, onRunCreated });
    for await (const { event, data, id } of stream) {
      seen.events.push([event, data, id ?? null]);
      if (enough && JSON.stringify(data).includes(enough)) stop.abort();
      await pause;
    }
  } catch (error) {
    seen.error = problem(error);
  }
  return seen;
}

listen({
  // Anything that is no stream.
  async call({ url, of, method, args, options }) {
    try {
      const more = Object.keys(options).length ? [options] : [];
      return { value: (await clientOf(url)[of][method](...args, ...more)) ?? null, error: null };
    } catch (error) {
      return { value: null, error: problem(error) };
    }
  },

  read,

  // Several streams side by side.
  many: ({ several }) => Promise.all(several.map(read)),

  // A stream that is not read for a while: what is said first tells that it has begun.
  async slow(command) {
    const pause = new Promise((resolve) => (go = resolve));
    say("begun");
    return await read({ ...command, pause });
  },

  go() {
    go();
  },
});
