// Chromium's own EventSource, in tabs that a test opens, blocks and closes. Its argument is the browser's path.

import { chromium } from "playwright-core";
import { listen, say } from "./driver.mjs";
import { client } from "./eventsource.mjs";

const browser = await chromium.launch({
  executablePath: process.argv[2],
  ignoreDefaultArgs: ["--disable-back-forward-cache"], // people's browsers have it
  args: [
    "--no-sandbox",
    "--no-proxy-server",
    "--host-resolver-rules=MAP somebody.test 127.0.0.1",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
  ],
});
// One context for all: a new one, with its tab, costs more than what most tests do in it.
const context = await browser.newContext();
await context.exposeBinding("tell", (_source, line) => say(line));
const tabs = new Map();

// The tab's thread waits for an answer from where the page came from.
const block = `(url) => {
  const request = new XMLHttpRequest();
  request.open("GET", url, false);
  request.send();
}`;

await context.addInitScript(`globalThis.client = (${client})(EventSource, (line) => tell(line), ${block})`);

async function inTab({ tab, ...command }) {
  await tabs.get(tab).evaluate((command) => globalThis.client[command.do](command), command);
}

listen({
  async visit({ name, tab, url }) {
    if (!tabs.has(tab)) tabs.set(tab, await context.newPage());
    await tabs.get(tab).goto(url);
    say({ name, answer: null });
  },
  follow: inTab,
  close: inTab,
  post: inTab,
  block: inTab,
  async back({ name, tab }) {
    await tabs.get(tab).evaluate(() => void setTimeout(() => history.back()));
    say({ name, answer: null });
  },
  async leave({ name, tab }) {
    await tabs.get(tab).close();
    tabs.delete(tab);
    say({ name, answer: null });
  },
  async reset({ name }) {
    for (const [tab, page] of tabs) {
      if (tab === "main") await inTab({ tab, do: "closeAll" });
      else await page.close();
    }
    for (const tab of tabs.keys()) if (tab !== "main") tabs.delete(tab);
    say({ name, answer: null });
  },
});

process.stdin.once("end", async () => {
  await browser.close();
  process.exit();
});
