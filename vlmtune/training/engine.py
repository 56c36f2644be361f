"""fit(): the loop. One step pulls its micro-batches, sums their counts, and takes one optimizer step.

Every returned loss is a share of the global loss (the law), so gradients add over micro-batches; between ranks the
gradient average divides by the world size, which is the only factor to undo. How that is done under DDP, FSDP2 or
ZeRO is the strategy's.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from vlmtune.config.schema import Recipe
from vlmtune.errors import TrainingError
from vlmtune.objectives.base import Objective
from vlmtune.training.checkpoint import restore_moments, rotate, save_step
from vlmtune.training.distributed import peak_memory_gb, sum_over_ranks
from vlmtune.training.logging import RunLog
from vlmtune.training.optim import lr_factor, set_lr
from vlmtune.training.strategies import build_strategy
from vlmtune.types import ChatBatch


class Stream(Protocol):
    """What the engine needs of the data: steps in any order, and the held-out batches of this rank."""

    @property
    def steps_per_epoch(self) -> int: ...

    def steps(self, start: int, stop: int) -> Iterable[list[ChatBatch]]: ...

    def heaviest(self) -> Sequence[ChatBatch]: ...

    def held_out(self) -> Mapping[str, Sequence[ChatBatch]]: ...


@dataclass(frozen=True)
class Setup:
    """What a stage is made of, before anything is prepared for devices."""

    recipe: Recipe
    objective: Objective
    optimizer: torch.optim.Optimizer
    stream: Stream
    processor: Any
    folder: Path
    manifest: dict[str, Any]
    """Goes into every checkpoint beside its step."""
    answer: Callable[[], list[dict[str, str]]] | None = None
    """A few greedy answers on held-out samples, shown at every measurement."""
    resume: Path | None = None
    """The checkpoint whose weights the model has; the optimizer's state is read from it."""
    on_bad: Callable[[str, str], None] | None = None
    """Receives key and reason of every zero-weight slot; raises when the budget is spent."""


@dataclass(frozen=True)
class FitReport:
    """How a stage ended: `interrupted` when SIGTERM or SIGINT asked it to save and leave."""

    steps: int
    seconds: float
    interrupted: bool
    checkpoint: Path


@dataclass
class _Window:
    """Sums since the last log line, over all ranks."""

    samples: float = 0.0
    tokens: float = 0.0
    padding: float = 0.0
    began: float = 0.0
    steps: int = 0
    terms: dict[str, float] = field(default_factory=dict)

    def add(self, counted: Mapping[str, float], sums: Mapping[str, float]) -> None:
        """Takes in one optimizer step: its counts, and the global value of each term."""
        self.samples += counted["_samples"]
        self.tokens += counted["_useful"]
        self.padding += counted["_padding"]
        self.steps += 1
        for name, value in sums.items():
            if name[0] != "_":
                self.terms[name] = self.terms.get(name, 0.0) + value


