"""``m3 clinic``: consult patients, score and replay consultations, audit verifiers, convert cases, approve rubrics.

m3.cli adds ``app``; what a command needs is imported when it runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from m3.serve.cli import serve_patient
from m3.terminal import Bar, Debug, console, one_line_errors
from m3kernels.checks import refuse

if TYPE_CHECKING:
    from m3.environment.case import Case
    from m3.environment.modes import ModeConfig
    from m3.environment.pipeline import Config
    from m3.environment.trajectory import Trajectory
    from m3.rollout.chat import Budget

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, help=__doc__)
audit = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="How far verifiers and the claim cache err.")
rubrics = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Rubrics that evolve: a person approves.")
app.add_typer(audit, name="audit")
app.add_typer(rubrics, name="rubrics")
app.command("patient")(serve_patient)

JOURNAL, TRAJECTORIES, SCORES, PAGE = "journal.jsonl", "trajectories.jsonl", "scores.jsonl", "report.html"
SPEAKERS = "http://host:port/v1#model (several URLs with commas), embedded:MODEL or scripted:FILE"

Cases = Annotated[
    Path | None, typer.Option("--cases", help="A .jsonl or .json file, or a folder of them; default: our own.")
]
Split = Annotated[str | None, typer.Option("--split", help="train or held_out; default: both.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of the run.")]


def find_cases(path: Path | None, split: str | None) -> list[Case]:
    """Cases of a file or folder, or our own.

    Raises:
        ValueError: none of them is of the split.
    """
    from m3.environment.case import own_cases, read_cases

    found = list(own_cases() if path is None else read_cases(path))
    kept = [case for case in found if split in (None, case.split)]
    if not kept:
        raise refuse("clinic", "--split", f"one of {sorted({case.split for case in found})}", repr(split))
    return kept


@app.command()
@one_line_errors
def run(
    out: Out,
    policy: Annotated[
        str, typer.Option("--policy", help=f"The physician: good, random_questions, an exploit's name, or {SPEAKERS}.")
    ] = "good",
    patient: Annotated[str, typer.Option("--patient", help=f"scripted, or {SPEAKERS}.")] = "scripted",
    cases: Cases = None,
    split: Split = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Times each case is consulted.")] = 1,
    rollouts: Annotated[int, typer.Option("--rollouts", min=1, help="Of each context: groups for training.")] = 1,
    tau: Annotated[float, typer.Option("--tau", help="Least score with which a stage goes on to the next.")] = 0.0,
    turns: Annotated[int, typer.Option("--turns", min=1, help="Most messages of an inquiry.")] = 20,
    slots: Annotated[int, typer.Option("--slots", min=1, help="Stages at work at one time.")] = 8,
    seed: Annotated[int, typer.Option("--seed", help="Of everything drawn.")] = 0,
    interruption: Annotated[
        float, typer.Option("--interruption", min=0, max=1, help="Share that begins with the patient's own question.")
    ] = 0.25,
    guard: Annotated[
        bool, typer.Option("--guard", help="Replace an LLM patient's answers that leak or invent.")
    ] = False,
    calls: Annotated[int | None, typer.Option("--calls", min=1, help="Most calls to chat models.")] = None,
    debug: Debug = False,
) -> None:
    """Consult: inquiry, differential, tests, diagnosis. The same command goes on where a stopped run was."""
    from m3.environment.modes import ModeConfig
    from m3.environment.pipeline import PHASES, Config
    from m3.rollout.chat import Budget

    found = find_cases(cases, split)
    config = Config(
        seed=seed,
        epochs=repeats,
        rollouts=rollouts,
        batch_size=rollouts,
        slots=slots,
        tau=dict.fromkeys(PHASES, tau),
    )
    modes = ModeConfig(interruption=interruption)
    budget = None if calls is None else Budget(calls=calls)
    out.mkdir(parents=True, exist_ok=True)
    trajectories = asyncio.run(_consult(found, policy, patient, config, modes, turns, guard, budget, out))
    _write(found, trajectories, out, f"{policy} with {patient} patients, seed {seed}")


async def _consult(
    cases: list[Case],
    policy: str,
    patient: str,
    config: Config,
    modes: ModeConfig,
    turns: int,
    guard: bool,
    budget: Budget | None,
    out: Path,
) -> list[Trajectory]:
    """Run the pipeline to its end; each case's furthest consultation."""
    from m3.environment.consultation import ChatPolicy, SimulatedConsultation
    from m3.environment.journal import Journal
    from m3.environment.llm_patient import LLMPatient, LLMPatientConfig
    from m3.environment.patient import ScriptedPatient
    from m3.environment.physicians import POLICIES
    from m3.environment.pipeline import Pipeline
    from m3.environment.segment import Segment
    from m3.rewards.stage_rewards import rule_rewards
    from m3.rewards.step_verifier import StepVerifier

    async with contextlib.AsyncExitStack() as stack:

        async def speaker(spec: str) -> Any:
            from m3.rollout.open import open_chat

            return await stack.enter_async_context(open_chat(spec, budget=budget))

        physician: Any = POLICIES[policy] if policy in POLICIES else ChatPolicy(await speaker(policy))
        patients: Any = ScriptedPatient
        if patient != "scripted":
            patients = functools.partial(
                LLMPatient, client=await speaker(patient), config=LLMPatientConfig(guard=guard)
            )
        consultation = SimulatedConsultation(
            physician, patients, max_turns=turns, modes=modes, patient_name=f"{patient}{' guarded' if guard else ''}"
        )
        rewards = rule_rewards(StepVerifier())
        journal = stack.enter_context(Journal(out / JOURNAL, run=Pipeline.run_of(cases, consultation, rewards, config)))
        stages = len(config.stages) * config.rollouts * config.epochs * len(cases)
        with Bar("segments") as bar:
            async with Pipeline(cases, consultation, rewards, config, journal=journal) as pipeline:
                async for _ in pipeline:
                    bar.step(sum((pipeline.progress.segments + pipeline.progress.resumed).values()), stages)
            progress = pipeline.progress
        for (phase, why), count in sorted(progress.discarded.items()):
            console.print(f"discarded after {phase}, {why}: {count}", markup=False)
        for (phase, why), count in sorted(progress.failed.items()):
            console.print(f"failed in {phase}, {why}: {count}", markup=False)
        if resumed := sum(progress.resumed.values()):
            console.print(f"{resumed} segments were there already")
        segments = [Segment.from_json(row["segment"]) for row in journal.records("segment")]
    ends = {segment.id for segment in segments} - {segment.group for segment in segments}
    return [segment.trajectory() for segment in sorted(segments, key=lambda one: one.id) if segment.id in ends]


