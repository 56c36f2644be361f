"""A run from top to bottom: stages, export, score, report. Reads as the one path of the design.

recipe -> model -> tuning -> objective -> data -> Engine.fit -> export -> evaluation -> report.md
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmtune.config.loader import load_mix
from vlmtune.config.lock import stage_key
from vlmtune.config.plugins import ObjectiveConfig, ReconstructionConfig
from vlmtune.config.schema import Recipe
from vlmtune.errors import CheckpointError, DataError, Fault, RecipeError
from vlmtune.provenance import Clock, base_hashes, base_paths, first_rank, versions, write_lock

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import LlavaProcessor

    from vlmtune.data.faults import Quarantine
    from vlmtune.data.loader import ChatData
    from vlmtune.evaluation.scores import Scores
    from vlmtune.export.hf import ExportReport
    from vlmtune.models.vlm import VLM

logger = logging.getLogger(__name__)

CACHE = Path(".cache/vlmtune")


@dataclass(frozen=True)
class RunReport:
    """Where a run's results are, and its scores if it was evaluated."""

    folder: Path
    interrupted: bool
    scores: Scores | None

    def lines(self) -> list[str]:
        """What to print at the end; nothing on other ranks than the first."""
        if not first_rank():
            return []
        if self.interrupted:
            return [f"stopped and saved in {self.folder}; the same command resumes"]
        found = [("export", "export"), ("report", "report.md"), ("scores", "metrics.json")]
        where = [f"{name:<8} {self.folder / file}" for name, file in found if (self.folder / file).exists()]
        return [*(self.scores.lines() if self.scores else ()), *where]


def run(recipes: Sequence[Recipe], fresh: bool = False) -> RunReport:
    """Trains every stage that is not done yet, then exports, scores and reports (on the main process)."""
    from vlmtune.training.logging import quiet_libraries

    quiet_libraries()
    folder = run_folder(recipes[0])
    clock = Clock(folder / "phases.json")
    bases = {name: digest for recipe in recipes for name, digest in base_hashes(recipe).items()}
    previous, inputs = None, bases
    for index, recipe in enumerate(recipes):
        key = stage_key(recipe, inputs)
        stage = _Stage(recipe, recipes, folder / recipe.stage if len(recipes) > 1 else folder, key, previous)
        if index == 0:
            write_lock(folder, recipes, bases)
        previous = _finished(stage)
        if previous is None:
            with clock.phase(f"train {recipe.stage}"):
                previous, interrupted = _train_stage(stage, fresh)
            if interrupted:
                return RunReport(folder, True, None)
        else:
            logger.info("stage %s is done already: %s", recipe.stage, previous)
        inputs = bases | {"stage": key}
    return _finish(recipes[-1], folder, previous, clock)


def run_folder(recipe: Recipe) -> Path:
    """The run's output folder."""
    return Path(recipe.output)


# ---------------------------------------------------------------- one stage


@dataclass(frozen=True)
class _Stage:
    recipe: Recipe
    recipes: Sequence[Recipe]
    folder: Path
    key: str
    previous: Path | None
    """The last checkpoint of the stage before."""


def _finished(stage: _Stage) -> Path | None:
    """The last checkpoint of a stage that ran to its end with the same inputs."""
    from vlmtune.training.checkpoint import read_manifest, step_folders

    for path in reversed(step_folders(stage.folder)):
        manifest = read_manifest(path)
        if manifest["key"] == stage.key and manifest["step"] == manifest["total_steps"]:
            return path
    return None


def _train_stage(stage: _Stage, fresh: bool) -> tuple[Path, bool]:
    """The stage's newest checkpoint, and whether a signal ended it early."""
    from vlmtune.objectives import build_objective
    from vlmtune.training.checkpoint import read_manifest, restore_helpers
    from vlmtune.training.distributed import build_accelerator
    from vlmtune.training.engine import Engine, Setup
    from vlmtune.training.optim import build_optimizer

    recipe = stage.recipe
    accelerator = build_accelerator(recipe.run, str(stage.folder))
    resume = _resume_point(stage, fresh, accelerator)
    model, processor = _build(stage, resume)
    _make_ready(model, recipe, accelerator)
    data = chat_data(recipe, processor, model)
    _announce(accelerator, data.summary())

    objective = build_objective(_objective(stage), model, processor, recipe.run.seed)
    objective.train()
    optimizer = build_optimizer(objective.named_parameters(), recipe.tuning, recipe.optim)
    start = 0
    if resume is not None:
        restore_helpers(resume, objective)
        start = read_manifest(resume)["step"]
    setup = Setup(
        recipe,
        objective,
        optimizer,
        data.stream(accelerator.process_index, accelerator.num_processes),
        processor,
        stage.folder,
        {
            "key": stage.key,
            "stage": recipe.stage,
            "recipe": recipe.name,
            "objective": recipe.objective.model_dump(mode="json"),
            "versions": versions(),
        },
        lambda: _sample_answers(model, processor, data, recipe),
        resume,
        _quarantine(stage, data, accelerator).add,
    )
    accelerator.init_trackers(recipe.name)
    total = recipe.schedule.steps or max(round((recipe.schedule.epochs or 0) * data.steps_per_epoch), 1)
    report = Engine(accelerator, setup, start, total).fit()
    for tracker in accelerator.trackers:  # end_training would end the process group, which later stages need
        tracker.finish()
    accelerator.free_memory()
    return report.checkpoint, report.interrupted


