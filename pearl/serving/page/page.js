// The form: what is asked, when, and what is said about it.

import { Answer, element, made } from "./answer.js";
import { Refused, events, read } from "./events.js";
import { Race } from "./race.js";

const form = element("form");
const prompt = element("prompt");
const key = element("key");
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"]; // inputs by the names of the API's fields
const KEY = "pearl-api-key"; // in the tab's storage: gone with the tab
const REASONS = { length: "the limit of tokens is reached", stop: "the text ended by itself" };

let conversation = []; // messages, both sides'
let running = null; // AbortController of the request
let race = null; // the latest
let verification = null; // the server's rule

function mode() {
  return form.elements.mode.value;
}

function keyGiven() {
  return key.value.trim();
}

/** A browser may forbid storage; then the key lives as long as the page. */
function stored(use) {
  try {
    return use(sessionStorage);
  } catch {
    return null;
  }
}

function tell(sentence) {
  element("state").textContent = sentence;
}

function complain(error) {
  const words = error instanceof TypeError ? `the server does not answer (${error.message})` : error.message;
  element("problem").textContent = words;
  element("problem").hidden = false;
  if (error instanceof Refused && error.status === 401) key.focus();
}

async function describe() {
  element("problem").hidden = true;
  try {
    const [model] = (await read("v1/models", keyGiven())).data;
    const { method, draft } = model.pearl;
    verification = model.pearl.verification;
    element("start-race").hidden = !draft;
    element("served").textContent = `${model.id} · ${method}${draft ? ` · draft: ${draft}` : ""}`;
    for (const id of ["temperature", "top_p"]) {
      element(id).placeholder = model.default_sampling_params[id] ?? "1";
    }
  } catch (error) {
    element("served").textContent = "";
    complain(error);
  }
}

function sampling() {
  const given = NUMBERS.filter((id) => element(id).value !== "");
  return Object.fromEntries(given.map((id) => [id, Number(element(id).value)]));
}

function turn(classes, text = "") {
  const node = made("div", `turn ${classes}`);
  node.append(made("span", "prompt", text));
  element("transcript").append(node);
  return node;
}

function wishes() {
  return { stream: true, metrics: true, return_token_sources: true, return_rounds: true, ...sampling() };
}

/** Puts the question on the page; returns where, and how, it is asked. */
function ask() {
  const text = prompt.value;
  const options = wishes();
  if (mode() === "completion") {
    element("transcript").replaceChildren();
    return { url: "v1/completions", body: { prompt: text, ...options }, answer: new Answer(turn("completion", text)) };
  }
  turn("user", text);
  conversation.push({ role: "user", content: text });
  prompt.value = "";
  const body = { messages: conversation, ...options };
  return { url: "v1/chat/completions", body, answer: new Answer(turn("assistant")) };
}

function busy(now) {
  const focused = document.activeElement;
  element("generate").disabled = now;
  element("start-race").disabled = now;
  element("stop").disabled = !now;
  for (const radio of form.elements.mode) radio.disabled = now;
  element("renew").disabled = now;
  element("transcript").setAttribute("aria-busy", now);
  // A button that is disabled loses the focus, and with it the keyboard's place.
  if (now && [element("generate"), element("start-race")].includes(focused)) element("stop").focus();
  if (!now && focused === element("stop")) element("generate").focus();
}

/** Whether a question may be asked now; then the page is ready for its answer. */
function begin(racing) {
  if (running || !form.reportValidity()) return false;
  race?.stop();
  running = new AbortController();
  busy(true);
  element("problem").hidden = true;
  element("race").hidden = !racing;
  element("transcript").hidden = racing;
  return true;
}

/** Until the answer has ended; false: before its end. */
async function receive(url, body, answer) {
  let complete = false;
  try {
    for await (const event of events(url, body, keyGiven(), running.signal)) answer.add(event);
    complete = true;
  } catch (error) {
    if (running.signal.aborted) {
      tell("Stopped. What the server counts is not known of an answer that was stopped.");
    } else {
      tell("Failed.");
      complain(error);
    }
  }
  answer.finish();
  return complete;
}

function end() {
  running = null;
  busy(false);
}

async function generate() {
  if (!begin(false)) return;
  tell("Generating…");
  const { url, body, answer } = ask();
  element("transcript").scrollTop = element("transcript").scrollHeight;
  element("output").scrollIntoView({ block: "nearest" });
  if (await receive(url, body, answer)) tell(`Finished: ${REASONS[answer.reason] ?? answer.reason}.`);
  if (mode() === "chat") remember(answer);
  end();
}

/** What both sides of a race are asked: a conversation goes on as if it had not been. */
function raced() {
  const options = { ...wishes(), return_token_ids: true };
  options.seed ??= Math.floor(Math.random() * 2 ** 31);
  if (mode() === "completion") return { url: "v1/completions", body: { prompt: prompt.value, ...options } };
  const messages = [...conversation, { role: "user", content: prompt.value }];
  return { url: "v1/chat/completions", body: { messages, ...options } };
}

async function compete() {
  if (!begin(true)) return;
  race = new Race();
  const { url, body } = raced();
  element("output").scrollIntoView({ block: "nearest" });
  tell("First with drafting…");
  let complete = await receive(url, { ...body, draft: true }, race.enter("drafting"));
  if (complete) {
    tell("Now without…");
    complete = await receive(url, { ...body, draft: false }, race.enter("plain"));
  }
  if (complete) {
    const temperature = Number(element("temperature").value || element("temperature").placeholder);
    race.finish(temperature === 0 || verification === "coupled");
    tell("Finished. Figures and rounds are those with drafting.");
  }
  race.answers.drafting.present();
  end();
}

/** What was said is the next question's past; a question without an answer goes back to where it was written. */
function remember(answer) {
  if (answer.text) {
    conversation.push({ role: "assistant", content: answer.text });
    return;
  }
  const { content } = conversation.pop();
  answer.node.previousSibling.remove();
  answer.node.remove();
  prompt.value ||= content;
}

function renew() {
  race?.stop();
  element("race").hidden = true;
  element("transcript").hidden = false;
  conversation = [];
  element("transcript").replaceChildren();
  const chat = mode() === "chat";
  element("renew").hidden = !chat;
  element("prompt-label").textContent = chat ? "Message" : "Prompt";
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
element("start-race").addEventListener("click", compete);
element("replay").addEventListener("click", () => race.replay());
element("stop").addEventListener("click", () => running?.abort());
element("renew").addEventListener("click", () => {
  renew();
  prompt.focus();
});
for (const radio of form.elements.mode) radio.addEventListener("change", renew);
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    generate();
  } else if (event.key === "Escape") {
    running?.abort();
  }
});
key.addEventListener("change", () => {
  stored((storage) => storage.setItem(KEY, keyGiven()));
  describe();
});
key.value = stored((storage) => storage.getItem(KEY)) ?? "";
renew();
describe();
