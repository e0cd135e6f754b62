// Server-sent events to steps, and what can be said of them. No page in here, so that it runs anywhere.

/** Splits text that arrives in pieces into the payloads of `data:` lines. */
export class EventReader {
  #rest = "";

  push(text) {
    const lines = (this.#rest + text).split("\n");
    this.#rest = lines.pop();
    return lines.filter((line) => line.startsWith("data: ")).map((line) => line.slice(6).trimEnd());
  }
}

/** What one chunk of either endpoint says: text, accepted tokens, guesses for the tokens behind them, its end. */
export function readStep(payload) {
  const chunk = JSON.parse(payload);
  if (chunk.error) throw new Error(chunk.error.message);
  const [choice] = chunk.choices;
  return {
    text: choice.text ?? choice.delta.content ?? "",
    accepted: choice.accepted,
    guesses: choice.guesses ?? [],
    end: choice.finish_reason,
  };
}

/** A response, forward pass by forward pass, so that each earlier state of it can be shown again. */
export class Recording {
  #steps = [];

  /** A chunk that came at a time. One without tokens is the rest of the text, and no pass of its own. */
  add(step, milliseconds) {
    if (step.accepted === 0 && this.passes > 0) this.#steps.at(-1).text += step.text;
    else this.#steps.push({ ...step, tokens: this.#tokens(this.passes) + step.accepted, milliseconds });
  }

  get passes() {
    return this.#steps.length;
  }

  get text() {
    return this.#steps.map((step) => step.text).join("");
  }

  step(index) {
    return this.#steps[index];
  }

  /** After so many passes. The speed counts from the first chunk on, so it leaves out the reading of the prompt. */
  figures(passes = this.passes) {
    const tokens = this.#tokens(passes);
    const first = this.#steps[0];
    const seconds = passes > 1 ? (this.#steps[passes - 1].milliseconds - first.milliseconds) / 1000 : 0;
    return {
      passes,
      tokens,
      tokensPerPass: passes ? tokens / passes : 0,
      tokensPerSecond: seconds > 0 ? (tokens - first.tokens) / seconds : 0,
    };
  }

  /** Guesses after so many passes; a settled one was predicted for its place one pass before as well. */
  guesses(passes) {
    if (passes === 0) return [];
    const { guesses, accepted } = this.#steps[passes - 1];
    const before = passes > 1 ? this.#steps[passes - 2].guesses : [];
    return guesses.map((text, index) => ({ text, settled: before[accepted + index] === text }));
  }

  #tokens(passes) {
    return passes ? this.#steps[passes - 1].tokens : 0;
  }
}

/** What two finished recordings of one prompt say about each other. */
export function compare(ar, jacobi) {
  if (ar.text !== jacobi.text) {
    let place = 0;
    while (ar.text[place] === jacobi.text[place]) place += 1;
    return { same: false, message: `The texts differ from character ${place + 1} on.` };
  }
  const saved = ar.passes - jacobi.passes;
  const factor = (ar.passes / jacobi.passes).toFixed(1);
  const message =
    saved > 0
      ? `The same text in ${jacobi.passes} forward passes instead of ${ar.passes}: ${factor}× fewer.`
      : `The same text, but in ${jacobi.passes} forward passes as well: no guess held.`;
  return { same: true, message };
}

/** The colour class of a step: powers of two. */
export function colour(accepted) {
  return ["a1", "a2", "a4", "a8"][Math.ceil(Math.log2(Math.max(1, accepted)))] ?? "a16";
}