def _write(cases: Sequence[Case], trajectories: Sequence[Trajectory], out: Path, subtitle: str) -> None:
    """Trajectories, their scores and the page; a table of means on the console."""
    from m3.environment.trajectory import to_line, write_trajectories
    from m3.evaluate.report import FIGURES, credit, render

    known = {case.id: case for case in cases}
    credited = []
    with Bar("scoring") as bar:
        for n, trajectory in enumerate(trajectories):
            if trajectory.case not in known:
                raise refuse("clinic", "--cases", f"the case {trajectory.case!r} of a trajectory", "none of that id")
            credited.append(credit(known[trajectory.case], trajectory))
            bar.step(n + 1, len(trajectories))
    out.mkdir(parents=True, exist_ok=True)
    write_trajectories(out / TRAJECTORIES, [one.trajectory for one in credited])
    (out / SCORES).write_text("".join(to_line(one.to_json()) + "\n" for one in credited), encoding="utf-8")
    (out / PAGE).write_text(render(credited, "Consultations", subtitle), encoding="utf-8")
    table = Table(title=f"{len(credited)} consultations, scored by rules")
    table.add_column("mean of")
    table.add_column("", justify="right")
    table.add_row("ScanBench", "n/a: scripted judge")
    for name, figure in FIGURES.items():
        told = [value for one in credited if (value := figure(one)) is not None]
        table.add_row(name, f"{sum(told) / len(told):.3f}" if told else "n/a")
    console.print(table)
    _end(out / PAGE)


def _end(page: Path | None = None) -> None:
    from m3.evaluate.report import DISCLAIMER

    if page is not None:
        console.print(f"page: {page}", markup=False, soft_wrap=True)
    console.print(DISCLAIMER, style="dim", soft_wrap=True)


@app.command()
@one_line_errors
def score(
    trajectories: Annotated[Path, typer.Argument(help="A .jsonl of m3.trajectory/v1.")],
    out: Out,
    cases: Cases = None,
    debug: Debug = False,
) -> None:
    """Score recorded consultations with cases by rules, and make their page."""
    from m3.environment.trajectory import read_trajectories

    _write(find_cases(cases, None), list(read_trajectories(trajectories)), out, str(trajectories))


