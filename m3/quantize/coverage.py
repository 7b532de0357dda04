"""What the experts of a mixture get of a calibration set: tokens by layer and expert, which sequences to keep so that
rare experts get more, and how many tokens must be forced on them beyond that.

    gain of a sequence s = sum over layers and experts of min(have + tokens of s, least) - min(have, least)

Sequences are picked by the largest gain, one after another; a sum of concave functions is submodular, so the greedy
choice has at least 1 - 1/e of the best one's coverage. What is missing then is forced: m3.quantize.block.Routing.extra
gives an expert the tokens that the router likes it best for among those it sends elsewhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3.models.decoder import Decoder, Moe
from m3kernels.checks import refuse

BATCH = 8  # sequences of a forward pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertTokens:
    """An expert of a layer: tokens that the router gave it, and those that are forced on it."""

    layer: int
    expert: int
    routed: int
    forced: int

    @property
    def forced_share(self) -> float:
        """Of what it is calibrated on."""
        return self.forced / max(1, self.routed + self.forced)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Coverage:
    """layers: M numbers of layers with experts. counts: (S, M, E) int64, tokens of a sequence by layer and expert.
    tokens: of all experts of a layer and all sequences, each token once.
    """

    layers: tuple[int, ...]
    counts: Tensor
    tokens: int

    def total(self) -> Tensor:
        """(M, E) tokens."""
        return self.counts.sum(0)

    def some(self, which: Sequence[int]) -> Coverage:
        """Of some sequences."""
        return Coverage(
            layers=self.layers,
            counts=self.counts[list(which)],
            tokens=self.tokens // max(1, len(self.counts)) * len(which),
        )

    def forced(self, least: int) -> Tensor:
        """(M, E) tokens to be forced so that every expert has ``least``, or all tokens where there are fewer."""
        return (min(least, self.tokens) - self.total()).clamp(min=0)

    def experts(self, least: int) -> list[ExpertTokens]:
        """Every expert of every layer."""
        total, forced = self.total().tolist(), self.forced(least).tolist()
        return [
            ExpertTokens(layer=layer, expert=expert, routed=routed, forced=forced[row][expert])
            for row, layer in enumerate(self.layers)
            for expert, routed in enumerate(total[row])
        ]


def counts_of(ids: Tensor, sequences: int, experts: int) -> Tensor:
    """(S, E) tokens of each expert in each of S sequences, from the experts (S L, k) that a router chose."""
    rows = ids.view(sequences, -1)
    return torch.zeros(sequences, experts, dtype=torch.int64).scatter_add_(1, rows, torch.ones_like(rows))


@torch.inference_mode()
def count(
    model: Decoder, ids: Sequence[Tensor], progress: Callable[[int, int], None] = lambda done, total: None
) -> Coverage:
    """One pass of the sequences (L,) through the model.

    Raises ValueError: a model without experts, or no sequences.
    """
    config = model.config
    layers = tuple(layer for layer in range(config.num_layers) if config.has_experts(layer))
    if not layers or not ids:
        raise refuse("coverage", "model, ids", "a model with experts, one sequence or more", f"{config.model_type}")
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    sequences = 0

    def see(layer: int) -> Callable[[Any, Any], None]:
        def keep(module: Any, args: Any) -> None:
            found[layer].append(counts_of(args[1].cpu(), sequences, config.num_experts))

        return keep

    hooks = []
    try:
        for layer in layers:
            mlp = model.blocks[layer].mlp
            assert isinstance(mlp, Moe)
            hooks.append(mlp.experts.register_forward_pre_hook(see(layer)))
        for start in range(0, len(ids), BATCH):
            part = torch.stack(list(ids[start : start + BATCH]))
            sequences = len(part)
            model.hidden(part, model.new_cache(part.shape[1], sequences))
            progress(start + sequences, len(ids))
    finally:
        for hook in hooks:
            hook.remove()
    counts = torch.stack([torch.cat(found[layer]) for layer in layers], dim=1)
    return Coverage(layers=layers, counts=counts.clone(), tokens=sum(len(one) for one in ids))


def pick(coverage: Coverage, samples: int, least: int) -> list[int]:
    """Numbers of the sequences to keep, in the order in which they were picked.

    Where no sequence adds anything any more, the next ones as they come.
    """
    if not 1 <= samples <= len(coverage.counts):
        raise refuse("coverage", "samples", f"1..{len(coverage.counts)}", samples)
    have = torch.zeros_like(coverage.counts[0])
    rest = list(range(len(coverage.counts)))
    found: list[int] = []
    while len(found) < samples:
        after = (have + coverage.counts[rest]).clamp(max=least).sum((1, 2))
        best = rest.pop(int(after.argmax()))  # of equals the first
        have += coverage.counts[best]
        found.append(best)
    return found


def heat_map(total: Tensor, layers: Sequence[int], least: int = 0) -> Any:
    """A matplotlib Figure of (M, E) tokens: layers down, experts across; experts below ``least`` are marked."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    rows, experts = total.shape
    figure = Figure(figsize=(min(16.0, 3 + experts * 0.16), min(14.0, 1.6 + rows * 0.16)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="black")
    shown = total.double().masked_fill(total == 0, float("nan")).numpy()
    image = axes.imshow(
        shown, aspect="auto", cmap=colours, norm=LogNorm(1, max(2, int(total.max()))), interpolation="nearest"
    )
    figure.colorbar(image, ax=axes, label="tokens (black: none)")
    down, across = (total < least).nonzero(as_tuple=True)
    if len(down):
        axes.plot(across.tolist(), down.tolist(), "x", color="red", markersize=4, label=f"fewer than {least}")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), fontsize="small")
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    step = max(1, rows // 24)
    axes.set_yticks(range(0, rows, step), [str(layer) for layer in layers[::step]])
    return figure


def draw(coverage: Coverage, path: str | Path, *, least: int = 0) -> None:
    """The heat map as PNG."""
    heat_map(coverage.total(), coverage.layers, least).savefig(path, dpi=100, metadata={"Software": None})
