"""Whatever a head drafts, the output is the target's: its tokens, its seeded draws, its distribution, its ends."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from e2e_support import DRAFTING_SETTINGS, Pair, acceptance, assert_at_rest, prompts, random_model, save, token_ids
from joint_frequencies import ALARM, CONFIG, PROMPT, V, exact_joint, letters, params_of, smallest_p
from plain_heads import eagle_shape, random_eagle, random_medusa, save_head

from pearl import LLM, SamplingParams
from pearl.request_factory import RequestFactory

if TYPE_CHECKING:
    from conftest import Headed

OpenLLM = Callable[..., LLM]
TOKENS = 22
both = pytest.mark.parametrize("kind", ["eagle", "medusa"])


@both
@pytest.mark.parametrize(
    "setting", ["pearl-8", "pearl-no-post-1", "pearl-neither-4", "prepared-5", "speculative-auto"]
)  # fmt: skip
def test_greedy_batches_equal_transformers(
    headed: dict[str, Headed], open_llm: OpenLLM, kind: str, setting: str
) -> None:
    own = headed[kind]
    llm = open_llm(own.pair, **DRAFTING_SETTINGS[setting], max_num_seqs=5, max_num_batched_tokens=32)
    outputs = llm.generate(own.batch, SamplingParams(max_tokens=TOKENS, ignore_eos=True))
    assert token_ids(outputs) == [own.pair.greedy(prompt, TOKENS) for prompt in own.batch]
    assert acceptance(outputs) > 0.2
    assert_at_rest(llm)


def sampled() -> list[SamplingParams]:
    """Cut, penalised, banned from what a head can draft, two outputs of one prompt, and plain."""
    values: list[dict[str, Any]] = [
        {}, {"top_k": 20, "n": 2}, {"top_p": 0.9, "repetition_penalty": 1.2}, {"min_p": 0.05, "draft_temperature": 0.3},
        {"logit_bias": {11: 4.0, 299: -100.0}}, {"draft": False}, {"temperature": 0.0},
    ]  # fmt: skip
    return [
        SamplingParams(**{"temperature": 0.9, "seed": 100 * i, "max_tokens": TOKENS, "ignore_eos": True, **v})
        for i, v in enumerate(values)
    ]


@both
@pytest.mark.parametrize("verification", ["coupled", "rejection", "block"])
def test_a_seed_gives_seeded_autoregressive_decoding_in_any_batch(
    headed: dict[str, Headed], open_llm: OpenLLM, kind: str, verification: str
) -> None:
    """Under ``coupled`` drafted; under the other rules requests with a seed are not, and say the same."""
    own, every = headed[kind], sampled()
    plain = token_ids(open_llm(own.pair, method="autoregressive", max_num_seqs=1).generate(own.batch, every))
    for options in ({"window": 3, "max_num_seqs": 5, "max_num_batched_tokens": 24}, {"window": 1, "max_num_seqs": 2}):
        llm = open_llm(own.pair, verification=verification, **options)
        outputs = llm.generate(own.batch, every)
        assert token_ids(outputs) == plain
        drafted = [c.metrics.drafted > 0 for output in outputs[:5] for c in output.outputs]
        assert all(drafted) if verification == "coupled" else not any(drafted)
        assert outputs[6].metrics.drafted > 0
        assert_at_rest(llm)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Eight tokens, of which the EAGLE-3 head drafts six; three layers, all of which it reads."""
    config, root = copy.deepcopy(CONFIG), tmp_path_factory.mktemp("small-heads")
    config.num_hidden_layers = 3
    judge = random_model(config, seed=2)
    pair = Pair("small", save(judge, letters(V), root / "target"), "", judge, letters(V))
    shape = eagle_shape(judge, draft_vocab_size=6, eagle_aux_hidden_state_layer_ids=[0, 1, 2])
    eagle = save_head(root / "eagle", shape, random_eagle(shape, seed=3))
    medusa = save_head(
        root / "medusa", {"medusa_num_heads": 2, "medusa_num_layers": 1}, random_medusa(judge, 2, 1, seed=3),
        "medusa_lm_head.safetensors",
    )  # fmt: skip
    return {name: Pair("small", pair.target, path, judge, pair.tokenizer) for name, path in
            (("eagle", eagle), ("medusa", medusa))}  # fmt: skip


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "pearl-3": ({"window": 3}, {}),
    "speculative-3": ({"window": 3, "method": "speculative"}, {}),
    "hot draft": ({"window": 3}, {"draft_temperature": 2.0}),
    "greedy draft": ({"window": 3}, {"draft_temperature": 0.0}),
    "top-k": ({"window": 3}, {"top_k": 3}),
    "block": ({"window": 3, "verification": "block"}, {}),
    "prepared": ({"window": 3, "prepared_windows": 6}, {}),
}


@both
@pytest.mark.parametrize("case", CASES)
def test_sampled_tokens_have_the_targets_joint_distribution(
    small: dict[str, Pair], open_llm: OpenLLM, kind: str, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With seeds, so that a run that passes passes again, and drafted all the same: nothing here changes the pace."""
    options, values = CASES[case]
    monkeypatch.setattr(RequestFactory, "_is_pinned", lambda self, params: False)
    params, llm = params_of(**values, n=600), open_llm(small[kind], max_num_seqs=16, **options)
    outputs = llm.generate([PROMPT], params)
    assert 0.05 < acceptance(outputs) < 0.99
    assert smallest_p(token_ids(outputs), exact_joint(small[kind], params)) > ALARM
    assert_at_rest(llm)


@both
@pytest.mark.parametrize("setting", ["pearl-3", "speculative-3"])
def test_ends_at_every_place_of_a_window(headed: dict[str, Headed], open_llm: OpenLLM, kind: str, setting: str) -> None:
    own, limits = headed[kind], range(1, 10)
    prompt = own.batch[5]
    tokens = own.pair.greedy(prompt, TOKENS)
    first = {token: tokens.index(token) for token in tokens}
    llm = open_llm(own.pair, **DRAFTING_SETTINGS[setting], max_num_seqs=7, page_size=4)
    lengths = [SamplingParams(max_tokens=limit, ignore_eos=True) for limit in limits]
    stops = [SamplingParams(max_tokens=TOKENS, ignore_eos=True, stop_token_ids=[token]) for token in first]
    found = token_ids(llm.generate([prompt] * (len(lengths) + len(stops)), [*lengths, *stops]))
    assert found == [tokens[:limit] for limit in limits] + [tokens[: place + 1] for place in first.values()]
    assert_at_rest(llm)


def test_a_head_that_knows_nothing_costs_no_token(headed: dict[str, Headed], open_llm: OpenLLM, tmp_path: Path) -> None:
    """Its logits are not even numbers: such a token counts as never drafted."""
    own = headed["eagle"]
    shape = eagle_shape(own.pair.judge)
    tensors = random_eagle(shape, seed=9)
    tensors["lm_head.weight"][:] = torch.nan
    pair = Pair("nan", own.pair.target, save_head(tmp_path, shape, tensors), own.pair.judge, own.pair.tokenizer)
    llm = open_llm(pair, window=3)
    greedy = llm.generate(own.batch, SamplingParams(max_tokens=TOKENS, ignore_eos=True))
    assert token_ids(greedy) == [own.pair.greedy(prompt, TOKENS) for prompt in own.batch]
    assert all(len(t) == TOKENS for t in token_ids(llm.generate(prompts((5, 9)), SamplingParams(
        temperature=1.0, max_tokens=TOKENS, ignore_eos=True))))  # fmt: skip
