"""An EAGLE-3 head's windows in one C++ call give the same bits as step by step: tokens, log q, rows, states, KV."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_heads import random_eagle, save_head

from pearl.bench.shapes import SHAPES
from pearl.drafting import EagleDrafter
from pearl.drafting.logits_ring import LogitsRing
from pearl.heads import load_head, read_head
from pearl.heads.runner import HeadRunner
from pearl.kv import PageCopy
from pearl.messages import (
    Branch,
    Drafted,
    DraftPlan,
    DraftProposal,
    DraftWork,
    ForwardWork,
    SequenceState,
    TargetStates,
)
from pearl.models import KVCache
from pearl.models.fused_decoder import EmbeddingRows
from pearl.sampling_params import SamplingParams
from pearl.workers import HostQueue
from pearl_kernels import Rule, Situation, select

CPU = torch.device("cpu")
PAGE, LANES, WINDOW, SLOTS, OWN_PAGES = 4, 3, 5, 4, 12
VOCABULARY, KNOWN = 131, 97  # ids of the target, and those that the head drafts
PARAMS = (SamplingParams(), SamplingParams(temperature=0.9, top_k=40, top_p=0.95), SamplingParams(temperature=1.2))
TARGET = replace(
    SHAPES["tiny-target"], vocab_size=VOCABULARY, hidden=40, layers=4, heads=4, kv_heads=2, head_dim=16,
    rope={"rope_type": "default", "rope_theta": 10000.0},
)  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "some ids": {},
    "all ids, biased": {"draft_vocab_size": VOCABULARY, "attention_bias": True},
    "normed before the residual": {"norm_before_residual": True},
}


def shape_of(variant: str) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "hidden_size": 40, "intermediate_size": 56,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rope_theta": 1e4,
        "vocab_size": VOCABULARY, "draft_vocab_size": KNOWN, "rms_norm_eps": 1e-5, "max_position_embeddings": 128,
        "eagle_aux_hidden_state_layer_ids": [0, 2, 3], **VARIANTS[variant],
    }  # fmt: skip


class Drafting:
    """A drafter over KV, q and states of its own, unused memory poisoned; its embeddings are a tied target's head."""

    def __init__(self, folder: str, dtype: torch.dtype, rule: Rule, fused: bool, threads: int = 1) -> None:
        config = read_head(folder, replace(TARGET, dtype=dtype))
        kernels = select(Situation("cpu", dtype))
        table = torch.randn(VOCABULARY, 40, generator=torch.Generator().manual_seed(5)).to(dtype)
        packed = kernels.pack_linear(table)
        head = load_head(
            folder, config, device=CPU, max_model_len=128, kernels=kernels, embed=table.__getitem__,
            embedding_width=40, embeddings=EmbeddingRows(None, packed),
        )  # fmt: skip
        self.cache = KVCache.allocate(config.shape, (LANES + SLOTS) * OWN_PAGES, PAGE, dtype, CPU)
        self.ring = LogitsRing(LANES, WINDOW, SLOTS)
        runner = HeadRunner(head, self.cache, PAGE, HostQueue(CPU), threads)
        self.drafter = EagleDrafter(runner, rule, VOCABULARY - 3, (), self.ring)
        assert self.drafter._fused is not None
        if not fused:
            self.drafter._fused = None
        self.ring.allocate(VOCABULARY, dtype)
        for tensor in self.memory():
            tensor.fill_(torch.nan)

    def propose(self, plan: DraftPlan) -> DraftProposal:
        with torch.inference_mode():
            return self.drafter.propose(plan)

    def memory(self) -> list[torch.Tensor]:
        assert self.ring.logits is not None
        return [*chain.from_iterable(self.cache.layers), self.ring.logits, self.drafter._states.rows]


@dataclass
class Sequence:
    """A request as the scheduler would lead it, its verdicts chosen at random."""

    state: SequenceState
    tokens: list[int]
    table: tuple[int, ...]
    computed: int = 0  # with the target's states
    pending: tuple[Drafted, ...] = ()
    slot: int | None = None