def _make_ready(model: VLM, recipe: Recipe, accelerator: Accelerator) -> None:
    """Adapters, device, what is trained, attention and checkpointing, in the order in which they need each other."""
    from vlmtune.models.adapters import adapt
    from vlmtune.models.attention import use_attention
    from vlmtune.models.isolation import prove_isolation
    from vlmtune.models.kernels import compile_blocks, use_kernels
    from vlmtune.models.tuning import apply_tuning, table
    from vlmtune.training.strategies import shards

    adapt(model, recipe.tuning, recipe.run.seed)
    if not shards(accelerator):  # else it may not fit
        model.to(accelerator.device)
    rows = apply_tuning(model, recipe.tuning)
    attention, why = use_attention(model, recipe.model.attention)
    kernels = use_kernels(model, recipe.run)
    if recipe.data.chat is not None and recipe.data.chat.packing == "isolated":
        prove_isolation(model, accelerator.device, recipe.run.precision == "bf16")
    if recipe.run.compile:
        compile_blocks(model)
    _announce(accelerator, table(rows), f"attention: {attention} ({why}); {kernels}")


def _quarantine(stage: _Stage, data: ChatData, accelerator: Accelerator) -> Quarantine:
    """The stage's bad samples so far, and those that indexing found."""
    from vlmtune.data.faults import Quarantine

    path, budget = stage.folder / "quarantine.jsonl", data.config.bad_samples.budget
    quarantine = Quarantine(path, data.samples, budget, accelerator.is_main_process)
    for bad in data.known_bad():
        quarantine.add(*bad)
    return quarantine


def _objective(stage: _Stage) -> ObjectiveConfig:
    """The stage's objective; a denoiser goes on from the stage before, as the model does."""
    own = stage.recipe.objective
    if stage.previous is None or not isinstance(own, ReconstructionConfig) or own.weights is not None:
        return own
    trained = (stage.previous / "objective.safetensors").exists()
    return own.model_copy(update={"weights": str(stage.previous)}) if trained else own


def chat_data(recipe: Recipe, processor: LlavaProcessor, model: VLM) -> ChatData:
    """The recipe's conversations, opened and indexed for the model's tokenizer and image tokens."""
    from vlmtune.data.loader import ChatData
    from vlmtune.models.vision import token_counter

    stream = recipe.data.chat
    assert stream is not None  # the loader has seen to it
    mix = Path(stream.mix)
    held_out, seed = recipe.evaluation.held_out, recipe.run.seed
    return ChatData(
        stream, load_mix(mix), mix.parent, processor, token_counter(model.config), held_out, seed, CACHE
    )


def build_inputs(recipe: Recipe, recipes: Sequence[Recipe]) -> tuple[ChatData, LlavaProcessor]:
    """What the recipe's model would see, for looking at it: the data, rendered for the model's own processor."""
    model, processor = _build(_Stage(recipe, recipes, run_folder(recipe), "", None), None)
    return chat_data(recipe, processor, model), processor


def _resume_point(stage: _Stage, fresh: bool, accelerator: Accelerator) -> Path | None:
    """The checkpoint to go on from. A run with other inputs is refused, or moved aside with `fresh`."""
    from vlmtune.training.checkpoint import read_manifest, step_folders

    steps = step_folders(stage.folder)
    if not steps:
        return None
    if read_manifest(steps[-1])["key"] == stage.key:
        return steps[-1]
    if not fresh:
        raise CheckpointError(
            "holds a run with another recipe, data or base model",
            str(stage.folder),
            "Set run.dir=... to keep both, or give --fresh to move it aside.",
        )
    if accelerator.is_main_process:
        names = (stage.folder.with_name(f"{stage.folder.name}.old-{number}") for number in count(1))
        shutil.move(stage.folder, next(name for name in names if not name.exists()))
    accelerator.wait_for_everyone()
    return None


def _build(stage: _Stage, resume: Path | None) -> tuple[Any, Any]:
    """Model and processor: of the checkpoint to resume, of the stage before, or new."""
    from vlmtune.data.render import template_text
    from vlmtune.models.build import build_model, load_model
    from vlmtune.models.projectors import import_projector

    recipe = stage.recipe
    if resume is not None:
        if recipe.model.projector is not None:
            import_projector(recipe.model.projector)
        return load_model(resume / "model")
    template = template_text(recipe.model.template)
    if stage.previous is not None:
        from_before = recipe.model.model_copy(update={"checkpoint": str(stage.previous / "model")})
        return build_model(from_before, recipe.run.seed, template)
    return build_model(recipe.model, recipe.run.seed, template, lambda: _texts(stage.recipes))


