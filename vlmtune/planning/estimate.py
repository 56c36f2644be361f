"""One setting of a recipe, estimated: bytes on every rank, operations and seconds of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from vlmtune.config.plugins import NextTokenConfig, ReconstructionConfig
from vlmtune.config.schema import Recipe
from vlmtune.config.tuning import Full, Part, Qlora
from vlmtune.models.vlm import VLM, VLMConfig
from vlmtune.planning.batches import Micro, Schedule, as_batch, simulate
from vlmtune.planning.flops import Costs, Pass, costs, total
from vlmtune.planning.footprint import Compute, Footprint, footprint
from vlmtune.planning.lengths import Lengths
from vlmtune.planning.skeleton import Skeleton, meta_model, unquantized
from vlmtune.planning.strategies import Held, Setting, Strategy

RUNTIME = 3 * 2**29
"""Bytes a device has taken before the first tensor: CUDA context, NCCL, cuBLAS (assumed: 1.5 GiB)."""
LINK, HOST = 200e9, 20e9
"""Bytes a second between GPUs of a node, and between a GPU and its host (assumed)."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What the recipe is to run on."""

    gpus: int
    memory: int
    """Bytes of one GPU."""
    tflops: float
    """Peak of one GPU in bfloat16, 10^12 operations a second."""
    mfu: float
    """Share of the peak at which computed operations, padding and recomputation included, are expected to run."""


@dataclass(frozen=True)
class Estimate:
    """What one setting takes on each rank, and how long it takes."""

    recipe: Recipe
    setting: Setting
    machine: Machine
    parts: Mapping[Part, Held]
    buffers: int
    footprint: Footprint
    worst: Micro
    operations: Mapping[str, Pass]
    """Of all ranks in a step, on average, by part."""
    learns: bool
    """False when bfloat16 weights are trained without float32 masters: small steps are rounded away."""
    seconds: float
    """Of a step, by the stated MFU."""
    waiting: float
    """Seconds of a step's traffic at the assumed rates, if none of it is hidden."""

    @property
    def held(self) -> Held:
        """Weights, gradients and optimizer of all parts."""
        return sum(self.parts.values(), Held())

    @property
    def total(self) -> int:
        """Bytes on the device at the peak of the worst micro-batch."""
        return self.held.device + self.buffers + self.footprint.total + RUNTIME

    @property
    def fits(self) -> bool:
        return self.total <= self.machine.memory

    @property
    def useful(self) -> float:
        """Operations of a step without recomputation, over all ranks."""
        return total(self.operations).useful


class Estimator:
    """Estimates settings of one stage; equal questions are answered once."""

    def __init__(self, config: VLMConfig, lengths: Lengths, machine: Machine) -> None:
        self.config, self.lengths, self.machine = config, lengths, machine
        self._models: dict[str, VLM] = {}
        self._skeletons: dict[str, Skeleton] = {}
        self._schedules: dict[str, Schedule] = {}
        self._costs: dict[tuple[str, bool], Costs] = {}
        self._footprints: dict[tuple[object, ...], Footprint] = {}

    def estimate(self, recipe: Recipe, strategy: Strategy) -> Estimate:
        """The recipe under a strategy on this machine."""
        draft = self.draft(recipe, strategy)
        return draft.finished(self._footprint(draft))

    def draft(self, recipe: Recipe, strategy: Strategy) -> Draft:
        """All but the activations, which take a second or two."""
        key = f"{recipe.tuning.model_dump_json()} {recipe.model.dtype}"
        if key not in self._skeletons:
            self._skeletons[key] = Skeleton(recipe.tuning, self._model(recipe))
        skeleton, checkpointing = self._skeletons[key], recipe.run.activation_checkpointing
        if (key, checkpointing) not in self._costs:
            self._costs[key, checkpointing] = costs(skeleton.model, checkpointing)
        half = recipe.run.precision == "bf16" or (strategy.zero and recipe.model.dtype == "bfloat16")
        setting = Setting(strategy, self.machine.gpus, half, recipe.optim.type == "adamw_8bit")
        schedule = self.schedule(recipe)
        return Draft(recipe, setting, self.machine, skeleton, schedule, self._costs[key, checkpointing])

    def schedule(self, recipe: Recipe) -> Schedule:
        """The recipe's simulated batches."""
        stream = recipe.data.chat
        assert stream is not None  # the loader has seen to it
        key = f"{stream.batch_size} {stream.micro_tokens} {stream.packing} {stream.max_length}"
        if key not in self._schedules:
            self._schedules[key] = simulate(self.lengths, stream, self.machine.gpus)
        return self._schedules[key]

    def _model(self, recipe: Recipe) -> VLM:
        tuning = unquantized(recipe.tuning)
        key = f"{tuning.model_dump_json()} {recipe.model.dtype}"
        if key not in self._models:
            self._models[key] = meta_model(self.config, tuning, getattr(torch, recipe.model.dtype))
        return self._models[key]

    def _footprint(self, draft: Draft) -> Footprint:
        recipe = draft.recipe
        tuning, dtype = unquantized(recipe.tuning), getattr(torch, recipe.model.dtype)
        key = (tuning.model_dump_json(), dtype, draft.compute, draft.worst)
        if key not in self._footprints:
            batch = as_batch(draft.worst, self.config)
            self._footprints[key] = footprint(self.config, tuning, dtype, batch, draft.compute)
        return self._footprints[key]


