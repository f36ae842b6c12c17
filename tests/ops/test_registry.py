"""Which provider runs what, and that every other one says why it does not."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch

from pearl_kernels import KernelSet, Situation, cpu, reference, registry
from pearl_kernels.provider import Provider
from pearl_kernels.registry import OPERATORS, PROVIDERS, Status, explain, preferred, select

every_operator = pytest.mark.parametrize("op", OPERATORS)
HEAD_DIM_MATTERS = ("rope_and_cache", "verify_attention")


@pytest.fixture
def two_providers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cpu provider and the reference alone, whatever others there are."""
    both = tuple(provider for provider in PROVIDERS if provider.name in ("cpu", "reference"))
    monkeypatch.setattr(registry, "PROVIDERS", both)


def chosen(statuses: list[Status]) -> Status:
    (status,) = [status for status in statuses if status.chosen]
    return status


@every_operator
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_explain_gives_one_reason_a_provider_and_chooses_one(op: str, device: str, dtype: torch.dtype) -> None:
    statuses = explain(op, Situation(device, dtype))
    assert [status.provider for status in statuses] == [provider.name for provider in preferred(op)]
    assert all(status.op == op and status.reason for status in statuses)
    assert chosen(statuses).reason == "first that can run"


@every_operator
def test_the_order_of_preference_is_the_table_s_but_for_attention(op: str) -> None:
    """Whole prompts are Triton's: the CUDA kernel of ``verify_attention`` is made for few queries a sequence."""
    names, table = [provider.name for provider in preferred(op)], [provider.name for provider in PROVIDERS]
    if op != "verify_attention":
        assert names == table
        assert names.index("cuda") < names.index("triton")
        return
    assert names.index("cuda") == names.index("triton") + 1
    assert [name for name in names if name != "cuda"] == [name for name in table if name != "cuda"]


def test_the_order_holds_where_a_provider_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for missing in ("cuda", "triton"):
        rest = tuple(provider for provider in PROVIDERS if provider.name != missing)
        monkeypatch.setattr(registry, "PROVIDERS", rest)
        assert preferred("verify_attention") == list(rest)


def test_the_first_in_the_order_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    both = tuple(Provider(name, OPERATORS, lambda op, situation: None) for name in ("cuda", "triton"))
    monkeypatch.setattr(registry, "PROVIDERS", both)
    assert chosen(explain("rms_norm")).provider == "cuda"
    assert chosen(explain("verify_attention")).provider == "triton"
    assert chosen(explain("verify_attention", prefer={"verify_attention": "cuda"})).provider == "cuda"
    assert set(select().providers.values()) == {"cuda", "triton"}


@every_operator
def test_the_reference_comes_last_and_runs_everything(op: str) -> None:
    assert PROVIDERS[-1].name == preferred(op)[-1].name == "reference"
    assert PROVIDERS[-1].operators[op] is getattr(reference, op)
    assert chosen(explain(op, Situation("cuda", torch.float16, 12), {op: "reference"})).provider == "reference"


def test_every_provider_implements_only_operators() -> None:
    for provider in PROVIDERS:
        assert set(provider.operators) <= set(OPERATORS), provider.name


def test_select_resolves_every_operator_as_explain_says() -> None:
    kernels = select()
    assert {field.name for field in dataclasses.fields(KernelSet)} == {*OPERATORS, "providers", "verify_numbers"}
    assert set(kernels.providers) == set(OPERATORS)
    functions = {provider.name: provider.operators for provider in PROVIDERS}
    for op, name in kernels.providers.items():
        assert name == chosen(explain(op)).provider
        assert getattr(kernels, op) is functions[name][op]
    assert kernels.rms_norm is cpu.OPERATORS["rms_norm"]


def test_verdicts_in_numbers_come_from_the_provider_of_verify() -> None:
    assert select().verify_numbers is cpu.VERIFY_NUMBERS
    assert select(prefer={"verify": "reference"}).verify_numbers is None


