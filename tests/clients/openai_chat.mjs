// OpenAI's own client for JavaScript, at its chat completions. What it has seen is said in one line per command, in
// the same words that the Python client's side of test_openai_chat_clients.py uses.

import OpenAI from "openai";
import { listen, say } from "./driver.mjs";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "key", maxRetries: 0 });
const completions = client.chat.completions;

function problem(error) {
  const { status = null, code = null, param = null, type = null, message, requestID = null } = error;
  return { name: error.constructor.name, status, code, param, type, message, request_id: requestID };
}

// Reads chunks until there are no more, or the client has had enough; `pause` is waited for behind the first text.
async function read(stream, { enough = Infinity, pause } = {}) {
  const seen = { id: null, text: "", reasoning: "", calls: [], reason: null, usage: null, error: null };
  try {
    for await (const chunk of stream) {
      seen.id = chunk.id;
      seen.usage = chunk.usage ?? seen.usage;
      const { delta, finish_reason } = chunk.choices[0] ?? { delta: {} };
      seen.text += delta.content ?? "";
      seen.reasoning += delta.reasoning_content ?? "";
      seen.reason = finish_reason ?? seen.reason;
      for (const { index, function: called } of delta.tool_calls ?? []) {
        const call = (seen.calls[index] ??= ["", ""]);
        call[0] += called.name ?? "";
        call[1] += called.arguments ?? "";
      }
      if (seen.text.length >= enough) {
        stream.controller.abort();
      }
      if (pause && seen.text) {
        await pause;
        pause = undefined;
      }
    }
  } catch (error) {
    seen.error = problem(error);
  }
  return seen;
}

async function caught(promise) {
  try {
    return await promise;
  } catch (error) {
    return { error: problem(error) };
  }
}

let go;

listen({
  // A completion without a stream.
  create: ({ params }) =>
    caught(
      completions.create(params).then(({ id, choices: [{ message, finish_reason }], usage }) => ({
        id,
        text: message.content,
        reasoning: message.reasoning_content ?? "",
        calls: (message.tool_calls ?? []).map(({ function: called }) => [called.name, called.arguments]),
        reason: finish_reason,
        usage,
        error: null,
      })),
    ),

  // A stream, chunk by chunk; with `enough` it is stopped behind so many characters.
  stream: ({ params, enough }) =>
    caught(completions.create({ ...params, stream: true }).then((stream) => read(stream, { enough }))),

  // A stream that is not read for a while: what is said first tells that it has begun.
  async slow({ params }) {
    const pause = new Promise((resolve) => (go = resolve));
    const stream = await completions.create({ ...params, stream: true });
    say("begun");
    return await read(stream, { pause });
  },

  go() {
    go();
  },

  // Several streams at once.
  many: ({ several }) =>
    Promise.all(
      several.map(async (params) => await read(await completions.create({ ...params, stream: true }))),
    ),

  // The helper that puts a stream together, and checks its order.
  helper: ({ params }) =>
    caught(
      completions
        .stream(params)
        .finalChatCompletion()
        .then(({ choices: [{ message, finish_reason }] }) => ({ text: message.content, reason: finish_reason })),
    ),

  // The helper that makes the calls which the model asks for: each answers with what it is to answer, and what it
  // was given is told.
  async tools({ params, answers }) {
    const made = [];
    const tools = params.tools.map((tool) => ({
      ...tool,
      function: {
        ...tool.function,
        parse: JSON.parse,
        function: (given) => {
          made.push([tool.function.name, given]);
          return answers[tool.function.name];
        },
      },
    }));
    const runner = completions.runTools({ ...params, tools });
    return await caught(runner.finalContent().then((text) => ({ text, made: made.sort() })));
  },

  async models({ wanted }) {
    const all = [];
    for await (const model of client.models.list()) all.push(model.id);
    const found = await client.models.retrieve(wanted);
    const missing = await caught(client.models.retrieve("nobody"));
    return { all, found: found.id, missing: missing.error };
  },
});
