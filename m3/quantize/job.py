"""Quantise a checkpoint of any size: a layer at a time, from disk to disk, and on from where it was after a kill.

    FOLDER.part/quantize.jsonl            what the run is, then a checksummed line for every finished shard
    FOLDER.part/model-00001-of-N.safetensors   embedding, norm, head; then one shard for each layer
    FOLDER.part/states-3-full.bin         hidden states before layer 3, of the model as it is (and -int4: as quantised)
    FOLDER                                the same folder, renamed when it is whole; config.json is written last

Less than two layers are in memory: one as stored, mapped from its files, and its linears in 4 bits, packed one by one
as they are found; what is widened to compute with it is a linear at a time (attention: all). What experts see lies in
a file. Two streams of hidden states go from layer to layer, of calibration sequences and of held-out ones: through the
model as it is, which gives targets, and through the quantised one, which gives inputs; at the end those of the held-out
text give perplexity and KL of the whole model.
A shard's line is written when the shard and the states after it are on the disk, so a run that was killed redoes at
most one layer, from the same inputs with the same seed: its files are those of a run that was not.

What is not quantised is copied as stored. GPTQ form, as m3.quantize.export writes it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from m3.checkpoint import CONFIG, INDEX, save_tensors, write_json
from m3.draft.store import LineFile, fingerprint
from m3.models.decoder import RMSNorm
from m3.models.loader import EMBEDDING, HEAD, LAYER, NORM
from m3.quantize import autoround, gptq
from m3.quantize.autoround import AutoRoundConfig
from m3.quantize.block import FUSED_DOWN, FUSED_GATE_UP, Block, batches
from m3.quantize.budget import UNITS
from m3.quantize.errors import LinearError, distance, error_of
from m3.quantize.evaluate import Comparison, Head, Tally
from m3.quantize.export import COMPANIONS, quantization_config
from m3.quantize.gptq import GptqConfig
from m3.quantize.record import Report, ShardRecord
from m3.quantize.round_to_nearest import BF16_BYTES
from m3.quantize.scheme import Rounded, Scheme, nearest
from m3.quantize.sensitivity import Dequantised, units_of
from m3.quantize.shards import Shards
from m3.quantize.states import States, write_states
from m3.train.checkpoint import to_disk
from m3kernels import __version__
from m3kernels.checks import refuse
from m3kernels.int4 import Int4Weight
from m3kernels.int4.convert import to_gptq
from m3kernels.int4.quantize import METHODS as RANGES

FORMAT = "m3 quantize 1"
JOURNAL = "quantize.jsonl"
RESPONSES = "responses.jsonl"  # of the model, to be calibrated on
SCRATCH = (RESPONSES, UNITS)  # not kept
ROWS = "rows.bin"  # what the experts of the layer at hand see
METHODS = ("rtn", "gptq", "autoround")
SAMPLE_TOKENS = 512  # of each layer, whose outputs say how far a linear is off (ours: enough for two digits)
Progress = Callable[[int, int], None]  # (steps of the layer done, in all)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobConfig:
    """How to quantise.

    method: round to nearest (with ``range``, a method of quantize_weight), GPTQ or AutoRound. quantised_prefix: a
        layer's inputs come through the layers before it as quantised, not as they were. keep: linears that stay as
        they are, by their full names; q, k, v together, gate and up together, and all experts of a layer together,
        for they are one product in this engine and in others. GPTQ and AutoRound see a layer of which only some
        linears are kept as if all were rounded. head: round the output head too (to nearest). batch: sequences of a
        forward pass.
    """

    method: str = "rtn"
    scheme: Scheme = dataclasses.field(default_factory=Scheme)
    range: str = "weighted"
    gptq: GptqConfig = dataclasses.field(default_factory=GptqConfig)
    autoround: AutoRoundConfig = dataclasses.field(default_factory=AutoRoundConfig)
    quantised_prefix: bool = True
    keep: tuple[str, ...] = ()
    head: bool = False
    batch: int = 8

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise refuse("quantize", "method", " or ".join(map(repr, METHODS)), repr(self.method))
        if self.range not in RANGES:
            raise refuse("quantize", "range", " or ".join(map(repr, RANGES)), repr(self.range))
        if self.batch < 1:
            raise refuse("quantize", "batch", "1 or more", self.batch)

    @property
    def least_tokens(self) -> int:
        """That every expert learns from; 0 if the method learns nothing."""
        return {"gptq": self.gptq.least_tokens, "autoround": self.autoround.least_tokens}.get(self.method, 0)

    def settings(self) -> dict[str, Any]:
        """What decides about the result, as JSON holds it."""
        fields = dataclasses.asdict(self)
        for name in METHODS:
            if name in fields and name != self.method:
                del fields[name]
        fields["scheme"]["scale_dtype"] = str(self.scheme.scale_dtype).removeprefix("torch.")
        return json.loads(json.dumps(fields))


def part_of(out: Path) -> Path:
    """Where a run is until it is finished."""
    return out.with_name(f"{out.name}.part")


def quantize_checkpoint(
    model: str | Path,
    out: str | Path,
    config: JobConfig,
    *,
    calibration: Tensor | None = None,
    held_out: Sequence[Sequence[int]] = (),
    progress: Progress = lambda done, total: None,
    shard_done: Callable[[ShardRecord, int], None] = lambda record, left: None,
    beside: Callable[[Path, Report], None] = lambda folder, report: None,
) -> Report:
    """Quantise the checkpoint folder ``model`` into the new folder ``out``; the same call goes on with a run cut short.

    Args:
        calibration: (S, L) int64 token ids; not needed to round to nearest.
        held_out: token ids of passages that perplexity and KL are measured on; none: not measured.
        shard_done: called with each new record and the number of shards to come.
        beside: writes what else is to lie in the folder, before it gets its name.
    Raises:
        ValueError: a checkpoint that is damaged or of no known architecture, a calibration set that does not fit, an
            ``out`` that is in use, or an unfinished run with other settings; names it, what was wanted, what came.
        OSError: the disk is full, or does not take files of this size; the run can go on where there is room.
    """
    job = _Job(Path(model), Path(out), config, calibration, held_out)
    try:
        return job.run(progress, shard_done, beside)
    finally:
        job.journal.close()
        job.shards.close()


def check_out(out: Path, model: Path | None = None) -> None:
    """Raises ValueError: ``out``, or where a run to it is until it is finished, is in use, or lies in ``model``."""
    used = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if used or out.is_symlink() or out.name in ("", ".."):
        raise refuse("quantize", "OUT", "a new or empty folder", str(out))
    part = part_of(out)
    if (part / CONFIG).exists() and not (part / JOURNAL).exists():
        raise refuse("quantize", "OUT", f"another name: unfinished, it is {part}", "a model of that name")
    if model is not None and model.resolve() in (part.resolve(), *out.resolve().parents):
        raise refuse("quantize", "OUT", f"a folder outside {model}", str(out))


class _Job:
    def __init__(
        self, model: Path, out: Path, config: JobConfig, calibration: Tensor | None, held_out: Sequence[Sequence[int]]
    ) -> None:
        self.out, self.part, self.config = out, part_of(out), config
        check_out(out, model)
        self.shards = Shards(model)
        self.calibration = self.checked(calibration)
        passages = [torch.tensor(list(passage)) for passage in held_out]
        self.held_out = [passage for passage in passages if len(passage) > 1]
        self.sequences = [*self.calibration, *self.held_out]
        self.check_keep()
        self.count = self.shards.model.num_layers + 1
        self.header = {
            "format": FORMAT,
            "version": __version__,
            "model": fingerprint(model),
            "settings": config.settings(),
            "calibration": digest(self.calibration),
            "held_out": digest(self.held_out),
        }
        self.journal = LineFile(self.part / JOURNAL, self.header)
        for name, value in self.header.items():
            found = value if self.journal.found is None else self.journal.found.get(name)
            if found != value:
                want = f"a run with the same {name} ({value}); finish it as it was begun, or delete that folder"
                raise refuse("quantize", str(self.part), want, f"{found}")
        self.records = [ShardRecord.of(fields) for fields in self.journal.lines[: self.count]]
        self.compared = self.journal.lines[self.count :]  # at most one line, after that of the last shard

    # -- what is asked for ------------------------------------------------------------------------------------------
    def checked(self, calibration: Tensor | None) -> list[Tensor]:
        if calibration is None:
            if self.config.method != "rtn":
                raise refuse("quantize", "calibration", f"sequences, which {self.config.method} learns from", "none")
            return []
        if calibration.ndim != 2 or calibration.dtype != torch.int64 or not len(calibration):
            raise refuse("quantize", "calibration", "(S, L) int64, one sequence or more", calibration)
        if calibration.shape[1] < 2:
            raise refuse("quantize", "calibration", "sequences of 2 tokens or more", f"{calibration.shape[1]}")
        vocabulary = self.shards.model.vocab_size
        if int(calibration.min()) < 0 or int(calibration.max()) >= vocabulary:
            got = f"{int(calibration.min())} .. {int(calibration.max())}"
            raise refuse("quantize", "calibration", f"tokens in 0 .. {vocabulary - 1}", got)
        return list(calibration)

    def check_keep(self) -> None:
        for name in self.config.keep:
            fused = ".mlp.experts." in name
            if f"{name}.weight" not in self.shards and not fused:
                raise refuse("quantize", "keep", "linears of the model", name)

    # -- the run ------------------------------------------------------------------------------------------------------
    def run(
        self,
        progress: Progress,
        shard_done: Callable[[ShardRecord, int], None],
        beside: Callable[[Path, Report], None],
    ) -> Report:
        self.journal.claim()
        self.sweep()
        for record in self.records:
            self.verify(record)
        for index in range(len(self.records), self.count):
            started = time.monotonic()
            fields = self.outside() if index == 0 else self.layer(index - 1, progress)
            path = self.part / self.file(index)
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            record = ShardRecord(
                **fields,
                layer=index - 1,
                file=path.name,
                sha256=sha256,
                seconds=time.monotonic() - started,
                peak_memory=peak_memory(),
            )
            self.journal.append(dataclasses.asdict(record))
            self.journal.sync()
            self.records.append(record)
            self.sweep()
            shard_done(record, self.count - index - 1)
        return self.finish(beside)

    def file(self, index: int) -> str:
        return f"model-{index + 1:05d}-of-{self.count:05d}.safetensors"

    def states(self, layer: int, stream: str) -> Path:
        return self.part / f"states-{layer}-{stream}.bin"

    def sweep(self) -> None:
        """Delete what is of no use any more, or was not finished."""
        layer = max(0, len(self.records) - 1)  # the one to come
        useful = {self.states(layer, stream).name for stream in ("full", "int4")}
        for path in self.part.iterdir():
            unfinished = path.suffix == ".tmp" or path.name.startswith(".tmp")  # the second are safetensors' own
            if path.name == CONFIG or unfinished or (path.suffix == ".bin" and path.name not in useful):
                path.unlink()

    def verify(self, record: ShardRecord) -> None:
        path = self.part / record.file
        if not path.is_file():
            raise refuse("quantize", str(path), f"the shard that {JOURNAL} has", "no such file")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != record.sha256:
            raise refuse("quantize", str(path), f"sha256 {record.sha256}, as {JOURNAL} says", found)

    # -- shards -------------------------------------------------------------------------------------------------------
    def outside(self) -> dict[str, Any]:
        """The shard of everything that is in no layer."""
        tensors = {name: self.shards.get(name) for name in self.shards.outside}
        errors, linears, linears_bf16 = {}, 0, 0
        if self.config.head:
            weight = tensors[self.shards.head]
            tensors.pop(f"{HEAD}.weight", None)
            rounded = nearest(weight, self.config.scheme, self.config.range)
            errors[HEAD] = error_of(weight.float(), rounded.dequantized(), None)
            packed = packed_tensors(HEAD, rounded.to_int4())
            tensors |= packed
            linears, linears_bf16 = total_bytes(packed), weight.numel() * BF16_BYTES
        self.write(0, tensors)
        return self.fields(tensors, linears, linears_bf16, errors, None, None)

    def layer(self, index: int, progress: Progress) -> dict[str, Any]:
        """The shard of a layer, and the states after it."""
        tensors = self.shards.layer(index)
        block, prefix = self.shards.block(index, tensors), LAYER.format(index)
        kept = self.kept(block, prefix)
        full, int4 = self.before(index)
        after: States | None = None
        if full is not None:
            write_states(self.states(index + 1, "full"), self.forward(block, full, {}))
            after = self.open(index + 1, "full")
        rounded = {} if len(kept) == len(block.linears) else self.rounded(block, kept, full, int4, after, progress)
        weights: Mapping[str, Tensor] = Dequantised(rounded, list(rounded))
        if not block.has_experts:
            weights = dict(weights)
        hidden_error = None
        if int4 is not None and after is not None:
            write_states(self.states(index + 1, "int4"), self.forward(block, int4, weights))
            hidden_error = distance(after, self.open(index + 1, "int4"))
        errors = self.errors(block, weights, full)
        experts = None
        if block.has_experts and full is not None and int4 is not None and self.calibration:
            experts = self.tokens_of_experts(block, (int4 if self.config.quantised_prefix else full))
        linears_bf16 = sum(block.weights[name].numel() for name in rounded) * BF16_BYTES
        copied = self.copied(tensors, prefix, set(rounded))
        packed: dict[str, Tensor] = {}
        for name in list(rounded):
            packed |= packed_tensors(prefix + name, rounded.pop(name))  # one of the two forms at a time
        made = {**packed, **copied}
        self.write(index + 1, made)
        self.shards.close()
        return self.fields(made, total_bytes(packed), linears_bf16, errors, hidden_error, experts)

    def fields(
        self,
        tensors: Mapping[str, Tensor],
        linears: int,
        linears_bf16: int,
        errors: dict[str, LinearError],
        hidden_error: float | None,
        experts: tuple[list[int], list[int]] | None,
    ) -> dict[str, Any]:
        return {
            "routed": None if experts is None else experts[0],
            "forced": None if experts is None else experts[1],
            "nbytes": total_bytes(tensors),
            "linears": linears,
            "linears_bf16": linears_bf16,
            "errors": errors,
            "hidden_error": hidden_error,
        }

    def kept(self, block: Block, prefix: str) -> set[str]:
        kept = {name.removeprefix(prefix) for name in self.config.keep if name.startswith(prefix)}
        if unknown := sorted(kept - set(block.linears)):
            raise refuse("quantize", "keep", "linears of the model", prefix + unknown[0])
        for names in map(set, units_of(block)):
            if kept & names and not names <= kept:
                missing = sorted(names - kept)
                raise refuse("quantize", "keep", f"{prefix}{missing[0]} too: one product with it", "only a part")
        return kept

    def rounded(
        self,
        block: Block,
        kept: set[str],
        full: States | None,
        int4: States | None,
        after: States | None,
        progress: Progress,
    ) -> dict[str, Int4Weight]:
        """The linears of a layer but those that are kept."""
        packed = {}
        found = self.found(block, full, int4, after, progress)
        for done, (name, one) in enumerate(found, 1):
            if name not in kept:
                packed[name] = one.to_int4()
            if self.config.method != "autoround":
                progress(done, len(block.linears))
        return {name: packed[name] for name in block.linears if name in packed}

    def found(
        self, block: Block, full: States | None, int4: States | None, after: States | None, progress: Progress
    ) -> Iterator[tuple[str, Rounded]]:
        """The linears of a layer by the method, one by one."""
        config, count, scratch = self.config, len(self.calibration), self.part / ROWS
        if config.method == "rtn":
            return ((name, nearest(one, config.scheme, config.range)) for name, one in block.weights.items())
        assert full is not None and int4 is not None and after is not None
        inputs = (int4 if config.quantised_prefix else full)[:count]
        if config.method == "gptq":
            return gptq.quantised_linears(block, inputs, config.scheme, config.gptq, scratch)
        learning = config.autoround
        return autoround.quantised_linears(
            block, inputs, after[:count], config.scheme, learning, progress, scratch=scratch
        )

    def copied(self, tensors: Mapping[str, Tensor], prefix: str, gone: set[str]) -> dict[str, Tensor]:
        """What stays of a layer, as stored."""
        fused = FUSED_GATE_UP in tensors and any(".experts." in name for name in gone)
        leave = {f"{name}.weight" for name in gone} | ({FUSED_GATE_UP, FUSED_DOWN} if fused else set())
        return {prefix + name: tensor for name, tensor in tensors.items() if name not in leave}

    def write(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        path = self.part / self.file(index)
        part = path.with_suffix(".tmp")
        try:
            save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
        except SafetensorError as error:
            raise OSError(f"{path}: could not be written: {error}") from error
        to_disk(part)
        part.replace(path)
        to_disk(self.part)

    # -- hidden states ------------------------------------------------------------------------------------------------
    def before(self, index: int) -> tuple[States | None, States | None]:
        """The states before a layer, of both streams."""
        if not self.sequences:
            return None, None
        if index == 0:
            embedding = self.shards.get(EMBEDDING)
            write_states(self.states(0, "full"), (embedding[ids] for ids in self.sequences))
            full = self.open(0, "full")
            return full, full
        return self.open(index, "full"), self.open(index, "int4")

    def open(self, index: int, stream: str) -> States:
        lengths = [len(ids) for ids in self.sequences]
        return States(self.states(index, stream), lengths, self.shards.model.hidden_size)

    @torch.no_grad()
    def forward(self, block: Block, states: States, weights: Mapping[str, Tensor]) -> Iterator[Tensor]:
        start = 0
        while start < len(states):
            stop = start + 1
            while (
                stop < len(states)
                and stop - start < self.config.batch
                and states.lengths[stop] == states.lengths[start]
            ):
                stop += 1
            yield from block.forward(torch.stack(states[start:stop]), weights)
            start = stop

    def tokens_of_experts(self, block: Block, inputs: States) -> tuple[list[int], list[int]]:
        """(routed, forced) as in ShardRecord."""
        routed = torch.zeros(block.config.num_experts, dtype=torch.int64)
        count = len(self.calibration)
        for hidden in batches(inputs[:count], self.config.batch):
            routed += block.routing(hidden).tokens_per_expert()
        forced = (min(self.config.least_tokens, sum(inputs.lengths[:count])) - routed).clamp(min=0)
        return routed.tolist(), forced.tolist()

    @torch.no_grad()
    def errors(self, block: Block, weights: Mapping[str, Tensor], full: States | None) -> dict[str, LinearError]:
        inputs: dict[str, Tensor] = {}
        if full is not None:
            count = max(1, min(SAMPLE_TOKENS // full.lengths[0], len(self.calibration)))
            inputs = block.inputs(torch.stack(full[:count]))
        return {name: error_of(block.weights[name].float(), weights[name], inputs.get(name)) for name in weights}

    # -- the end ------------------------------------------------------------------------------------------------------
    def comparison(self) -> Comparison | None:
        """Noted in the journal, because the states it is made of are gone before the folder has its name."""
        if not self.held_out:
            return None
        if not self.compared:
            self.compared = [dataclasses.asdict(self.compare())]
            self.journal.append(self.compared[0])
            self.journal.sync()
        return Comparison.of(self.compared[0])

    def compare(self) -> Comparison:
        model = self.shards.model
        full, int4 = (self.open(model.num_layers, stream) for stream in ("full", "int4"))
        norm = RMSNorm(self.shards.get(NORM).float(), model.rms_norm_eps)
        stored = self.shards.get(self.shards.head)
        heads: list[Head] = [linear_head(stored.float())] * 2
        if self.config.head:
            heads[1] = linear_head(nearest(stored, self.config.scheme, self.config.range).dequantized())
        tally = Tally()
        with torch.no_grad():
            for index, ids in enumerate(self.held_out, len(self.calibration)):
                tally.add(norm(full[index]), norm(int4[index]), (heads[0], heads[1]), ids.tolist())
        return tally.result()

    def finish(self, beside: Callable[[Path, Report], None]) -> Report:
        """Everything that is not a shard; then the folder gets its name."""
        from m3.quantize.report import write_result

        length = len(self.calibration[0]) if self.calibration else 0
        report = Report(
            settings=self.header["settings"],  # type: ignore[arg-type]
            calibration=(len(self.calibration), length),
            shards=tuple(self.records),
            nbytes=sum(record.nbytes for record in self.records),
            nbytes_before=self.nbytes_before(),
            comparison=self.comparison(),
            seconds=sum(record.seconds for record in self.records),
            peak_memory=max(peak_memory(), *(record.peak_memory for record in self.records)),
        )
        for name in COMPANIONS:
            if (self.shards.folder / name).is_file():
                shutil.copyfile(self.shards.folder / name, self.part / name)
        where: dict[str, str] = {}
        for record in self.records:
            with safe_open(self.part / record.file, framework="pt") as file:
                where |= dict.fromkeys(file.keys(), record.file)
        write_json(self.part / INDEX, {"metadata": {"total_size": report.nbytes}, "weight_map": where})
        write_result(self.part, report)
        beside(self.part, report)
        for path in self.part.iterdir():
            if path.suffix == ".bin" or path.name in SCRATCH:
                path.unlink()
            else:
                to_disk(path)
        part = self.part / f"{CONFIG}.tmp"
        write_json(part, self.hf_config(report))
        to_disk(part)
        part.replace(self.part / CONFIG)
        to_disk(self.part)
        self.journal.close()
        self.part.replace(self.out)
        to_disk(self.out.parent)
        return report

    def nbytes_before(self) -> int:
        return sum(path.stat().st_size for path in {self.shards.folder / name for name in self.shards.files()})

    def hf_config(self, report: Report) -> dict[str, Any]:
        config, scheme = dict(self.shards.config), self.config.scheme
        if self.config.head:
            config["tie_word_embeddings"] = False
        if report.linears[0]:
            config["quantization_config"] = quantization_config(
                group_size=scheme.group_size,
                symmetric=scheme.symmetric,
                act_order=self.config.method == "gptq" and self.config.gptq.act_order,
                head=self.config.head,
                damping=self.config.gptq.damping,
                left_out=[*self.config.keep, *self.routers()],
                quantised=self.quantised() if self.config.keep and not self.shards.model.num_experts else (),
            )
        return config

    def quantised(self) -> list[str]:
        records = [record for record in self.records if record.layer >= 0]
        return [LAYER.format(record.layer) + name for record in records for name in record.errors]

    def routers(self) -> list[str]:
        model = self.shards.model
        return [f"{LAYER.format(index)}mlp.gate" for index in range(model.num_layers) if model.has_experts(index)]


# -- small parts ------------------------------------------------------------------------------------------------------
def packed_tensors(name: str, weight: Int4Weight) -> dict[str, Tensor]:
    """The tensors of a linear in GPTQ form v1 (zero points are 1 to 15, so all have a place in it)."""
    try:
        tensors = to_gptq(weight)
    except ValueError as error:
        raise ValueError(f"quantize: {name}: {error}") from error
    return {f"{name}.{key}": tensor for key, tensor in tensors.items()}


def total_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def linear_head(weight: Tensor) -> Head:
    """Logits by a weight (V, D)."""
    return lambda hidden: F.linear(hidden, weight)


def digest(sequences: Sequence[Tensor]) -> str:
    """SHA-256 of token ids, with the length of every sequence."""
    found = hashlib.sha256()
    for ids in sequences:
        found.update(f"{len(ids)} ".encode())
        found.update(ids.contiguous().numpy().tobytes())
    return found.hexdigest()


def peak_memory() -> int:
    """Bytes of this process in memory at most, so far; pages of mapped files that were read count."""
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else 1024 * found
