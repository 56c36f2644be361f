"""Visual instruction tuning: cross entropy of the supervised tokens (LLaVA-1.5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import nn
from transformers import LlavaProcessor

from vlmtune.config.plugins import NextTokenConfig
from vlmtune.objectives.base import Objective
from vlmtune.objectives.spine import hidden_states, supervised_tokens, token_loss
from vlmtune.types import ChatBatch, LossOutput


class NextToken(Objective):
    """The mean cross entropy over all supervised tokens of the step."""

    Config = NextTokenConfig
    streams: ClassVar[tuple[str, ...]] = ("chat",)

    def __init__(self, config: NextTokenConfig, model: nn.Module, processor: LlavaProcessor) -> None:
        super().__init__()
        self.config = config
        self.model = model

    def counts(self, batch: ChatBatch) -> dict[str, int]:
        return {"tokens": supervised_tokens(batch)}

    def forward(self, batch: ChatBatch, totals: Mapping[str, int | float]) -> LossOutput:
        hidden = hidden_states(self.model, batch)
        loss = token_loss(self.model, hidden, batch.labels, self.config.chunk) / max(totals["tokens"], 1)
        return LossOutput(loss, {"next_token": loss.detach()})

    def exported(self) -> nn.Module:
        return self.model
