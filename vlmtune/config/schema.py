"""The whole recipe as frozen pydantic models: one docstring a field, with unit and the default's reason.

No torch here. What is trained is in `tuning.py`, the options of projectors, transforms and objectives in
`plugins.py`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from vlmtune.config.plugins import NextTokenConfig, ObjectiveConfig, ProjectorConfig, TransformConfig
from vlmtune.config.section import Section
from vlmtune.config.tuning import TuningConfig

# ---------------------------------------------------------------- model


class VisionConfig(Section):
    """The vision tower: a pretrained one (`path`) or one made from a config with fresh weights (`config`)."""

    path: str | None = None
    """Folder or hub id of a CLIP, SigLIP, SigLIP2 or DINOv2 model."""
    config: dict[str, Any] | None = None
    """`model_type` and sizes of a tower to make from scratch, as in transformers' config.json."""
    pixel_std: float = Field(default=0.5, gt=0)
    """With config: what pixels (0 to 1, less a mean of 0.5) are divided by; a pretrained tower brings its own."""
    feature_layer: int | None = None
    """Hidden state handed to the projector; None takes the tower family's default (CLIP: -2, LLaVA-1.5)."""
    image_size: int | None = Field(default=None, ge=1)
    """Side of the square in pixels; None takes the tower's own. Another needs SigLIP2 (NaFlex), made for it."""

    @model_validator(mode="after")
    def _one_source(self) -> VisionConfig:
        if (self.path is None) == (self.config is None):
            raise ValueError("give exactly one of path (pretrained) and config (from scratch)")
        return self


class TokenizerTraining(Section):
    """A byte-level BPE tokenizer trained on the mix's own text (for models from scratch)."""

    vocab_size: int = Field(default=4096, ge=300)
    """Upper bound of the vocabulary, in tokens."""


class LanguageConfig(Section):
    """The causal language model: pretrained (`path`) or from a config with fresh weights (`config`)."""

    path: str | None = None
    """Folder or hub id that AutoModelForCausalLM loads."""
    config: dict[str, Any] | None = None
    """`model_type` and sizes of a decoder to make from scratch."""
    tokenizer: str | TokenizerTraining | None = None
    """Folder or hub id, or the training of a new one; None takes the language model's own."""

    @model_validator(mode="after")
    def _one_source(self) -> LanguageConfig:
        if (self.path is None) == (self.config is None):
            raise ValueError("give exactly one of path (pretrained) and config (from scratch)")
        if self.config is not None and self.tokenizer is None:
            raise ValueError("a language model from scratch needs tokenizer: a path, or {vocab_size: ...}")
        return self


class ModelConfig(Section):
    """Either a whole `checkpoint`, or the three parts `vision`, `projector`, `language`."""

    checkpoint: str | None = None
    """Folder or hub id of a LLaVA-style model (ours or llava-hf/*); stages after the first set it themselves."""
    vision: VisionConfig | None = None
    projector: ProjectorConfig | None = None
    language: LanguageConfig | None = None
    image_fit: Literal["pad", "crop", "stretch"] | None = None
    """How an image becomes square: pad with the mean colour (LLaVA-1.5), centre crop, or stretch. None keeps a
    checkpoint's way, and pads for a model made of parts."""
    template: str = "vicuna_v1"
    """Chat template: a file name in vlmtune/data/chat_templates without .jinja, or a path to a .jinja file."""
    questioner: Literal["text", "token"] = "text"
    """What begins a questioner's turn (SQ-LLaVA): the template's words `VUSER:`, or a new token `[vusr]` whose row
    starts as the mean of all and is trained even where the language model is frozen or has adapters."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights in memory; with run.precision bf16 the safe choice for trained parts is float32."""
    attention: Literal[
        "auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"
    ] = "auto"
    """Attention of the language model; auto: FlashAttention where it is installed and runs, else SDPA."""
    trust_remote_code: bool = False
    """Run code that ships with a checkpoint. Off unless you wrote or read that code."""
    revision: str | None = None
    """Hub revision (commit) of `checkpoint`, or of the language model."""

    @model_validator(mode="after")
    def _whole_or_parts(self) -> ModelConfig:
        parts = (self.vision, self.projector, self.language)
        if self.checkpoint is None and None in parts:
            raise ValueError("give checkpoint, or all of vision, projector and language")
        return self


# ---------------------------------------------------------------- data


class AugmentConfig(Section):
    """Random changes of an image while training, drawn from the sample's own generator; none by default."""

    shift: int = Field(default=0, ge=0)
    """Largest shift in pixels, both ways, on both axes; the edge is repeated."""
    flip_horizontal: bool = False
    """Mirror left and right with probability one half. Never where text or sides matter."""
    flip_vertical: bool = False
    """Mirror top and bottom with probability one half."""


class BadSamplesConfig(Section):
    """What to do with samples that cannot be read."""

    budget: float = Field(default=0.01, ge=0, le=1)
    """Largest share of the mix that may be bad before the run stops. Each is a zero-weight slot meanwhile."""


