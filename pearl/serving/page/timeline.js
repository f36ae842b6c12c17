// A strip of rounds: when each model worked, and what became of what was drafted. Shapes tell it as well as colours.

const SVG = "http://www.w3.org/2000/svg";
const LANES = { tokens: 4, target: 46, draft: 78, prepared: 104 }; // tops, in pixels
const HEIGHT = { forward: 22, prepared: 10, all: 136 };
const WIDE = { round: 44, draft: 30 }; // pixels of the middle one of all rounds, and of the draft's forwards, at least
const NARROW = 5; // pixels of a token
const MOST = 600; // rounds that are drawn: the first ones

function drawn(kind, classes, places, title = "") {
  const node = document.createElementNS(SVG, kind);
  node.setAttribute("class", classes);
  for (const [name, value] of Object.entries(places)) node.setAttribute(name, value);
  if (title) node.append(Object.assign(document.createElementNS(SVG, "title"), { textContent: title }));
  return node;
}

/**
 * Adds `kept`, `lost`: of the tokens that each round drafted, how many became output, and how many were thrown away; and
 * `hit`: of its prepared ones, how many became output. `ended`: whether what is pending still never will.
 */
export function settle(rounds, ended) {
  let pending = []; // for each token, [round, which of its counts]
  for (const round of rounds) {
    Object.assign(round, { kept: 0, lost: 0, hit: 0, open: 0 });
    const own = Array.from({ length: round.drafted }, () => [round, "kept"]);
    if (!round.committed) {
      pending.push(...own);
      continue;
    }
    // A request that was preempted forgot what was pending.
    pending = round.pending === pending.length ? pending : [];
    const tested = [...pending, ...own].slice(0, round.tested);
    for (const [origin, count] of tested.slice(0, round.accepted)) origin[count] += 1;
    if (round.accepted < round.tested) {
      pending = Array.from({ length: round.hit_tokens ?? 0 }, () => [round, "hit"]);
    } else {
      pending = [...pending, ...own].slice(round.tested);
    }
  }
  if (!ended) for (const [origin, count] of pending) if (count === "kept") origin.open += 1;
  for (const round of rounds) round.lost = round.drafted - round.kept - round.open;
  return rounds;
}

function span(rounds) {
  const forwards = rounds.flatMap(({ target, draft }) => [target, draft]).filter(Boolean);
  const begin = Math.min(...forwards.map((each) => each.begin));
  return [begin, Math.max(...forwards.map((each) => each.begin + each.ms))];
}

/** Milliseconds in which both models worked. */
function overlap({ target, draft }) {
  if (!target || !draft) return 0;
  const end = Math.min(target.begin + target.ms, draft.begin + draft.ms);
  return Math.max(0, end - Math.max(target.begin, draft.begin));
}

function middle(values) {
  const sorted = [...values].sort((a, b) => a - b);
  return Math.max(sorted[sorted.length >> 1], 1e-3);
}

function sum(values) {
  return values.reduce((total, value) => total + value, 0);
}

export function summary(rounds) {
  const [begin, end] = span(rounds);
  const of = (name) => sum(rounds.map((round) => round[name] ?? 0));
  const both = sum(rounds.map(overlap));
  const words = [`${rounds.length} rounds in ${(end - begin).toFixed(0)} ms`];
  words.push(`both models at work for ${((100 * both) / Math.max(end - begin, 1e-9)).toFixed(0)} % of the time`);
  words.push(`${of("drafted")} tokens drafted: ${of("kept")} became output, ${of("lost")} thrown away`);
  const prepared = of("prepared");
  if (prepared) {
    const hits = rounds.filter((round) => round.hit_tokens).length;
    words.push(`${prepared} windows prepared: ${hits} came true and gave ${of("hit")} tokens`);
  }
  return `${words.join("; ")}.`;
}

function describe(round, number) {
  const words = [`Round ${number}: ${round.mode}`];
  if (round.target) words.push(`target ${round.target.ms.toFixed(2)} ms`);
  if (round.draft) words.push(`draft ${round.draft.ms.toFixed(2)} ms`);
  words.push(`${round.drafted} drafted, ${round.tested} tested, ${round.accepted} accepted`);
  if (round.lost) words.push(`${round.lost} of what it drafted thrown away`);
  if (round.prepared) words.push(`${round.prepared} windows prepared${round.hit_tokens ? ", one came true" : ""}`);
  return words.join(", ");
}

