"""Sources: what a mix draws from, as indexable ChatSamples. One class a format; `open_source` picks it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Protocol, final, overload, runtime_checkable

from vlmtune.config.mix import ChatJsonlSource, EasyVqaSource, HfDatasetSource, LlavaJsonSource, MixSource
from vlmtune.data.caching import digest
from vlmtune.data.readers import chat_sample, llava_sample
from vlmtune.data.record_files import RecordFile, open_records
from vlmtune.errors import DataError, Fault
from vlmtune.types import ChatSample


@runtime_checkable
class Source(Protocol):
    """A fixed sequence of samples; picklable. `fingerprint` is the same everywhere until the content changes.

    `source[i]` raises DataError, `where` being the sample's key, for a sample that cannot be used.
    """

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> ChatSample: ...


@final
@dataclass(frozen=True)
class RecordSource:
    """The samples of a llava_json or chat_jsonl file."""

    name: str
    fingerprint: str
    records: RecordFile
    read: Callable[[object, str, Path], ChatSample]
    root: Path
    """Folder of the images."""

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> ChatSample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        key = f"{self.name}#{index}"
        try:
            return self.read(self.records.read(index), key, self.root)
        except DataError as error:
            raise DataError(
                Fault(_placed(fault, key, self.records.place(index)), key, fault.remedy)
                for fault in error.faults
            ) from None


def open_source(config: MixSource, base: Path, cache: Path) -> Source:
    """Returns the source a mix names; relative paths are looked for in the working directory, then in `base`.

    `cache` keeps offsets and spooled rows. Raises DataError: nothing there or in it, a package is missing.
    """
    try:
        return _open(config, base, cache)
    except DataError as error:
        raise DataError(_within(fault, config.name) for fault in error.faults) from None


def _open(config: MixSource, base: Path, cache: Path) -> Source:
    match config:
        case LlavaJsonSource():
            return _record_source(config, llava_sample, base, cache)
        case ChatJsonlSource():
            return _record_source(config, chat_sample, base, cache)
        case HfDatasetSource():
            from vlmtune.data.hf_dataset import open_hf_dataset

            return open_hf_dataset(config, base, cache)
        case EasyVqaSource():
            from vlmtune.data.easy_vqa import open_easy_vqa

            return open_easy_vqa(config)


def _record_source(
    config: LlavaJsonSource | ChatJsonlSource,
    read: Callable[[object, str, Path], ChatSample],
    base: Path,
    cache: Path,
) -> RecordSource:
    path = _found(config.path, base, "file")
    root = path.parent if config.images is None else _found(config.images, base, "folder")
    records = open_records(path, cache)
    root = root.resolve()
    fingerprint = digest(config.format, config.name, root, records.content)
    return RecordSource(config.name, fingerprint, records, read, root)


def _found(path: str, base: Path, kind: str) -> Path:
    for candidate in (Path(path).expanduser(), base / path):
        if candidate.is_file() if kind == "file" else candidate.is_dir():
            return candidate
    raise DataError(f"there is no {kind} {path}", remedy=f"Looked in {Path.cwd()} and in {base}.")


def _placed(fault: Fault, key: str, place: str) -> str:
    """Returns the fault's text with where in the user's file it stands."""
    if fault.where == key:
        return f"{fault.what} ({place})"
    return f"{fault.where}: {fault.what}"


def _within(fault: Fault, name: str) -> Fault:
    """Returns the fault under the source's name, the file (if it names one) in its text."""
    what = fault.what if fault.where in ("", name) else f"{fault.where}: {fault.what}"
    return Fault(what, f"source {name}", fault.remedy)


__all__ = ["RecordSource", "Source", "open_source"]


@final
class SampleSequence(Sequence[ChatSample]):
    """The samples of several sources one after another, at most `most` of each; looked up when asked for."""

    def __init__(self, sources: Sequence[Source], most: int | None = None) -> None:
        self._sources = sources
        self._ends = list(accumulate(min(len(source), most or len(source)) for source in sources))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> ChatSample: ...
    @overload
    def __getitem__(self, index: slice) -> list[ChatSample]: ...
    def __getitem__(self, index: int | slice) -> ChatSample | list[ChatSample]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        source = bisect_right(self._ends, index)
        return self._sources[source][index - (self._ends[source - 1] if source else 0)]
