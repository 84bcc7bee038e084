// The page: a talk on one side, the memory on the other.

import { colour, draw, short } from "./curves.js";

const at = (id) => document.getElementById(id);
const TOKEN = "nestlearn-token", CHOSEN = "nestlearn-memory";
let server = null; // what /v1/about says
let turns = []; // the conversation so far
let job = null; // what is being learned
let asking = null; // an AbortController while it answers
let seen = { levels: [], moved: {}, norm: {}, loss: [] };

// ---------------------------------------------------------------------------------- asking

function headers(more) {
  const token = sessionStorage.getItem(TOKEN);
  return { ...(token ? { Authorization: `Bearer ${token}` } : {}), ...more };
}

async function call(method, path, body, options = {}) {
  let response;
  try {
    response = await fetch(path, {
      method,
      headers: headers(body === undefined || options.raw ? {} : { "Content-Type": "application/json" }),
      body: body === undefined || options.raw ? body : JSON.stringify(body),
      signal: options.signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is it still running?");
  }
  if (response.status === 401) {
    showLogin();
    throw new Error("Give a token that this server knows.");
  }
  if (!response.ok) {
    const told = await response.json().catch(() => null);
    throw new Error(told?.error?.message ?? `The server says ${response.status}.`);
  }
  return options.whole ? response : response.json();
}

// The events of a stream, as they come.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part === "data: [DONE]") return;
      if (part.startsWith("data: ")) yield JSON.parse(part.slice(6));
    }
  }
}

function trouble(error) {
  at("trouble").textContent = error ? error.message ?? String(error) : "";
  at("trouble").hidden = !error;
}

// Do something at a click; say what went wrong in its own words.
function on(id, kind, work) {
  at(id).addEventListener(kind, async (event) => {
    if (kind === "submit") event.preventDefault();
    trouble(null);
    try {
      await work(event);
    } catch (error) {
      if (error.name !== "AbortError") trouble(error);
    }
  });
}

// ---------------------------------------------------------------------------------- memories

const memory = () => at("memory").value;
const path = (rest = "") => `v1/memories/${encodeURIComponent(memory())}${rest}`;

function needed() {
  if (!memory()) throw new Error("Make a memory first: give it a name at the top.");
}

async function refresh(chosen) {
  const { data } = await call("GET", "v1/memories");
  const wanted = chosen ?? memory() ?? "";
  const options = ["", ...data.map((each) => each.id)].map((name) => new Option(name || "none", name));
  at("memory").replaceChildren(...options);
  const there = data.some((each) => each.id === wanted);
  at("memory").value = there ? wanted : "";
  localStorage.setItem(CHOSEN, memory());
  await showMemory();
}

async function showMemory() {
  const some = Boolean(memory());
  for (const id of ["download", "reset", "delete", "learn", "study", "measure"]) at(id).disabled = !some;
  at("twice").disabled = at("keep").disabled = !some;
  at("history").replaceChildren();
  if (!some) {
    at("about").textContent = "No memory is chosen: the model answers as it was before it learned anything.";
    return;
  }
  const about = await call("GET", path());
  const size = (about.bytes / 1e6).toFixed(about.bytes < 1e5 ? 3 : 1);
  at("about").textContent = `${about.position.toLocaleString()} tokens read; ${size} MB. The last stands first.`;
  const now = about.history.at(-1) ?? { what: "create" };
  const rows = [line(about, now, null)];
  for (const point of about.points.toReversed()) rows.push(line(point, point, point.point));
  at("history").replaceChildren(...rows);
}

function line(where, entry, point) {
  const item = document.createElement("li");
  const text = document.createElement("span");
  const words = { create: "made", learn: "learned", study: "studied", reset: "forgot", fork: "forked",
    rollback: "rolled back", upload: "uploaded" };
  const source = entry.source ? ` “${entry.source}”` : entry.to ? ` to ${entry.to}` : "";
  const time = entry.time ? new Date(entry.time * 1000).toLocaleTimeString() : "";
  text.textContent = `${words[entry.what] ?? entry.what ?? ""}${source}, ${where.position.toLocaleString()} tokens, ${time}`;
  item.append(text);
  if (point === null) {
    item.append("now");
    return item;
  }
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Roll back";
  button.setAttribute("aria-label", `Roll back to: ${text.textContent}`);
  button.addEventListener("click", async () => {
    trouble(null);
    try {
      await call("POST", path("/rollback"), { point });
      await showMemory();
      at("doing").textContent = `Rolled back. What it was until now is in the list, too.`;
    } catch (error) {
      trouble(error);
    }
  });
  item.append(button);
  return item;
}

