"""The page in a browser: both decoders show what the API says, at any width, and the replay shows earlier states."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.messages import Chunk, GenerateRequest
from serving.replica import Replica
from tests.browser import CHROMIUM, DESKTOP, PHONE, chromium
from tests.serving.running import Server, local_app, model_entry, save_tiny_model, serving_on_a_port

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

OPTIONS = {"window": 8, "max_rows": 4, "max_tokens": 160, "block_tokens": 8}
PROMPT, TOKENS = "How many singers?", 60


@pytest.fixture(scope="module")
def pair(model_folder: Path) -> Iterator[Server]:
    """One model, decoded in both ways."""
    replicas = {
        name: Replica(name, model_entry(model_folder, options=OPTIONS | {"window": window}))
        for name, window in (("ar", 1), ("jacobi", 8))
    }
    with serving_on_a_port(local_app(replicas)) as server:
        yield server
    for replica in replicas.values():
        replica.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    profile = tmp_path_factory.mktemp("profile")
    with playwright.sync_playwright() as library, chromium(library, profile) as context:
        yield context


@pytest.fixture
def complaints() -> list[str]:
    """What the browser wrote to its console as an error."""
    return []


@pytest.fixture
def page(browser: Any, pair: Server, complaints: list[str]) -> Iterator[Any]:
    opened = browser.new_page()
    opened.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.goto(pair.url)
    yield opened
    opened.close()


def ask(page: Any, prompt: str = PROMPT, tokens: int = TOKENS) -> None:
    """Type a prompt, and wait until both have answered."""
    page.fill("#max-tokens", str(tokens))
    page.type("#prompt", prompt)
    page.press("#prompt", "Enter")
    page.wait_for_selector('#race[data-state="done"]')


def show_pass(page: Any, number: int) -> None:
    page.evaluate(f"const p = document.querySelector('#pass'); p.value = {number}; p.dispatchEvent(new Event('input'))")


def figure(page: Any, lane: str, name: str) -> float:
    return float(page.inner_text(f'[data-lane="{lane}"] [data-figure="{name}"]'))


def text(page: Any, lane: str) -> str:
    return str(page.inner_text(f'[data-lane="{lane}"] .committed'))


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_both_decoders_show_the_apis_text(page: Any, pair: Server, complaints: list[str], size: dict[str, int]) -> None:
    page.set_viewport_size(size)
    ask(page)
    body = {"model": "ar", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": TOKENS, "temperature": 0}
    answer = httpx.post(f"{pair.url}/v1/chat/completions", json=body).json()
    expected, count = answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"]
    shown = page.text_content('[data-lane="ar"] .committed')
    assert shown == page.text_content('[data-lane="jacobi"] .committed') == expected
    assert page.text_content(".message.assistant") == expected
    assert figure(page, "ar", "tokens") == figure(page, "jacobi", "tokens") == figure(page, "ar", "passes") == count
    assert figure(page, "jacobi", "passes") < count
    assert page.inner_text("#verdict").startswith("The same text in ")
    assert complaints == []


def test_the_first_sight_is_an_example_that_goes_when_somebody_asks(page: Any, complaints: list[str]) -> None:
    page.wait_for_selector("#example-prompt:not(:empty)")
    assert text(page, "ar") == text(page, "jacobi") != ""
    assert figure(page, "jacobi", "tokens") == figure(page, "ar", "tokens") == figure(page, "ar", "passes")
    assert figure(page, "jacobi", "passes") < figure(page, "ar", "passes") / 2
    show_pass(page, 2)
    guessed = page.locator('[data-lane="jacobi"] .guess').all_inner_texts()
    assert len(guessed) > 5
    assert page.locator('[data-lane="ar"] .guess').count() == 0
    assert not page.is_visible("#key")  # this server asks for none
    ask(page)
    assert not page.is_visible("#example")
    assert text(page, "jacobi") == page.text_content(".message.assistant")
    assert complaints == []


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_everything_fits_the_width(page: Any, size: dict[str, int]) -> None:
    page.set_viewport_size(size)
    ask(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    for name in ("#send", "#prompt", "#play", '[data-lane="ar"] dl', '[data-lane="jacobi"] pre', "#verdict"):
        box = page.locator(name).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= size["width"]


def test_a_step_has_one_colour_and_one_cell(page: Any) -> None:
    ask(page)
    for lane in ("ar", "jacobi"):
        passes = figure(page, lane, "passes")
        assert page.locator(f'[data-lane="{lane}"] .step').count() == passes
        assert page.locator(f'[data-lane="{lane}"] .strip i').count() == passes
    assert page.locator('[data-lane="ar"] .step:not(.a1)').count() == 0
    assert page.locator('[data-lane="jacobi"] .step:not(.a1)').count() > 0


def test_the_slider_shows_earlier_passes(page: Any) -> None:
    ask(page)
    whole = text(page, "ar")
    show_pass(page, 5)
    assert figure(page, "ar", "passes") == figure(page, "jacobi", "passes") == 5
    assert figure(page, "ar", "tokens") == 5 <= figure(page, "jacobi", "tokens")
    assert len(text(page, "ar")) < len(whole)
    assert whole.startswith(text(page, "ar"))
    page.click("#play")
    assert page.inner_text("#play") == "Pause"
    page.wait_for_selector("#play:text-is('Replay')")
    assert text(page, "ar") == whole
    assert figure(page, "ar", "passes") == figure(page, "ar", "tokens")


class Unhurried:
    """A replica whose chunks come slowly enough for somebody to press a button."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        async with aclosing(self.replica.generate(request)) as chunks:
            async for chunk in chunks:
                yield chunk
                await asyncio.sleep(0.1)


