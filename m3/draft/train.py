"""Train a draft on the target's own responses, by the training-time test; a run that was killed goes on where it was.

A run folder holds run.json (everything that decides the result), metrics.jsonl, checkpoint.pt (weights, optimiser,
place in the data, written under another name and renamed), and in the end what ``finish`` writes. With a number of
steps, the weights are the same, bit for bit on one thread, however often the run was interrupted; with a time limit,
the learning rate follows the clock.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from m3.draft.batches import Batch, Order, draft_vocabulary, lesson_rows, make_batch, packed
from m3.draft.distill import Learned, distill_head
from m3.draft.hidden import StateCache
from m3.draft.store import Response
from m3.models.decoder import Decoder
from m3.models.gated_eagle3 import GATES, GatedEagle3, GatedEagle3Config
from m3kernels.checks import refuse

RUN, METRICS, CHECKPOINT = "run.json", "metrics.jsonl", "checkpoint.pt"
Progress = Callable[[float, str], None]  # (share of the run that is done, a line about it)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a run beside its data. Give steps, or else minutes."""

    gate: str = "elementwise"
    draft_vocab: int = 8192
    fc_norm: bool = False
    norm_output: bool = False
    ttt: int = 2  # steps of the training-time test
    step_decay: float = 0.8  # weight of step i is step_decay ** i (EAGLE-3)
    lr: float = 2e-3  # ours: a draft this small wants far more than EAGLE-3's 5e-5
    lr_end: float = 6e-5
    head_lr_factor: float = 0.05  # the head starts from the target's
    betas: tuple[float, float] = (0.9, 0.95)
    warmup: float = 0.03  # share of the run
    clip: float = 0.5  # norm of the gradient
    batch_tokens: int = 1024  # tokens of a batch, prompts and padding included
    steps: int | None = None
    minutes: float | None = None
    seed: int = 0
    log_every: int = 10  # steps
    evaluations: int = 5  # on held-out responses, during the run
    evaluation_responses: int = 12
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        op = "TrainConfig"
        if self.gate not in GATES:
            raise refuse(op, "gate", " or ".join(GATES), repr(self.gate))
        if (self.steps is None) == (self.minutes is None):
            raise refuse(op, "steps", "steps or minutes, one of them", f"{self.steps} and {self.minutes}")
        for name in ("steps", "minutes", "ttt", "draft_vocab", "lr", "batch_tokens", "log_every", "step_decay"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise refuse(op, name, "a positive number", value)
        if not 0 <= self.warmup < 1 or not 0 <= self.lr_end <= self.lr:
            raise refuse(op, "warmup, lr_end", "0 <= warmup < 1, 0 <= lr_end <= lr", f"{self.warmup}, {self.lr_end}")

    def rate(self, share: float) -> float:
        """Learning rate when ``share`` of the run is done: linear warm-up, then half a cosine."""
        if share < self.warmup:
            return self.lr * share / self.warmup
        turn = (min(share, 1.0) - self.warmup) / (1 - self.warmup)
        return self.lr_end + (self.lr - self.lr_end) * 0.5 * (1 + math.cos(math.pi * turn))


class Trainer:
    """One run.

    Args:
        target: the model whose responses these are; its embedding, head and last layer are the draft's start.
        train, held_out: responses whose states are in ``cache``.
        folder: of the run; goes on from its checkpoint if there is one.
        data: what names the data in run.json, such as a fingerprint.
    Raises:
        ValueError: nothing to train on, or the folder holds a run with other settings or data.
    """

    def __init__(
        self,
        target: Decoder,
        train: Sequence[Response],
        held_out: Sequence[Response],
        cache: StateCache,
        folder: str | Path,
        config: TrainConfig,
        *,
        aux_layers: tuple[int, ...] | None = None,
        data: str = "",
    ) -> None:
        if not train:
            raise refuse("train", "responses", "one or more", 0)
        self.config, self.cache, self.folder = config, cache, Path(folder)
        self.held_out = list(held_out)[: config.evaluation_responses]
        self.order = Order(train, batch_tokens=config.batch_tokens, seed=config.seed)
        self.device = target.embedding.device
        size = min(config.draft_vocab, target.config.vocab_size)
        vocabulary = draft_vocabulary(train, cache, size, target.config.vocab_size)
        shape = GatedEagle3Config.for_target(
            target.config, draft_vocab_size=size, gate=config.gate, aux_layers=aux_layers
        )
        shape = dataclasses.replace(shape, fc_norm=config.fc_norm, norm_output=config.norm_output)
        self.draft = GatedEagle3.warm_start(shape, target, vocabulary, seed=config.seed).to(self.device)
        self.teacher_head = self.draft.lm_head.weight.detach().clone()  # as warm_start took it from the target
        self.draft_ids = torch.full((target.config.vocab_size,), -1, device=self.device)
        self.draft_ids[vocabulary.to(self.device)] = torch.arange(size, device=self.device)
        self.weights = torch.tensor([config.step_decay**i for i in range(config.ttt)], device=self.device)
        head = list(self.draft.lm_head.parameters())
        rest = [one for name, one in self.draft.named_parameters() if not name.startswith("lm_head.")]
        groups = [{"params": rest}, {"params": head}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=config.betas, weight_decay=0.0, foreach=True)
        self.step, self.seconds = 0, 0.0
        self._checkpointed = time.monotonic()
        self._begin({**dataclasses.asdict(config), "data": data, "responses": len(train), "aux_layers": aux_layers})

    # -- files --------------------------------------------------------------------------------------------------------
    def _begin(self, run: dict[str, Any]) -> None:
        """Write run.json, or check that it says the same, and load the checkpoint."""
        self.folder.mkdir(parents=True, exist_ok=True)
        run = json.loads(json.dumps(run))
        path = self.folder / RUN
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            other = [name for name in {**run, **found} if run.get(name) != found.get(name)]
            if other:
                names = ", ".join(f"{name} = {found.get(name)!r}" for name in other)
                raise refuse("train", f"{path}", f"a run with the settings of this one; it has {names}", "another run")
        else:
            write_whole(path, json.dumps(run, indent=1).encode())
        checkpoint = self.folder / CHECKPOINT
        if checkpoint.is_file():
            state = torch.load(checkpoint, map_location=self.device, weights_only=True)
            self.draft.load_state_dict(state["draft"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]
        metrics = self.folder / METRICS
        if metrics.is_file():
            lines = [line for line in metrics.read_bytes().split(b"\n")[:-1] if json.loads(line)["step"] <= self.step]
            write_whole(metrics, b"".join(line + b"\n" for line in lines))

    def checkpoint(self) -> None:
        state = {
            "draft": self.draft.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        path = self.folder / CHECKPOINT
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        self._checkpointed = time.monotonic()

    def log(self, **values: Any) -> None:
        with (self.folder / METRICS).open("ab") as file:
            file.write(json.dumps({"step": self.step, "seconds": round(self.seconds, 1), **values}).encode() + b"\n")

    # -- the run ------------------------------------------------------------------------------------------------------
    @property
    def share(self) -> float:
        """Of the run that is done."""
        if self.config.steps is not None:
            return self.step / self.config.steps
        assert self.config.minutes is not None
        return self.seconds / (60 * self.config.minutes)

    def run(self, progress: Progress = lambda share, line: None) -> GatedEagle3:
        """Train to the end; the draft."""
        config = self.config
        tokens, counted, losses, hits, lessons = 0, self.seconds, [], [], 0
        line, begun_at = "", self.step
        for epoch, responses in self.order.following(self.step):
            if self.share >= 1:
                break
            begun, evaluated = time.monotonic(), self._evaluations()
            batch = make_batch(responses, self.cache)
            learned, norm = self.learn(batch)
            self.step += 1
            self.seconds += time.monotonic() - begun
            tokens += len(batch.best)
            lessons += len(batch.best)
            losses.append(learned.loss)
            hits.append(learned.hits)
            if self.step % config.log_every == 0 or self.share >= 1:
                speed = tokens / max(self.seconds - counted, 1e-9)
                loss = torch.stack(losses).mean(0).tolist()
                accuracy = (torch.stack(hits).sum(0) / max(lessons, 1)).tolist()
                self.log(
                    epoch=epoch,
                    loss=[round(one, 4) for one in loss],
                    accuracy=[round(one, 4) for one in accuracy],
                    grad_norm=round(norm, 3),
                    tokens_per_second=round(speed),
                )
                line = f"epoch {epoch}, loss {loss[0]:.2f}, accuracy {accuracy[0]:.2f}, {speed:.0f} tokens/s"
                tokens, counted, losses, hits, lessons = 0, self.seconds, [], [], 0
            if self._evaluations() > evaluated and self.held_out:
                self.log(held_out_accuracy=[round(one, 4) for one in self.accuracy(self.held_out)])
            progress(min(self.share, 1.0), line)
            if time.monotonic() - self._checkpointed > config.checkpoint_seconds:
                self.checkpoint()
        if self.step > begun_at:
            self.checkpoint()
        return self.draft

    def _evaluations(self) -> int:
        """How many evaluations are due by now."""
        return int(min(self.share, 1.0) * self.config.evaluations + 1e-9)

    def outputs(self, batch: Batch) -> Tensor:
        """(S, L, D) normed outputs of the draft for the lessons of a batch."""
        tokens, mask, aux = (one.to(self.device) for one in (batch.tokens, batch.mask, batch.aux))
        found = self.draft.rollout_hidden(tokens, aux, steps=self.config.ttt, mask=mask)
        rows = [out.flatten(0, 1)[lesson_rows(batch, i).to(self.device)] for i, out in enumerate(found)]
        return self.draft.norm(torch.stack(rows))

    def loss(self, batch: Batch) -> tuple[Tensor, Learned]:
        best = self.draft_ids[batch.best.to(self.device)]
        final = batch.final.to(self.device)
        return distill_head(
            self.outputs(batch), self.draft.lm_head.weight, final, self.teacher_head, best, self.weights
        )

    def learn(self, batch: Batch) -> tuple[Learned, float]:
        """One step of the optimiser; (what the batch said, norm of the gradient)."""
        rate = self.config.rate(self.share)
        for group, factor in zip(self.optimizer.param_groups, (1.0, self.config.head_lr_factor), strict=True):
            group["lr"] = rate * factor
        self.optimizer.zero_grad()
        total, learned = self.loss(batch)
        total.backward()
        norm = nn.utils.clip_grad_norm_(self.draft.parameters(), self.config.clip)
        self.optimizer.step()
        return learned, float(norm)

    @torch.no_grad()
    def accuracy(self, responses: Sequence[Response]) -> list[float]:
        """Share of the lessons whose likeliest token the draft gives, at each step."""
        hits, lessons = torch.zeros(self.config.ttt, device=self.device), 0
        for group in packed(responses, self.config.batch_tokens):
            batch = make_batch(group, self.cache)
            hits += self.loss(batch)[1].hits
            lessons += len(batch.best)
        return (hits / max(lessons, 1)).tolist()


def write_whole(path: Path, data: bytes) -> None:
    """A file that is there whole or as it was."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
