"""Draft checkpoints in the layouts of SGLang / SpecForge, vLLM and speculators: read with every trap checked, written.

What the layouts call the hidden states of the target (GatedEagle3Config.aux_layers counts layers that have run):
    eagle_config.eagle_aux_hidden_state_layer_ids  SGLang, SpecForge: id + 1 layers have run
    eagle_aux_hidden_state_layer_ids (top level)   vLLM, speculators: id layers have run
    neither                                        all of them: 2, L / 2 and L - 3 layers have run
SGLang knows the nested key only. vLLM prefers the top-level one; of its two model runners one then reads the nested
key, as if it were its own, and one does not. Files written here carry both, each in its own meaning. Engines take
hidden states in ascending order, however the ids are listed.

Positions: a token is rotated by its own index here and in speculators (the first input is token 1); SpecForge counts
from 0. Rotary attention sees differences only, so nothing is converted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from m3.checkpoint import FLOATS, Checkpoint, write_checkpoint
from m3.draft import layout_tensors as tensors
from m3.models.decoder import DecoderConfig, RopeConfig
from m3.models.gated_eagle3 import GatedEagle3, GatedEagle3Config
from m3kernels.checks import refuse

LAYOUTS = ("specforge", "vllm", "speculators")
IDS = "eagle_aux_hidden_state_layer_ids"
STOCK, GATED = "LlamaForCausalLMEagle3", "LlamaForCausalLMEagle3Gated"
SPECULATORS_TYPE, SPECULATORS_GATED = "eagle3", "eagle3_gated"
OP = "load_draft"
INTEGERS = (torch.int64, torch.int32)
MASKS = (torch.bool, torch.uint8, torch.int64)


# -- reading ----------------------------------------------------------------------------------------------------------
def load_draft(
    folder: str | Path,
    target: DecoderConfig,
    *,
    layout: str = "auto",
    gate_layout: str = "auto",
    gate_key: str | None = None,
    aux_ids: str | Sequence[int] = "auto",
    d2t: str = "auto",
    norm_before_residual: bool | None = None,
) -> tuple[GatedEagle3Config, dict[str, Tensor]]:
    """Config and tensors of the draft in ``folder`` (config.json and safetensors), under the names of GatedEagle3.

    Args:
        target: config of the model it drafts for.
        layout: "specforge", "vllm", "speculators", or "auto": speculators if config.json says so, else either other.
        gate_layout: "separate", "per_head", "per_kv_group" (m3.draft.layout_tensors), or "auto": by the rows of q_proj
            and what config.json says.
        gate_key: the file's name of the gate's weight; only needed if it is neither attn_gate nor gate_proj.
        aux_ids: "auto"; "sglang" or "vllm": the key and meaning of that engine; or numbers of layers that have run.
        d2t: "auto", "difference" or "absolute".
        norm_before_residual: in place of what config.json says. Needed for a speculators file that does not say it.
    Returns:
        (config, tensors in the file's dtypes). ``embed_tokens.weight`` is among them if the file has it.
    Raises:
        ValueError: a tensor or key that is missing, malformed, unknown, contradictory, or has two readings; names it
            and the argument that decides.
    """
    if layout not in ("auto", *LAYOUTS):
        raise refuse(OP, "layout", " or ".join(("auto", *LAYOUTS)), repr(layout))
    if gate_layout not in ("auto", *tensors.GATE_LAYOUTS):
        raise refuse(OP, "gate_layout", " or ".join(("auto", *tensors.GATE_LAYOUTS)), repr(gate_layout))
    file = _File(Checkpoint(folder), target, layout, gate_key)
    draft = file.sizes()
    gate, state = file.gate(draft, None if gate_layout == "auto" else gate_layout)
    num_aux = file.num_aux(draft.hidden_size)
    config = GatedEagle3Config(
        hidden_size=draft.hidden_size,
        target_hidden_size=target.hidden_size,
        num_aux=num_aux,
        intermediate_size=draft.intermediate_size,
        num_heads=draft.num_heads,
        num_kv_heads=draft.num_kv_heads,
        head_dim=draft.head_dim,
        vocab_size=target.vocab_size,
        draft_vocab_size=file.draft_vocab_size(draft.hidden_size),
        rms_norm_eps=draft.rms_norm_eps,
        rope=draft.rope,
        gate=gate,
        gate_bias=tensors.GATE_BIAS in file.names,
        norm_before_residual=file.norm_before_residual(norm_before_residual),
        norm_before_fc=file.has_norm("norm_before_fc", tensors.INPUT_NORM),
        fc_norm=file.has_norm("fc_norm", f"{tensors.FC_NORM}0.weight"),
        norm_output=file.flag("norm_output") or False,
        aux_layers=file.aux_layers(aux_ids, num_aux),
        max_position_embeddings=draft.max_position_embeddings,
    )
    return config, file.tensors(config, state, d2t)


def build_draft(config: GatedEagle3Config, state: Mapping[str, Tensor], embedding: Tensor) -> GatedEagle3:
    """The module, in fp32, over the checkpoint's own embedding if it has one, else over the target's."""
    weights = {name: tensor for name, tensor in state.items() if name != tensors.EMBEDDING}
    draft = GatedEagle3(config, state.get(tensors.EMBEDDING, embedding))
    draft.load_state_dict(weights)
    return draft


class _File:
    """One checkpoint on its way in: ``config`` is flat, ``names`` maps our tensor names to the file's."""

    def __init__(self, source: Checkpoint, target: DecoderConfig, layout: str, gate_key: str | None) -> None:
        self.source, self.target = source, target
        self.names = tensors.canonical_names(source.names, gate_key)
        for ours, name in self.names.items():
            if not tensors.is_known(ours):
                self.refuse_tensor(name)
        config = source.config
        kind = config.get("speculators_model_type")
        if kind is not None and kind not in (SPECULATORS_TYPE, SPECULATORS_GATED):
            self.refuse("speculators_model_type", f"{SPECULATORS_TYPE!r} or {SPECULATORS_GATED!r}", kind)
        found = "speculators" if kind is not None else "vllm" if layout == "vllm" else "specforge"
        if layout not in ("auto", found):
            said = "no speculators_model_type" if kind is None else f"speculators_model_type {kind!r}"
            raise refuse(OP, "layout", f"'auto' or '{found}' for a config.json with {said}", repr(layout))
        self.layout, self.asked = found, layout
        if found == "speculators":
            layer = config.get("transformer_layer_config")
            if not isinstance(layer, dict):
                self.refuse("transformer_layer_config", "an object", layer)
            config = {
                **layer,
                **{key: value for key, value in config.items() if key not in ("model_type", "architectures")},
            }
        self.config = config
        nested = config.get("eagle_config")
        if not isinstance(nested, dict | None):
            self.refuse("eagle_config", "an object", nested)
        self.eagle: dict[str, Any] = nested or {}

    def refuse(self, key: str, want: str, got: object) -> NoReturn:
        raise refuse(OP, f"config.json: {key}", want, f"{got!r}"[:200])

    def refuse_tensor(self, name: str) -> NoReturn:
        want = "a tensor of an EAGLE-3 draft (if it is the gate's weight, give gate_key=)"
        raise refuse(OP, f"{self.source.file_of(name)}: {name}", want, "an unknown one")

    def get(self, name: str, shape: tuple[int | None, ...], dtypes: Sequence[torch.dtype] = FLOATS) -> Tensor:
        return self.source.get(self.names.get(name, name), shape, dtypes)

    def flag(self, key: str) -> bool | None:
        """A boolean of eagle_config or of the top level; None if neither has it."""
        value = self.eagle.get(key, self.config.get(key))
        if not isinstance(value, bool | None):
            self.refuse(key, "true or false", value)
        return value

    # -- sizes --------------------------------------------------------------------------------------------------------
    def sizes(self) -> DecoderConfig:
        """The flat config as that of a decoder of one layer, head_dim by the rows of k_proj."""
        config = dict(self.config)
        if config.get("model_type") != "llama":
            self.refuse("model_type", "'llama': a layer without norms of q and k", config.get("model_type"))
        for key in ("attention_bias", "mlp_bias", "bias", "qkv_bias", "tie_word_embeddings"):
            if config.get(key):
                self.refuse(key, "false", config[key])
        if config.get("num_hidden_layers", 1) != 1:
            self.refuse("num_hidden_layers", "1", config["num_hidden_layers"])
        if config.get("logit_scale", 1) != 1:
            self.refuse("logit_scale", "1", config["logit_scale"])
        if "sliding_attention" in (config.get("layer_types") or ()):
            self.refuse("layer_types", "full attention", config["layer_types"])
        if self.flag("use_aux_hidden_state") is False:
            self.refuse("use_aux_hidden_state", "true: a draft over several hidden states", False)
        self.check_rope()
        config["num_hidden_layers"] = 1
        said = config.pop("head_dim", None)
        plain = DecoderConfig.from_hf({**config, "head_dim": said or 2})
        rows = len(self.get(tensors.K, (None, 2 * plain.hidden_size)))
        if rows % (2 * plain.num_kv_heads):
            want = f"rows for {plain.num_kv_heads} heads of an even size"
            raise refuse(OP, self.names[tensors.K], want, f"{rows} rows")
        head_dim = rows // plain.num_kv_heads
        if said not in (None, head_dim):
            self.refuse("head_dim", f"{head_dim}, as the {rows} rows of k_proj say", said)
        if plain.vocab_size != self.target.vocab_size:
            self.refuse("vocab_size", f"the target's, {self.target.vocab_size}", plain.vocab_size)
        if config.get("target_hidden_size") not in (None, self.target.hidden_size):
            self.refuse("target_hidden_size", f"the target's, {self.target.hidden_size}", config["target_hidden_size"])
        return DecoderConfig.from_hf({**config, "head_dim": head_dim})

    def check_rope(self) -> None:
        """rope_theta and the scaling may stand in three places; all that are filled must say the same."""
        parameters, scaling = self.config.get("rope_parameters"), self.config.get("rope_scaling")
        for key, value in (("rope_parameters", parameters), ("rope_scaling", scaling)):
            if not isinstance(value, dict | None):
                self.refuse(key, "an object", value)
        thetas = {
            place: (found or {}).get("rope_theta")
            for place, found in (("rope_parameters", parameters), ("rope_scaling", scaling))
        }
        thetas["the top level"] = self.config.get("rope_theta")
        said = {place: theta for place, theta in thetas.items() if theta is not None}
        if any(theta != next(iter(said.values())) for theta in said.values()):
            self.refuse("rope_theta", "one value", said)
        if parameters and scaling and _scaling(parameters) != _scaling(scaling):
            self.refuse("rope_scaling", f"what rope_parameters says, {_scaling(parameters)}", scaling)
        for place in (self.config, parameters or {}, scaling or {}):
            if place.get("partial_rotary_factor") not in (None, 1, 1.0):
                self.refuse("partial_rotary_factor", "1", place["partial_rotary_factor"])

    def num_aux(self, hidden: int) -> int:
        """How many hidden states fc takes."""
        columns, size = self.get(tensors.FC, (hidden, None)).shape[1], self.target.hidden_size
        if columns % size or not columns:
            want = f"({hidden}, n x {size}), the target's hidden size"
            raise refuse(OP, self.names[tensors.FC], want, f"({hidden}, {columns})")
        count = columns // size
        if self.config.get("num_aux_hidden_states") not in (None, count):
            self.refuse(
                "num_aux_hidden_states",
                f"{count}, as fc.weight has {columns} columns",
                self.config["num_aux_hidden_states"],
            )
        return count

    def draft_vocab_size(self, hidden: int) -> int:
        rows = len(self.get(tensors.HEAD, (None, hidden)))
        if self.config.get("draft_vocab_size") not in (None, rows):
            self.refuse("draft_vocab_size", f"{rows}, the rows of lm_head.weight", self.config["draft_vocab_size"])
        return rows

    # -- options ------------------------------------------------------------------------------------------------------
    def gate(self, draft: DecoderConfig, layout: str | None) -> tuple[str, dict[str, Tensor]]:
        """(kind of gate, q_proj and gate apart)."""
        wide = 2 * draft.hidden_size
        weight = self.get(tensors.Q, (None, wide))
        kind = tensors.fused_gate(len(weight), draft.num_heads, draft.head_dim)
        kinds, said = tensors.claimed_gate(self.config)
        if tensors.GATE in self.names:
            name = self.names[tensors.GATE]
            if kind != "none":
                raise refuse(OP, name, f"none: q_proj holds a gate in its {len(weight)} rows", "a second one")
            gate = self.get(tensors.GATE, (None, wide))
            rows = {draft.num_heads: "headwise", draft.num_heads * draft.head_dim: "elementwise"}
            if len(gate) not in rows:
                raise refuse(OP, name, " or ".join(f"{count} rows ({kind})" for count, kind in rows.items()), gate)
            kind, state = rows[len(gate)], {tensors.Q: weight, tensors.GATE: gate}
            if (layout or self.config.get("attn_output_gate_layout")) in tensors.FUSED:
                got = layout or self.config["attn_output_gate_layout"]
                raise refuse(OP, "gate_layout", f"'auto' or 'separate' for a file with {name}", repr(got))
        elif kind == "none":
            if layout is not None:
                raise refuse(OP, "gate_layout", "'auto' for a file without a gate", repr(layout))
            state = {tensors.Q: weight}
        else:
            sizes = (draft.num_heads, draft.num_kv_heads, draft.head_dim)
            state = dict(
                zip((tensors.Q, tensors.GATE), tensors.split_gate(weight, kind, *sizes, layout or said), strict=True)
            )
        if kinds - {kind}:
            self.refuse("attn_output_gate", f"{kind}, as the tensors say", " and ".join(sorted(kinds)))
        return kind, state

    def norm_before_residual(self, given: bool | None) -> bool:
        said = self.flag("norm_before_residual")
        if given is None and said is None and self.layout == "speculators":
            want = "true or false: without it vLLM assumes true and speculators false; give norm_before_residual="
            raise refuse(OP, "config.json: norm_before_residual", want, "none")
        return bool(said if given is None else given)

    def has_norm(self, key: str, tensor: str) -> bool:
        """Whether a norm before fc is on: by its flag, which must not contradict the tensors, else by the tensors."""
        said, found = self.flag(key), tensor in self.names
        if said is None and key == "fc_norm":
            said = self.flag("use_aux_norm")
        if said is False and found:
            self.refuse(key, f"true for a file with {self.names[tensor]}", said)
        return found if said is None else said

    def aux_layers(self, aux_ids: str | Sequence[int], num_aux: int) -> tuple[int, ...]:
        """In our meaning, by the reading asked for."""
        layers = self.target.num_layers
        if not isinstance(aux_ids, str):
            return self.checked(tuple(aux_ids), "aux_ids", num_aux)
        if aux_ids not in ("auto", "sglang", "vllm"):
            raise refuse(OP, "aux_ids", "auto, sglang, vllm or numbers of layers", repr(aux_ids))
        nested, top = self.ids(self.eagle, f"eagle_config: {IDS}"), self.ids(self.config, IDS)
        sglang = nested and tuple(index + 1 for index in nested)
        default = (2, layers // 2, layers - 3)
        if aux_ids == "auto":
            if nested and not top and (self.asked == "vllm" or self.layout == "speculators"):
                want = f"{IDS} at the top level (vLLM's runners read the nested one differently); give aux_ids="
                self.refuse(f"eagle_config: {IDS}", want, list(nested))
            if top and not nested and self.asked == "specforge" and sorted(top) != sorted(default):
                self.refuse(IDS, "it in eagle_config (SGLang reads no other); give aux_ids=", list(top))
            if sglang and top and sorted(sglang) != sorted(top):
                want = f"{IDS} - 1 = {[index - 1 for index in top]}; give aux_ids='sglang' or aux_ids='vllm'"
                self.refuse(f"eagle_config: {IDS}", want, list(nested or ()))
        found = sglang if aux_ids == "sglang" else top if aux_ids == "vllm" else top or sglang
        return self.checked(found or default, f"config.json: {IDS}", num_aux)

    def ids(self, config: Mapping[str, Any], label: str) -> tuple[int, ...] | None:
        found = config.get(IDS)
        if found is None:
            return None
        if not isinstance(found, list) or not found or any(type(index) is not int for index in found):
            self.refuse(label, "a list of ints", found)
        return tuple(found)

    def checked(self, found: tuple[int, ...], label: str, num_aux: int) -> tuple[int, ...]:
        layers = self.target.num_layers
        distinct = tuple(sorted({index for index in found if type(index) is int and 0 <= index <= layers}))
        if len(found) != num_aux or len(distinct) != num_aux:
            want = f"{num_aux} (the columns of fc) distinct numbers of layers that have run, 0 .. {layers}"
            raise refuse(OP, label, want, f"{found}")
        return distinct

    # -- tensors ------------------------------------------------------------------------------------------------------
    def tensors(self, config: GatedEagle3Config, state: dict[str, Tensor], meaning: str) -> dict[str, Tensor]:
        shapes = tensors.shapes(config)
        for ours, name in self.names.items():
            if ours not in shapes and ours != tensors.EMBEDDING:
                self.refuse_tensor(name)
        found = {
            name: state[name] if name in state else self.get(name, shape)
            for name, shape in shapes.items()
            if name not in (tensors.D2T, tensors.T2D)
        }
        found |= self.vocabulary(config, meaning)
        own = (config.vocab_size, config.hidden_size)
        if tensors.EMBEDDING in self.names or config.hidden_size != config.target_hidden_size:
            found[tensors.EMBEDDING] = self.get(tensors.EMBEDDING, own)
        return found

    def vocabulary(self, config: GatedEagle3Config, meaning: str) -> dict[str, Tensor]:
        rows, size = config.draft_vocab_size, config.vocab_size
        t2d = None
        if tensors.T2D in self.names:
            stored = self.get(tensors.T2D, (size,), MASKS)
            t2d = stored.bool()
            if not torch.equal(t2d.to(stored.dtype), stored):
                raise refuse(
                    OP, self.names[tensors.T2D], "0 and 1", f"values {int(stored.min())} .. {int(stored.max())}"
                )
        if tensors.D2T not in self.names and rows == size:
            d2t = torch.zeros(rows, dtype=torch.int64)  # every token of the target is a token of the draft
        else:
            d2t = self.get(tensors.D2T, (rows,), INTEGERS)
        d2t = tensors.differences(d2t, t2d, size, meaning)
        if t2d is None:
            t2d = torch.zeros(size, dtype=torch.bool)
            t2d[d2t + torch.arange(rows)] = True
        return {tensors.D2T: d2t, tensors.T2D: t2d}


def _scaling(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Scaling keys of a rope object, under one name for its type."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    rest = {
        key: value
        for key, value in rope.items()
        if key not in ("rope_type", "type", "rope_theta") and value is not None
    }
    return {"rope_type": kind, **rest}


# -- writing ----------------------------------------------------------------------------------------------------------
def save_draft(
    folder: str | Path,
    config: GatedEagle3Config,
    state: Mapping[str, Tensor],
    *,
    layout: str = "specforge",
    ungated: bool = False,
    verifier: str | None = None,
) -> None:
    """Write config.json and model.safetensors.

    A stock engine cannot serve a draft with a gate, and SGLang (specforge) none with norm_before_residual: such files
    name another architecture, so that stock engines stop rather than draft wrongly.

    Args:
        state: tensors under the names of GatedEagle3, and ``embed_tokens.weight`` if the draft has its own.
        layout: "specforge", "vllm" or "speculators".
        ungated: say that stock engines must be able to serve it: refused where they cannot.
        verifier: name or path of the target, for the speculators layout.
    Raises:
        ValueError: tensors that are missing, unknown or of another shape; a gate with ``ungated``.
    """
    op = "save_draft"
    if layout not in LAYOUTS:
        raise refuse(op, "layout", " or ".join(LAYOUTS), repr(layout))
    needs = "" if config.gate == "none" else f"gate {config.gate!r}"
    if config.norm_before_residual and layout == "specforge":
        needs = needs or "norm_before_residual"
    if ungated and needs:
        raise refuse(op, "ungated", f"False for a draft with {needs}, which stock engines would ignore", ungated)
    shapes = tensors.shapes(config)
    if tensors.EMBEDDING in state or config.hidden_size != config.target_hidden_size:
        shapes[tensors.EMBEDDING] = (config.vocab_size, config.hidden_size)
    for name in sorted(shapes.keys() ^ state.keys()):
        want = "a tensor" if name in shapes else "no such tensor for this config"
        raise refuse(op, f"state: {name}", want, state.get(name, "none"))
    for name, shape in shapes.items():
        if tuple(state[name].shape) != shape:
            raise refuse(op, f"state: {name}", f"{shape}", state[name])
    tensors.differences(state[tensors.D2T].cpu(), state[tensors.T2D].bool().cpu(), config.vocab_size, "difference")
    written = _stock_config(config, str(state[tensors.FC].dtype).removeprefix("torch."))
    if layout == "speculators":
        written = _speculators_config(config, written, bool(needs), verifier)
    else:
        top = {IDS: list(config.aux_layers), "norm_before_residual": config.norm_before_residual}
        written |= {"architectures": [GATED if needs else STOCK], **top, **_options(config)}
        if layout == "specforge":
            nested = [layers - 1 for layers in config.aux_layers]
            written["eagle_config"] = {
                IDS: nested,
                "use_aux_hidden_state": True,
                "norm_before_fc": config.norm_before_fc,
            }
    write_checkpoint(Path(folder), written, {name: state[name] for name in shapes})


def _options(config: GatedEagle3Config) -> dict[str, Any]:
    optional: dict[str, Any] = {}
    if config.gate != "none":
        optional = {"attn_output_gate": config.gate, "attn_output_gate_layout": "separate"}
    if config.norm_output:  # absent is false; SpecForge takes a false one to mean logits without the final norm
        optional["norm_output"] = True
    return {
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size,
        "num_aux_hidden_states": config.num_aux,
        "norm_before_fc": config.norm_before_fc,
        "fc_norm": config.fc_norm,
        **optional,
    }


def _stock_config(config: GatedEagle3Config, dtype: str) -> dict[str, Any]:
    """The keys of a Llama config, rope in the forms of transformers 4 and 5."""
    scaling = _rope_object(config.rope)
    return {
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope.theta,
        "rope_scaling": scaling if config.rope.kind != "default" else None,
        "rope_parameters": {**scaling, "rope_theta": config.rope.theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }


def _rope_object(rope: RopeConfig) -> dict[str, Any]:
    keys = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }[rope.kind]
    return {"rope_type": rope.kind, **{key: getattr(rope, key) for key in keys}}


def _speculators_config(
    config: GatedEagle3Config, layer: dict[str, Any], gated: bool, verifier: str | None
) -> dict[str, Any]:
    proposal = {"proposal_type": "greedy", "speculative_tokens": 3}
    return {
        "architectures": [GATED if gated else "Eagle3Speculator"],
        "speculators_model_type": SPECULATORS_GATED if gated else SPECULATORS_TYPE,
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [proposal],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": verifier, "architectures": []},
        },
        "transformer_layer_config": layer,
        IDS: list(config.aux_layers),
        "norm_before_residual": config.norm_before_residual,
        **_options(config),
        "torch_dtype": layer["torch_dtype"],
    }
