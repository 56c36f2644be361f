"""JSON Lines and JSON lists as random-access records: flat memory, O(1) reads, offsets made once and cached.

A JSON list (LLaVA's 665K samples are one list of 1 GB) is streamed once into a JSON Lines file in the cache.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, final

import numpy as np

from vlmtune.data.caching import digest, make_once
from vlmtune.errors import DataError

log = logging.getLogger(__name__)

_ROW = struct.Struct("<qqq")
"""Start, stop (bytes), and line or list position (from 1) of a record."""

_CHUNK = 1 << 18
_LARGEST = 1 << 26
"""Characters: a list item that is not complete after so many is broken."""

_DECODER = json.JSONDecoder()
_BLANKS = re.compile(r"[ \t\r\n]*")
_FOLLOWS = re.compile(r"[ \t\r\n]*[,\]]")


@final
@dataclass(frozen=True)
class RecordFile:
    """The records of one file; picklable and fork-safe because it holds paths, opened when read."""

    origin: Path
    """What the user named."""
    lines: Path
    """The JSON Lines file that is read: the origin, or the cache's copy of a list."""
    offsets: Path
    stamp: tuple[int, int]
    """Size and modification time (ns) of `lines` when its offsets were made."""
    content: str
    """Hash of all records."""

    def __len__(self) -> int:
        return len(self._table)

    def read(self, index: int) -> object:
        """Returns the JSON value of a record. Raises DataError (where: file:line) if it is not JSON."""
        start, stop, _ = map(int, self._table[index])
        with self.lines.open("rb") as file:
            if _stamp(os.fstat(file.fileno())) != self.stamp:
                raise DataError("the file was changed after it was opened", str(self.lines), "Start again.")
            file.seek(start)
            text = file.read(stop - start)
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"not JSON: {error}", self.place(index), "Mend or remove the line.") from None

    def place(self, index: int) -> str:
        """Returns where the user finds a record: file:line, or file[position] of a list (from 0)."""
        number = int(self._table[index, 2])
        return f"{self.origin}:{number}" if self.lines == self.origin else f"{self.origin}[{number - 1}]"

    @cached_property
    def _table(self) -> np.ndarray:
        return np.memmap(self.offsets, np.int64, mode="r").reshape(-1, 3)

    def __reduce__(self) -> tuple[Any, ...]:
        return RecordFile, (self.origin, self.lines, self.offsets, self.stamp, self.content)


def open_records(path: Path, cache: Path) -> RecordFile:
    """Returns the records of a .json list or of a JSON Lines file (any other suffix).

    Raises DataError for a broken list and for a file without records. Lines are not parsed yet.
    """
    origin = path.absolute()  # not resolved: in the hub's cache the name is a link to a blob without suffix
    stamp = _stamp(origin.stat())
    is_list = origin.suffix == ".json"
    folder = cache / f"{origin.stem}-{digest(origin, *stamp)}"
    make_once(folder, partial(_index, origin, is_list))
    content = (folder / "content").read_text("utf-8")
    if not (folder / "offsets").stat().st_size:
        raise DataError("the file holds no record", str(path), "Check that it was downloaded completely.")
    lines = folder / "lines.jsonl" if is_list else origin
    return RecordFile(origin, lines, folder / "offsets", _stamp(lines.stat()), content)


def _index(origin: Path, is_list: bool, folder: Path) -> None:
    log.info("indexing the records of %s (once)", origin)
    lines = _listed_lines(origin, folder / "lines.jsonl") if is_list else _file_lines(origin)
    content = hashlib.blake2b(digest_size=16)
    with (folder / "offsets").open("wb") as offsets:
        for start, number, line in lines:
            content.update(line)
            offsets.write(_ROW.pack(start, start + len(line), number))
    (folder / "content").write_text(content.hexdigest(), "utf-8")


def _file_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yields byte offset, line number and text of the lines that are not blank."""
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield start, number, line
            start += len(line)


def _listed_lines(path: Path, out: Path) -> Iterator[tuple[int, int, bytes]]:
    """Writes a JSON list's items as lines and yields byte offset, position (from 1) and text of each."""
    start = 0
    with out.open("wb") as lines:
        for number, item in enumerate(_items(path), 1):
            line = json.dumps(item).encode("ascii") + b"\n"
            lines.write(line)
            yield start, number, line
            start += len(line)


def _items(path: Path) -> Iterator[object]:
    """Yields the items of a JSON list; DataError when it is none or breaks off."""
    number = 0
    with path.open(encoding="utf-8-sig") as file:
        reader = _Reader(file)
        try:
            if reader.peek() != "[":
                raise DataError(
                    "not a JSON list", str(path), "Name the file .jsonl if it holds one object a line."
                )
            reader.take("[")
            closed = reader.peek() == "]"
            while not closed:
                yield reader.value()
                number += 1
                closed = reader.take(",]") == "]"
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"the JSON list breaks off after {number:,} records: {error}",
                str(path),
                "Fetch the file again, or use one object a line in a .jsonl file.",
            ) from None


@final
class _Reader:
    """JSON values one after the other from a stream, never more of it in memory than one value needs.

    Not ijson: it keeps the path of every open bracket, so 100 kB of `[` took all memory of the machine.
    """

    def __init__(self, file: io.TextIOWrapper) -> None:
        self._file, self._text, self._place = file, "", 0

    def peek(self) -> str:
        """Returns the next character that is not blank, empty at the end."""
        while True:
            self._place = _BLANKS.match(self._text, self._place).end()
            if self._place < len(self._text) or not self._read_on():
                return self._text[self._place : self._place + 1]

    def take(self, expected: str) -> str:
        """Returns the next character and passes it. Raises ValueError if it is not among the expected."""
        found = self.peek()
        if not found or found not in expected:
            raise ValueError(f"found {found or 'the end of the file'!r} instead of one of {expected!r}")
        self._place += 1
        return found

    def value(self) -> object:
        """Returns the next value. Raises ValueError or RecursionError if there is none."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._place)
            except json.JSONDecodeError:
                if not self._read_on():
                    raise
                continue
            # A number ends where the list goes on: "0" may be the start of "0.5" whose rest is not read yet.
            if _FOLLOWS.match(self._text, end) or not self._read_on():
                self._place = end
                return value

    def _read_on(self) -> bool:
        """Reads as much again as is unread, so that a long value is scanned a constant number of times."""
        if len(self._text) - self._place > _LARGEST:
            return False
        more = self._file.read(max(_CHUNK, len(self._text) - self._place))
        self._text, self._place = self._text[self._place :] + more, 0
        return bool(more)


def _stamp(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns


__all__ = ["RecordFile", "open_records"]
