"""DeepSpeed ZeRO, stages 1 to 3, with or without CPU offload: its engine takes backward, clipping and the step.

With run.precision bf16 the weights are computed with in bfloat16 and ZeRO's optimizer holds float32 masters of its
share. Autocast over float32 weights, as elsewhere, would keep a whole half-precision model on every rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, final

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vlmtune.config.schema import Recipe
from vlmtune.errors import CheckpointError
from vlmtune.objectives.base import Objective
from vlmtune.training.parallel import Autocasting, Parallel, Piece, gathered
from vlmtune.types import ChatBatch, LossOutput


@final
class Zero(Parallel):
    """accelerate's DeepSpeed, driven through the engine: the number of micro-batches differs from step to step."""

    shares_moments = True

    def __init__(
        self, accelerator: Accelerator, objective: Objective, optimizer: torch.optim.Optimizer, recipe: Recipe
    ) -> None:
        super().__init__(accelerator, objective, recipe.run.precision == "bf16")
        plugin = accelerator.state.deepspeed_plugin
        self._stage: int = plugin.zero_stage
        self.sharded = self._stage == 3
        self._trained = {
            name: weight for name, weight in objective.named_parameters() if weight.requires_grad
        }
        self._types = {id(weight): weight.dtype for weight in objective.parameters()}
        self._reached: set[str] = set()
        for name, weight in self._trained.items():  # ZeRO takes a gradient away before anyone can look
            weight.register_post_accumulate_grad_hook(lambda _, name=name: self._reached.add(name))
        half = self._half or objective.exported().dtype == torch.bfloat16
        _configure(plugin.deepspeed_config, self._stage, half, recipe, accelerator.num_processes)
        # DeepSpeed makes its masters of the weights it has rounded; these are what they were before.
        exact = {name: weight.detach() for name, weight in self._trained.items()} if half else {}
        module = Autocasting(objective, self.autocast)
        if self.sharded:
            _shard(module, plugin.deepspeed_config, accelerator.device)
        self.module, self.optimizer = accelerator.prepare(module, optimizer)
        self._engine: Any = self.module
        for name, value in exact.items():
            self._set(self._trained[name], value.float(), None)

    @property
    def name(self) -> str:
        offload = self._engine.zero_offload_optimizer()
        return f"ZeRO-{self._stage}" + (
            ", optimizer on the CPU" if offload and offload.device == "cpu" else ""
        )

    def learn(self, batch: ChatBatch, totals: Mapping[str, int | float], last: bool) -> LossOutput:
        # ZeRO-2 and 3 reduce every micro-batch into the sharded sum; ZeRO-1 waits for the boundary.
        self._engine.set_gradient_accumulation_boundary(last)
        output = self.evaluate(batch, totals)
        self._engine.backward(output.loss * self.accelerator.num_processes, scale_wrt_gas=False)
        return output

    def update(self) -> float:
        self._engine.step()  # clips, steps, zeroes
        norm = float(self._engine.get_global_grad_norm())
        return norm if norm >= 0 else float("nan")  # -1 stands for a norm that is not finite

    def reached(self) -> set[str]:
        return set(self._reached)

    def weights(self, names: Iterable[str]) -> dict[str, Tensor]:
        return gathered(self.objective, names, self._kept)

    def moments(self) -> dict[str, Piece]:
        self._link()
        found: dict[str, Piece | None] = {}
        for flat, names in self._shares():
            for entry, held in sorted(self._base.state[flat].items()):
                counter = not torch.is_tensor(held) or held.ndim == 0
                for name in names:
                    found[f"{entry}:{name}"] = (
                        self._count(held) if counter else self._piece(self._trained[name], entry)
                    )
        return {key: piece for key, piece in found.items() if piece is not None}

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        """As Parallel; raises CheckpointError when weights that ZeRO steps as one took different numbers of steps."""
        entries = sorted({key.partition(":")[0] for key in moments})
        for flat, names in self._shares():
            for entry in entries:
                first = moments[f"{entry}:{names[0]}"]
                if first.ndim == 0:
                    counts = {float(moments[f"{entry}:{name}"]) for name in names}
                    self._base.state[flat][entry] = self._counter(counts, flat, names[0])
                else:
                    self._base.state[flat][entry] = torch.zeros_like(flat)
        self._link()
        for key in moments:
            entry, _, name = key.partition(":")
            if (value := moments[key]).ndim:
                self._set(self._trained[name], value, entry)

    # ------------------------------------------------------------ DeepSpeed's own tensors

    @property
    def _base(self) -> torch.optim.Optimizer:
        """The optimizer inside ZeRO's, which steps the flat shares."""
        return self._engine.optimizer.optimizer

    def _shares(self) -> Iterator[tuple[Tensor, list[str]]]:
        """This rank's flat float32 shares, each with the names of the weights it has a part of."""
        zero = self._engine.optimizer
        names = {id(weight): name for name, weight in self._trained.items()}
        if self._stage == 3:
            pairs = zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
        else:
            flats = (group["params"][0] for group in self._base.param_groups)
            pairs = zip(flats, zero.bit16_groups, strict=True)
        for flat, weights in pairs:
            yield flat, [names[id(weight)] for weight in weights]

    def _link(self) -> None:
        """Makes the optimizer's states known to DeepSpeed's getters and setters of ZeRO-1 and 2.

        DeepSpeed 0.19 does so after the first step of the first group, when the others have no state yet.
        """
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        if self._stage < 3:
            for flat, names in self._shares():
                weights = [self._trained[name] for name in names]
                lazy_init_hp_params_optimizer_state(weights, flat, self._base.state)

    def _kept(self, tensor: Tensor) -> Tensor | None:
        """The whole tensor in its first type, masters before rounded weights, on the main process."""
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        trained = id(tensor) in self._types and tensor.requires_grad
        sharded = self.sharded and id(tensor) in self._types
        with deepspeed.zero.GatheredParameters([tensor], enabled=sharded and not trained):
            whole = safe_get_full_fp32_param(tensor) if trained else tensor.detach()
            if not self.accelerator.is_main_process:
                return None
            return whole.to("cpu", self._types.get(id(tensor), whole.dtype), copy=True)

    def _set(self, weight: Tensor, value: Tensor, entry: str | None) -> None:
        """Puts this rank's share of `value` in place: of an optimizer state, or of the master weight (None)."""
        from deepspeed import utils

        value = value.float().flatten()
        if self._stage < 3:
            if entry is None:
                utils.safe_set_full_fp32_param(weight, value)
            else:
                utils.safe_set_full_optimizer_state(weight, value, entry)
            return
        size = weight.ds_tensor.numel()  # the last rank's share ends in padding
        share = value[size * self.accelerator.process_index :][:size]
        share = nn.functional.pad(share, (0, size - len(share)))
        if entry is None:
            utils.safe_set_local_fp32_param(weight, share)
        else:
            utils.safe_set_local_optimizer_state(weight, share, entry)

    def _piece(self, weight: Any, entry: str) -> Piece | None:
        """This rank's share of an optimizer state; None of a weight that other ranks share out."""
        from deepspeed.utils import safe_get_local_optimizer_state

        if self._stage < 3:
            held = weight._hp_mapping
            if held is None:
                return None
            value, start = held.get_hp_fragment(entry), held.lp_fragment_address.start
            return Piece(value.detach().cpu(), start, tuple(weight.shape))
        start = weight.ds_tensor.numel() * self.accelerator.process_index
        size = min(weight.ds_tensor.numel(), weight.ds_numel - start)  # the last share ends in padding
        if size <= 0:
            return None
        value = safe_get_local_optimizer_state(weight, entry)
        return Piece(value.detach().flatten()[:size].cpu(), start, tuple(weight.ds_shape))

    def _count(self, held: Any) -> Piece | None:
        return Piece(torch.tensor(float(held)), 0, ()) if self.accelerator.is_main_process else None

    def _counter(self, counts: set[float], flat: Tensor, name: str) -> Any:
        """The one step counter of a share, as its optimizer wants it."""
        if len(counts) > 1:
            raise CheckpointError(
                f"the optimizer took {min(counts):g} to {max(counts):g} steps on weights that ZeRO steps as one",
                name,
                "Resume with the strategy that wrote the checkpoint, or without DeepSpeed.",
            )
        (count,) = counts
        own = isinstance(self._base, torch.optim.Adam)  # DeepSpeed's own optimizers count with a number
        return torch.tensor(count, device=flat.device) if own else int(count)


def _configure(config: dict[str, Any], stage: int, half: bool, recipe: Recipe, processes: int) -> None:
    """Writes what the recipe decides into DeepSpeed's config; the launch file keeps stage and offload."""
    config["train_micro_batch_size_per_gpu"] = config["gradient_accumulation_steps"] = 1
    config["train_batch_size"] = processes
    config["gradient_clipping"] = recipe.optim.max_grad_norm
    config["bf16"] = {"enabled": half, "check_grad_overflow": half}
    if half and stage > 1:  # else micro-batches would add up in bfloat16; ZeRO-1 has no such option
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    # It would replace torch.nn.functional.linear in this process, for good.
    config["zero_optimization"]["memory_efficient_linear"] = False
    # DeepSpeed 0.19 calls them at every step, and torch 2.13 warns every time.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)


def _shard(module: nn.Module, config: dict[str, Any], device: torch.device) -> None:
    """Shards weight by weight: left to DeepSpeed, the whole model would go to the device first."""
    import deepspeed

    deepspeed.init_distributed(auto_mpi_discovery=False)  # else Init takes this process to be alone
    deepspeed.zero.Init(module=module, config_dict_or_path=config)
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = buffer.to(device)