class ChatStreamConfig(Section):
    """Conversations with images: the stream of `next_token`."""

    mix: str
    """Path of a data_mixes/*.yaml file, relative to the recipe or to the working directory."""
    batch_size: int = Field(ge=1)
    """Samples per optimizer step over all ranks and micro-batches (the paper's global batch size)."""
    micro_tokens: int = Field(default=4096, ge=1)
    """Token budget of one micro-batch on one rank: lower it when memory runs out, results do not change."""
    packing: Literal["isolated", "none"] = "isolated"
    """isolated: samples share a row, none sees another. none: rows of like length, padded."""
    max_length: int = Field(default=2048, ge=8)
    """Longest sample in tokens, image tokens included."""
    overlong: Literal["drop", "shorten", "error"] = "shorten"
    """A longer sample is left out, or loses its last question-answer pairs, or stops the run. An image is never cut."""
    transforms: tuple[TransformConfig, ...] = ()
    """Sample -> Sample functions, in order, redrawn each epoch."""
    augment: AugmentConfig = AugmentConfig()
    bad_samples: BadSamplesConfig = BadSamplesConfig()
    workers: int = Field(default=2, ge=0)
    """Loader processes on each rank; 0 loads in the training process. Results do not depend on it."""

    @model_validator(mode="after")
    def _fits(self) -> ChatStreamConfig:
        if self.max_length > self.micro_tokens:
            raise ValueError(
                f"max_length {self.max_length} exceeds micro_tokens {self.micro_tokens}: a sample must fit"
            )
        return self


class DataConfig(Section):
    """The streams an objective reads, by name."""

    chat: ChatStreamConfig | None = None


# ---------------------------------------------------------------- objective, optimisation


class OptimConfig(Section):
    """AdamW."""

    type: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit: bitsandbytes keeps the moments in 8 bits, 2 bytes a weight instead of 8. Runs on a CPU and on
    GPUs, in one process or under DDP; not where the optimizer itself is sharded."""
    lr: float = Field(gt=0)
    """Peak learning rate of the parts that name none."""
    objective_lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of what only training needs (a denoiser); None takes lr."""
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this global norm; 0 leaves them."""


class ScheduleConfig(Section):
    """How long, and how the learning rate moves."""

    type: Literal["cosine", "linear", "constant"] = "cosine"
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the mix; give this or steps."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; give this or epochs."""
    warmup: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps in which the rate rises linearly from 0 (LLaVA-1.5: 0.03)."""
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """Where cosine and linear end, as a share of the peak."""

    @model_validator(mode="after")
    def _one_length(self) -> ScheduleConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of epochs and steps")
        return self


# ---------------------------------------------------------------- run, evaluation, export


class RunConfig(Section):
    """Where a run writes and how it computes."""

    dir: str | None = None
    """Output folder; None is runs/<name>."""
    seed: int = Field(default=0, ge=0)
    """Of the fresh weights, the order of samples, and every draw of transforms and augmentation."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16: autocast to bfloat16, sums and optimizer in the weights' own type."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory for about a third more time."""
    liger: bool | None = None
    """Liger's fused kernels of norms, rotary positions, SwiGLU and the loss. None: where Triton runs; true: or stop."""
    compile: bool = False
    """torch.compile for each block of the language model: minutes at the start, quicker steps on a GPU."""
    save_every: int = Field(default=500, ge=1)
    """Optimizer steps between checkpoints; the last step is always saved."""
    keep: int = Field(default=2, ge=1)
    """Checkpoints kept; older ones are removed after a newer one is complete."""
    log_every: int = Field(default=10, ge=1)
    """Optimizer steps between lines of metrics.jsonl."""
    log_samples: bool = False
    """Also write samples.jsonl: the keys of the samples of every step."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Beside metrics.jsonl, which is always written. Each needs its own package (extra: track)."""
    rehearse: bool | None = None
    """Run the heaviest micro-batches once, at weight zero, before the first step: a lack of memory shows at once and
    not hours later. None: on a GPU."""
    probe: bool = True
    """Before step 1, one backward pass proves that every trainable weight gets a gradient."""


class HeldOutConfig(Section):
    """Samples of the training mix that are never trained on, to watch the loss by dataset."""

    fraction: float = Field(default=0.01, ge=0, lt=0.5)
    """Share of each source; 0 turns it off."""
    most: int = Field(default=256, ge=1)
    """Largest number of samples per source."""
    every: int = Field(default=500, ge=1)
    """Optimizer steps between two measurements; the last step is always measured."""
    answers: int = Field(default=4, ge=0)
    """Greedy answers shown at each measurement."""


class EvaluationConfig(Section):
    """Held-out loss while training, and the score of the export afterwards."""

    held_out: HeldOutConfig = HeldOutConfig()
    mix: str | None = None
    """Mix answered by generation from the exported folder when training ends; None skips it."""
    batch_size: int = Field(default=64, ge=1)
    """Prompts generated together."""
    max_new_tokens: int = Field(default=64, ge=1)


class ExportConfig(Section):
    """The Hugging Face folder written at the end."""

    enabled: bool = True
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the exported weights; None keeps the training type."""


class Recipe(Section):
    """One stage, ready to run. The loader makes one per entry of `stages` (or a single one)."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Names the run: runs/<name>."""
    paper: str | None = None
    """Source of the settings (arXiv id or reference)."""
    reason: str | None = None
    """Why the settings are as they are, where no paper says it."""
    stage: str = Field(default="train", pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")
    """Set by the loader from the key under `stages`."""
    model: ModelConfig
    tuning: TuningConfig = TuningConfig()
    data: DataConfig
    objective: ObjectiveConfig = NextTokenConfig()
    optim: OptimConfig
    schedule: ScheduleConfig
    run: RunConfig = RunConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    export: ExportConfig = ExportConfig()

    @property
    def output(self) -> str:
        """The folder that a run of it writes."""
        return self.run.dir or f"runs/{self.name}"
