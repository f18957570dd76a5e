// The page: what the user says goes to the server's own OpenAI routes, answers come back as they are made.

import { Figures, Times, ms } from "./figures.js";
import { batches } from "./sse.js";
import { Panel } from "./store.js";

const EVERY_MS = 1000;
const find = (id) => document.getElementById(id);
const panel = new Panel(find);
let key = ""; // kept in memory alone
let chat = true; // whether the model has a chat template
let running = null; // the answer under way
let messages = [];
let timer = 0;

// --------------------------------------------------------------------------------------------------------- the server

function headers(more) {
  return key ? { Authorization: `Bearer ${key}`, ...more } : { ...more };
}

function at(path) {
  return new URL(path, location.origin); // where the page was opened as user:key@host, fetch refuses what has both
}

async function problem(response) {
  try {
    const { error } = await response.json();
    return error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

function askKey(why) {
  find("key-form").hidden = false;
  find("key-error").textContent = why;
  find("key").focus();
}

function showState(text) {
  const badge = find("state");
  if (badge.textContent !== text) badge.textContent = text;
  badge.className = `badge ${text}`;
}

async function poll() {
  clearTimeout(timer);
  try {
    const response = await fetch(at("/page/state"), { headers: headers(), cache: "no-store" });
    if (response.status === 401) {
      if (find("key-form").hidden) askKey(key ? await problem(response) : "");
      showState("locked");
      return;
    }
    if (!response.ok) throw new Error(await problem(response));
    showPage(await response.json());
  } catch {
    showState("unreachable");
  }
  if (!document.hidden) timer = setTimeout(poll, EVERY_MS);
}

function showPage(page) {
  showState(page.state);
  if (page.facts) {
    chat = page.chat;
    find("model").textContent = page.model;
    find("prompt-label").textContent = chat ? "Message" : "Text to go on with";
    find("system-field").hidden = !chat;
  }
  panel.show(page);
}

// -------------------------------------------------------------------------------------------------------- the request

const NUMBERS = ["max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"];

function sampling() {
  const chosen = {};
  for (const name of NUMBERS) {
    const value = find(name).value.trim();
    if (value !== "") chosen[name] = Number(value);
  }
  const stops = find("stop-strings").value.split("\n").filter((line) => line !== "");
  if (stops.length) chosen.stop = stops;
  return chosen;
}

function requestFor(text) {
  const common = { ...sampling(), stream: true, stream_options: { include_usage: true } };
  if (!chat) return ["/v1/completions", { ...common, prompt: text }];
  const system = find("system").value.trim();
  const opening = system ? [{ role: "system", content: system }] : [];
  return ["/v1/chat/completions", { ...common, messages: [...opening, ...messages] }];
}

// ------------------------------------------------------------------------------------------------------- the messages

function article(kind, title) {
  find("empty").hidden = true;
  const made = document.createElement("article");
  const heading = document.createElement("h3");
  const said = document.createElement("p");
  made.className = kind;
  heading.textContent = title;
  said.className = "said";
  made.append(heading, said);
  find("log").append(made);
  made.scrollIntoView({ block: "end" });
  return made;
}

class Answer {
  // One answer: its text and its times, drawn at most once a frame.
  constructor() {
    this.article = article("assistant", "Model");
    this.article.setAttribute("aria-busy", "true");
    this.said = this.article.querySelector(".said");
    const place = document.createElement("p");
    place.className = "figures";
    this.article.append(place);
    this.figures = new Figures(place);
    this.times = new Times();
    this.abort = new AbortController();
    this.text = "";
    this.undrawn = "";
    this.waiting = false;
    this.reason = "";
  }

  async run(path, body) {
    const response = await fetch(at(path), {
      method: "POST",
      headers: headers({ "Content-Type": "application/json" }),
      body: JSON.stringify(body),
      signal: this.abort.signal,
    });
    if (response.status === 401) askKey(await problem(response.clone()));
    if (!response.ok) throw new Error(await problem(response));
    for await (const { at, data } of batches(response)) this.take(at, data);
    if (!this.reason) throw new Error("the stream ended without a finish reason");
  }

  take(at, data) {
    let count = 0;
    for (const one of data) {
      if (one === "[DONE]") continue;
      const chunk = JSON.parse(one);
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.usage) this.times.tokens = chunk.usage.completion_tokens;
      const [choice] = chunk.choices ?? [];
      const text = choice?.delta?.content ?? choice?.text ?? "";
      if (text) {
        this.undrawn += text;
        count += 1;
      }
      this.reason = choice?.finish_reason ?? this.reason;
    }
    if (count) this.times.received(at, count);
    if (!this.waiting) {
      this.waiting = true;
      requestAnimationFrame(() => this.draw());
    }
  }

  draw() {
    this.waiting = false;
    const log = find("log");
    const following = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
    this.text += this.undrawn;
    this.said.append(this.undrawn);
    this.undrawn = "";
    this.figures.show(this.times);
    if (following) log.scrollTop = log.scrollHeight;
  }

  end(why) {
    this.draw();
    this.said.normalize();
    this.article.setAttribute("aria-busy", "false");
    if (why) {
      const note = document.createElement("p");
      note.className = "error";
      note.textContent = why;
      this.article.append(note);
    }
    const ended = why || { stop: "complete", length: "cut at the most tokens" }[this.reason] || this.reason;
    find("announce").textContent = `Answer: ${ended}. First token after ${ms(this.times.ttft)}.`;
  }
}

async function send(text) {
  article("user", "You").querySelector(".said").textContent = text;
  messages.push({ role: "user", content: text });
  const [path, body] = requestFor(text);
  const answer = new Answer();
  running = answer;
  setBusy(true);
  let why = "";
  try {
    await answer.run(path, body);
  } catch (error) {
    why = answer.abort.signal.aborted ? "Stopped." : `The answer broke off: ${error.message}`;
  }
  answer.end(why);
  if (running !== answer) return; // started over meanwhile
  running = null;
  if (answer.text) messages.push({ role: "assistant", content: answer.text });
  else messages.pop(); // what got no answer is not part of the conversation
  setBusy(false);
}

function setBusy(busy) {
  find("send").disabled = busy;
  find("stop").disabled = !busy;
  if (!busy && document.activeElement === document.body) find("prompt").focus();
}

// ------------------------------------------------------------------------------------------------------------ wiring

function stop() {
  running?.abort.abort();
}

find("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = find("prompt").value;
  if (running || !text.trim()) return;
  find("prompt").value = "";
  send(text);
});

find("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    find("composer").requestSubmit();
  }
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});

find("stop").addEventListener("click", stop);

find("clear").addEventListener("click", () => {
  stop();
  running = null;
  messages = [];
  for (const one of document.querySelectorAll("#log article")) one.remove();
  find("empty").hidden = false;
  setBusy(false);
  find("prompt").focus();
});

find("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = find("key").value.trim();
  find("key").value = "";
  find("key-form").hidden = true;
  find("prompt").focus();
  poll();
});

document.addEventListener("visibilitychange", () => {
  if (!document.hidden && find("key-form").hidden) poll();
});

find("sampling").open = matchMedia("(min-width: 60.01rem)").matches;
poll();
