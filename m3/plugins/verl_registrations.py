"""What verl's plug-in loader imports: registers the names of verl_spar.py and verl_clinic.py, and can say if it did."""

from __future__ import annotations

from collections.abc import Iterator

from verl.experimental.agent_loop.agent_loop import _agent_loop_registry
from verl.experimental.reward_loop.reward_manager import get_reward_manager_cls
from verl.trainer.distillation.losses import get_distillation_loss_fn
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn

from m3.plugins import verl_clinic, verl_spar


def missing() -> list[str]:
    """Names that verl's registries do not know, or know as somebody else's."""
    return list(_missing())


def _missing() -> Iterator[str]:
    loop = f"{verl_clinic.ConsultationLoop.__module__}.{verl_clinic.ConsultationLoop.__qualname__}"
    if _agent_loop_registry.get("m3_clinic", {}).get("_target_") != loop:
        yield "agent loop m3_clinic"
    for kind, find, name, ours in (
        ("advantage estimator", get_adv_estimator_fn, "spar", verl_spar.advantages),
        ("policy loss", get_policy_loss_fn, "spar", verl_spar.spar_loss),
        ("policy loss", get_policy_loss_fn, "spar_step", verl_spar.spar_step_loss),
        ("distillation loss", get_distillation_loss_fn, "clip_forward_kl", verl_spar.clip_forward_kl_loss),
        ("reward manager", get_reward_manager_cls, "m3_stage", verl_clinic.StageRewardManager),
    ):
        try:
            known = find(name) is ours
        except ValueError:  # how verl says that it does not know a name
            known = False
        if not known:
            yield f"{kind} {name}"
