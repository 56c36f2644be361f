"""What `vlmtune inspect` shows: samples as the model sees them, and how an epoch packs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlmtune.config.schema import Recipe
from vlmtune.types import IGNORE

if TYPE_CHECKING:
    from vlmtune.data.loader import ChatData


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


def show_samples(recipes: Sequence[Recipe], count: int, key: str | None, lengths: bool) -> None:
    """Prints `count` samples (or the one with `key`) of each stage."""
    from vlmtune.run import build_inputs

    console = Console()
    for recipe in recipes:
        data, processor = build_inputs(recipe, recipes)
        console.rule(f"{recipe.name} {recipe.stage}")
        console.print(data.summary())
        tokenizer = processor.tokenizer
        wanted = [data.find(key)] if key else data.order.epoch(0)[:count].tolist()
        for source, row in wanted:
            encoded = data.encode(source, row, np.random.default_rng(0))
            console.print(Text(encoded.key, style="bold"))
            if encoded.bad:
                console.print(Text(encoded.bad, style="red"))
                continue
            pieces = [tokenizer.decode([token]) for token in encoded.input_ids.tolist()]
            console.print(token_strip(pieces, encoded.labels.tolist(), processor.image_token))
        if lengths:
            console.print(_lengths_table(data))


def _lengths_table(data: ChatData) -> Table:
    """The token lengths of all sources, bad samples counted apart."""
    lengths = np.concatenate([index.lengths for index in data.indices])
    table = Table("samples", "tokens", "shortest", "median", "longest", "bad")
    good = lengths[lengths > 0]
    table.add_row(
        f"{len(lengths):,}",
        f"{good.sum():,}",
        str(good.min()) if len(good) else "-",
        str(int(np.median(good))) if len(good) else "-",
        str(good.max()) if len(good) else "-",
        str(int((lengths == 0).sum())),
    )
    return table
