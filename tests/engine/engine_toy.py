"""Random toy models with real logits, under the engine's real drafter, verifier, workers and KV managers."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from checked_scheduler import CheckedScheduler
from engine_requests import request_of
from method_paces import pace_of
from paged_memory import PagedMemory
from random_branches import RandomBranches
from torch import Tensor

from pearl.drafting import Drafter, ModelDrafter, NGramDrafter
from pearl.drafting.logits_ring import LogitsRing
from pearl.engine.branches import Branches
from pearl.engine.engine import Engine
from pearl.engine.model_workers import ModelWorkers
from pearl.engine.odds import choose
from pearl.engine.rounds import RoundRecord
from pearl.engine.verifier import Verifier
from pearl.kv import KVCacheManager, PageCopy
from pearl.messages import ForwardWork
from pearl.pace import PreparingPace
from pearl.sampling_params import SamplingParams
from pearl.workers import HostQueue, InlineWorker, TargetRunner, Worker
from pearl.workers.stopwatch import Stopwatch
from pearl_kernels import KernelSet, Rule, select
from pearl_kernels.registry import OPERATORS

VOCAB, COLUMNS = 24, 32
QUEUE = HostQueue(torch.device("cpu"))
KERNELS: KernelSet = select(prefer=dict.fromkeys(OPERATORS, "reference"))


class ToyRunner:
    """``ModelRunner``'s interface: logits are a random function of the prefix, which is read from its pages.

    ``blur`` is how far the model is from the target (0: the target itself). Padding columns are large on purpose.
    """

    def __init__(
        self, page_size: int, blur: float = 0.0, kernels: KernelSet = KERNELS, dtype: torch.dtype = torch.float32
    ) -> None:
        self.kernels, self.queue, self.fused, self._dtype = kernels, QUEUE, None, dtype
        self.stopwatch = Stopwatch(QUEUE)
        self.hidden = None
        self._memory, self._blur = PagedMemory(page_size), blur
        self.batches: list[int] = []  # sequences in each forward

    def check(self) -> None:
        pass

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        self._memory.copy(copies)

    def forward(self, work: Sequence[ForwardWork]) -> Tensor:
        self.batches.append(len(work))
        rows = []
        for item in work:
            self._memory.write(item.block_table, item.start, item.tokens)
        for item in work:
            prefix = self._memory.read(item.block_table, item.end)
            rows += [self.logits(prefix[:end]) for end in range(item.end - item.num_logits + 1, item.end + 1)]
        return torch.stack(rows) if rows else torch.empty(0, COLUMNS, dtype=self._dtype)

    def decode(self, tokens: Sequence[int], positions: Sequence[int], tables: Sequence[tuple[int, ...]]) -> Tensor:
        self.batches.append(len(tokens))
        for token, position, table in zip(tokens, positions, tables, strict=True):
            self._memory.write(table, position, [token])
        prefixes = [self._memory.read(table, p + 1) for p, table in zip(positions, tables, strict=True)]
        return torch.stack([self.logits(prefix) for prefix in prefixes])

    def logits(self, prefix: Sequence[int]) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(bytes(prefix[-6:])))
        row = 2.0 * torch.randn(COLUMNS, generator=generator)
        row += self._blur * torch.randn(COLUMNS, generator=generator)
        row[VOCAB:] = 50.0
        if self._dtype is torch.float32:
            return row
        return (row + 200).to(self._dtype)  # bf16 tells apart what differs by one


class Toy:
    def __init__(
        self,
        method: str = "pearl",
        rule: Rule = "rejection",
        *,
        window: int = 3,
        num_pages: int = 64,
        page_size: int = 4,
        lanes: int = 4,
        budget: int = 64,
        blur: float = 0.6,
        ngram: bool = False,
        kernels: KernelSet = KERNELS,
        dtype: torch.dtype = torch.float32,
        worker: Callable[[], Worker] = lambda: InlineWorker(QUEUE),
        pinned: bool = False,
        branches: int = 0,
        branch_seed: int | None = None,
    ) -> None:
        """``branches``: windows to prepare in a round; with a seed random ones, else the likeliest."""
        self.pinned, self.rekeys = pinned, rule == "block" and not pinned
        self.target = ToyRunner(page_size, kernels=kernels, dtype=dtype)
        self.draft = ToyRunner(page_size, blur, kernels, dtype)
        self.ring = LogitsRing(lanes, window, branches + lanes if branches else 0)
        pace, drafts = pace_of(method, window), method != "autoregressive"
        pace = PreparingPace(pace, branches) if branches else pace
        drafter: Drafter = NGramDrafter()
        if not ngram:
            drafter = ModelDrafter(self.draft, rule, VOCAB, (), self.ring)  # type: ignore[arg-type]
        self.scheduler = CheckedScheduler(
            pace,
            KVCacheManager(num_pages, page_size),
            KVCacheManager(num_pages, page_size) if drafts and not ngram else None,
            max_num_seqs=lanes,
            max_num_batched_tokens=budget,
            max_waiting=100,
            drafter_reads_history=ngram,
        )
        if branches and drafter.prepares:
            chooser = choose if branch_seed is None else RandomBranches(branch_seed)
            self.scheduler.branches = Branches(self.scheduler.draft_kv, lanes, branches, rule, chooser)  # type: ignore[arg-type]
        self.records: list[RoundRecord] = []
        self.engine = Engine(
            self.scheduler,
            ModelWorkers(TargetRunner(self.target), worker(), drafter, worker()),  # type: ignore[arg-type]
            Verifier(kernels, rule, VOCAB, (), QUEUE),
            pace,
            self.records.append,
        )

    def generate(self, *prompts: Sequence[int], max_tokens: int = 10, seed: int = 7, **params: Any) -> list[list[int]]:
        """Outputs of the prompts, batched; request i has seed ``seed + i``."""
        outputs, errors = self.run(prompts, [SamplingParams(max_tokens=max_tokens, **params)] * len(prompts), seed)
        assert not any(errors), errors
        return outputs

    def run(
        self, prompts: Sequence[Sequence[int]], every: Sequence[SamplingParams], seed: int = 7
    ) -> tuple[list[list[int]], list[str | None]]:
        """Outputs and errors of the prompts, each with its parameters."""
        outputs: list[list[int]] = [[] for _ in prompts]
        errors: list[str | None] = [None for _ in prompts]
        for i, (prompt, params) in enumerate(zip(prompts, every, strict=True)):
            keys = {"seed": seed + i, "pinned": self.pinned, "rekeys": self.rekeys}
            self.engine.add(request_of(i, prompt, params.max_tokens, params=params, eos_ids=(), **keys))
        for _ in range(1000):
            if not self.engine.has_work:
                return outputs, errors
            for delta in self.engine.step():
                outputs[delta.request_id] += delta.token_ids
                errors[delta.request_id] = delta.error
        raise AssertionError("not finished after 1000 rounds")
