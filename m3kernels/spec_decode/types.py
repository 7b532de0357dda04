"""Vocabulary of the spec_decode family: what its ops return, and the limits they share.

Shape letters: B requests, N nodes of a tree (its root included), V vocabulary, T query rows, H query heads, G key-value
heads, D head size, P pages, S slots of a path, k nodes expanded per step, M candidates of all steps.

A tree is given by links: ``next_token[b, i]`` is the first child of node i, ``next_sibling[b, i]`` its next younger
sibling, -1 none. Node 0 is the root: the last token that was emitted, which the target model has not read yet. A child
has a larger index than its parent, a younger sibling than its elder. ``mask_bits`` says the same as ancestors: bit
j % 32 of word j // 32 of row i is set iff node j is i or an ancestor of i.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

MODES = ("greedy", "target_only", "chain", "coupled")
LOGPROBS = ("none", "raw", "sampling")
MAX_NODES = 1024
BITS = 32  # of a word of mask_bits and grammar_bits
COLDEST = 1e-6  # smallest temperature above 0


class Drafts(NamedTuple):
    """One step of drafting. The first two are all candidates of the step, the others those that are expanded next."""

    tokens: Tensor  # (B, F, k) int64, target ids, best first
    cum_scores: Tensor  # (B, F, k) fp32, path log-probabilities in nats
    next_ids: Tensor  # (B, k) int64, target ids
    next_scores: Tensor  # (B, k) fp32
    src_row: Tensor  # (B, k) int32: which of the F rows each continues
    parents: Tensor  # (B, k) int64: index of each among the candidates of all steps


class Tree(NamedTuple):
    """Trees of B requests, ready for the target model."""

    candidates: Tensor  # (B, N) int64; -1 padding
    parents: Tensor  # (B, N) int32; -1 for the root and padding
    mask_bits: Tensor  # (B, N, ceil(N / 32)) int32
    positions: Tensor  # (B, N) int64: tokens before the node
    next_token: Tensor  # (B, N) int64
    next_sibling: Tensor  # (B, N) int64
    selected: Tensor  # (B, N - 1) int64, ascending; -1 padding


class Verified(NamedTuple):
    """What a verification emits."""

    tokens: Tensor  # (B, S) int64: accepted drafts, the bonus token, then -1
    accept_index: Tensor  # (B, S) int32: path of nodes from the root, then -1
    accept_length: Tensor  # (B,) int32: accepted drafts; the root and the bonus token are not counted
    logprobs: Tensor  # (B, S) fp32, nats, 0 after the last; (B, 0) if not asked for

    @property
    def bonus_token(self) -> Tensor:
        """(B,) int64: the token after the last accepted one, root of the next tree; -1 if no token is allowed there."""
        return self.tokens.gather(1, self.accept_length.long()[:, None])[:, 0]


class Committed(NamedTuple):
    """What a commit leaves beside the caches that it changes."""

    cache_seqlens: Tensor  # (B,) int32: keys in the cache
    hidden: Tensor | None  # (B, S, C): hidden states of the path, zeros after the last