@dataclass
class Rounds:
    """Random rounds, of which each begins with what was drafted in the one before."""

    dtype: torch.dtype
    rng: random.Random
    sequences: list[Sequence] = field(default_factory=list)
    spare: list[tuple[int, ...]] = field(default_factory=list)  # pages of each slot
    hits: int = 0

    def __post_init__(self) -> None:
        pages = list(range((LANES + SLOTS) * OWN_PAGES))
        self.rng.shuffle(pages)
        tables = [tuple(pages[i : i + OWN_PAGES]) for i in range(0, len(pages), OWN_PAGES)]
        self.spare = tables[LANES:]
        for lane, params in enumerate(PARAMS):
            state = SequenceState(10 + lane, lane, params, 1000 + lane, 1, None)
            tokens = [self.rng.randrange(VOCABULARY - 3) for _ in range(self.rng.randint(2, 9))]
            self.sequences.append(Sequence(state, tokens, tables[lane]))

    def plan(self) -> DraftPlan:
        work, late_copies, spans, rows = [], list[PageCopy](), {}, 0
        busy = {sequence.slot for sequence in self.sequences}
        free = [slot for slot in range(SLOTS) if slot not in busy]
        windows = [self.rng.randint(0, WINDOW) if self.rng.random() < 0.8 else 0 for _ in self.sequences]
        for one, window in zip(self.sequences, windows, strict=True):
            length, k = len(one.tokens), len(one.pending)
            end = length - 1
            window = min(window, 2 * WINDOW - k)
            forward = ForwardWork(
                one.state, tuple(one.tokens[one.computed + 1 : end + 1]), one.computed, min(1, window), one.table
            )
            spans[one.state.request_id] = (rows, one.computed, end)
            rows += end - one.computed
            branches: tuple[Branch, ...] = ()
            while window and free and max(windows) > 1 and self.rng.random() < 0.6:
                held = self.rng.randint(0, k)
                slot, start = free.pop(), length + held
                whole, within = divmod(start - 1, PAGE)
                table = (*one.table[:whole], *self.spare[slot][whole:])
                if within:
                    late_copies.append(PageCopy(one.table[whole], table[whole]))
                token = None if held == k else self.rng.randrange(VOCABULARY - 3)
                wanted = self.rng.randint(1, max(windows) - 1)
                branches += (Branch(slot, held, self.rng.randrange(3), token, start, wanted, table),)
            pending = tuple(drafted.token for drafted in one.pending)
            if window or forward.tokens:
                work.append(DraftWork(forward, window, branches, pending, one.slot))
        states = torch.randn(rows, 3, 40, generator=torch.Generator().manual_seed(self.rng.randrange(1000)))
        found, alone = TargetStates(states.to(self.dtype), spans), self.rng.random() < 0.5
        return DraftPlan(tuple(work), (), tuple(late_copies), 3, alone, found)

    def go_on(self, plan: DraftPlan, proposal: DraftProposal) -> None:
        for item in plan.work:
            one = next(s for s in self.sequences if s.state is item.forward.state)
            window = proposal.windows.get(one.state.request_id, ())
            one.computed = item.forward.end
            whole = {b: proposal.prepared[b.id] for b in item.branches if len(proposal.prepared[b.id]) > 1}
            if whole and self.rng.random() < 0.5:
                branch, prepared = self.rng.choice(list(whole.items()))
                own = len(set(one.table) & set(branch.block_table))
                self.spare[branch.slot] = (*self.spare[branch.slot][:own], *one.table[own:])
                one.table = branch.block_table
                one.tokens += [d.token for d in one.pending[: branch.held]] + [prepared[0].token]
                one.pending, one.slot = prepared[1:], branch.slot
                self.hits += 1
            elif window and self.rng.random() < 0.6:  # all hold
                one.tokens += [d.token for d in (*one.pending, window[0])]
                one.pending, one.slot = window[1:], None
            elif self.rng.random() < 0.3 and len(one.pending) + len(window) <= WINDOW:  # no verdict
                one.pending += window
            else:
                held = self.rng.randint(0, len(one.pending))
                one.tokens += [d.token for d in one.pending[:held]] + [self.rng.randrange(VOCABULARY - 3)]
                one.pending, one.slot = (), None
        for one in self.sequences:
            if len(one.tokens) + 3 * WINDOW > PAGE * OWN_PAGES:  # another one takes its lane
                one.state = replace(one.state, request_id=one.state.request_id + LANES)
                one.tokens, one.computed, one.pending, one.slot = one.tokens[:2], 0, (), None


def assert_same_memory(one: Drafting, other: Drafting) -> None:
    for expected, found in zip(one.memory(), other.memory(), strict=True):
        width = torch.int32 if expected.dtype == torch.float32 else torch.int16
        assert torch.equal(found.view(width), expected.view(width))


