"""verl's seams: its fused linear head over our kernels, and the check that its registries hold our names.

What is registered (verl_spar.py, verl_clinic.py) is so by the entry point "m3" of the group ``verl.plugins``, which
verl loads in every process that imports it. verl swallows what goes wrong there: call ``assert_registered()`` before
a run.

The fused head. verl's models call ``FusedLinearForPPO`` where ``actor_rollout_ref.model.use_fused_kernels=True``; with
``fused_kernel_options.impl_backend=liger`` that calls ``.apply`` of a variable of its module. ``install()`` puts ours
there; every process that trains must call it: let ``VERL_USE_EXTERNAL_MODULES`` name a module of yours that does.
Tested with verl 0.9.1.
"""

from __future__ import annotations

import importlib
import sys

import torch
from torch import Tensor, nn

from m3.plugins.liger import fused_linear_scaled_cross_entropy
from m3kernels.checks import is_strided, refuse
from m3kernels.policy_loss import linear_logprobs

SEAM = "verl.utils.experimental.torch_functional"
VARIABLE = "_LIGER_FUSED_LINEAR_SCALED_CROSS_ENTROPY"
REGISTRATIONS = "m3.plugins.verl_registrations"


class FusedLinearScaledCrossEntropy:
    """``fused_linear_scaled_cross_entropy`` behind the name by which verl calls it."""

    apply = staticmethod(fused_linear_scaled_cross_entropy)


def install() -> None:
    """Make verl's ``impl_backend: liger`` run our kernels.

    Raises:
        ImportError: verl is not installed, or has no such seam: its version is not one that is supported.
    """
    module = importlib.import_module(SEAM)
    if not hasattr(module, VARIABLE):
        raise ImportError(f"install: {SEAM}: want a variable {VARIABLE} (verl 0.9); got none")
    setattr(module, VARIABLE, FusedLinearScaledCrossEntropy)


def assert_registered() -> None:
    """Make sure that verl knows our names here, and will in its workers.

    Raises:
        ImportError: verl is not installed; or what verl swallowed while it loaded the entry point.
        RuntimeError: verl did not load the entry point, so its workers will not either; or a name is another's.
    """
    importlib.import_module("verl")
    loaded = REGISTRATIONS in sys.modules
    registrations = importlib.import_module(REGISTRATIONS)
    if taken := registrations.missing():
        raise RuntimeError(f"assert_registered: want our own under these names in verl; got others: {', '.join(taken)}")
    if not loaded:
        raise RuntimeError(
            f"assert_registered: want verl to load {REGISTRATIONS} by itself; install m3-clinical (entry point 'm3' of "
            f"'verl.plugins'), allow it in VERL_USE_EXTERNAL_PLUGINS, or set VERL_USE_EXTERNAL_MODULES={REGISTRATIONS}"
        )


class FusedLinearForPPO(nn.Module):
    """verl's ``FusedLinearForPPO``: same names and results.

    ``chunk_size`` is without effect, memory is bounded in bytes; ``impl_backend`` is taken and ignored, there is one.
    Other than verl's, entropy is fp32 whatever the dtype of the hidden states, and gradients are accumulated in fp32.
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """(log-probabilities, entropies), in nats, fp32, of the shape of input_ids.

        Args:
            hidden_states: (B, L, D) or (T, D). vocab_weights: (V, D), cast to the dtype of hidden_states.
            input_ids: (B, L) or (T,), already shifted.
            temperature: > 0, divides the logits.
        """
        op = type(self).__name__
        if not is_strided(hidden_states) or hidden_states.ndim not in (2, 3):
            raise refuse(op, "hidden_states", "(B, L, D) or (T, D)", hidden_states)
        if not is_strided(input_ids) or input_ids.shape != hidden_states.shape[:-1]:
            raise refuse(op, "input_ids", f"{tuple(hidden_states.shape[:-1])}", input_ids)
        found = linear_logprobs(
            hidden_states.flatten(0, -2),
            vocab_weights.to(hidden_states.dtype),
            input_ids.flatten().to(torch.int64),
            temperature=temperature,
            entropy=True,
        )
        assert found.entropy is not None
        return found.logprobs.view(input_ids.shape), found.entropy.view(input_ids.shape)
