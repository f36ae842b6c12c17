"""The page in a browser, around a fake engine. Skipped where there is no Chromium; CI installs none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fake_engine import FakeEngine, chunk
from serving_support import listening, settings, wait_until

from pearl import LLM
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


@contextmanager
def opened(browser: Any, engine: FakeEngine, width: int = 1280, **server: Any) -> Iterator[Any]:
    """The page, loaded; at the end it has made no error of its own."""
    faults: list[str] = []
    app = create_app(engine, settings(**server), SamplingDefaults.of_openai())  # type: ignore[arg-type]
    with listening(app) as url:
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
    playwright.expect(page.locator(selector)).to_contain_text(words)


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
        assert page.locator("#strip .round").count() == 3
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
        assert [turn.inner_text() for turn in page.locator(".turn").all()] == ["how?", "well", "why?", "well"]
        page.click("#renew")
        assert page.locator(".turn").count() == 0
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


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_is_wider_than_the_screen(browser: Any, idle_llm: LLM, width: int) -> None:
    engine = FakeEngine(idle_llm, chunk("long" * 200), chunk("end", "stop"))
    with opened(browser, engine, width) as page:
        page.click("#generate")
        shows(page, "#state", "Finished")
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width
        unnamed = "() => [...document.querySelectorAll('input, textarea')].filter(node => !node.labels.length).length"
        assert page.evaluate(unnamed) == 0
