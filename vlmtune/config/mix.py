"""The form of data_mixes/*.yaml: sources, and how much of each."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from vlmtune.config.section import Section


class _Source(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Prefix of the sample keys: name#index."""
    weight: float | None = Field(default=None, gt=0)
    """How often each sample is seen in an epoch, on average (1.0: once); give this or count."""
    count: int | None = Field(default=None, ge=1)
    """Samples drawn per epoch; give this or weight. Neither: every sample once."""

    @model_validator(mode="after")
    def _one_amount(self) -> _Source:
        if self.weight is not None and self.count is not None:
            raise ValueError("give weight or count, not both")
        return self


class LlavaJsonSource(_Source):
    """The LLaVA-665K file: a JSON list of {id, image | images, conversations: [{from, value}]}."""

    format: Literal["llava_json"]
    path: str
    images: str | None = None
    """Root folder of the image names; None is the file's own folder. Names cannot leave it."""


class ChatJsonlSource(_Source):
    """One JSON object a line, OpenAI style: {"messages": [{role, content}]} with image_url or image parts."""

    format: Literal["chat_jsonl"]
    path: str
    images: str | None = None
    """Root folder of the image names; None is the file's own folder. Names cannot leave it."""


Column = Literal["images", "messages", "question", "answer", "answers", "kind"]


class HfDatasetSource(_Source):
    """A datasets.Dataset: local folder (save_to_disk or data files) or hub id."""

    format: Literal["hf_dataset"]
    path: str
    split: str = "train"
    subset: str | None = None
    """Configuration name of the dataset."""
    columns: dict[Column, str] = Field(default_factory=lambda: {"images": "images", "messages": "messages"})
    """Which column holds what: images with messages, or images with question and answer."""
    streaming: bool = False
    """Read the first `take` rows over the network once into the cache, instead of downloading the whole split."""
    take: int | None = Field(default=None, ge=1)
    """Rows to use, from the start; needed with streaming."""

    @model_validator(mode="after")
    def _streams_with_end(self) -> HfDatasetSource:
        if self.streaming and self.take is None:
            raise ValueError("streaming needs take: an order that can be resumed has an end")
        return self


class EasyVqaSource(_Source):
    """The easy-VQA package (pip install easy-vqa): 64 x 64 pictures of one coloured shape."""

    format: Literal["easy_vqa"]
    split: Literal["train", "test"] = "train"
    task: Literal["question", "conversation", "caption"] = "question"
    """question: one sample a question; conversation: the questions of one image; caption: what the answers tell."""
    turns: int | None = Field(default=None, ge=1)
    """Largest number of questions in one conversation; None: all of an image's."""
    complete: bool = False
    """True leaves out the captions of images whose answers do not prove both colour and shape."""


def _format_tag(value: Any) -> str:
    if isinstance(value, dict):
        return str(value.get("format", ""))
    return str(vars(value).get("format", "")) if isinstance(value, Section) else ""


MixSource = Annotated[
    Annotated[LlavaJsonSource, Tag("llava_json")]
    | Annotated[ChatJsonlSource, Tag("chat_jsonl")]
    | Annotated[HfDatasetSource, Tag("hf_dataset")]
    | Annotated[EasyVqaSource, Tag("easy_vqa")],
    Discriminator(_format_tag),
]


class Mix(Section):
    """A weighted set of sources."""

    description: str = ""
    sources: tuple[MixSource, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> Mix:
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError("two sources have the same name; sample keys would clash")
        return self
