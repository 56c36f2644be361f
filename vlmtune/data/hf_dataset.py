"""Rows of a `datasets.Dataset` as samples; images stay encoded (bytes or path), no pixel is decoded here."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, final

from vlmtune.config.mix import HfDatasetSource
from vlmtune.data.caching import digest, make_once
from vlmtune.data.readers import as_list, conversation, image_ref, make_sample
from vlmtune.errors import DataError, Fault
from vlmtune.types import IMAGE_MARK, ChatSample, ImageRef, Turn


@final
@dataclass(frozen=True)
class HfSource:
    """The rows of a dataset through a column map."""

    name: str
    fingerprint: str
    rows: Any
    """The dataset in `arrow` format: rows come as stored, so an Image column is never decoded."""
    columns: dict[str, str]
    root: Path
    """Folder that image paths cannot leave."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> ChatSample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = self.rows[index].to_pylist()[0]
        fields = {part: row[column] for part, column in self.columns.items()}
        return row_sample(fields, f"{self.name}#{index}", self.root)


def row_sample(fields: dict[str, Any], key: str, root: Path) -> ChatSample:
    """Returns the sample of mapped columns: images with messages, or images with question and answer(s).

    A question without marks gets one in front for each image. Raises DataError for a row that cannot be used.
    """
    images = [image_ref(value, key, root) for value in as_list(fields.get("images"))]
    if "messages" in fields:
        messages = fields["messages"]
        if not isinstance(messages, list):
            raise DataError("messages is not a list of messages", key, "Check the column map.")
        return conversation(messages, images, key, root)
    return _question_sample(fields, images, key)


def _question_sample(fields: dict[str, Any], images: list[ImageRef], key: str) -> ChatSample:
    question, references = fields.get("question"), _references(fields.get("answers"), key)
    answer = fields.get("answer")
    if answer is None and references:
        answer = Counter(references).most_common(1)[0][0]  # VQAv2's own rule: what most annotators said
    if not isinstance(question, str) or not isinstance(answer, str):
        raise DataError("question or answer is missing or not text", key, "Check the row and the column map.")
    marks = "" if IMAGE_MARK in question else f"{IMAGE_MARK}\n" * len(images)
    turns = [Turn("user", marks + question), Turn("assistant", answer)]
    kind = fields.get("kind")
    return make_sample(key, images, turns, "" if kind is None else str(kind), references)


def _references(value: object, key: str) -> list[str]:
    """Returns the accepted answers of a column of texts, or of VQAv2's {answer: ...} entries."""
    found = [entry.get("answer") if isinstance(entry, dict) else entry for entry in as_list(value)]
    texts = [entry for entry in found if isinstance(entry, str)]
    if len(texts) != len(found):
        raise DataError("answers holds something that is not text", key, "Check the row and the column map.")
    return texts


def open_hf_dataset(config: HfDatasetSource, base: Path, cache: Path) -> HfSource:
    """Returns the source of a folder (save_to_disk or data files) or of a hub id.

    Raises DataError: `datasets` is missing, nothing can be loaded, a mapped column does not exist.
    """
    library = _library()
    candidates = (Path(config.path).expanduser(), base / config.path)
    local = next((path for path in candidates if path.is_dir()), None)
    dataset = _loaded(config, local, cache)
    if config.take is not None:
        dataset = dataset.select(range(min(config.take, len(dataset))))
    _check_columns(config, dataset.column_names)
    if not len(dataset):
        raise DataError("the dataset holds no row", remedy="Check path, subset and split.")
    root = Path(library.config.HF_CACHE_HOME) if local is None else local
    columns: dict[str, str] = dict(config.columns)
    return HfSource(
        config.name, _fingerprint(config, dataset), dataset.with_format("arrow"), columns, root.resolve()
    )


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(
            "hf_dataset needs the datasets package", remedy='Install it: pip install "vlmtune[datasets]".'
        ) from None
    return datasets


def _loaded(config: HfDatasetSource, local: Path | None, cache: Path) -> Any:
    import datasets

    try:
        if local is not None and (local / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(local))[config.split]
        if local is not None and (local / "state.json").is_file():
            return datasets.load_from_disk(str(local))
        if config.streaming:
            stamp = "" if local is None else _folder_stamp(local)
            name = digest(config.path, config.subset, config.split, config.take, stamp)
            folder = make_once(cache / f"spool-{name}", partial(_spool, config, local))
            return datasets.load_from_disk(str(folder))
        path = config.path if local is None else str(local)
        kept = None if local is None else str(cache / "datasets")
        return datasets.load_dataset(path, config.subset, split=config.split, cache_dir=kept)
    except Exception as error:  # the library raises its own, the file system's and the network's errors alike
        raise DataError(
            f"{config.path} (split {config.split}) cannot be loaded: {type(error).__name__}: {error}",
            remedy="Check path, subset and split, and the network for a hub id.",
        ) from error


def _spool(config: HfDatasetSource, local: Path | None, folder: Path) -> None:
    """Writes the first rows, encoded images included, as a saved dataset."""
    import datasets

    path = config.path if local is None else str(local)
    stream = datasets.load_dataset(path, config.subset, split=config.split, streaming=True)
    rows = stream.take(config.take).decode(False)
    building = folder / "building"
    made = datasets.Dataset.from_generator(lambda: iter(rows), rows.features, cache_dir=str(building))
    made.save_to_disk(str(folder))
    shutil.rmtree(building)


def _check_columns(config: HfDatasetSource, present: list[str]) -> None:
    faults = [
        Fault(f"the dataset has no column {column!r} (for {part})", "", _hint(column, present))
        for part, column in config.columns.items()
        if column not in present
    ]
    asks = "question" in config.columns and not {"answer", "answers"}.isdisjoint(config.columns)
    if "messages" not in config.columns and not asks:
        faults.append(Fault("columns maps neither messages nor question with answer", "", "Map one of them."))
    if faults:
        raise DataError(faults)


def _hint(column: str, present: list[str]) -> str:
    near = get_close_matches(column, present, 1)
    asked = f"Did you mean {near[0]}? " if near else ""
    return f"{asked}It has: {', '.join(present)}."


def _fingerprint(config: HfDatasetSource, dataset: Any) -> str:
    files = [Path(entry["filename"]) for entry in dataset.cache_files]
    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return digest(config.name, config.path, sorted(config.columns.items()), config.take, len(dataset), stamps)


def _folder_stamp(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return digest(*((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files))


__all__ = ["HfSource", "open_hf_dataset", "row_sample"]
