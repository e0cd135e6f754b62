// Server-sent events to steps, and the figures over them. No page in here, so that it runs anywhere.

/** Splits text that arrives in pieces into the payloads of `data:` lines. */
export class EventReader {
  #rest = "";

  push(text) {
    const lines = (this.#rest + text).split("\n");
    this.#rest = lines.pop();
    return lines.filter((line) => line.startsWith("data: ")).map((line) => line.slice(6).trimEnd());
  }
}

/** What one chunk of either endpoint says: text, accepted tokens, and whether it is the last. */
export function readStep(payload) {
  const chunk = JSON.parse(payload);
  if (chunk.error) throw new Error(chunk.error.message);
  const [choice] = chunk.choices;
  return { text: choice.text ?? choice.delta.content ?? "", accepted: choice.accepted, end: choice.finish_reason };
}

/** Tokens, steps and speed of a response while it comes. Speed counts from the first chunk on. */
export class Figures {
  tokens = 0;
  steps = 0;
  #first = null;
  #before = 0;
  #last = 0;

  add(accepted, milliseconds) {
    if (this.#first === null) {
      this.#first = milliseconds;
      this.#before = accepted;
    }
    this.tokens += accepted;
    this.steps += 1;
    this.#last = milliseconds;
  }

  get tokensPerForward() {
    return this.steps ? this.tokens / this.steps : 0;
  }

  get tokensPerSecond() {
    const seconds = (this.#last - this.#first) / 1000;
    return seconds > 0 ? (this.tokens - this.#before) / seconds : 0;
  }
}

/** The colour class of a step: powers of two. */
export function colour(accepted) {
  return ["a1", "a2", "a4", "a8"][Math.ceil(Math.log2(Math.max(1, accepted)))] ?? "a16";
}
