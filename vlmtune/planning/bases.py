"""The model's config without its weights: from a local folder, the recipe itself, or a base shipped here.

`shapes/*.json` holds the public configs of common bases, so that a plan needs neither network nor download.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, LlavaConfig, PreTrainedConfig
from transformers.models.siglip2 import Siglip2VisionConfig

from vlmtune.config.loader import load_recipe
from vlmtune.config.schema import LanguageConfig, ModelConfig, Recipe, TokenizerTraining, VisionConfig
from vlmtune.errors import RecipeError
from vlmtune.models.checkpoint import load_config
from vlmtune.models.gguf import unpacked
from vlmtune.models.towers import config_from, grid_config
from vlmtune.models.vision import resolve_feature_layer, token_counter, tower_family
from vlmtune.models.vlm import VLMConfig

_SHAPES = Path(__file__).with_name("shapes")
_NEW_TOKENS = 2
"""`<image>`, and a padding token of its own."""
_ROWS = 64
"""Embeddings grow to a multiple of it."""


def model_config(config: ModelConfig, near: Path) -> VLMConfig:
    """The config of the recipe's model; a run that does not exist yet is read off its recipe in the folder `near`.

    Raises RecipeError for a base that is neither a local folder nor shipped.
    """
    if config.checkpoint is None:
        assert config.vision and config.projector and config.language  # ModelConfig has seen to it
        projector = config.projector.model_dump(mode="json")
        language, rows = _language(config.language)
        return _joined(_vision(config.vision), language, rows, projector, config.vision.feature_layer)
    if Path(config.checkpoint).is_dir():
        return _of_folder(config.checkpoint)
    if config.checkpoint in shipped():
        return _of_shape(shipped()[config.checkpoint])
    maker = _maker(config.checkpoint, near)
    if maker is None:
        raise _unknown(config.checkpoint, "model.checkpoint")
    return model_config(maker.model, near)


@cache
def shipped() -> dict[str, dict[str, Any]]:
    """The shapes in this package by hub id."""
    shapes = [json.loads(path.read_text()) for path in sorted(_SHAPES.glob("*.json"))]
    return {name: shape for shape in shapes for name in shape["ids"]}


def _of_folder(path: str) -> VLMConfig:
    config = load_config(path, "model.checkpoint")
    if isinstance(config, VLMConfig):
        return config
    if isinstance(config, LlavaConfig):
        return VLMConfig(**{key: value for key, value in config.to_dict().items() if key != "model_type"})
    raise RecipeError(
        f"{path} is a {config.model_type!r}", "model.checkpoint", "Name a llava or vlmtune folder."
    )


def _of_shape(shape: dict[str, Any]) -> VLMConfig:
    if "vision" not in shape:
        raise RecipeError(
            "it is a part, not a whole model", "model.checkpoint", "Give vision, projector and language."
        )
    language, rows = _language(LanguageConfig(path=shape["language"]))
    return _joined(_vision(VisionConfig(path=shape["vision"])), language, rows, {"type": "mlp2x"}, None)


def _joined(
    vision: PreTrainedConfig,
    language: PreTrainedConfig,
    rows: int,
    projector: dict[str, Any],
    feature_layer: int | None,
) -> VLMConfig:
    language.vocab_size = rows
    config = VLMConfig(
        vision_config=vision,
        text_config=language,
        projector=projector,
        image_token_index=rows - 1,
        vision_feature_layer=resolve_feature_layer(vision, feature_layer),
        vision_feature_select_strategy=tower_family(vision).select,
        tie_word_embeddings=language.tie_word_embeddings,
    )
    config.image_seq_length = token_counter(config).tokens
    return config


def _vision(config: VisionConfig) -> PreTrainedConfig:
    """The tower's config, as `models.towers.load_tower` builds it."""
    if config.path is None:
        own = config_from(config.config or {}, "model.vision.config")
    elif Path(config.path).is_dir():
        own = load_config(config.path, "model.vision.path")
        own = own.vision_config if "vision_config" in own.sub_configs else own
    else:
        own = _shipped_config(config.path, "model.vision.path")
    if isinstance(own, Siglip2VisionConfig):
        return grid_config(own, config.image_size)
    tower_family(own)
    return own


def _language(config: LanguageConfig) -> tuple[PreTrainedConfig, int]:
    """The decoder's config, and the embedding rows after `<image>` has come in."""
    if config.path is None:
        own = config_from(config.config or {}, "model.language.config")
        trained = isinstance(config.tokenizer, TokenizerTraining)
        return own, config.tokenizer.vocab_size if trained else own.vocab_size
    path = unpacked(config.path)
    if Path(path).is_dir():
        own = load_config(path, "model.language.path")
        tokens = len(AutoTokenizer.from_pretrained(path))
    else:
        own = _shipped_config(config.path, "model.language.path")
        tokens = shipped()[config.path]["tokenizer"]
    needed = tokens + _NEW_TOKENS
    return own, own.vocab_size if needed <= own.vocab_size else -(-needed // _ROWS) * _ROWS


def _shipped_config(name: str, where: str) -> PreTrainedConfig:
    shape = shipped().get(name)
    if shape is None or "config" not in shape:
        raise _unknown(name, where)
    return config_from(shape["config"], where)


def _maker(checkpoint: str, near: Path) -> Recipe | None:
    """The recipe in `near` whose export the checkpoint will be."""
    for path in sorted(near.glob("*.yaml")):
        try:
            recipe = load_recipe(path)[-1]
        except RecipeError:  # its own `vlmtune check` says why
            continue
        if Path(recipe.output) / "export" == Path(checkpoint):
            return recipe
    return None


def _unknown(name: str, where: str) -> RecipeError:
    ids = ", ".join(sorted(shipped()))
    remedy = f"Give a folder that holds its config.json, or one of those shipped: {ids}."
    return RecipeError(f"the sizes of {name} are not known here, and a plan asks no network", where, remedy)


__all__ = ["model_config", "shipped"]
