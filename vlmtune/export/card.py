"""README.md of an export: the model card."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_HEADER = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [vlmtune, llava]
{bases}# license: yours to choose, within the terms of the base models and of the training data
---"""
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
_ORIGINAL = (
    "The layout of the original LLaVA code (`LlavaLlamaForCausalLM`): it loads with "
    "`llava.model.builder.load_pretrained_model`; `vlmtune convert` turns it back into a transformers folder."
)
_STOCK = "A plain `llava`: it loads with transformers (5, and 4.57) alone, and in what is built on it."
_OWN = (
    "The projector is not one of transformers': it needs `import vlmtune.models.vlm` in front, and other "
    "programs cannot load it."
)
_SQUARE = (
    'Pictures are padded to squares; where torchvision is installed, `backend="pil"` above gives the pixels '
    "of training (torchvision's differ by one grey level in places)."
)


def model_card(record: Mapping[str, Any]) -> str:
    """The text of README.md: how to load, what it is made of, where it comes from, how good it is.

    `record` is the folder's manifest; what it does not say is left out.
    """
    origin = f"Recipe: `{record['recipe']}`. " if "recipe" in record else ""
    blocks = [
        _header(record.get("bases", {})),
        f"# {record['name']}",
        f"Made with vlmtune. {origin}The rest of its origin is in `manifest.json`.",
        *([_ORIGINAL] if record.get("layout") == "original" else _use(record)),
        _parts(record["parts"]),
        _differences(record),
        _bases(record),
        _bullets("Data", [f"`{mix}`" for mix in record.get("mixes", ())]),
        _scores(record.get("scores", {})),
        _bullets("Adapters, merged into the weights", _adapters(record)),
        _merge(record.get("merge", {})),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _header(bases: Mapping[str, str]) -> str:
    """The hub's metadata; bases that are not on the hub (paths) cannot be linked."""
    on_hub = sorted({base for base in bases.values() if re.fullmatch(r"[\w-]+/[\w.-]+", base)})
    return _HEADER.format(bases=f"base_model: [{', '.join(on_hub)}]\n" if on_hub else "")


def _use(record: Mapping[str, Any]) -> list[str]:
    pinned, stock = record["pinned_pixels"], record["stock"]
    code = _USE.format(backend="" if pinned else ', backend="pil"')
    code = code if stock else f"import vlmtune.models.vlm\n{code}"
    return [f"```python\n{code}```", _STOCK if stock else _OWN, "" if pinned else _SQUARE]


def _parts(parts: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [f"| {part} | {each['parameters']:,} | `{each['sha256'][:16]}` |" for part, each in parts.items()]
    return "\n".join(["| part | parameters | sha256 |", "|---|---:|---|", *rows])


def _differences(record: Mapping[str, Any]) -> str:
    """How close the folder came to what it was made of, in logits."""
    lines = []
    converted = record.get("converted")
    if converted:
        source = f"`{converted['path']}`" + (f" over `{converted['base']}`" if converted.get("base") else "")
        lines.append(
            f"Converted from {converted['from']} ({source}); both computed the same samples: "
            f"largest logit difference {converted['largest_logit_difference']:.2g}."
        )
    if "largest_logit_difference" in record:
        mean = f", mean {record['mean_logit_difference']:.2g}" if "mean_logit_difference" in record else ""
        lines.append(
            "Reopened and compared with the model it was written from: "
            f"largest logit difference {record['largest_logit_difference']:.2g}{mean}."
        )
    return "\n\n".join(lines)


def _bases(record: Mapping[str, Any]) -> str:
    licences = record.get("licences", {})
    lines = [
        f"{part}: `{base}`, licence {licences.get(base, 'not stated in its folder')}"
        for part, base in record.get("bases", {}).items()
    ]
    return _bullets("Base models", lines)


def _scores(scores: Mapping[str, Any]) -> str:
    rows = [f"| {name} | {value} |" for name, value in scores.items()]
    return "\n".join(["## Scores", "", "| score | value |", "|---|---:|", *rows]) if rows else ""


def _adapters(record: Mapping[str, Any]) -> list[str]:
    return [f"{part}: {said}" for part, said in record.get("adapters", {}).items()]


def _merge(merge: Mapping[str, Any]) -> str:
    if not merge:
        return ""
    inputs = [f"`{each['path']}` (sha256 `{each['sha256'][:16]}`)" for each in merge["inputs"]]
    base = merge["base"]
    inputs += [f"base: `{base['path']}` (sha256 `{base['sha256'][:16]}`)"] if base else []
    settings = [
        f"{part}: {', '.join(f'{key} {value}' for key, value in each.items())}"
        for part, each in merge["parts"].items()
    ]
    return f"{_bullets('Merged from', inputs)}\n\n{_bullets('Merged by', settings)}"


def _bullets(title: str, lines: Sequence[str]) -> str:
    return "\n".join([f"## {title}", "", *(f"- {line}" for line in lines)]) if lines else ""
