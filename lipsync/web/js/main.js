// The page: its buttons and words, and who is told what.

import { Charts } from "./charts.js";
import { Connection } from "./connection.js";
import { Gallery } from "./gallery.js";
import { Player } from "./player.js";
import { Recordings } from "./recordings.js";
import { Sound } from "./sound.js";
import { Stage } from "./stage.js";
import { followTheme } from "./theme.js";

const TOKEN_KEY = "lipsync.token";
const MODEL_KEY = "lipsync.model";
const MODELS_EVERY_MS = 15_000;
const NO_MODELS_EVERY_MS = 2000;

const part = (id) => document.getElementById(id);
const models = part("model");
const playButton = part("play");
const microphoneButton = part("microphone");
const file = part("file");
const drop = part("drop");

const scheme = location.protocol === "https:" ? "wss:" : "ws:";
const connection = new Connection(`${scheme}//${location.host}/v1`, { token: sessionStorage.getItem(TOKEN_KEY) ?? "" });
const player = new Player(part("face"));
const sound = new Sound();
const recordings = new Recordings(connection, sound);
const stage = new Stage({ connection, player, sound, recordings });
const gallery = new Gallery(part("gallery"), connection, { isBusy: () => stage.current !== null });
const charts = new Charts(part("charts"), player, { isLive: () => stage.current !== null });

window.lipsync = { player, connection, stage };

// Words

const complaints = { connection: "", stage: "" };

function complain(about, text) {
  complaints[about] = text;
  const whole = Object.values(complaints).filter(Boolean).join(" ");
  if (part("error").textContent !== whole) {
    part("error").textContent = whole;
  }
}

function say(text) {
  if (part("status").textContent !== text) {
    part("status").textContent = text; // set again, it would be read out again
  }
}

stage.addEventListener("say", ({ detail }) => say(detail));
stage.addEventListener("complain", ({ detail }) => complain("stage", detail));

// Models

let modelsThere = [];
let greeting = ""; // said before what can be done
let looking = 0;

async function lookForModels() {
  clearTimeout(looking);
  if (connection.state === "connected") {
    try {
      show((await connection.ask("ListModels", {})).loaded_models);
    } catch (error) {
      stage.failed(error);
    }
  }
  clearTimeout(looking);
  looking = setTimeout(lookForModels, modelsThere.length === 0 ? NO_MODELS_EVERY_MS : MODELS_EVERY_MS);
}

function show(names) {
  const isNew = names.join() !== modelsThere.join();
  modelsThere = names;
  if (isNew) {
    models.replaceChildren(...names.map((name) => new Option(name, name)));
  }
  // what was chosen may have been away for a while
  const liked = sessionStorage.getItem(MODEL_KEY);
  const order = stage.current === null ? [liked, stage.model] : [stage.model, liked];
  const wanted = order.find((name) => names.includes(name)) ?? names[0] ?? null;
  if (wanted !== stage.model || stage.metadata === null) {
    choose(wanted);
  }
  if (wanted !== null) {
    models.value = wanted;
  }
  if (isNew) {
    gallery.update(names, wanted);
  }
}

function choose(name) {
  complain("stage", "");
  stage.say(`${greeting}${name === null ? "No model is loaded on this server." : `Ready: ${name}.`}`);
  greeting = "";
  gallery.choose(name);
  stage.choose(name);
}

function like(name) {
  sessionStorage.setItem(MODEL_KEY, name);
  models.value = name;
  choose(name);
}

models.addEventListener("change", () => like(models.value));
gallery.addEventListener("chosen", ({ detail }) => like(detail));

// What can be done

stage.addEventListener("change", update);

let kindBefore = null;

function update() {
  const { kind } = stage;
  const isAble = connection.state === "connected" && stage.metadata !== null;
  playButton.setAttribute("aria-pressed", String(kind === "playing"));
  microphoneButton.setAttribute("aria-pressed", String(kind === "listening"));
  for (const control of [playButton, microphoneButton, file]) {
    control.disabled = !isAble;
  }
  drop.classList.toggle("off", !isAble);
  models.disabled = modelsThere.length === 0;
  part("face").setAttribute("aria-label", stage.model === null ? "No face yet" : `The face of ${stage.model}`);
  if (kind !== null && kindBefore === null) {
    charts.restart();
  }
  kindBefore = kind;
}

playButton.addEventListener("click", () => {
  if (stage.kind === "playing") {
    stage.interrupt();
  } else {
    stage.play({ repeat: part("repeat").checked });
  }
});
microphoneButton.addEventListener("click", () => {
  if (stage.kind === "listening") {
    stage.interrupt();
  } else {
    stage.listen({ hear: part("hear").checked });
  }
});
part("hear").addEventListener("change", () => stage.hear(part("hear").checked));
part("interrupt").addEventListener("click", () => stage.interrupt());
document.addEventListener("keydown", ({ key }) => {
  if (key === "Escape") {
    stage.interrupt();
  }
});

// Files, chosen or dropped anywhere

function speak(list) {
  if (list.length > 0 && !file.disabled) {
    stage.speak(list[0]);
  }
}

file.addEventListener("change", () => {
  const chosen = [...file.files];
  file.value = ""; // so that the same one can be chosen again
  speak(chosen);
});

let inside = 0; // elements of the page that a file is dragged over

document.addEventListener("dragenter", (event) => {
  event.preventDefault();
  inside += 1;
  drop.classList.add("over");
});
document.addEventListener("dragleave", () => {
  inside -= 1;
  drop.classList.toggle("over", inside > 0);
});
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  inside = 0;
  drop.classList.remove("over");
  speak([...event.dataTransfer.files]);
});

// The connection

let wasLost = false;

function connectionChanged() {
  const { state, problem, retryMs } = connection;
  const seconds = Math.max(1, Math.round(retryMs / 1000));
  const server = problem ? ` The server says: ${problem.replace(/\.$/, "")}.` : "";
  part("connection").dataset.state = state;
  switch (state) {
    case "connected":
      part("connection").textContent = "connected";
      complain("connection", "");
      if (wasLost) {
        greeting = "Connected again. ";
        recordings.forget();
        gallery.refresh();
      }
      wasLost = false;
      lookForModels();
      break;
    case "waiting":
      part("connection").textContent = "not connected";
      complain("connection", `The server cannot be reached; trying again in ${seconds} s.${server}`);
      say("Not connected.");
      wasLost = true;
      stage.metadata = null; // it may be another server, with other packages
      break;
    case "refused":
      part("connection").textContent = "not admitted";
      part("tokens").hidden = false;
      say("Not connected.");
      complain("connection", `Not admitted; enter a token that this server knows.${server}`);
      break;
    default:
      part("connection").textContent = "connecting";
  }
  update();
}

connection.addEventListener("state", connectionChanged);
window.addEventListener("online", () => connection.hurry());
document.addEventListener("visibilitychange", () => document.visibilityState === "visible" && connection.hurry());

part("token").value = connection.token;
part("token").addEventListener("change", () => {
  const token = part("token").value.trim();
  sessionStorage.setItem(TOKEN_KEY, token);
  connection.useToken(token);
});

async function begin() {
  try {
    const health = await (await fetch("/health")).json();
    part("tokens").hidden = !health.tokens;
  } catch {
    // it is told when the connection is not made either
  }
  connection.open();
}

followTheme(part("theme"));
update();
begin();
