// EventSource as npm has it. What `client` makes is the same for a page: see browser.mjs.

import { execFileSync } from "node:child_process";
import { EventSource } from "eventsource";
import { listen, say } from "./driver.mjs";

// What a program with an EventSource does. Its text goes into pages: it knows only what it is given, and what
// both worlds have. Each line that it tells has the name of what was asked for.
export function client(EventSource, tell, block) {
  const sources = new Map();
  const commands = {
    follow({ name, url, types, until, keeps }) {
      const source = new EventSource(url);
      sources.set(name, source);
      // A page that is left may be kept as it is, its connections too, in case that somebody comes back to it.
      if (!keeps) globalThis.addEventListener?.("pagehide", () => source.close());
      source.onopen = () => tell({ name, state: "open" });
      source.onerror = () => tell({ name, state: source.readyState === 2 ? "stopped" : "lost" });
      for (const type of types) {
        source.addEventListener(type, ({ lastEventId, data }) => {
          tell({ name, seen: { id: lastEventId, event: type, data } });
          if (until.includes(type)) commands.close({ name });
        });
      }
    },
    close({ name }) {
      sources.get(name).close();
      tell({ name, state: "closed" });
    },
    closeAll() {
      for (const source of sources.values()) source.close();
      sources.clear();
    },
    async post({ name, url, body }) {
      try {
        const answer = await fetch(url, {
          method: "POST",
          headers: { "Content-Type": "application/json" },
          body: JSON.stringify(body),
        });
        const location = answer.headers.get("Location");
        tell({ name, answer: { status: answer.status, body: await answer.json(), location } });
      } catch (error) {
        tell({ name, answer: { status: 0, body: String(error), location: null } });
      }
    },
    block({ name, url }) {
      block(url);
      tell({ name, answer: null });
    },
  };
  return commands;
}

if (process.argv[2] === "listen") {
  // The one thread that there is waits for an answer.
  const block = (url) => execFileSync("curl", ["-sS", "--noproxy", "*", url]);
  const commands = client(EventSource, say, block);
  listen({
    ...commands,
    reset({ name }) {
      commands.closeAll();
      say({ name, answer: null });
    },
  });
}
