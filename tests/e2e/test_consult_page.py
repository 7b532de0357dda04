"""The consult page in a real browser: asked by keyboard, streamed, measured, stopped; nothing stored, only text."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator

import pytest
from browser import Browser
from consult_api import Script, ScriptedServer, chunk, words
from loopback import serving
from selenium.webdriver.common.keys import Keys

from m3.environment.case import Phase
from m3.environment.stages import INSTRUCTIONS, PHASES
from m3.environment.trajectory import Trajectory, chat, read_trajectories
from m3.serve.cli import DISCLAIMER

slow = pytest.mark.slow
LONG = "When did it start, and does it go anywhere else, such as an arm, the jaw or the back ?"


@pytest.fixture(scope="module")
def server(browser: Browser) -> Iterator[tuple[ScriptedServer, str]]:
    served = ScriptedServer()
    with serving(served.app) as url:
        yield served, url.removesuffix("/v1")
        browser.open("about:blank")  # leaves no connection open


@pytest.fixture
def script(server: tuple[ScriptedServer, str]) -> Script:
    server[0].script = Script(chunks=words("When did it start ?"))
    return server[0].script


@pytest.fixture
def origin(server: tuple[ScriptedServer, str], script: Script, browser: Browser) -> Iterator[str]:
    """The page is open; at the end its console is clean and it asked for nothing elsewhere."""
    browser.window(1280, 800)
    browser.open(server[1])
    yield server[1]
    assert browser.errors() == []
    asked = browser.requests()
    assert asked
    assert [one for one in asked if not one.startswith(f"{server[1]}/")] == []


def ready(browser: Browser) -> None:
    browser.until(lambda: browser.one("#send").is_enabled())


def idle(browser: Browser) -> bool:
    return browser.one("#send").is_displayed()


def tell(browser: Browser, text: str) -> None:
    """Say something and wait for the answer."""
    browser.until(lambda: idle(browser))
    browser.press(text, Keys.ENTER)
    browser.until(lambda: browser.all("article.answer") and idle(browser))


# -- a question and its answer ----------------------------------------------------------------------------------------
def test_an_answer_is_asked_for_by_keyboard_and_seen_to_grow(browser, script, origin):
    script.chunks, script.pause = words(LONG), 0.04
    ready(browser)
    browser.record(".answer .words")
    browser.press("My chest")
    browser.hold(Keys.SHIFT, Keys.ENTER)
    browser.press("hurts.", Keys.ENTER)
    browser.until(lambda: browser.text(".answer .words") == LONG)
    shown = [text for text in browser.recorded() if text]
    assert len(shown) > 3
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(shown))
    assert browser.text(".said .words") == "My chest\nhurts."
    browser.until(lambda: idle(browser))
    assert browser.text("[role=status]") == "The answer is complete."
    assert browser.box(".figures")["bottom"] <= browser.box("#log")["bottom"]
    assert browser.driver.switch_to.active_element == browser.one("#message")
    (request,) = script.requests
    assert request["messages"] == [
        {"role": "system", "content": INSTRUCTIONS[Phase.inquiry]},
        {"role": "user", "content": "My chest\nhurts."},
    ]
    assert (request["model"], request["stream"]) == ("first", True)


@slow
def test_the_disclaimer_is_always_in_sight(browser, script, origin):
    ready(browser)
    script.chunks = words("word " * 900)
    for width, height in ((1280, 800), (320, 568), (1280, 256)):
        browser.window(width, height)
        tell(browser, "Go on.")
        box = browser.box("#disclaimer")
        assert DISCLAIMER in browser.text("#disclaimer")
        assert 0 <= box["top"] < box["bottom"] <= height


@slow
def test_what_is_drafted_and_accepted_is_shown_while_it_streams(browser, script, origin):
    script.pause = 0.15
    counts = [(1, 0, 4), (4, 3, 9), (9, 7, 13)]
    script.chunks = [*(chunk("w ", usage=usage) for usage in counts), chunk(finish="stop", usage=(10, 8, 14))]
    ready(browser)
    browser.record("#tokens, #draft")
    tell(browser, "Hello")
    assert [text for text in browser.recorded() if text[0].isdigit()] == ["1|4, 0", "4|12, 3", "9|20, 7", "10|22, 8"]
    assert 10 < float(browser.text("#speed")) < 90  # 9 tokens after the first, in 2 pauses: 30, where nothing is late
    assert browser.text("#first").endswith(" s")
    assert "10 tokens" in browser.text(".figures")
    assert "22 drafted, 8 accepted" in browser.text(".figures")
    assert browser.run("return document.getElementById('share').style.getPropertyValue('--share')") == str(8 / 22)


@slow
def test_a_server_without_a_draft_is_shown_as_that(browser, script, origin):
    script.chunks = [chunk("Hello."), chunk(finish="stop", usage=(2, 0, 0))]
    ready(browser)
    tell(browser, "Hello")
    assert browser.text("#draft") == "no draft"
    assert "drafted" not in browser.text(".figures")
    assert not browser.one("#share").is_displayed()


@slow
def test_a_server_that_tells_no_usage_leaves_its_measures_open(browser, script, origin):
    ready(browser)
    tell(browser, "Hello")
    assert [browser.text(f"#{one}") for one in ("tokens", "speed", "draft")] == ["–", "–", "–"]
    assert browser.text("#first").endswith(" s")


@slow
def test_reasoning_is_kept_apart_and_not_sent_back(browser, script, origin):
    script.chunks = [chunk(reasoning_content="A heart "), chunk(reasoning_content="attack?"), *words("Since when ?")]
    ready(browser)
    tell(browser, "My chest hurts.")
    assert browser.text(".answer .words") == "Since when ?"
    assert browser.one(".reasoning").get_attribute("open") is None
    browser.one(".reasoning summary").click()
    assert browser.text(".reasoning p") == "A heart attack?"
    tell(browser, "Today.")
    assert "heart" not in json.dumps(script.requests[-1]["messages"])


# -- a model's words are text -----------------------------------------------------------------------------------------
HOSTILE = (
    '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>\n\n- <b>bold</b>\n- <a href="javascript:'
    'window.hacked=1">x</a>\n\n1. &lt;i&gt; <iframe src="https://example.com"></iframe>\n\n**<u>under</u>**'
)


def test_html_in_an_answer_is_shown_as_text(browser, script, origin):
    script.chunks = [chunk(HOSTILE, reasoning_content=HOSTILE), chunk(finish="stop")]
    ready(browser)
    tell(browser, "<b>Hello</b> <script>window.hacked=1</script>")
    wanted = HOSTILE.replace("\n\n", "").replace("\n", "").replace("- ", "").replace("1. ", "").replace("**", "")
    assert browser.run("return document.querySelector('.answer .words').textContent") == wanted
    assert browser.run("return document.querySelector('.reasoning p').textContent") == HOSTILE
    assert browser.text(".said .words").startswith("<b>Hello</b>")
    assert browser.all("article img, article script, article a, article b, article u, article iframe") == []
    assert browser.run("return window.hacked ?? null") is None


@slow
def test_the_policy_keeps_text_from_becoming_html(browser, origin):
    """Even a mistake in the page's own script could not do it."""
    refused = browser.run(
        "try { document.getElementById('log').innerHTML = '<b>x</b>'; return ''; } catch (error) { return error.name; }"
    )
    assert refused == "TypeError"
    assert "TrustedHTML" in "".join(browser.errors())