@dataclass(frozen=True)
class Draft:
    """An estimate without activations."""

    recipe: Recipe
    setting: Setting
    machine: Machine
    skeleton: Skeleton
    schedule: Schedule
    costs: Costs

    @cached_property
    def parts(self) -> dict[Part, Held]:
        """What a rank keeps of each part."""
        found: dict[Part, Held] = {part: Held() for part in self.recipe.tuning.parts()}
        for weight in self.skeleton.weights:
            found[weight.part] += self.setting.held(weight)
        return found

    @property
    def learns(self) -> bool:
        """Whether the optimizer's steps are large enough for the weights' type."""
        return self.setting.learns(self.skeleton.weights)

    @cached_property
    def buffers(self) -> int:
        """Bytes on their way between ranks."""
        return self.setting.buffers(self.skeleton.weights)

    @property
    def least(self) -> int:
        """Bytes without any activation."""
        return sum(self.parts.values(), Held()).device + self.buffers + RUNTIME

    @property
    def compute(self) -> Compute:
        """How a micro-batch is computed. Types decide: where all are bfloat16 already, rounding changes nothing."""
        strategy, recipe = self.setting.strategy, self.recipe
        uniform = all(weight.itemsize == 2 or weight.bytes < weight.numel for weight in self.skeleton.weights)
        objective = recipe.objective
        known = isinstance(objective, NextTokenConfig | ReconstructionConfig)
        rounded = strategy.rounds(self.setting.half) and not uniform
        return Compute(
            checkpointing=recipe.run.activation_checkpointing,
            autocast=self.setting.half,
            rounded=rounded,
            sharded=strategy.stage == 3 and not uniform and not rounded,
            eager=recipe.model.attention == "eager",
            chunk=objective.chunk if known else NextTokenConfig().chunk,
        )

    @cached_property
    def worst(self) -> Micro:
        """The micro-batch with most to remember: of a frozen tower only the features count."""
        config = self.skeleton.model.config
        text, vision = config.text_config, config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        seen = patches * vision.hidden_size * vision.num_hidden_layers
        trained = isinstance(self.recipe.tuning.vision, Full)
        return self.schedule.worst(trained * seen / (text.hidden_size * text.num_hidden_layers))

    @cached_property
    def operations(self) -> dict[str, Pass]:
        """Of all ranks in a step, on average, by part."""
        found: dict[str, Pass] = {}
        count = len(self.schedule.steps)
        for micro in self.schedule.micros:
            for name, cost in self.costs.of(micro).items():
                held = found.setdefault(name, Pass())
                held.forward += cost.forward / count
                held.backward += cost.backward / count
                held.again += cost.again / count
        return found

    @cached_property
    def seconds(self) -> float:
        """Of a step: its busiest rank, at the stated share of the peak."""
        speed = self.machine.tflops * 1e12 * self.machine.mfu
        busiest = [max(map(self._work, step)) for step in self.schedule.steps]
        return sum(busiest) / len(busiest) / speed

    @cached_property
    def waiting(self) -> float:
        """Seconds of a step's traffic at the assumed rates."""
        link, host = self.setting.traffic(self.skeleton.weights, self.schedule.per_step)
        return link / LINK + host / HOST

    def finished(self, footprint: Footprint) -> Estimate:
        """The estimate, given the bytes of the worst micro-batch."""
        return Estimate(
            self.recipe,
            self.setting,
            self.machine,
            self.parts,
            self.buffers,
            footprint,
            self.worst,
            self.operations,
            self.learns,
            self.seconds,
            self.waiting,
        )

    def _work(self, micros: Sequence[Micro]) -> float:
        return sum(total(self.costs.of(micro)).computed for micro in micros)


def runs(recipe: Recipe, strategy: Strategy) -> bool:
    """Whether the strategy can train the recipe at all: 4-bit weights and 8-bit moments cannot be shared out."""
    quantized = any(isinstance(mode, Qlora) for mode in recipe.tuning.parts().values())
    eight_bit = recipe.optim.type == "adamw_8bit"
    return not (quantized and strategy.stage == 3) and not (eight_bit and strategy.stage > 0)


__all__ = ["HOST", "LINK", "RUNTIME", "Estimate", "Estimator", "Machine", "runs"]
