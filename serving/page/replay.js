// Both lanes once more, pass by pass: what came too fast to be seen.

const LONGEST_PASS_MS = 250;
const WHOLE_MS = 12_000;

export class Replay {
  #lanes;
  #timer = null;

  /** @param parts elements: box, play (button), pass (range), number (output) */
  constructor(lanes, parts) {
    this.#lanes = lanes;
    Object.assign(this, parts);
    this.play.addEventListener("click", () => (this.#timer === null ? this.start() : this.stop()));
    this.pass.addEventListener("input", () => {
      this.stop();
      this.#show(Number(this.pass.value));
    });
  }

  /** Nothing to replay while something is being decoded. */
  hide() {
    this.stop();
    this.box.hidden = true;
  }

  offer() {
    this.pass.max = this.#passes;
    this.box.hidden = this.#passes === 0;
    this.#show(this.#passes);
  }

  start() {
    let passes = Number(this.pass.value) < this.#passes ? Number(this.pass.value) : 0;
    const pause = Math.min(LONGEST_PASS_MS, WHOLE_MS / this.#passes);
    this.#show(passes);
    this.play.textContent = "Pause";
    this.#timer = setInterval(() => {
      passes += 1;
      this.#show(passes);
      if (passes >= this.#passes) this.stop();
    }, pause);
  }

  stop() {
    clearInterval(this.#timer);
    this.#timer = null;
    this.play.textContent = "Replay";
  }

  get #passes() {
    return Math.max(...this.#lanes.map((lane) => lane.recording.passes));
  }

  #show(passes) {
    this.pass.value = passes;
    this.number.textContent = `pass ${passes} of ${this.#passes}`;
    for (const lane of this.#lanes) lane.show(passes);
  }
}
