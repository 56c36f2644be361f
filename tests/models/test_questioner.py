"""The questioner's token: its row starts as the mean, and alone is trained where the others are frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.chat_batches import encoded_samples
from tests.models.adapted import FROZEN, save, tuning
from tests.tiny import TEXTS, template_text, tiny_config
from vlmtune.config.plugins import NextTokenConfig
from vlmtune.config.schema import ModelConfig, OptimConfig
from vlmtune.config.tuning import TuningConfig
from vlmtune.data.collate import collate
from vlmtune.data.render import Renderer
from vlmtune.errors import RecipeError
from vlmtune.models.adapters import adapt
from vlmtune.models.attention import use_attention
from vlmtune.models.build import build_model, load_model
from vlmtune.models.questioner import EMBEDDINGS, TOKEN, marked_template
from vlmtune.models.tuning import apply_tuning
from vlmtune.models.vision import ImageTokens
from vlmtune.objectives.next_token import NextToken
from vlmtune.training.optim import build_optimizer
from vlmtune.types import IGNORE, ChatSample, ImageRef, Size, Turn

LORA = {"mode": "lora", "rank": 2}


def made(tied: bool = False, template: str = "vicuna_v1_sq") -> Any:
    config = ModelConfig.model_validate(tiny_config(tied=tied).model_dump() | {"questioner": "token"})
    return build_model(config, 0, template_text(template), lambda: TEXTS)


def stepped(model: Any, processor: Any, config: TuningConfig) -> torch.Tensor:
    """The embeddings before one step of AdamW with weight decay, on a batch where the token stands twice."""
    adapt(model, config, 0)
    apply_tuning(model, config)
    use_attention(model, "sdpa")
    batch = collate(encoded_samples(model.config.image_token_id, 16, 32, count=4), "isolated")
    batch.input_ids[0, [3, -4]] = model.config.questioner_token_id
    before = model.get_input_embeddings().weight.detach().clone()
    objective = NextToken(NextTokenConfig(), model, processor)
    optimizer = build_optimizer(objective.named_parameters(), config, OptimConfig(lr=1e-2, weight_decay=0.5))
    model.train()
    for _ in range(2):
        objective(batch, objective.counts(batch)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return before


def test_the_row_is_the_mean_of_the_others():
    model, processor = made()
    token = processor.tokenizer.convert_tokens_to_ids(TOKEN)
    assert token == model.config.questioner_token_id == len(processor.tokenizer) - 1
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        torch.testing.assert_close(part.weight[token], part.weight[:token].mean(0))


@pytest.mark.parametrize("language", [LORA, FROZEN], ids=["lora", "frozen"])
def test_only_its_own_row_is_trained(language: dict[str, Any]):
    model, processor = made()
    config = tuning(language=language, projector={"mode": "full"})
    before = stepped(model, processor, config)
    moved = (model.get_input_embeddings().weight != before).any(dim=1).nonzero()[:, 0].tolist()
    assert moved == [model.config.questioner_token_id]
    heads = [weight for name, weight in model.named_parameters() if name.startswith("lm_head")]
    assert not any(weight.requires_grad for weight in heads)


def test_a_language_model_trained_in_full_trains_all_rows():
    model, processor = made()
    before = stepped(model, processor, tuning(language={"mode": "full"}))
    assert (
        (model.get_input_embeddings().weight != before).any(dim=1)[1:].all()
    )  # row 0 is padding: always zero


def test_tied_embeddings_are_refused_where_one_row_would_learn():
    model, _ = made(tied=True)
    with pytest.raises(RecipeError, match="tied embeddings"):
        apply_tuning(model, tuning(projector={"mode": "full"}))
    apply_tuning(model, tuning(language={"mode": "full"}))


def test_the_row_is_in_the_checkpoint_of_adapters(tmp_path: Path):
    model, processor = made()
    stepped(model, processor, tuning(language=LORA, projector={"mode": "full"}))
    save(model, processor, tmp_path)
    again, opened = load_model(tmp_path)
    token = again.config.questioner_token_id
    assert token == opened.tokenizer.convert_tokens_to_ids(TOKEN)
    assert torch.equal(again.state_dict()[EMBEDDINGS], model.state_dict()[EMBEDDINGS])
    assert opened.chat_template == processor.chat_template and TOKEN in opened.chat_template


def test_a_stage_before_without_the_token_gets_it(tmp_path: Path):
    """Stage 1 knows no questioner; stage 2 starts from its checkpoint."""
    first, processor = build_model(tiny_config(), 0, template_text("plain"), lambda: TEXTS)
    first.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config = ModelConfig(checkpoint=str(tmp_path), questioner="token")
    second, opened = build_model(config, 0, template_text("vicuna_v1_sq"))
    token = second.config.questioner_token_id
    rows = second.get_input_embeddings().weight
    assert token == opened.tokenizer.convert_tokens_to_ids(TOKEN)
    torch.testing.assert_close(rows[token], rows[:token].mean(0))
    old = first.get_input_embeddings().weight
    assert torch.equal(rows[: len(old)], old)


def test_turns_begin_with_the_token_and_the_same_words_are_learned():
    _, processor = made()
    _, worded = build_model(tiny_config(), 0, template_text("vicuna_v1_sq"), lambda: TEXTS)
    turns = (Turn("user", "<image>"), Turn("questioner", "What color is it?"), Turn("assistant", "red"))
    sample = ChatSample("s#0", (ImageRef("x.png"),), turns)
    learned = []
    for each in (processor, worded):
        renderer = Renderer(each.tokenizer, ImageTokens(2), each.chat_template)
        rendered = renderer.render(sample, [Size(8, 8)])
        learned.append(each.tokenizer.decode([label for label in rendered.labels if label != IGNORE]))
        prompt = renderer.question_prompt(ChatSample("s#0", sample.images, turns[:1]), [Size(8, 8)])
        assert each.tokenizer.decode(prompt).endswith(TOKEN if each is processor else "VUSER:")
    assert learned[0] == learned[1] == " What color is it?</s> red</s>"


def test_a_template_with_tokens_of_its_own_is_refused():
    with pytest.raises(RecipeError, match="does not write 'VUSER:'"):
        marked_template(template_text("chatml"))
    marked = marked_template(template_text("brief"))
    assert "VUSER:" not in marked and marked_template(marked) == marked
