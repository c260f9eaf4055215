// Vercel's AI SDK, versions 6 and 7 side by side: chats as `useChat` has them, without React.

import * as ai6 from "ai6";
import * as ai7 from "ai";
import { listen } from "./driver.mjs";

const SDKS = { 6: ai6, 7: ai7 };
const chats = new Map();

class State {
  constructor(messages) {
    Object.assign(this, { messages, status: "ready", error: undefined });
  }
  pushMessage = (message) => (this.messages = [...this.messages, structuredClone(message)]);
  popMessage = () => (this.messages = this.messages.slice(0, -1));
  replaceMessage = (index, message) =>
    (this.messages = this.messages.with(index, structuredClone(message)));
  snapshot = (thing) => structuredClone(thing);
}

// A response whose body is not read before `gate`: what has come waits in the socket.
function heldBack(response, gate) {
  const reader = response.body.getReader();
  const body = new ReadableStream(
    {
      async pull(controller) {
        await gate;
        const { done, value } = await reader.read();
        if (done) controller.close();
        else controller.enqueue(value);
      },
      cancel: (reason) => reader.cancel(reason),
    },
    { highWaterMark: 0 },
  );
  return new Response(body, { status: response.status, headers: response.headers });
}

// What is known of a chat that is open, and the chat itself.
function open({ version, chat: id, url, messages = [], auto, body, outputs = {}, held = false }) {
  const sdk = SDKS[version];
  const entry = { id, version, finishes: [], data: [], calls: [], headers: [], statuses: [], waiting: [] };
  const gate = held ? new Promise((resolve) => (entry.release = resolve)) : undefined;
  const when = {
    tools: sdk.lastAssistantMessageIsCompleteWithToolCalls,
    approvals: sdk.lastAssistantMessageIsCompleteWithApprovalResponses,
  };
  class Chat extends sdk.AbstractChat {
    constructor() {
      super({
        id,
        state: new State(messages),
        transport: new sdk.DefaultChatTransport({
          api: `${url}/api/chat`,
          body,
          fetch: async (...args) => {
            const response = await fetch(...args);
            entry.statuses.push(response.status);
            entry.headers.push(Object.fromEntries(response.headers));
            return gate && response.body ? heldBack(response, gate) : response;
          },
        }),
        sendAutomaticallyWhen: auto && ((seen) => auto.some((name) => when[name](seen))),
        onToolCall: ({ toolCall }) => {
          entry.calls.push(toolCall.toolName);
          if (toolCall.toolName in outputs) {
            const { toolName: tool, toolCallId } = toolCall;
            this.addToolOutput({ tool, toolCallId, output: outputs[tool] });
          }
        },
        onData: (part) => entry.data.push(part),
        onFinish: ({ isAbort, isDisconnect, isError, finishReason }) => {
          entry.finishes.push({ isAbort, isDisconnect, isError, finishReason });
          for (const wake of entry.waiting.splice(0)) wake();
        },
      });
    }
  }
  entry.chat = new Chat();
  chats.set(id, entry);
}

function view({ chat: id }) {
  const { chat, waiting, release, ...seen } = chats.get(id);
  const { status, messages } = chat;
  return { ...seen, status, messages, error: chat.error?.message ?? null };
}

const acting = (act) => async (command) => {
  await act(chats.get(command.chat).chat, command);
  return view(command);
};

listen({
  open,
  view,
  send: acting((chat, { text, ...more }) =>
    chat.sendMessage(text === undefined ? undefined : { text, ...more }),
  ),
  regenerate: acting((chat) => chat.regenerate()),
  resume: acting((chat) => chat.resumeStream()),
  stop: acting((chat) => chat.stop()),
  approve: acting((chat, { id, approved }) => chat.addToolApprovalResponse({ id, approved })),
  output: acting((chat, { tool, id, output, errorText }) =>
    chat.addToolOutput({
      tool,
      toolCallId: id,
      ...(errorText === undefined ? { output } : { state: "output-error", errorText }),
    }),
  ),
  // Answers once that many responses have come to their end.
  async finished(command) {
    const entry = chats.get(command.chat);
    while (entry.finishes.length < command.count) {
      await new Promise((resolve) => entry.waiting.push(resolve));
    }
    await new Promise((resolve) => setTimeout(resolve));
    return view(command);
  },
  release: ({ chat }) => chats.get(chat).release(),
});
