"""One field or tensor of a GGUF file changed at random: the logits of transformers, or a sentence that names it."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

pytest.importorskip("gguf", reason="writes files with the package gguf")

from checkpoints import assert_logits
from families import CONTEXT, build, load
from gguf_files import GgufFile, gguf_of
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pearl.errors import ConfigurationError
from pearl.models.gguf.names import TensorNames


def oracle(file: GgufFile) -> PreTrainedModel | None:
    """What plain reading makes of a file: transformers' class with the fields and tensors that there are; None if it
    cannot be built of them."""
    own = {name.removeprefix("llama."): value for name, value in file.fields.items()}
    tensors = {}
    try:
        heads = own["attention.head_count"]
        config = AutoConfig.for_model(
            "llama", vocab_size=own.get("vocab_size", 131), hidden_size=own["embedding_length"],
            intermediate_size=own["feed_forward_length"], num_hidden_layers=own["block_count"],
            num_attention_heads=heads, num_key_value_heads=own.get("attention.head_count_kv", heads),
            head_dim=own.get("attention.key_length", 8), rms_norm_eps=own["attention.layer_norm_rms_epsilon"],
            max_position_embeddings=own["context_length"], tie_word_embeddings="output.weight" not in file.tensors,
            rope_parameters={"rope_type": "default", "rope_theta": own.get("rope.freq_base", 10000.0)},
            attn_implementation="eager",
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for name, (data, kind) in file.tensors.items():
            theirs, count = TensorNames().theirs(name), {"attn_q": heads, "attn_k": config.num_key_value_heads}
            values = torch.from_numpy(data.view(np.float16 if kind == "F16" else np.float32)).float()
            if pairs := count.get(name.split(".")[2] if name.startswith("blk.") else ""):
                values = values.view(pairs, -1, 2, values.shape[1]).transpose(1, 2).reshape(values.shape)
            tensors[theirs] = values
        found = model.load_state_dict(tensors, strict=False)
    except Exception:  # whatever a wrong value runs into
        return None
    missing = [name for name in found.missing_keys if name != "lm_head.weight"]
    return None if missing or found.unexpected_keys else model


NAMED = re.compile(r"llama\.\w+|tensor '\w|'(blk\.\d\.|token_embd|output)")
VALUES = st.one_of(
    st.none(), st.booleans(), st.text(max_size=3), st.integers(0, 100), st.floats(0.25, 1e6, width=32),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
)  # fmt: skip


@settings(max_examples=60, deadline=None, database=None)
@given(data=st.data())
def test_any_one_change_gives_transformers_logits_or_is_named(
    data: st.DataObject, base: GgufFile, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    changed, name = base, ""
    if data.draw(st.booleans(), "of a field"):
        name = data.draw(st.sampled_from([key for key in base.fields if key.startswith("llama.")]))
        changed = base.changed({name: data.draw(VALUES)})
    else:
        name = data.draw(st.sampled_from(list(base.tensors)))
        values = base.tensors[name][0]
        kind = data.draw(st.sampled_from(["gone", "renamed", "F16", "cut", "turned"]))
        tensor = {"F16": (values.astype(np.float16), "F16"), "cut": (values[:-1], "F32"),
                  "turned": (np.ascontiguousarray(values.T), "F32")}.get(kind)  # fmt: skip
        changed = base.changed({}, **{name: tensor})
        if kind == "renamed":
            changed = changed.changed({}, **{name.replace("blk.1", "blk.7").replace("t", "u"): base.tensors[name]})
    changed.write(path)
    judge = oracle(changed)
    try:
        load(path, max_model_len=min(CONTEXT, 16))
    except ConfigurationError as error:
        assert NAMED.search(str(error)), error  # noqa: PT017
    else:
        assert judge is not None, f"{name} was loaded"
        assert_logits(path, judge)


@pytest.fixture(scope="module")
def base() -> GgufFile:
    return gguf_of(build("llama"))[0]
