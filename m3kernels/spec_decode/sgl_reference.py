"""The tree ops that sgl-kernel has, in plain torch: its names, argument order, dtypes and index meaning.

They write into the caller's buffers and leave every other entry as it was. ``retrive_index[b, i]`` is the global index
of node i of request b, the place of its token in ``predicts`` and its name in ``accept_index``; ``retrive_next_token``
and ``retrive_next_sibling`` are local links, -1 none. Probabilities are compared in fp32, as sgl-kernel does; sums over
a row are taken in fp64. Source: SGLang 0.5.23, kernels/ops/speculative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from m3kernels.checks import refuse

FULL_MASK, QLEN_ONLY, BIT_PACKED = range(3)  # of tree_mask_mode
SMALLEST_THRESHOLD = 1e-9  # of threshold_acc


def bytes_per_row(nodes: int) -> int:
    """Of a bit-packed mask: 1, 2 or 4 bytes, beyond 32 nodes whole 32-bit words."""
    return 1 if nodes <= 8 else 2 if nodes <= 16 else -(-nodes // 32) * 4


def raw_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor of any dtype, sharing its memory."""
    return tensor.view(-1).view(torch.uint8)


# -- building ---------------------------------------------------------------------------------------------------------
def build_tree_kernel_efficient(
    parent_list: Tensor,
    selected_index: Tensor,
    verified_seq_len: Tensor,
    tree_mask: Tensor,
    positions: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    topk: int,
    depth: int,
    draft_token_num: int,
    tree_mask_mode: int,
) -> None:
    op, nodes = "build_tree_kernel_efficient", draft_token_num
    lengths = verified_seq_len.tolist()
    if min(lengths, default=0) < 0:
        raise refuse(op, "verified_seq_len", "values of at least 0", f"{min(lengths)}")
    parents = [
        _parents(op, selected, row, topk)
        for selected, row in zip(selected_index.tolist(), parent_list.tolist(), strict=True)
    ]
    mask, where = raw_bytes(tree_mask), positions.view(-1)
    if tree_mask_mode == FULL_MASK and len(mask) < nodes * (sum(lengths) + nodes * len(lengths)):
        raise refuse(op, "tree_mask", f"at least {nodes * (sum(lengths) + nodes * len(lengths))} bytes", tree_mask)
    start = 0
    for b, length in enumerate(lengths):
        retrive_index[b] = torch.arange(b * nodes, (b + 1) * nodes, device=retrive_index.device)
        for i in range(nodes - 1, 0, -1):
            parent = parents[b][i]
            if parent >= 0:
                elder = int(retrive_next_token[b, parent])
                if elder != -1:
                    retrive_next_sibling[b, i] = elder
                retrive_next_token[b, parent] = i
        for i in range(nodes):
            path, node = [], i
            while node > 0:
                path.append(node)
                node = parents[b][node]
            where[b * nodes + i] = length + len(path)
            if tree_mask_mode == BIT_PACKED:
                width = bytes_per_row(nodes)
                row = mask[(b * nodes + i) * width :][:width]
                row[0] = 1
                for node in path:
                    row[node // 8] |= 1 << node % 8
            else:
                row = mask[start + length :][:nodes] if tree_mask_mode == FULL_MASK else mask[start:][:nodes]
                row[:] = 0
                row[[0, *path]] = 1
                start += nodes + (length if tree_mask_mode == FULL_MASK else 0)


def _parents(op: str, selected: list[int], row: list[int], topk: int) -> list[int]:
    """Parent of each node, 0 the root, -1 for the root itself and where the parent was not selected."""
    place = {index: node for node, index in reversed(list(enumerate(selected, start=1)))}
    parents = [-1]
    for index in selected:
        column = index // topk
        if index < 0 or (column > 0 and column >= len(row)):
            raise refuse(op, "selected_index", f"values in 0..{max(topk, len(row) * topk) - 1}", f"{index}")
        parents.append(0 if column == 0 else place.get(row[column], -1))
    for start in range(1, len(parents)):
        node, steps = start, 0
        while node > 0:
            node, steps = parents[node], steps + 1
            if steps > len(selected):
                raise refuse(op, "parent_list", "a tree", f"node {start} among its own ancestors")
    return parents


def reconstruct_indices_from_tree_mask(
    tree_mask: Tensor,
    verified_seq_len: Tensor,
    positions: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    batch_size: int,
    draft_token_num: int,
) -> None:
    nodes, device = draft_token_num, tree_mask.device
    square = raw_bytes(tree_mask)[: batch_size * nodes * nodes].view(batch_size, nodes, nodes) != 0
    ancestors = square.tril(-1)  # [b, i, j]: j is an ancestor of i
    ids = torch.arange(nodes, device=device)
    parent = torch.where(ancestors, ids, -1).amax(-1) if batch_size else ids.new_empty(0, nodes)
    child = torch.where(ancestors, ids[:, None], nodes).amin(1) if batch_size else parent
    siblings = (parent[:, :, None] == parent[:, None, :]) & (parent[:, :, None] >= 0)
    younger = torch.where(siblings.tril(-1), ids[:, None], nodes).amin(1) if batch_size else parent
    positions.view(-1).copy_((ancestors.sum(-1) + verified_seq_len[:, None]).view(-1))
    retrive_index.copy_(torch.arange(batch_size * nodes, device=device).view(batch_size, nodes))
    retrive_next_token.copy_(torch.where(child < nodes, child, -1))
    retrive_next_sibling.copy_(torch.where(younger < nodes, younger, -1))


# -- walking ----------------------------------------------------------------------------------------------------------
class _Links:
    """The trees of a call, checked: every node that can be reached has one parent and lies where it may."""

    def __init__(
        self, op: str, candidates: Tensor, index: Tensor, next_token: Tensor, next_sibling: Tensor, vocabulary: int
    ) -> None:
        self.op, self.vocabulary = op, vocabulary
        self.candidates, self.index = candidates.tolist(), index.tolist()
        self.next_token, self.next_sibling = next_token.tolist(), next_sibling.tolist()
        self.nodes = candidates.shape[1]
        for b in range(len(self.candidates)):
            self._check(b)

    def children(self, b: int, node: int) -> list[int]:
        found, child, name = [], self.next_token[b][node], "retrive_next_token"
        while child != -1:
            if not 0 < child < self.nodes or child in found:
                want = f"a tree: -1 or a node of 1..{self.nodes - 1}, each once"
                raise refuse(self.op, name, want, f"{child} in request {b}")
            found.append(child)
            child, name = self.next_sibling[b][child], "retrive_next_sibling"
        return found

    def _check(self, b: int) -> None:
        seen, waiting = {0}, [0]
        while waiting:
            node = waiting.pop()
            self.check_node(b, node)
            for place, child in enumerate(self.children(b, node)):
                if child in seen:
                    name = "retrive_next_sibling" if place else "retrive_next_token"
                    want = f"a tree: -1 or a node of 1..{self.nodes - 1}, each once"
                    raise refuse(self.op, name, want, f"{child} in request {b}")
                seen.add(child)
                waiting.append(child)

    def check_node(self, b: int, node: int) -> None:
        index, most = self.index[b][node], len(self.index) * self.nodes - 1
        if not 0 <= index <= most:
            raise refuse(self.op, "retrive_index", f"values in 0..{most}", f"{index}")
        token = self.candidates[b][node]
        if node and self.vocabulary >= 0 and not 0 <= token < self.vocabulary:
            raise refuse(self.op, "candidates", f"tokens in 0..{self.vocabulary - 1}", f"{token}")


def verify_tree_greedy(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    target_predict: Tensor,
) -> None:
    op = "verify_tree_greedy"
    trees = _Links(op, candidates, retrive_index, retrive_next_token, retrive_next_sibling, -1)
    targets = target_predict.reshape(-1).tolist()
    for b in range(len(candidates)):
        node, last, accepted = 0, trees.index[b][0], 0
        accept_index[b, 0] = last
        while accepted + 1 < accept_index.shape[1]:
            match = [c for c in trees.children(b, node) if trees.candidates[b][c] == targets[last]]
            if not match:
                break
            predicts[last] = targets[last]
            node, accepted = match[0], accepted + 1
            last = trees.index[b][node]
            accept_index[b, accepted] = last
        accept_token_num[b] = accepted
        predicts[last] = targets[last]


# -- sampling ---------------------------------------------------------------------------------------------------------
def tree_speculative_sampling_target_only(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    uniform_samples: Tensor,
    uniform_samples_for_final_sampling: Tensor,
    target_probs: Tensor,
    draft_probs: Tensor | None,
    threshold_single: float,
    threshold_acc: float,
    deterministic: bool,
) -> None:
    op, width = "tree_speculative_sampling_target_only", accept_index.shape[1]
    trees = _Links(op, candidates, retrive_index, retrive_next_token, retrive_next_sibling, target_probs.shape[2])
    single = torch.tensor(threshold_single, dtype=torch.float32)
    enough = torch.tensor(max(threshold_acc, SMALLEST_THRESHOLD), dtype=torch.float32)
    for b in range(len(candidates)):
        node, last, accepted = 0, trees.index[b][0], 0
        accept_index[b, 0] = last
        rejected: list[int] = []
        while accepted + 1 < width:
            coin, mass, rejected, taken = uniform_samples[b, node], torch.zeros(()), [], -1
            for child in trees.children(b, node):
                token = trees.candidates[b][child]
                p = target_probs[b, node, token].float().cpu()
                mass = mass + p
                if p > 0 and (coin.cpu() < mass / enough or p >= single):
                    taken = child
                    break
                rejected.append(token)
                if draft_probs is not None:
                    draft_probs[b, node, token] = target_probs[b, node, token]
            if taken < 0:
                break
            predicts[last] = trees.candidates[b][taken]
            node, accepted = taken, accepted + 1
            last = trees.index[b][node]
            accept_index[b, accepted] = last
        accept_token_num[b] = accepted
        mass = target_probs[b, node].float()
        if accepted + 1 < width:
            if draft_probs is not None:
                mass = mass - draft_probs[b, node].float()
            else:
                mass = mass.index_fill(0, torch.tensor(rejected, dtype=torch.int64, device=mass.device), 0.0)
        predicts[last] = _invert(mass, uniform_samples_for_final_sampling[b])


def chain_speculative_sampling(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    uniform_samples: Tensor,
    uniform_samples_for_final_sampling: Tensor,
    target_probs: Tensor,
    draft_probs: Tensor,
    threshold_single: float,
    threshold_acc: float,
    deterministic: bool,
    block_verification: bool,
) -> None:
    op, slots = "chain_speculative_sampling", candidates.shape[1]
    none = torch.full_like(candidates, -1)
    trees = _Links(op, candidates, retrive_index, none, none, target_probs.shape[2])
    for b in range(len(candidates)):
        for slot in range(slots):
            trees.check_node(b, slot)
    for b in range(len(candidates)):
        drafts = candidates[b, 1:, None]
        p = target_probs[b, : slots - 1].float().gather(1, drafts)[:, 0].cpu()
        q = draft_probs[b, : slots - 1].float().gather(1, drafts)[:, 0].cpu()
        proposed = (q > 0) & (q <= 1)
        coins = uniform_samples[b, : slots - 1].cpu()
        scale = torch.ones(())
        if block_verification:
            accepted, scale = _longest_block(target_probs[b], draft_probs[b], coins, p, q, proposed)
        else:
            accepted = int((proposed & (coins * q < p)).int().cumprod(0).sum())
        path = trees.index[b][: accepted + 1]
        accept_index[b, : accepted + 1] = torch.tensor(path, dtype=accept_index.dtype)
        for slot in range(accepted):
            predicts[path[slot]] = candidates[b, slot + 1]
        accept_token_num[b] = accepted
        mass = target_probs[b, accepted].float()
        if accepted + 1 < slots:
            mass = scale.to(mass.device) * mass - _proposal(draft_probs[b, accepted])
        predicts[path[-1]] = _invert(mass, uniform_samples_for_final_sampling[b])


def _longest_block(
    target: Tensor, draft: Tensor, coins: Tensor, p: Tensor, q: Tensor, proposed: Tensor
) -> tuple[int, Tensor]:
    """(drafts accepted, scale of the target in the residual): the longest prefix whose coin lets it pass."""
    prefix, prefixes = torch.ones(()), []
    for step in range(len(coins)):
        ratio = (prefix * p[step] / q[step]).clamp(max=1.0)
        prefix = ratio if proposed[step] and ratio >= 0 else torch.zeros(())
        prefixes.append(prefix)
    for step in range(len(coins), 0, -1):
        prefix = prefixes[step - 1]
        chance = prefix
        if step < len(coins) and 0 < prefix < 1:
            residual = _positive(prefix.to(target.device) * target[step].float() - _proposal(draft[step]))
            total = residual.double().sum().float().cpu()
            chance = total / (total + 1 - prefix)
        if coins[step - 1] < prefix and coins[step - 1] < chance:
            return step, prefix
    return 0, torch.ones(())


def _proposal(row: Tensor) -> Tensor:
    """A row of the draft's law, fp32; what is no probability counts 0."""
    row = row.float()
    return row.where((row >= 0) & (row <= 1), 0.0)


def _positive(mass: Tensor) -> Tensor:
    return mass.where(mass > 0, 0.0)


def _invert(mass: Tensor, coin: Tensor) -> int:
    """First token whose cumulative mass exceeds coin * total; without one the last with mass; without mass the last."""
    mass = _positive(mass).double()
    upto = mass.cumsum(0)
    beyond = (upto > coin * upto[-1].float()).nonzero()
    if len(beyond):
        return int(beyond[0])
    present = mass.nonzero()
    return int(present[-1]) if len(present) else len(mass) - 1
