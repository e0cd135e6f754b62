// Chat on the left; on the right the same conversation decoded by two models at the same time.

import { prompt as examplePrompt, steps as exampleSteps } from "./example.js";
import { Lane } from "./lane.js";
import { Replay } from "./replay.js";
import { EventReader, compare, readStep } from "./stream.js";

const find = (selector) => document.querySelector(selector);
const conversation = [];
const withoutTemplate = new Set(); // models that can only continue a text
const lanes = { ar: new Lane(find('[data-lane="ar"]')), jacobi: new Lane(find('[data-lane="jacobi"]')) };
const replay = new Replay(Object.values(lanes), {
  box: find("#replay"),
  play: find("#play"),
  pass: find("#pass"),
  number: find("#pass-number"),
});
let running = null;

function headers() {
  const key = find("#key").value;
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function post(path, body, signal) {
  const answer = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
  if (answer.ok) return answer;
  throw new Error((await answer.json()).error.message);
}

/** A model without a chat template continues the last message instead. */
async function ask(model, signal) {
  const complete = (options) => post("v1/completions", { ...options, prompt: conversation.at(-1).content }, signal);
  const options = {
    model,
    stream: true,
    decoding: "guesses",
    seed: 0,
    max_tokens: Number(find("#max-tokens").value),
    temperature: Number(find("#temperature").value),
  };
  if (withoutTemplate.has(model)) return complete(options);
  try {
    return await post("v1/chat/completions", { ...options, messages: conversation }, signal);
  } catch (error) {
    if (!error.message.includes("no chat template")) throw error;
    withoutTemplate.add(model);
    return complete(options);
  }
}

async function decode(lane, onText, signal) {
  const answer = await ask(lane.model, signal);
  const reader = new EventReader();
  for await (const text of answer.body.pipeThrough(new TextDecoderStream())) {
    for (const payload of reader.push(text)) {
      if (payload === "[DONE]") return;
      const step = readStep(payload);
      if (step.guesses.length) find("#guess-legend").hidden = false;
      lane.add(step);
      onText(step.text);
    }
  }
}

function addMessage(role, text) {
  const element = document.createElement("div");
  element.className = `message ${role}`;
  element.textContent = text;
  find("#messages").append(element);
  element.scrollIntoView({ block: "nearest" });
  return element;
}

function setRunning(controller) {
  running = controller;
  find("#send").disabled = controller !== null;
  find("#stop").disabled = controller === null;
  find("#race").dataset.state = controller === null ? "done" : "running";
}

function setScale(passes) {
  find("#race").style.setProperty("--passes", passes);
}

function isMotionWelcome() {
  return !matchMedia("(prefers-reduced-motion: reduce)").matches;
}

function clearRace() {
  replay.hide();
  find("#example").hidden = find("#guess-legend").hidden = true;
  find("#problem").textContent = find("#verdict").textContent = "";
  setScale(find("#max-tokens").value);
  for (const lane of Object.values(lanes)) lane.clear();
}

function showResult() {
  const [ar, jacobi] = [lanes.ar.recording, lanes.jacobi.recording];
  const { same, message } = compare(ar, jacobi);
  find("#verdict").textContent = message;
  find("#verdict").className = same ? "same" : "";
  setScale(Math.max(ar.passes, jacobi.passes));
}

function showExample() {
  for (const [name, lane] of Object.entries(lanes)) for (const step of exampleSteps[name]) lane.add(step, 0);
  find("#example-prompt").textContent = examplePrompt;
  showResult();
  replay.offer();
  if (isMotionWelcome()) replay.start();
}

async function send(event) {
  event.preventDefault();
  if (running) return;
  const prompt = find("#prompt").value;
  const isFirst = conversation.length === 0; // most models answer too fast for eyes: show at once what happened
  conversation.push({ role: "user", content: prompt });
  addMessage("user", prompt);
  find("#prompt").value = "";
  clearRace();
  const reply = addMessage("assistant", "");
  find("#race").scrollIntoView({ block: "nearest" });
  setRunning(new AbortController());
  const results = await Promise.allSettled([
    decode(lanes.jacobi, (text) => reply.append(text), running.signal),
    decode(lanes.ar, () => {}, running.signal),
  ]);
  const failed = results.find((result) => result.status === "rejected");
  if (!failed) showResult();
  else if (failed.reason.name !== "AbortError") showProblem(failed.reason);
  replay.offer();
  if (!failed && isFirst && isMotionWelcome()) replay.start();
  setRunning(null);
  if (reply.textContent) conversation.push({ role: "assistant", content: reply.textContent });
  else {
    conversation.pop();
    reply.remove();
  }
}

/** The lanes take the models that bear their names, or else the first ones. */
async function loadModels() {
  const answer = await fetch("v1/models", { headers: headers() });
  const body = await answer.json();
  if (answer.status === 401) find("#key-label").hidden = false;
  if (!answer.ok) throw new Error(body.error.message);
  const names = body.data.map((model) => model.id);
  for (const [lane, { select }] of Object.entries(lanes)) {
    select.replaceChildren(...names.map((name) => new Option(name)));
    select.value = names.find((name) => name.includes(lane)) ?? names[0];
  }
  find("#problem").textContent = "";
}

function showProblem(error) {
  find("#problem").textContent = error.message;
}

find("#form").addEventListener("submit", send);
find("#prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  find("#form").requestSubmit();
});
find("#stop").addEventListener("click", () => running?.abort());
find("#key").addEventListener("change", () => loadModels().catch(showProblem));
showExample();
loadModels().catch(showProblem);
