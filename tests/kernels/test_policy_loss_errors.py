"""Every documented error of the policy_loss family with its whole message; what is taken as it is; forced rooms."""

from __future__ import annotations

import enum
import re
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from m3kernels import BackendError
from m3kernels.policy_loss import (
    DistillSpec,
    LossSpec,
    linear_distill_loss,
    linear_logprobs,
    linear_logprobs_backward,
    linear_policy_loss,
    policy_loss_from_logprobs,
)
from m3kernels.policy_loss.reference import make_inputs
from m3kernels.testing import bitwise_equal

CASE = make_inputs(6, 4, 9, sequences=2, bias=True)
H, W, B, IDS = (CASE[key] for key in ("hidden", "weight", "bias", "ids"))
STREAMS = {key: CASE[key] for key in ("advantages", "old_logprobs", "ref_logprobs", "sampler_logprobs")}
LAYOUT = {key: CASE[key] for key in ("mask", "segment_ids", "cu_seqlens")}
ONES, ROW = torch.ones(6), torch.zeros(6)
NAN, INF, BIG = float("nan"), float("inf"), 10**400
TEACHER = make_inputs(6, 3, 9, seed=1, bias=True)


def parameter(main_grad: object) -> Tensor:
    """W as a parameter that has a main_grad."""
    found = torch.nn.Parameter(W.clone())
    found.main_grad = main_grad  # type: ignore[attr-defined]
    return found


# -- refusals ---------------------------------------------------------------------------------------------------------
LOGPROBS = dict(hidden=H, weight=W, ids=IDS, bias=B)
BACKWARD = dict(hidden=H, weight=W, ids=IDS, bias=B, lse=ONES, grad_logprobs=ROW)
POLICY = dict(hidden=H, weight=W, ids=IDS, bias=B, **STREAMS, **LAYOUT)
PADDED = dict(
    hidden=H.view(2, 3, 4), weight=W, ids=IDS.view(2, 3), advantages=torch.ones(2), mask=torch.ones(2, 3)
)  # fmt: skip
FROM = dict(logprobs=-ONES, **STREAMS, **LAYOUT)
DISTILL = dict(hidden=H, weight=W, ids=IDS, teacher_logprobs=-ONES, mask=ONES)
FULL = dict(
    hidden=H, weight=W, mask=ONES, spec=DistillSpec(divergence="js"),
    **{f"teacher_{key}": TEACHER[key] for key in ("hidden", "weight", "bias")},
)  # fmt: skip
NAMES = "float32, bfloat16, float16 or float64, D >= 1"
WEIGHT = "weight: want (V, 4) torch.float32 on cpu, like hidden, V >= 1; got "
BIAS = "bias: want (9,) torch.float32 on cpu, or None; got "
COLUMNS = "ids: want (6,) or (6, K) int32 or int64 on cpu; got "
PLAIN_IDS = "ids: want (6,) int32 or int64 on cpu; got "
TEMPERATURE = "temperature: want a number > 0, or (6,) floating point > 0; got "
SOFTCAP = "softcap: want a finite number >= 0; got "
SCALE = "logit_scale: want a finite number, not 0; got "
WORKSPACE = "workspace_bytes: want an int >= 1, or None; got "
SAVE = "save_logits: want True, False or 'auto'; got "
STREAM = "want (6,) floating point on cpu, or None; got "
REQUIRED = "want (6,) floating point on cpu; got "
ADVANTAGES = "advantages: want (6,), like ids, or (2,), one a sequence"
MASK = "mask: want (6,) bool or numbers >= 0 on cpu, like ids; got "
MASK_VALUES = "mask: want finite numbers >= 0; got "
SEGMENTS = "segment_ids: want (6,) integers on cpu, like ids, or None; got "
BOUNDS = "cu_seqlens: want (B + 1,) int32 or int64; got "
ASCENDING = "cu_seqlens: want 0 = cu_seqlens[0] <= ... <= cu_seqlens[-1] = 6; got "
NORMALISER = "normaliser: want a finite number > 0, or a tensor of one; got "
FUNCTION = "spec: want a LossSpec, or a function (logprobs, tokens, entropy) -> losses; got "
MAIN = "weight.main_grad: want (9, 4) floating point on cpu, to accumulate into; got "
TEACHER_HIDDEN = "teacher_hidden: want (6, Dt) torch.float32 on cpu, like hidden; got "
LEVELS = "want 'token' or 'step' or 'sequence'; got "
LENGTH = "constant_length: want an int >= 1 with aggregation='constant'; got "

