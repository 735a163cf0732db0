// The image follows the typing. Each change is a turn: the server drops what older turns still wait for, and what it is
// drawing already is shown until something newer is there.
"use strict";

const $ = (id) => document.getElementById(id);
const form = $("form"), prompt = $("prompt"), seed = $("seed"), lock = $("lock"), steps = $("steps"), negative = $("negative");
const stage = $("stage"), past = $("past");
const CLIENT = crypto.getRandomValues(new Uint32Array(4)).join("-"); // randomUUID needs https on other machines
const SETTLED = 900; // milliseconds without a change, after which an image is kept
const KEPT = 60; // images in the history
const LARGEST_SEED = 2 ** 32;

let about = { width: 1, height: 1, steps: [1], negative: false };
let turn = 0;
let flights = []; // turns that are not answered: at most one that is drawn and one that waits
let cells = [];
let kept = []; // the history, newest first
let settle = 0;

// ---- drawing

const count = () => Number(new FormData(form).get("count"));
const isLocked = () => lock.getAttribute("aria-pressed") === "true";
const anySeed = () => crypto.getRandomValues(new Uint32Array(1))[0];

function follow() {
  clearTimeout(settle);
  $("problem").textContent = "";
  turn += 1;
  const text = prompt.value.trim();
  $("examples").hidden = text !== "";
  if (!text) {
    flights.forEach((flight) => flight.control.abort());
    flights = [];
    layOut(true);
    return;
  }
  while (flights.length > 1) flights.pop().control.abort();
  layOut(false);
  const flight = { turn, control: new AbortController(), left: cells.length };
  flights.push(flight);
  const first = Number(seed.value) || 0;
  cells.forEach((cell, i) => {
    const wanted = { prompt: text, seed: first + i, client: CLIENT, turn };
    if (about.steps.length > 1) wanted.steps = Number(steps.value);
    if (about.negative && negative.value.trim()) wanted.negative = negative.value.trim();
    draw(cell, wanted, flight).finally(() => {
      flight.left -= 1;
      if (flight.left === 0) flights = flights.filter((other) => other !== flight);
    });
  });
}

async function draw(cell, wanted, flight) {
  const start = performance.now();
  let answer;
  try {
    answer = await fetch("api/draw", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(wanted),
      signal: flight.control.signal,
    });
    if (answer.status === 429) {
      const seconds = Number(answer.headers.get("Retry-After")) || 1;
      if (flight.turn === turn) $("problem").textContent = "Many are drawing; yours comes as soon as there is room.";
      await new Promise((done) => setTimeout(done, 1000 * seconds));
      if (flight.turn === turn) await draw(cell, wanted, flight);
      return;
    }
    if (answer.status === 204) return;
    if (!answer.ok) {
      const body = await answer.json().catch(() => ({}));
      if (flight.turn === turn) $("problem").textContent = body.detail || `The server answers ${answer.status}.`;
      return;
    }
    const blob = await answer.blob();
    if (flight.turn < cell.turn || !cells.includes(cell)) return;
    show(cell, blob, wanted, flight.turn);
    if (flight.turn === turn) {
      const notes = JSON.parse(answer.headers.get("X-Sbrush-Notes") || "[]");
      tell(wanted, performance.now() - start, notes);
    }
  } catch (problem) {
    if (problem.name !== "AbortError" && flight.turn === turn)
      $("problem").textContent = "The server does not answer. Is sbrush serve still running?";
  }
}

function show(cell, blob, wanted, number) {
  release(cell.image);
  cell.turn = number;
  cell.image = { ...wanted, blob, url: URL.createObjectURL(blob) };
  const img = cell.frame.firstChild;
  img.src = cell.image.url;
  img.alt = described(wanted);
  cell.frame.disabled = false;
  $("download").disabled = false;
}

function tell(wanted, milliseconds, notes) {
  const seeds = cells.map((cell) => cell.image && cell.image.seed).filter((n) => n !== null);
  const named = seeds.length > 1 ? `seeds ${seeds[0]} to ${seeds[seeds.length - 1]}` : `seed ${wanted.seed}`;
  const parts = [named, `${Math.round(milliseconds)} ms`, ...notes];
  $("status").textContent = parts.join(" · ");
  $("problem").textContent = "";
  clearTimeout(settle);
  settle = setTimeout(() => {
    keep();
    $("spoken").textContent = [`Drawn: ${described(wanted)}`, ...notes].join(". ");
  }, SETTLED);
}

// Makes as many cells as there are variations; `empty` takes the images out of them.
function layOut(empty) {
  if (cells.length === count() && !empty) return;
  cells.forEach((cell) => release(cell.image));
  stage.dataset.count = count();
  cells = Array.from({ length: count() }, () => {
    const frame = document.createElement(count() > 1 ? "button" : "div");
    const cell = { frame, turn: 0, image: null };
    frame.className = "cell";
    frame.append(new Image());
    frame.firstChild.alt = "";
    if (count() > 1) {
      frame.type = "button";
      frame.disabled = true;
      frame.title = "Draw this one alone";
      frame.onclick = () => choose(cell);
    }
    return cell;
  });
  stage.replaceChildren(...cells.map((cell) => cell.frame));
  $("download").disabled = true;
  $("status").textContent = "";
}

// A variation that is chosen is drawn alone from now on.
function choose(cell) {
  if (!cell.image || cells.length === 1) return;
  seed.value = cell.image.seed;
  setLock(true);
  form.elements.count.value = "1";
  follow();
  prompt.focus();
}