@app.command()
@one_line_errors
def replay(
    recorded: Annotated[
        Path, typer.Argument(help="Recorded consultations: m3.trajectory/v1 or CRAFT-MD, .jsonl[.gz].")
    ],
    cases: Cases = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A .jsonl of scores.")] = None,
    debug: Debug = False,
) -> None:
    """Score recorded consultations against their recorded outcome: diagnosis, facts told, repetition, groups."""
    from m3.environment.trajectory import to_line
    from m3.evaluate import replay as replays
    from m3.rewards.step_verifier import StepVerifier

    known = find_cases(cases, None)
    with Bar("scoring"):
        report = replays.evaluate(replays.read_recorded(recorded, known), verify=StepVerifier().verify)
    heading, *rows = zip(*replays.table(report), strict=True)  # a column a doctor: it fits a terminal
    table = Table(title=recorded.name)
    for name in heading:
        table.add_column(name, justify="left" if name == heading[0] else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for line in replays.lines(report):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if out is not None:
        lines = (to_line(json.loads(json.dumps(dataclasses.asdict(one), default=str))) for one in report.scored)
        out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    _end()


@app.command(name="cases")
@one_line_errors
def list_cases(
    path: Annotated[Path | None, typer.Argument(help="A file or folder; default: our own.")] = None,
    debug: Debug = False,
) -> None:
    """Validate cases and list them."""
    found = find_cases(path, None)
    table = Table("case", "split", "complaint", "diagnosis", "ICD-10-CM", "facts", "items", "exams")
    for case in found:
        label, code = case.diagnosis.label, case.diagnosis.icd10cm or ""
        counts = [str(len(part)) for part in (case.facts, case.checklist, case.exams)]
        table.add_row(case.id, case.split, case.chief_complaint, label, code, *counts)
    console.print(table)
    synthetic = sum(case.synthetic for case in found)
    console.print(f"{len(found)} cases, all valid; {synthetic} synthetic, {len(found) - synthetic} not")


# -- audits -----------------------------------------------------------------------------------------------------------
Kqa = Annotated[
    Path, typer.Option("--kqa", help="Folder of K-QA: questions_w_answers.jsonl, NLI_medical_annotator.csv.")
]
Embed = Annotated[str, typer.Option("--embedder", help="lexical, or minilm (fetched once, 83 MB).")]


@audit.command()
@one_line_errors
def cache(
    kqa: Kqa,
    medquad: Annotated[Path, typer.Option("--medquad", help="Folder with medquad_nih_core.jsonl.gz.")],
    craft_md: Annotated[Path, typer.Option("--craft-md", help="Folder with replay_dev.jsonl.gz.")],
    embedder: Embed = "minilm",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A .json of the figures.")] = None,
    debug: Debug = False,
) -> None:
    """False hits of the claim cache on changed claims, its hits on rewordings and on groups of trials."""
    from m3.rewards.cache_audit import run_cache_audit
    from m3.text.embed import open_embedder

    with Bar("auditing the claim cache"):
        report = run_cache_audit(kqa, medquad, craft_md, open_embedder(embedder))
    console.print(report.markdown(), markup=False, highlight=False, soft_wrap=True)
    if out is not None:
        out.write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")


@audit.command()
@one_line_errors
def verifier(
    kqa: Kqa,
    model: Annotated[str | None, typer.Option("--model", help=f"A chat model: {SPEAKERS}; default: rules.")] = None,
    half: Annotated[str, typer.Option("--split", help="all, tuning (thresholds were set on it) or test.")] = "all",
    embedder: Annotated[str, typer.Option("--embedder", help="Of the rules: none, lexical or minilm.")] = "none",
    debug: Debug = False,
) -> None:
    """Agreement of the fact verifier with K-QA's physicians, the answer being the evidence."""
    from m3.rewards import entailment
    from m3.rewards.fact_verifier import ChatVerifier, ScriptedVerifier
    from m3.rewards.verifier_audit import audit_kqa
    from m3.rollout.open import open_chat
    from m3.text.embed import open_embedder

    path = kqa / "NLI_medical_annotator.csv" if kqa.is_dir() else kqa

    async def measure() -> Any:
        if model is None:
            meaning = open_embedder(embedder) if embedder != "none" else None
            return await audit_kqa(
                path, lambda e: ScriptedVerifier(e, rules=entailment.GIVEN, embedder=meaning), split=half
            )
        async with open_chat(model) as client:
            return await audit_kqa(path, lambda evidence: ChatVerifier(client, evidence), split=half)

    with Bar("auditing the verifier"):
        found = asyncio.run(measure())
    table = Table("physicians", *found.confusion, title=f"{found.verifier}, {found.split}: verifier's labels")
    for label, row in found.confusion.items():
        table.add_row(label, *(str(row.get(other, 0)) for other in found.confusion))
    console.print(table)
    console.print(
        f"macro-F1 {found.macro_f1:.3f}, kappa {found.kappa:.3f}, accuracy {found.accuracy:.3f} on {found.judged} of "
        f"{found.claims} claims; always the most frequent label {found.majority_share:.3f}, physicians unanimous on "
        f"{found.unanimous:.3f}",
        soft_wrap=True,
    )
    if found.failures:
        console.print(f"not judged: {dict(found.failures)}", markup=False)


# -- conversion -------------------------------------------------------------------------------------------------------
@app.command()
@one_line_errors
def convert(
    name: Annotated[str, typer.Argument(help="agentclinic, mediq, primock57, ddxplus, craft_md, kqa or healthbench.")],
    path: Annotated[Path, typer.Argument(help="The file or folder of that data set.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for what comes out, and its report.")],
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Rows, at most.")] = None,
    debug: Debug = False,
) -> None:
    """Convert a public data set to m3.case/v1, m3.trajectory/v1 or rubric rows, and say what was lost."""
    from m3.environment.converters import convert as convert_from

    with Bar(f"reading {name}"):
        found = convert_from(name, path, limit=limit)
    for file in found.write(out):
        console.print(str(file), markup=False, soft_wrap=True)
    console.print(found.report.table())


# -- rubrics ----------------------------------------------------------------------------------------------------------
Store = Annotated[Path, typer.Argument(help="The rubric store, a .jsonl log.")]


@rubrics.command(name="list")
@one_line_errors
def list_rubrics(store: Store, debug: Debug = False) -> None:
    """Rubrics by scope and status."""
    from m3.rewards.rubric_store import read_state

    table = Table("id", "scope", "status", "points", "criterion", "drafted by")
    for entry in read_state(store).entries.values():
        item = entry.item
        table.add_row(item.id, entry.scope, entry.status, f"{item.points:+g}", item.criterion, entry.provenance.by)
    console.print(table)


@rubrics.command()
@one_line_errors
def pending(
    store: Store,
    file: Annotated[Path, typer.Argument(help="Written: a .json with a decision to fill in for each draft.")],
    debug: Debug = False,
) -> None:
    """Write the drafts that wait for an expert."""
    from m3.rewards.rubric_store import RubricStore, write_pending

    with RubricStore(store) as opened:
        count = write_pending(opened, file)
    console.print(
        f'{count} drafts in {file}: fill in "decision" (approve or reject), "by", "why"; then m3 clinic rubrics decide',
        markup=False,
        soft_wrap=True,
    )


@rubrics.command()
@one_line_errors
def decide(
    store: Store,
    file: Annotated[Path, typer.Argument(help="The edited file of `m3 clinic rubrics pending`.")],
    debug: Debug = False,
) -> None:
    """Take in an expert's decisions; all of them, or none where one is wrong."""
    from m3.rewards.rubric_store import RubricStore, take_decisions

    with RubricStore(store) as opened:
        found = take_decisions(opened, file)
    console.print(
        f"approved {len(found.approved)}, rejected {len(found.rejected)}, open {len(found.open)}, "
        f"decided before {len(found.earlier)}"
    )


@rubrics.command()
@one_line_errors
def gap(
    store: Store,
    out: Annotated[Path, typer.Option("--out", "-o", help="A picture: .png or .svg.")],
    debug: Debug = False,
) -> None:
    """Plot the score on training rubrics minus that on the hold-out, by epoch."""
    from m3.rewards.rubric_evolution import overoptimisation_gap, plot_gap
    from m3.rewards.rubric_store import read_state

    state = read_state(store)
    plot_gap(state, out)
    for epoch, value in overoptimisation_gap(state):
        console.print(f"epoch {epoch}: gap {value:+.3f}")
    console.print(str(out), markup=False)
