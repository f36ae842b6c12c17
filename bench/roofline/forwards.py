"""What a model's forward on CPU costs, whole and operator by operator, and the least that it must move.

A forward is that of the engine: ``rows`` tokens at the end of one sequence, a batch that lies ready. Its operators are
timed inside the same forward made of single calls, so that each finds the caches as it would.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from pearl.errors import ConfigurationError
from pearl.messages import ForwardWork, SequenceState
from pearl.models import Decoder, ForwardBatch
from pearl.sampling_params import SamplingParams
from pearl.workers import ModelRunner
from pearl.workers.model_runner import build_batch
from pearl_kernels import KernelSet, LinearWeight

_BURST = 0.02  # seconds of forwards in a row
_EMPTY_CALLS = 200

# An operator's arguments with no rows: its call then costs what Python and the checks cost, and nothing else.
_NO_ROWS: Mapping[str, Callable[..., tuple[Any, ...]]] = {
    "rms_norm": lambda x, *rest: (x[:0], *rest),
    "add_rms_norm": lambda x, residual, *rest: (x[:0], residual[:0], *rest),
    "silu_and_mul": lambda x: (x[:0],),
    "linear": lambda x, *rest: (x[:0], *rest),
    "rope_and_cache": lambda q, k, v, positions, cos_sin, keys, values, slots, *rest: (
        q[:0], k[:0], v[:0], positions[:0], cos_sin, keys, values, slots[:0], *rest,
    ),
    "verify_attention": lambda q, keys, values, tables, starts, lengths, *rest: (
        q[:0], keys, values, tables[:0], starts[:1], lengths[:0], *rest,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class OperatorTime:
    op: str  # linear by its weight: qkv, output, gate_up, down, lm_head
    calls: int  # in a forward
    bytes: int  # of one call
    seconds: float  # of one call from Python, median
    overhead: float  # of one call without rows, median

    @property
    def kernel_seconds(self) -> float:
        return max(self.seconds - self.overhead, 1e-9)


class ForwardBench:
    """One model of an idle LLM; its KV memory is overwritten. Call it in torch.inference_mode, on one thread."""

    def __init__(self, name: str, runner: ModelRunner, context: int) -> None:
        self.name, self.context = name, context
        if not isinstance(runner.model, Decoder):
            raise ConfigurationError(f"{name} runs in transformers; only a native decoder can be measured")
        self._runner, self._model = runner, runner.model
        self._page_size = runner.cache.layers[0][0].shape[1]
        runner.compute(self.batch(context))  # keys and values of every position

    @property
    def weight_bytes(self) -> int:
        """Of every matrix and norm; of the embedding a forward reads single rows only."""
        weights = self._model.weights
        return sum(_bytes(t) for t in (weights.norm, weights.head)) + sum(
            _bytes(getattr(layer, field.name)) for layer in weights.layers for field in fields(layer)
        )

    def bytes(self, rows: int) -> int:
        """The least that a forward must move: weights, the context's keys and values, logits."""
        weights, cache = self._model.weights, self._runner.cache
        key_bytes = sum(t[0, 0].nbytes for pair in cache.layers for t in pair)
        ends = rows * (weights.head.in_features + weights.head.out_features) * self._model.dtype.itemsize
        return self.weight_bytes + (self.context + rows) * key_bytes + ends

    def flops(self, rows: int) -> int:
        """Of the matrix products and the attention."""
        model = self._model
        matrices = [model.weights.head]
        for layer in model.weights.layers:
            matrices += [m for f in fields(layer) if isinstance(m := getattr(layer, f.name), LinearWeight)]
        keys = sum(self.context - rows + row + 1 for row in range(rows))
        attention = 4 * keys * model.config.heads * model.config.head_dim * model.config.layers
        return 2 * rows * sum(m.in_features * m.out_features for m in matrices) + attention

    def batch(self, rows: int) -> ForwardBatch:
        """The last ``rows`` positions of a sequence of ``context`` tokens, all their logits wanted."""
        state = SequenceState(0, 0, SamplingParams(), 0, 0, None)
        table = tuple(range(-(-self.context // self._page_size)))
        tokens = tuple(range(1, rows + 1))
        work = ForwardWork(state, tokens, self.context - rows, rows, table)
        return build_batch([work], self._page_size, torch.device("cpu"))

    def seconds(self, rows: int) -> float:
        """Of one forward, the median of a burst."""
        batch = self.batch(rows)
        times: list[float] = []
        while sum(times) < _BURST or len(times) < 3:
            begin = time.perf_counter()
            self._runner.compute(batch)
            times.append(time.perf_counter() - begin)
        return statistics.median(times)

    def operators(self, rows: int, passes: int) -> list[OperatorTime]:
        """Of ``passes`` forwards made of single calls, in the order of the calls."""
        model, batch = self._model, self.batch(rows)
        clock = _Clock(model)
        timed = Decoder(model.config, model.weights, model.cos_sin, clock.kernels())
        for count in range(passes + 1):
            timed.forward(batch, self._runner.cache)
            if count == 0:
                clock.times.clear()  # a warm-up
        return list(clock.results(passes))


class _Clock:
    """Operators that note how long each call took, under the name of the operator or of the weight."""

    def __init__(self, model: Decoder) -> None:
        self._kernels = model.kernels
        self._weights = {id(model.weights.head): "lm_head"}
        for layer in model.weights.layers:
            self._weights |= {id(getattr(layer, field.name)): field.name for field in fields(layer)}
        self.times: dict[str, list[float]] = defaultdict(list)
        self._latest: dict[str, tuple[str, tuple[Any, ...]]] = {}  # by name: the operator and its arguments

    def kernels(self) -> KernelSet:
        timed: dict[str, Any] = {op: self._timed(op) for op in _NO_ROWS}
        return replace(self._kernels, **timed)

    def _timed(self, op: str) -> Callable[..., Any]:
        function = getattr(self._kernels, op)

        def call(*args: Any) -> Any:
            begin = time.perf_counter()
            result = function(*args)
            seconds = time.perf_counter() - begin
            name = self._weights[id(args[1])] if op == "linear" else op
            self.times[name].append(seconds)
            self._latest[name] = op, args
            return result

        return call

    def results(self, passes: int) -> Iterator[OperatorTime]:
        for name, times in self.times.items():
            op, args = self._latest[name]
            function, empty, without = getattr(self._kernels, op), _NO_ROWS[op](*args), []
            for _ in range(_EMPTY_CALLS):
                begin = time.perf_counter()
                function(*empty)
                without.append(time.perf_counter() - begin)
            moved = operator_bytes(op, args)
            yield OperatorTime(
                name, len(times) // passes, moved, statistics.median(times), statistics.median(without)
            )  # fmt: skip


def operator_bytes(op: str, args: tuple[Any, ...]) -> int:
    """The least that a call must move: each input read once, each output written once."""
    x: Tensor = args[0]
    if op == "verify_attention":
        keys, lengths = args[1], args[5]
        return 2 * int(lengths.sum()) * int(keys[0, 0].nbytes) + 2 * x.nbytes
    if op == "rope_and_cache":
        k, v, cos_sin = args[1], args[2], args[4]
        return 2 * int(x.nbytes + k.nbytes + v.nbytes) + x.shape[0] * int(cos_sin[0].nbytes)
    if op == "linear":
        weight: LinearWeight = args[1]
        return x.nbytes + _bytes(weight) + x.shape[0] * weight.out_features * x.itemsize
    if op == "silu_and_mul":
        return x.nbytes * 3 // 2
    return (4 if op == "add_rms_norm" else 2) * x.nbytes + _bytes(args[-2])


def _bytes(weight: Tensor | LinearWeight | None) -> int:
    """Of the numbers themselves, without the padding that a provider packs them with."""
    if isinstance(weight, LinearWeight):
        return weight.in_features * weight.out_features * weight.data.itemsize
    return 0 if weight is None else weight.nbytes
