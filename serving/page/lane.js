// One decoder on the page: its text with a colour for each forward pass, its guesses, its figures.

import { Recording, colour } from "./stream.js";

const FIGURES = {
  passes: ["passes", (value) => String(value)],
  tokens: ["tokens", (value) => String(value)],
  tokensPerPass: ["tokens a pass", (value) => value.toFixed(2)],
  tokensPerSecond: ["tokens/s", (value) => (value ? value.toFixed(0) : "–")],
};

function element(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

export class Lane {
  #pre;
  #committed;
  #guesses;
  #strip;
  #figures = {};

  constructor(article) {
    this.select = article.querySelector("select");
    this.#pre = article.querySelector("pre");
    this.#committed = article.querySelector(".committed");
    this.#guesses = article.querySelector(".guesses");
    this.#strip = article.querySelector(".strip");
    for (const [name, [label]] of Object.entries(FIGURES)) {
      const pair = document.createElement("div");
      this.#figures[name] = element("dd", "", "–");
      this.#figures[name].dataset.figure = name;
      pair.append(element("dt", "", label), this.#figures[name]);
      article.querySelector("dl").append(pair);
    }
    this.clear();
  }

  get model() {
    return this.select.value;
  }

  clear() {
    this.recording = new Recording();
    for (const part of [this.#committed, this.#guesses, this.#strip]) part.replaceChildren();
    for (const figure of Object.values(this.#figures)) figure.textContent = "–";
  }

  /** A chunk, and when it came. */
  add(step, milliseconds = performance.now()) {
    const { recording } = this;
    const passes = recording.passes;
    recording.add(step, milliseconds);
    if (recording.passes === passes) this.#committed.lastChild.textContent += step.text;
    else this.#draw(step);
    this.#update(recording.passes);
  }

  /** The state after so many passes; after all of them, where the response has fewer. */
  show(passes) {
    const shown = Math.min(passes, this.recording.passes);
    for (const part of [this.#committed, this.#strip]) {
      [...part.children].forEach((child, index) => child.toggleAttribute("hidden", index >= shown));
    }
    this.#update(shown);
  }

  /** What is not one element a pass. */
  #update(shown) {
    this.#guesses.replaceChildren(
      ...this.recording
        .guesses(shown)
        .map(({ text, settled }) => element("span", settled ? "guess settled" : "guess", text)),
    );
    const values = this.recording.figures(shown);
    for (const [name, [, write]] of Object.entries(FIGURES)) this.#figures[name].textContent = write(values[name]);
    this.#pre.scrollTop = this.#pre.scrollHeight;
  }

  #draw(step) {
    const name = colour(step.accepted);
    const span = element("span", `step ${name}`, step.text);
    span.title = step.accepted === 1 ? "1 token" : `${step.accepted} tokens`;
    this.#committed.append(span);
    this.#strip.append(element("i", name));
  }
}
