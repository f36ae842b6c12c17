"""A tensor-parallel target on gloo: the same logits and tokens as one rank, and an orderly end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import e2e_support
import pytest
import torch
from families import build, load
from torch import Tensor

from pearl import LLM, SamplingParams
from pearl.errors import ConfigurationError, EngineClosedError, RankError
from pearl.messages import ForwardWork, SequenceState
from pearl.models import KVCache
from pearl.parallel import ParallelRunner, RankSpec, start_parallel
from pearl.parallel.rank_loader import host_store, join, load_rank, open_store
from pearl.parallel.ranks import Ranks
from pearl.workers import HostQueue, ModelRunner

CPU, PAGE, PAGES = torch.device("cpu"), 4, 16
PROMPTS = ["def gcd(a, b):\n", "import os\nimport sys\n\n\ndef main():\n", "x"]


def save(name: str, folder: Path) -> str:
    build(name).save_pretrained(folder)
    return str(folder)


def spec(path: str, ranks: int, dtype: torch.dtype = torch.float32) -> RankSpec:
    return RankSpec(0, ranks, 0, path, "cpu", dtype, 128, PAGES, PAGE, 1)


def work(sequence: int, start: int, count: int, wanted: int, table: tuple[int, ...]) -> ForwardWork:
    state = SequenceState(sequence, sequence, SamplingParams(), 0, 0, None)
    tokens = tuple((31 * sequence + 7 * p) % 131 for p in range(start, start + count))
    return ForwardWork(state, tokens, start, wanted, table)


BATCHES = [
    [work(0, 0, 9, 0, (5, 2, 9))],  # a chunk
    [work(0, 9, 1, 1, (5, 2, 9)), work(1, 0, 6, 2, (7, 3))],  # decoding beside a prompt
    [work(1, 4, 4, 4, (7, 3)), work(0, 10, 2, 2, (5, 2, 9))],  # a window over positions that were rolled back
]


def rank_threads(path: str, ranks: int) -> list[list[Tensor]]:
    """The ranks' logits of every batch, computed in threads: the same code as in processes, without their start."""
    store = host_store()

    def run(rank: int) -> list[Tensor]:
        mine = replace(spec(path, ranks), rank=rank, store_port=store.port)
        model, cache = load_rank(mine, join(mine, open_store(store.port)))
        runner = ModelRunner(model, cache, PAGE, HostQueue(CPU))
        with torch.inference_mode():
            return [runner.forward(batch) for batch in BATCHES]

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(run, range(ranks)))


