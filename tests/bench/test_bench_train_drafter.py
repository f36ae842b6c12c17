"""bench/train_drafter.py: what is trained is what windows will be; a short run is worth something and goes on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM

from bench.head_training.data import Text, Texts, read_questions
from bench.head_training.model import TrainedHead, shape_of
from bench.head_training.program import main
from pearl import LLM, SamplingParams
from pearl.heads import EagleHead, load_head, read_head
from pearl.messages import ForwardWork, SequenceState
from pearl.models import KVCache, ModelConfig
from pearl.workers.model_runner import build_batch
from pearl_kernels import Situation, select

CPU, PAGE = torch.device("cpu"), 4
STATE = SequenceState(0, 0, SamplingParams(), 0, 0, None)


def tiny_target() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=7, head_dim=8,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_rollouts_are_what_windows_will_be(tmp_path: Path) -> None:
    """Each step's logits at each place, of the trained module, and of the engine's head with its KV, step by step."""
    target, steps = tiny_target(), 3
    target.save_pretrained(tmp_path / "target")
    shape = shape_of(target, draft_vocab=20, ffn=40)
    trained = TrainedHead(shape, target, list(range(0, 60, 3)))
    with torch.no_grad():
        for name, weight in trained.named_parameters():
            weight.copy_((weight + torch.randn_like(weight) * (0.3 if weight.ndim == 1 else 0.2)).bfloat16())
            assert name
        ids = torch.randint(60, (1, 14))
        hidden = target(ids, output_hidden_states=True).hidden_states
        states = torch.stack([hidden[layer] for layer in shape["eagle_aux_hidden_state_layer_ids"]], 2)
        rolled = trained.rollout(states.flatten(2), target.get_input_embeddings()(ids), steps)
    trained.save(tmp_path / "head")
    config = read_head(str(tmp_path / "head"), ModelConfig.from_pretrained(str(tmp_path / "target")))
    kernels, embed = select(Situation("cpu", torch.float32, 8)), target.get_input_embeddings()
    head = load_head(str(tmp_path / "head"), config, device=CPU, max_model_len=64, kernels=kernels, embed=embed,
                     embedding_width=32)  # fmt: skip
    assert isinstance(head, EagleHead)
    tokens = ids[0].tolist()
    for end in range(1, rolled[0].shape[1] + 1):
        cache = KVCache.allocate(config.shape, 4, PAGE, torch.float32, CPU)
        with torch.inference_mode():
            work = ForwardWork(STATE, tuple(tokens[1 : end + 1]), 0, 0, (2, 0, 3, 1))
            output = head.forward(build_batch([work], PAGE, CPU), head.features(states[0, :end].clone()), cache)[-1:]
            for step in range(steps):
                found, wanted = head.logits(output)[0, ::3], rolled[step][0, end - 1]
                assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max(), (end, step)
                work = ForwardWork(STATE, (tokens[end + 1 + step],), end + step, 0, (2, 0, 3, 1))
                output = head.forward(build_batch([work], PAGE, CPU), output.clone(), cache)


def test_a_short_run_is_worth_something_and_goes_on(tmp_path: Path) -> None:
    """A few steps on the bundled target: loss falls, acceptance rises, the command goes on, and the head drafts."""
    options = {"files": 12, "answer_count": 8, "answer_tokens": 16, "vocab": 1024, "ffn": 128, "sequence": 40,
               "rows": 4, "steps": 2, "lr": 3e-3, "held_out": 12}  # fmt: skip
    main(tmp_path, most_steps=12, **options)  # type: ignore[arg-type]
    first = json.loads((tmp_path / "report.json").read_text())
    answers = (tmp_path / "answers.jsonl").read_text()
    assert first["steps"] == 12
    main(tmp_path, most_steps=30, **options)  # type: ignore[arg-type]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["steps"] == 30
    assert (tmp_path / "answers.jsonl").read_text() == answers
    assert report["held_out"]["loss"] < first["held_out"]["loss"] < first["before"]["loss"]
    assert sum(report["held_out"]["sampled"]) > 1.5 * sum(first["before"]["sampled"])
    assert report["held_out"]["greedy"][0] > first["before"]["greedy"][0]
    with pytest.raises(typer.BadParameter, match="another head"):
        main(tmp_path, most_steps=31, **{**options, "ffn": 64})  # type: ignore[arg-type]
    with LLM(draft=str(tmp_path / "head"), device="cpu", window=2) as llm, LLM(method="autoregressive") as plain:
        params = SamplingParams(max_tokens=24)
        outputs, expected = llm.generate("def add(a, b):", params), plain.generate("def add(a, b):", params)
    assert outputs[0].outputs[0].token_ids == expected[0].outputs[0].token_ids
    assert outputs[0].metrics.drafted > 0


def test_texts_are_held_out_and_cut(tmp_path: Path) -> None:
    texts = Texts((Text(tuple(range(index, index + 30)), 5) for index in range(60)), length=20)
    assert (len(texts.train), len(texts.held_out)) == (57, 3)
    assert not {text.ids for text in texts.train} & {text.ids for text in texts.held_out}
    batch = texts.sample(np.random.default_rng(0), 3)
    assert batch.ids.shape == (3, 20)
    assert batch.counts.sum(1).tolist() == [15] * 3
    assert 1 not in texts.frequencies()  # of the first text's prompt alone
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question": "a"}\n\n{"turns": ["b", "c"]}\n{"prompt": "d"}\n{"other": 1}\n')
    assert read_questions(file) == ["a", "b", "d"]
