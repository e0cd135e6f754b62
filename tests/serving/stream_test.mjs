// Run by test_page.py under node.

import assert from "node:assert/strict";
import { EventReader, Recording, colour, compare, readStep } from "../../serving/page/stream.js";

const sent = 'data: {"a":"é"}\n\ndata: [DONE]\n\n';
for (let cut = 0; cut <= sent.length; cut++) {
  const reader = new EventReader();
  assert.deepEqual([...reader.push(sent.slice(0, cut)), ...reader.push(sent.slice(cut))], ['{"a":"é"}', "[DONE]"]);
}

assert.deepEqual(readStep('{"choices":[{"text":"a","accepted":2,"finish_reason":null}]}'), {
  text: "a",
  accepted: 2,
  guesses: [],
  end: null,
});
assert.equal(readStep('{"choices":[{"delta":{"content":"b"},"accepted":1,"finish_reason":"stop"}]}').text, "b");
assert.deepEqual(readStep('{"choices":[{"delta":{},"accepted":1,"guesses":["x"]}]}').guesses, ["x"]);
assert.throws(() => readStep('{"error":{"message":"full"}}'), /full/);

const recorded = (...steps) => {
  const recording = new Recording();
  for (const [text, accepted, milliseconds, guesses = []] of steps) {
    recording.add({ text, accepted, guesses }, milliseconds);
  }
  return recording;
};

const three = recorded(["a", 1, 1000], ["bcd", 3, 1500], ["efgh", 4, 2000]);
assert.deepEqual(three.figures(), { passes: 3, tokens: 8, tokensPerPass: 8 / 3, tokensPerSecond: 7 });
assert.deepEqual(three.figures(2), { passes: 2, tokens: 4, tokensPerPass: 2, tokensPerSecond: 6 });
assert.equal(three.figures(1).tokensPerSecond, 0);
assert.deepEqual(three.figures(0), { passes: 0, tokens: 0, tokensPerPass: 0, tokensPerSecond: 0 });
assert.equal(three.text, "abcdefgh");

// Text that was held back until the end comes without tokens: it is no forward pass.
const late = recorded(["a", 2, 0], ["!", 0, 5]);
assert.deepEqual([late.passes, late.text], [1, "a!"]);

// Behind the two accepted tokens, places 2 and 3 held [x, y] before this pass; y has become z.
const guessing = recorded(["a", 1, 0, ["b", "c", "x", "y"]], ["bc", 2, 1, ["x", "z", "w"]]);
assert.deepEqual(guessing.guesses(0), []);
assert.deepEqual(guessing.guesses(1).map((guess) => guess.settled), [false, false, false, false]);
assert.deepEqual(guessing.guesses(2), [
  { text: "x", settled: true },
  { text: "z", settled: false },
  { text: "w", settled: false },
]);

const slow = recorded(["a", 1, 0], ["b", 1, 0], ["c", 1, 0], ["d", 1, 0]);
assert.deepEqual(compare(slow, recorded(["ab", 2, 0], ["cd", 2, 0])), {
  same: true,
  message: "The same text in 2 forward passes instead of 4: 2.0× fewer.",
});
assert.match(compare(slow, slow).message, /no guess held/);
assert.deepEqual(compare(slow, recorded(["abx", 3, 0])), {
  same: false,
  message: "The texts differ from character 3 on.",
});

assert.deepEqual([0, 1, 2, 3, 4, 5, 8, 9, 99].map(colour), ["a1", "a1", "a2", "a4", "a4", "a8", "a8", "a16", "a16"]);
