"""The model that is trained: a causal language model of transformers, read as hidden states and a linear head.

The losses of m3kernels.policy_loss want hidden states (T, D) and the head, never the logits (T, V). Sequences are
packed into one row, and what they share of their beginnings is computed once (shared_prefix.py); where a model does not
allow that, transformers (5.2 or later) masks them from one another by their position ids. Dropout is off: the ratio of
the new policy to the old one would be noise.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from m3.train import shared_prefix
from m3.train.shared_prefix import Tree
from m3.train.streams import Packed, Sample, pack
from m3kernels.checks import refuse
from m3kernels.policy_loss import linear_logprobs

TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "chat_template*", "vocab.json", "merges.txt", "*.model")
HEAD_ERROR = 1e-3  # nats, in fp32: what the head read as linear may differ from the model's own logits
WIDEST_CHECKED = 8  # tokens of that comparison
FINGERPRINT = 64  # first values of each frozen parameter


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (peft) instead of all weights: W + alpha / rank * B A, on every linear layer but the head."""

    rank: int = 16  # ours: all rates of learning are the user's own; ranks of 8 to 64 are usual
    alpha: float = 32.0  # ours: twice the rank, as usual
    target: str | tuple[str, ...] = "all-linear"  # or names of layers, such as ("q_proj", "v_proj")

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise refuse("LoraConfig", "rank, alpha", "rank >= 1, alpha > 0", f"{self.rank}, {self.alpha}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearHead:
    """logits = cap(hidden @ weight.T + bias), cap(u) = softcap * tanh(u / softcap), or u where softcap is 0."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    softcap: float


class PolicyModel(nn.Module):
    """A causal language model for training.

    Args:
        causal: a transformers model with a linear head; used as it is, in place.
        source: folder that it came from, whose tokenizer goes beside what ``save`` writes.
        gradient_checkpointing: keep the layers' inputs alone and compute the rest again in the backward pass.
        lora: train adapters only; needs peft.
    Raises:
        ValueError: the model's logits are not what its head gives for its hidden states (a head that is no linear one).
    """

    def __init__(
        self,
        causal: Any,
        *,
        source: str | Path | None = None,
        gradient_checkpointing: bool = False,
        lora: LoraConfig | None = None,
    ) -> None:
        super().__init__()
        _without_dropout(causal)
        self.causal: Any = causal if lora is None else _adapted(causal, lora)
        self.source = None if source is None else Path(source)
        self.shares = shared_prefix.apply_to(self.causal)
        self.train(gradient_checkpointing)  # the only thing that the mode decides here
        if gradient_checkpointing:
            later = getattr(self.causal, "activation_checkpointing_enable", None)  # its name in newer transformers
            enable = later or self.causal.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        if not next(self.causal.parameters()).is_meta:
            self._check_head()

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        attention: str = "sdpa",
        gradient_checkpointing: bool = False,
        lora: LoraConfig | None = None,
    ) -> PolicyModel:
        """The model of a Hugging Face checkpoint folder.

        Args:
            dtype: of weights, gradients and the optimiser's moments. bf16 halves memory, but drops an update below
                about 2^-9 of its weight.
            attention: of transformers: "sdpa", "eager", "flash_attention_2". Prefixes are shared with "sdpa" alone.
        """
        import transformers

        if not (Path(folder) / "config.json").is_file():
            raise refuse("PolicyModel.load", "folder", "a Hugging Face checkpoint with config.json", str(folder))
        causal = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=dtype, attn_implementation=attention, local_files_only=True
        ).to(device)
        return cls(causal, source=folder, gradient_checkpointing=gradient_checkpointing, lora=lora)

    # -- what the losses read -----------------------------------------------------------------------------------------
    @property
    def device(self) -> torch.device:
        return next(self.causal.parameters()).device

    @property
    def body(self) -> nn.Module:
        """The model without its head."""
        return self.causal.base_model

    @property
    def head(self) -> LinearHead:
        layer = self.causal.get_output_embeddings()
        softcap = getattr(self.causal.config, "final_logit_softcapping", None) or 0.0
        return LinearHead(weight=layer.weight, bias=getattr(layer, "bias", None), softcap=float(softcap))

    def forward(self, ids: Tensor, position_ids: Tensor, tree: Tree | None = None) -> Tensor:
        """(1, T, D) hidden states, normed, of packed ids (T,); or of those (U,) that a tree computes."""
        more = {} if tree is None else {"tree": tree, "attention_mask": ids.new_empty(1, 1, 1, 1)}  # made, not read
        return self.body(
            input_ids=ids[None], position_ids=position_ids[None], use_cache=False, **more
        ).last_hidden_state

    def hidden(self, packed: Packed, *, least: int = shared_prefix.LEAST) -> Tensor:
        """(T, D) normed hidden states; those of a sequence are independent of its neighbours, but for rounding.

        Args:
            least: tokens of a beginning that sequences share, from which on it is computed once.
        """
        ids, places = packed.ids, packed.position_ids
        tree = shared_prefix.tree(ids, packed.cu_seqlens, least) if self.shares else None
        if tree is None:
            return self(ids.to(self.device), places.to(self.device))[0]
        found = self(ids[tree.tokens].to(self.device), places[tree.tokens].to(self.device), tree)[0]
        return tree.spread(found)

    @torch.no_grad()
    def logprobs(self, packed: Packed) -> Tensor:
        """(T,) fp32 on the CPU: log-probability of each token that has a mask, in nats at its temperature; 0 elsewhere.

        Without gradient, and without logits of tokens that have no mask.
        """
        device = self.device
        rows = (packed.mask[1:] > 0).nonzero()[:, 0]
        hidden = self.hidden(packed)[rows.to(device)]
        head = self.head  # where the model is sharded, the pass has gathered it
        chosen = linear_logprobs(
            hidden, head.weight, packed.ids[rows + 1].to(device), bias=head.bias, softcap=head.softcap,
            temperature=packed.temperature[rows + 1].to(device),
        ).logprobs  # fmt: skip
        found = torch.zeros(len(packed.ids))
        found[rows + 1] = chosen.float().cpu()
        return found

    # -- its weights, elsewhere ---------------------------------------------------------------------------------------
    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that learn, by the name that they have in ``causal``; a tied one once."""
        return ((name, one) for name, one in self.causal.named_parameters() if one.requires_grad)

    def frozen(self) -> str:
        """Fingerprint of the parameters that do not learn (names, shapes, first values); "" where all of them do."""
        digest, count = hashlib.sha256(), 0
        for name, one in self.causal.named_parameters():
            if not one.requires_grad:
                count += 1
                digest.update(f"{name} {tuple(one.shape)}".encode())
                digest.update(whole(one.detach()).flatten()[:FINGERPRINT].double().cpu().numpy().tobytes())
        return digest.hexdigest() if count else ""

    def tensors(self) -> dict[str, Tensor]:
        """Weights by their names in a Hugging Face checkpoint, adapters merged: for an engine's update_weights.

        Whole ones: where the model is sharded, all ranks call this together.

        They share memory with the model where nothing was merged: copy what must outlive the next update.
        """
        from transformers.core_model_loading import revert_weight_conversion

        return dict(revert_weight_conversion(self.causal, self._merged()))

    def save(self, folder: str | Path) -> None:
        """A Hugging Face checkpoint, adapters merged, tokenizer beside it. ``checkpoint.export`` leaves no torn one."""
        folder = Path(folder)
        self.causal.save_pretrained(folder, state_dict=self._merged())
        for pattern in TOKENIZER_FILES if self.source is not None else ():
            for path in self.source.glob(pattern):  # type: ignore[union-attr]
                if path.is_file():
                    shutil.copy(path, folder / path.name)

    @torch.no_grad()
    def _merged(self) -> dict[str, Tensor]:
        """The state of ``causal`` as if it had no adapters; tied weights once."""
        modules = dict(self.causal.named_modules())
        once = {name for name, _ in (*self.causal.named_parameters(), *self.causal.named_buffers())}
        found = {}
        for name, tensor in self.causal.state_dict().items():
            if name not in once or ".lora_" in name:
                continue
            layer = modules[name.rpartition(".")[0].removesuffix(".base_layer")]
            adapted = name.endswith(".base_layer.weight")
            delta = layer.get_delta_weight("default").to(tensor.dtype) if adapted else None
            found[name.replace(".base_layer.", ".")] = whole(tensor if delta is None else tensor + delta)
        return found

    @torch.no_grad()
    def _check_head(self) -> None:
        """Two sequences that share half of their tokens, packed, against the model's own logits."""
        head = self.head
        count = min(WIDEST_CHECKED, len(head.weight))
        one = torch.arange(count)
        ids = torch.stack([one, torch.cat([one[: count // 2], one[count // 2 :].flip(0)])])
        none = torch.zeros(count), torch.full((count,), -1)
        both = pack([Sample(id="", ids=row, mask=none[0], steps=none[1]) for row in ids])
        ids = ids.to(self.device)
        logits = self.causal(input_ids=ids, use_cache=False).logits.float().flatten(0, 1)
        own = logits.log_softmax(-1).gather(1, ids.flatten()[:, None])[:, 0]
        hidden = self.hidden(both, least=1)
        read = linear_logprobs(hidden, head.weight, ids.flatten(), bias=head.bias, softcap=head.softcap).logprobs
        error = float((own - read).abs().max())
        bound = HEAD_ERROR if head.weight.dtype == torch.float32 else 0.1  # logits of transformers are rounded to bf16
        if not error <= bound * max(1.0, float(own.abs().max())):
            want = f"logits that are a linear head of the hidden states of packed sequences (softcap {head.softcap:g})"
            raise refuse("PolicyModel", "causal", want, f"log-probabilities {error:.3g} nats off")


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is sharded over ranks, gathered, by all of them; another one as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def moved(packed: Packed, device: torch.device) -> Packed:
    """The batch with its streams on a device; ``cu_seqlens`` stay on the CPU, where they are read."""
    changes = {
        field.name: value.to(device)
        for field in dataclasses.fields(packed)
        if field.name != "cu_seqlens" and (value := getattr(packed, field.name)) is not None
    }
    return dataclasses.replace(packed, **changes)


def _without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        name = "p" if isinstance(module, nn.Dropout) else "attention_dropout"
        if hasattr(module, name):
            setattr(module, name, 0.0)


def _adapted(causal: Any, lora: LoraConfig) -> Any:
    import peft

    target = lora.target if isinstance(lora.target, str) else list(lora.target)
    config = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=target, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(causal, config).get_base_model()
