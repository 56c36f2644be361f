"""What `vlmtune inspect` shows: samples as the model sees them, and how an epoch packs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlmtune.config.loader import load_mix
from vlmtune.config.schema import Recipe
from vlmtune.types import IGNORE


def token_strip(pieces: Sequence[str], labels: Sequence[int], image: str) -> Text:
    """The tokens of one sample in a row: learned ones green, runs of an image's tokens folded into one mark."""
    text = Text()
    marked = [(piece, label != IGNORE) for piece, label in zip(pieces, labels, strict=True)]
    for (piece, learned), run in groupby(marked):
        count = len(list(run))
        if piece == image:
            text.append(f"[image: {count} tokens]", style="magenta")
        else:
            text.append(piece * count, style="bold black on green" if learned else "dim")
    return text


def show_samples(recipes: Sequence[Recipe], count: int, key: str | None, plan: bool) -> None:
    """Prints `count` samples (or the one with `key`) of each stage."""
    from vlmtune.run import CACHE, build_data

    console = Console()
    for recipe in recipes:
        data, processor = build_data(recipe, recipes, CACHE)
        console.rule(f"{recipe.name} {recipe.stage}: {Path(recipe.data.chat.mix).name}")
        console.print(data.summary())
        tokenizer = processor.tokenizer
        wanted: Iterable[tuple[int, int]] = [data.find(key)] if key else data.order.epoch(0)[:count].tolist()
        for source, row in wanted:
            encoded = data.encode(source, row, np.random.default_rng(0))
            console.print(Text(encoded.key, style="bold"))
            if encoded.bad:
                console.print(f"  bad: {encoded.bad}", style="red", markup=False)
                continue
            pieces = [tokenizer.decode([token]) for token in encoded.input_ids.tolist()]
            console.print(token_strip(pieces, encoded.labels.tolist(), processor.image_token))
        if plan:
            console.print(_plan_table(data))


def mix_names(recipe: Recipe) -> list[str]:
    """The names of the sources of a recipe's mix."""
    return [source.name for source in load_mix(Path(recipe.data.chat.mix)).sources]


def _plan_table(data) -> Table:  # type: ignore[no-untyped-def]
    lengths = np.concatenate([index.lengths for index in data.indices])
    table = Table("samples", "tokens", "shortest", "median", "longest", "bad")
    good = lengths[lengths > 0]
    table.add_row(
        f"{len(lengths):,}",
        f"{good.sum():,}",
        str(good.min(initial=0)),
        str(int(np.median(good))) if len(good) else "-",
        str(good.max(initial=0)),
        str(int((lengths == 0).sum())),
    )
    return table
