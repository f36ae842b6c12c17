"""Which tokenizers may belong to one pair: such as published ones do, and what no family has in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pearl.errors import ConfigurationError
from pearl.models import Tokenizer
from pearl.models.vocabulary import Vocabulary, compare, require_common_core, usable_ids

CORE = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "in"]  # 258 tokens
N = len(CORE)
FIM = ["▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>"]


def vocabulary(
    core: Sequence[str] = CORE, added: Mapping[int, str] | None = None, path: Path | None = None
) -> Vocabulary:
    """Byte-level BPE with added special tokens at these ids; by way of ``path``, as transformers saves and loads it."""
    added = added or {}
    backend = Backend(models.BPE({token: i for i, token in enumerate(core)} | {t: i for i, t in added.items()}, []))
    backend.add_special_tokens([added[i] for i in sorted(added)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    if path is None:
        return Vocabulary.of(tokenizer)
    tokenizer.save_pretrained(path)
    return Tokenizer.from_pretrained(str(path)).vocabulary


def at(begin: int, tokens: Sequence[str]) -> dict[int, str]:
    return dict(enumerate(tokens, begin))


def llama3(names: Mapping[int, str]) -> dict[int, str]:
    """256 special tokens, of which those without a name are numbered as they come."""
    spare = (f"<|reserved_special_token_{i}|>" for i in range(256))
    return {N + i: names[i] if i in names else next(spare) for i in range(256)}


LLAMA_3 = llama3({0: "<|begin_of_text|>", 1: "<|end_of_text|>", 6: "<|start_header_id|>", 7: "<|end_header_id|>",
                  9: "<|eot_id|>"})  # fmt: skip
LLAMA_31 = llama3({0: "<|begin_of_text|>", 1: "<|end_of_text|>", 4: "<|finetune_right_pad_id|>",
                   6: "<|start_header_id|>", 7: "<|end_header_id|>", 8: "<|eom_id|>", 9: "<|eot_id|>",
                   10: "<|python_tag|>"})  # fmt: skip
QWEN2 = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN25 = [*QWEN2, "<|object_ref_start|>", "<|object_ref_end|>", "<tool_call>", "</tool_call>"]


@pytest.mark.parametrize(
    ("target", "draft", "limit", "common", "differing"),
    [
        # CodeLlama: of 34B, FIM tokens lie behind the head; of 7B, they are among 16 pieces of its own.
        ((CORE, at(N, FIM)), ([*CORE, *FIM[::-1], "<a>", "<b>"], {}), N, N, 0),
        (([*CORE, *FIM[::-1], "<a>", "<b>"], {}), (CORE, at(N, FIM)), N, N, 0),
        ((CORE, at(N, FIM)), ([*CORE, *FIM[::-1], "<a>", "<b>"], {}), N + 6, N, 4),
        ((CORE, LLAMA_3), (CORE, LLAMA_31), N + 256, N + 7, 249),
        ((CORE, at(N, QWEN25)), (CORE, at(N, QWEN2)), N + 7, N + 3, 0),
        ((CORE, at(N, QWEN2)), (CORE, at(N, QWEN25)), N + 3, N + 3, 0),
        ((CORE, at(N + 9, QWEN2)), (CORE, at(N, QWEN25)), N + 12, N, 0),  # gaps, and nothing above the core in common
        ((["<unk>", *CORE], {0: "<unk>", N + 1: "<pad>"}), (["<s>", *CORE], {0: "<s>", N + 1: "<unk>"}), N + 2, N, 2),
        (([*CORE, "more", "words"], {}), (CORE, {}), N + 2, N, 0),  # a core that was extended
        (([*CORE, "more"], {}), (CORE, {N: "<pad>"}), N + 1, N, 1),  # by one and not by the other
        ((CORE, {N: "<pad>"}), ([*CORE, "more"], {}), N + 1, N, 1),
    ],
    ids=["codellama-34b-7b", "codellama-7b-34b", "codellama-padded", "llama3-3.1", "qwen2.5-2", "qwen2-2.5", "gaps",
         "other special tokens", "extended", "target extended", "draft extended"],
)  # fmt: skip
def test_one_core_makes_a_pair(
    tmp_path: Path,
    target: tuple[Sequence[str], Mapping[int, str]],
    draft: tuple[Sequence[str], Mapping[int, str]],
    limit: int,
    common: int,
    differing: int,
) -> None:
    mine, theirs = vocabulary(*target, tmp_path / "target"), vocabulary(*draft, tmp_path / "draft")
    found = compare(mine, theirs, limit)
    assert (found.common, len(found.differing), found.core) == (common, differing, ())
    require_common_core(mine, theirs, limit)


SWAPPED = [*CORE[:66], CORE[67], CORE[66], *CORE[68:]]


@pytest.mark.parametrize(
    ("draft", "says"),
    [
        (vocabulary(SWAPPED), f"of the {N} ids that both have, 2 mean.*: 66 is '{CORE[67]}' and '{CORE[66]}'; choose"),
        (vocabulary([*CORE[:-1], "an"], {N: "<pad>"}), f"of the {N} .* 1 mean.*: {N - 1} is 'an' and 'in'"),
        (vocabulary(["new", *CORE]), f"of the {N} ids that both have, {N} mean something else: 0 is 'new'"),  # shifted
        (vocabulary([], at(0, [f"<{i}>" for i in range(N)])), f"{N} mean something else: 0 is '<0>'"),
        (vocabulary([], at(N, ["<a>"])), "of the 0 ids that both have, 0 mean something else; choose"),
    ],
    ids=["swapped", "one", "shifted", "all added", "nothing shared"],
)  # fmt: skip
def test_another_core_is_refused_with_a_count_and_an_example(draft: Vocabulary, says: str) -> None:
    with pytest.raises(ConfigurationError, match=f"the draft's tokenizer differs from the target's: .*{says}"):
        require_common_core(vocabulary(), draft, N + 100)
    with pytest.raises(ConfigurationError):
        require_common_core(draft, vocabulary(), N + 100)


@pytest.mark.parametrize(
    ("tokens", "eos_ids", "rows", "usable"),
    [
        (300, {0}, 300, 300),
        (300, {0}, 320, 300),  # padding
        (300, {0}, 280, 280),  # tokens behind the head
        (300, {0, 310}, 320, 311),  # an end of text that the tokenizer does not know
        (300, {0, 320, -1}, 320, 300),  # that no id of the model can be
        (300, set(), 320, 300),
    ],
)
def test_what_a_request_may_name(tokens: int, eos_ids: set[int], rows: int, usable: int) -> None:
    assert usable_ids(tokens, eos_ids, rows) == usable
