"""ModelConfig -> (model, processor): from parts (pretrained or fresh), or from a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from vlmtune.config.schema import ModelConfig, TokenizerTraining
from vlmtune.errors import CheckpointError, RecipeError
from vlmtune.models.checkpoint import check_processor, load_model, load_weights, weights_digest
from vlmtune.models.gguf import unpacked
from vlmtune.models.origin import Origin
from vlmtune.models.processor import (
    build_processor,
    pixel_statistics,
    prepare_tokenizer,
    square_images,
    statistics_of,
)
from vlmtune.models.projectors import import_projector
from vlmtune.models.questioner import TOKEN, add_token, marked_template, start_as_mean
from vlmtune.models.tokenizer import train_tokenizer
from vlmtune.models.towers import config_from, load_tower
from vlmtune.models.vision import model_projector, resolve_feature_layer, token_counter, tower_family
from vlmtune.models.vlm import VLM, VLMConfig
from vlmtune.types import IMAGE_MARK

__all__ = ["build_model", "load_model", "weights_digest"]

Texts = Callable[[], Iterable[str]]


def build_model(
    config: ModelConfig, seed: int, template: str, texts: Texts | None = None
) -> tuple[VLM, LlavaProcessor]:
    """The model in eval mode and its processor, whose chat template is the text `template`.

    Fresh weights are drawn from `seed`; the global generator is left as it was. `texts` gives the text that a
    new tokenizer is trained on. Raises RecipeError or CheckpointError.
    """
    if config.projector is not None:
        import_projector(config.projector)
    return build_from(Origin(config, seed), template, texts)


def build_from(origin: Origin, template: str, texts: Texts | None = None) -> tuple[VLM, LlavaProcessor]:
    """As `build_model`, without importing anything that the config names: it may come from a file."""
    config = origin.config
    if config.questioner == "token":
        template = marked_template(template)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(origin.seed)
        model, processor = (
            _from_parts(config, template, texts) if config.checkpoint is None else _from_checkpoint(config)
        )
    processor.chat_template = processor.tokenizer.chat_template = template
    model.generation_config = _generation_config(processor.tokenizer, template)
    model.origin = origin
    return model, processor


def _from_checkpoint(config: ModelConfig) -> tuple[VLM, LlavaProcessor]:
    assert config.checkpoint is not None
    dtype = getattr(torch, config.dtype)
    model, processor = load_model(
        config.checkpoint, dtype, config.revision, config.trust_remote_code, merged=True
    )
    if config.image_fit is not None:
        statistics = statistics_of(processor.image_processor)
        side = model.config.vision_config.image_size
        processor.image_processor = square_images(config.image_fit, side, statistics)
    if config.questioner == "token":
        _mark_questioner(model, processor.tokenizer, fresh=add_token(processor.tokenizer))
    return model, processor


def _from_parts(config: ModelConfig, template: str, texts: Texts | None) -> tuple[VLM, LlavaProcessor]:
    assert config.vision and config.projector and config.language  # ModelConfig has seen to it
    if config.language.path is not None:
        unpacked_path = {"path": unpacked(config.language.path)}
        config = config.model_copy(update={"language": config.language.model_copy(update=unpacked_path)})
    dtype = getattr(torch, config.dtype)
    tokenizer = _tokenizer(config, template, texts)
    if config.questioner == "token":
        add_token(tokenizer)
    tower = load_tower(config.vision, dtype, config.trust_remote_code)
    feature_layer = resolve_feature_layer(tower.config, config.vision.feature_layer)
    language = _language(config, tokenizer, dtype)

    vlm_config = VLMConfig(
        vision_config=copy.deepcopy(tower.config),  # the new owner resets their attention
        text_config=copy.deepcopy(language.config),
        projector=config.projector.model_dump(mode="json"),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_MARK),
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy=tower_family(tower.config).select,
    )
    vlm_config.image_seq_length = token_counter(vlm_config).tokens
    model = assemble(vlm_config, tower, language, dtype)
    if config.language.path is not None:
        _check_same_logits(language, model, config.language.path)
        grow_embeddings(model, len(tokenizer))
    if config.questioner == "token":
        _mark_questioner(model, tokenizer, fresh=True)
    statistics = pixel_statistics(config.vision)
    images = square_images(config.image_fit or "pad", tower.config.image_size, statistics)
    processor = build_processor(model.config, tokenizer, images, template)
    check_processor(model, processor, "model")
    return model.eval(), processor


def _mark_questioner(model: VLM, tokenizer: PreTrainedTokenizerBase, fresh: bool) -> None:
    """Gives the questioner's token its row, a `fresh` one as the mean of the others, and notes it in the config."""
    grow_embeddings(model, len(tokenizer))
    token = tokenizer.convert_tokens_to_ids(TOKEN)
    if fresh:
        start_as_mean(model, token)
    model.config.questioner_token_id = token


