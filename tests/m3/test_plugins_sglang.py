"""The SGLang plug-in against SGLang 0.5.23's own source, read from its wheel: it does not run where there is no GPU.

Its draft model and its hook registry are run as they are, the first over layers of plain torch (sglang_layers.py).
Skipped where no registry has the wheel.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import sys
import tomllib
import types
from pathlib import Path

import pytest
import torch
from sglang_layers import modules, source
from sglang_peer import wheel
from transformers import LlamaConfig

from m3.checkpoint import Checkpoint
from m3.draft.layouts import GATED, save_draft
from m3.models.decoder import RopeConfig
from m3.models.gated_eagle3 import GatedEagle3, GatedEagle3Config
from m3.plugins import sglang as plugin
from m3.plugins.sglang_tree import REPLACEMENTS
from m3kernels.spec_decode import sgl_compat

H, HEADS, KV_HEADS, HEAD_DIM, V, V_D, TOKENS = 24, 4, 2, 6, 37, 11, 9
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def there() -> None:
    wheel()


def constant(path: str, name: str) -> object:
    """Value of a constant at the top of a file of SGLang's."""
    for node in ast.parse(source(path)).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == name:
            return ast.literal_eval(node.value)
    raise LookupError(f"{path}: no {name}")


def arguments(path: str, name: str) -> list[tuple[str, object]]:
    """Names and defaults of a function's arguments in a file of SGLang's."""
    for node in ast.parse(source(path)).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            defaults = [inspect.Parameter.empty] * (len(node.args.args) - len(node.args.defaults))
            defaults += [ast.literal_eval(value) for value in node.args.defaults]
            return [(arg.arg, default) for arg, default in zip(node.args.args, defaults, strict=True)]
    raise LookupError(f"{path}: no {name}")


# -- the seams --------------------------------------------------------------------------------------------------------
def test_entry_points_are_in_the_group_that_sglang_loads():
    group = constant("sglang/srt/plugins/__init__.py", "GENERAL_PLUGINS_GROUP")
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][group]
    for value in points.values():
        module, _, function = value.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
    assert set(points) == {"m3_draft", "m3_tree"}


@pytest.mark.parametrize("target", REPLACEMENTS)
def test_replacements_take_what_sglang_gives(target):
    module, _, name = target.rpartition(".")
    theirs = arguments(f"{module.replace('.', '/')}.py", name)
    ours = [(key, value.default) for key, value in inspect.signature(REPLACEMENTS[target]).parameters.items()]
    assert [key for key, _ in ours] == [key for key, _ in theirs]
    for (key, default), (_, wanted) in zip(ours, theirs, strict=True):
        assert default == wanted or (key, default) == ("draft_probs", None)


def test_every_kernel_of_the_tree_module_is_replaced():
    path = "sglang/kernels/ops/speculative/tree.py"
    public = [node.name for node in ast.parse(source(path)).body if isinstance(node, ast.FunctionDef)]
    wanted = {f"sglang.kernels.ops.speculative.tree.{name}" for name in public if not name.startswith("_")}
    assert wanted <= set(REPLACEMENTS)


@pytest.fixture
def hooks(monkeypatch) -> types.ModuleType:
    """SGLang's hook registry, run from its source."""
    name = "sglang.srt.plugins.hook_registry"
    registry = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, registry)
    exec(compile(source("sglang/srt/plugins/hook_registry.py"), name, "exec"), registry.__dict__)
    for depth in range(1, name.count(".") + 1):
        package = name.rsplit(".", depth)[0]
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        sys.modules[package].__path__ = []
    return registry


def test_sglangs_hook_registry_puts_our_kernels_where_they_were_imported(hooks, monkeypatch):
    def theirs(*args: object) -> None:
        raise AssertionError("SGLang's kernel was called")

    by_module = itertools.groupby(sorted(REPLACEMENTS), key=lambda target: target.rpartition(".")[0])
    for path, targets in by_module:
        module = types.ModuleType(path)
        for target in targets:
            setattr(module, target.rpartition(".")[2], types.FunctionType(theirs.__code__, globals()))
        monkeypatch.setitem(sys.modules, path, module)
        parent, _, name = path.rpartition(".")
        while parent:
            package = sys.modules.get(parent) or types.ModuleType(parent)
            package.__path__ = []
            setattr(package, name, sys.modules[f"{parent}.{name}"])
            monkeypatch.setitem(sys.modules, parent, package)
            parent, _, name = parent.rpartition(".")
    tree = sys.modules["sglang.kernels.ops.speculative.tree"]
    importer = types.ModuleType("importer")
    importer.sgl_verify = tree.verify_tree_greedy
    monkeypatch.setitem(sys.modules, "importer", importer)

    plugin.register_tree()
    hooks.HookRegistry.apply_hooks()

    # node 1 follows the root, node 2 follows node 1; the target predicts 5, then 6, then 7
    predicts = torch.full((3,), -1, dtype=torch.int32)
    accept_index, accepted = torch.full((1, 3), -1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    links = [torch.tensor([row]) for row in ([4, 5, 6], [0, 1, 2], [1, 2, -1], [-1, -1, -1], [5, 6, 7])]
    importer.sgl_verify(predicts, accept_index, accepted, *links)
    assert predicts.tolist() == [5, 6, 7]
    assert accept_index.tolist() == [[0, 1, 2]]
    assert accepted.tolist() == [2]
    assert tree.verify_tree_greedy is importer.sgl_verify is not sgl_compat.verify_tree_greedy


# -- the draft --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def sglang_modules():
    return modules()


@pytest.fixture
def draft_class(sglang_modules, monkeypatch) -> type[torch.nn.Module]:
    for name, module in sglang_modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "m3.plugins.sglang_draft", raising=False)
    found = importlib.import_module("m3.plugins.sglang_draft").LlamaForCausalLMEagle3Gated
    monkeypatch.delitem(sys.modules, "m3.plugins.sglang_draft")
    return found