on("memory", "change", async () => {
  localStorage.setItem(CHOSEN, memory());
  startAnew();
  await showMemory();
});
on("new", "submit", async () => {
  const name = at("new-name").value.trim();
  await call("POST", "v1/memories", { name });
  at("new-name").value = "";
  startAnew();
  await refresh(name);
  at("text").focus();
});
on("fork", "submit", async () => {
  needed();
  const to = at("fork-name").value.trim();
  await call("POST", path("/fork"), { to });
  at("fork-name").value = "";
  await refresh(to);
  at("doing").textContent = `This is the copy, ${to}. The other one stays as it is.`;
});
on("reset", "click", async () => {
  needed();
  await call("POST", path("/reset"), {});
  await showMemory();
  at("doing").textContent = "Forgotten. It can be rolled back.";
});
on("delete", "click", async () => {
  needed();
  if (!confirm(`Delete the memory ${memory()} and all its points, for good?`)) return;
  await call("DELETE", path());
  startAnew();
  await refresh("");
});
on("download", "click", async () => {
  needed();
  const response = await call("GET", path("/file"), undefined, { whole: true });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await response.blob());
  link.download = `${memory()}.safetensors`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
});
on("upload", "change", async () => {
  const [file] = at("upload").files;
  if (!file) return;
  const name = file.name.replace(/\.safetensors$/, "").replace(/[^A-Za-z0-9_-]+/g, "-").slice(0, 64);
  at("upload").value = "";
  await call("PUT", `v1/memories/${encodeURIComponent(name)}/file`, file, { raw: true });
  await refresh(name);
});

// ---------------------------------------------------------------------------------- learning

function clearCurves() {
  seen = { levels: [], moved: {}, norm: {}, loss: [] };
  at("surprise").replaceChildren();
  showCurves();
}

function showCurves() {
  const lines = (of) => seen.levels.map((name, n) => ({ name, kind: `l${n % 5}`, values: of[name] ?? [] }));
  draw(at("moved"), lines(seen.moved), "moved by a piece");
  draw(at("norm"), lines(seen.norm), "norm");
  draw(at("loss"), [{ name: "surprise", kind: "l0", values: seen.loss }], "surprise, nats a token");
  const rows = seen.levels.map((name, n) => {
    const item = document.createElement("li");
    item.className = `l${n % 5}`;
    item.textContent = `${name}${/every/.test(name) ? " tokens" : ""}`;
    return item;
  });
  at("legend").replaceChildren(...rows);
}

function heard(told, total) {
  if (told.event === "begin") {
    seen.levels = told.levels.map((level) => level.name);
    add(told.levels);
  } else if (told.event === "piece") {
    seen.levels = told.levels.map((level) => level.name);
    add(told.levels);
    seen.loss.push(told.loss);
    colour(at("surprise"), told.words, told.surprise);
    at("progress").value = told.tokens / total.tokens;
    at("doing").textContent = `Read ${told.tokens.toLocaleString()} of ${total.tokens.toLocaleString()} tokens.`;
    showCurves();
  } else if (told.event === "study") {
    at("progress").value = told.of ? told.done / told.of : 0;
    at("doing").textContent = `Study: ${told.doing}, ${told.done} of ${told.of}.`;
  } else if (told.event === "error") {
    throw new Error(`It could not go on: ${told.message}`);
  } else if (told.event === "done" || told.event === "stopped") {
    at("doing").textContent = told.event === "done" ? "Done, and saved." : "Stopped; what it had learned is saved.";
  }
}

function add(levels) {
  for (const level of levels) {
    (seen.moved[level.name] ??= []).push(level.moved);
    (seen.norm[level.name] ??= []).push(level.norm);
  }
}

async function lesson(kind) {
  needed();
  const text = at("text").value;
  if (!text.trim()) throw new Error("There is nothing to read: paste a text first.");
  const source = text.trim().split(/\s+/).slice(0, 6).join(" ").slice(0, 60);
  const total = { tokens: 1 };
  clearCurves();
  for (const id of ["learn", "study", "measure"]) at(id).disabled = true;
  at("stop").hidden = at("progress").hidden = false;
  at("progress").value = 0;
  at("doing").textContent = "Waiting for its turn.";
  try {
    const response = await call("POST", path(`/${kind}`), { text, source, stream: true }, { whole: true });
    for await (const told of events(response)) {
      if (told.event === "job") job = told.id;
      if (told.event === "begin") total.tokens = told.tokens;
      heard(told, total);
    }
  } finally {
    job = null;
    at("stop").hidden = at("progress").hidden = true;
    await showMemory();
  }
}

