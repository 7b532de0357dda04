"""Rows as a GPU gives them, for the tests of the benchmarks."""

from __future__ import annotations

from bench import record

MACHINE = {
    "gpu": "NVIDIA H100 80GB HBM3",
    "cpu": "some cpu",
    "cores": 16,
    "python": "3.12.3",
    "versions": {"torch": "2.11.0"},
}
WHERE = {
    "device": "cuda",
    "threads": 1,
    "case_threads": 1,
    "commit": "0123456789ab",
    "dirty": False,
    "machine": MACHINE,
    "date": "2026-11-22T00:00:00+00:00",
    "command": "python -m bench",
}


def gemm_row(**changes: object) -> record.GemmRow:
    values = {
        "op": "int4_gemm",
        "shape": "8192x8192",
        "m": 1,
        "n": 8192,
        "k": 8192,
        "group_size": 128,
        "symmetric": True,
        "arm": "m3_cuda",
        "computes": "bf16",
        "lossy": True,
        "x_dtype": "bf16",
        "timing": "cold",
        "launch": "graph",
        "gate": "passed",
        "error": 2e-3,
        "tolerance": 1e-2,
        "median_s": 16e-6,
        "p20_s": 15e-6,
        "p80_s": 18e-6,
        "rounds": 200,
        "gmacs": 4194.0,
        "gbytes_s": 2162.0,
        "weight_bytes": 34603008,
        "spec_share": 0.645,
        "ratios": {"torch_dense": (3.4, 3.3, 3.5), "humming": (1.6, 1.5, 1.7)},
    }
    return record.GemmRow(**{**values, **WHERE, **changes})


UNTIMED = dict.fromkeys(record.GemmRow.TIMED)


def loss_row(**changes: object) -> record.LossRow:
    values = {
        "op": "linear_policy_loss",
        "shape": "qwen3-8b.t8192",
        "arm": "m3_one_pass@cuda",
        "tokens": 8192,
        "hidden": 4096,
        "vocabulary": 151936,
        "sequences": 4,
        "dtype": "bf16",
        "density": 1.0,
        "gradient_bytes": 2 * 4096 * (8192 + 151936),
        "gate": "passed",
        "error": 3e-3,
        "tolerance": 1e-2,
        "errors": {"loss": 1e-5, "d_hidden": 3e-3, "d_weight": 2e-3},
        "median_s": 49e-3,
        "ratios": {"gemms": (0.8, 0.79, 0.81), "liger_ce": (1.2, 1.1, 1.3)},
        "peak_bytes": 2 * 4096 * 8192 + 4 * 4096 * 151936 + (1 << 30),
    }
    return record.LossRow(**{**values, **WHERE, **changes})