# Biases, heads shared by ranks, padded query heads, qk-norm, sliding windows, a tied head of an odd vocabulary.
@pytest.mark.parametrize(
    ("family", "ranks"),
    [
        *(("llama", 1), ("llama-biases", 2), ("llama-one-kv-head", 3), ("llama-one-kv-head", 4), ("qwen3", 4)),
        *(("qwen2", 2), ("qwen2-sliding-layers", 2), ("llama-tied", 2), ("llama-wide-heads", 6)),
    ],
)
def test_every_rank_has_the_logits_of_the_whole_model(family: str, ranks: int, tmp_path: Path) -> None:
    path = save(family, tmp_path)
    whole = load(tmp_path)
    alone = ModelRunner(whole, KVCache.allocate(whole.config, PAGES, PAGE, torch.float32, CPU), PAGE, HostQueue(CPU))
    found = rank_threads(path, ranks)
    for index, batch in enumerate(BATCHES):
        with torch.inference_mode():
            expected = alone.forward(batch)
        for logits in found:
            assert logits[index].shape == expected.shape
            torch.testing.assert_close(logits[index], expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def pair() -> Iterator[LLM]:
    """Built by a thread that ends: its ranks are the process's, not the thread's."""
    built: list[LLM] = []
    thread = threading.Thread(
        target=lambda: built.append(LLM(target_parallel=2, dtype="float32", window=4, max_model_len=256))
    )
    thread.start()
    thread.join()
    with built[0] as llm:
        yield llm


def test_greedy_tokens_are_those_of_one_rank(pair: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=24)
    with LLM(dtype="float32", window=4, max_model_len=256) as alone:
        found, expected = pair.generate(PROMPTS, params), alone.generate(PROMPTS, params)
    assert [o.outputs[0].token_ids for o in found] == [o.outputs[0].token_ids for o in expected]
    assert all(o.outputs[0].error is None for o in found)


def test_prompts_are_told_as_by_one_rank(pair: LLM) -> None:
    """The rows of logits are whole: also of a prompt that is computed in pieces."""
    params, batch = SamplingParams(prompt_logprobs=2, max_tokens=4), [*PROMPTS, list(range(5, 200))]
    with LLM(dtype="float32", method="autoregressive", max_model_len=256) as alone:
        found, expected = pair.generate(batch, params), alone.generate(batch, params)
    for one, other in zip(found, expected, strict=True):
        told, right = (output.prompt_logprobs or () for output in (one, other))
        assert len(told) == len(right) == len(one.prompt_token_ids)
        for mine, its in zip(told[1:], right[1:], strict=True):
            assert mine is not None
            assert its is not None
            assert mine.logprob == pytest.approx(its.logprob, abs=1e-4)
            assert [value for _, value in mine.top] == pytest.approx([value for _, value in its.top], abs=1e-4)


def test_three_ranks_of_a_target_that_verifies_sampled_drafts(tmp_path: Path) -> None:
    """Coupled, so that the tokens do not depend on who verifies how many of them. One KV head, which all three hold."""
    tokenizer, model = e2e_support.byte_tokenizer(), e2e_support.random_model(e2e_support.FAMILIES["mistral"], seed=0)
    options = {
        "target": e2e_support.save(model, tokenizer, tmp_path / "target"),
        "draft": e2e_support.save(e2e_support.perturbed(model, 0.03), tokenizer, tmp_path / "draft"),
        **{"dtype": "float32", "window": 3, "max_model_len": 128, "verification": "coupled"},
    }
    params = [
        SamplingParams(temperature=t, seed=i, max_tokens=12, ignore_eos=True) for i, t in enumerate((0, 0.7, 1.0))
    ]
    with LLM(**options) as alone, LLM(target_parallel=3, **options) as three:
        found, expected = three.generate(PROMPTS, params), alone.generate(PROMPTS, params)
    assert [o.outputs[0].error for o in found] == [None] * 3
    assert [o.outputs[0].token_ids for o in found] == [o.outputs[0].token_ids for o in expected]


def runner_of(llm: LLM) -> ParallelRunner:
    assert isinstance(llm.models.target, ParallelRunner)
    return llm.models.target


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_two_engines_do_not_meet_and_closing_ends_the_ranks(pair: LLM) -> None:
    with LLM(target_parallel=2, method="autoregressive", dtype="float32", max_model_len=64) as other:
        pids = runner_of(other).rank_pids
        outputs = [llm.generate("import", SamplingParams(temperature=0.0, max_tokens=5)) for llm in (pair, other)]
        assert outputs[0][0].outputs[0].token_ids == outputs[1][0].outputs[0].token_ids
    assert not any(map(alive, pids))
    assert all(map(alive, runner_of(pair).rank_pids))
    other.close()  # again


def test_a_rank_that_dies_is_a_readable_error_and_takes_the_others_with_it() -> None:
    with LLM(target_parallel=4, method="autoregressive", dtype="float32", max_model_len=128) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
        assert llm.generate("a", params)[0].outputs[0].error is None
        pids = runner_of(llm).rank_pids
        os.kill(pids[1], signal.SIGKILL)
        error = llm.generate("a", params)[0].outputs[0].error
        assert error is not None
        assert "rank 2 of 4 ended with status -9" in error
        with pytest.raises(EngineClosedError, match="rank 2 of 4 ended with status -9") as closed:
            llm.generate("a", params)
        assert isinstance(closed.value.__cause__, RankError)
        deadline = time.monotonic() + 10
        while any(map(alive, pids)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(alive, pids))


def rank_children(known: set[str]) -> set[str]:
    """Rank processes of this one that are not known yet."""
    command = ["pgrep", "-f", "pearl.parallel.rank_process", "-P", str(os.getpid())]
    return set(subprocess.run(command, capture_output=True, text=True).stdout.split()) - known


def test_a_rank_that_cannot_load_says_why_and_nothing_is_left_running(tmp_path: Path) -> None:
    path, before = save("llama", tmp_path), rank_children(set())
    (tmp_path / "model.safetensors").rename(tmp_path / "moved.safetensors")
    with pytest.raises(ConfigurationError, match=r"holds no model\.safetensors"):
        start_parallel(spec(path, 2), ["cpu"] * 2, HostQueue(CPU))
    with pytest.raises(RankError, match="rank 1 of 2 failed: "):  # only its device does not exist
        start_parallel(spec(save("llama", tmp_path), 2), ["cpu", "mps"], HostQueue(CPU))
    assert not rank_children(before)


def test_ranks_do_not_outlive_an_engine_that_is_killed() -> None:
    """Nor wait for its forks, which hold the pipes to them."""
    program = (
        "import os, time; from pearl import LLM; llm = LLM(target_parallel=2, method='autoregressive');"
        "fork = os.fork(); fork or time.sleep(600);"
        "print(*llm.models.target.rank_pids, fork, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as engine:
        assert engine.stdout is not None
        pid, fork = (int(pid) for pid in engine.stdout.readline().split())
        engine.kill()
    try:
        deadline = time.monotonic() + 10
        while alive(pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not alive(pid)
        assert alive(fork)
    finally:
        os.kill(fork, signal.SIGKILL)


def test_a_forward_that_fails_here_ends_the_ranks_that_were_told_of_it(tmp_path: Path) -> None:
    """They wait in its first collective. The reason stays, and is no riddle about ranks that lost each other."""
    runner = start_parallel(spec(save("llama", tmp_path), 2), ["cpu"] * 2, HostQueue(CPU))
    try:
        with torch.inference_mode():
            runner.forward(BATCHES[0])

            def fail(*args: object) -> Tensor:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

            runner.model.forward = fail  # type: ignore[method-assign]
            began = time.monotonic()
            for attempt in range(2):
                with pytest.raises(
                    RankError, match="rank 0 of 2 failed: OutOfMemoryError: CUDA out of memory"
                ) as found:
                    runner.forward(BATCHES[1])
                assert isinstance(found.value.__cause__, torch.OutOfMemoryError) == (attempt == 0)
            with pytest.raises(RankError, match="rank 0 of 2 failed"):
                runner.check()
        assert not any(map(alive, runner.rank_pids))
        assert time.monotonic() - began < 2  # without waiting whether somebody else was lost
    finally:
        runner.close()


@pytest.mark.parametrize("ranks", [0, -1, "two"])
def test_a_number_of_ranks_that_makes_no_sense_is_refused(ranks: object) -> None:
    with pytest.raises(ConfigurationError, match="target_parallel must be an integer >= 1"):
        LLM(target_parallel=ranks)


def test_the_first_failure_is_the_reason_and_none_follows_the_end() -> None:
    lost, closed = Ranks([]), Ranks([])
    assert "ValueError: first" in str(lost.give_up(ValueError("first")))
    assert "ValueError: first" in str(lost.give_up(ValueError("second")))
    closed.close()
    closed._fail("rank 1 of 2 ended with status 0")
    closed.check()
