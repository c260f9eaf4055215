// What the drivers share: commands come as lines of JSON, and what was seen goes out as lines of JSON.

import { createInterface } from "node:readline";

export function say(value) {
  process.stdout.write(JSON.stringify(value) + "\n");
}

// Calls `commands[command.do](command)` for each line; what it returns, if anything, is said, and what it
// throws is said as `{error}`. Commands run side by side: a stop has to overtake what it stops.
export function listen(commands) {
  createInterface({ input: process.stdin, crlfDelay: Infinity }).on("line", async (line) => {
    const command = JSON.parse(line);
    try {
      const seen = await commands[command.do](command);
      if (seen !== undefined) say(seen);
    } catch (error) {
      say({ error: String(error?.message ?? error), name: error?.name });
    }
  });
}
