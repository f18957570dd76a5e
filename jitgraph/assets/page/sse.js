// Reads a stream of events. Each turn gives what one read of the network brought, and when.

const BORDER = /\r?\n\r?\n/;

export async function* batches(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    const at = performance.now();
    rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
    const events = rest.split(BORDER);
    rest = events.pop();
    const data = events.map(dataOf).filter((one) => one !== "");
    if (data.length) yield { at, data };
    if (done) return;
  }
}

function dataOf(event) {
  return event
    .split(/\r?\n/)
    .filter((line) => line.startsWith("data:"))
    .map((line) => line.slice(5).trimStart())
    .join("\n");
}
