// OpenAI's client for JavaScript, and its helpers, at the Responses API.

import OpenAI from "openai";
import { ResponseStream } from "openai/lib/responses/ResponseStream";
import { listen, say } from "./driver.mjs";

const connect = (url) => new OpenAI({ baseURL: `${url}/v1`, apiKey: "key", maxRetries: 0 });
const client = connect(process.argv[2]);
let resume = () => {};

function problem(error) {
  const { status = null, code = null, message } = error;
  return { name: error.constructor.name, status, code, message };
}

// A stream as each part of the client gives it; `find` tells of one that there is already.
const streams = {
  raw: ({ responses }, { create, find }) =>
    create
      ? responses.create({ ...create, stream: true })
      : responses.retrieve(find.id, { ...find.query, stream: true }),
  helper: ({ responses }, { create, find }) =>
    responses.stream(create ?? { response_id: find.id, ...find.query }),
  readable: async (client, wanted) =>
    ResponseStream.fromReadableStream((await streams.raw(client, wanted)).toReadableStream()),
};

// Reads a stream, `through` another server, perhaps, than the one that is there for all.
async function read({ how, through, stop_after, pause_after, ...wanted }) {
  const seen = { types: [], numbers: [], text: "", response: null, error: null };
  try {
    const stream = await streams[how](through ? connect(through) : client, wanted);
    for await (const event of stream) {
      seen.types.push(event.type);
      seen.numbers.push(event.sequence_number);
      if (event.type === "response.output_text.delta") seen.text += event.delta;
      if (event.response) seen.response = event.response;
      if (event.type === stop_after) {
        stream.controller.abort();
        return seen;
      }
      if (event.type === pause_after) {
        pause_after = undefined;
        const resumed = new Promise((resolve) => (resume = resolve));
        say({ paused: true });
        await resumed;
      }
    }
    if (how !== "raw") seen.response = await stream.finalResponse();
  } catch (error) {
    seen.error = problem(error);
  }
  return seen;
}

async function told(ask) {
  try {
    return { response: (await ask()) ?? null, error: null };
  } catch (error) {
    return { response: null, error: problem(error) };
  }
}

listen({
  read,
  resume() {
    resume();
  },
  create: ({ create, retries = 0 }) =>
    told(() => client.responses.create(create, { maxRetries: retries })),
  retrieve: ({ id }) => told(() => client.responses.retrieve(id)),
  cancel: ({ id }) => told(() => client.responses.cancel(id)),
  delete: ({ id }) => told(() => client.responses.delete(id)),
  input_items: ({ id }) => told(async () => (await client.responses.inputItems.list(id)).data),
  // A conversation that the client keeps by itself: all of it goes back.
  converse: ({ model, first, second }) =>
    told(async () => {
      const user = (content) => ({ role: "user", content });
      const { output } = await client.responses.create({ model, input: first });
      return client.responses.create({ model, input: [user(first), ...output, user(second)] });
    }),
  // A conversation that the server keeps, in which the client makes the calls.
  answer_calls: ({ create, outputs, filler }) =>
    told(async () => {
      const first = await client.responses.create(create);
      const calls = first.output.filter(({ type }) => type === "function_call");
      const input = calls.map(({ call_id, name }) => ({
        type: "function_call_output",
        call_id,
        output: outputs[name] + filler.repeat(100_000),
      }));
      const second = await client.responses.create({
        ...create,
        input,
        previous_response_id: first.id,
      });
      return { calls, second };
    }),
  many: ({ count }) =>
    Promise.all(
      Array.from({ length: count }, (_, i) =>
        read({ how: "helper", create: { model: "main", input: `I am ${i}` } }),
      ),
    ),
});
