"""Recipes: what is refused and where, overrides, what a run remembers; plans; other engines' configurations."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from m3.train import recipe as recipes
from m3.train.cli import app, default_out, pipeline_app
from m3.train.engine_configs import trl_arguments, verl_overrides, vllm_arguments
from m3.train.metrics import RunLog
from m3.train.plan import count, lora_count, plan_of
from m3.train.progress import StageBars
from m3.train.report import grouped, write_report
from m3.train.run_stage import SCORES, run_stage
from m3kernels.policy_loss.types import DistillSpec

SHIPPED = Path(recipes.__file__).parent.parent / "recipes"
TEXT = """stage = "task-rl"
[model]
name = "here"
[optim]
lr = 1e-5
steps = 7
[objective.numbers]
min_std = 0.2
[rewards.penalties]
safety_risk = 0.25
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(TEXT)
    return path


def test_values_of_the_file_go_over_defaults_and_overrides_over_both(file):
    found = recipes.read(file, ["optim.lr=3e-5", "model.teachers.chest=/a folder", "source.stages=['inquiry']"])
    assert (found.optim.lr, found.optim.steps, found.optim.clip) == (3e-5, 7, 1.0)
    assert found.model.teachers == {"chest": "/a folder"} and found.source.stages == ("inquiry",)
    config = found.algorithm_config()
    assert (config.min_std, config.penalties["safety_risk"], config.penalties["rigid_phrasing"]) == (0.2, 0.25, 0.9)
    assert found.train_config().optim.lr == 3e-5 and found.train_config().steps == 7


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('stage = "task-rl"\n[optim]\nstpes = 3', r"toml:3: want a key of \[optim\]; got 'stpes'; nearest is 'steps'"),
        ('stage = "task-rl"\n\n[modle]\nname = "x"', "toml:3: want a key of a recipe; got 'modle'; nearest is 'model'"),
        ('stage = "task-rl"\n[optim]\nlr = "fast"', "recipe.toml:3: want optim.lr = a number; got 'fast'"),
        ('stage = "task-rl"\n[optim]\nsteps = true', "optim.steps = an integer; got True"),
        ('stage = "task-rl"\n[optim]\nlr = -1.0', r"lr_end <= lr.*recipe.toml:2"),
        ('stage = "task-rl"\n[objective.numbers]\nmin_sdt = 1.0', "'min_sdt'; nearest is 'min_std'"),
        ('stage = "mopd"\n[objective]\nalgorithm = "spar"', "objective.algorithm"),
        ("seed = 1", "want a value of 'stage'; got none"),
        ("stage = ", "want TOML"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_place(tmp_path, line, told):
    (tmp_path / "recipe.toml").write_text(line)
    with pytest.raises(ValueError, match=told):
        recipes.read(tmp_path / "recipe.toml")


@pytest.mark.parametrize("override", ["optim.lr", "=3", "stage.x=1"])
def test_an_override_that_is_none_is_refused(file, override):
    with pytest.raises(ValueError, match="override"):
        recipes.read(file, [override])


def test_the_resolved_recipe_reads_as_itself_and_holds_a_run_to_it(file, tmp_path):
    found = recipes.read(file)
    assert recipes.read(recipes.save(found, tmp_path / "run")) == found
    recipes.save(dataclasses.replace(found, checkpoint=recipes.Checkpoint(every=1)), tmp_path / "run")
    with pytest.raises(ValueError, match=r"optim\.lr = 1e-05; got 0\.5"):
        recipes.save(recipes.read(file, ["optim.lr=0.5"]), tmp_path / "run")


@pytest.mark.parametrize("path", sorted(SHIPPED.rglob("*.toml")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_shipped_recipes_are_read(path):
    if path.stem == "pipeline":
        from m3.train.pipeline_job import read

        assert [stage.name for stage in read(path).stages][-1] == "mopd"
    else:
        assert recipes.read(path).to_json()["stage"] in recipes.STAGES


@pytest.mark.parametrize("name", ["recipes/tiny_cpu/start.toml", "tiny_cpu/start.toml"])
def test_a_shipped_recipe_is_found_from_anywhere(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert recipes.located(name) == SHIPPED / "tiny_cpu" / "start.toml"
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text(TEXT)  # one's own goes first
    assert recipes.located(name) == Path(name)


def test_a_recipe_that_is_nowhere_is_told_with_the_shipped_ones():
    with pytest.raises(ValueError, match=r"tiny_cpu/start\.toml.*got tiny_cpu/strat\.toml"):
        recipes.located("tiny_cpu/strat.toml")


@pytest.mark.parametrize(
    ("path", "out"),
    [("/a/tiny_cpu/start.toml", "runs/tiny_cpu/start"), ("/a/run/recipe.json", "/a/run")],
)
def test_where_a_run_lies_by_default(path, out):
    assert default_out(Path(path)) == Path(out)


def test_the_objective_of_a_stage(file):
    spec = recipes.read(file, ["objective.sampler_level=none"]).loss().spec
    assert spec.sampler_level is None and spec.ratio_level == "sequence" and spec.clip_low == 3e-4
    distill = recipes.Recipe(stage="offline-distill", objective=recipes.Loss(algorithm="forward_kl")).loss()
    assert distill.spec == DistillSpec(divergence="forward")
    assert recipes.Recipe(stage="mopd").loss().spec.kl_in == "reward"


# -- plans ------------------------------------------------------------------------------------------------------------
QWEN = {
    "qwen3_8b": (8_190_735_360, 8_190_735_360),
    "qwen3_235b_a22b": (235_093_634_560, 22_190_000_000),
}  # of the model cards; heads' norms, which are not counted, are less than 1e-4


@pytest.mark.parametrize("name", QWEN)
def test_parameters_are_those_of_the_model_card(name):
    found = count(recipes.read(SHIPPED / name / "task_rl.toml").model.shape)
    assert found == pytest.approx(QWEN[name], rel=1e-4)


def test_adapters_are_counted_by_hand():
    shape = recipes.Shape(hidden=4, layers=2, heads=2, kv_heads=1, head_dim=3, intermediate=5, vocabulary=7)
    assert lora_count(shape, 2) == 2 * 2 * ((4 + 6) + (6 + 4) + 2 * (4 + 3) + 2 * (4 + 5) + (5 + 4))


@pytest.mark.parametrize("name", ["qwen3_8b/task_rl", "qwen3_8b/task_rl_trl", "qwen3_235b_a22b/task_rl"])
def test_shipped_plans_fit_their_devices(name):
    assert plan_of(recipes.read(SHIPPED / f"{name}.toml")).fits


def test_a_plan_by_hand():
    rates = ["scale.tokens_per_second=1000.0", "rollout.tokens_per_second=500.0"]
    found = plan_of(recipes.read(SHIPPED / "qwen3_8b" / "task_rl_trl.toml", rates))
    assert (found.sequences, found.tokens, found.drawn) == (256, 256 * 16384, 256 * 20 * 512)
    assert found.memory["weights"] == found.parameters * 2 / 8 and found.memory["moments"] == found.parameters * 4 / 8
    assert found.sampler["KV cache"] == 2 * 36 * 8 * 128 * 2 * 16 * 16384
    assert found.seconds == pytest.approx(200 * (found.tokens / 1000 + found.drawn / 500))


def test_a_plan_of_the_small_task_by_hand():
    """Twenty turns at most, nine usually; the students' batches are drawn, and each teacher passes over them once."""
    teachers = ["model.teachers.chest=a", "model.teachers.belly=b"]
    found = plan_of(recipes.read(SHIPPED / "tiny_cpu" / "mopd.toml", teachers))
    assert (found.tokens, found.drawn) == (64 * (3 + 3 * 20), 64 * 2 * 20)
    assert (found.usual_tokens, found.usual_drawn) == (64 * (3 + 3 * 9), 64 * 2 * 9)
    step = found.usual_tokens * (1 + 1 / 3) / 6000 + found.usual_drawn / 7000
    assert found.seconds == pytest.approx(80 * step)
    layer = 4 * 160 * 160 + 3 * 160 * 480 + 2 * 160
    assert found.parameters == 72 * 160 + 160 + 3 * layer
    assert found.memory["process"] == 430 * 2**20 and found.memory["frozen models"] == 2 * 4 * found.parameters


def test_a_plan_of_a_run_that_goes_on_has_its_tokens_and_seconds(tmp_path):
    log = RunLog(tmp_path, tensorboard=False)
    clock = {"batch_seconds": 1.0, "logprobs_seconds": 0.5, "update_seconds": 2.5}
    for step, tokens in ((1, 1000), (2, 1500)):
        log.step(step, {"tokens_packed": tokens, "tokens_drawn": 400}, clock)
    log.close()
    found = plan_of(recipes.read(SHIPPED / "tiny_cpu" / "expert.toml"), tmp_path)
    assert (found.usual_tokens, found.usual_drawn, found.seconds) == (1250, 400, 120 * 4.0)


def test_a_distillation_draws_where_its_teachers_do():
    without = plan_of(recipes.read(SHIPPED / "tiny_cpu" / "distill.toml"))
    drawn = plan_of(recipes.read(SHIPPED / "tiny_cpu" / "distill.toml", ["model.teachers.chest=a"]))
    assert drawn.seconds - without.seconds == pytest.approx(120 * drawn.usual_drawn / 7000)


def test_the_plan_of_a_pipeline_knows_models_that_are_not_made_yet(tmp_path):
    path = str(SHIPPED / "tiny_cpu" / "pipeline.toml")
    found = CliRunner().invoke(pipeline_app, [path, "--dry-run", "-o", str(tmp_path)])
    assert found.exit_code == 0 and found.output.count("1.011 million parameters") == 5
    assert re.search(r"^== all: \d\.\d minutes$", found.output, re.MULTILINE)


def test_dry_run_prints_the_plan_and_the_engines_words():
    path = str(SHIPPED / "qwen3_235b_a22b" / "task_rl.toml")
    found = CliRunner().invoke(app, ["task-rl", "-c", path, "--dry-run", "optim.steps=3"])
    assert found.exit_code == 0 and "235.094 billion parameters, 22.191 active" in found.output
    assert "algorithm.adv_estimator" in found.output and "total_training_steps=3" in found.output


def test_the_command_must_be_the_recipes_stage(file):
    found = CliRunner().invoke(app, ["mopd", "-c", str(file), "--dry-run"])
    assert found.exit_code == 1


def test_progress_in_a_log_is_a_line_at_each_tenth(capsys):
    with StageBars() as bars:
        for done in range(21):
            bars.told("expert", done, 20, {"reward": 0.5, "loss": 1.0, "advantage": 0.1})
        bars.told("distilled", 20, 20, {"reward": 0.5, "loss": 1.0})
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [*(f"expert {at}/20" for at in range(2, 21, 2)), "distilled 20/20"]
    assert lines[9] == "expert 20/20, 0:00 left, reward 0.500 loss 1.000"
    assert lines[10] == "distilled 20/20, ? left, loss 1.000"  # the reward is that of whom it learns from


def test_a_recipe_that_cannot_open_leaves_its_folder_free(tmp_path):
    with pytest.raises(ValueError, match=r"model\.teachers"):
        asyncio.run(run_stage(recipes.read(SHIPPED / "tiny_cpu" / "mopd.toml"), tmp_path))
    assert not list(tmp_path.iterdir())


# -- other engines ----------------------------------------------------------------------------------------------------
def test_trl_takes_its_arguments(tmp_path):
    trl = pytest.importorskip("trl")
    found = trl_arguments(recipes.read(SHIPPED / "qwen3_8b" / "task_rl_trl.toml", ["objective.algorithm=gspo"]))
    made = trl.GRPOConfig(output_dir=str(tmp_path), use_cpu=True, **{**found, "bf16": False})
    assert (made.generation_batch_size * 8, made.num_generations) == (256, 8)
    assert (made.epsilon, made.importance_sampling_level) == (3e-4, "sequence")
    assert (made.vllm_importance_sampling_mode, made.vllm_importance_sampling_clip_max) == ("token_truncate", 2.0)


def test_a_constant_length_is_that_of_the_other_engine():
    folder, algorithm = SHIPPED / "qwen3_8b", "objective.algorithm=dr_grpo"
    changes = [algorithm, "objective.numbers.length=512"]
    given = dict(one.split("=", 1) for one in verl_overrides(recipes.read(folder / "task_rl.toml", changes)))
    assert given["actor_rollout_ref.actor.loss_scale_factor"] == "512"
    assert float(given["actor_rollout_ref.actor.clip_ratio_c"]) > 1e8
    with pytest.raises(ValueError, match=r"numbers\['length'\]: want rollout.context = 16384: TRL .*; got 512"):
        trl_arguments(recipes.read(folder / "task_rl_trl.toml", changes))
    exact = trl_arguments(recipes.read(folder / "task_rl_trl.toml", [algorithm, "objective.numbers.length=16384"]))
    assert exact["max_completion_length"] == 16384


@pytest.mark.parametrize("name", ["qwen3_8b", "qwen3_235b_a22b"])
def test_verl_takes_its_overrides(name):
    verl = pytest.importorskip("verl")
    hydra = pytest.importorskip("hydra")
    folder = str(Path(verl.__file__).parent / "trainer" / "config")
    with hydra.initialize_config_dir(folder, version_base=None):
        found = hydra.compose("ppo_trainer", verl_overrides(recipes.read(SHIPPED / name / "task_rl.toml")))
    assert found.algorithm.adv_estimator == "spar" and found.actor_rollout_ref.rollout.n == 8


def test_verl_and_vllm_say_what_the_recipe_says():
    recipe = recipes.read(SHIPPED / "qwen3_235b_a22b" / "task_rl.toml")
    given = dict(one.split("=", 1) for one in verl_overrides(recipe))
    assert json.loads(given["actor_rollout_ref.actor.policy_loss.loss_mode"]) == "spar"
    assert int(given["data.max_prompt_length"]) + int(given["data.max_response_length"]) == recipe.rollout.context
    assert vllm_arguments(recipe)["tensor_parallel_size"] == 8


# -- the report -------------------------------------------------------------------------------------------------------
def test_the_page_of_a_run(tmp_path, file):
    recipes.save(recipes.read(file), tmp_path)
    log = RunLog(tmp_path, tensorboard=False)
    for step in (1, 2, 3):
        moving = {"reward": step / 10, "violations/safety_risk": 0.5 / step, "rubric/a": step / 9, "rubric/b": step / 8}
        log.step(step, {**moving, "lr": 1.0, "ratio": 1 + step * 1e-8}, {"batch_seconds": 0.1})
    log.close()
    (tmp_path / SCORES).write_text('{"reward/chest": 0.75, "reward/belly": 0.5, "turns/belly": 9}')
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "step-000003.txt").write_text("==== a<b\n-- policy: step 0, gamma 0.1\nAny <pain>?\n")
    page = write_report(tmp_path).read_text()
    assert page.count("<svg") == 3 and "Step penalties" in page  # lr, ratio and batch_seconds stand still
    assert "<h2>Rewards per rubric</h2>" in page and "<!-- rubric/b -->" in page  # the figure's words
    assert "<td>reward</td><td>0.750</td><td>0.500</td>" in page and "<td>turns</td><td></td><td>9.000</td>" in page
    assert "a&lt;b" in page and '<span class="policy">Any &lt;pain&gt;?</span>' in page
    assert "<td>reward</td><td>0.1</td><td>0.3</td>" in page and "<script" not in page


def test_a_folder_without_a_step_has_no_page(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\.jsonl"):
        write_report(tmp_path)


def test_metrics_are_grouped_by_the_longest_beginning_also_behind_a_domain():
    names = ["gamma_mean", "rubric/diagnosis", "reward/lab", "reward", "chest/reverse_kl", "chest/rubric/stem", "odd"]
    assert grouped(names) == [
        ("Rewards", ["reward"]),
        ("Rewards per stage or domain", ["reward/lab"]),
        ("Rewards per rubric", ["rubric/diagnosis", "chest/rubric/stem"]),
        ("Step penalties", ["gamma_mean"]),
        ("Policy", ["chest/reverse_kl"]),
        ("Others", ["odd"]),
    ]
