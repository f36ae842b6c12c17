// The same request twice, with drafting and then without: never at once, so that neither slows the other. Then both are
// shown side by side, each token when it came.

import { Answer, element } from "./answer.js";

const SLOWEST = 4000; // milliseconds that the replay of the slower one lasts, at least
const LANES = ["drafting", "plain"];

function still() {
  return matchMedia("(prefers-reduced-motion: reduce)").matches;
}

function speedOf(answer) {
  const { arrivals } = answer;
  if (arrivals.length < 2) return null;
  const [first, last] = [arrivals[0], arrivals[arrivals.length - 1]];
  return last.at > first.at ? (1000 * (last.tokens - first.tokens)) / (last.at - first.at) : null;
}

/** For how many leading tokens two answers are alike, and whether they are throughout. */
export function compare(a, b) {
  let same = 0;
  while (same < a.length && a[same] === b[same]) same += 1;
  return { same, all: same === a.length && same === b.length };
}

export class Race {
  constructor() {
    this.answers = {};
    this.frame = null;
    element("result").textContent = "";
    element("replay").hidden = true;
    for (const lane of LANES) {
      element(`race-${lane}`).replaceChildren();
      this.show(lane, 0, 1, null);
    }
  }

  /** The answer that goes into a lane. */
  enter(lane) {
    const answer = new Answer(element(`race-${lane}`));
    this.answers[lane] = answer;
    answer.onTokens = () => this.show(lane, answer.tokens, answer.tokens, speedOf(answer));
    return answer;
  }

  show(lane, tokens, of, speed) {
    const bar = element(`race-${lane}-bar`);
    bar.max = Math.max(of, 1);
    bar.value = tokens;
    element(`race-${lane}-speed`).textContent = speed === null ? `${tokens} tokens` : `${tokens} tokens, ${speed.toFixed(0)} tok/s`;
  }

  /** Both have ended. `greedy`: whether they have to be alike. */
  finish(greedy) {
    const [fast, plain] = LANES.map((lane) => this.answers[lane]);
    const speeds = [speedOf(fast), speedOf(plain)];
    const { same, all } = compare(fast.ids, plain.ids);
    const words = [];
    if (speeds[0] && speeds[1]) {
      const factor = speeds[0] / speeds[1];
      words.push(`With drafting: ${factor.toFixed(2)} times the speed of without.`);
    }
    if (all) words.push("Same tokens: yes.");
    else if (greedy) words.push(`Same tokens: no, they part after ${same}.`);
    else words.push("Same tokens: no. Sampled, both are drawn from the same distribution.");
    element("result").textContent = words.join(" ");
    element("replay").hidden = false;
    if (!still()) this.replay();
  }

  /** Shows both from the beginning, with the times at which their tokens came, slowed down. */
  replay() {
    this.stop();
    const lasted = LANES.map((lane) => this.answers[lane].arrivals.at(-1)?.at ?? 0);
    const slower = Math.max(1, SLOWEST / Math.max(...lasted, 1));
    const begun = performance.now();
    const step = (now) => {
      const at = (now - begun) / slower;
      for (const lane of LANES) this.reveal(lane, at);
      this.frame = at < Math.max(...lasted) ? requestAnimationFrame(step) : null;
      element("replay-speed").textContent = this.frame ? `Replay, ${slower.toFixed(0)} times slower` : "";
    };
    this.frame = requestAnimationFrame(step);
  }

  reveal(lane, at) {
    const answer = this.answers[lane];
    const { tokens, spans } = answer.arrivals.findLast((arrival) => arrival.at <= at) ?? { tokens: 0, spans: 0 };
    const box = answer.node.parentElement;
    const all = answer.node.querySelectorAll(".token");
    all.forEach((span, index) => span.classList.toggle("later", index >= spans));
    const last = all[spans - 1];
    box.scrollTop = last ? last.offsetTop + last.offsetHeight + 12 - box.clientHeight : 0;
    this.show(lane, tokens, answer.tokens, speedOf(answer));
  }

  /** Ends a replay where everything is shown. */
  stop() {
    if (this.frame !== null) cancelAnimationFrame(this.frame);
    this.frame = null;
    element("replay-speed").textContent = "";
    for (const lane of LANES) if (this.answers[lane]) this.reveal(lane, Infinity);
  }
}
