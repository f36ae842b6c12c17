"""The page in a browser, around a fake engine. Skipped where there is no Chromium; CI installs none."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fake_engine import FakeEngine, FakeStream, chunk
from serving_support import listening, live_server, settings, wait_until

from pearl import LLM
from pearl.outputs import RequestMetrics, StreamChunk
from pearl.serving.app import create_app
from pearl.serving.sampling import SamplingDefaults

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt install chromium)")
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Of a server with the bundled pair."""
    with live_server(window=3, prepared_windows=3) as server:
        yield server.url


@contextmanager
def opened(browser: Any, engine: FakeEngine, width: int = 1280, **server: Any) -> Iterator[Any]:
    """The page, loaded; at the end it has made no error of its own."""
    app = create_app(engine, settings(**server), SamplingDefaults.of_openai())  # type: ignore[arg-type]
    with listening(app) as url, visited(browser, url, width) as page:
        yield page


@contextmanager
def visited(browser: Any, url: str, width: int = 1280) -> Iterator[Any]:
    faults: list[str] = []
    context = browser.new_context(viewport={"width": width, "height": 800})
    page = context.new_page()
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda said: faults.append(said.text) if "Content Security Policy" in said.text else None)
    page.on("request", lambda sent: None if sent.url.startswith(url) else faults.append(sent.url))
    page.goto(url)
    yield page
    context.close()
    assert faults == []


def shows(page: Any, selector: str, words: str) -> None:
    playwright.expect(page.locator(selector)).to_contain_text(words, timeout=30_000)


def test_a_completion_by_keyboard_alone(browser: Any, idle_llm: LLM) -> None:
    engine = FakeEngine(idle_llm, chunk("one "), chunk(HOSTILE), chunk(" three", "length"))
    with opened(browser, engine) as page:
        shows(page, "#served", "pair")
        page.focus("#prompt")
        page.keyboard.press("Control+A")
        page.keyboard.type("say")
        page.keyboard.press("Tab")
        page.keyboard.type("0.5")
        page.keyboard.press("Control+Enter")
        shows(page, "#state", "Finished: the limit of tokens is reached.")
        assert page.inner_text("#transcript") == f"sayone {HOSTILE} three"
        assert page.title() == "PEARL"
        assert page.locator("#transcript img").count() == 0
        assert page.locator("#transcript .token.draft").count() >= 3
        assert [page.inner_text(name) for name in ("#drafted", "#own", "#tokens")] == ["3", "0", "3"]
        assert [page.inner_text(f"#count-{name}") for name in ("pre-verify", "post-verify", "corrected")] == [
            "3",
            "0",
            "0",
        ]
        assert page.is_hidden("#timeline-figure")  # nobody told of rounds
        assert page.inner_text("#rounds") == "0"  # of the fake's metrics
    ((_, params),) = engine.asked
    assert (params.temperature, params.max_tokens) == (0.5, 128)


@pytest.mark.parametrize("way", ["click", "Escape"])
def test_stopping_ends_it_on_the_server_too(browser: Any, idle_llm: LLM, way: str) -> None:
    engine = FakeEngine(idle_llm, chunk("begun"), endless=True)
    with opened(browser, engine) as page:
        page.click("#generate")
        shows(page, "#transcript", "begun")
        assert not engine.streams[0].cancelled
        page.click("#stop") if way == "click" else page.keyboard.press(way)
        shows(page, "#state", "Stopped")
        wait_until(lambda: engine.streams[0].cancelled)
        assert page.is_enabled("#generate")
        assert page.is_hidden("#problem")


def test_a_conversation_goes_on(browser: Any, idle_llm: LLM) -> None:
    engine = FakeEngine(idle_llm, chunk("well", "stop"))
    with opened(browser, engine) as page:
        page.check("input[value=chat]")
        for question in ("how?", "why?"):
            page.fill("#prompt", question)
            page.click("#generate")
            shows(page, "#state", "Finished")
            page.wait_for_selector("#generate:enabled")
        assert [turn.inner_text() for turn in page.locator("#transcript .turn").all()] == [
            "how?",
            "well",
            "why?",
            "well",
        ]
        page.click("#renew")
        assert page.locator("#transcript .turn").count() == 0
    messages = [{"role": "user", "content": "how?"}, {"role": "assistant", "content": "well"}]
    messages.append({"role": "user", "content": "why?"})
    rendered = [idle_llm.tokenizer.render_chat(part, {}) for part in (messages[:1], messages)]
    assert [list(ids) for ids, _ in engine.asked] == rendered


