// The same relay with Node's own `http`: an agent that keeps connections, a write per token.
//
// `POST /run` with `{"input": ...}` asks the model API, whose base URL is the argument, and streams
// what it says: an event of JSON per token, and one at the end. Prints its address as a JSON line.
// Run as `node relay_node.mjs URL`.

import http from "node:http";

const target = new URL(process.argv[2] + "/chat/completions");
const agent = new http.Agent({ keepAlive: true, maxSockets: Infinity });

function relay(input, response) {
  const body = JSON.stringify({
    model: "m",
    messages: [{ role: "user", content: input }],
    stream: true,
  });
  const headers = { "Content-Type": "application/json", "Content-Length": Buffer.byteLength(body) };
  const request = http.request(target, { method: "POST", agent, headers }, (upstream) => {
    if (upstream.statusCode !== 200) {
      upstream.resume();
      response.writeHead(502).end();
      return;
    }
    response.writeHead(200, { "Content-Type": "text/event-stream", "Cache-Control": "no-store" });
    let rest = "";
    let seq = 0;
    let reason = null;
    upstream.setEncoding("utf8");
    upstream.on("data", (received) => {
      const frames = (rest + received).split("\n\n");
      rest = frames.pop();
      for (const frame of frames) {
        if (!frame.startsWith("data: ") || frame === "data: [DONE]") continue;
        const choice = JSON.parse(frame.slice(6)).choices[0];
        reason = choice.finish_reason ?? reason;
        const delta = choice.delta.content;
        if (delta) {
          seq += 1;
          response.write(`data: ${JSON.stringify({ type: "delta", seq, delta })}\n\n`);
        }
      }
    });
    upstream.on("end", () => {
      if (reason === null) response.destroy();
      else response.end('data: {"type":"end"}\n\n');
    });
    upstream.on("error", () => response.destroy());
    response.on("close", () => upstream.destroy());
  });
  request.on("error", () => {
    if (response.headersSent) response.destroy();
    else response.writeHead(502).end();
  });
  request.end(body);
}

const server = http.createServer((request, response) => {
  let body = "";
  request.setEncoding("utf8");
  request.on("data", (received) => (body += received));
  request.on("end", () => relay(JSON.parse(body).input, response));
});

server.listen({ host: "127.0.0.1", port: 0, backlog: 4096 }, () => {
  const { address, port } = server.address();
  console.log(JSON.stringify({ host: address, port }));
});
