"""The processor's files, such that every installation turns an image into the same pixels.

transformers 5 picks torchvision's resize where torchvision is installed and PIL's elsewhere; they differ by
one grey level in places (0.015 after CLIP's normalisation), and both are saved under one name. The public
class `PilBackend` has no twin on torchvision, so a folder that names it is read with PIL everywhere. Version
4 reads `preprocessor_config.json`, where `CLIPImageProcessor` is the PIL class of that version.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import BaseImageProcessor, LlavaImageProcessorPil, LlavaProcessor, PilBackend

from vlmtune.errors import CheckpointError

_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")


def write_processor(processor: LlavaProcessor, folder: Path) -> bool:
    """Whether pixels will be the same with and without torchvision; False: the class has steps of its own."""
    if processor.image_processor.backend != "pil":
        raise CheckpointError(
            "the image processor resizes with torchvision",
            where=type(processor.image_processor).__name__,
            remedy='Load it with AutoProcessor.from_pretrained(..., backend="pil") before training.',
        )
    processor.save_pretrained(folder)
    pinned = _is_plain(processor.image_processor)
    _write_image_processor(folder, pinned)
    _write_tokenizer_config(folder / "tokenizer_config.json")
    return pinned


def _is_plain(image_processor: BaseImageProcessor) -> bool:
    """Whether it does what PilBackend does: its class adds only default values, all in the saved file."""
    if isinstance(image_processor, LlavaImageProcessorPil):
        return not image_processor.do_pad  # its one own step, padding to a square
    lineage = type(image_processor).__mro__
    if PilBackend not in lineage:
        return False
    own = lineage[: lineage.index(PilBackend)]
    return {name for cls in own for name, value in vars(cls).items() if callable(value)} <= {"__init__"}


def _write_image_processor(folder: Path, pinned: bool) -> None:
    nested = folder / "processor_config.json"
    config = _read(nested)
    steps = config["image_processor"]
    old = dict(steps)
    if pinned:
        steps |= {"image_processor_type": "PilBackend"}
        old |= {name: old.get(name, False) for name in _STEPS}
        old |= {"image_processor_type": "CLIPImageProcessor"}
    _write(nested, config)
    _write(folder / "preprocessor_config.json", {**old, "processor_class": config["processor_class"]})


def _write_tokenizer_config(path: Path) -> None:
    """Rewrites what version 4 does not read, and drops what is only about the folder it was read from.

    It knows no `TokenizersBackend`, has another name for the extra special tokens, and by default makes token
    type ids, which the model then refuses.
    """
    config = _read(path)
    if config["tokenizer_class"] == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["model_input_names"] = ["input_ids", "attention_mask"]
    for how_it_was_opened in ("is_local", "local_files_only"):
        config.pop(how_it_was_opened, None)
    extra = config.pop("extra_special_tokens", [])
    if extra:
        config["additional_special_tokens"] = extra
    _write(path, config)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, config: dict[str, Any]) -> None:
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
