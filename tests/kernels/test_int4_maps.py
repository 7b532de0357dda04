"""Index maps and plans that CUDA kernels share with the host: compiled for the host, held against the packer."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from m3kernels.int4.types import ceil_div, pack_groups, pack_nibbles

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    built = tmp_path_factory.mktemp("maps") / "check"
    command = [
        "g++",
        "-std=c++20",
        "-O0",
        f"-I{HERE.parent.parent / 'csrc'}",
        HERE / "int4_maps_check.cpp",
        "-o",
        built,
    ]
    subprocess.run(command, check=True)
    return built


def run(program, *arguments: object) -> list[list[int]]:
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=True)
    return [[int(word) for word in line.split()] for line in done.stdout.splitlines()]


def test_every_element_is_where_the_packer_puts_it(program):
    n, k, byte, shift, position = torch.tensor(run(program, "maps")).T
    assert len(set(zip(n.tolist(), k.tolist(), strict=True))) == 64 * 16
    q = torch.randint(0, 16, (64, 16), dtype=torch.uint8)
    packed = pack_nibbles(q).view(torch.uint8).flatten()
    assert packed.shape == (512,)
    assert torch.equal(packed[byte].int() >> shift & 15, q[n, k].int())
    scales = torch.rand(64, 1)
    assert torch.equal(pack_groups(scales).flatten()[position], scales[n, 0])


SHAPES = [  # of docs/benchmarks.md, and odd ones
    (9216, 4096), (4096, 8192), (7168, 5120), (55296, 5120), (5120, 27648), (4096, 12288), (8192, 28672), (3072, 4096),
    (4096, 192), (64, 16), (1, 1), (130, 200), (128, 100000),
]  # fmt: skip


@pytest.mark.parametrize("grouped", [0, 1])
@pytest.mark.parametrize("processors", [4, 108, 132])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_parts_cover_every_column_once(program, n, k, grouped, processors):
    ((part_tiles, split_parts, splits),) = run(program, "plan", n, k, grouped, processors)
    tiles = ceil_div(k, 16)
    assert part_tiles >= 1 and split_parts >= 1
    assert part_tiles * split_parts * splits >= tiles, "the parts reach the end"
    assert part_tiles * split_parts * (splits - 1) < tiles, "no split is empty"
    assert splits == 1 or not grouped
