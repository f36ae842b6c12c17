"""bench/train_drafter.py: what is trained is what windows will be; a short run is worth something and goes on."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from rich.console import Console
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from bench.drafter_training.data import Text, Texts, answers, own_questions, read_questions
from bench.drafter_training.head import HeadLearner, TrainedHead, read_layers, shape_of
from bench.drafter_training.layers import LayersLearner, TrainedLayers
from bench.drafter_training.lessons import DraftVocabulary, require_plain_ends
from bench.drafter_training.program import _drafted_ids, _keep, main
from bench.drafter_training.states import StateFile
from bench.drafter_training.trainer import Options, Trainer
from pearl import LLM, SamplingParams
from pearl.heads import EagleHead, load_head, read_head
from pearl.messages import ForwardWork, SequenceState
from pearl.models import KVCache, ModelConfig, Tokenizer, bundled_path, load_model
from pearl.workers.model_runner import build_batch
from pearl_kernels import Situation, select

CPU, PAGE = torch.device("cpu"), 4
TINY: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 7, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
STATE = SequenceState(0, 0, SamplingParams(), 0, 0, None)


def tiny_target(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY, **options, head_dim=8)).eval()


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
        given = states.flatten(2), target.get_input_embeddings()(ids), steps
        rolled, late = trained.rollout(*given), trained.rollout(*given, begin=4)
    for whole, part in zip(rolled, late, strict=True):
        assert torch.allclose(whole[:, 4:], part, rtol=1e-4, atol=1e-5), "what is before is only looked at"
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


@pytest.mark.parametrize(
    ("kind", "folder", "other"), [({"ffn": 128}, "head", {"ffn": 64}), ({"layers": 1}, "draft", {"layers": 2})]
)
def test_a_short_run_is_worth_something_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: dict[str, int], folder: str, other: dict[str, int]
) -> None:
    """A few steps on the bundled target: loss falls, acceptance rises, the command goes on, and what it made drafts.
    What layers learn of an answer comes with it; a head needs the target's states too.
    """
    computed, compute = [], StateFile._compute

    def counted(self: StateFile, text: Text) -> np.ndarray:
        computed.append(text)
        return compute(self, text)

    monkeypatch.setattr(StateFile, "_compute", counted)
    options = {"files": 12, "answer_count": 8, "answer_tokens": 16, "vocab": 1024, "sequence": 40,
               "rows": 4, "steps": 2, "lr": 3e-3, "held_out": 12, **kind}  # fmt: skip
    main(tmp_path, most_steps=12, **options)  # type: ignore[arg-type]
    first = json.loads((tmp_path / "report.json").read_text())
    written = (tmp_path / "answers.jsonl").read_text()
    assert first["steps"] == 12
    known = len((tmp_path / "states.jsonl").read_text().splitlines()) - 1
    assert known - len(computed) == (8 if folder == "draft" else 0)
    if folder == "head":
        tensors = load_file(tmp_path / "head" / "model.safetensors")
        embedding = load_file(bundled_path("target") / "model.safetensors")["model.embed_tokens.weight"]
        rows = embedding[tensors["d2t"] + torch.arange(1024)]
        assert torch.equal(tensors["lm_head.weight"], rows.bfloat16()), "is not learnt, as nothing asks for it"
    main(tmp_path, most_steps=30, **options)  # type: ignore[arg-type]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["steps"] == 30
    assert (tmp_path / "answers.jsonl").read_text() == written
    assert report["held_out"]["loss"] < first["held_out"]["loss"] < first["before"]["loss"]
    assert sum(report["held_out"]["sampled"]) > 1.2 * sum(first["before"]["sampled"])
    assert report["held_out"]["greedy"][0] > first["before"]["greedy"][0]
    with pytest.raises(typer.BadParameter, match="another drafter"):
        main(tmp_path, most_steps=31, **{**options, **other})  # type: ignore[arg-type]
    with LLM(draft=str(tmp_path / folder), device="cpu", window=2) as llm, LLM(method="autoregressive") as plain:
        params = SamplingParams(max_tokens=24)
        outputs, expected = llm.generate("def add(a, b):", params), plain.generate("def add(a, b):", params)
    assert outputs[0].outputs[0].token_ids == expected[0].outputs[0].token_ids
    assert outputs[0].metrics.drafted > 0


@pytest.mark.parametrize("tied", [False, True])
def test_layers_are_the_targets_and_the_engines(tmp_path: Path, tied: bool) -> None:
    """Of all layers and ids: the target's own logits. Of some: what the engine makes of the folder."""
    target = tiny_target(tie_word_embeddings=tied)
    target.save_pretrained(tmp_path / "target")
    ids = torch.randint(60, (14,))
    embedded = target.get_input_embeddings()(ids)
    with torch.no_grad():
        whole = TrainedLayers(target, 7, range(60))(embedded, 2)
        assert torch.allclose(whole, target(ids[None]).logits[0, 2:], rtol=1e-4, atol=1e-5)
        some = TrainedLayers(target, 3, kept := list(range(0, 60, 3)))
        assert torch.equal(some.model.layers[2].mlp.up_proj.weight, target.model.layers[2].mlp.up_proj.weight)
        for weight in some.parameters():
            weight.copy_(weight.bfloat16())
        expected = some(embedded, 0)
    some.save(tmp_path / "draft")
    kernels = select(Situation("cpu", torch.float32, 8))
    model = load_model(tmp_path / "draft", device=CPU, dtype=torch.float32, max_model_len=64, kernels=kernels,
                       lender=tmp_path / "target")  # fmt: skip
    cache = KVCache.allocate(model.config, 4, PAGE, torch.float32, CPU)
    with torch.inference_mode():
        work = ForwardWork(STATE, tuple(ids.tolist()), 0, len(ids), (2, 0, 3, 1))
        found = model.forward(build_batch([work], PAGE, CPU), cache)[:, kept]
    assert (found - expected).abs().max() <= (1e-2 if not tied else 1e-4) * expected.abs().max()  # an own head: in bf16