class Engine:
    """Runs one stage from optimizer step `start` to `total`."""

    def __init__(self, accelerator: Accelerator, setup: Setup, start: int, total: int) -> None:
        self.accelerator = accelerator
        self.setup = setup
        self.recipe = setup.recipe
        self.start, self.total = start, total
        self.strategy = build_strategy(accelerator, setup.objective, setup.optimizer, setup.recipe)
        if setup.resume is not None:
            restore_moments(setup.resume, self.strategy)
        self._probed = not self.recipe.run.probe
        self._stop = False
        self._held_out_totals: dict[str, dict[str, int]] = {}
        self._window = _Window(began=time.monotonic())

    def fit(self) -> FitReport:
        """Trains to the end, or to the first step after a stop signal."""
        began, run, accelerator = time.monotonic(), self.recipe.run, self.accelerator
        title = f"{self.recipe.name} {self.recipe.stage}"
        checkpoint = self.setup.folder
        stopped = False
        with (
            RunLog(accelerator, self.setup.folder, title, self.total, self.start, run.log_samples) as log,
            self._stop_on_signal(log),
        ):
            log.say(self.strategy.describe())
            self._rehearse(log)
            step = self.start
            for micros in self.setup.stream.steps(self.start, self.total):
                stopped = self._step(step, micros, log)
                step += 1
                last = step == self.total or stopped
                self._measure(step, last, log)
                if last or step % run.save_every == 0:
                    checkpoint = self.save(step)
                if last:
                    break
        return FitReport(step, time.monotonic() - began, stopped and step < self.total, checkpoint)

    def _rehearse(self, log: RunLog) -> None:
        """Runs the heaviest micro-batches at weight zero: their gradients, all zero, are part of the first step's."""
        wanted, device = self.recipe.run.rehearse, self.accelerator.device
        if not (device.type == "cuda" if wanted is None else wanted):
            return
        for batch in self.setup.stream.heaviest():
            what = f"{batch.input_ids.numel():,} tokens, {batch.images} images"
            # A share of infinitely many tokens is exactly nothing, whatever the objective.
            totals = dict.fromkeys(self.setup.objective.counts(batch), math.inf)
            try:
                terms = self._accumulate([batch], totals, last=False)
            except torch.OutOfMemoryError as error:
                raise TrainingError(
                    f"not enough memory for the heaviest micro-batch ({what})",
                    str(device),
                    "Lower data.chat.micro_tokens, set run.activation_checkpointing=true, or ask vlmtune plan.",
                ) from error
            self._demand_finite(self.start, terms, 0.0, [batch])
            log.say(f"  rehearsed {what}: {peak_memory_gb(device):.1f} GB at most")

    def _step(self, step: int, micros: list[ChatBatch], log: RunLog) -> bool:
        """Whether some rank was asked to stop, after one optimizer step."""
        accelerator, run = self.accelerator, self.recipe.run
        # Dropout and other draws inside the model depend on (seed, step, rank) only: nothing to save or restore.
        torch.manual_seed((run.seed << 40) ^ (step << 12) ^ accelerator.process_index)
        lr = set_lr(self.strategy.optimizer, lr_factor(step, self.total, self.recipe.schedule))
        self.setup.objective.progress = step / self.total
        counted = self._counts(micros)
        self._report_bad(micros, counted["_bad"])
        totals = {name: int(value) for name, value in counted.items() if name[0] != "_"}
        terms = self._accumulate(micros, totals)
        sums = sum_over_ranks(accelerator, terms | {"_stop": float(self._stop)})
        self._probed = self._probed or prove_gradients(self.setup.objective, self.strategy.reached())
        norm = self.strategy.update() if all(map(math.isfinite, sums.values())) else math.nan
        self._demand_finite(step, sums, norm, micros)
        self._window.add(counted, sums)
        log.advance(step + 1)
        if run.log_samples:
            log.record_samples(step + 1, gather_object([key for batch in micros for key in batch.keys]))
        if (step + 1) % run.log_every == 0 or step + 1 == self.total:
            log.record(self._row(step, norm, lr))
        return sums["_stop"] > 0

    def _counts(self, micros: Sequence[ChatBatch]) -> dict[str, float]:
        """The objective's denominators, and sizes for the log (underscored), summed over micro-batches and ranks."""
        objective = self.setup.objective
        counted: dict[str, float] = {"_samples": 0.0, "_useful": 0.0, "_padding": 0.0, "_bad": 0.0}
        for batch in micros:
            for name, value in objective.counts(batch).items():
                counted[name] = counted.get(name, 0.0) + value
            size = batch.input_ids.numel()
            useful = size if batch.attention_mask is None else int(batch.attention_mask.sum())
            counted["_samples"] += len(batch.keys)
            counted["_useful"] += useful
            counted["_padding"] += size - useful
            counted["_bad"] += len(batch.bad)
        return sum_over_ranks(self.accelerator, counted)

    def _accumulate(
        self, micros: list[ChatBatch], totals: Mapping[str, int | float], last: bool = True
    ) -> dict[str, float]:
        """This rank's share of each term, after the backward passes of `micros`. `last`: the update follows."""
        shares: dict[str, Tensor] = {}
        self._shares: list[Tensor] = []
        for index, batch in enumerate(micros):
            here = to_device(batch, self.accelerator.device)
            output = self.strategy.learn(here, totals, last and index == len(micros) - 1)
            self._shares.append(output.loss.detach())
            for name, share in output.terms.items():
                shares[name] = shares.get(name, 0.0) + share.double()
        return {name: float(share) for name, share in shares.items()}

    def _demand_finite(self, step: int, sums: dict[str, float], norm: float, micros: list[ChatBatch]) -> None:
        if all(map(math.isfinite, (norm, *sums.values()))):
            return
        broken = [
            batch for batch, share in zip(micros, self._shares, strict=True) if not math.isfinite(share)
        ]
        keys = [key for batch in broken or micros for key in batch.keys]
        shown = ", ".join(keys[:20]) + (f" and {len(keys) - 20} more" if len(keys) > 20 else "")
        values = ", ".join(f"{name} {value}" for name, value in sums.items() if name[0] != "_")
        raise TrainingError(
            f"the loss or its gradient is not finite ({values}, gradient norm {norm}); the step was not applied."
            f" Samples: {shown}",
            f"step {step + 1}",
            "Look at them (vlmtune inspect RECIPE --sample KEY), lower optim.lr, or set run.precision=fp32.",
        )

    def _row(self, step: int, norm: float, lr: float) -> dict[str, Any]:
        """One line of metrics: losses are means over the steps since the line before."""
        window, now = self._window, time.monotonic()
        seconds = max(now - window.began, 1e-9)
        terms = {name: value / window.steps for name, value in window.terms.items()}
        row = {
            "step": step + 1,
            "epoch": round((step + 1) / self.setup.stream.steps_per_epoch, 4),
            "loss": sum(terms.values()),
            **(terms if len(terms) > 1 else {}),
            "lr": lr,
            "grad_norm": norm,
            "samples_per_s": window.samples / seconds,
            "tokens_per_s": window.tokens / seconds,
            "padding": window.padding / max(window.tokens + window.padding, 1),
            "memory_gb": round(peak_memory_gb(self.accelerator.device), 3),
            "seconds": round(seconds, 3),
        }
        self._window = _Window(began=now)
        return row

    def _measure(self, step: int, last: bool, log: RunLog) -> None:
        """Held-out loss by dataset and a few answers, every `held_out.every` steps and at the end."""
        batches = self.setup.stream.held_out()
        if not batches or not (last or step % self.recipe.evaluation.held_out.every == 0):
            return
        began, objective = time.monotonic(), self.setup.objective
        objective.eval()
        with torch.no_grad():
            losses = {name: self._held_out_loss(name, part) for name, part in batches.items()}
            log.record({"step": step, "held_out": losses})
            self._answer(step, log)
        objective.train()
        self._window.began += time.monotonic() - began

    def _answer(self, step: int, log: RunLog) -> None:
        if self.setup.answer is None:
            return
        if self.strategy.sharded:  # all ranks would have to generate, as many tokens each
            log.say(f"  no sample answers: no process holds all weights under {self.strategy.name}")
        elif self.accelerator.is_main_process:
            with self.strategy.autocast():
                log.record({"step": step, "answers": self.setup.answer()})

    def _held_out_loss(self, name: str, batches: Sequence[ChatBatch]) -> float:
        """The mean over a dataset's held-out samples. They are counted once: to count is to decode their images."""
        if name not in self._held_out_totals:
            counted = self._counts(batches)
            self._held_out_totals[name] = {key: int(value) for key, value in counted.items()}
        totals = self._held_out_totals[name]
        shares = [
            float(self.strategy.evaluate(to_device(batch, self.accelerator.device), totals).loss)
            for batch in batches
        ]
        return sum_over_ranks(self.accelerator, {"loss": sum(shares)})["loss"]

    def save(self, step: int) -> Path:
        """The checkpoint of `step`, once it is complete and older ones are rotated out."""
        setup = self.setup
        manifest = setup.manifest | {"total_steps": self.total, "strategy": self.strategy.describe()}
        saved = save_step(setup.folder, step, self.strategy, setup.processor, manifest)
        if self.accelerator.is_main_process:
            rotate(setup.folder, self.recipe.run.keep)
        return saved

    def _report_bad(self, micros: list[ChatBatch], count: float) -> None:
        """Tells every rank of the bad samples of all: all of them stop when the budget is spent."""
        if self.setup.on_bad is not None and count:
            for key, reason in gather_object([fault for batch in micros for fault in batch.bad]):
                self.setup.on_bad(key, reason)

    @contextmanager
    def _stop_on_signal(self, log: RunLog) -> Iterator[None]:
        """SIGTERM and SIGINT end the run after the current step, with a checkpoint; a second one ends it at once."""

        def ask(number: int, frame: FrameType | None) -> None:
            log.say(f"{signal.Signals(number).name}: saving after this step (once more: stop at once)")
            self._stop = True
            for each, handler in before.items():
                signal.signal(each, handler)

        before = {each: signal.signal(each, ask) for each in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)


