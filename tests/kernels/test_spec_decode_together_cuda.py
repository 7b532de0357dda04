"""A small INT4 model on the CUDA rooms alone decodes speculatively what it decodes token by token, bit for bit.

Products, attention, verification, trees and commit are CUDA kernels, on a GPU or emulated; drafts come from the
reference, since they may be anything.
"""

from __future__ import annotations

import dataclasses

import pytest
import test_spec_decode_together as together
import torch
from spec_decode_cases import Sampling
from test_spec_decode_together import SHAPES, Model, check_same
from torch import Tensor

from m3kernels.int4 import Int4Weight, int4_gemm
from m3kernels.spec_decode import reference
from m3kernels.spec_decode.types import Drafts

in_cuda = pytest.mark.parametrize("backend", ["cuda"], indirect=True)


@dataclasses.dataclass
class HalfModel(Model):
    """The model with products and attention in 16 bits."""

    def product(self, x: Tensor, weight: Int4Weight) -> Tensor:
        return int4_gemm(x.to(self.kv_dtype), weight).float()

    def attend(self, q: Tensor, *arguments: object, gate: Tensor, **options: object) -> Tensor:
        return super().attend(q.to(self.kv_dtype), *arguments, gate=gate.to(self.kv_dtype), **options).float()


def draft_in_reference(logits: Tensor, scores: Tensor, *, k: int, step: int) -> Drafts:
    return Drafts(*reference.draft_topk(logits, scores, None, None, None, k, step))


@pytest.fixture(autouse=True)
def short_text_in_16_bits(monkeypatch):
    monkeypatch.setattr(together, "LENGTH", 7)
    monkeypatch.setattr(together, "Model", HalfModel)
    monkeypatch.setattr(together, "draft_topk", draft_in_reference)


@in_cuda
@pytest.mark.skipif(torch.cuda.is_available(), reason="the tensors of this test are on the CPU")
@pytest.mark.parametrize(
    ("shape", "dtype"), [("small", torch.float16), ("deep", torch.bfloat16)], ids=["small", "deep"]
)
@pytest.mark.parametrize(("mode", "temperature"), [("greedy", 1.0), ("coupled", 0.8)])
def test_text_logits_and_cache_are_those_of_plain_decoding(backend, shape, dtype, mode, temperature):
    check_same((5, "auto", dtype), SHAPES[shape], Sampling(temperature=temperature, top_k=20), mode)
