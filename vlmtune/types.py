"""The nouns that travel between floors.

Shape letters: b rows, t tokens, n images, s packed samples (segments), p pairs, v views.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

Role = Literal["system", "user", "assistant", "questioner"]

IMAGE_MARK = "<image>"
"""Stands in a turn's text where an image goes; as many marks as images in every sample."""

IGNORE = -100
"""The label of a token that is not learned."""


@dataclass(frozen=True, slots=True)
class ImageRef:
    """Where an image is: a file `name` under `root`, or its encoded bytes in `data`.

    A name that leaves the root (absolute, `..`, a link outwards) is refused when the image is opened.
    """

    name: str
    root: Path | None = None
    data: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Turn:
    """One message. `supervised` None means: yes for assistant and questioner, no for the others."""

    role: Role
    text: str
    supervised: bool | None = None

    @property
    def is_supervised(self) -> bool:
        if self.supervised is None:
            return self.role in ("assistant", "questioner")
        return self.supervised


@dataclass(frozen=True, slots=True)
class ChatSample:
    """A conversation about zero or more images.

    `key` is `source#index`. `kind` groups samples in scores (a question kind); `references` are the accepted
    answers to the last assistant turn (empty: that turn's own text).
    """

    key: str
    images: tuple[ImageRef, ...]
    turns: tuple[Turn, ...]
    kind: str = ""
    references: tuple[str, ...] = ()

    @property
    def image_marks(self) -> int:
        return sum(turn.text.count(IMAGE_MARK) for turn in self.turns)


class Size(NamedTuple):
    """An image's size in pixels."""

    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Encoded:
    """A rendered sample: ids with every image expanded to its tokens, unshifted labels, pixels per image."""

    key: str
    input_ids: Int[Tensor, " t"]
    labels: Int[Tensor, " t"]
    pixel_values: Float[Tensor, "n 3 h w"] | None
    bad: str = ""
    """Why the sample could not be used: it is a zero-weight slot, without supervised token or image."""
    seed: int = 0
    """Of what an objective draws for this sample this time; 0 when it is taken as stored (held out)."""


@dataclass(frozen=True, slots=True)
class ChatBatch:
    """One micro-batch of conversations on one rank.

    Packed rows have b = 1, `attention_mask` None, positions that restart, and `cu_seqlens` (s + 1 cumulative
    lengths starting at 0). Padded rows are right-padded and have `cu_seqlens` None.
    """

    input_ids: Int[Tensor, "b t"]
    labels: Int[Tensor, "b t"]
    position_ids: Int[Tensor, "b t"]
    attention_mask: Int[Tensor, "b t"] | None
    cu_seqlens: Int[Tensor, " s1"] | None
    pixel_values: Float[Tensor, "n 3 h w"] | None
    keys: tuple[str, ...]
    bad: tuple[tuple[str, str], ...] = ()
    """Key and reason of each zero-weight slot among `keys`."""
    seeds: tuple[int, ...] = ()
    """Beside `keys`: an objective's own draws depend on these, never on who shares the micro-batch."""

    @property
    def images(self) -> int:
        """Pictures of all samples together."""
        return 0 if self.pixel_values is None else len(self.pixel_values)


class LossOutput(NamedTuple):
    """A micro-batch's *share* of the global loss, and the detached shares of its terms by name.

    A tuple: the hooks of DeepSpeed and FSDP look for tensors in tuples and dicts, not in classes of ours.
    """

    loss: Float[Tensor, ""]
    terms: dict[str, Float[Tensor, ""]]
