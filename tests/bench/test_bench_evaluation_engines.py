"""In bfloat16, whatever the method, the batch and the instructions: outputs are plain decoding's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from bench_support import ROOT

from bench.evaluation.engines import Agreement, Engine, agreements, transformers
from bench.evaluation.setups import Windows, drafting
from bench.roofline.generators import assistant
from pearl import LLM
from pearl.models import bundled_path

_OTHER_INSTRUCTIONS = """
import json
from dataclasses import asdict
from bench.evaluation.engines import agreements, ours
from bench.evaluation.setups import Windows, drafting, prompt_lookup
from pearl import LLM

prompts = ["def gcd(a, b):\\n", "import os\\n"]
with LLM(device="cpu", dtype="bfloat16", prefix_caching=False, max_num_seqs=2, max_window=20) as llm:
    setups = [*drafting(Windows(3, 4), True), *prompt_lookup()]
    found = agreements(ours(llm, setups, 2, 10), [llm.encode(prompt) for prompt in prompts])
print(json.dumps([asdict(one) for one in found]))
"""


def test_all_methods_and_batches_agree_with_other_instructions_too(tmp_path: Path) -> None:
    """Those of this machine have a test in test_bench_evaluation_drafters.py."""
    line = [sys.executable, "-c", _OTHER_INSTRUCTIONS]
    for isa in ("avx2", "scalar"):  # the first that this CPU has
        environment = {**os.environ, "PEARL_CPU_ISA": isa, "PYTHONPATH": str(ROOT)}
        finished = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
        if "cannot run on this CPU" not in finished.stderr:
            break
    found = json.loads(finished.stdout)
    assert len(found) == 11 * 2 + 1, "methods and drafters, alone and in batches; plain decoding in batches"
    assert [one for one in found if one["equal"] != one["prompts"]] == []


def test_what_differs_is_counted() -> None:
    engine = Engine("x", {"plain": lambda p: [[1, 2], [3, 4]], "drafted": lambda p: [[1, 2], [3, 5]]})
    assert agreements(engine, [[0], [0]]) == [Agreement("x", "drafted", 2, 1, 3)]


def test_a_head_is_no_model_that_assists(tmp_path: Path) -> None:
    """transformers would make a model of its configuration, with random weights."""
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama"}')
    assert assistant(str(tmp_path)) is None
    assert assistant(str(bundled_path("draft"))) == str(bundled_path("draft"))
    assert not [setup for setup in drafting(Windows(3, 4), True, phrases=False) if setup.guesses == "phrases"]


def test_transformers_in_padded_batches() -> None:
    """In float32, where its own padding changes nothing."""
    with LLM(device="cpu", dtype="float32", draft="ngram", prefix_caching=False, max_num_seqs=2) as llm:
        prompts = [llm.encode(text) for text in ("def gcd(a, b):\n", "x", "import os\n")]
        found = agreements(transformers(llm, 8, 2), prompts)
    assert [(one.way, one.equal) for one in found] == [("prompt lookup", 3), ("batch 2", 3)]