function another() {
  keep();
  seed.value = anySeed();
  follow();
}

function setLock(locked) {
  lock.setAttribute("aria-pressed", String(locked));
  lock.title = locked ? "Locked: every image has this seed (L)" : "Open: what you type gets another seed (L)";
}

// ---- history and files

// Lets an image go that has left the stage, unless the history has it.
function release(image) {
  if (image && !kept.includes(image)) URL.revokeObjectURL(image.url);
}

// An image in words, for those who hear it.
const described = ({ prompt, negative, seed }) =>
  [prompt, negative && `without ${negative}`, `seed ${seed}`].filter(Boolean).join(", ");

const alike = (one, other) => ["prompt", "seed", "steps", "negative"].every((name) => one[name] === other[name]);

function keep() {
  const images = cells.map((cell) => cell.image).filter(Boolean);
  for (const image of images.reverse()) {
    if (kept.some((other) => alike(other, image))) continue;
    kept.unshift(image);
  }
  for (const image of kept.splice(KEPT)) if (!images.includes(image)) URL.revokeObjectURL(image.url);
  showHistory();
}

function showHistory() {
  $("history").hidden = kept.length === 0;
  const now = cells.length === 1 && cells[0].image;
  past.replaceChildren(...kept.map((image) => {
    const item = document.createElement("li"), button = document.createElement("button"), img = new Image();
    img.src = image.url;
    img.alt = described(image);
    button.type = "button";
    button.title = img.alt;
    if (now && alike(now, image)) button.setAttribute("aria-current", "true");
    button.onclick = () => recall(image);
    button.append(img);
    item.append(button);
    return item;
  }));
}

function recall(image) {
  prompt.value = image.prompt;
  seed.value = image.seed;
  if (image.steps) steps.value = image.steps;
  negative.value = image.negative || "";
  form.elements.count.value = "1";
  setLock(true);
  follow();
}

function walk(by) {
  const now = cells[0] && cells[0].image;
  const here = kept.findIndex((image) => now && alike(image, now));
  const next = kept[here + by];
  if (next) recall(next);
}

function download() {
  for (const { image } of cells) {
    if (!image) continue;
    const link = document.createElement("a");
    const words = image.prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60);
    link.href = image.url;
    link.download = `${words || "image"}-seed${image.seed}.png`;
    link.click();
  }
}

// ---- what the reader does

prompt.addEventListener("input", () => {
  if (!isLocked()) seed.value = anySeed();
  follow();
});
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.isComposing) {
    event.preventDefault();
    another();
  } else if (event.key === "Escape") prompt.blur();
});
seed.addEventListener("input", () => {
  seed.value = seed.value.replace(/\D/g, "");
  setLock(true);
  follow();
});
steps.addEventListener("change", follow);
negative.addEventListener("input", follow);
$("count").addEventListener("change", follow);
$("another").addEventListener("click", another);
$("download").addEventListener("click", download);
lock.addEventListener("click", () => setLock(!isLocked()));
form.addEventListener("submit", (event) => event.preventDefault());
$("help-button").addEventListener("click", () => $("help").showModal());
$("clear").addEventListener("click", () => {
  const shown = cells.map((cell) => cell.image);
  kept.filter((image) => !shown.includes(image)).forEach((image) => URL.revokeObjectURL(image.url));
  kept = [];
  showHistory();
  prompt.focus();
});

document.addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "s") {
    event.preventDefault();
    download();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
  if (event.target.matches("input:not([type=radio]), textarea, select")) return;
  const arrows = !event.target.matches("input"); // radio buttons have arrows of their own
  const actions = {
    "/": () => prompt.focus(),
    n: another,
    l: () => setLock(!isLocked()),
    v: () => {
      form.elements.count.value = { 1: "4", 4: "9", 9: "1" }[count()];
      follow();
    },
    d: download,
    "?": () => $("help").showModal(),
    ...(arrows && { ArrowLeft: () => walk(-1), ArrowRight: () => walk(1) }),
  };
  const action = actions[event.key] || actions[event.key.toLowerCase()];
  if (action) {
    event.preventDefault();
    action();
  }
});

// ---- the start

function offer(examples) {
  $("examples").replaceChildren(...examples.map((text) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.onclick = () => {
      prompt.value = text;
      prompt.focus();
      follow();
    };
    return button;
  }));
}

async function start() {
  try {
    const answer = await fetch("api/info");
    if (!answer.ok) throw new Error(String(answer.status));
    about = await answer.json();
  } catch {
    $("problem").textContent = "The server does not answer. Is sbrush serve still running?";
    return;
  }
  $("student").textContent = [about.student, ...about.loras, `${about.width} × ${about.height}`].join(" · ");
  stage.style.setProperty("--ratio", about.width / about.height);
  stage.classList.toggle("small", Math.max(about.width, about.height) <= 256);
  steps.replaceChildren(...about.steps.map((n) => new Option(n, n, n === about.usual_steps, n === about.usual_steps)));
  $("steps-field").hidden = about.steps.length < 2;
  $("negative-field").hidden = !about.negative;
  negative.maxLength = about.longest_prompt;
  prompt.maxLength = about.longest_prompt;
  offer(about.built_in_world
    ? ["a small red cat", "a big purple fish", "a teal bird on a mint background"]
    : ["a lighthouse at dusk", "a bowl of cherries, oil painting", "a fox in the snow"]);
  if (prompt.value.trim()) follow();
}

layOut(true);
start();
