"""What the tests of several ranks run in each of their processes."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3.train import objective
from m3.train.distributed import joined
from m3.train.loop import Alone, train
from m3.train.metrics import MetricSum
from m3.train.policy_model import LoraConfig, PolicyModel, whole
from m3.train.stage import StepBatch
from m3.train.streams import Sample, pack
from tests.m3.train_cases import OBJECTIVES, DrawnSource, config, draw_samples

LENGTHS = {"five": (9, 4, 17, 12, 6), "one": (9,), "three": (9, 4, 7)}
PASSES: dict[str, dict[str, Any]] = {
    "spar": {"name": "spar"},
    "clip-forward-kl": {"name": "clip-forward-kl"},
    "mopd": {"name": "mopd"},
    "ppo-three-samples": {"name": "ppo", "lengths": "three"},
    "constant-one-sample": {"name": "constant", "lengths": "one"},
    "spar-lora": {"name": "spar", "lora": LoraConfig(rank=4)},
    "mopd-gradient-checkpointing": {"name": "mopd", "gradient_checkpointing": True},
}  # fmt: skip
