"""Calibration sequences out of a file: its text, tokenised, cut to windows of one length.

A .jsonl file is a line of JSON for each text: an object with "text", or with "prompt" and "response".
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from torch import Tensor

from m3.models.tokenizer import Tokenizer
from m3kernels.checks import refuse


def texts_of(path: Path) -> list[str]:
    """The texts of a file. Raises ValueError: no such file, not UTF-8, or a line that is no such object."""
    if not path.is_file():
        raise refuse("calibration", str(path), "a file", "none")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise refuse("calibration", str(path), "UTF-8 text", f"{error}") from error
    if path.suffix != ".jsonl":
        return [text]
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        want = 'a JSON object with "text", or with "prompt" and "response"'
        try:
            fields = json.loads(line)
            texts = [fields["text"]] if "text" in fields else [fields["prompt"], fields["response"]]
        except (ValueError, KeyError, TypeError) as error:
            raise refuse("calibration", f"{path}: line {number}", want, repr(line[:60])) from error
        if not all(isinstance(one, str) for one in texts):
            raise refuse("calibration", f"{path}: line {number}", want, repr(line[:60]))
        found.append("\n".join(texts))
    return found


def windows(path: str | Path, tokenizer: Tokenizer, *, samples: int, tokens: int, seed: int) -> Tensor:
    """(S, tokens) int64, S at most ``samples``: windows of the file, one after another, drawn by the seed if too many.

    Raises:
        ValueError: as texts_of, or a file of fewer tokens than one window.
    """
    if tokens < 2 or samples < 1:
        raise refuse("calibration", "samples, tokens", "1 and 2 or more", f"{samples}, {tokens}")
    ids = [token for text in texts_of(Path(path)) for token in tokenizer.encode(text)]
    count = len(ids) // tokens
    if not count:
        raise refuse("calibration", str(path), f"{tokens} tokens or more, a window", f"{len(ids)}")
    chosen = sorted(random.Random(seed).sample(range(count), min(samples, count)))
    return torch.tensor([ids[tokens * index : tokens * (index + 1)] for index in chosen])
