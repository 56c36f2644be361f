"""The one model class: transformers' Llava with another projector, under transformers' own names."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, final, no_type_check

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from vlmtune.models.vision import model_projector

if TYPE_CHECKING:
    from vlmtune.models.origin import Adaptation, Origin


@no_type_check  # transformers passes keys beside the fields, which a checked __init__ would refuse
@strict
class VLMConfig(LlavaConfig):
    """LlavaConfig and the projector's options as in the recipe (`{"type": "mlp2x"}`)."""

    model_type = "vlmtune"

    projector: dict[str, Any] | None = None
    questioner_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:  # foreign: transformers' dataclass configs
        if self.projector is None:
            self.projector = {"type": "mlp2x"}
        super().__post_init__(**kwargs)


@final
class VLM(LlavaForConditionalGeneration):
    """Vision tower, projector, language model. The config is copied: models never share one."""

    config_class = VLMConfig

    def __init__(self, config: VLMConfig) -> None:
        config = copy.deepcopy(config)
        super().__init__(config)
        self.model.multi_modal_projector = model_projector(config)
        # Not annotated in the class: transformers evaluates the annotations of its subclasses.
        self.origin: Origin | None = None
        """What it was built from; None for a model that was opened or made otherwise."""
        self.adaptation: Adaptation | None = None
        """The adapters it carries."""
        self.fused_loss = False
        """Whether Liger's kernel computes the loss at the head."""


AutoConfig.register(VLMConfig.model_type, VLMConfig)
AutoModelForImageTextToText.register(VLMConfig, VLM)
# On disk the names are those of a stock llava (`language_model.model...`), in both directions.
register_checkpoint_conversion_mapping(VLMConfig.model_type, get_checkpoint_conversion_mapping("llava"))