on("learn", "click", () => lesson("learn"));
on("study", "click", () => lesson("study"));
on("stop", "click", async () => {
  if (job) await call("DELETE", `v1/jobs/${job}`);
});
on("measure", "click", async () => {
  needed();
  const told = await call("POST", path("/surprise"), { text: at("text").value });
  at("surprise").replaceChildren();
  colour(at("surprise"), told.words, told.with);
  const mean = (values) => {
    const known = values.filter((x) => x !== null);
    return known.reduce((a, b) => a + b, 0) / Math.max(known.length, 1);
  };
  at("doing").textContent =
    `Surprise: ${short(mean(told.with))} nats a token with the memory, ${short(mean(told.without))} without.`;
});

// ---------------------------------------------------------------------------------- talking

function startAnew() {
  turns = [];
  const hint = document.createElement("p");
  hint.className = "empty";
  hint.textContent =
    "Make a memory, let it read a text, and ask about it. Each answer comes twice: with what the memory has learned, and without.";
  at("log").replaceChildren(hint);
  clearCurves();
}

function bubble(parent, kind, title) {
  const made = document.createElement("div");
  made.className = `answer ${kind}`;
  const [name, text] = [document.createElement("b"), document.createElement("span")];
  name.textContent = title;
  made.append(name, text);
  parent.append(made);
  return made;
}

async function answer(place, body, signal) {
  const text = place.querySelector("span");
  try {
    const response = await call("POST", "v1/chat/completions", body, { whole: true, signal });
    for await (const told of events(response)) {
      if (told.error) throw new Error(told.error.message);
      text.textContent += told.choices[0]?.delta?.content ?? "";
      if (told.learned?.error) throw new Error(`It answered, but did not learn: ${told.learned.error.message}`);
      at("log").scrollTop = at("log").scrollHeight;
    }
    if (!text.textContent) text.textContent = "(it said nothing)";
  } catch (error) {
    if (error.name === "AbortError") return text.textContent;
    place.classList.add("error");
    text.textContent += (text.textContent ? "\n" : "") + error.message;
  }
  return text.textContent;
}

on("ask", "submit", async () => {
  const message = at("message").value.trim();
  if (!message || asking) return;
  if (!turns.length) at("log").replaceChildren();
  const mine = document.createElement("p");
  mine.className = "mine";
  mine.textContent = message;
  const both = document.createElement("div");
  both.className = "answers";
  at("log").append(mine, both);
  at("message").value = "";
  turns.push({ role: "user", content: message });
  asking = new AbortController();
  at("send").hidden = true;
  at("quiet").hidden = false;
  const body = {
    model: server.model, messages: turns, stream: true, max_tokens: Number(at("tokens").value) || 100,
    temperature: Number(at("heat").value), seed: Math.floor(Math.random() * 2 ** 31),
  };
  const some = memory();
  const first = bubble(both, "with", some ? `with ${some}` : "without a memory");
  const learn = at("keep").checked ? (server.masks ? "user" : "both") : "nothing";
  const ways = [answer(first, some ? { ...body, memory: some, learn } : body, asking.signal)];
  if (some && at("twice").checked) {
    ways.push(answer(bubble(both, "without", "without the memory"), body, asking.signal));
  }
  const [reply] = await Promise.all(ways);
  if (first.classList.contains("error")) turns.pop();
  else turns.push({ role: "assistant", content: reply });
  asking = null;
  at("send").hidden = false;
  at("quiet").hidden = true;
  at("message").focus();
  if (some && learn !== "nothing") await showMemory();
});
on("quiet", "click", () => asking?.abort());
on("clear", "click", startAnew);
at("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
});

// ---------------------------------------------------------------------------------- beginning

function showLogin() {
  at("login").hidden = false;
  at("main").hidden = true;
  at("token").focus();
}

async function begin() {
  server = await call("GET", "v1/about");
  at("login").hidden = true;
  at("main").hidden = false;
  at("model").textContent = server.model;
  at("user").textContent = server.user === "local" ? "" : server.user;
  at("study").hidden = !server.studies;
  at("tokens").max = server.limits.tokens;
  document.title = `${server.model} · nestlearn`;
  startAnew();
  await refresh(localStorage.getItem(CHOSEN) ?? "");
}

on("login", "submit", async () => {
  sessionStorage.setItem(TOKEN, at("token").value.trim());
  await begin();
});
begin().catch(trouble);
