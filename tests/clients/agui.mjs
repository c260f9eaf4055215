// Drives the AG-UI client: its package is the argument, for there are versions of it.
//
// An agent of the client is a conversation: it is kept under the name that commands give it. What the
// client complains about goes into what is said of a run, for neither version may find anything odd.

import { listen } from "./driver.mjs";

const { HttpAgent } = await import(process.argv[2]);

const agents = new Map();
let complaints = [];
let unhandled = [];

console.warn = (...words) => complaints.push(words.join(" "));
console.error = () => {}; // what fails is told by the promise
// A socket that is cut makes both versions reject twice, once where nobody can catch it.
process.on("unhandledRejection", (error) => unhandled.push(String(error?.message ?? error)));

function agentOf({ name, url, state }) {
  if (!agents.has(name)) agents.set(name, new HttpAgent({ url, threadId: name, initialState: state }));
  const agent = agents.get(name);
  agent.url = url;
  return agent;
}

// Runs once. `stopAt` is the type of event at which the user has seen enough.
async function run(command) {
  const { name, text, answers, runId, tools, context, forwardedProps, resume, stopAt } = command;
  const agent = agentOf(command);
  const add = (message) => agent.messages.push({ id: crypto.randomUUID(), ...message });
  for (const [toolCallId, content] of Object.entries(answers ?? {})) add({ role: "tool", toolCallId, content });
  if (text !== undefined) add({ role: "user", content: text });
  const seen = { name, types: [], custom: [], steps: [] };
  complaints = [];
  unhandled = [];
  const subscriber = {
    onEvent({ event }) {
      seen.types.push(event.type);
      if (event.type === "CUSTOM") seen.custom.push([event.name, event.value]);
      if (event.type === stopAt) agent.abortRun();
    },
    onRunStartedEvent({ event }) {
      seen.runId = event.runId;
    },
    onStepStartedEvent({ event }) {
      seen.steps.push(event.stepName);
    },
    onRunFinishedEvent({ event, outcome, pendingToolCallIds }) {
      Object.assign(seen, { outcome, pending: pendingToolCallIds, usage: event.usage, metadata: event.metadata });
    },
    onRunErrorEvent({ event }) {
      seen.failure = { message: event.message, code: event.code };
    },
  };
  try {
    const { result } = await agent.runAgent({ runId, tools, context, forwardedProps, resume }, subscriber);
    seen.result = result;
  } catch (error) {
    seen.error = String(error?.message ?? error);
    seen.status = error?.status;
    seen.payload = error?.payload;
  }
  await new Promise((resolve) => setTimeout(resolve, command.lingers ?? 0)); // what is unhandled comes later
  return {
    ...seen,
    messages: agent.messages,
    state: agent.state,
    interrupts: agent.pendingInterrupts,
    complaints,
    unhandled,
  };
}

// Runs many conversations at once; what each was told.
async function many({ count, ...command }) {
  const runs = Array.from({ length: count }, (_, n) =>
    run({ ...command, name: `${command.name}-${n}`, text: `${command.text} ${n}` }),
  );
  const done = await Promise.all(runs);
  return done.map((seen) => [seen.outcome, seen.messages.at(-1).content]);
}

listen({ run, many });
