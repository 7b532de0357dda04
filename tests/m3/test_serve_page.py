"""The consult page without a browser: what is served, under which policy, and that its files agree."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from m3.environment.asking import says_enough
from m3.environment.case import Phase
from m3.environment.stages import INSTRUCTIONS, PHASES
from m3.serve.cli import DISCLAIMER
from m3.serve.page import CLOSING, FILES, FOLDER, router

HTML, CSS, SCRIPT = (
    (FOLDER / name).read_text(encoding="utf-8") for name in ("index.html", "consult.css", "consult.js")
)
PATHS = [*FILES, "/consult/stages.json"]


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    app = FastAPI()
    app.include_router(router())
    with TestClient(app) as client:
        yield client


class Elements(HTMLParser):
    """Tags and attributes of a page, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def elements() -> Elements:
    parser = Elements()
    parser.feed(HTML)
    return parser


# -- what is served ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", PATHS)
def test_every_file_comes_with_the_policy(client, path):
    got = client.get(path)
    assert got.status_code == 200
    assert got.content == (
        (FOLDER / FILES[path][0]).read_bytes() if path in FILES else client.get("/consult/stages.json").content
    )
    policy = dict(rule.split(" ", 1) for rule in got.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in got.headers["content-security-policy"]
    assert got.headers["x-content-type-options"] == "nosniff"
    assert got.headers["referrer-policy"] == "no-referrer"
    assert got.headers["cache-control"] == "no-cache"


def test_types_are_told(client):
    types = [client.get(path).headers["content-type"] for path in PATHS]
    assert types == [
        "text/html; charset=utf-8",
        "text/css; charset=utf-8",
        "text/javascript; charset=utf-8",
        "image/svg+xml",
        "application/json",
    ]


@pytest.mark.parametrize("path", PATHS)
def test_what_is_known_is_not_sent_again(client, path):
    etag = client.get(path).headers["etag"]
    for known in (etag, f"W/{etag}", f'"other", {etag}'):
        again = client.get(path, headers={"if-none-match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
    assert client.get(path, headers={"if-none-match": '"other"'}).status_code == 200
    head = client.head(path)
    assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", etag)


@pytest.mark.parametrize(
    "path",
    [
        "/consult/",
        "/consult",
        "/consult/index.html",
        "/consult/page.py",
        "/consult/../page.py",
        "/consult/..%2fpage.py",
        "/consult/%2e%2e/%2e%2e/serve/page.py",
        "/consult/....//page.py",
        "/consult//etc/passwd",
        "/consult/consult.js/",
        "/consult/consult.js%00.html",
        "/../consult.js",
        "//consult/consult.js",
    ],
)
def test_nothing_else_can_be_asked_for(client, path):
    """Not one byte of a file: the path as it is, without the client's tidying."""
    got = client.request("GET", f"http://testserver{path}", follow_redirects=False)
    assert got.status_code in (307, 404)
    assert len(got.content) < 100


def test_only_reading_is_allowed(client):
    assert [client.request(method, "/").status_code for method in ("POST", "PUT", "DELETE")] == [405, 405, 405]


def test_the_page_is_not_part_of_the_api(client):
    assert client.get("/openapi.json").json()["paths"] == {}


# -- stages -----------------------------------------------------------------------------------------------------------
def test_stages_are_those_of_the_pipeline(client, elements):
    told = client.get("/consult/stages.json").json()
    assert [(row["phase"], row["instruction"]) for row in told["stages"]] == [*INSTRUCTIONS.items()]
    assert [attributes["data-phase"] for tag, attributes in elements.found if "data-phase" in attributes] == [*PHASES]


def test_closing_words_are_those_of_the_instruction():
    assert CLOSING in INSTRUCTIONS[Phase.inquiry]
    assert says_enough(f"I have {CLOSING}.")


# -- the files agree --------------------------------------------------------------------------------------------------
def test_ids_that_the_script_asks_for_exist_once(elements):
    present = [str(attributes["id"]) for _, attributes in elements.found if "id" in attributes]
    wanted = set(re.findall(r'\bat\("([^"]+)"\)', SCRIPT))
    assert len(wanted) > 15
    assert wanted <= set(present)
    assert len(present) == len(set(present))
    styled = set(re.findall(r"#([a-z][\w-]*)", re.sub(r"\{[^}]*\}", "", CSS)))
    assert styled <= set(present)


def test_nothing_points_elsewhere(elements):
    """Neither the page, nor its style, nor its script names another origin; no script or style stands in the page."""
    for text in (HTML, CSS, SCRIPT):
        assert (
            re.findall(r"(?:https?:)?//[\w.]+\.\w+|@import|url\(", text.replace("http://www.w3.org/2000/svg", "")) == []
        )
    links = [attributes[key] for _, attributes in elements.found for key in ("src", "href") if key in attributes]
    assert sorted(str(link) for link in links) == [
        "#message",
        "consult/consult.css",
        "consult/consult.js",
        "consult/icon.svg",
    ]
    assert not [key for _, attributes in elements.found for key in attributes if key.startswith("on") or key == "style"]
    assert not [
        tag for tag, attributes in elements.found if tag == "style" or (tag == "script" and "src" not in attributes)
    ]


def test_the_script_makes_no_markup_and_keeps_nothing():
    forbidden = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|localStorage|sessionStorage"
    )
    assert re.findall(rf"{forbidden}|indexedDB|document\.cookie|serviceWorker", SCRIPT) == []


def test_paths_that_the_script_asks_for_are_those_of_the_api():
    assert set(re.findall(r'call\("([^"]+)"', SCRIPT)) == {
        "consult/stages.json",
        "v1/models",
        "v1/chat/completions",
    }


def test_the_disclaimer_is_that_of_the_command(elements):
    assert DISCLAIMER in " ".join(elements.text.split())


def test_every_control_has_a_label(elements):
    labelled = {attributes.get("for") for tag, attributes in elements.found if tag == "label"}
    controls = {attributes["id"] for tag, attributes in elements.found if tag in ("input", "select", "textarea")}
    assert controls == labelled


def test_the_files_are_small():
    """Compressed, all that a first visit loads."""
    assert sum(len(zlib.compress(path.read_bytes())) for path in FOLDER.iterdir()) < 16_000


# -- colours ----------------------------------------------------------------------------------------------------------
def schemes() -> list[dict[str, str]]:
    """The variables of the light and of the dark scheme."""
    found = [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{(.*?)\}", CSS, re.S)
    ]
    assert len(found) == 2
    return found


def luminance(colour: str) -> float:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


PAIRS = [(ink, ground) for ink in ("ink", "soft", "accent", "alarm") for ground in ("ground", "panel")]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize(("ink", "ground"), [*PAIRS, ("on-accent", "accent"), ("caution", "caution-tint")])
def test_text_has_the_contrast_that_wcag_wants(scheme, ink, ground):
    """4.5 : 1, WCAG 2.2, 1.4.3."""
    colours = schemes()[scheme]
    dark, light = sorted(luminance(colours[name]) for name in (ink, ground))
    assert (light + 0.05) / (dark + 0.05) >= 4.5
