"""What an answer cost: OpenAI's usage, and how speculative decoding went."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pearl.outputs import RequestMetrics

_COUNTED = (
    "target_forwards", "draft_forwards", "drafted", "tested", "accepted", "runs", "preemptions", "output_tokens",
)  # fmt: skip


def usage(
    prompt_tokens: int, completion_tokens: int, cached_tokens: int, reasoning_tokens: int | None = None
) -> dict[str, Any]:
    """``prompt_tokens`` counts each prompt once, ``completion_tokens`` what is returned of all outputs.

    ``reasoning_tokens``: None where there is no reasoning to tell from answers.
    """
    counts: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": min(cached_tokens, prompt_tokens)},
    }
    if reasoning_tokens is not None:
        counts["completion_tokens_details"] = {"reasoning_tokens": reasoning_tokens}
    return counts


def totals(outputs: Iterable[RequestMetrics]) -> RequestMetrics:
    """What is counted, summed; without times."""
    total = RequestMetrics()
    histogram = total.acceptance_histogram
    for each in outputs:
        for name in _COUNTED:
            setattr(total, name, getattr(total, name) + getattr(each, name))
        histogram.extend([0] * (len(each.acceptance_histogram) - len(histogram)))
        for accepted, count in enumerate(each.acceptance_histogram):
            histogram[accepted] += count
    return total


def statistics(outputs: Sequence[RequestMetrics], largest_window: int) -> dict[str, Any]:
    """The field ``metrics`` of an answer: ``speculative_decoding`` as vLLM counts, and ``pearl``.

    ``largest_window``: most tokens drafted at a time.
    """
    total = totals(outputs)
    steps, accepted, forwards = sum(total.acceptance_histogram), total.accepted, total.target_forwards
    first_tokens = [m.time_to_first_token for m in outputs if m.time_to_first_token is not None]
    return {
        "speculative_decoding": {
            "mean_acceptance_length": 1 + accepted / steps if steps else None,
            "draft_acceptance_rate": accepted / total.drafted if total.drafted else None,
            "acceptance_histogram": total.acceptance_histogram,
            "num_spec_steps": steps,
            "num_accepted_draft_tokens": accepted,
            "num_draft_tokens": total.drafted,
            "num_spec_tokens": largest_window,
        },
        "pearl": {
            "target_forwards": forwards,
            "draft_forwards": total.draft_forwards,
            "tokens_per_target_forward": total.output_tokens / forwards if forwards else None,
            "acceptance_rate": accepted / total.tested
            if total.tested
            else None,  # of the drafted tokens that were judged
            "mean_accepted_run": accepted / total.runs if total.runs else None,
            "preemptions": total.preemptions,
            "time_to_first_token": min(first_tokens, default=None),
        },
    }
