"""Strict loading: what a folder holds is what the model has, or an error that says what differs.

transformers fills missing weights with random ones and drops unexpected ones, with a printed notice at most.
Only safetensors are read, and code that ships with a checkpoint runs only when the recipe says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoProcessor,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)

from vlmtune.errors import CheckpointError
from vlmtune.models.vision import processor_counts
from vlmtune.models.vlm import VLM, VLMConfig

ADAPTERS_FILE = "adapters.json"
"""In a folder that holds what was trained of a model with adapters: what they are, and their base."""
_OPEN = "Give a folder with the file, or download the hub model first (HF_HUB_OFFLINE=1 forbids that)."


def load_model(
    path: str | Path,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    merged: bool = False,
) -> tuple[VLM, LlavaProcessor]:
    """A VLM in eval mode and its processor, from our step folders, our exports, or `llava-hf/*`.

    `dtype` None keeps the saved type. A stock `llava` is read as a VLM with the projector mlp2x. A folder of
    adapters gives its base model with them in place, or `merged` into its weights. Raises CheckpointError when a
    weight is missing, unexpected or of another shape, when the processor does not fit the model, or when the
    base of adapters is not the one they were trained on.
    """
    if (Path(path) / ADAPTERS_FILE).is_file():
        from vlmtune.models.saving import load_adapted  # its base is built, perhaps from another checkpoint

        return load_adapted(Path(path), dtype, trust_remote_code, merged)
    where = str(path)
    hub = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = _vlm_config(load_config(path, where, **hub), where)
    model = load_weights(VLM, path, where, dtype or "auto", config, **hub)
    return model, load_processor(path, model, **hub)


def load_processor(
    path: str | Path, model: VLM, revision: str | None = None, trust_remote_code: bool = False
) -> LlavaProcessor:
    """The processor of a folder or hub id; raises CheckpointError when it does not fit the model."""
    where = str(path)
    hub = {"revision": revision, "trust_remote_code": trust_remote_code}
    processor = _load(AutoProcessor, path, where, **hub)
    if not isinstance(processor, LlavaProcessor):
        kind = type(processor).__name__
        raise CheckpointError(f"the processor is a {kind}", where, "It must be a LlavaProcessor.")
    # Apart: the keyword would reach the tokenizer too, and be saved there.
    processor.image_processor = _load(AutoImageProcessor, path, where, backend="pil", **hub)
    for name, value in processor_counts(model.config).items():
        setattr(processor, name, value)
    check_processor(model, processor, where)
    return processor


def _vlm_config(config: PreTrainedConfig, where: str) -> VLMConfig:
    if isinstance(config, VLMConfig):
        return config
    if type(config) is LlavaConfig and isinstance(config.vision_feature_layer, int):
        return VLMConfig(**{k: v for k, v in config.to_dict().items() if k != "model_type"})
    raise CheckpointError(
        f"the model is a {config.model_type!r}",
        where,
        "Only vlmtune and llava checkpoints with one feature layer can be opened.",
    )


def check_processor(model: VLM, processor: LlavaProcessor, where: str) -> None:
    """Raises CheckpointError unless ids and pixels of the processor fit the model."""
    config, tokenizer = model.config, processor.tokenizer
    image_id = tokenizer.convert_tokens_to_ids(processor.image_token)
    if image_id != config.image_token_id:
        raise CheckpointError(
            f"the tokenizer's {processor.image_token} is {image_id}, the model's is {config.image_token_id}",
            where,
            "Tokenizer and weights come from different models: save both together.",
        )
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise CheckpointError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {rows} embeddings",
            where,
            "Tokenizer and weights come from different models: save both together.",
        )
    side = config.vision_config.image_size
    pixels = processor.image_processor(Image.new("RGB", (3, 2)), return_tensors="pt")["pixel_values"]
    if pixels.shape != (1, 3, side, side):
        raise CheckpointError(
            f"the image processor makes {tuple(pixels.shape[-2:])} pixels, the tower takes {(side, side)}",
            where,
            "Set size and crop_size in the image processor's config.",
        )


def load_config(
    path: str | Path, where: str, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """config.json of a folder or hub id; raises CheckpointError when there is none."""
    return _load(AutoConfig, path, where, revision=revision, trust_remote_code=trust_remote_code)


def load_weights(
    kind: type,
    path: str | Path,
    where: str,
    dtype: torch.dtype | Literal["auto"],
    config: PreTrainedConfig | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    part_of_more: bool = False,
) -> PreTrainedModel:
    """The model in eval mode, every weight from the file; raises CheckpointError naming those that differ.

    `part_of_more`: the file holds other parts too (the text half of a dual encoder), which are left out.
    """
    model, report = _load(
        kind,
        path,
        where,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # so that they are reported below, with the others
        **({} if config is None else {"config": config}),
    )
    computed = {name for name, _ in model.named_buffers()}
    wrong = {
        "missing": sorted(report["missing_keys"]),
        "of another shape": sorted(key for key, *_ in report["mismatched_keys"]),
        "unexpected": [] if part_of_more else sorted(set(report["unexpected_keys"]) - computed),
    }
    if any(wrong.values()):
        counts = "; ".join(f"{len(keys)} {what} ({keys[0]})" for what, keys in wrong.items() if keys)
        raise CheckpointError(
            f"the weights do not fit {type(model).__name__}: {counts}",
            where,
            "The checkpoint is incomplete or of another model; nothing is filled with random weights here.",
        )
    return model.eval()


def weights_digest(folder: Path) -> str:
    """The sha256 of a folder's safetensors files, names included; raises CheckpointError when it has none.

    Of adapters also what they are and stand on.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError("there are no safetensors files", str(folder), "Name a model folder.")
    files += folder.glob(ADAPTERS_FILE)
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def feed_digest(update: Callable[[Any], None], name: str, tensor: Tensor) -> None:
    """Gives a tensor on the CPU to a digest's `update`: name, type, shape and every byte."""
    update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    update(tensor.reshape(-1).view(torch.uint8).numpy())


def _load(kind: Any, path: str | Path, where: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(str(path), **options)
    except (StrictDataclassError, OSError, ValueError, ImportError, KeyError) as error:
        raise CheckpointError(f"cannot load {path}: {error}", where, _OPEN) from error