def test_a_key_is_asked_for_and_kept_in_the_tab(browser: Any, idle_llm: LLM) -> None:
    engine = FakeEngine(idle_llm, chunk("open", "stop"))
    with opened(browser, engine, api_key="s3cret") as page:
        shows(page, "#problem", "API key")
        assert page.evaluate("() => document.activeElement.id") == "key"
        page.keyboard.type("s3cret")
        page.keyboard.press("Control+Enter")
        shows(page, "#transcript", "open")
        page.focus("#prompt")  # leaves the key's field
        shows(page, "#served", "pair")
        page.reload()
        shows(page, "#served", "pair")
        assert page.evaluate("() => localStorage.length") == 0


def counted(page: Any, *names: str) -> int:
    return sum(int(page.inner_text(f"#count-{name}")) for name in names)


def steps(page: Any, kind: str) -> int:
    """Tokens that bars of the timeline stand for."""
    bars = f"[...document.querySelectorAll('#timeline {kind}')]"
    return int(page.evaluate(f"() => {bars}.reduce((sum, bar) => sum + Number(bar.dataset.tokens), 0)"))


def test_the_rounds_of_both_models_are_drawn(browser: Any, url: str) -> None:
    with visited(browser, url) as page:
        page.fill("#temperature", "0")
        page.fill("#max_tokens", "150")
        page.click("#generate")
        shows(page, "#state", "Finished")
        drafted = counted(page, "pre-verify", "post-verify", "prepared")
        own = counted(page, "corrected", "plain")
        assert (str(drafted), str(own)) == (page.inner_text("#drafted"), page.inner_text("#own"))
        assert drafted + own == 150
        assert counted(page, "prepared") > 0
        summary = page.inner_text("#timeline-summary")
        rounds, total, kept, lost, windows, hits, ahead = (
            int(found)
            for found in re.match(
                r"(\d+) rounds in \d+ ms; .* (\d+) tokens drafted: (\d+) became output, (\d+) thrown away; "
                r"(\d+) windows prepared: (\d+) came true and gave (\d+) tokens\.",
                summary,
            ).groups()  # type: ignore[union-attr]
        )
        assert page.locator("#timeline g.round").count() == rounds
        assert total == kept + lost
        # What is accepted behind the output's end is no output; each hollow or solid step is a drafted token.
        assert drafted <= kept + ahead <= drafted + 3
        assert (steps(page, ".draft-bar.solid"), steps(page, ".draft-bar.hollow")) == (kept, lost)
        assert 0 < hits <= windows
        assert steps(page, ".prepared-bar.solid") >= ahead >= hits - 1
        assert page.locator("#timeline .target-bar").count() > 20
        marks = page.locator("#timeline .accepted-mark").count(), page.locator("#timeline .own-mark").count()
        assert 150 <= sum(marks) <= 153
        page.focus("#timeline")
        page.keyboard.press("End")
        page.keyboard.press("ArrowRight")  # it can be scrolled without a mouse


@pytest.mark.parametrize("chat", [False, True])
def test_a_race_by_keyboard(browser: Any, url: str, chat: bool) -> None:
    with visited(browser, url) as page:
        page.check(f"input[value={'chat' if chat else 'completion'}]")
        page.fill("#prompt", "import os")
        page.fill("#temperature", "0")
        page.fill("#max_tokens", "40")
        page.focus("#start-race")
        page.keyboard.press("Enter")
        shows(page, "#result", "Same tokens: yes.")
        shows(page, "#result", "times the speed of without")
        texts = [
            page.evaluate(f"() => document.getElementById('race-{lane}').textContent") for lane in ("drafting", "plain")
        ]
        assert texts[0] == texts[1] != ""
        assert page.locator("#race-plain .token:not(.plain)").count() == 0
        assert page.locator("#race-drafting .token.draft").count() > 0
        assert page.input_value("#prompt") == "import os"
        shows(page, "#state", "Figures and rounds are those with drafting")
        assert int(page.inner_text("#drafted")) > 0
        page.click("#generate")
        shows(page, "#state", "Finished: the limit")
        assert page.is_hidden("#race")
        assert page.locator(".later").count() == 0
        assert page.locator("#transcript .turn").count() == (2 if chat else 1)


