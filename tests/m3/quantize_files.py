"""Checkpoint folders for the tests of the quantisation job, and runs of it that are killed.

As a program: ``quantize_files.py MODEL WHOLE KILLED METHOD KILLS SEED`` quantises to WHOLE; then to KILLED in a child
process, kills it KILLS times or more, at random moments of its processor time, lets it finish, and says how many shards
were done at each kill; where it finished before, its bytes are compared and it begins again. With KILLS "finishing" it
is killed when all shards are done: as it is about to change its first file, its second, ...; said
is what was changed next at each kill.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from m3.checkpoint import CONFIG
from m3.quantize.autoround import AutoRoundConfig
from m3.quantize.job import JOURNAL, JobConfig, part_of, quantize_checkpoint
from m3.quantize.report import PAGE, RESULT
from m3.quantize.scheme import Scheme

SCHEME = Scheme(group_size=32)


def add_tokenizer(folder: Path) -> None:
    """A tokenizer of 99 printable characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:99]
    fast = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.save(str(folder / "tokenizer.json"))


def config_of(method: str, **changes) -> JobConfig:
    return JobConfig(method=method, scheme=SCHEME, autoround=AutoRoundConfig(iterations=6, batch=2), **changes)


def tokens(sequences: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(99, (sequences, length), generator=torch.Generator().manual_seed(seed))


def quantised(model: Path, out: Path, config: JobConfig, **calls):
    """The Report of a run with the calibration and held-out tokens of all these tests."""
    passages = [tokens(1, length, seed=length)[0].tolist() for length in (20, 33)]
    return quantize_checkpoint(model, out, config, calibration=tokens(6, 24), held_out=passages, **calls)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of all files but those that say how long it took."""
    timed = (JOURNAL, PAGE, RESULT)
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name not in timed
    }


def run_in_child(
    model: Path, out: Path, method: str, kill_after: float | None = None, kill_at: int | None = None
) -> tuple[bool, float]:
    """Quantise in a process of its own: whether it was killed, and its processor time in seconds.

    It is killed after ``kill_after`` seconds of processor time: other work on the machine changes nothing.
    """
    child = os.fork()
    if child == 0:
        if kill_at is not None:
            kill_before_change(part_of(out), kill_at)
        if kill_after is not None:
            signal.setitimer(signal.ITIMER_PROF, kill_after)  # SIGPROF, which nobody handles, ends a process at once
        quantised(model, out, config_of(method))
        os._exit(0)
    _, status, used = os.wait4(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("a run failed")
    return os.WIFSIGNALED(status), used.ru_utime + used.ru_stime


def killed_runs(model: Path, whole: Path, out: Path, method: str, kills: int, seed: int) -> list[int]:
    """Shards that were done at each kill; most runs live long enough for one or two."""
    _, seconds = run_in_child(model, whole, method)
    drawn, done = random.Random(seed), []
    while len(done) < kills or max(done) == 0:
        killed, _ = run_in_child(model, out, method, drawn.uniform(0.01, 1) * seconds / 2.5)
        if killed:
            journal = part_of(out) / JOURNAL
            done.append(max(0, journal.read_bytes().count(b"\n") - 1) if journal.is_file() else 0)
        elif digests(out) != digests(whole):
            raise SystemExit(f"a run killed {len(done)} times wrote {digests(out)}, want {digests(whole)}")
        else:
            shutil.rmtree(out)
    if not out.exists():
        run_in_child(model, out, method)
    return done


def kill_before_change(folder: Path, number: int) -> None:
    """Kill this process when it is about to open to write, rename or delete something in the folder, the ``number``-th
    time that it does; what, is left in the file beside it."""
    count = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        if event not in ("open", "os.rename", "os.remove") or not str(arguments[0]).startswith(str(folder)):
            return
        if event == "open" and arguments[1] in ("r", "rb", None):
            return
        count += 1
        if count == number:
            with folder.with_suffix(".changes").open("a") as file:
                file.write(f"{event}:{Path(arguments[0]).name}\n")
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def killed_finishing(model: Path, whole: Path, out: Path, method: str) -> list[str]:
    """What was changed next at each kill."""
    run_in_child(model, whole, method)
    with contextlib.suppress(InterruptedError):
        quantised(model, out, config_of(method), shard_done=stop_after_the_last)
    number = 1
    while run_in_child(model, out, method, kill_at=number)[0]:
        if out.exists():
            raise SystemExit(f"the folder had its name at kill {number}")
        if (part_of(out) / CONFIG).exists() and digests(part_of(out)) != digests(whole):
            raise SystemExit(f"the folder looked whole at kill {number}")
        number += 1
    return part_of(out).with_suffix(".changes").read_text().split()


def stop_after_the_last(record, left: int) -> None:
    if left == 0:
        raise InterruptedError


if __name__ == "__main__":
    torch.set_num_threads(1)
    model, whole, out, method, kills, seed = sys.argv[1:]
    paths = Path(model), Path(whole), Path(out)
    found = (
        killed_finishing(*paths, method) if kills == "finishing" else killed_runs(*paths, method, int(kills), int(seed))
    )
    sys.stdout.write(" ".join(map(str, found)))