def made(gate: str, **options: object) -> GatedEagle3:
    config = GatedEagle3Config(
        hidden_size=H,
        target_hidden_size=H,
        intermediate_size=28,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        vocab_size=V,
        draft_vocab_size=V_D,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=10000.0),
        gate=gate,
        aux_layers=(2, 15, 27),
        max_position_embeddings=64,
        **options,
    )
    draft = GatedEagle3(config, torch.randn(V, H))
    for parameter in draft.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    draft.set_vocabulary(torch.arange(V_D) * 3)
    return draft


def opened(draft_class, folder: Path, embedding: torch.Tensor, **changes: object) -> torch.nn.Module:
    """SGLang's module over a checkpoint, as its loader makes it."""
    checkpoint = Checkpoint(folder)
    config = LlamaConfig(**{**checkpoint.config, **changes})
    module = draft_class(config)
    with torch.no_grad():
        module.load_weights((name, checkpoint.get(name, None, None)) for name in checkpoint.names)
    module.model.embed_tokens.weight.data.copy_(embedding)
    return module


@torch.no_grad()
def run(module: torch.nn.Module, tokens: torch.Tensor, aux: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(normed hidden states, what the next step takes) of one sequence."""
    batch = types.SimpleNamespace(
        mm_input_embeds=None,
        forward_mode=types.SimpleNamespace(is_extend=lambda: False, is_decode=lambda: False),
        spec_info=types.SimpleNamespace(hidden_states=aux),
    )
    normed, (feedback,) = module.model(tokens, torch.arange(len(tokens)), batch)
    return normed, feedback


@pytest.mark.parametrize("gate", ["none", "headwise", "elementwise"])
@pytest.mark.parametrize("options", [{}, {"fc_norm": True, "norm_output": True}, {"norm_before_fc": True}])
def test_the_draft_computes_what_ours_does(draft_class, gate, options, tmp_path):
    draft = made(gate, gate_bias=gate == "headwise", **options)
    save_draft(tmp_path, draft.config, draft.state_dict())
    tokens, aux = torch.randint(V, (TOKENS,)), torch.randn(TOKENS, 3 * H)
    module = opened(draft_class, tmp_path, draft.embedding)
    normed, feedback = run(module, tokens, aux)
    with torch.no_grad():
        out, _ = draft.extend(draft.embed(tokens)[None], draft.fuse(aux)[None], torch.arange(TOKENS))
        torch.testing.assert_close(normed, draft.norm(out)[0], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(feedback, draft.feedback(out)[0], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(normed @ module.lm_head.weight.T, draft.logits(out)[0], atol=1e-4, rtol=1e-4)
    assert module.hot_token_id.tolist() == [3 * index for index in range(V_D)]


def test_the_gate_changes_what_the_draft_computes(draft_class, tmp_path):
    draft = made("elementwise")
    save_draft(tmp_path, draft.config, draft.state_dict())
    tokens, aux = torch.randint(V, (TOKENS,)), torch.randn(TOKENS, 3 * H)
    module = opened(draft_class, tmp_path, draft.embedding)
    before, _ = run(module, tokens, aux)
    module.model.layers[0].self_attn.attn_gate.weight.data.neg_()
    after, _ = run(module, tokens, aux)
    assert (before - after).abs().max() > 0.01


def test_a_gate_that_config_json_does_not_tell_is_refused(draft_class, tmp_path):
    draft = made("elementwise")
    save_draft(tmp_path, draft.config, draft.state_dict())
    with pytest.raises(ValueError, match=r"attn_output_gate: want elementwise, as the tensors say; got none"):
        opened(draft_class, tmp_path, draft.embedding, attn_output_gate="none")


def test_a_residual_that_sglang_does_not_have_is_refused(draft_class, tmp_path):
    draft = made("elementwise", norm_before_residual=True)
    save_draft(tmp_path, draft.config, draft.state_dict())
    with pytest.raises(ValueError, match="norm_before_residual: want false"):
        opened(draft_class, tmp_path, draft.embedding)


def test_sglang_finds_the_architecture_that_we_write(draft_class, sglang_modules, monkeypatch):
    """Its own registry class, run from its source, after our plug-in."""
    text = source("sglang/srt/models/registry.py").partition("ModelRegistry = _ModelRegistry()")[0]
    registry = types.ModuleType("sglang.srt.models.registry")
    monkeypatch.setitem(sys.modules, "sglang.srt.environ", types.SimpleNamespace(envs=None))
    monkeypatch.setitem(sys.modules, registry.__name__, registry)
    exec(compile(text, registry.__name__, "exec"), registry.__dict__)
    registry.ModelRegistry = registry._ModelRegistry()
    plugin.register_draft()
    plugin.register_draft()
    found, name = registry.ModelRegistry.resolve_model_cls([GATED])
    assert (found.__name__, name) == (GATED, plugin.ARCHITECTURE)
