// One answer while it grows: its tokens, its figures and its rounds. Text of a model is only ever textContent.

import { draw, settle, summary } from "./timeline.js";

const VERDICTS = {
  "pre-verify": "drafted, and accepted while the rest of its window was being drafted (pre-verify)",
  "post-verify": "drafted, and accepted as part of a window that was waiting (post-verify)",
  prepared: "drafted ahead, in a window that was prepared for this verdict, and accepted",
  corrected: "the target's own, in place of a drafted token that it rejected",
  plain: "the target's own: nothing was drafted here",
};
const FIGURES = ["tokens", "speed", "first", "acceptance", "rounds", "per-round"];
const REDRAWN = { figures: 100, rounds: 1000 }; // milliseconds, while an answer grows: the server may be on this machine

export function element(id) {
  return document.getElementById(id);
}

function show(id, text) {
  element(id).textContent = text;
}

export function made(kind, classes, text = "") {
  const node = document.createElement(kind);
  node.className = classes;
  node.textContent = text;
  return node;
}

export class Answer {
  /** `node`: where the text goes. */
  constructor(node) {
    this.node = node;
    this.text = "";
    this.counts = { draft: 0, target: 0 };
    this.verdicts = Object.fromEntries(Object.keys(VERDICTS).map((name) => [name, 0]));
    this.ids = [];
    this.rounds = [];
    this.arrivals = []; // of pieces of the stream: milliseconds since the request was sent; tokens and spans by then
    this.metrics = null;
    this.reason = null;
    this.onTokens = () => {};
    this.begun = performance.now();
    this.spans = 0;
    this.shown = { figures: 0, rounds: 0 }; // when
    this.present();
    node.classList.add("running");
  }

  get tokens() {
    return this.counts.draft + this.counts.target;
  }

  add(event) {
    const box = this.node.parentElement;
    const follows = box.scrollHeight - box.scrollTop - box.clientHeight < 40; // else somebody reads further up
    this.rounds.push(...(event.rounds ?? []));
    for (const choice of event.choices) {
      for (const piece of choice.text_sources ?? []) this.addText(piece);
      this.addTokens(choice);
      this.reason = choice.finish_reason ?? this.reason;
    }
    if (event.metrics) this.metrics = event.metrics.pearl;
    if (this.isDue("figures")) this.showFigures();
    if (this.isDue("rounds")) this.showRounds();
    if (follows) box.scrollTop = box.scrollHeight;
  }

  isDue(what) {
    return performance.now() - this.shown[what] > REDRAWN[what];
  }

  addText({ text, source, verdict }) {
    this.text += text;
    const token = made("span", `token ${source} ${verdict}`, text);
    token.title = VERDICTS[verdict];
    this.node.append(token);
    this.spans += 1;
  }

  addTokens({ token_sources: sources = [], token_verdicts: verdicts = [], token_ids: ids = [] }) {
    if (!sources.length) return;
    for (const source of sources) this.counts[source] += 1;
    for (const verdict of verdicts) this.verdicts[verdict] += 1;
    this.ids.push(...ids);
    this.arrivals.push({ at: performance.now() - this.begun, tokens: this.tokens, spans: this.spans });
    this.onTokens();
  }

  /** Shows everything but the text: this answer's, whichever was shown before. */
  present() {
    this.showFigures();
    this.showRounds();
  }

  showFigures() {
    this.shown.figures = performance.now();
    show("drafted", this.counts.draft);
    show("own", this.counts.target);
    for (const [name, count] of Object.entries(this.verdicts)) show(`count-${name}`, count);
    for (const id of FIGURES) show(id, "–");
    if (this.arrivals.length) {
      show("tokens", this.tokens);
      show("first", `${Math.round(this.arrivals[0].at)} ms`);
      show("speed", ((1000 * this.tokens) / this.arrivals.at(-1).at).toFixed(0));
    }
    if (this.metrics) {
      const { acceptance_rate: rate, target_forwards: forwards, tokens_per_target_forward: each } = this.metrics;
      show("acceptance", rate === null ? "–" : `${(100 * rate).toFixed(0)} %`);
      show("rounds", forwards);
      show("per-round", each?.toFixed(2) ?? "–");
    }
  }

  showRounds() {
    this.shown.rounds = performance.now();
    const rounds = settle(this.rounds.map((round) => ({ ...round })), this.reason !== null);
    draw(element("timeline"), rounds);
    show("timeline-summary", rounds.length ? summary(rounds) : "");
    element("timeline-figure").hidden = !rounds.length;
  }

  finish() {
    this.node.classList.remove("running");
    this.present();
  }
}