def prove_gradients(objective: Objective, reached: set[str]) -> bool:
    """True when every trainable weight has been reached; False while no image has been seen yet.

    Raises TrainingError naming the weights otherwise: under DDP such a weight would make the ranks drift apart
    without an error.
    """
    trained = {name for name, weight in objective.named_parameters() if weight.requires_grad}
    missing = sorted(trained - reached)
    if not missing:
        return True
    visual = ("model.model.vision_tower.", "model.model.multi_modal_projector.")
    if all(name.startswith(visual) for name in missing) and not any(
        name.startswith(visual) for name in reached
    ):
        return False  # text-only so far
    raise TrainingError(
        f"{len(missing)} trainable weights get no gradient: {', '.join(missing[:5])}",
        "tuning",
        "Freeze them, or use them in the objective.",
    )


def to_device(batch: ChatBatch, device: torch.device) -> ChatBatch:
    """The batch with its tensors on `device`."""
    if device.type == "cpu":
        return batch
    moved = {name: value.to(device, non_blocking=True) for name, value in _tensors(batch).items()}
    return replace(batch, **moved)


def _tensors(batch: ChatBatch) -> dict[str, Tensor]:
    named = {
        "input_ids": batch.input_ids,
        "labels": batch.labels,
        "position_ids": batch.position_ids,
        "attention_mask": batch.attention_mask,
        "cu_seqlens": batch.cu_seqlens,
        "pixel_values": batch.pixel_values,
    }
    return {name: value for name, value in named.items() if value is not None}