Change = dict[str, Any]
ERRORS: dict[Callable[..., Any], tuple[dict[str, Any], dict[str, tuple[Change, str]]]] = {
    linear_logprobs: (LOGPROBS, {
        "hidden_rank": (dict(hidden=H[None]), f"hidden: want (T, D) {NAMES}; got (1, 6, 4) float32"),
        "hidden_dtype": (dict(hidden=H.int()), f"hidden: want (T, D) {NAMES}; got (6, 4) int32"),
        "hidden_sparse": (dict(hidden=H.to_sparse()), f"hidden: want (T, D) {NAMES}; got (6, 4) float32 sparse_coo"),
        "hidden_list": (dict(hidden=[1.0]), f"hidden: want (T, D) {NAMES}; got list"),
        "hidden_narrow": (dict(hidden=H[:, :0]), f"hidden: want (T, D) {NAMES}; got (6, 0) float32"),
        "hidden_meta": (
            dict(hidden=H.to("meta")),
            "weight: want (V, 4) torch.float32 on meta, like hidden, V >= 1; got (9, 4) float32",
        ),
        "weight_columns": (dict(weight=W[:, 1:]), WEIGHT + "(9, 3) float32"),
        "weight_dtype": (dict(weight=W.bfloat16()), WEIGHT + "(9, 4) bfloat16"),
        "weight_rank": (dict(weight=W[None]), WEIGHT + "(1, 9, 4) float32"),
        "weight_empty": (dict(weight=W[:0], bias=B[:0]), WEIGHT + "(0, 4) float32"),
        "weight_meta": (dict(weight=W.to("meta")), WEIGHT + "(9, 4) float32 on meta"),
        "bias_size": (dict(bias=B[1:]), BIAS + "(8,) float32"),
        "bias_dtype": (dict(bias=B.double()), BIAS + "(9,) float64"),
        "bias_meta": (dict(bias=B.to("meta")), BIAS + "(9,) float32 on meta"),
        "bias_number": (dict(bias=0.0), BIAS + "0.0"),
        "ids_rows": (dict(ids=IDS[1:]), COLUMNS + "(5,) int64"),
        "ids_columns": (dict(ids=IDS[:, None][:, :0]), COLUMNS + "(6, 0) int64"),
        "ids_rank": (dict(ids=IDS[:, None, None]), COLUMNS + "(6, 1, 1) int64"),
        "ids_dtype": (dict(ids=IDS.short()), COLUMNS + "(6,) int16"),
        "ids_meta": (dict(ids=IDS.to("meta")), COLUMNS + "(6,) int64 on meta"),
        "ids_none": (dict(ids=None), COLUMNS + "None"),
        "ids_high": (dict(ids=IDS * 0 + 9), "ids: want values in 0..8; got 9..9"),
        "ids_low": (dict(ids=IDS.int() * 0 - 100), "ids: want values in 0..8; got -100..-100"),
        "temperature_zero": (dict(temperature=0.0), TEMPERATURE + "0.0"),
        "temperature_negative": (dict(temperature=-1), TEMPERATURE + "-1"),
        "temperature_nan": (dict(temperature=NAN), TEMPERATURE + "nan"),
        "temperature_inf": (dict(temperature=INF), TEMPERATURE + "inf"),
        "temperature_too_small": (dict(temperature=1e-39), TEMPERATURE + "1e-39"),
        "temperature_too_large": (dict(temperature=1e39), TEMPERATURE + "1e+39"),
        "temperature_bool": (dict(temperature=True), TEMPERATURE + "True"),
        "temperature_size": (dict(temperature=ONES[1:]), TEMPERATURE + "(5,) float32"),
        "temperature_dtype": (dict(temperature=ONES.int()), TEMPERATURE + "(6,) int32"),
        "temperature_meta": (dict(temperature=ONES.to("meta")), TEMPERATURE + "(6,) float32 on meta"),
        "temperature_sparse": (dict(temperature=ONES.to_sparse()), TEMPERATURE + "(6,) float32 sparse_coo"),
        "temperatures_zero": (dict(temperature=torch.arange(6.0)), TEMPERATURE + "0..5"),
        "temperatures_nan": (dict(temperature=ONES * NAN), TEMPERATURE + "nan..nan"),
        "temperatures_vanish": (dict(temperature=ONES.double() * 1e-300), TEMPERATURE + "0..0"),
        "softcap_negative": (dict(softcap=-1.0), SOFTCAP + "-1.0"),
        "softcap_nan": (dict(softcap=NAN), SOFTCAP + "nan"),
        "softcap_inf": (dict(softcap=INF), SOFTCAP + "inf"),
        "softcap_overflows": (dict(softcap=1e300), SOFTCAP + "1e+300"),
        "softcap_tensor": (dict(softcap=torch.ones(1)), SOFTCAP + "(1,) float32"),
        "scale_zero": (dict(logit_scale=0.0), SCALE + "0.0"),
        "scale_nan": (dict(logit_scale=NAN), SCALE + "nan"),
        "scale_overflows": (dict(logit_scale=-1e39), SCALE + "-1e+39"),
        "workspace_zero": (dict(workspace_bytes=0), WORKSPACE + "0"),
        "workspace_float": (dict(workspace_bytes=1e6), WORKSPACE + "1000000.0"),
        "workspace_bool": (dict(workspace_bytes=True), WORKSPACE + "True"),
        "save_text": (dict(save_logits="yes"), SAVE + "yes"),
        "save_number": (dict(save_logits=1), SAVE + "1"),
        "save_tensor": (dict(save_logits=ONES), SAVE + "(6,) float32"),
        "entropy": (dict(entropy="yes"), "entropy: want True or False; got yes"),
        "sum_sq": (dict(sum_sq=ONES), "sum_sq: want True or False; got (6,) float32"),
        "start_alone": (dict(vocab_start=0), "vocab_start: want None without a process_group; got 0"),
        "group": (
            dict(process_group="world"),
            "process_group: want a ProcessGroup that this process is in, or None; got world",
        ),
    }),
    linear_logprobs_backward: (BACKWARD, {
        "hidden": (dict(hidden=H[0]), f"hidden: want (T, D) {NAMES}; got (4,) float32"),
        "weight": (dict(weight=W.half()), WEIGHT + "(9, 4) float16"),
        "bias": (dict(bias=B[:1]), BIAS + "(1,) float32"),
        "ids": (dict(ids=IDS.float()), COLUMNS + "(6,) float32"),
        "grad_none": (dict(grad_logprobs=None), "grad_logprobs: " + REQUIRED + "None"),
        "grad_size": (dict(grad_logprobs=ROW[:, None]), "grad_logprobs: " + REQUIRED + "(6, 1) float32"),
        "grad_columns": (
            dict(ids=IDS[:, None].expand(6, 3)), "grad_logprobs: want (6, 3) floating point on cpu; got (6,) float32"
        ),
        "lse_none": (dict(lse=None), "lse: " + REQUIRED + "None"),
        "lse_size": (dict(lse=ONES[:, None]), "lse: " + REQUIRED + "(6, 1) float32"),
        "lse_dtype": (dict(lse=ONES.int()), "lse: " + REQUIRED + "(6,) int32"),
        "start_negative": (dict(vocab_start=-1), "vocab_start: want an int >= 0; got -1"),
        "start_float": (dict(vocab_start=1.0), "vocab_start: want an int >= 0; got 1.0"),
        "start_none": (dict(vocab_start=None), "vocab_start: want an int >= 0; got None"),
        "temperature": (dict(temperature=NAN), TEMPERATURE + "nan"),
        "softcap": (dict(softcap=-2), SOFTCAP + "-2"),
        "scale": (dict(logit_scale=0), SCALE + "0"),
    }),
    linear_policy_loss: (POLICY, {
        "hidden_rank": (dict(hidden=H[0]), f"hidden: want (T, D) or (B, L, D) {NAMES}; got (4,) float32"),
        "weight": (dict(weight=W.T), WEIGHT + "(4, 9) float32"),
        "ids_columns": (dict(ids=IDS[:, None]), PLAIN_IDS + "(6, 1) int64"),
        "ids_high": (dict(ids=IDS * 0 + 9), "ids: want values in 0..8 where mask is not 0; got 9..9"),
        "ids_low": (
            dict(ids=torch.tensor([-1, 0, 0, 0, 0, -7]), mask=torch.tensor([1, 1, 1, 1, 1, 0])),
            "ids: want values in 0..8 where mask is not 0; got -1..0",
        ),
        "advantages_none": (dict(advantages=None), ADVANTAGES + ", floating point on cpu; got None"),
        "advantages_dtype": (dict(advantages=IDS), ADVANTAGES + ", floating point on cpu; got (6,) int64"),
        "advantages_meta": (
            dict(advantages=ONES.to("meta")), ADVANTAGES + ", floating point on cpu; got (6,) float32 on meta"
        ),
        "advantages_size": (dict(advantages=ONES[:3]), ADVANTAGES + "; got (3,) float32"),
        "old": (dict(old_logprobs=ONES[1:]), "old_logprobs: " + STREAM + "(5,) float32"),
        "ref": (dict(ref_logprobs=ONES.int()), "ref_logprobs: " + STREAM + "(6,) int32"),
        "sampler": (dict(sampler_logprobs=ONES[None]), "sampler_logprobs: " + STREAM + "(1, 6) float32"),
        "old_meta": (dict(old_logprobs=ONES.to("meta")), "old_logprobs: " + STREAM + "(6,) float32 on meta"),
        "no_ref": (
            dict(spec=LossSpec(kl_coef=0.1), ref_logprobs=None),
            "ref_logprobs: want a tensor like ids, for kl_coef=0.1; got None",
        ),
        "no_sampler": (
            dict(spec=LossSpec(sampler_level="token"), sampler_logprobs=None),
            "sampler_logprobs: want a tensor like ids, for sampler_level='token'; got None",
        ),
        "mask_none": (dict(mask=None), MASK + "None"),
        "mask_size": (dict(mask=ONES[1:]), MASK + "(5,) float32"),
        "mask_complex": (dict(mask=ONES * 1j), MASK + "(6,) complex64"),
        "mask_meta": (dict(mask=ONES.to("meta")), MASK + "(6,) float32 on meta"),
        "mask_negative": (dict(mask=torch.arange(-1, 5)), MASK_VALUES + "-1.0..4.0"),
        "mask_nan": (dict(mask=ONES * NAN), MASK_VALUES + "nan..nan"),
        "mask_inf": (dict(mask=ONES / ROW), MASK_VALUES + "inf..inf"),
        "segments_size": (dict(segment_ids=IDS[1:]), SEGMENTS + "(5,) int64"),
        "segments_dtype": (dict(segment_ids=ONES), SEGMENTS + "(6,) float32"),
        "segments_complex": (dict(segment_ids=ONES * 1j), SEGMENTS + "(6,) complex64"),
        "segments_meta": (dict(segment_ids=IDS.to("meta")), SEGMENTS + "(6,) int64 on meta"),
        "bounds_dtype": (dict(cu_seqlens=torch.tensor([0.0, 6.0])), BOUNDS + "(2,) float32"),
        "bounds_rank": (dict(cu_seqlens=torch.tensor([[0, 6]])), BOUNDS + "(1, 2) int64"),
        "bounds_empty": (dict(cu_seqlens=torch.tensor([], dtype=torch.int32)), BOUNDS + "(0,) int32"),
        "bounds_meta": (dict(cu_seqlens=torch.tensor([0, 6], device="meta")), BOUNDS + "(2,) int64 on meta"),
        "bounds_list": (dict(cu_seqlens=[0, 6]), BOUNDS + "list"),
        "bounds_first": (dict(cu_seqlens=torch.tensor([1, 6])), ASCENDING + "[1, 6]"),
        "bounds_last": (dict(cu_seqlens=torch.tensor([0, 5])), ASCENDING + "[0, 5]"),
        "bounds_order": (dict(cu_seqlens=torch.tensor([0, 4, 2, 6])), ASCENDING + "[0, 4, 2, 6]"),
        "normaliser_zero": (dict(normaliser=0), NORMALISER + "0"),
        "normaliser_nan": (dict(normaliser=NAN), NORMALISER + "nan"),
        "normaliser_inf": (dict(normaliser=torch.tensor(INF)), NORMALISER + "() float32"),
        "normaliser_size": (dict(normaliser=ONES), NORMALISER + "(6,) float32"),
        "normaliser_complex": (dict(normaliser=torch.tensor(1j)), NORMALISER + "() complex64"),
        "normaliser_meta": (dict(normaliser=torch.ones((), device="meta")), NORMALISER + "() float32 on meta"),
        "normaliser_big": (dict(normaliser=BIG), NORMALISER + str(BIG)[:200]),
        "normaliser_text": (dict(normaliser="tokens"), NORMALISER + "tokens"),
        "spec_text": (dict(spec="token"), FUNCTION + "token"),
        "spec_distill": (dict(spec=DistillSpec()), FUNCTION + "DistillSpec"),
        "spec_class": (dict(spec=LossSpec), FUNCTION + "type"),
        "temperature": (dict(temperature=ONES[None]), TEMPERATURE + "(1, 6) float32"),
        "workspace": (dict(workspace_bytes=-5), WORKSPACE + "-5"),
        "main_flag": (dict(accumulate_main_grad=1), "accumulate_main_grad: want True or False; got 1"),
        "main_none": (dict(accumulate_main_grad=True), MAIN + "None"),
        "main_size": (dict(accumulate_main_grad=True, weight=parameter(W.T)), MAIN + "(4, 9) float32"),
        "main_dtype": (dict(accumulate_main_grad=True, weight=parameter(W.int())), MAIN + "(9, 4) int32"),
        "main_meta": (dict(accumulate_main_grad=True, weight=parameter(W.to("meta"))), MAIN + "(9, 4) float32 on meta"),
    }),
    policy_loss_from_logprobs: (FROM, {
        "logprobs_dtype": (dict(logprobs=IDS), "logprobs: want (B, L) or (T,) floating point; got (6,) int64"),
        "logprobs_rank": (
            dict(logprobs=ONES[None, None]), "logprobs: want (B, L) or (T,) floating point; got (1, 1, 6) float32"
        ),
        "mask": (dict(mask=None), MASK + "None"),
        "old": (dict(old_logprobs=ONES[1:]), "old_logprobs: " + STREAM + "(5,) float32"),
        "entropy": (dict(entropy=ONES.bool()), "entropy: " + STREAM + "(6,) bool"),
        "no_entropy": (
            dict(spec=LossSpec(entropy_coef=0.5)),
            "entropy: want a tensor like logprobs, for entropy_coef=0.5; got None",
        ),
        "advantages": (dict(advantages=1.0), ADVANTAGES + ", floating point on cpu; got 1.0"),
        "bounds": (dict(cu_seqlens=torch.tensor([0, 7])), ASCENDING + "[0, 7]"),
        "spec": (dict(spec=1), FUNCTION + "1"),
    }),
    linear_distill_loss: (DISTILL, {
        "spec": (dict(spec=LossSpec()), "spec: want a DistillSpec; got LossSpec"),
        "ids_none": (
            dict(ids=None),
            "ids: want a tensor, with teacher_logprobs (or else teacher_hidden, teacher_weight); got None",
        ),
        "ids_columns": (dict(ids=IDS[:, None], teacher_logprobs=-ONES[:, None]), PLAIN_IDS + "(6, 1) int64"),
        "ids_high": (dict(ids=IDS * 0 + 9), "ids: want values in 0..8 where mask is not 0; got 9..9"),
        "teacher_none": (dict(teacher_logprobs=None), "teacher_logprobs: " + REQUIRED + "None"),
        "teacher_size": (dict(teacher_logprobs=-ONES[:, None]), "teacher_logprobs: " + REQUIRED + "(6, 1) float32"),
        "teacher_dtype": (dict(teacher_logprobs=IDS), "teacher_logprobs: " + REQUIRED + "(6,) int64"),
        "teacher_both": (
            dict(teacher_hidden=H),
            "teacher_hidden: want None where ids and teacher_logprobs are given; got (6, 4) float32",
        ),
        "teacher_weight_alone": (
            dict(teacher_weight=W), "teacher_weight: want None without teacher_hidden; got (9, 4) float32"
        ),
        "mask": (dict(mask=-ONES), MASK_VALUES + "-1.0..-1.0"),
        "aggregation": (
            dict(aggregation="mean"), "aggregation: want 'token_mean' or 'sequence_mean' or 'constant'; got mean"
        ),
        "no_length": (dict(aggregation="constant"), LENGTH + "None"),
        "length": (dict(aggregation="constant", constant_length=0), LENGTH + "0"),
        "stray_length": (
            dict(constant_length="x"),
            "constant_length: want an int >= 1, or None with aggregation='token_mean'; got x",
        ),
    }),
}  # fmt: skip
PADDED_ERRORS: dict[str, tuple[Change, str]] = {
    "bounds": (
        dict(cu_seqlens=torch.tensor([0, 3, 6])),
        "cu_seqlens: want None for a padded batch: its rows are the sequences; got (3,) int64",
    ),
    "ids": (dict(ids=IDS), "ids: want (2, 3) int32 or int64 on cpu; got (6,) int64"),
    "mask": (dict(mask=ONES), "mask: want (2, 3) bool or numbers >= 0 on cpu, like ids; got (6,) float32"),
    "segments": (dict(segment_ids=IDS), "segment_ids: want (2, 3) integers on cpu, like ids, or None; got (6,) int64"),
    "advantages": (
        dict(advantages=ONES), "advantages: want (2, 3), like ids, or (2,), one a sequence; got (6,) float32"
    ),
    "temperature": (
        dict(temperature=ONES), "temperature: want a number > 0, or (2, 3) floating point > 0; got (6,) float32"
    ),
}  # fmt: skip
FULL_ERRORS: dict[str, tuple[Change, str]] = {
    "clip_forward": (
        dict(spec=DistillSpec()), "spec: want 'forward', 'reverse' or 'js' with teacher_hidden; got 'clip_forward'"
    ),
    "ids": (dict(ids=IDS), "teacher_hidden: want None where ids and teacher_logprobs are given; got (6, 3) float32"),
    "rows": (dict(teacher_hidden=TEACHER["hidden"][1:]), TEACHER_HIDDEN + "(5, 3) float32"),
    "weight_none": (
        dict(teacher_weight=None),
        "teacher_weight: want (V, 3) torch.float32 on cpu, like teacher_hidden, V >= 1; got None",
    ),
    "vocabulary": (
        dict(teacher_weight=TEACHER["weight"][1:], teacher_bias=None),
        "teacher_weight: want (9, Dt): the student's vocabulary; got (8, 3) float32",
    ),
    "bias": (dict(teacher_bias=B[1:]), "teacher_bias: want (9,) torch.float32 on cpu, or None; got (8,) float32"),
    "dtype": (
        {f"teacher_{key}": TEACHER[key].half() for key in ("hidden", "weight", "bias")},
        TEACHER_HIDDEN + "(6, 3) float16",
    ),
    "softcap": (dict(teacher_softcap=-1), "teacher_softcap: want a finite number >= 0; got -1"),
    "scale": (dict(teacher_logit_scale=0), "teacher_logit_scale: want a finite number, not 0; got 0"),
    "mask": (dict(mask=None), MASK + "None"),
}  # fmt: skip
TABLES = {
    **{f"{op.__name__}-{name}": (op, good, *x) for op, (good, cases) in ERRORS.items() for name, x in cases.items()},
    **{f"padded-{name}": (linear_policy_loss, PADDED, *case) for name, case in PADDED_ERRORS.items()},
    **{f"teacher-{name}": (linear_distill_loss, FULL, *case) for name, case in FULL_ERRORS.items()},
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_ops_refuse(name: str) -> None:
    op, good, change, message = TABLES[name]
    op(**good)
    with pytest.raises(ValueError, match="^" + re.escape(f"{op.__name__}: {message}") + "$"):
        op(**{**good, **change})


SPEC_ERRORS: dict[str, tuple[type, Change, str]] = {
    "ratio_level": (LossSpec, dict(ratio_level="batch"), "ratio_level: " + LEVELS + "batch"),
    "ratio_none": (LossSpec, dict(ratio_level=None), "ratio_level: " + LEVELS + "None"),
    "clip": (LossSpec, dict(clip="both"), "clip: want 'two_sided' or 'one_sided' or 'none'; got both"),
    "kl_estimator": (LossSpec, dict(kl_estimator="k4"), "kl_estimator: want 'k1' or 'k2' or 'k3'; got k4"),
    "kl_in": (LossSpec, dict(kl_in="advantage"), "kl_in: want 'loss' or 'reward'; got advantage"),
    "sampler_level": (
        LossSpec, dict(sampler_level=ONES), "sampler_level: want None or 'token' or 'sequence'; got (6,) float32"
    ),
    "sampler_mode": (LossSpec, dict(sampler_mode="clip"), "sampler_mode: want 'truncate' or 'mask'; got clip"),
    "aggregation": (
        LossSpec, dict(aggregation="sum"), "aggregation: want 'token_mean' or 'sequence_mean' or 'constant'; got sum"
    ),
    "clip_low": (LossSpec, dict(clip_low=-0.1), "clip_low: want a finite number >= 0; got -0.1"),
    "clip_high": (LossSpec, dict(clip_high=INF), "clip_high: want a finite number >= 0; got inf"),
    "clip_high_big": (LossSpec, dict(clip_high=BIG), f"clip_high: want a finite number >= 0; got {str(BIG)[:200]}"),
    "kl_coef": (LossSpec, dict(kl_coef=NAN), "kl_coef: want a finite number >= 0; got nan"),
    "entropy_coef": (LossSpec, dict(entropy_coef=True), "entropy_coef: want a finite number >= 0; got True"),
    "sampler_low": (LossSpec, dict(sampler_low=None), "sampler_low: want a finite number >= 0; got None"),
    "sampler_high": (
        LossSpec, dict(sampler_low=0.5, sampler_high=0.4), "sampler_high: want a finite number >= 0.5; got 0.4"
    ),
    "dual_clip": (LossSpec, dict(dual_clip=1.1), "dual_clip: want a finite number >= 1.2; got 1.1"),
    "dual_clip_one_sided": (
        LossSpec, dict(clip="one_sided", dual_clip=3.0), "dual_clip: want None with clip='one_sided'; got 3.0"
    ),
    "kl_ratio_weighted": (
        LossSpec, dict(kl_in="reward", kl_ratio_weighted=True),
        "kl_ratio_weighted: want False with kl_in='reward'; got True",
    ),
    "kl_ratio_text": (LossSpec, dict(kl_ratio_weighted="no"), "kl_ratio_weighted: want True or False; got no"),
    "no_length": (LossSpec, dict(aggregation="constant"), LENGTH + "None"),
    "length_float": (LossSpec, dict(aggregation="constant", constant_length=8.0), LENGTH + "8.0"),
    "length_big": (LossSpec, dict(aggregation="constant", constant_length=BIG), LENGTH + str(BIG)[:200]),
    "stray_length": (
        LossSpec, dict(constant_length=-1),
        "constant_length: want an int >= 1, or None with aggregation='token_mean'; got -1",
    ),
    "divergence": (
        DistillSpec, dict(divergence="kl"), "divergence: want 'clip_forward' or 'forward' or 'reverse' or 'js'; got kl"
    ),
    "beta_zero": (DistillSpec, dict(beta=0.0), "beta: want a finite number >= 1e-06; got 0.0"),
    "beta_one": (DistillSpec, dict(beta=1.0), "beta: want a number in (0, 1); got 1.0"),
    "beta_text": (DistillSpec, dict(beta="half"), "beta: want a finite number >= 1e-06; got half"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPEC_ERRORS)
def test_specs_refuse(name: str) -> None:
    kind, fields, message = SPEC_ERRORS[name]
    with pytest.raises(ValueError, match="^" + re.escape(f"{kind.__name__}: {message}") + "$"):
        kind(**fields)


Function = Callable[..., Any]
LOSSES = "spec: want a function that returns losses (6,) floating point on cpu; got "
DETAILS = (
    "spec: want a function whose details are (6,) tensors named ratio_mean, ratio_max, clip_low, clip_high, dual_clip, "
    "approx_kl, kl, entropy, sampler_weight; got "
)
FUNCTIONS: dict[str, tuple[Function, str]] = {
    "none": (lambda logprobs, tokens, entropy: None, LOSSES + "None"),
    "sum": (lambda logprobs, tokens, entropy: logprobs.sum(), LOSSES + "() float32"),
    "integers": (lambda logprobs, tokens, entropy: logprobs.long(), LOSSES + "(6,) int64"),
    "meta": (lambda logprobs, tokens, entropy: logprobs.to("meta"), LOSSES + "(6,) float32 on meta"),
    "unknown_detail": (lambda x, tokens, entropy: (x, {"loss": x}), DETAILS + "{'loss': '(6,) float32'}"),
    "scalar_detail": (lambda x, tokens, entropy: (x, {"kl": x.mean()}), DETAILS + "{'kl': '() float32'}"),
    "number": (lambda x, tokens, entropy: (x, {"kl": 1.0}), DETAILS + "{'kl': '1.0'}"),
    "list": (lambda x, tokens, entropy: (x, [x]), DETAILS + "list"),
}


@pytest.mark.parametrize("op", (linear_policy_loss, policy_loss_from_logprobs))
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_that_are_no_losses_are_refused(op: Function, name: str) -> None:
    function, message = FUNCTIONS[name]
    with pytest.raises(ValueError, match="^" + re.escape(f"policy_loss: {message}") + "$"):
        op(**{**ERRORS[op][0], "mask": ONES, "spec": lambda x, *rest: function(x.detach().float(), *rest)})


def test_a_function_of_an_unknown_scope_is_refused() -> None:
    def loss(logprobs: Tensor, tokens: Any, entropy: Tensor) -> Tensor:
        return -logprobs

    loss.scope = "batch"  # type: ignore[attr-defined]
    message = "linear_policy_loss: spec.scope: " + LEVELS + "batch"
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        linear_policy_loss(**POLICY, spec=loss)


# -- what must be taken as it is --------------------------------------------------------------------------------------
def strided(x: Tensor) -> Tensor:
    """The same values, every second element of a wider tensor."""
    return x.repeat_interleave(2, -1)[..., ::2]


Level = enum.StrEnum("Level", {"STEP": "step"})
HALVES = {**POLICY, "advantages": torch.full((6,), 0.5)}
SAME: dict[str, tuple[Function, dict[str, Any], Change]] = {
    "hidden_strided": (linear_policy_loss, POLICY, dict(hidden=torch.cat((H, H), 1)[:, :4])),
    "weight_transposed": (linear_policy_loss, POLICY, dict(weight=W.T.contiguous().T)),
    "bias_strided": (linear_policy_loss, POLICY, dict(bias=strided(B))),
    "ids_int32": (linear_policy_loss, POLICY, dict(ids=strided(IDS.int()))),
    "streams_strided": (linear_policy_loss, POLICY, {key: strided(x) for key, x in {**STREAMS, **LAYOUT}.items()}),
    "streams_trained": (linear_policy_loss, POLICY, {k: x.clone().requires_grad_() for k, x in STREAMS.items()}),
    "mask_int": (linear_policy_loss, POLICY, dict(mask=LAYOUT["mask"].to(torch.uint8))),
    "mask_float8": (linear_policy_loss, POLICY, dict(mask=LAYOUT["mask"].to(torch.float8_e4m3fn))),
    "mask_trained": (linear_policy_loss, POLICY, dict(mask=LAYOUT["mask"].float().requires_grad_())),
    "bounds_int32": (linear_policy_loss, POLICY, dict(cu_seqlens=LAYOUT["cu_seqlens"].int())),
    "segments_int8": (linear_policy_loss, POLICY, dict(segment_ids=LAYOUT["segment_ids"].to(torch.int8))),
    "temperature_of_one": (linear_policy_loss, POLICY, dict(temperature=torch.ones(()))),
    "advantages_expanded": (
        linear_policy_loss, HALVES, dict(advantages=torch.tensor([0.5]).expand(6))
    ),
    "advantages_of_sequences": (
        linear_policy_loss, HALVES, dict(advantages=torch.full((2,), 0.5))
    ),
    "normaliser_tensor": (linear_policy_loss, {**POLICY, "normaliser": 3}, dict(normaliser=torch.tensor([3]))),
    "spec_of_numpy": (
        linear_policy_loss, {**POLICY, "spec": LossSpec(clip_low=0.25)},
        dict(spec=LossSpec(clip_low=numpy.float64(0.25))),
    ),
    "spec_of_an_enum": (
        linear_policy_loss, {**POLICY, "spec": LossSpec(ratio_level="step")},
        dict(spec=LossSpec(ratio_level=Level.STEP)),
    ),
    "no_spec": (linear_policy_loss, POLICY, dict(spec=LossSpec())),
    "ids_anything_where_masked": (
        linear_policy_loss, {**POLICY, "mask": torch.arange(6) % 2},
        dict(ids=torch.where(torch.arange(6) % 2 == 1, IDS, torch.tensor([-1, 9, 2**40, -(2**62), 10**6, 7]))),
    ),
    "distill_strided": (linear_distill_loss, DISTILL, dict(teacher_logprobs=strided(-ONES), ids=strided(IDS))),
    "teacher_trained": (
        linear_distill_loss, FULL, {k: x.clone().requires_grad_() for k, x in FULL.items() if k.startswith("teacher")}
    ),
    "backward_strided": (linear_logprobs_backward, BACKWARD, {k: strided(x) for k, x in BACKWARD.items()}),
    "backward_trained": (
        linear_logprobs_backward, BACKWARD, {k: x.clone().requires_grad_() for k, x in BACKWARD.items() if k != "ids"}
    ),
    "ids_expanded": (
        linear_logprobs, {**LOGPROBS, "ids": IDS[:, None].repeat(1, 3)}, dict(ids=IDS.int()[:, None].expand(6, 3))
    ),
    "from_strided": (policy_loss_from_logprobs, FROM, {key: strided(x) for key, x in FROM.items()}),
}  # fmt: skip


@pytest.mark.parametrize("backend", ("cpu", "reference"), indirect=True)
@pytest.mark.parametrize("name", SAME)
def test_the_same_in_another_form_is_the_same(backend: str, name: str) -> None:
    op, good, change = SAME[name]
    expected, found = ([x for x in op(**a) if isinstance(x, Tensor)] for a in (good, {**good, **change}))
    assert not any(x.requires_grad for x in found)
    assert all(bitwise_equal(x, y) for x, y in zip(expected, found, strict=True))


EMPTY: dict[str, tuple[tuple[int, ...], list[int] | None]] = {
    "no_tokens": ((0,), None),
    "no_sequences": ((0,), [0]),
    "empty_sequences": ((0,), [0, 0, 0]),
    "no_rows": ((0, 5), None),
    "no_columns": ((5, 0), None),
}
SPECS = {
    "token": LossSpec(),
    "sequences": LossSpec(ratio_level="sequence", sampler_level="sequence", kl_coef=0.1, aggregation="sequence_mean"),
    "steps": LossSpec(ratio_level="step", entropy_coef=0.1, aggregation="constant", constant_length=7),
}
rooms = pytest.mark.parametrize("backend", ("cpu", "reference"), indirect=True)


@rooms
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", EMPTY)
def test_a_batch_without_tokens_has_loss_zero(backend: str, name: str, spec: str) -> None:
    shape, bounds = EMPTY[name]
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    hidden, weight = torch.empty(*shape, 4, requires_grad=True), W.clone().requires_grad_()
    streams = dict.fromkeys((*STREAMS, "mask"), torch.empty(shape))
    streams["ids"] = torch.empty(shape, dtype=torch.int64)
    loss, metrics = linear_policy_loss(hidden, weight, **streams, spec=SPECS[spec], cu_seqlens=cu_seqlens)
    loss.backward()
    assert (
        loss == 0 and metrics["tokens"] == 0 and weight.grad.count_nonzero() == 0 and hidden.grad.shape == hidden.shape
    )
    streams["entropy"], streams["logprobs"] = torch.empty(shape), torch.empty(shape)
    del streams["ids"]
    assert policy_loss_from_logprobs(**streams, spec=SPECS[spec], cu_seqlens=cu_seqlens)[0] == 0


@rooms
@pytest.mark.parametrize("spec", SPECS)
def test_a_batch_whose_mask_is_zero_has_loss_zero(backend: str, spec: str) -> None:
    weight = W.clone().requires_grad_()
    hostile = {key: x * NAN for key, x in STREAMS.items()}
    loss, metrics = linear_policy_loss(H * NAN, weight, IDS - 99, **hostile, mask=ROW, spec=SPECS[spec])
    loss.backward()
    assert loss == 0 and metrics["rows_computed"] == 0 and weight.grad.count_nonzero() == 0
    found, _ = policy_loss_from_logprobs(ONES * NAN, **hostile, mask=ROW, entropy=ONES * NAN, spec=SPECS[spec])
    assert found == 0


@rooms
@pytest.mark.parametrize("divergence", ("clip_forward", "reverse"))
def test_a_distillation_whose_mask_is_zero_has_loss_zero(backend: str, divergence: str) -> None:
    weight = W.clone().requires_grad_()
    case = {**DISTILL, "weight": weight, "mask": ROW}
    loss, _ = linear_distill_loss(**case, spec=DistillSpec(divergence=divergence))
    loss.backward()
    assert loss == 0 and weight.grad.count_nonzero() == 0


@rooms
@pytest.mark.parametrize("divergence", ("clip_forward", "forward", "reverse", "js"))
def test_nan_in_the_model_is_not_hidden(backend: str, divergence: str) -> None:
    hidden = H.clone()
    hidden[2, 1] = NAN
    loss, _ = linear_distill_loss(**{**DISTILL, "hidden": hidden}, spec=DistillSpec(divergence=divergence))
    assert loss.isnan()
    assert linear_policy_loss(**{**POLICY, "hidden": hidden, "mask": ONES})[0].isnan()


# -- rooms ------------------------------------------------------------------------------------------------------------
def doubled(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in arguments.items()}


ROOM_CALLS = {
    "linear_logprobs": (linear_logprobs, LOGPROBS),
    "linear_logprobs_backward": (linear_logprobs_backward, BACKWARD),
    "linear_policy_loss": (linear_policy_loss, POLICY),
    "linear_distill_loss": (linear_distill_loss, FULL),
}


@pytest.mark.parametrize("backend", ("policy_loss=cpu",), indirect=True)
@pytest.mark.parametrize("name", ROOM_CALLS)
def test_a_forced_room_that_cannot_serve_says_why(backend: str, name: str) -> None:
    op, arguments = ROOM_CALLS[name]
    message = f"m3kernels.policy_loss.{name}: cpu: computes in float32, not float64"
    with pytest.raises(BackendError, match="^" + re.escape(message) + "$"):
        op(**doubled(arguments))


@pytest.mark.parametrize(
    ("backend_as_built", "message"),
    (
        ("cuda", "m3kernels.policy_loss.linear_policy_loss: cuda: "),
        ("policy_loss=m3", "M3KERNELS_BACKEND: want one of cpu, cuda, triton, reference, or family=room; got "),
    ),
    indirect=["backend_as_built"],
)
def test_a_room_that_is_not_there_says_why(backend_as_built: str, message: str) -> None:
    with pytest.raises(BackendError, match="^" + re.escape(message)):
        linear_policy_loss(**POLICY)


def test_losses_of_tensors_without_data_are_refused() -> None:
    arguments = {k: x.to("meta") for k, x in POLICY.items() if k not in ("cu_seqlens", "segment_ids")}
    message = (
        "m3kernels.policy_loss.linear_policy_loss: reference: linear_policy_loss needs data: meta tensors have none"
    )
    with pytest.raises(BackendError, match="^" + re.escape(message) + "$"):
        linear_policy_loss(**arguments)