def test_live_guesses_are_shown_and_replayed(page: Any, complaints: list[str]) -> None:
    guesses = page.locator('[data-lane="jacobi"] .guess')
    page.evaluate(
        """() => {
            window.seen = 0;
            const lane = document.querySelector('[data-lane="jacobi"] .guesses');
            new MutationObserver(() => { window.seen = Math.max(window.seen, lane.children.length); })
                .observe(lane, { childList: true });
        }"""
    )
    ask(page)
    assert page.evaluate("window.seen") == OPTIONS["window"] - 1  # a step that commits one token leaves so many
    assert guesses.count() == 0  # nothing is guessed behind the end
    assert page.is_visible("#guess-legend")
    settled = 0
    for passes in range(1, int(figure(page, "jacobi", "passes"))):
        show_pass(page, passes)
        step = page.locator('[data-lane="jacobi"] .step:not([hidden])').last
        assert guesses.count() == OPTIONS["window"] - int(step.get_attribute("title").split()[0])
        settled += page.locator('[data-lane="jacobi"] .guess.settled').count()
    assert settled > 0
    assert page.locator('[data-lane="ar"] .guess').count() == 0
    assert complaints == []


def test_stopping_keeps_what_came(browser: Any, replica: Replica) -> None:
    with serving_on_a_port(local_app({"slow": Unhurried(replica)})) as server:
        page = browser.new_page()
        page.goto(server.url)
        page.fill("#max-tokens", "100")
        page.fill("#prompt", PROMPT)
        page.click("#send")
        page.wait_for_selector('[data-lane="ar"] .step >> nth=2')
        page.click("#stop")
        page.wait_for_selector('#race[data-state="done"]')
        assert 3 <= figure(page, "ar", "tokens") < 100
        assert text(page, "ar") != ""
        assert page.inner_text("#verdict") == page.inner_text("#problem") == ""
        page.close()


def test_a_refusal_is_shown_and_the_next_prompt_is_fine(page: Any) -> None:
    ask(page, tokens=5000)
    assert "max_tokens" in page.inner_text("#problem")
    assert page.locator(".message").count() == 1  # the prompt; there is no answer
    ask(page)
    assert page.inner_text("#problem") == ""
    assert figure(page, "ar", "tokens") > 0


def test_a_model_without_chat_template_continues_the_text(browser: Any, tmp_path: Path) -> None:
    replica = Replica("plain", model_entry(save_tiny_model(tmp_path, template=None), options=OPTIONS))
    with serving_on_a_port(local_app({"plain": replica})) as server:
        page = browser.new_page()
        page.goto(server.url)
        ask(page)
        body = {"model": "plain", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
        expected = httpx.post(f"{server.url}/v1/completions", json=body).json()["choices"][0]["text"]
        assert page.text_content('[data-lane="jacobi"] .committed') == expected
        page.close()
    replica.close()
