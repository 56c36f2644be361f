"""README.md of an export: the model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmtune.export.weights import PartDigest

_HEADER = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [vlmtune, llava]
# license: yours to choose, within the terms of the base models and of the training data
---
"""
_USE = """from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
processor = AutoProcessor.from_pretrained("."{backend})
model = AutoModelForImageTextToText.from_pretrained(".")
question = [{{"type": "image"}}, {{"type": "text", "text": "What is in the picture?"}}]
prompt = processor.apply_chat_template([{{"role": "user", "content": question}}], add_generation_prompt=True)
picture = Image.open("picture.png")
inputs = processor(images=picture, text=prompt, add_special_tokens=False, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))
"""
_STOCK = "A plain `llava`: it loads with transformers (5, and 4.57) alone, and in what is built on it."
_OWN = (
    "The projector is not one of transformers': it needs `import vlmtune.models.vlm` in front, and other "
    "programs cannot load it."
)
_SQUARE = (
    'Pictures are padded to squares; where torchvision is installed, `backend="pil"` above gives the pixels '
    "of training (torchvision's differ by one grey level in places)."
)


def model_card(
    name: str, stock: bool, pinned: bool, parts: Mapping[str, PartDigest], manifest: Mapping[str, Any]
) -> str:
    """The text of README.md: how to load, what it is made of, where it comes from."""
    use = ("" if stock else "import vlmtune.models.vlm\n") + _USE.format(
        backend="" if pinned else ', backend="pil"'
    )
    notes = [_STOCK if stock else _OWN] + ([] if pinned else [_SQUARE])
    rows = [f"| {part} | {digest.parameters:,} | `{digest.sha256[:16]}` |" for part, digest in parts.items()]
    recipe = manifest.get("recipe")
    origin = f"Recipe: `{recipe}`. " if isinstance(recipe, str) else ""
    return "\n".join(
        [
            f"{_HEADER}\n# {name}\n",
            f"Trained with vlmtune. {origin}The rest of its origin is in `manifest.json`.\n",
            f"```python\n{use}```\n",
            *(f"{note}\n" for note in notes),
            "| part | parameters | sha256 |\n|---|---:|---|",
            *rows,
            "",
        ]
    )
