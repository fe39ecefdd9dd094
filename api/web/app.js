// The chat page. All text of the model enters the document as text nodes, never as markup.
"use strict";

const $ = (id) => document.getElementById(id);
const conversation = [];
let controller = null;

function headers() {
  const key = $("api-key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function errorText(response) {
  const body = await response.text();
  try {
    return JSON.parse(body).error.message;
  } catch {
    return body || `${response.status} ${response.statusText}`;
  }
}

async function loadModels() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) {
    $("stats").textContent = response.status === 401 ? "API key needed (Settings)" : await errorText(response);
    if (response.status === 401) $("settings").open = true;
    return;
  }
  const models = (await response.json()).data.map((card) => new Option(card.id, card.id));
  $("model").replaceChildren(...models);
  $("stats").textContent = "";
}

function addMessage(kind) {
  const element = document.createElement("div");
  element.className = `message ${kind}`;
  $("messages").append(element);
  return element;
}

// Text between ``` fences becomes code blocks; everything else stays plain text.
function showText(element, text) {
  const parts = text.split("```").map((part, index) => (index % 2 ? codeBlock(part) : document.createTextNode(part)));
  element.replaceChildren(...parts);
}

function codeBlock(part) {
  const block = document.createElement("pre");
  const code = document.createElement("code");
  const firstLine = part.match(/^[\w+#.-]*\n/);
  code.textContent = firstLine ? part.slice(firstLine[0].length) : part;
  block.append(code);
  return block;
}

// Yields the JSON of each data line of a server-sent event stream.
async function* events(body) {
  const decoder = new TextDecoder();
  const reader = body.getReader();
  let buffer = "";
  for (;;) {
    const { done, value } = await reader.read();
    buffer += done ? decoder.decode() : decoder.decode(value, { stream: true });
    const lines = buffer.split("\n");
    buffer = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
    if (done) return;
  }
}

function requestBody() {
  const system = $("system").value.trim();
  return {
    model: $("model").value,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...conversation],
    temperature: Number($("temperature").value),
    max_tokens: Number($("max-tokens").value),
    stream: true,
    stream_options: { include_usage: true },
  };
}

function showStats(started, first, tokens) {
  if (first === null) return;
  const seconds = (performance.now() - first) / 1000;
  const rate = tokens > 1 && seconds > 0 ? `, ${((tokens - 1) / seconds).toFixed(1)} token/s` : "";
  $("stats").textContent = `first token ${Math.round(first - started)} ms${rate}`;
}

class Answer {
  constructor() {
    this.started = performance.now();
    this.first = null;
    this.tokens = 0;
    this.text = "";
    this.reasoning = "";
    this.thinking = null;
    this.element = null;
  }

  take(event) {
    if (event.error) throw new Error(event.error.message);
    if (event.usage) {
      this.tokens = event.usage.completion_tokens;
      showStats(this.started, this.first, this.tokens);
    }
    const delta = event.choices?.[0]?.delta;
    const thought = delta?.reasoning_content ?? delta?.reasoning ?? "";
    const content = delta?.content ?? "";
    if (!thought && !content) return;
    this.first ??= performance.now();
    if (!event.usage) this.tokens += 1;
    this.show(thought, content);
  }

  show(thought, content) {
    const page = $("messages");
    const follows = page.scrollHeight - page.scrollTop - page.clientHeight < 40;
    if (thought) {
      this.thinking ??= addMessage("reasoning");
      this.thinking.textContent = this.reasoning += thought;
    }
    if (content) {
      this.element ??= addMessage("assistant");
      showText(this.element, (this.text += content));
    }
    if (follows) page.scrollTop = page.scrollHeight;
    showStats(this.started, this.first, this.tokens);
  }
}

async function ask(answer) {
  const init = { method: "POST", headers: headers(), body: JSON.stringify(requestBody()), signal: controller.signal };
  const response = await fetch("v1/chat/completions", init);
  if (!response.ok) throw new Error(await errorText(response));
  for await (const event of events(response.body)) answer.take(event);
}

async function send(text) {
  conversation.push({ role: "user", content: text });
  addMessage("user").textContent = text;
  $("messages").scrollTop = $("messages").scrollHeight;
  const current = new AbortController();
  controller = current;
  setBusy(true);
  const answer = new Answer();
  try {
    await ask(answer);
  } catch (error) {
    if (error.name !== "AbortError") addMessage("error").textContent = error.message;
  }
  if (controller !== current) return; // "New chat" took over
  if (answer.text) conversation.push({ role: "assistant", content: answer.text });
  else conversation.pop();
  setBusy(false);
}

function setBusy(busy) {
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  if (!busy) controller = null;
}

function reset() {
  const running = controller;
  setBusy(false);
  running?.abort();
  conversation.length = 0;
  $("messages").replaceChildren();
  $("stats").textContent = "";
  $("input").focus();
}

function toggleTheme() {
  const root = document.documentElement;
  const dark = root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
}

function submit(event) {
  event.preventDefault();
  const text = $("input").value.trim();
  if (!text || controller) return;
  $("input").value = "";
  send(text);
}

$("composer").addEventListener("submit", submit);
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
});
$("stop").addEventListener("click", () => controller?.abort());
$("reset").addEventListener("click", reset);
$("theme").addEventListener("click", toggleTheme);
$("api-key").addEventListener("change", () => loadModels().catch(showLoadError));

function showLoadError(error) {
  $("stats").textContent = `No answer from the server: ${error.message}`;
}
loadModels().catch(showLoadError);
