"""The consult page over the real server and engine, with a gated draft: a tiny model, and SmolLM2 for the picture.

The picture in docs/images is made anew with ``M3_SCREENSHOT=docs/images/consult.png pytest -m slow`` on this file;
``M3_TEST_DRAFT``: a folder with a trained draft of SmolLM2.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import PIL.Image
import pytest
import torch
from browser import Browser
from engine_cases import Ask, fixed, knowing_core, make_draft, together
from letters_model import make_letters_model
from loopback import serving
from selenium.webdriver.common.keys import Keys

from m3.draft.layouts import load_draft
from m3.engine.config import EngineConfig, Shape
from m3.engine.core import Draft, EngineCore
from m3.engine.engine import AsyncEngine
from m3.engine.request import SamplingParams
from m3.environment.case import Phase
from m3.environment.stages import instruction
from m3.environment.trajectory import Message, chat
from m3.models.decoder import Decoder
from m3.models.gated_eagle3 import GatedEagle3, GatedEagle3Config
from m3.models.hub import resolve
from m3.models.loader import load_model
from m3.models.tokenizer import Tokenizer
from m3.serve.app import build
from m3.serve.engine_backend import EngineBackend

pytestmark = pytest.mark.slow
SHAPE = Shape(steps=3, topk=4, nodes=8)


def set_number(browser: Browser, field: str, value: str) -> None:
    """As a person does: by Tab, over what stands there."""
    browser.tab_to(field)
    browser.hold(Keys.CONTROL, "a")
    browser.press(value)


def idle(browser: Browser) -> bool:
    return browser.one("#send").is_displayed() and browser.one("#send").is_enabled()


# -- a tiny model -----------------------------------------------------------------------------------------------------
COMPLAINT = "My chest hurts."
TOKENS = 200


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> tuple[EngineCore, Tokenizer]:
    """A model of letters with room for the instruction; its draft is often right about the answer to COMPLAINT."""
    folder = make_letters_model(tmp_path_factory.mktemp("letters"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    model, sizes = load_model(folder), EngineConfig(num_pages=400, max_context=4096)
    said = [instruction(Phase.inquiry, 0), Message(role="user", content=COMPLAINT, turn=0, phase=Phase.inquiry)]
    prompt = Tokenizer(folder).chat(chat(said))
    (answer,) = together(EngineCore(model, sizes), [Ask(prompt, SamplingParams(max_tokens=TOKENS))])
    core = knowing_core(model, make_draft(model), sizes, fixed(SHAPE), lambda request: prompt + answer.tokens)
    return core, Tokenizer(folder)


def backend_of(letters: tuple[EngineCore, Tokenizer]) -> EngineBackend:
    return EngineBackend(AsyncEngine(*letters), "letters")


def consult(browser: Browser, tokens: int) -> None:
    """Ask by keyboard alone, greedily."""
    browser.until(lambda: idle(browser))
    set_number(browser, "#temperature", "0")
    set_number(browser, "#longest", str(tokens))
    browser.tab_to("#message")
    browser.press(COMPLAINT, Keys.ENTER)


def test_the_engine_answers_and_its_draft_is_counted(browser, letters):
    """What the page tells is what the engine counted; of its last step it may know less."""
    browser.window(1280, 800)
    backend = backend_of(letters)
    with serving(build(backend, page=True)) as url:
        browser.open(url.removesuffix("/v1"))
        browser.record("#draft")
        consult(browser, TOKENS)
        browser.until(lambda: browser.all(".figures") and browser.text(".figures"))
        stats = backend.engine.stats()
        drafted, accepted = (int(count) for count in browser.text("#draft").split(", "))
        assert stats.drafted - SHAPE.nodes < drafted <= stats.drafted
        assert stats.accepted - SHAPE.steps <= accepted <= stats.accepted
        assert 0 < accepted < drafted
        assert browser.text("#tokens") == str(stats.completion_tokens)
        counts = [int(text.split(",")[0]) for text in browser.recorded() if text[0].isdigit()]
        assert len(counts) > 2, "seen to grow"
        assert counts == sorted(counts)
        assert len(browser.run("return document.querySelector('.answer .words').textContent")) > 20
        assert browser.text("#stages [aria-current=step]") == "Inquiry"
        assert browser.one("#model").get_attribute("value") == "letters"
        assert browser.errors() == []
        browser.open("about:blank")


def test_a_key_opens_the_server_and_a_stopped_answer_ends_in_the_engine(browser, letters):
    browser.window(1280, 800)
    backend = backend_of(letters)
    with serving(build(backend, page=True, api_keys=["k"])) as url:
        browser.open(url.removesuffix("/v1"))
        browser.until(lambda: browser.one("#key-form").is_displayed())
        browser.press("k", Keys.ENTER)
        consult(browser, 3000)
        browser.until(lambda: browser.all(".answer .words p"))
        browser.press(Keys.ESCAPE)
        browser.until(lambda: idle(browser))
        browser.until(lambda: backend.engine.stats().finished == {"abort": 1})
        assert browser.text(".figures").startswith("stopped")
        browser.open("about:blank")


# -- SmolLM2, and the picture -----------------------------------------------------------------------------------------
NAME = "SmolLM2-135M-Instruct"
CONSULTATION = (
    "I have had a sore throat and a fever for two days.",
    "It hurts when I swallow. I have no cough.",
)
SEED = 1


def draft_for(target: Decoder) -> Draft:
    """A trained one where a folder is named; else one that begins as the target's last layer."""
    if folder := os.environ.get("M3_TEST_DRAFT"):
        config, tensors = load_draft(Path(folder), target.config)
        return Draft(config=config, tensors=tensors)
    config = GatedEagle3Config.for_target(target.config, draft_vocab_size=8192, gate="headwise")
    return Draft(config=config, tensors=GatedEagle3.warm_start(config, target, torch.arange(8192)).state_dict())


def save_small(png: bytes, file: Path) -> None:
    """A picture of few colours, for the repository."""
    picture = PIL.Image.open(io.BytesIO(png)).convert("RGB").quantize(128, dither=PIL.Image.Dither.NONE)
    picture.save(file, optimize=True)


def test_a_consultation_with_smollm2(browser):
    folder = resolve(NAME)
    model = load_model(folder, dtype=torch.float32)
    core = EngineCore(model, EngineConfig(num_pages=400, max_context=2048), draft=draft_for(model))
    backend = EngineBackend(AsyncEngine(core, Tokenizer(folder)), NAME)
    browser.window(1280, 800, scale=1.5)
    with serving(build(backend, page=True)) as url:
        browser.open(url.removesuffix("/v1"))
        browser.until(lambda: idle(browser))
        set_number(browser, "#temperature", "0.15")
        set_number(browser, "#longest", "80")
        set_number(browser, "#seed", str(SEED))
        browser.tab_to("#message")
        for count, text in enumerate(CONSULTATION, start=1):
            browser.press(text, Keys.ENTER)
            browser.until(lambda count=count: len(browser.all(".answer")) == count and idle(browser), 120)
        browser.one("#advance").click()
        browser.until(lambda: len(browser.all(".answer")) == 3 and idle(browser), 120)
        assert browser.text("#stages [aria-current=step]") == "Differential diagnosis"
        assert "tokens/s" in browser.all(".figures")[-1].text
        if picture := os.environ.get("M3_SCREENSHOT"):
            save_small(browser.driver.get_screenshot_as_png(), Path(picture))
        browser.open("about:blank")
