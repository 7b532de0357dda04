"""``python -m m3kernels``: what was built, what this machine can run, which room serves each op and why not another.

Each op is asked with the arguments of a small example call. Rooms of cuda are asked only where there is a device.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import platform
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from m3kernels import __version__, dispatch

DEVICES = ("cpu", "cuda")
NO_CUDA = "no CUDA device here"


class Service(NamedTuple):
    """Who serves one op on one device."""

    op: str
    device: str
    room: str  # "" if no room can
    others: tuple[tuple[str, str], ...]  # (room, why not), in the order tried before ``room``


# -- what is built ----------------------------------------------------------------------------------------------------
def facts() -> list[tuple[str, str]]:
    """(subject, finding) of this installation, in the order of the report."""
    return [
        ("m3kernels", __version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("triton", triton_fact()),
        ("cpu module", cpu_fact()),
        ("cuda module", cuda_fact()),
        ("M3KERNELS_BACKEND", os.environ.get("M3KERNELS_BACKEND") or "unset: the first room that can serve a call"),
    ]


def triton_fact() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cpu_fact() -> str:
    try:
        module = importlib.import_module("m3kernels._cpu_ext")
    except ImportError as error:
        return f"not built: {error}"
    built = "; ".join(f"{key} {spell(value)}" for key, value in module.build_info().items())
    return f"{built}; this CPU runs {spell(module.isas())}; chosen {module.get_isa()}"


def cuda_fact() -> str:
    try:
        module = importlib.import_module("m3kernels._cuda_ext")
    except ImportError as error:
        return f"not built: {error}"
    info = module.build_info()
    devices = ", ".join(
        f"{device['name']} (sm_{''.join(map(str, device['capability']))})" for device in info["devices"]
    )
    driver = cuda_version(info["driver"]) if info["driver"] else "none"
    built = f"archs {info['archs']}; runtime {cuda_version(info['runtime'])}; driver {driver}"
    return f"{built}; {info['problem'] or devices}"


def cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def spell(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


# -- which room serves what -------------------------------------------------------------------------------------------
def decoder_examples() -> dict[str, Callable[[], object]]:
    from m3kernels import decoder
    from m3kernels.decoder.reference import make_inputs

    inputs = make_inputs(2, 5, 7, bias=True)
    return {"linear": lambda: decoder.linear(*inputs)}


def int4_examples() -> dict[str, Callable[[], object]]:
    from m3kernels import int4
    from m3kernels.int4.reference import make_inputs

    x, weight, _ = make_inputs(2, 64, 64, group_size=32)
    w13, w2 = (make_inputs(2, n, 64, group_size=32, experts=2)[1] for n in (128, 64))
    topk_ids, topk_weights = torch.tensor([[0], [1]]), torch.ones(2, 1)
    return {
        "int4_gemm": lambda: int4.int4_gemm(x, weight),
        "int4_grouped_gemm": lambda: int4.int4_grouped_gemm(x, w2, torch.tensor([0, 1, 2])),
        "int4_moe": lambda: int4.int4_moe(x, w13, w2, topk_ids, topk_weights),
        "int4_dequantize": lambda: int4.int4_dequantize(weight),
    }


def policy_loss_examples() -> dict[str, Callable[[], object]]:
    from m3kernels import policy_loss as p
    from m3kernels.policy_loss.reference import make_inputs

    x = make_inputs(4, 8, 16)
    head, row = (x["hidden"], x["weight"]), x["advantages"]
    teacher = {"teacher_hidden": x["hidden"], "teacher_weight": x["weight"], "mask": x["mask"]}
    return {
        "linear_logprobs": lambda: p.linear_logprobs(*head, x["ids"]),
        "linear_logprobs_backward": lambda: p.linear_logprobs_backward(*head, x["ids"], row, row),
        "linear_policy_loss": lambda: p.linear_policy_loss(*head, x["ids"], row, mask=x["mask"]),
        "linear_distill_loss": lambda: p.linear_distill_loss(*head, spec=p.DistillSpec(divergence="js"), **teacher),
    }


def spec_decode_examples() -> dict[str, Callable[[], object]]:
    from m3kernels import spec_decode as s
    from m3kernels.spec_decode.reference import make_inputs

    x = make_inputs(1, 3, 8)
    candidates, links = x["candidates"], (x["next_token"], x["next_sibling"])
    one, zero, cache = torch.ones(1, dtype=torch.int64), torch.zeros(1, 1), torch.zeros(1, 4, 1, 8)
    path, length = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    table, minus = length[:, None], torch.full((1, 3), -1)
    written = (
        torch.zeros(3, dtype=torch.int32),
        path.clone(),
        length.clone(),
        candidates,
        torch.arange(3)[None],
        *links,
    )
    coins = (torch.zeros(1, 3), torch.zeros(1))
    probs = x["logits"].softmax(-1)
    mask, positions = torch.zeros(9, dtype=torch.bool), torch.zeros(3, dtype=torch.int64)
    index, first_child, sibling = (minus.clone() for _ in range(3))
    return {
        "draft_topk": lambda: s.draft_topk(x["logits"][:, :1], zero, k=2, step=0),
        "tree_finalize": lambda: s.tree_finalize(zero, one[:, None], -one[:, None], one, one, topk=1, num_nodes=2),
        "tree_attention": lambda: s.tree_attention(torch.zeros(1, 1, 2, 8), cache, cache, table, one),
        "tree_verify": lambda: s.tree_verify(x["logits"], candidates, *links, mode="greedy"),
        "tree_commit": lambda: s.tree_commit(path, length, [cache], [cache.clone()], table, length),
        "tree_budget": lambda: s.tree_budget(zero, torch.ones(3)),
        "build_tree_kernel_efficient": lambda: s.build_tree_kernel_efficient(
            -one[:, None], torch.tensor([[0, 1]]), 0 * one, mask, positions, index, first_child, sibling, 2, 1, 3, 1
        ),
        "verify_tree_greedy": lambda: s.verify_tree_greedy(*written, candidates),
        "tree_speculative_sampling_target_only": lambda: s.tree_speculative_sampling_target_only(
            *written, *coins, probs, None
        ),
        "chain_speculative_sampling": lambda: s.chain_speculative_sampling(
            written[0], minus[:, :3].int(), *written[2:], *coins, probs, probs[:, :2]
        ),
        "reconstruct_indices_from_tree_mask": lambda: s.reconstruct_indices_from_tree_mask(
            torch.eye(3, dtype=torch.bool).flatten(), one, positions, index, first_child, sibling, 1, 3
        ),
    }


# family -> op -> a small valid call of its public function
EXAMPLES = {
    "decoder": decoder_examples,
    "int4": int4_examples,
    "policy_loss": policy_loss_examples,
    "spec_decode": spec_decode_examples,
}


class Record(TorchDispatchMode):
    """Keeps the arguments with which m3kernels' ops are called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "m3kernels":
            self.calls[func._schema.name.partition("::")[2]] = args
        return func(*args, **(kwargs or {}))


