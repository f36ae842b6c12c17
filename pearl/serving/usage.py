"""What an answer cost: OpenAI's usage, and how speculative decoding went."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pearl.outputs import RequestMetrics


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> dict[str, Any]:
    """``prompt_tokens`` counts each prompt once, ``completion_tokens`` what is returned of all outputs."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": min(cached_tokens, prompt_tokens)},
    }


def summed_histogram(histograms: Iterable[Sequence[int]]) -> list[int]:
    """[i]: verdicts that made i drafted tokens output."""
    total: list[int] = []
    for histogram in histograms:
        total.extend([0] * (len(histogram) - len(total)))
        for accepted, count in enumerate(histogram):
            total[accepted] += count
    return total


def statistics(outputs: Sequence[RequestMetrics], largest_window: int) -> dict[str, Any]:
    """The field ``metrics`` of an answer: ``speculative_decoding`` as vLLM counts, and ``pearl``.

    ``largest_window``: most tokens drafted at a time.
    """
    histogram = summed_histogram(m.acceptance_histogram for m in outputs)
    steps, accepted, drafted = sum(histogram), sum(m.accepted for m in outputs), sum(m.drafted for m in outputs)
    tokens, forwards = sum(m.output_tokens for m in outputs), sum(m.target_forwards for m in outputs)
    tested, runs = sum(m.tested for m in outputs), sum(m.runs for m in outputs)
    first_tokens = [m.time_to_first_token for m in outputs if m.time_to_first_token is not None]
    return {
        "speculative_decoding": {
            "mean_acceptance_length": 1 + accepted / steps if steps else None,
            "draft_acceptance_rate": accepted / drafted if drafted else None,
            "acceptance_histogram": histogram,
            "num_spec_steps": steps,
            "num_accepted_draft_tokens": accepted,
            "num_draft_tokens": drafted,
            "num_spec_tokens": largest_window,
        },
        "pearl": {
            "target_forwards": forwards,
            "draft_forwards": sum(m.draft_forwards for m in outputs),
            "tokens_per_target_forward": tokens / forwards if forwards else None,
            "acceptance_rate": accepted / tested if tested else None,  # of the drafted tokens that were judged
            "mean_accepted_run": accepted / runs if runs else None,
            "preemptions": sum(m.preemptions for m in outputs),
            "time_to_first_token": min(first_tokens, default=None),
        },
    }