def test_a_replay_shows_tokens_when_they_came(browser: Any, url: str) -> None:
    with visited(browser, url) as page:
        page.fill("#temperature", "0")
        page.click("#start-race")
        shows(page, "#replay-speed", "times slower")
        assert page.locator("#race-plain .later").count() > 0
        playwright.expect(page.locator("#replay-speed")).to_be_empty(timeout=30_000)
        assert page.locator(".later").count() == 0
        for lane in ("drafting", "plain"):
            assert page.inner_text(f"#race-{lane}-speed").startswith("128 tokens, ")
            assert page.evaluate(f"() => document.getElementById('race-{lane}-bar').value") == 128


def test_who_wants_no_motion_gets_none(browser: Any, url: str) -> None:
    with visited(browser, url) as page:
        page.emulate_media(reduced_motion="reduce")
        page.fill("#temperature", "0")
        page.click("#start-race")
        shows(page, "#result", "Same tokens: yes.")
        assert page.inner_text("#replay-speed") == ""
        assert page.locator(".later").count() == 0
        page.click("#replay")
        shows(page, "#replay-speed", "times slower")


def test_answers_that_differ_are_said_to(browser: Any, idle_llm: LLM) -> None:
    engine = FakeEngine(idle_llm, chunk("one", "length"))
    with opened(browser, engine) as page:
        page.fill("#temperature", "0")
        show_race(page)
        submit = engine.submit
        engine.submit = lambda ids, params, **_: submit(ids, params) if params.draft else other(engine, ids, params)  # type: ignore[method-assign]
        page.click("#start-race")
        shows(page, "#result", "Same tokens: no, they part after 0.")
    (first, second) = [params for _, params in engine.asked]
    assert (first.draft, second.draft) == (True, False)
    assert first.seed == second.seed is not None


def show_race(page: Any) -> None:
    """Where there is no draft there is nothing to race, and no button."""
    assert page.is_hidden("#start-race")
    page.evaluate("() => { document.getElementById('start-race').hidden = false; }")


def other(engine: FakeEngine, ids: Any, params: Any) -> Any:
    engine.asked.append((ids, params))
    return FakeStream([StreamChunk(0, "two", (2,), (False,), "length", RequestMetrics(), sources=("plain",))], False)


def test_a_race_can_be_stopped(browser: Any, idle_llm: LLM) -> None:
    engine = FakeEngine(idle_llm, chunk("begun"), endless=True)
    with opened(browser, engine) as page:
        show_race(page)
        page.click("#start-race")
        shows(page, "#race-drafting", "begun")
        page.keyboard.press("Escape")
        shows(page, "#state", "Stopped")
        wait_until(lambda: engine.streams[0].cancelled)
        assert page.is_enabled("#start-race")
        assert page.is_hidden("#replay")
    assert len(engine.asked) == 1


def test_errors_are_said_in_the_servers_words(browser: Any, idle_llm: LLM) -> None:
    engine = FakeEngine(idle_llm, chunk("half"), chunk("", "abort", "the device is gone"))
    with opened(browser, engine) as page:
        page.fill("#top_p", "0")
        page.click("#generate")
        shows(page, "#problem", "top_p")
        page.fill("#top_p", "")
        page.click("#generate")
        shows(page, "#problem", "the device is gone")
        shows(page, "#transcript", "half")
        shows(page, "#state", "Failed")


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_of_a_race_is_wider_than_the_screen(browser: Any, url: str, width: int) -> None:
    with visited(browser, url, width) as page:
        page.click("#start-race")
        shows(page, "#result", "ame tokens")
        assert page.is_visible("#timeline-figure")
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_is_wider_than_the_screen(browser: Any, idle_llm: LLM, width: int) -> None:
    engine = FakeEngine(idle_llm, chunk("long" * 200), chunk("end", "stop"))
    with opened(browser, engine, width) as page:
        page.click("#generate")
        shows(page, "#state", "Finished")
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width
        unnamed = "() => [...document.querySelectorAll('input, textarea')].filter(node => !node.labels.length).length"
        assert page.evaluate(unnamed) == 0
