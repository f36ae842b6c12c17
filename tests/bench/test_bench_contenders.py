"""What ``--methods`` names, and what it must not."""

from __future__ import annotations

import pytest

from pearl.bench.contenders import parse_contenders
from pearl.choices import LONGEST_WINDOW
from pearl.config import EngineConfig
from pearl.errors import ConfigurationError


def test_a_method_may_have_a_window_or_a_pace_of_its_own() -> None:
    found = parse_contenders(" autoregressive,speculative ,pearl,, pearl@01,pearl@3-5,speculative@4,pearl@balanced")
    assert [contender.name for contender in found] == [
        "autoregressive", "speculative", "pearl", "pearl@1", "pearl@3", "pearl@4", "pearl@5", "speculative@4",
        "pearl@balanced",
    ]  # fmt: skip
    configs = [EngineConfig(**contender.options) for contender in found]
    assert [config.method for config in configs] == [contender.name.partition("@")[0] for contender in found]
    assert [config.window for config in configs] == ["auto", "auto", "auto", 1, 3, 4, 5, 4, "auto"]
    assert [config.pace for config in configs] == ["auto"] * 8 + ["balanced"]


def test_pearl_at_a_window_may_prepare_others() -> None:
    found = parse_contenders("pearl@4,pearl@4+0,pearl@4-5+2")
    assert [contender.name for contender in found] == ["pearl@4", "pearl@4+0", "pearl@4+2", "pearl@5+2"]
    configs = [EngineConfig(device="cpu", **contender.options) for contender in found]
    assert [(config.window, config.most_prepared) for config in configs] == [(4, 0), (4, 0), (4, 2), (5, 2)]


def test_a_common_window_is_for_those_that_draft_and_have_none() -> None:
    found = parse_contenders("autoregressive,speculative,pearl,pearl@2,pearl@balanced", 7)
    assert [contender.window for contender in found] == ["auto", 7, 7, 2, "auto"]


def test_the_longest_window_is_the_engine_s() -> None:
    assert EngineConfig(window=LONGEST_WINDOW).window == parse_contenders(f"pearl@{LONGEST_WINDOW}")[0].window
    with pytest.raises(ConfigurationError, match=str(LONGEST_WINDOW)):
        EngineConfig(window=LONGEST_WINDOW + 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must name methods"),
        ("magic", "'magic' is none of pearl, speculative, autoregressive"),
        ("Pearl", "'Pearl' is none of"),
        ("@4", "'' is none of"),
        ("autoregressive@3", "takes no window"),
        ("autoregressive@", "takes no window"),
        ("speculative@balanced", "'speculative@balanced': behind @"),
        *((f"pearl@{own}", f"'pearl@{own}': behind @ stand") for own in (
            "", "0", "x", "-3", "3-", "0-4", "5-3", "1-2-3", "3²", "1.5", "auto", "257", "1-257", "1-999999999",
        )),
        ("speculative@4+2", "'speculative@4+2': behind @"),
        ("pearl@+2", "'pearl@+2': behind @"),
        *((f"pearl@4+{own}", f"'pearl@4+{own}': behind + stands") for own in ("", "x", "-1", "1-2", "257")),
        ("pearl,autoregressive,pearl", "pearl is there twice, first as pearl"),
        ("pearl@1-4,pearl@3", "pearl@3 is there twice"),
        ("pearl@5,pearl", "pearl is there twice, first as pearl@5"),
    ],
)  # fmt: skip
def test_what_names_nothing_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        parse_contenders(text, 5)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