def assemble(config: VLMConfig, tower: PreTrainedModel, language: PreTrainedModel, dtype: torch.dtype) -> VLM:
    """The parts themselves, not copies, in a VLM that was made without weights."""
    with torch.device("meta"):
        model = VLM(config)
    model.model.vision_tower = tower
    model.model.language_model = language.base_model
    model.lm_head = language.get_output_embeddings()
    model.model.multi_modal_projector = model_projector(config).to(dtype)
    # A part and the whole share one config, as in transformers: what is set on one is read by the other.
    model.config.vision_config, model.config.text_config = tower.config, language.config
    model.config.dtype = dtype
    model.tie_weights()
    return model


# ---------------------------------------------------------------- language model and tokenizer


def _tokenizer(config: ModelConfig, template: str, texts: Texts | None) -> PreTrainedTokenizerBase:
    language = config.language
    assert language is not None
    if isinstance(language.tokenizer, TokenizerTraining):
        if language.path is not None or texts is None:
            raise RecipeError(
                "a tokenizer can only be trained for a language model from scratch, on the text of a mix",
                where="model.language.tokenizer",
                remedy="Leave it out to take the pretrained model's own.",
            )
        return train_tokenizer(texts(), language.tokenizer.vocab_size, template)
    source = language.tokenizer or language.path
    revision = config.revision if source == language.path else None
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"no tokenizer in {source}: {error}",
            where="model.language.tokenizer",
            remedy="Name a folder or hub id that has one.",
        ) from error
    return prepare_tokenizer(tokenizer, template)


def _language(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> PreTrainedModel:
    """A pretrained language model as it is, or a fresh one with the tokenizer's own size and ids."""
    language = config.language
    assert language is not None
    if language.path is not None:
        return load_weights(
            AutoModelForCausalLM,
            language.path,
            "model.language.path",
            dtype,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
        )
    sizes = config_from(language.config or {}, "model.language.config")
    sizes.vocab_size = len(tokenizer)
    sizes.bos_token_id = tokenizer.bos_token_id
    sizes.eos_token_id = tokenizer.eos_token_id
    sizes.pad_token_id = tokenizer.pad_token_id
    return AutoModelForCausalLM.from_config(sizes).to(dtype)


@torch.no_grad()
def _check_same_logits(language: PreTrainedModel, model: VLM, path: str) -> None:
    """Raises CheckpointError when Llava's plain lm_head is not what the language model does with its states.

    Soft caps, logit scales and head biases live in a model's own forward, which Llava never calls.
    """
    ids = torch.arange(8)[None]
    expected, found = (part(input_ids=ids, use_cache=False).logits for part in (language, model))
    if model.lm_head.bias is not None or not torch.allclose(expected, found, rtol=1e-3, atol=1e-3):
        raise CheckpointError(
            f"{type(language).__name__} computes its logits in a way that Llava does not",
            where=path,
            remedy="Choose one whose logits are lm_head(states), such as Llama, Qwen or Mistral.",
        )


@torch.no_grad()
def grow_embeddings(model: VLM, tokens: int) -> None:
    """Makes room for new tokens; their rows are the mean of the old ones, so that no new token is likely.

    A multiple of 64 rows keeps matrix products fast (NVIDIA's guide to mixed precision). Never shrinks.
    """
    old = model.get_input_embeddings().num_embeddings
    if tokens <= old:
        return
    model.resize_token_embeddings(tokens, pad_to_multiple_of=64, mean_resizing=False)
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        part.weight[old:] = part.weight[:old].mean(dim=0)


def _generation_config(tokenizer: PreTrainedTokenizerBase, template: str) -> GenerationConfig:
    """Greedy decoding that ends where the template ends an answer, or at the tokenizer's own end."""
    ends = {tokenizer.eos_token_id} | _answer_ends(tokenizer, template)
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted(end for end in ends if end is not None),
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )


def _answer_ends(tokenizer: PreTrainedTokenizerBase, template: str) -> set[int]:
    """The last supervised token, if two different answers share it."""
    ends = []
    for answer in ("yes", "a red circle"):
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        rendered = tokenizer.apply_chat_template(
            turns, chat_template=template, return_assistant_tokens_mask=True, return_dict=True
        )
        pairs = zip(rendered["input_ids"], rendered["assistant_masks"], strict=True)
        ends.append([token for token, learned in pairs if learned][-1:])
    return set(ends[0]) & set(ends[1])
