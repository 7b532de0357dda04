"""What the model tests share: one tiny Llama."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import make_checkpoint


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """(folder, transformers' model) of a tiny Llama."""
    folder = tmp_path_factory.mktemp("llama")
    return folder, make_checkpoint(folder, "llama")