@slow
def test_paragraphs_lists_and_bold_are_drawn(browser, script, origin):
    text = "# Plan\nFirst line\nsecond line\n\n1. one\n2. **two**\n\n- a\n- b\n\nEnd"
    script.chunks = [*(chunk(letter) for letter in text), chunk(finish="stop")]
    ready(browser)
    tell(browser, "Hello")
    shown = browser.run("return document.querySelector('.answer .words').innerHTML")
    assert shown == (
        "<h3>Plan</h3><p>First line\nsecond line</p><ol><li>one</li><li><strong>two</strong></li></ol>"
        "<ul><li>a</li><li>b</li></ul><p>End</p>"
    )


# -- stages -----------------------------------------------------------------------------------------------------------
@slow
def test_the_person_moves_the_stage_and_the_transcript_is_a_trajectory(browser, script, origin):
    stage = "#stages [aria-current=step]"
    ready(browser)
    assert browser.text(stage) == "Inquiry"
    assert not browser.one("#advance").is_enabled()
    tell(browser, "My chest hurts.")
    assert "due" not in browser.one("#advance").get_attribute("class")
    script.chunks = words("I have no further questions.")
    tell(browser, "Since this morning.")
    assert browser.text(stage) == "Inquiry", "what a model says moves nothing"
    assert "due" in browser.one("#advance").get_attribute("class")
    script.chunks = words("1. Angina")
    for name in ("Differential diagnosis", "Laboratory"):
        browser.one("#advance").send_keys(Keys.ENTER)
        browser.until(lambda name=name: browser.text(stage) == name and idle(browser))
    browser.one("#advance").click()
    assert "what the examinations showed" in browser.text("#notice")
    assert browser.text(stage) == "Laboratory"
    script.chunks = words("Diagnosis: angina")
    browser.press("ECG: normal")
    browser.one("#advance").click()
    browser.until(lambda: browser.text(stage) == "Diagnosis" and idle(browser))
    assert not browser.one("#advance").is_displayed()

    said = script.requests[-1]["messages"]
    given = [message["content"] for message in said if message["role"] != "assistant"]
    assert given == [
        INSTRUCTIONS[Phase.inquiry],
        "My chest hurts.",
        "Since this morning.",
        INSTRUCTIONS[Phase.differential],
        INSTRUCTIONS[Phase.lab],
        f"Results:\nECG: normal\n\n{INSTRUCTIONS[Phase.diagnosis]}",
    ]
    shown = [one.get_attribute("textContent") for one in browser.all(".turning details p")]
    assert shown == [INSTRUCTIONS[phase] for phase in PHASES]

    browser.one("#download").click()
    file = browser.downloads / "consultation.jsonl"
    browser.until(file.exists)
    (trajectory,) = read_trajectories(file)
    file.unlink()
    assert isinstance(trajectory, Trajectory)
    assert chat(trajectory.messages[:-1]) == said
    assert [message.phase for message in trajectory.of("assistant")] == [PHASES[0], *PHASES]
    assert (trajectory.policy, trajectory.mode, trajectory.turns) == ("first", "recorded", 5)
    assert trajectory.seed == script.requests[0]["seed"]
    assert DISCLAIMER in trajectory.meta["disclaimer"]