def services() -> list[Service]:
    """For every op and device: the room that serves the op's example call, and why the rooms before it do not."""
    return [
        service(family, op, call, device) for family in EXAMPLES for op, call in calls(family) for device in DEVICES
    ]


def calls(family: str) -> list[tuple[str, tuple[Any, ...]]]:
    """(op, arguments of the registered op) of each example of a family."""
    record = Record()
    with record, torch.no_grad():
        for example in EXAMPLES[family]().values():
            with contextlib.suppress(dispatch.BackendError):  # a room forced by name: explain() has the reason
                example()
    return list(record.calls.items())


def service(family: str, op: str, args: tuple[Any, ...], device: str) -> Service:
    package = f"m3kernels.{family}"
    if device == "cuda" and not torch.cuda.is_available():
        reasons = [(room.name, room.absent or NO_CUDA) for room in dispatch.rooms(package, op, device)]
    else:
        reasons = dispatch.explain(package, op, *(arg.to(device) if isinstance(arg, Tensor) else arg for arg in args))
    served = next((index for index, (_, why) in enumerate(reasons) if not why), len(reasons))
    room = reasons[served][0] if served < len(reasons) else ""
    return Service(op, device, room, tuple(reasons[:served]))


# -- the report -------------------------------------------------------------------------------------------------------
def report() -> str:
    """Everything above as text."""
    found = facts()
    width = max(len(subject) for subject, _ in found)
    lines = [f"{subject:<{width}}  {finding}" for subject, finding in found]
    lines += ["", f"{'op':<40}{'device':<8}{'served by':<11}not by"]
    for op, device, room, others in services():
        reasons = "; ".join(f"{name}: {why}" for name, why in others)
        lines.append(f"{op:<40}{device:<8}{room or 'no room':<11}{reasons}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
