"""The law of a row of logits, and the noise that draws from it: plain torch, fp64. The vocabulary of reference.py.

    z = logits (nan -> -inf, clipped to +-1e30, forbidden tokens -inf),   x = (z - max z) / T,   w = exp(x)
    top_k   keep x >= the k-th largest x
    top_p   of those kept, with total W: keep v iff the mass of kept tokens strictly above x_v is < top_p * W
    min_p   keep x >= log(min_p)
    p_v = w_v / (sum of kept w), 0 elsewhere

Filters are thresholds, so tokens that tie at one are all kept. Noise is Philox4x32-10 (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", 2011), keyed by the request's seed and the position of the token that is drawn: it does
not depend on how the position was reached. If E_v are independent and exponential, argmin_v E_v / p_v has law p.
"""

from __future__ import annotations

import torch
from torch import Tensor

CLIP = 1e30
RACE, REFINED, NODE_COIN, FINAL_COIN = range(4)  # streams of noise
SMALL = 256  # words of the race below this are refined by another 32 bits
WORD = 2.0**-32
_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


# -- noise ------------------------------------------------------------------------------------------------------------
def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b, for 32-bit words held in int64."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four words for every key and counter, 32-bit words held in int64, broadcast together."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        h0, l0 = _multiply(c0, _MULTIPLIERS[0])
        h1, l1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _words(seed: Tensor, position: Tensor, first: Tensor, stream: int) -> tuple[Tensor, ...]:
    halves = (position & _MASK, (position >> 32) & _MASK)
    return philox((seed & _MASK, (seed >> 32) & _MASK), (first & _MASK, *halves, torch.full_like(first, stream)))


def race(seed: Tensor, position: Tensor, tokens: Tensor) -> Tensor:
    """Exponential noise E(seed, position, token) in fp64, all int64 and broadcast together; exact to 2**-64."""
    seed, position, tokens = torch.broadcast_tensors(seed, position, tokens)

    def word(stream: int) -> Tensor:
        four = torch.stack(_words(seed, position, tokens >> 2, stream))
        return four.gather(0, (tokens & 3)[None])[0].double()

    coarse = word(RACE)
    u = (coarse + 0.5) * WORD
    if bool((coarse < SMALL).any()):
        u = torch.where(coarse < SMALL, (coarse + (word(REFINED) + 0.5) * WORD) * WORD, u)
    return -torch.log1p(-u.clamp(max=1 - 2.0**-24))


def coin(seed: Tensor, position: Tensor, stream: int) -> Tensor:
    """Uniform noise in [0, 1), fp64, 53 bits; seed and position int64."""
    seed, position = torch.broadcast_tensors(seed, position)
    o0, o1, _, _ = _words(seed, position, torch.zeros_like(seed), stream)
    return ((o0 << 21) | (o1 >> 11)).double() * 2.0**-53


# -- law --------------------------------------------------------------------------------------------------------------
def allowed(bits: Tensor, vocabulary: int) -> Tensor:
    """(..., V) bool from (..., ceil(V / 32)) int32: token v is allowed iff bit v % 32 of word v // 32 is set."""
    shifts = torch.arange(32, device=bits.device, dtype=torch.int32)
    return ((bits[..., None] >> shifts) & 1).flatten(-2)[..., :vocabulary].bool()


def clean(logits: Tensor, bits: Tensor | None) -> Tensor:
    """z: (..., V) fp64."""
    z = logits.double().nan_to_num(-torch.inf, torch.inf, -torch.inf)
    z = torch.where(z == -torch.inf, z, z.clamp(-CLIP, CLIP))
    return z if bits is None else z.masked_fill(~allowed(bits, z.shape[-1]), -torch.inf)


def probabilities(z: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """p: (V,) fp64 from z (V,) of a row with at least one token allowed; temperature > 0."""
    x = (z - z.max()) / temperature
    mass = x.exp()
    if 0 < top_k < len(x):
        mass = mass.where(x >= x.topk(top_k).values[-1], 0.0)
    if top_p < 1:
        order = x.argsort(descending=True, stable=True)
        ascending = x[order]
        upto = mass[order].cumsum(0)
        above = upto.new_zeros(len(x))  # mass strictly above each: that of the elements before its run of equals
        start = torch.searchsorted(-ascending, -ascending, right=False)
        above[order] = torch.where(start > 0, upto[(start - 1).clamp(min=0)], 0.0)
        mass = mass.where(above < top_p * upto[-1], 0.0)
    if min_p > 0:
        mass = mass.where(x >= torch.tensor(min_p, dtype=torch.float64).log(), 0.0)
    return mass / mass.sum()


def invert(mass: Tensor, u: float) -> int:
    """First index whose cumulative mass exceeds u times the total; the last with mass if rounding leaves none."""
    upto = mass.cumsum(0)
    beyond = (upto > u * upto[-1]).nonzero()
    return int(beyond[0]) if len(beyond) else int(mass.nonzero()[-1])