def test_prefer_pins_one_operator_and_no_other() -> None:
    kernels = select(prefer={"sample": "reference"})
    assert kernels.sample is reference.sample
    assert {op: name for op, name in kernels.providers.items() if op != "sample"} == {
        op: name for op, name in select().providers.items() if op != "sample"
    }
    by_name = {status.provider: status for status in explain("sample", prefer={"sample": "reference"})}
    assert by_name["reference"].reason == "asked for"
    assert by_name["cpu"].reason == "reference was asked for"
    assert explain("verify", prefer={"sample": "reference"}) == explain("verify")


def test_the_default_is_chosen_with_its_rival_named(two_providers: None) -> None:
    expected = [Status("sample", "cpu", True, "first that can run"), Status("sample", "reference", False, "")]
    assert explain("sample") == [expected[0], dataclasses.replace(expected[1], reason="cpu comes first")]


def test_unknown_operators_are_errors() -> None:
    with pytest.raises(ValueError, match=r"unknown operator 'softmax'; the operators are rms_norm, .*copy_blocks"):
        explain("softmax")
    with pytest.raises(ValueError, match=r"unknown operators \['softmax'\]"):
        select(prefer={"softmax": "cpu", "sample": "cpu"})


def test_a_provider_that_cannot_run_is_an_error_with_all_reasons(two_providers: None) -> None:
    with pytest.raises(ValueError, match=r"no provider 'cpu' can run sample .*cpu: runs on cpu, not on cuda"):
        explain("sample", Situation(device="cuda"), {"sample": "cpu"})
    with pytest.raises(ValueError, match=r"no provider 'abacus' can run sample .*abacus was asked for"):
        select(prefer={"sample": "abacus"})


@every_operator
@pytest.mark.parametrize(
    ("situation", "reason"),
    [
        (Situation(dtype=torch.float16), "computes float32 and bfloat16, not torch.float16"),
        (Situation(dtype=torch.float64), "computes float32 and bfloat16, not torch.float64"),
        (Situation(device="cuda"), "runs on cpu, not on cuda"),
        (Situation(head_dim=12), "needs a head_dim that is a multiple of 8 up to 256, not 12"),
        (Situation(head_dim=264), "needs a head_dim that is a multiple of 8 up to 256, not 264"),
        (Situation(head_dim=0), "needs a head_dim that is a multiple of 8 up to 256, not 0"),
    ],
    ids=str,
)
def test_what_the_cpu_provider_refuses_falls_to_the_reference(
    op: str, situation: Situation, reason: str, two_providers: None
) -> None:
    if op not in cpu.OPERATORS:
        reason = "does not implement it"
    elif "head_dim" in reason and op not in HEAD_DIM_MATTERS:
        assert select(situation).providers[op] == "cpu"
        return
    refused, taken = explain(op, situation)
    assert refused == Status(op, "cpu", False, reason)
    assert taken == Status(op, "reference", True, "first that can run")
    assert getattr(select(situation), op) is getattr(reference, op)


def test_order_is_preference_and_a_refusal_passes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = {name: (lambda: None) for name in ("sample", "verify")}

    def picky(op: str, situation: Situation) -> str | None:
        return "no taste for it" if op == "verify" else None

    monkeypatch.setattr(registry, "PROVIDERS", (Provider("picky", functions, picky), *PROVIDERS))
    assert chosen(explain("sample")).provider == "picky"
    assert explain("verify")[0] == Status("verify", "picky", False, "no taste for it")
    assert explain("linear")[0] == Status("linear", "picky", False, "does not implement it")
    assert select().sample is functions["sample"]


def test_without_the_compiled_core_the_reason_is_told(monkeypatch: pytest.MonkeyPatch, two_providers: None) -> None:
    monkeypatch.delattr(cpu, "layers")
    monkeypatch.setitem(sys.modules, "pearl_kernels.cpu.layers", None)  # as if its import failed
    operators, reason = cpu._load()
    assert set(operators) == {*cpu.OPERATORS, "verify_numbers"}
    with pytest.raises(RuntimeError, match="not built"):
        operators["sample"]()
    monkeypatch.setattr(cpu, "_LOAD_ERROR", reason)
    assert "pip install -e ." in explain("sample")[0].reason
    assert set(select().providers.values()) == {"reference"}
    assert select().verify_numbers is None