/**
 * A forward, cut into its tokens: the first `solid` are filled, `hollow` ones outlined, as many as there are. Where they
 * would be too narrow to tell one from the other, those that are alike are drawn as one.
 */
function steps(group, classes, { x, y, width, height }, solid, hollow) {
  const each = width / (solid + hollow);
  const groups = [["solid", solid], ["hollow", hollow]].filter(([, count]) => count);
  const alike = each < NARROW ? groups : groups.flatMap(([kind, count]) => Array.from({ length: count }, () => [kind, 1]));
  let left = x;
  for (const [kind, count] of alike) {
    const inset = kind === "solid" ? 0 : 0.75; // an outline is drawn on the edge
    const places = { x: left + inset, y: y + inset, width: Math.max(count * each - 1 - 2 * inset, 0.5) };
    group.append(drawn("rect", `${classes} ${kind}`, { ...places, height: height - 2 * inset, "data-tokens": count }));
    left += count * each;
  }
}

function drawRound(round, number, place) {
  const group = drawn("g", "round", {}, describe(round, number));
  const bar = (forward, y, height) => ({ x: place(forward.begin), y, width: forward.ms * place.scale, height });
  if (round.draft) {
    const at = bar(round.draft, LANES.draft, HEIGHT.forward);
    if (round.drafted) steps(group, "draft-bar", at, round.drafted - round.lost, round.lost);
    else group.append(drawn("rect", "idle-bar", { ...at, width: Math.max(at.width, 0.5) }));
    if (round.prepared_tokens) {
      const below = { ...at, y: LANES.prepared, height: HEIGHT.prepared };
      steps(group, "prepared-bar", below, round.hit_tokens ?? 0, round.prepared_tokens - (round.hit_tokens ?? 0));
    }
  }
  if (round.target) {
    const at = bar(round.target, LANES.target, HEIGHT.forward);
    group.append(drawn("rect", round.target.rows ? "target-bar solid" : "idle-bar", { ...at, width: Math.max(at.width - 1, 0.5) }));
    const end = at.x + at.width;
    for (let i = 0; i < round.committed; i += 1) {
      const y = LANES.target - 8 - 7 * Math.min(i, 5);
      if (i < round.accepted) group.append(drawn("circle", "accepted-mark", { cx: end, cy: y, r: 2.6 }));
      else group.append(drawn("path", "own-mark", { d: `M${end} ${y - 3.6}l3.6 3.6l-3.6 3.6l-3.6-3.6z` }));
    }
  }
  return group;
}

function axis(svg, begin, end, place) {
  const wanted = (80 / place.scale) || 1;
  const power = 10 ** Math.floor(Math.log10(wanted));
  const step = [1, 2, 5, 10].map((n) => n * power).find((each) => each >= wanted);
  for (let t = 0; t <= end - begin; t += step) {
    const x = place(begin + t);
    svg.append(drawn("path", "tick", { d: `M${x} ${HEIGHT.all - 18}v4` }));
    const label = drawn("text", "tick-label", { x: x + 2, y: HEIGHT.all - 4 });
    label.textContent = `${Number(t.toPrecision(3))} ms`;
    svg.append(label);
  }
}

/** Draws rounds as `return_rounds` tells of them into `node`, which scrolls. */
export function draw(node, every) {
  node.replaceChildren();
  const rounds = every.slice(0, MOST);
  if (!rounds.some((round) => round.target || round.draft)) return;
  const [begin, end] = span(rounds);
  const longer = rounds.map(({ target, draft }) => Math.max(target?.ms ?? 0, draft?.ms ?? 0));
  const drafts = rounds.filter(({ draft }) => draft).map(({ draft }) => draft.ms);
  const scale = Math.max(WIDE.round / middle(longer), drafts.length ? WIDE.draft / middle(drafts) : 0);
  const place = Object.assign((t) => 6 + (t - begin) * scale, { scale });
  const svg = drawn("svg", "rounds", { width: Math.ceil(place(end) + 40), height: HEIGHT.all, "aria-hidden": "true" });
  for (const name of ["target", "draft"]) {
    svg.append(drawn("path", "lane-line", { d: `M0 ${LANES[name] + HEIGHT.forward / 2}H${place(end) + 6}` }));
  }
  rounds.forEach((round, index) => svg.append(drawRound(round, index + 1, place)));
  axis(svg, begin, end, place);
  node.append(svg);
}