def _texts(recipes: Sequence[Recipe]) -> Iterator[str]:
    """Every turn's text of every stage's mix: what a new tokenizer is trained on."""
    from vlmtune.data.sources import open_source

    paths = dict.fromkeys(recipe.data.chat.mix for recipe in recipes if recipe.data.chat)
    for path in map(Path, paths):
        sources = (open_source(source, path.parent, CACHE) for source in load_mix(path).sources)
        for source in sources:
            for row in range(len(source)):
                try:
                    yield from (turn.text for turn in source[row].turns)
                except DataError:  # its own slot reports it while training
                    continue


def _sample_answers(model: Any, processor: Any, data: Any, recipe: Recipe) -> list[dict[str, str]]:
    from vlmtune.evaluation.generate import answer

    samples = data.held_out_samples(recipe.evaluation.held_out.answers)
    limit = min(recipe.evaluation.max_new_tokens, 32)
    return [
        {
            "key": each.key,
            "prompt": each.prompt,
            "answer": each.error or each.prediction,
            "reference": each.references[0],
        }
        for each in answer(model, processor, samples, len(samples) or 1, limit)
    ]


def _announce(accelerator: Accelerator, *things: Any) -> None:
    from rich.console import Console

    if accelerator.is_main_process:
        console = Console(stderr=True)
        for thing in things:
            console.print(thing, highlight=False)


# ---------------------------------------------------------------- after training


def _finish(recipe: Recipe, folder: Path, checkpoint: Path, clock: Clock) -> RunReport:
    """Export, score and report on the main process."""
    from accelerate import PartialState

    from vlmtune.evaluation.report import write_report

    if not PartialState().is_main_process:
        return RunReport(folder, False, None)
    scores = None
    if recipe.export.enabled:
        with clock.phase("export"):
            export_step(checkpoint, folder / "export", recipe.export.dtype)
        if recipe.evaluation.mix:
            each = recipe.evaluation
            with clock.phase("evaluate"):
                scores = evaluate_folder(
                    str(folder / "export"),
                    Path(each.mix),
                    folder,
                    each.batch_size,
                    each.max_new_tokens,
                    train_seconds=clock.training(),
                )
    write_report(folder)
    return RunReport(folder, False, scores)


def export_step(checkpoint: Path, out: Path, dtype: str | None) -> ExportReport:
    """The reopened and compared export of a step folder."""
    import torch

    from vlmtune.export.hf import export_model
    from vlmtune.export.probe import probe_batch
    from vlmtune.models.build import load_model
    from vlmtune.shipping import run_facts
    from vlmtune.training.checkpoint import read_manifest

    manifest = read_manifest(checkpoint) | run_facts(checkpoint)
    model, processor = load_model(checkpoint / "model")
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, None: None}
    if dtype not in kinds:
        raise RecipeError(f"no export type {dtype!r}", "dtype", "Known: float32, bfloat16.")
    return export_model(model, processor, out, kinds[dtype], probe_batch(model, processor), manifest)


def evaluate_folder(
    model: str,
    mix: Path,
    out: Path | None,
    batch_size: int,
    max_new_tokens: int,
    limit: int | None = None,
    train_seconds: float | None = None,
) -> Scores:
    """The scores of an exported folder (or step folder, or hub id) on `mix`, written to `out` if given."""
    from vlmtune.data.sources import SampleSequence, open_source
    from vlmtune.evaluation.generate import answer, open_model
    from vlmtune.evaluation.scores import score, write_results
    from vlmtune.training.logging import progress

    opened, processor = open_model(model)
    sources = [open_source(source, mix.parent, CACHE) for source in load_mix(mix).sources]
    samples = SampleSequence(sources, limit)
    with progress(f"answer {mix.stem}") as advance:
        predictions = answer(opened, processor, samples, batch_size, max_new_tokens, advance)
    scores = score(predictions)
    if out is not None:
        facts = {} if train_seconds is None else {"train_seconds": train_seconds}
        write_results(
            out, predictions, scores, facts | {"model": model, "mix": str(mix), "versions": versions()}
        )
    return scores


def check_data(recipes: Sequence[Recipe], most: int) -> None:
    """Raises RecipeError with every fault of the recipes' data and local base models."""
    from vlmtune.data.faults import check_mix

    faults: list[Fault] = [fault for recipe in recipes[:1] for fault in _missing_bases(recipe)]
    mixes = chain.from_iterable(
        (recipe.data.chat.mix if recipe.data.chat else None, recipe.evaluation.mix) for recipe in recipes
    )
    for path in map(Path, dict.fromkeys(filter(None, mixes))):
        faults += check_mix(load_mix(path), path.parent, CACHE, most)
    if faults:
        raise RecipeError(faults)


def _missing_bases(recipe: Recipe) -> list[Fault]:
    return [
        Fault(f"model.{name}: there is no folder {path}", "", "Train or download it first.")
        for name, path in base_paths(recipe).items()
        if not Path(path).exists() and (path.count("/") != 1 or path.startswith((".", "/", "~")))
    ]
