"""One small call of every op that has CUDA kernels, compared with the reference: what compute-sanitizer is run on.

    compute-sanitizer --tool memcheck --error-exitcode 9 python -m bench.gpu_smoke [family ...]

Shapes are odd on purpose and small, because the tools slow a kernel down a hundredfold. Exit status 1: a wrong value.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.harness import relative_rms, use_room

LIMIT = 2e-2  # relative RMS in bf16; the tests have the real tolerances
Check = tuple[str, Callable[[], tuple[Tensor, Tensor]]]  # (name, call giving result and reference)


def int4_checks(device: str) -> Iterator[Check]:
    from m3kernels.int4 import Int4Weight, int4_gemm, int4_grouped_gemm, int4_moe
    from m3kernels.int4.reference import make_inputs

    def dense(weight: Int4Weight) -> Tensor:
        """fp64, without a room."""
        q, scales, zeros = (part.double() for part in weight.unpack())
        group = torch.arange(weight.in_features) // weight.group_size
        return (q - zeros[..., group]) * scales[..., group]

    for m, symmetric in ((1, True), (5, False), (70, True)):
        x, weight, _ = make_inputs(m, 192, 272, group_size=64, symmetric=symmetric, dtype=torch.bfloat16)

        def gemm(x: Tensor = x, weight: Int4Weight = weight) -> tuple[Tensor, Tensor]:
            given = (x.to(device), weight.to(device))
            return int4_gemm(*given, activations="exact"), x.double() @ dense(weight).T

        yield f"int4_gemm M={m}", gemm
    x, w13, _ = make_inputs(9, 128, 96, group_size=32, symmetric=True, experts=3, dtype=torch.bfloat16)
    _, w2, _ = make_inputs(9, 96, 64, group_size=32, symmetric=True, experts=3, seed=1)
    ids = torch.tensor([[0, 2], [1, 2], [2, 0]] * 3)
    weights = torch.rand(9, 2)
    offsets = torch.tensor([0, 4, 4, 9])

    def grouped() -> tuple[Tensor, Tensor]:
        experts = dense(w13)
        expected = torch.cat([x[:4].double() @ experts[0].T, x[4:].double() @ experts[2].T])
        given = (x.to(device), w13.to(device), offsets.to(device))
        return int4_grouped_gemm(*given, activations="exact"), expected

    def moe() -> tuple[Tensor, Tensor]:
        up, down = dense(w13), dense(w2)
        expected = torch.zeros(9, 96, dtype=torch.float64)
        for token, slot in torch.cartesian_prod(torch.arange(9), torch.arange(2)).tolist():
            expert = int(ids[token, slot])
            gate, value = (up[expert] @ x[token].double()).chunk(2)
            expected[token] += weights[token, slot] * (down[expert] @ (torch.nn.functional.silu(gate) * value))
        given = (x.to(device), w13.to(device), w2.to(device), ids.to(device), weights.to(device))
        return int4_moe(*given, activations="exact"), expected

    yield "int4_grouped_gemm", grouped
    yield "int4_moe", moe


def spec_decode_checks(device: str) -> Iterator[Check]:
    from bench.spec_decode_arms import Attention, Commit, Finalize, SpecArm, Verify
    from bench.spec_decode_cases import AttentionCase, CommitCase, FinalizeCase, VerifyCase
    from bench.spec_decode_gpu import OnGpu, prepared

    def result(case: object, make: Callable[..., SpecArm[object]]) -> Callable[[], tuple[Tensor, Tensor]]:
        def check() -> tuple[Tensor, Tensor]:
            here, there = prepared(case, device)  # type: ignore[arg-type]
            arm = make([there], 1)
            error = OnGpu(arm, here, None).commit_error(there) if isinstance(arm, Commit) else None
            if error is None:
                error = arm.error(there, arm.call(there))
            return torch.tensor([1.0 + error]), torch.ones(1)

        return check

    for mode in ("greedy", "coupled", "target_only"):
        case = VerifyCase(name=mode, requests=3, nodes=9, vocabulary=4099, mode=mode, filtered=mode != "greedy")
        yield f"tree_verify {mode}", result(case, Verify)
    heads = {"heads": 8, "kv_heads": 2, "head_dim": 64}
    tree = AttentionCase(name="", context=600, queries=9, tree=True, requests=2, **heads)
    yield "tree_attention", result(tree, lambda problems, threads: Attention(problems, threads, gated=True))
    yield "tree_finalize", result(FinalizeCase(name="", requests=3, nodes=33, steps=4), Finalize)
    yield "tree_commit", result(CommitCase(name="", requests=3, layers=2, kv_heads=2, head_dim=64), Commit)


def policy_loss_checks(device: str) -> Iterator[Check]:
    from bench.policy_loss import OnePass
    from bench.workloads import LossHead, expected_loss, make_loss_problem

    head = LossHead(name="", tokens=24, hidden=64, vocabulary=1003)
    for part in ("d_hidden", "d_weight"):

        def check(part: str = part) -> tuple[Tensor, Tensor]:
            problem = make_loss_problem(head, "bf16", 0.7, device=device)
            expected = expected_loss(problem)
            OnePass(problem, torch.get_num_threads(), whole=False).run(0)
            found = {"d_hidden": problem.hidden.grad, "d_weight": problem.weight.grad}[part]
            assert found is not None
            return found, getattr(expected, part)

        yield f"linear_policy_loss {part}", check


FAMILIES = {"int4": int4_checks, "spec_decode": spec_decode_checks, "policy_loss": policy_loss_checks}


def run(families: list[str], device: str, room: str) -> int:
    """Print an error for every check; the number of wrong ones."""
    wrong = 0
    for family in families:
        use_room(f"{family}={room}")
        for name, check in FAMILIES[family](device):
            result, expected = check()
            error = relative_rms(result.cpu(), expected.cpu())
            good = error <= LIMIT
            wrong += not good
            print(f"{'ok   ' if good else 'WRONG'} {family}: {name}: {error:.1e}", flush=True)
    use_room(None)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_smoke", description=__doc__)
    parser.add_argument("families", nargs="*", metavar="family", help=f"of {', '.join(FAMILIES)}; default: all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--room", default="cuda")
    arguments = parser.parse_args()
    for family in arguments.families:
        if family not in FAMILIES:
            parser.error(f"want families of {', '.join(FAMILIES)}; got {family!r}")
    return 1 if run(arguments.families or list(FAMILIES), arguments.device, arguments.room) else 0


if __name__ == "__main__":
    sys.exit(main())
