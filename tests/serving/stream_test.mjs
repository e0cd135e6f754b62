// Run by test_page.py under node.

import assert from "node:assert/strict";
import { EventReader, Figures, colour, readStep } from "../../serving/page/stream.js";

const sent = 'data: {"a":"é"}\n\ndata: [DONE]\n\n';
for (let cut = 0; cut <= sent.length; cut++) {
  const reader = new EventReader();
  assert.deepEqual([...reader.push(sent.slice(0, cut)), ...reader.push(sent.slice(cut))], ['{"a":"é"}', "[DONE]"]);
}

assert.deepEqual(readStep('{"choices":[{"text":"a","accepted":2,"finish_reason":null}]}'), {
  text: "a",
  accepted: 2,
  end: null,
});
assert.equal(readStep('{"choices":[{"delta":{"content":"b"},"accepted":1,"finish_reason":"stop"}]}').text, "b");
assert.throws(() => readStep('{"error":{"message":"full"}}'), /full/);

const figures = new Figures();
figures.add(1, 1000);
assert.equal(figures.tokensPerSecond, 0);
figures.add(3, 1500);
figures.add(4, 2000);
assert.equal(figures.tokensPerSecond, 7);
assert.equal(figures.tokensPerForward, 8 / 3);

assert.deepEqual([0, 1, 2, 3, 4, 5, 8, 9, 99].map(colour), ["a1", "a1", "a2", "a4", "a4", "a8", "a8", "a16", "a16"]);