def test_layers_are_those_that_they_were(tmp_path: Path) -> None:
    """With a window or none, rotated or not, each as in the target."""
    config = SmolLM3Config(**TINY, pad_token_id=0, no_rope_layers=[1, 0, 1, 1, 1, 1, 0], use_sliding_window=True,
                           sliding_window=4)  # fmt: skip
    config.layer_types = ["sliding_attention", *["full_attention"] * 6]
    target = SmolLM3ForCausalLM(config).bfloat16()
    some = TrainedLayers(target, 3, range(60))
    some.save(tmp_path)
    for found in (some.config, SmolLM3Config.from_pretrained(tmp_path)):
        assert found.no_rope_layers == [1, 0, 1]
        assert found.layer_types == ["sliding_attention", "full_attention", "full_attention"]
    assert {tensor.dtype for tensor in (some.head, *some.parameters())} == {torch.float32}, "which is what learns"
    assert target.config.num_hidden_layers == len(target.config.no_rope_layers) == 7


def test_a_checkpoint_of_another_drafter_is_refused(tmp_path: Path) -> None:
    """Of other layers, of other ids, or of a version that did not say."""
    target, options = tiny_target(), Options("cpu", 1, 1, 1e-3, 1)

    def trainer(count: int, kept: list[int]) -> Trainer:
        drafter = TrainedLayers(target, count, kept)
        learner = LayersLearner(drafter, target.get_input_embeddings().weight, StateFile(tmp_path, target, []), "cpu")
        return Trainer(learner, Texts([], 8), tmp_path, options)

    assert not trainer(2, [1, 2]).restore()
    trainer(2, [1, 2]).save()
    assert trainer(2, [1, 2]).restore()
    for other in (trainer(3, [1, 2]), trainer(2, [1, 3])):
        with pytest.raises(typer.BadParameter, match="another drafter or vocabulary"):
            other.restore()
    torch.save({"head": {}, "shape": {}}, tmp_path / "checkpoint.pt")
    with pytest.raises(typer.BadParameter, match="another drafter or vocabulary"):
        trainer(2, [1, 2]).restore()


def test_what_is_learnt_at_a_place() -> None:
    """By hand: of the ids 1, 3 and 5. In the second place the target would say what cannot be drafted."""
    kept, logits = torch.tensor([1, 3, 5]), torch.tensor([[0.0, 2.0, 1.0], [0.5, 0.0, 1.0], [0.0, 1.0, 0.3]])
    q1, q3, q5 = logits.softmax(-1).T
    tokens = torch.tensor([[3, 0, 5], [0, 3, 1], [5, 3, 7]])
    found = DraftVocabulary(kept, 8).step(
        logits, tokens, torch.tensor([[0.5, 0.2, 0.1], [0.6, 0.3, 0.1], [0.6, 0.3, 0]])
    )
    losses = [-(0.5 * q3[0].log() + 0.1 * q5[0].log()) / 0.6, 0.0, -(0.6 * q5[2].log() + 0.3 * q3[2].log()) / 0.9]
    assert torch.allclose(found.losses, torch.tensor(losses))
    assert found.same.tolist() == [True, False, False]
    assert torch.allclose(found.shared, torch.tensor([0.5 + 0.1, q3[1] + 0.1, q5[2] + 0.3]))
    assert q3[1] < 0.3 < q3[2]
    assert q1[1] > 0.1 < q5[0]
    assert q5[2] < 0.6


