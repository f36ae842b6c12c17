"""A short run, round by round, with its tokens as text: what the report's token timeline is drawn from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.evaluation.setups import PREPARED, Windows, fixed, plain
from pearl.bench.measure import answered
from pearl.bench.prompt_sets import BUILT_IN, load_prompts
from pearl.bench.report import write_whole
from pearl.engine.rounds import RoundRecord, hits
from pearl.llm import LLM
from pearl.messages import Decision
from pearl.sampling_params import SamplingParams

_TOKENS = 64
_RUNS = 5  # of which the one that was disturbed least is kept


def write_trace(path: Path, llm: LLM, windows: Windows, prepares: bool) -> None:
    """Of one built-in prompt, with plain decoding and both methods; each once before, uncounted."""
    runs = {setup.name: setup.options for setup in (
        plain(), fixed("speculative", windows.speculative), fixed("pearl", windows.pearl))}  # fmt: skip
    if prepares:
        pearl = fixed("pearl", windows.pearl)
        runs[f"{pearl.name}+{PREPARED}"] = {**pearl.options, "prepared_windows": PREPARED}
    prompt, params = load_prompts(BUILT_IN, 1)[0], SamplingParams(max_tokens=_TOKENS)
    traces = {}
    for name, options in runs.items():
        with llm.variant(**options, max_num_seqs=1) as variant:
            answered(variant.generate(prompt, params))
            runs_of = [_run(variant, prompt, params) for _ in range(_RUNS)]
        fastest = min(runs_of, key=lambda rounds: sum(record.whole.seconds for record in rounds))
        traces[name] = [row for row in rows(fastest, lambda token: llm.tokenizer.decode([token])) if row["decodes"]]
    write_whole(path, json.dumps({"prompt": prompt, "runs": traces}, ensure_ascii=False) + "\n")


def _run(llm: LLM, prompt: str, params: SamplingParams) -> list[RoundRecord]:
    rounds: list[RoundRecord] = []
    llm.engine.observer = rounds.append
    answered(llm.generate(prompt, params))
    return rounds


def rows(rounds: Sequence[RoundRecord], text: Any) -> list[Mapping[str, Any]]:
    """Of one request: a round's spans in seconds since the first one, and its tokens with their fates: "held",
    "rejected", and "dropped" of those that none looked at. Drafted ones get theirs in the round that judges them. own:
    what the target put in a rejected token's place, or behind the last. hit: whether the next window was prepared.
    """
    start = rounds[0].whole.begin
    found: list[dict[str, Any]] = []
    undecided: list[dict[str, str]] = []  # drafted tokens, as they lie in ``found``
    for record in rounds:
        (decision,) = record.result.decisions.values() or (None,)
        drafted = [{"text": text(t.token), "fate": "dropped"} for w in record.result.windows.values() for t in w]
        judged = undecided + drafted
        tested = [] if decision is None else [
            {"text": text(token), "fate": _fate(place, decision)} for place, token in enumerate(decision.tested)
        ]  # fmt: skip
        for token, known in zip(judged, tested, strict=False):
            token["fate"] = known["fate"]
        if decision is None:
            undecided = judged
        else:
            undecided = [] if decision.next_token is not None else judged[len(decision.tested) :]
        ahead = hits(record)
        if ahead:
            ((request_id, _),) = ahead.items()
            undecided = _prepared(record, request_id, text)
        found.append({
            "target": _span(record.target, start), "draft": _span(record.proposal.busy, start),
            "end": record.whole.begin + record.whole.seconds - start, "drafted": drafted, "tested": tested,
            "own": None if decision is None or decision.next_token is None else text(decision.next_token),
            "prepared": sum(len(item.branches) for item in record.plan.draft.work), "hit": bool(ahead),
            "decodes": all(len(work.tokens) == work.num_logits for work in record.plan.target.work),
        })  # fmt: skip
    return list(found)


def _fate(place: int, decision: Decision) -> str:
    return "held" if place < decision.accepted else "rejected" if place == decision.accepted else "dropped"


def _prepared(record: RoundRecord, request_id: int, text: Any) -> list[dict[str, str]]:
    """Tokens of the window that had been prepared for this verdict, behind its first, which is the correction."""
    decision = record.result.decisions[request_id]
    for item in record.plan.draft.work:
        for branch in item.branches:
            window = record.result.prepared.get(branch.id, ())
            if branch.held == decision.accepted and len(window) > 1 and window[0].token == decision.next_token:
                return [{"text": text(token.token), "fate": "dropped"} for token in window[1:]]
    return []


def _span(interval: Any, start: float) -> list[float] | None:
    return [interval.begin - start, interval.seconds] if interval.seconds else None
