// One answer while it grows: its tokens, a strip of its rounds, and its figures. Text of a model is only ever textContent.

const TITLES = {
  draft: "proposed by the draft model, accepted by the target",
  target: "the target's own token",
};

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
    this.reason = null;
    this.begun = performance.now();
    this.first = this.last = null;
    element("strip").replaceChildren();
    for (const id of ["tokens", "speed", "first", "acceptance", "rounds", "per-round"]) show(id, "–");
    this.showCounts();
    node.classList.add("running");
  }

  get tokens() {
    return this.counts.draft + this.counts.target;
  }

  add(event) {
    const box = this.node.parentElement;
    const follows = box.scrollHeight - box.scrollTop - box.clientHeight < 40; // else somebody reads further up
    for (const choice of event.choices) {
      this.addTokens(choice.token_sources ?? []);
      for (const { text, source } of choice.text_sources ?? []) this.addText(text, source);
      this.reason = choice.finish_reason ?? this.reason;
    }
    if (event.metrics) this.showMetrics(event.metrics);
    if (follows) box.scrollTop = box.scrollHeight;
  }

  addText(text, source) {
    this.text += text;
    const token = made("span", `token ${source}`, text);
    token.title = TITLES[source];
    this.node.append(token);
  }

  addTokens(sources) {
    if (!sources.length) return;
    this.last = performance.now();
    this.first ??= this.last;
    const round = made("div", "round");
    for (const source of sources) {
      this.counts[source] += 1;
      round.append(made("span", `cell ${source}`));
    }
    element("strip").append(round);
    this.showCounts();
    show("tokens", this.tokens);
    show("first", `${Math.round(this.first - this.begun)} ms`);
    show("speed", ((1000 * this.tokens) / (this.last - this.begun)).toFixed(0));
  }

  showCounts() {
    show("drafted", this.counts.draft);
    show("own", this.counts.target);
  }

  showMetrics({ pearl }) {
    const rate = pearl.acceptance_rate;
    show("acceptance", rate === null ? "–" : `${(100 * rate).toFixed(0)} %`);
    show("rounds", pearl.target_forwards);
    show("per-round", pearl.tokens_per_target_forward?.toFixed(2) ?? "–");
  }

  finish() {
    this.node.classList.remove("running");
  }
}
