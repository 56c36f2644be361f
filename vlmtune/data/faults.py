"""Bad samples: found before a run (`check_mix`), counted in one (`Quarantine`), never swapped."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import final

from vlmtune.config.mix import Mix
from vlmtune.data.images import check_image
from vlmtune.data.sources import Source, open_source
from vlmtune.errors import DataError, Fault
from vlmtune.types import ImageRef

_SHOWN = 5
"""Reasons quoted when the budget is spent; the file has all."""


def check_mix(mix: Mix, base: Path, cache: Path, most: int = 50) -> list[Fault]:
    """Returns up to `most` faults of a mix, each with its sample key (or source) and reason.

    Walks every sample, image headers and ends included; decodes pixels only of files whose end looks wrong.
    """
    return list(islice(_faults(mix, base, cache), most))


def _faults(mix: Mix, base: Path, cache: Path) -> Iterator[Fault]:
    seen = lru_cache(maxsize=1 << 16)(_image_faults)
    for config in mix.sources:
        try:
            source = open_source(config, base, cache)
        except DataError as error:
            yield from error.faults
        else:
            for index in range(len(source)):
                yield from _sample_faults(source, index, seen)


def _sample_faults(
    source: Source, index: int, image_faults: Callable[[ImageRef], tuple[Fault, ...]]
) -> list[Fault]:
    try:
        sample = source[index]
    except DataError as error:
        return list(error.faults)
    return [
        Fault(f"image {fault.where}: {fault.what}", sample.key, fault.remedy)
        for ref in sample.images
        for fault in image_faults(ref)
    ]


def _image_faults(ref: ImageRef) -> tuple[Fault, ...]:
    try:
        check_image(ref)
    except DataError as error:
        return error.faults
    return ()


@final
class Quarantine:
    """The list of bad samples of a run: a JSON line {"key", "reason"} for each, once, also after a resume.

    `total` is the number of samples in the mix; more than `budget` x `total` bad ones stop the run. Every rank
    counts all of them, and one rank `writes`.
    """

    def __init__(self, path: Path, total: int, budget: float, writes: bool = True) -> None:
        self._path, self._total, self._budget, self._writes = path, total, budget, writes
        self._reasons = _read(path)

    def __len__(self) -> int:
        return len(self._reasons)

    def add(self, key: str, reason: str) -> None:
        """Notes a bad sample. Raises DataError when there are more than the budget allows."""
        if key not in self._reasons:
            self._reasons[key] = reason
            if self._writes:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                _append(self._path, json.dumps({"key": key, "reason": reason}))
        if len(self._reasons) > self._budget * self._total + 1e-9:
            raise self._spent()

    def _spent(self) -> DataError:
        first = "".join(f"\n  {key}: {reason}" for key, reason in islice(self._reasons.items(), _SHOWN))
        return DataError(
            f"{len(self)} of {self._total:,} samples are bad, more than the budget of {self._budget:.2%}; "
            f"the first:{first}\n",
            str(self._path),
            "Run `vlmtune check` on the recipe for a full list; mend or remove the samples, "
            "or raise data.<stream>.bad_samples.budget.",
        )


def _append(path: Path, line: str) -> None:
    with path.open("ab+") as file:
        file.seek(max(0, file.tell() - 1))
        cut_off = file.read(1) not in (b"", b"\n")  # by a kill: the new line must not be joined to it
        file.write(("\n" * cut_off + line + "\n").encode("ascii"))


def _read(path: Path) -> dict[str, str]:
    """Returns the reasons by key of an earlier run; a line cut off by a kill is passed over."""
    reasons: dict[str, str] = {}
    if not path.is_file():
        return reasons
    for line in path.read_text("utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        reasons[entry["key"]] = entry["reason"]
    return reasons


__all__ = ["Quarantine", "check_mix"]
