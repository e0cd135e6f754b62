// Chat on the left; on the right the same conversation decoded by two models, their steps in colours.

import { EventReader, Figures, colour, readStep } from "./stream.js";

const find = (selector, from = document) => from.querySelector(selector);
const conversation = [];
let running = null;

class Lane {
  constructor(name) {
    const article = find(`[data-lane="${name}"]`);
    this.select = find("select", article);
    this.figures = find(".figures", article);
    this.output = find("pre", article);
  }

  get model() {
    return this.select.value;
  }

  clear() {
    this.output.replaceChildren();
    this.figures.textContent = "";
    this.counts = new Figures();
  }

  add(step) {
    const span = document.createElement("span");
    span.className = `step ${colour(step.accepted)}`;
    span.textContent = step.text;
    span.title = `${step.accepted} tokens`;
    this.output.append(span);
    this.counts.add(step.accepted, performance.now());
    const { tokens, steps, tokensPerForward, tokensPerSecond } = this.counts;
    this.figures.textContent =
      `${tokens} tokens, ${steps} forward passes, ${tokensPerForward.toFixed(2)} tokens per pass, ` +
      `${tokensPerSecond.toFixed(0)} tokens/s`;
  }
}

const lanes = { ar: new Lane("ar"), jacobi: new Lane("jacobi") };

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
  const options = {
    model,
    stream: true,
    decoding: true,
    seed: 0,
    max_tokens: Number(find("#max-tokens").value),
    temperature: Number(find("#temperature").value),
  };
  try {
    return await post("v1/chat/completions", { ...options, messages: conversation }, signal);
  } catch (error) {
    if (!error.message.includes("no chat template")) throw error;
    return await post("v1/completions", { ...options, prompt: conversation.at(-1).content }, signal);
  }
}

async function decode(lane, onText, signal) {
  lane.clear();
  const answer = await ask(lane.model, signal);
  const reader = new EventReader();
  for await (const text of answer.body.pipeThrough(new TextDecoderStream())) {
    for (const payload of reader.push(text)) {
      if (payload === "[DONE]") return;
      const step = readStep(payload);
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
  return element;
}

function setRunning(controller) {
  running = controller;
  find("#send").disabled = controller !== null;
  find("#stop").disabled = controller === null;
}

async function send(event) {
  event.preventDefault();
  const prompt = find("#prompt").value;
  conversation.push({ role: "user", content: prompt });
  addMessage("user", prompt);
  find("#prompt").value = "";
  find("#problem").textContent = "";
  const reply = addMessage("assistant", "");
  setRunning(new AbortController());
  const results = await Promise.allSettled([
    decode(lanes.jacobi, (text) => reply.append(text), running.signal),
    decode(lanes.ar, () => {}, running.signal),
  ]);
  setRunning(null);
  const failed = results.find((result) => result.status === "rejected" && result.reason.name !== "AbortError");
  if (failed) find("#problem").textContent = failed.reason.message;
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
find("#stop").addEventListener("click", () => running?.abort());
find("#key").addEventListener("change", () => loadModels().catch(showProblem));
loadModels().catch(showProblem);
