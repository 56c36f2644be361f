"""Records of the two chat formats -> ChatSample: pure functions that name what is wrong with a record.

Text is kept as written: nothing is stripped, and a literal `<image>` anywhere (answers too) counts as a mark,
because the renderer would put an image there. LLaVA's files place it first or last in the first human turn.
Whether turns alternate is the chat template's business, not the reader's.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote_to_bytes

from vlmtune.errors import DataError
from vlmtune.types import IMAGE_MARK, ChatSample, ImageRef, Role, Turn

_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "questioner": "questioner",
}


def llava_sample(record: object, key: str, root: Path) -> ChatSample:
    """Returns the sample of one {image | images, conversations: [{from, value}]} record.

    Raises DataError for anything but that, see `make_sample` for what must hold of the whole.
    """
    fields = _mapping(record, "the record", key)
    messages = _listed(fields, "conversations", key)
    return make_sample(key, _top_images(fields, key, root), [_llava_turn(m, key) for m in messages])


def chat_sample(record: object, key: str, root: Path) -> ChatSample:
    """Returns the sample of one {messages: [{role, content}], images?} record (OpenAI style).

    `content` is a text or a list of parts: {type: text}, {type: image_url} and {type: image}; parts are
    joined by a line break, an image part becomes `<image>`. Images come from the parts (in order), or from a
    top-level `images` list for marks and parts that name no file. Raises DataError for anything else.
    """
    fields = _mapping(record, "the record", key)
    messages = _listed(fields, "messages", key)
    return conversation(messages, _top_images(fields, key, root), key, root)


def conversation(messages: Sequence[object], images: Sequence[ImageRef], key: str, root: Path) -> ChatSample:
    """Returns the sample of {role, content} or {from, value} messages; images from `images` or the parts."""
    turns, inside = [], []
    for message in messages:
        if isinstance(message, dict) and "from" in message:
            turns.append(_llava_turn(message, key))
            continue
        turn, payloads = _chat_turn(message, key)
        turns.append(turn)
        inside += [image_ref(payload, key, root) for payload in payloads if payload is not None]
    if inside and images:
        raise DataError(
            "images stand both in the messages and in the images list, so their order is unknown",
            key,
            "Use one of the two places.",
        )
    return make_sample(key, inside or images, turns)


def make_sample(
    key: str,
    images: Sequence[ImageRef],
    turns: Sequence[Turn],
    kind: str = "",
    references: Sequence[str] = (),
) -> ChatSample:
    """Returns the sample once its rules hold: answers, none of them empty, as many marks as images.

    Questions to learn (of a questioner) stand for answers. Raises DataError otherwise.
    """
    answers = [turn for turn in turns if turn.role == "assistant"]
    if not answers and not any(turn.role == "questioner" for turn in turns):
        raise DataError("no assistant turn: nothing to learn or to score", key, "Add an answer or remove it.")
    if not all(turn.text.strip() for turn in answers):
        raise DataError("an assistant turn is empty", key, "Fill in the answer or remove the turn.")
    sample = ChatSample(key, tuple(images), tuple(turns), kind, tuple(references))
    if sample.image_marks != len(images):
        raise DataError(
            f"{sample.image_marks} {IMAGE_MARK} marks for {len(images)} images",
            key,
            f"Write {IMAGE_MARK} once for each image, where it belongs in the text.",
        )
    return sample


def image_ref(value: object, key: str, root: Path) -> ImageRef:
    """Returns the reference a record gives: a path under `root`, a data: URI, bytes, or {path, bytes}."""
    if isinstance(value, bytes):
        return ImageRef(f"{key} (bytes)", None, value)
    if isinstance(value, dict):
        data, path = value.get("bytes"), value.get("path")
        if isinstance(data, bytes):
            return ImageRef(path if isinstance(path, str) else f"{key} (bytes)", None, data)
        value = path
    if not isinstance(value, str) or not value:
        raise DataError(
            f"an image is given as {_named(value)}", key, "Give a path, a data: URI, or {path, bytes}."
        )
    if value.startswith("data:"):
        return ImageRef(f"{key} (data URI)", None, _decode_uri(value, key))
    return ImageRef(value, root)


def as_list(value: object) -> list[object]:
    """Returns None as an empty list, a list as it is, anything else as a list of one."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _decode_uri(uri: str, key: str) -> bytes:
    head, comma, body = uri.partition(",")
    try:
        if not comma:
            raise ValueError("no comma")
        data = unquote_to_bytes(body)
        return base64.b64decode(data, validate=True) if head.endswith(";base64") else data
    except (binascii.Error, ValueError) as error:
        raise DataError(
            f"a data: URI cannot be decoded: {error}", key, "Expected data:image/png;base64,...."
        ) from None


def _top_images(fields: dict[str, object], key: str, root: Path) -> list[ImageRef]:
    single, several = as_list(fields.get("image")), as_list(fields.get("images"))
    if single and several:
        raise DataError("both image and images are given", key, "Keep one of them.")
    return [image_ref(value, key, root) for value in single or several]


def _llava_turn(message: object, key: str) -> Turn:
    fields = _mapping(message, "a conversation entry", key)
    return Turn(_role(fields.get("from"), "from", key), _text(fields.get("value"), "value", key))


def _chat_turn(message: object, key: str) -> tuple[Turn, list[object]]:
    """Returns the turn and what its image parts hold (None: a mark without a file)."""
    fields = _mapping(message, "a message", key)
    role, content = _role(fields.get("role"), "role", key), fields.get("content")
    if not isinstance(content, list):
        return Turn(role, _text(content, "content", key)), []
    parts = [_part(part, key) for part in content]
    payloads = [payload for _, image_parts in parts for payload in image_parts]
    return Turn(role, "\n".join(text for text, _ in parts)), payloads


def _part(part: object, key: str) -> tuple[str, list[object]]:
    """Returns the text of a content part and its images (one or none)."""
    fields = _mapping(part, "a content part", key)
    match fields.get("type"):
        case "text":
            return _text(fields.get("text"), "text", key), []
        case "image_url":
            url = fields.get("image_url")
            return IMAGE_MARK, [_text(url.get("url") if isinstance(url, dict) else url, "image_url", key)]
        case "image":
            given = (fields.get(name) for name in ("image", "path", "url"))
            return IMAGE_MARK, [next((value for value in given if value is not None), None)]
        case other:
            raise DataError(
                f"a content part has type {_quoted(other)}", key, "Known types: text, image, image_url."
            )


def _role(value: object, name: str, key: str) -> Role:
    role = _ROLES.get(value) if isinstance(value, str) else None
    if role is None:
        raise DataError(f"{name} is {_quoted(value)}", key, f"Known: {', '.join(_ROLES)}.")
    return role


def _text(value: object, name: str, key: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} is {_named(value)}, not text", key, "Write it as a JSON string.")
    return value


def _mapping(value: object, name: str, key: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise DataError(f"{name} is {_named(value)}, not an object", key, "Write it as a JSON object {...}.")
    return value


def _listed(fields: dict[str, object], name: str, key: str) -> list[object]:
    if name not in fields:
        found = ", ".join(list(map(str, fields))[:8]) or "none"
        raise DataError(f"the record has no {name} (its keys: {found})", key, "Check the source's format.")
    value = fields[name]
    if not isinstance(value, list):
        raise DataError(f"{name} is {_named(value)}, not a list", key, "Write it as a JSON list [...].")
    return value


def _named(value: object) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"


def _quoted(value: object) -> str:
    return "missing" if value is None else repr(value)[:40]


__all__ = ["as_list", "chat_sample", "conversation", "image_ref", "llava_sample", "make_sample"]
