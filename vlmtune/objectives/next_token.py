"""Visual instruction tuning: cross entropy of the supervised tokens (LLaVA-1.5)."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from vlmtune.config.plugins import NextTokenConfig
from vlmtune.objectives.base import Objective
from vlmtune.objectives.functional import linear_cross_entropy, next_token_targets
from vlmtune.objectives.spine import hidden_states
from vlmtune.types import IGNORE, ChatBatch, LossOutput


class NextToken(Objective):
    """The mean cross entropy over all supervised tokens of the step."""

    Config = NextTokenConfig
    streams: ClassVar[tuple[str, ...]] = ("chat",)

    def __init__(self, config: NextTokenConfig, model: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.model = model

    def counts(self, batch: ChatBatch) -> dict[str, int]:
        """Supervised tokens; the first label of a row has no state that predicts it."""
        return {"tokens": int((batch.labels[:, 1:] != IGNORE).sum())}

    def forward(self, batch: ChatBatch, totals: dict[str, int]) -> LossOutput:
        hidden, targets = next_token_targets(hidden_states(self.model, batch), batch.labels)
        head = self.model.lm_head
        loss = linear_cross_entropy(hidden, head.weight, targets, self.config.chunk, head.bias)
        loss = loss / max(totals["tokens"], 1)
        return LossOutput(loss, {"next_token": loss.detach()})

    def exported(self) -> nn.Module:
        return self.model