@pytest.mark.parametrize("begin", [1, 5])
def test_drafters_that_say_what_the_target_says_have_nothing_to_learn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begin: int
) -> None:
    """Each place is held against the target's own word there: all layers of it, and a head whose outputs are its last
    states. A head's first place is that whose next but one token is the answer's first, if there is one before it.
    """
    target, text, steps = tiny_target(), Text(tuple(torch.randint(60, (14,)).tolist()), begin), 3
    embeddings, count = target.get_input_embeddings().weight, len(text.ids)
    layers = LayersLearner(TrainedLayers(target, 7, range(60)), embeddings, StateFile(tmp_path, target, []), "cpu")
    head = TrainedHead(shape_of(target, draft_vocab=60, ffn=40), target, range(60))
    last = target(torch.tensor([text.ids]), output_hidden_states=True).hidden_states[-1]

    def outputs(states: Any, embedded: Any, steps: int, begin: int) -> list[torch.Tensor]:
        return [last[:, begin + 1 + step : count - steps + step] for step in range(steps)]

    monkeypatch.setattr(head, "outputs", outputs)
    (tmp_path / "head").mkdir()
    states = StateFile(tmp_path / "head", target, [*read_layers(target), 7])
    found = HeadLearner(head, embeddings, states, "cpu").steps(text, steps)
    assert [len(step.same) for step in found] == [count - steps - 1 - max(0, begin - 2)] * steps
    (own,) = layers.steps(text, 1)
    assert len(own.same) == count - begin
    for step in (own, *found):
        assert step.same.all()
        assert (step.shared > 0.98).all()
        assert (step.apart < 1e-3).all()
    assert all((step.apart > 0).all() for step in found), "states are kept in bf16"


def test_targets_whose_numbers_are_scaled_are_refused(tmp_path: Path) -> None:
    require_plain_ends(tiny_target())
    for scaled in ({"embedding_multiplier": 12.0}, {"logits_scaling": 6.0}):
        target = GraniteForCausalLM(GraniteConfig(**TINY, **scaled))
        with pytest.raises(typer.BadParameter, match="a GraniteForCausalLM scales or caps"):
            require_plain_ends(target)
    target.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").symlink_to(bundled_path("target") / "tokenizer.json")
    with pytest.raises(typer.BadParameter, match="scales or caps"):
        main(tmp_path / "out", target=str(tmp_path), layers=7)
    with pytest.raises(typer.BadParameter, match="--layers 8: the target has 7"):
        main(tmp_path / "out", target=str(tmp_path), layers=8)


def test_what_the_target_said_while_it_wrote_is_what_it_says_of_the_text(tmp_path: Path) -> None:
    """Of cut answers too, which are learnt from; so no forward of the target is needed."""
    path = str(bundled_path("target"))
    judge = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    told, tell = (file := StateFile(tmp_path, judge, [])).read, partial(_keep, file, 14)
    texts = answers(path, [[5, 6, 7], [8, 9]], tmp_path / "answers.jsonl", 16, 0.7, Console(quiet=True), tell)
    assert len((tmp_path / "states.jsonl").read_text().splitlines()) == 3
    for text in (Text(text.ids[:14], text.begin) for text in texts):
        heard, places = told(text), slice(text.begin - 1, 13)
        with torch.no_grad():
            p = judge(torch.tensor([text.ids])).logits[0].softmax(-1)[places]
        tokens, probabilities = heard.tokens[places, :20], heard.probabilities[places, :20]
        assert (p.gather(-1, tokens) - probabilities).abs().max() < 0.02  # it was written in bf16
        assert (p.max(-1).values - probabilities[:, 0]).abs().max() < 0.02
        assert (heard.probabilities[places, 20:] == 0).all()
        assert all(len(set(row)) == 20 for row in tokens.tolist())
    assert len((tmp_path / "states.jsonl").read_text().splitlines()) == 3


def test_a_head_begins_as_the_targets_last_layer() -> None:
    target = tiny_target()
    head = TrainedHead(shape_of(target, draft_vocab=20, ffn=40), target, list(range(0, 60, 3)))
    last, own = target.model.layers[-1], head.midlayer
    assert torch.equal(own.self_attn.q_proj.weight[:, 32:], last.self_attn.q_proj.weight)
    assert torch.equal(own.self_attn.o_proj.weight, last.self_attn.o_proj.weight)
    assert own.mlp.up_proj.weight.shape == (40, 32), "of another width: its own"
    assert torch.equal(head.lm_head.weight, target.lm_head.weight[::3])
    assert (head.fc.weight[:, -32:] - torch.eye(32)).abs().max() < 0.2 < head.fc.weight[:, -32:].diagonal().min()


