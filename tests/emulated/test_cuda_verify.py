"""What is special to CUDA's verify: rows split over blocks, the search for cutoffs, alignment."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_emu import build
from ops_support import decided, mixed_sampling, padded_logits, sampling
from torch import Tensor
from verify_support import assert_same, decided_requests, one_row_each, ragged

from pearl_kernels import SamplingTensors, reference
from pearl_kernels.reference import Rule, Stream, Verdict
from pearl_kernels.reference.philox import uniform
from pearl_kernels.reference.sampling import log_probabilities

pytestmark = build.on_linux

verify = build.operator("verify")
both_rules = pytest.mark.parametrize("rule", ["rejection", "coupled"])
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
TILE, SPLIT_TILE = 8192, 4096  # tokens of a row that one block takes: in sums; at least, in searches and draws


@pytest.fixture(autouse=True)
def same_inputs_always() -> None:
    torch.manual_seed(5)


@both_rules
@pytest.mark.parametrize(
    ("vocab_size", "dtype", "q_dtype"),
    [(TILE + 1, FP32, FP16), (TILE + SPLIT_TILE, FP16, BF16), (2 * TILE + SPLIT_TILE + 807, BF16, FP32)],
)
def test_rows_split_over_blocks_match_reference(
    rule: Rule, vocab_size: int, dtype: torch.dtype, q_dtype: torch.dtype
) -> None:
    case = ragged(rule, vocab_size, dtype, q_dtype, requests=10)
    expected, ours = reference.verify(**case), verify(**case)
    clear = decided_requests(case, expected.accepted)
    assert_same(Verdict(*(field[clear] for field in ours)), Verdict(*(field[clear] for field in expected)))


NORMAL, TIED, FLAT, UNEVEN = "normal", "many equal values", "nearly equal", "the large ones together"
CUTS = [
    {},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 3000},  # more than the threads of a tile
    {"top_p": 1e-4},
    {"top_p": 0.3},
    {"top_p": 0.95},
    {"top_p": 1 - 1e-6},
    {"min_p": 0.01},
    {"min_p": 1.0},
    {"top_k": 500, "top_p": 0.8},
    {"top_k": 9000, "top_p": 0.999, "min_p": 1e-4},
    {"top_p": 0.9, "min_p": 0.3},
    {"top_k": 60, "min_p": 0.5},
]


def rows_of(kind: str, n: int, vocab_size: int) -> Tensor:
    logits = padded_logits(n, vocab_size, vocab_size + 3, FP32, torch.nan)
    if kind == TIED:
        logits = logits.round()
        logits[:, 1000:4000] = 2.0  # more than are gathered
    if kind == FLAT:
        logits = logits * 1e-3 + 7.0
    if kind == UNEVEN:
        logits[:, :TILE] += 12.0
        logits[:, 5000] = 40.0
    return logits


@pytest.mark.parametrize("kind", [NORMAL, TIED, FLAT, UNEVEN])
def test_log_probabilities_are_the_reference_s(kind: str) -> None:
    """A draft's log-probability that puts p / q just above u accepts the token, and just below rejects it."""
    vocab_size, temperature, nats = 9001, 0.7, 1e-5
    logits = rows_of(kind, len(CUTS), vocab_size)
    each = [sampling(1, temperature, **cut) for cut in CUTS]
    fields = SamplingTensors.__dataclass_fields__
    params = SamplingTensors(*(torch.cat([getattr(p, field) for p in each]) for field in fields))
    log_p = log_probabilities(logits, params, vocab_size)
    kept = (log_p > -torch.inf).sum(-1)
    ranked = torch.sort(log_p, dim=-1, descending=True, stable=True).indices
    for rank in (torch.zeros_like(kept), kept // 2, kept * 9 // 10):
        tokens = ranked.gather(1, rank[:, None])
        u = uniform(params.seed, torch.full((len(CUTS),), 10), Stream.ACCEPT)
        even = log_p.gather(1, tokens)[:, 0].double() - u.double().log()
        for shift, holds in ((-nats, True), (nats, False)):
            case = one_row_each(logits, params, tokens[:, 0], draft_logprobs=(even + shift).float())
            accepted, _ = verify(**(case | {"vocab_size": vocab_size}))
            assert accepted.bool().tolist() == [holds] * len(CUTS)


@pytest.mark.parametrize("kind", [NORMAL, TIED, FLAT, UNEVEN])
@pytest.mark.parametrize(
    "cut",
    [
        {"top_k": 40},
        {"top_k": 3000},
        {"top_p": 0.6},
        {"min_p": 0.995},
        {"top_k": 500, "top_p": 0.8},
        {"top_k": 40, "min_p": 0.97},
        {"top_p": 0.6, "min_p": 0.97},
    ],
)
def test_cutoffs_are_the_reference_s(kind: str, cut: dict[str, Any]) -> None:
    """The least likely kept token can be accepted, the likeliest of the others cannot."""
    vocab_size = 2 * TILE + 617
    logits, params = rows_of(kind, 2, vocab_size), sampling(2, 0.7, **cut)
    logits[1] = logits[0]
    log_p = log_probabilities(logits, params, vocab_size)[0]
    kept = log_p > -torch.inf
    last = torch.where(kept, log_p, torch.inf).argmin()
    next_one = torch.where(kept, -torch.inf, logits[0, :vocab_size]).argmax()
    assert not kept[next_one]
    surely = torch.full((2,), -100.0)
    case = one_row_each(logits, params, torch.stack((last, next_one)), draft_logprobs=surely)
    accepted, _ = verify(**(case | {"vocab_size": vocab_size}))
    assert accepted.tolist() == [1, 0]


@pytest.mark.parametrize("cut", [{"top_k": 3000}, {"top_p": 0.9}])
def test_a_row_of_more_blocks_than_a_block_has_warps(cut: dict[str, Any]) -> None:
    """A warp of the last block reads the lists of several, and all that counts is in those that it reads last."""
    vocab_size = 17 * SPLIT_TILE + 5
    logits, params = rows_of(NORMAL, 1, vocab_size), sampling(1, 0.7, **cut)
    logits[:, 16 * SPLIT_TILE :] += 12.0
    log_p = log_probabilities(logits, params, vocab_size)[0]
    last = torch.where(log_p > -torch.inf, log_p, torch.inf).argmin()
    next_one = torch.where(log_p > -torch.inf, -torch.inf, logits[0, :vocab_size]).argmax()
    for token, holds in ((last, 1), (next_one, 0)):
        case = one_row_each(logits, params, token[None], draft_logprobs=torch.full((1,), -100.0))
        assert verify(**(case | {"vocab_size": vocab_size})).accepted.tolist() == [holds]


@pytest.mark.parametrize("kind", [NORMAL, FLAT])
def test_draws_from_many_tiles_are_the_reference_s(kind: str) -> None:
    """In nearly equal rows the noise alone decides: no token's may be passed over."""
    n, vocab_size = 40, TILE + 900
    logits, params = rows_of(kind, n, vocab_size), sampling(n, 0.8)
    case = one_row_each(logits, params, torch.full((n,), -1)) | {"vocab_size": vocab_size}
    clear = decided(logits, params, case["positions"], vocab_size)
    drawn = reference.sample(logits, params, case["positions"], vocab_size).tokens
    for rule in ("rejection", "coupled"):
        _, next_token = verify(**(case | {"rule": rule}))
        assert torch.equal(next_token[clear], drawn[clear])


@both_rules
def test_draws_of_blocks_with_several_tiles_are_the_reference_s(rule: Rule) -> None:
    """In a batch of more than 256 rows that are cut a block draws from all three tiles of its row."""
    n, vocab_size = 257, 2 * SPLIT_TILE + 2000
    logits, params = rows_of(NORMAL, n, vocab_size), sampling(n, 0.8, top_k=50)
    case = one_row_each(logits, params, torch.full((n,), -1)) | {"vocab_size": vocab_size, "rule": rule}
    clear = decided(logits, params, case["positions"], vocab_size)
    drawn = reference.sample(logits, params, case["positions"], vocab_size).tokens
    assert torch.equal(verify(**case).next_token[clear], drawn[clear])
    assert set((drawn[clear] // SPLIT_TILE).tolist()) == {0, 1, 2}


def test_the_first_of_equal_logits_wins_across_tiles() -> None:
    logits = torch.full((3, 2 * TILE + 9), -1.0)
    for row, tokens in enumerate(((10, TILE + 5), (TILE - 1, TILE), (2 * TILE - 1, 2 * TILE + 8))):
        logits[row, tokens[0]], logits[row, tokens[1]] = -0.0, 0.0
    case = one_row_each(logits, sampling(3, 0.0), torch.full((3,), -1))
    assert verify(**case).next_token.tolist() == [10, TILE - 1, 2 * TILE - 1]


def shifted(rows: Tensor, offset: int, gap: int) -> Tensor:
    """The same rows, beginning ``offset`` elements after an aligned address, ``gap`` elements apart."""
    n, width = rows.shape
    memory = torch.full((offset + n * (width + gap),), torch.nan, dtype=rows.dtype)
    result = memory[offset:].view(n, width + gap)[:, :width]
    return result.copy_(rows)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=("fp32", "bf16", "fp16"))
@pytest.mark.parametrize("vocab_size", [1000, 4099])
def test_addresses_do_not_matter(dtype: torch.dtype, vocab_size: int) -> None:
    case = ragged("rejection", vocab_size, dtype, dtype, requests=10)
    aligned = {k: shifted(case[k][:, :vocab_size], 0, -vocab_size % 8) for k in ("logits", "draft_logits")}
    expected = verify(**(case | aligned))
    for offset, gap in ((0, 1), (1, 7), (8, 0), (4, 24)):
        moved = {k: shifted(rows, offset, gap) for k, rows in aligned.items()}
        assert_same(verify(**(case | moved)), expected)


@both_rules
def test_the_order_of_blocks_does_not_matter(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    case = ragged(rule, TILE + 50, BF16, BF16, requests=12)
    expected = verify(**case)
    monkeypatch.setenv("PEARL_EMU_ORDER", "descending")
    assert_same(verify(**case), expected)


@both_rules
def test_the_number_of_blocks_to_a_row_does_not_matter(rule: Rule) -> None:
    """In a batch of more than 256 rows one block has all of a row; alone each of its three tiles has a block."""
    vocab_size, copies = 2 * SPLIT_TILE + 100, 65
    few = ragged(rule, vocab_size, BF16, FP32, requests=5)
    few["params"] = mixed_sampling(5)
    n = int(few["row_start"][-1])
    assert n * copies > 256
    rows = torch.arange(copies * n) % n
    requests = torch.arange(copies * 5) % 5
    many = few | {k: few[k][rows] for k in ("logits", "draft_tokens", "positions", "draft_logprobs", "draft_rows")}
    many |= {"params": few["params"][requests], "draft_temperature": few["draft_temperature"][requests]}
    many["row_start"] = torch.cat((torch.zeros(1), few["row_start"].diff().repeat(copies).cumsum(0))).int()
    alone = verify(**few)
    assert_same(verify(**many), Verdict(alone.accepted.repeat(copies), alone.next_token.repeat(copies)))
