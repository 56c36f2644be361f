"""The recipe of a small VAE: what `vlmtune vae` reads. It trains no language model, so it is a kind of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, model_validator

from vlmtune.config.drafts import parse_override, read_draft
from vlmtune.config.faults import validate
from vlmtune.config.locate import like, locate, shown_path
from vlmtune.config.section import Section
from vlmtune.errors import Fault, RecipeError

_GROUPS = 8
"""Of diffusers' group norms here; divides every width."""


class VaeRecipe(Section):
    """A diffusers AutoencoderKL from scratch, trained on the pictures of a mix."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Names the folder: runs/<name>."""
    reason: str | None = None
    """Why the settings are as they are."""
    dir: str | None = None
    """Output folder; None is runs/<name>."""
    mix: str
    """Path of a data_mixes/*.yaml file; only its pictures are read."""
    side: int = Field(default=64, ge=8)
    """Pixels; every picture is stretched to this square."""
    widths: tuple[int, ...] = Field(default=(16, 32, 64), min_length=1)
    """Channels of each level, multiples of 8; the stride is 2 to the number of levels less one."""
    latent_channels: int = Field(default=4, ge=1)
    """A target token of Ross has four times as many numbers."""
    kl_weight: float = Field(default=1e-6, ge=0)
    """Of the divergence from a standard normal, summed like the pixels' errors (LDM, arXiv 2112.10752: 1e-6)."""
    batch_size: int = Field(default=32, ge=1)
    """Pictures per step."""
    steps: int = Field(ge=1)
    lr: float = Field(gt=0)
    """Peak learning rate of AdamW; it rises over the first 5 % of the steps and falls to 0 along a cosine."""
    seed: int = Field(default=0, ge=0)
    """Of the first weights, the order of pictures and the posterior's draws."""

    @model_validator(mode="after")
    def _sizes(self) -> VaeRecipe:
        if any(width % _GROUPS for width in self.widths):
            raise ValueError(f"widths must be multiples of {_GROUPS}")
        if self.side % 2 ** (len(self.widths) - 1):
            raise ValueError(f"side {self.side} cannot be halved {len(self.widths) - 1} times")
        return self

    @property
    def output(self) -> Path:
        """The folder that it is written to."""
        return Path(self.dir or f"runs/{self.name}")

    @property
    def groups(self) -> int:
        """Groups of the norms."""
        return _GROUPS


def load_vae_recipe(path: Path, overrides: Sequence[str] = ()) -> VaeRecipe:
    """The recipe of a file with `key=value` changes, its mix's path resolved. RecipeError with every fault."""
    faults: list[Fault] = []
    folder = path.absolute().parent
    changes = [one for text in overrides if (one := parse_override(text, folder, faults)) is not None]
    draft = read_draft(path, faults)
    tree = draft.stage(None, changes)
    recipe = validate(VaeRecipe, tree, faults, complete=draft.complete)
    if faults or recipe is None:
        raise RecipeError(dict.fromkeys(faults))
    mix = locate(recipe.mix, folder)
    if mix is None:
        raise RecipeError(f"mix: no file {recipe.mix!r}", str(path), like(recipe.mix, folder))
    return recipe.model_copy(update={"mix": shown_path(mix)})
