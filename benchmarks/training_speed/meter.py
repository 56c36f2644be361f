"""Where an arm's time and memory go, read in the same way in every arm.

The meter stands at the boundaries that all three share: torch's DataLoader, the parts of the Llava model,
`Tensor.backward`, and torch's optimizers. Each boundary ends a lap; a step has a few dozen of them.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import defaultdict
from typing import Any

import psutil
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data.dataloader import _BaseDataLoaderIter

PHASES = ("data", "vision", "language", "head_and_loss", "optimizer", "other")
"""vision: tower and projector. language: the decoder with its embedding. Both ways, forward and backward.
optimizer: gradient norm, clipping and update. other: what the training loop adds."""


def peak_memory_bytes() -> int:
    """The largest resident size of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Meter:
    """Counts what is fed to the model from the second step on; the first one warms up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.losses: list[float] = []
        self.keys: list[list[str]] = []
        self._counts: dict[str, int] = defaultdict(int)
        self._steps = 0
        self._began = self._last = time.perf_counter()
        self._ended = self._began
        self._with_model = 0

    def watch(self, model: nn.Module) -> None:
        """Puts the lap marks on a Llava model, on loaders, on backward passes and on optimizers."""
        parts = model.model
        for weight in model.parameters():
            weight.sum()  # mapped files are resident only once they are read
        self._with_model = psutil.Process().memory_info().rss
        parts.vision_tower.register_forward_pre_hook(lambda *_: self._lap("other"))
        parts.multi_modal_projector.register_forward_hook(lambda *_: self._lap("vision"))
        parts.language_model.register_forward_pre_hook(self._enters_language, with_kwargs=True)
        parts.language_model.register_forward_hook(self._leaves_language)
        register_optimizer_step_pre_hook(lambda *_: self._lap("optimizer"))
        register_optimizer_step_post_hook(lambda *_: self._lap("optimizer"))
        self._mark_calls(_BaseDataLoaderIter, "__next__", "other", "data")
        self._mark_calls(Tensor, "backward", "head_and_loss", "vision")

    def fed(self, labels: Tensor) -> None:
        """Counts a micro-batch that goes into the model: its labels are unshifted, a row or rows of tokens."""
        self._counts["computed_tokens"] += labels.numel()
        self._counts["supervised_tokens"] += int((labels[:, 1:] != -100).sum())

    def step_done(self) -> None:
        """Ends an optimizer step; after the first one all counts begin anew."""
        self._lap("other")
        self._steps += 1
        self._ended = self._last
        if self._steps == 1:
            self.first_counts = dict(self._counts)
            self._began = self._last
            self._counts.clear()
            self.seconds.clear()

    def result(self, samples: int, useful_tokens: int) -> dict[str, Any]:
        """The figures of the timed steps, which trained on so many samples and tokens."""
        seconds = self._ended - self._began
        peak = peak_memory_bytes()
        return {
            "samples_per_s": samples / seconds,
            "useful_tokens_per_s": useful_tokens / seconds,
            "seconds": seconds,
            "samples": samples,
            "useful_tokens": useful_tokens,
            **self._counts,
            "peak_memory_bytes": peak,
            "memory_with_model_bytes": self._with_model,
            "peak_memory_above_model_bytes": peak - self._with_model,
            "first_step_loss": self.losses[0],
            "first_step_supervised_tokens": self.first_counts["supervised_tokens"],
            "losses": self.losses,
            "phases_seconds": {name: self.seconds[name] for name in PHASES},
        }

    # ------------------------------------------------------------ laps

    def _lap(self, phase: str) -> None:
        """Books the time since the last mark."""
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now

    def _enters_language(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._lap("language")
        if kwargs["inputs_embeds"].requires_grad:
            kwargs["inputs_embeds"].register_hook(lambda _: self._lap("language"))

    def _leaves_language(self, module: nn.Module, args: Any, output: Any) -> None:
        self._lap("language")
        if output.last_hidden_state.requires_grad:
            output.last_hidden_state.register_hook(lambda _: self._lap("head_and_loss"))

    def _mark_calls(self, owner: type, name: str, before: str, after: str) -> None:
        method = vars(owner)[name]

        def marked(*args: Any, **kwargs: Any) -> Any:
            self._lap(before)
            try:
                return method(*args, **kwargs)
            finally:
                self._lap(after)

        setattr(owner, name, marked)
