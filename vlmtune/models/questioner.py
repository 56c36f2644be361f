"""The questioner's mark as a token of its own (SQ-LLaVA's paper; its code writes the words `VUSER:`).

The token's row starts as the mean of all others. Where the language model's embeddings stay frozen, that row alone
is trained: other tokens' embeddings are detached on their way in, so nothing but the row gets a gradient, whoever
shards or averages the matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from vlmtune.errors import RecipeError

TOKEN = "[vusr]"
WORDS = "VUSER:"
EMBEDDINGS = "model.language_model.embed_tokens.weight"


def marked_template(template: str) -> str:
    """The chat template with the token where it has the words; raises RecipeError when it has neither."""
    if WORDS not in template and TOKEN not in template:
        raise RecipeError(
            f"the chat template does not write {WORDS!r}",
            where="model.questioner",
            remedy="Take vicuna_v1_sq, vicuna_v1 or brief; others mark the questioner by tokens of their own.",
        )
    return template.replace(WORDS, TOKEN)


def add_token(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the token was new to the tokenizer, which has it now."""
    added = AddedToken(TOKEN, special=True, normalized=False)
    return tokenizer.add_tokens([added], special_tokens=True) > 0


@torch.no_grad()
def start_as_mean(model: PreTrainedModel, token: int) -> None:
    """Sets the rows of a token, in and out, to the mean of those before it."""
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        part.weight[token] = part.weight[:token].mean(dim=0)


def train_row(model: PreTrainedModel, token: int) -> None:
    """Makes the embedding of one token trainable; raises RecipeError where lm_head would move with it."""
    if model.config.get_text_config().tie_word_embeddings:
        raise RecipeError(
            "a row of tied embeddings cannot be trained alone: lm_head is the same matrix",
            where="model.questioner",
            remedy="Mark the questioner by text, or train the language model in full.",
        )

    def detached(
        module: nn.Module, given: tuple[Any, ...], out: Float[Tensor, "b t d"]
    ) -> Float[Tensor, "b t d"]:
        ids: Int[Tensor, "b t"] = given[0]
        return torch.where((ids == token)[..., None], out, out.detach())

    embeddings = model.get_input_embeddings()
    embeddings.weight.requires_grad_(True)
    embeddings.register_forward_hook(detached)
