"""Losses and gradients of packed batches against plain restatements in fp64: one sequence at a time, full logits."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from train_cases import OBJECTIVES, STREAMS, draw_samples, with_one_thread

from m3.train import objective
from m3.train.objective import MetricSum
from m3.train.policy_model import PolicyModel
from m3.train.stage import NonFiniteError, Objective
from m3.train.streams import Sample, pack
from m3kernels.policy_loss import DistillSpec, LossSpec

one_thread = pytest.fixture(autouse=True, scope="module")(with_one_thread)

NAMES = list(OBJECTIVES)
OWN_OLD = tuple(name for name in STREAMS if name != "old_logprobs")


def samples_of(name: str) -> list[Sample]:
    """MOPD takes the policy itself for the old one. One sequence is sampled at another temperature."""
    streams = OWN_OLD if name == "mopd" else STREAMS
    return [*draw_samples(streams=streams), *draw_samples("b", (8,), streams=streams, temperature=0.75)]


@pytest.fixture(scope="module")
def model(llama) -> PolicyModel:
    return PolicyModel.load(llama[0], dtype=torch.float64)


# -- the restatement --------------------------------------------------------------------------------------------------
def rows(model: PolicyModel, sample: Sample) -> tuple[Tensor, Tensor, Tensor]:
    """(positions that count, their log-probabilities, their entropies) from full logits of this sequence alone."""
    logits = model.causal(input_ids=sample.ids[None]).logits[0, :-1] / sample.temperature
    laws = logits.log_softmax(-1)
    places = sample.mask.nonzero()[:, 0]
    chosen = laws[places - 1, sample.ids[places]]
    entropy = -(laws.exp() * laws).sum(-1)[places - 1]
    return places, chosen, entropy


def clipped(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    return torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def spar(sample: Sample, places: Tensor, logprobs: Tensor, entropy: Tensor) -> Tensor:
    geometric = (logprobs - sample.old_logprobs[places]).mean().exp().detach()
    ratio = geometric * (logprobs - logprobs.detach()).exp()
    return -clipped(ratio, sample.advantages[places].double(), 3e-4, 4e-4)


def clip_forward_kl(sample: Sample, places: Tensor, logprobs: Tensor, entropy: Tensor) -> Tensor:
    return -logprobs * (logprobs < sample.teacher_logprobs[places])


def mopd(sample: Sample, places: Tensor, logprobs: Tensor, entropy: Tensor) -> Tensor:
    """Its value is that of -w A; its gradient that of -w A log pi."""
    held = logprobs.detach()
    weight = (held - sample.sampler_logprobs[places]).exp()
    weight = weight * ((weight >= 0.5) & (weight <= 5))
    advantage = sample.ref_logprobs[places] - held + sample.advantages[places]
    return -weight * advantage * (1 + logprobs - held)


def ppo(sample: Sample, places: Tensor, logprobs: Tensor, entropy: Tensor) -> Tensor:
    found = []
    for step in sample.steps[places].unique():
        inside = sample.steps[places] == step
        of = places[inside]
        mean = (logprobs[inside] - sample.old_logprobs[of]).mean().exp().detach()
        ratio = mean * (logprobs[inside] - logprobs[inside].detach()).exp()
        weight = (sample.old_logprobs[of].double() - sample.sampler_logprobs[of]).exp().clamp(max=2.0)
        apart = logprobs[inside] - sample.ref_logprobs[of]
        kl = (-apart).exp() + apart - 1
        gain = clipped(ratio, sample.advantages[of].double(), 0.2, 0.2) * weight
        found.append(-gain + 0.1 * kl - 0.01 * entropy[inside])
    return torch.cat(found)


def constant(sample: Sample, places: Tensor, logprobs: Tensor, entropy: Tensor) -> Tensor:
    ratio = (logprobs - sample.old_logprobs[places]).exp()
    return -clipped(ratio, sample.advantages[places].double(), 0.2, 0.2)


TOKEN_LOSSES = {"spar": spar, "clip-forward-kl": clip_forward_kl, "mopd": mopd, "ppo": ppo, "constant": constant}


def restated(name: str, model: PolicyModel, samples: list[Sample]) -> Tensor:
    """The loss of the samples together."""
    total, tokens, sequences = torch.zeros((), dtype=torch.float64), 0.0, 0
    for sample in samples:
        places, logprobs, entropy = rows(model, sample)
        if not len(places):
            continue
        weight = sample.mask[places].double()
        losses = TOKEN_LOSSES[name](sample, places, logprobs, entropy) * weight
        total = total + (losses.sum() / weight.sum() if name in ("spar", "mopd") else losses.sum())
        tokens, sequences = tokens + float(weight.sum()), sequences + 1
    return total / {"spar": sequences, "mopd": sequences, "constant": sequences * 16}.get(name, tokens)


def gradients(model: PolicyModel, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.trained(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


# -- equal to it ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_those_of_the_restatement(model, name):
    samples = samples_of(name)
    total = objective.normaliser(OBJECTIVES[name], samples)
    loss, _ = objective.loss(OBJECTIVES[name], model, pack(samples), total)
    wanted = restated(name, model, samples)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-8)  # transformers' norms round to fp32
    found, of = gradients(model, loss), gradients(model, wanted)
    assert max(float(one.abs().max()) for one in of.values()) > 1e-4
    for key in of:
        torch.testing.assert_close(found[key], of[key], rtol=1e-5, atol=1e-7, msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_pieces_add_up_to_the_whole(model, name):
    """Microbatches of any cut, one of them without a token that counts."""
    samples = samples_of(name)
    spec, total = OBJECTIVES[name], objective.normaliser(OBJECTIVES[name], samples)
    whole, metrics = objective.loss(spec, model, pack(samples), total)
    dummy = dataclasses.replace(samples[0], mask=torch.zeros_like(samples[0].mask))
    pieces = [
        objective.loss(spec, model, pack(one), total) for one in (samples[:1], [dummy], samples[1:4], samples[4:])
    ]
    torch.testing.assert_close(sum(loss for loss, _ in pieces), whole, rtol=1e-6, atol=1e-8)
    found, of = gradients(model, sum(loss for loss, _ in pieces)), gradients(model, whole)
    for key in of:
        torch.testing.assert_close(found[key], of[key], rtol=1e-5, atol=1e-7, msg=key)
    sums = MetricSum()
    for loss, more in pieces:
        sums.add(float(loss.detach()), more)
    told = {key: value for key, value in sums.values().items() if not key.startswith("rows_")}
    wanted = {key: float(metrics[key]) for key in told}
    assert told == pytest.approx(wanted, rel=1e-5, abs=1e-7)
    assert sums.loss == pytest.approx(float(whole.detach()), rel=1e-6)


@pytest.mark.parametrize(("aggregation", "total"), [("token_mean", 10.5), ("sequence_mean", 2.0), ("constant", 32.0)])
def test_normalisers_by_hand(aggregation, total):
    one, two, three = draw_samples(lengths=(6, 6, 6))
    masks = [[0, 0, 1, 1, 0.5, 2], [0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 0, 0]]
    samples = [
        dataclasses.replace(sample, mask=torch.tensor(mask, dtype=torch.float32))
        for sample, mask in zip((one, two, three), masks, strict=True)
    ]
    length = 16 if aggregation == "constant" else None
    spec = Objective(spec=LossSpec(aggregation=aggregation, constant_length=length))
    assert objective.normaliser(spec, samples) == total
    with pytest.raises(ValueError, match="mask: want a token that counts in some sample; got none in 1"):
        objective.normaliser(spec, samples[2:])


def test_a_distillation_has_the_aggregation_of_its_objective():
    samples = draw_samples()
    by_sequence = Objective(spec=DistillSpec(), aggregation="sequence_mean")
    assert objective.normaliser(by_sequence, samples) == 5
    by_token = Objective(spec=DistillSpec())
    assert objective.normaliser(by_token, samples) == sum(float(sample.mask.sum()) for sample in samples)


# -- what an objective needs ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "updates", "streams"),
    [
        ("spar", 1, {"advantages"}),
        ("spar", 2, {"advantages", "old_logprobs"}),
        ("mopd", 1, {"advantages", "ref_logprobs", "sampler_logprobs"}),
        ("mopd", 4, {"advantages", "ref_logprobs", "sampler_logprobs"}),
        ("clip-forward-kl", 4, {"teacher_logprobs"}),
    ],
)
def test_needed_streams(name, updates, streams):
    without = draw_samples(streams=())
    assert set(objective.needed(OBJECTIVES[name], without, updates)) == streams


def test_old_logprobs_of_one_sample_are_wanted_of_all():
    samples = [*draw_samples(streams=("advantages",)), *draw_samples("b", (5,))]
    with pytest.raises(ValueError, match=r"old_logprobs: want a stream of every sample.*none of sample 'a-0'"):
        objective.check_streams(OBJECTIVES["spar"], samples)


@pytest.mark.parametrize(
    ("name", "stream", "value"),
    [
        ("spar", "advantages", float("nan")),
        ("spar", "advantages", float("-inf")),
        ("mopd", "ref_logprobs", float("inf")),
        ("clip-forward-kl", "teacher_logprobs", float("nan")),
    ],
)
def test_streams_that_are_not_finite(name, stream, value):
    samples = draw_samples()
    getattr(samples[2], stream)[int(samples[2].mask.nonzero()[0, 0])] = value
    with pytest.raises(NonFiniteError, match=f"{stream}: want finite numbers where mask > 0; got others, 'a-2'"):
        objective.check_streams(OBJECTIVES[name], samples)


def test_what_nobody_reads_and_a_teacher_that_excludes_a_token_may_be_infinite():
    samples = draw_samples()
    stream = samples[2].teacher_logprobs
    stream[0], stream[int(samples[2].mask.nonzero()[0, 0])] = torch.nan, -torch.inf
    objective.check_streams(OBJECTIVES["clip-forward-kl"], samples)


def test_a_missing_stream_of_a_packed_batch_is_named(model):
    with pytest.raises(ValueError, match=r"ref_logprobs: want a stream of every sample, for kl_coef=0\.1"):
        objective.loss(OBJECTIVES["ppo"], model, pack(draw_samples(streams=("advantages", "sampler_logprobs"))), 1.0)


# -- log-probabilities ------------------------------------------------------------------------------------------------
def test_logprobs_are_those_of_full_logits_at_the_sampling_temperature(model):
    samples = samples_of("spar")
    found = model.logprobs(pack(samples)).split([sample.tokens for sample in samples])
    for sample, logprobs in zip(samples, found, strict=True):
        places, wanted, _ = rows(model, sample)
        torch.testing.assert_close(logprobs[places], wanted.float(), rtol=0, atol=1e-6)
        assert float(logprobs[sample.mask == 0].abs().sum()) == 0


def test_only_samples_without_a_stream_are_given_it(model):
    told, lacking = draw_samples(lengths=(6,))[0], draw_samples("b", (7,), streams=())[0]
    first, second = objective.with_logprobs("old_logprobs", [told, lacking], model)
    assert first is told
    assert torch.equal(second.old_logprobs, model.logprobs(pack([told, lacking]))[6:])
    assert second.ref_logprobs is None