def test_states_are_computed_once(tmp_path: Path) -> None:
    """Those of texts of several threads; a text that an interruption tore is computed again."""
    target, layers = tiny_target(), [2, 3, 7]
    texts = [Text(tuple(range(index, index + 12 + index)), 3) for index in range(4)]
    file = StateFile(tmp_path, target, layers)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(file.read, texts))
    index, data = tmp_path / "states.jsonl", tmp_path / "states.bin"
    kept = index.read_bytes(), data.read_bytes()
    index.write_bytes(kept[0][:-9])
    data.write_bytes(kept[1][:-9])
    again = StateFile(tmp_path, target, layers)
    for text in texts:
        found, given = again.read(text), target(torch.tensor([text.ids]), output_hidden_states=True)
        wanted = torch.cat([given.hidden_states[layer][0] for layer in layers], -1)
        assert torch.equal(found.states, wanted.bfloat16().float())
        p = given.logits[0].softmax(-1)
        assert torch.allclose(p.gather(-1, found.tokens), found.probabilities, atol=1e-3)
        assert torch.equal(found.tokens[:, 0], p.argmax(-1))
    assert len(index.read_text().splitlines()) == 5
    assert data.read_bytes() == kept[1]
    with pytest.raises(typer.BadParameter, match="is of another target"):
        StateFile(tmp_path, target, [2, 3, 6])


def test_a_chat_model_asks_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled target, as if a line were a turn. What there is stays, and is asked for only once."""
    monkeypatch.setattr("bench.drafter_training.data._AT_ONCE", 40)
    for file in bundled_path("target").iterdir():
        if file.name not in ("chat_template.jinja", "generation_config.json"):
            (tmp_path / file.name).symlink_to(file)
    path, tokenizer = str(tmp_path), Tokenizer.from_pretrained(str(bundled_path("target")))
    lines = [token for token in range(tokenizer.vocab_size) if "\n" in tokenizer.decode([token])]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, *lines]}))
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}# {{ m['content'] }}\n{% endfor %}")
    file, console = tmp_path / "questions.jsonl", Console(quiet=True)
    found = own_questions(path, Tokenizer.from_pretrained(path), file, 3, 24, console)
    assert len(set(found)) == 3
    assert all(text and "\n" not in text for text in found)
    kept = file.read_text()
    assert own_questions("nowhere", Tokenizer.from_pretrained(path), file, 2, 24, console) == found[:2]
    more = own_questions(path, Tokenizer.from_pretrained(path), file, len(kept.splitlines()) + 1, 24, console)
    assert more[:3] == found
    assert len(set(more)) == len(kept.splitlines()) + 1
    assert file.read_text().startswith(kept)
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    with pytest.raises(typer.BadParameter, match="nothing before a user's words"):
        own_questions(path, Tokenizer.from_pretrained(path), tmp_path / "new.jsonl", 3, 24, console)


def test_ids_that_are_drafted() -> None:
    tokenizer = Tokenizer.from_pretrained(str(bundled_path("target")))
    texts = Texts((Text((0, *[700 + place % 5 for place in range(30)], 900 + index), 1) for index in range(21)), 64)
    frequencies = texts.frequencies()
    assert _drafted_ids(texts, tokenizer, 3) == sorted(token for token, _ in frequencies.most_common(3))
    assert _drafted_ids(texts, tokenizer, 40) == sorted([*frequencies, *range(40 - len(frequencies))])
    assert _drafted_ids(texts, tokenizer, 1 << 20) == list(range(tokenizer.vocab_size))


def test_texts_are_held_out_and_cut(tmp_path: Path) -> None:
    texts = Texts((Text(tuple(range(index, index + 30)), 5) for index in range(60)), length=20)
    assert (len(texts.train), len(texts.held_out)) == (57, 3)
    assert not {text.ids for text in texts.train} & {text.ids for text in texts.held_out}
    sampled = texts.sample(np.random.default_rng(0), 3)
    assert [(len(text.ids), text.begin) for text in sampled] == [(20, 5)] * 3
    assert Texts([Text(tuple(range(20)), 12)], 40).held_out == [], "an answer of a few tokens"
    assert 1 not in texts.frequencies()  # of the first text's prompt alone
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question": "a"}\n\n{"turns": ["b", "c"]}\n{"prompt": "d"}\n{"other": 1}\n')
    assert read_questions(file) == ["a", "b", "d"]
