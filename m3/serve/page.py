"""The consult page of `m3 serve`: a person consults the model, stage by stage, at ``/``.

Four files of the package (page/) and ``/consult/stages.json``, the instructions of m3.environment.stages, so that the
page asks for a stage with the words that the pipeline asks with. The page talks to /v1/chat/completions and /v1/models
of its own origin; the policy that it is served with lets it do nothing else.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from fastapi import APIRouter, Request, Response

from m3.environment.stages import INSTRUCTIONS, PHASES

FOLDER = Path(__file__).parent / "page"
CLOSING = "no further questions"  # of the inquiry's instruction: where the physician says so, the page offers to go on
FILES = {  # path: (file, type); nothing else of the disk can be asked for
    "/": ("index.html", "text/html; charset=utf-8"),
    "/consult/consult.css": ("consult.css", "text/css; charset=utf-8"),
    "/consult/consult.js": ("consult.js", "text/javascript; charset=utf-8"),
    "/consult/icon.svg": ("icon.svg", "image/svg+xml"),
}
# A model's words are text: no script but the page's own runs, and no text becomes HTML (trusted types).
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",  # kept, and asked for again: answered 304 while it is the same
}


def stages() -> bytes:
    """``{"closing", "stages": [{"phase", "instruction"}, ...]}`` as JSON, stages in order."""
    rows = [{"phase": str(phase), "instruction": INSTRUCTIONS[phase]} for phase in PHASES]
    return json.dumps({"closing": CLOSING, "stages": rows}, ensure_ascii=False).encode()


def router() -> APIRouter:
    """Routes of the page, GET and HEAD; not in the OpenAPI schema. Files are read once, here.

    Raises:
        OSError: the package lacks one of its files.
    """
    pages = APIRouter(include_in_schema=False)
    for path, (name, kind) in FILES.items():
        _add(pages, path, (FOLDER / name).read_bytes(), kind)
    _add(pages, "/consult/stages.json", stages(), "application/json")
    return pages


def _add(pages: APIRouter, path: str, body: bytes, kind: str) -> None:
    etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {**HEADERS, "etag": etag}

    async def answer(request: Request) -> Response:
        known = request.headers.get("if-none-match", "")
        if etag in (tag.strip().removeprefix("W/") for tag in known.split(",")):
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers, media_type=kind)

    pages.add_api_route(path, answer, methods=["GET", "HEAD"])
