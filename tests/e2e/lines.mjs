// JSON lines between a test and the client it drives: one order per line on standard input, one
// thing that happened per line on standard output. The process ends when its standard input does,
// so that no client outlives its test.
import { createInterface } from "node:readline";

export function emit(kind, fields = {}) {
  process.stdout.write(`${JSON.stringify({ kind, at_ms: Date.now(), ...fields })}\n`);
}

export function serve(orders) {
  const lines = createInterface({ input: process.stdin });
  lines.on("line", async (line) => {
    const { do: name, n, ...args } = JSON.parse(line);
    try {
      emit("answer", { n, ok: true, result: (await orders[name](args)) ?? null });
    } catch (error) {
      const message = String(error?.message ?? error);
      emit("answer", { n, ok: false, message, status: error?.status ?? null });
    }
  });
  lines.on("close", () => process.exit(0));
  emit("ready");
}
