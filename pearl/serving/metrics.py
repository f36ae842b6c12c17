"""What Prometheus scrapes: the series that tools know from vLLM, by its names, and our own as ``pearl:*``.

What is counted per chunk are plain numbers of the event loop's; they become series when somebody asks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from pearl.methods import Mode
from pearl.outputs import RequestMetrics
from pearl.serving.request_log import log_request
from pearl.serving.request_record import Latencies, RequestRecord
from pearl.serving.round_counts import ModeCounts
from pearl.serving.usage import totals

_LABELS = ("model_name", "engine")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


@dataclass(frozen=True)
class Gauges:
    """Of the engine, at the moment of a scrape."""

    running: int
    waiting: int
    kv_usage: float
    prefix_queries: int
    prefix_hits: int
    modes: Mapping[Mode, ModeCounts]
    healthy: bool


class Metrics:
    """One app's. Everything but ``exposition`` belongs to the event loop."""

    def __init__(self, model_name: str, replica: str, gauges: Callable[[], Gauges]) -> None:
        self._labels, self._gauges = (model_name, replica), gauges
        self._live: set[RequestRecord] = set()
        self._totals = RequestMetrics()  # of the outputs that have ended
        self._finished: Counter[str] = Counter()  # outputs by finish reason
        self._refused: Counter[str] = Counter()
        self._prompt_tokens = self._generated = self._cancelled = 0
        self._registry = CollectorRegistry()
        self._latencies = Latencies(
            self._seconds("vllm:time_to_first_token_seconds", "Until the first token, queueing included"),
            self._seconds("vllm:inter_token_latency_seconds", "Between the chunks of an output"),
            self._seconds("vllm:e2e_request_latency_seconds", "From arrival to the last token"),
        )
        self._registry.register(self)

    def _seconds(self, name: str, help: str) -> Histogram:
        family = Histogram(name, help, _LABELS, buckets=_SECONDS, registry=self._registry)
        return family.labels(*self._labels)

    def begin(self, request_id: str, prompts: Sequence[int], outputs: int) -> RequestRecord:
        """A request that was queued. ``prompts``: tokens of each."""
        record = RequestRecord(request_id, sum(prompts), outputs, self._latencies, self._ended)
        self._live.add(record)
        self._prompt_tokens += sum(prompts)
        return record

    def refused(self, reason: str) -> None:
        self._refused[reason] += 1

    def _ended(self, record: RequestRecord) -> None:
        self._live.discard(record)
        self._generated += record.generated
        self._totals = totals((self._totals, *record.outputs))
        self._finished.update(record.reasons.values())
        self._cancelled += record.outcome == "cancelled"
        log_request(record)

    def exposition(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        now, live = self._gauges(), list(self._live)
        total = totals((self._totals, *(metrics for record in live for metrics in record.outputs)))
        generated = self._generated + sum(record.generated for record in live)
        histogram = total.acceptance_histogram
        yield self._gauge("vllm:num_requests_running", "Outputs that are being generated", now.running)
        yield self._gauge("vllm:num_requests_waiting", "Outputs that wait", now.waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "Part of the KV pages that is held, 0 to 1", now.kv_usage)
        yield self._gauge("pearl:healthy", "1: the engine works", int(now.healthy))
        for name, help, value in (
            ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache", now.prefix_queries),
            ("vllm:prefix_cache_hits", "Prompt tokens found there", now.prefix_hits),
            ("vllm:prompt_tokens", "Tokens of prompts", self._prompt_tokens),
            ("vllm:generation_tokens", "Tokens returned", generated),
            ("vllm:num_preemptions", "Outputs that gave their pages up for a while", total.preemptions),
            ("vllm:spec_decode_num_drafts", "Verdicts on drafted tokens", sum(histogram)),
            ("vllm:spec_decode_num_draft_tokens", "Tokens drafted", total.drafted),
            ("vllm:spec_decode_num_accepted_tokens", "Drafted tokens that became output", total.accepted),
            ("pearl:target_forwards", "Forwards of the target, for each output in them", total.target_forwards),
            ("pearl:draft_forwards", "Forwards of the draft, for each output in them", total.draft_forwards),
            ("pearl:tested_tokens", "Drafted tokens that were judged", total.tested),
            ("pearl:accepted_runs", "Stretches of accepted tokens", total.runs),
            ("pearl:requests_cancelled", "Requests whose client left", self._cancelled),
        ):  # fmt: skip
            yield self._counter(name, help, [((), value)])
        yield from self._of_modes(now.modes)
        finished = [((reason,), count) for reason, count in sorted(self._finished.items())]
        yield self._counter("vllm:request_success", "Outputs that ended", finished, "finished_reason")
        refused = [((reason,), count) for reason, count in sorted(self._refused.items())]
        yield self._counter(
            "pearl:requests_refused", "Requests that the engine did not take, by error.code", refused, "reason"
        )
        positions = [((str(i),), sum(histogram[i + 1 :])) for i in range(len(histogram) - 1)]
        help = "Drafted tokens that became output, by position"
        yield self._counter("vllm:spec_decode_num_accepted_tokens_per_pos", help, positions, "position")

    def _of_modes(self, modes: Mapping[Mode, ModeCounts]) -> Iterator[Metric]:
        for name, help in (
            ("rounds", "Rounds of the engine, by what the pace had both models do"),
            ("seconds", "Seconds of those rounds"),
            ("tokens", "Tokens that they added to outputs"),
            ("predicted", "Tokens that the pace predicted for those seconds"),
        ):
            values = [((mode,), getattr(counts, name)) for mode, counts in sorted(modes.items())]
            yield self._counter(f"pearl:{'rounds' if name == 'rounds' else f'round_{name}'}", help, values, "mode")

    def _gauge(self, name: str, help: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, help, labels=_LABELS)
        family.add_metric(self._labels, value)
        return family

    def _counter(self, name: str, help: str, values: Iterable[tuple[tuple[str, ...], float]], *labels: str) -> Metric:
        family = CounterMetricFamily(name, help, labels=(*_LABELS, *labels))
        for given, value in values:
            family.add_metric((*self._labels, *given), value)
        return family