@pytest.fixture(params=VARIANTS, scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    shape = shape_of(request.param)
    tensors = random_eagle(shape, seed=7)
    if shape.get("attention_bias"):
        for name in "qkvo":
            matrix = tensors[f"midlayer.self_attn.{name}_proj.weight"]
            tensors[f"midlayer.self_attn.{name}_proj.bias"] = torch.linspace(-1, 1, matrix.shape[0])
    return save_head(Path(tmp_path_factory.mktemp("head")), shape, tensors)


@pytest.mark.parametrize("rule", ["rejection", "coupled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("fp32", "bf16"))
def test_same_bits_as_step_by_step(folder: str, dtype: torch.dtype, rule: Rule) -> None:
    """Prompts, pending tokens, rejections, branches and hits, windows that follow each other without a verdict."""
    steps, fused = (Drafting(folder, dtype, rule, fused, threads=1 + fused) for fused in (False, True))
    rounds = Rounds(dtype, random.Random(1))
    drafted = prepared = ahead = 0
    for _ in range(60):
        plan = rounds.plan()
        expected, found = steps.propose(plan), fused.propose(plan)
        assert found.windows == expected.windows
        assert found.prepared == expected.prepared
        assert found.steps == expected.steps
        assert_same_memory(steps, fused)
        drafted += sum(map(len, found.windows.values()))
        prepared += sum(map(len, found.prepared.values()))
        ahead += sum(bool(item.pending and item.num_draft) for item in plan.work)
        rounds.go_on(plan, found)
    assert min(drafted, prepared, ahead) > 40
    assert rounds.hits > 5


def test_it_shares_cores_but_in_rounds_in_which_the_target_rests(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drafting, told, alone = Drafting(folder, torch.float32, "rejection", fused=True), list[bool](), list[bool]()
    monkeypatch.setattr(drafting.drafter._runner.fused, "share_cores", told.append)
    rounds = Rounds(torch.float32, random.Random(3))
    for _ in range(6):
        plan = rounds.plan()
        rounds.go_on(plan, drafting.propose(plan))
        alone.append(plan.alone)
    assert told == [not one for one in alone]
    assert len(set(alone)) == 2


def test_a_request_whose_logits_depend_on_the_host_is_drafted_step_by_step(folder: str) -> None:
    """And with it the batch, to the same tokens; a window in one call goes on from there."""
    steps, fused = (Drafting(folder, torch.float32, "rejection", fused) for fused in (False, True))
    ids = steps.drafter._model.weights.target_ids
    wanted = 3 if ids is None else int(ids[5])
    rounds = Rounds(torch.float32, random.Random(2))
    params = SamplingParams(logit_bias={wanted: 50.0})
    rounds.sequences[0].state = replace(rounds.sequences[0].state, params=params, history=(1, 2))
    rounds.sequences[0].tokens = [1, 2]
    biased = 0
    for number in range(8):
        if number == 4:
            rounds.sequences[0].state = replace(rounds.sequences[0].state, params=SamplingParams())
        plan = rounds.plan()
        expected, found = steps.propose(plan), fused.propose(plan)
        assert found.windows == expected.windows
        biased += number < 4 and {wanted} == {d.token for d in found.windows.get(10, ())}
        rounds.go_on(plan, found)
    assert biased


def test_what_does_not_fit_is_refused_before_anything_is_written(folder: str) -> None:
    """A page that is not there; a state that is another request's."""
    drafting = Drafting(folder, torch.float32, "rejection", fused=True)
    state = SequenceState(1, 0, PARAMS[1], 7, 1, None)
    states = TargetStates(torch.zeros(3, 3, 40), {1: (0, 0, 3)})
    item = DraftWork(ForwardWork(state, (5, 6, 7), 0, 1, (0, 1, 2)), 4, pending=())
    pages = (LANES + SLOTS) * OWN_PAGES
    for change, message in [
        ({"block_table": (0, pages)}, f"a page is {pages}"),
        ({"tokens": (5, 6, VOCABULARY)}, f"input_ids holds {VOCABULARY}"),
    ]:
        bad = item._replace(forward=item.forward._replace(**change))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=message):
            drafting.propose(DraftPlan((bad,), states=states))
    late = Branch(0, 0, 0, 9, 4, 2, (0, 1, 2))
    with pytest.raises(LookupError, match="request 1: no state for 4 is kept"):
        drafting.propose(DraftPlan((item._replace(branches=(late,)),), alternatives=1, states=states))
    late = late._replace(token=None, rank=2)
    with pytest.raises(ValueError, match="a late branch's rank is 2"):
        drafting.propose(DraftPlan((item._replace(branches=(late,)),), alternatives=1, states=states))
    assert all(tensor.isnan().all() for tensor in drafting.memory())