@slow
def test_a_new_consultation_knows_nothing_of_the_last(browser, script, origin):
    ready(browser)
    tell(browser, "My chest hurts.")
    browser.one("#new").click()
    browser.driver.switch_to.alert.dismiss()
    assert browser.all("article.answer")
    browser.one("#new").click()
    browser.driver.switch_to.alert.accept()
    assert browser.all("article.answer") == []
    tell(browser, "My knee hurts.")
    first, second = script.requests
    assert [message["content"] for message in second["messages"]] == [INSTRUCTIONS[Phase.inquiry], "My knee hurts."]
    assert first["seed"] != second["seed"]


@slow
def test_the_transcript_is_copied(browser, script, origin):
    allowed = {"origin": origin, "permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    browser.driver.execute_cdp_cmd("Browser.grantPermissions", allowed)
    ready(browser)
    tell(browser, "My chest hurts.")
    browser.one("#copy").click()
    browser.until(lambda: browser.text("[role=status]") == "The transcript is copied.")
    copied = browser.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
    assert Trajectory.from_json(json.loads(copied)).messages[1].content == "My chest hurts."


# -- stopping, errors, keys -------------------------------------------------------------------------------------------
@slow
@pytest.mark.parametrize("how", ["escape", "button"])
def test_stopping_keeps_what_was_said_and_tells_the_server(browser, script, origin, how):
    script.chunks, script.hangs = [chunk("When did")], True
    ready(browser)
    browser.press("Hello", Keys.ENTER)
    browser.until(lambda: browser.all(".answer .words p"))
    if how == "escape":
        browser.press(Keys.ESCAPE)
    else:
        browser.one("#stop").click()
    browser.until(lambda: idle(browser))
    assert script.closed.wait(5)
    assert browser.text(".answer .words") == "When did"
    assert browser.text(".figures").startswith("stopped")
    assert browser.text("#notice") == ""
    script.hangs = False
    tell(browser, "Go on.")
    assert [row["content"] for row in script.requests[-1]["messages"][1:]] == ["Hello", "When did", "Go on."]


@slow
def test_stopping_before_a_word_gives_the_message_back(browser, script, origin):
    script.chunks, script.hangs = [], True
    ready(browser)
    browser.press("Hello", Keys.ENTER)
    browser.until(lambda: script.requests)
    browser.press(Keys.ESCAPE)
    browser.until(lambda: idle(browser))
    assert browser.one("#message").get_attribute("value") == "Hello"
    assert browser.all("article") == []
    assert browser.one("#intro").is_displayed()


@slow
def test_an_error_under_way_is_told_and_what_was_said_stays(browser, script, origin):
    script.chunks = [chunk("When did"), {"error": {"message": "the time of a request is over"}}]
    ready(browser)
    tell(browser, "Hello")
    assert browser.text("#notice") == "the time of a request is over"
    assert browser.text(".answer .words") == "When did"
    assert browser.text(".figures").startswith("broken off")


@slow
def test_a_server_that_refuses_is_told_and_the_message_is_back(browser, script, origin):
    ready(browser)
    script.status = 503
    browser.press("Hello", Keys.ENTER)
    browser.until(lambda: browser.text("#notice") == "refused with 503")
    assert browser.one("#message").get_attribute("value") == "Hello"
    assert browser.all("article") == []
    assert all("503" in error for error in browser.errors())


@slow
def test_a_key_is_asked_for_where_the_server_wants_one_and_kept_nowhere(browser, script, origin):
    ready(browser)
    assert not browser.one("#key-form").is_displayed()
    browser.tab_to("#model")
    browser.press("s")
    browser.tab_to("#message")
    script.key = "sk-1"
    browser.press("Hello", Keys.ENTER)
    browser.until(lambda: browser.one("#key-form").is_displayed())
    browser.press("wrong", Keys.ENTER)
    browser.until(lambda: browser.text("#notice") == "The server refuses this API key.")
    browser.press("sk-1", Keys.ENTER)
    browser.until(lambda: not browser.one("#key-form").is_displayed())
    tell(browser, "")
    assert script.keys[-1] == "Bearer sk-1"
    assert script.requests[-1]["model"] == "second", "what was chosen stays"
    assert browser.text(".said .words") == "Hello"
    kept = "return [localStorage.length, sessionStorage.length, document.cookie, document.getElementById('key').value]"
    assert browser.run(kept) == [0, 0, "", ""]
    assert browser.run("return indexedDB.databases().then((found) => found.length)") == 0
    assert all("401" in error for error in browser.errors())


# -- windows and people -----------------------------------------------------------------------------------------------
@slow
def test_a_narrow_window_needs_no_horizontal_scroll(browser, script, origin):
    script.chunks = [chunk("x" * 400 + "\n\n1. " + "y" * 300), chunk(finish="stop", usage=(123, 45, 678))]
    browser.window(320, 568)
    browser.open(origin)
    ready(browser)
    tell(browser, "z" * 200)
    browser.one("#more summary").click()
    wide = "return [document.documentElement, document.getElementById('log')].map((e) => e.scrollWidth - e.clientWidth)"
    assert browser.run(wide) == [0, 0]
    for name in ("#send", "#advance", "#message", "#new", "#disclaimer"):
        box = browser.box(name)
        assert 0 <= box["left"] < box["right"] <= 320, name


@slow
def test_every_control_has_a_name_and_is_reached_by_tab(browser, script, origin):
    ready(browser)
    tell(browser, "Hello")
    controls = [one for one in browser.all("button, input, select, textarea, summary") if one.is_displayed()]
    assert len(controls) > 8
    assert [one.get_attribute("id") for one in controls if not one.accessible_name] == []
    for name in ("#advance", "#model", "#temperature", "#copy", "#download", "#new", "#message", "#log"):
        browser.tab_to(name)
        assert browser.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid", name


@slow
def test_the_first_link_skips_to_the_message(browser, origin):
    ready(browser)
    browser.tab_to(".skip")
    browser.press(Keys.ENTER)
    assert browser.driver.switch_to.active_element == browser.one("#message")
