"""Prefixes that packed sequences share, computed once.

Rollouts of one context begin with the same tokens; the replies of one consultation do too. A causal model gives equal
beginnings equal hidden states, so a batch is computed as a tree, and gradients of what is shared are summed in it:

    sequences   c c c a a a    c c c b b        -> tokens that are computed   c c c a a a b b
    segments    runs of those tokens between the places where sequences part: (c c c) (a a a) (b b)
    paths       of each sequence, its segments in order: (0, 1) (0, 2); attention of a sequence sees those alone

Exact but for rounding. Attention is taken sequence by sequence, so it is not quadratic in the pack. The same idea for
inference: cascade attention, arXiv 2402.05099.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from m3kernels.checks import refuse

ATTENTION = "m3_shared_prefix"  # its name in transformers
LEAST = 16  # ours: tokens; a shorter prefix saves less than the copy of its keys and values costs
LAYERS = {"full_attention", "sliding_attention"}  # kinds of layers of transformers that mix tokens by attention alone


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tree:
    """A packed batch of B sequences as a tree of segments, of which U tokens are computed.

    Args:
        tokens: (U,) int64, place in the pack of each token that is computed.
        lengths: of the segments, in the order of ``tokens``.
        paths: of each sequence, its segments. kept: how many of those an earlier sequence has made.
    """

    tokens: Tensor
    lengths: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...]
    kept: tuple[int, ...]
    masks: dict[tuple[int, int, int], Tensor] = dataclasses.field(default_factory=dict)  # made once a batch

    def spread(self, hidden: Tensor) -> Tensor:
        """(T, D) rows of all packed tokens from (U, D) rows of those that were computed."""
        if not any(self.kept):
            return hidden
        parts = hidden.split(self.lengths)
        return torch.cat([parts[segment] for path in self.paths for segment in path])

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None) -> Tensor:
        """(1, U, H, E) from query (1, H, U, E), key and value (1, K, U, E); causal, ``window`` tokens back if given."""
        queries, keys, values = (one.split(self.lengths, dim=2) for one in (query, key, value))
        out = []
        for path, kept in zip(self.paths, self.kept, strict=True):
            if kept == len(path):  # an earlier sequence has computed all of it
                continue
            q, k, v = _joined(queries, path[kept:]), _joined(keys, path), _joined(values, path)
            before = k.shape[2] - q.shape[2]
            mask = None
            if before or (window is not None and window < k.shape[2]):
                mask = self._mask(q, before, k.shape[2] if window is None else window)
                if not q.is_cpu:  # only the kernel of a CPU takes a mask with fewer heads of keys
                    k, v = (one.repeat_interleave(q.shape[1] // one.shape[1], dim=1) for one in (k, v))
            found = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
            )
            out.append(found.transpose(1, 2))
        return torch.cat(out, dim=1)

    def _mask(self, query: Tensor, before: int, window: int) -> Tensor:
        """(tokens of the query, those and ``before``): what is seen."""
        own = query.shape[2]
        key = (own, before, window)
        if key not in self.masks or self.masks[key].device != query.device:
            place = torch.arange(before, before + own, device=query.device)[:, None]
            seen = torch.arange(before + own, device=query.device)
            self.masks[key] = (seen <= place) & (seen > place - window)
        return self.masks[key]


def tree(ids: Tensor, cu_seqlens: Tensor, least: int = LEAST) -> Tree:
    """The tree of packed ids (T,): each sequence goes on from the earlier one with which it shares most tokens.

    Args:
        least: tokens; sequences that share fewer are computed apart.
    """
    bounds = cu_seqlens.tolist()
    sequences = [ids[start:stop].cpu().numpy() for start, stop in itertools.pairwise(bounds)]
    rows: list[list[int]] = []  # of each sequence, where its tokens are among those that are computed
    tokens: list[int] = []
    cuts: set[int] = {0}
    for index, sequence in enumerate(sequences):
        best, shared = 0, 0
        for other in range(index):
            size = min(len(sequence), len(sequences[other]))
            if size > shared and sequence[shared] == sequences[other][shared]:
                differs = (sequence[:size] != sequences[other][:size]).nonzero()[0]
                found = int(differs[0]) if len(differs) else size
                if found > shared:
                    best, shared = other, found
        shared = shared if shared >= least else 0
        own = range(len(tokens), len(tokens) + len(sequence) - shared)
        cuts |= {own.start, own.stop}
        if shared:
            cuts.add(rows[best][shared - 1] + 1)
        rows.append((rows[best][:shared] if shared else []) + list(own))
        tokens += range(bounds[index] + shared, bounds[index + 1])
    order = sorted(cuts)
    number = {start: segment for segment, start in enumerate(order)}
    paths = tuple(tuple(number[row] for row in found if row in number) for found in rows)
    made, kept = -1, []
    for path in paths:
        kept.append(sum(segment <= made for segment in path))
        made = max(made, *path)
    return Tree(
        tokens=torch.tensor(tokens),
        lengths=tuple(stop - start for start, stop in itertools.pairwise(order)),
        paths=paths,
        kept=tuple(kept),
    )


def apply_to(causal: Any) -> bool:
    """Have a transformers model attend along trees, if it mixes tokens by scaled dot products alone; whether it does.

    Without a tree its attention is "sdpa", as before.
    """
    import transformers
    from transformers.masking_utils import sdpa_mask

    config = causal.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or LAYERS)
    if config._attn_implementation != "sdpa" or not kinds <= LAYERS or not causal._supports_attention_backend:
        return False
    transformers.AttentionInterface.register(ATTENTION, _attention)
    transformers.AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    causal.set_attn_implementation(ATTENTION)
    return True


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    tree: Tree | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """The attention that transformers calls: "sdpa", or along a tree."""
    if tree is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, sliding_window=sliding_window, **more
        )
    for name in ("softcap", "s_aux", "position_bias"):
        if more.get(name) is not None:
            raise refuse("PolicyModel", "attention", f"'eager' for a model with {name}", "'sdpa'")
    return tree.attend(query, key, value, scaling, sliding_window), None


def _joined(parts: tuple[Tensor, ...], path: tuple[int, ...]) -> Tensor:
    return parts[path[0]] if len(path) == 1 else torch.cat([parts[segment] for segment in path], dim=2)
