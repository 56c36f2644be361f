"""Packed rows equal separate ones, on every implementation; padding and generation are untouched."""

from __future__ import annotations

import time

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.tiny import tiny_model
from vlmtune.errors import RecipeError
from vlmtune.models.attention import NAMES, obstacle, use_attention
from vlmtune.models.vlm import VLM, VLMConfig

LENGTHS = (40, 7, 51, 1, 19)
IMAGES = (2, 0, 2, 0, 1)
IMPLEMENTATIONS = ("sdpa", "eager")


def make_rows(model: VLM) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Rows of ids, some with two images of 16 tokens, and the pixels of all."""
    draw = torch.Generator().manual_seed(0)
    rows = []
    for length, images in zip(LENGTHS, IMAGES, strict=True):
        text = torch.randint(6, model.config.text_config.vocab_size, (length,), generator=draw)
        for i in range(images):
            text[1 + 18 * i : 17 + 18 * i] = model.config.image_token_id
        rows.append(text)
    pixels = torch.randn(sum(IMAGES), 3, 32, 32, generator=draw)
    return rows, pixels


def packed_inputs(rows: list[torch.Tensor]) -> dict[str, torch.Tensor | int | None]:
    lengths = torch.tensor([len(row) for row in rows])
    return {
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
        "attention_mask": None,
        "cu_seqlens": torch.cat([torch.zeros(1), lengths.cumsum(0)]).to(torch.int32),
        "max_seqlen": int(lengths.max()),
        "use_cache": False,
    }


def separate_logits(model: VLM, rows: list[torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """Each row alone through the stock path, one after the other: [1 t v]."""
    per_row = pixels.split(IMAGES)
    logits = [
        model(input_ids=row[None], pixel_values=images if len(images) else None, use_cache=False).logits
        for row, images in zip(rows, per_row, strict=True)
    ]
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("language", ["llama", "qwen2"])
@pytest.mark.parametrize("choice", IMPLEMENTATIONS)
def test_packed_logits_and_gradients_equal_separate_ones(choice: str, language: str) -> None:
    reference, _ = tiny_model(language=language)
    packed, _ = tiny_model(language=language)
    use_attention(packed, choice)
    rows, pixels = make_rows(reference)
    expected = separate_logits(reference, rows, pixels)
    found = packed(**packed_inputs(rows), pixel_values=pixels).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)

    weights = torch.linspace(-1, 1, expected.numel()).view_as(expected)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    for (name, a), (_, b) in zip(reference.named_parameters(), packed.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            assert (a.grad - b.grad).norm() <= 1e-5 * (a.grad.norm() + 1), name


@pytest.mark.parametrize("choice", IMPLEMENTATIONS)
@pytest.mark.parametrize("leak", [{"attention_mask": "ones"}, {"use_cache": True}])
def test_no_leak_where_stock_packing_leaks(choice: str, leak: dict[str, object]) -> None:
    """A mask of ones, or the cache that is on by default, silently turns stock packing off."""
    stock, _ = tiny_model()
    ours, _ = tiny_model()
    use_attention(ours, choice)
    rows, pixels = make_rows(stock)
    expected = separate_logits(stock, rows, pixels)
    inputs = packed_inputs(rows) | {"pixel_values": pixels} | leak
    if inputs["attention_mask"] is not None:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    torch.testing.assert_close(ours(**inputs).logits, expected, atol=1e-5, rtol=0)

    assert (stock(**inputs).logits - expected).abs().max() > 1e-3, "the stock leak is gone: drop this test"


@pytest.mark.parametrize("choice", IMPLEMENTATIONS)
def test_restarting_positions_without_cu_seqlens_are_refused(choice: str) -> None:
    model, _ = tiny_model()
    use_attention(model, choice)
    rows, pixels = make_rows(model)
    inputs = packed_inputs(rows) | {"cu_seqlens": None, "max_seqlen": None}
    with pytest.raises(ValueError, match="cu_seqlens is missing"):
        model(**inputs, pixel_values=pixels)


@pytest.mark.parametrize("choice", IMPLEMENTATIONS)
def test_right_padded_rows_equal_single_ones(choice: str) -> None:
    stock, _ = tiny_model()
    model, _ = tiny_model()
    use_attention(model, choice)
    rows, pixels = make_rows(stock)
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
    mask = torch.arange(ids.shape[1])[None] < torch.tensor(LENGTHS)[:, None]
    padded = model(input_ids=ids, attention_mask=mask.long(), pixel_values=pixels, use_cache=False).logits
    torch.testing.assert_close(padded[mask][None], separate_logits(stock, rows, pixels), atol=1e-5, rtol=0)


@pytest.mark.parametrize("choice", IMPLEMENTATIONS)
def test_left_padded_generation_equals_single_generation(choice: str) -> None:
    stock, _ = tiny_model()
    model, _ = tiny_model()
    use_attention(model, choice)
    rows, pixels = make_rows(stock)
    width = max(LENGTHS)
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    mask = torch.arange(width)[None] >= width - torch.tensor(LENGTHS)[:, None]
    limits = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    together = model.generate(input_ids=ids, attention_mask=mask.long(), pixel_values=pixels, **limits)
    for row, images, found in zip(rows, pixels.split(IMAGES), together, strict=True):
        inputs = {"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]}
        if len(images):
            inputs["pixel_values"] = images
        alone = stock.generate(**inputs, **limits)
        assert found[width:].tolist() == alone[0, len(row) :].tolist()


@pytest.mark.parametrize("choice", IMPLEMENTATIONS)
def test_packed_rows_keep_the_sliding_window(choice: str) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8}
    language = MistralForCausalLM(MistralConfig(**sizes, **heads)).eval()
    rows = [torch.arange(n) % 64 for n in (30, 5, 17)]
    expected = torch.cat([language(row[None], use_cache=False).logits for row in rows], dim=1)
    language.set_attn_implementation({"sdpa": "vlmtune_packed", "eager": "vlmtune_packed_eager"}[choice])
    found = language(**packed_inputs(rows)).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_activation_checkpointing_carries_cu_seqlens() -> None:
    model, _ = tiny_model()
    use_attention(model, "sdpa")
    rows, pixels = make_rows(model)
    plain = model(**packed_inputs(rows), pixel_values=pixels).logits
    model.train().activation_checkpointing_enable({"use_reentrant": False})
    model(**packed_inputs(rows), pixel_values=pixels).logits.backward(torch.ones_like(plain))
    assert model.lm_head.weight.grad is not None


def test_attention_stays_out_of_shared_configs_and_saved_files(tmp_path) -> None:
    config = VLMConfig(**tiny_model()[0].config.to_dict())
    first, second = VLM(config), VLM(config)
    assert use_attention(first, "eager") == ("eager", "asked for")
    assert first.model.language_model.config._attn_implementation == "vlmtune_packed_eager"
    assert first.model.vision_tower.config._attn_implementation == "sdpa"
    assert second.model.language_model.config._attn_implementation == "sdpa"
    assert config.text_config._attn_implementation != "vlmtune_packed_eager"
    first.save_pretrained(tmp_path)
    assert "vlmtune_packed" not in (tmp_path / "config.json").read_text()
    again = VLM.from_pretrained(tmp_path)
    assert again.model.language_model.config._attn_implementation == "sdpa"
    use_attention(again, "sdpa")
    assert again.model.language_model.config._attn_implementation == "vlmtune_packed"
    assert again.model.vision_tower.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("choice", IMPLEMENTATIONS)
def test_packed_rows_under_autocast(choice: str) -> None:
    """Rotary embeddings leave queries and keys in float32 while values are bfloat16."""
    model, _ = tiny_model()
    rows, pixels = make_rows(model)
    expected = separate_logits(model, rows, pixels)
    use_attention(model, choice)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(**packed_inputs(rows), pixel_values=pixels).logits
    assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_each_attention_that_cannot_train_here_says_why() -> None:
    model, _ = tiny_model()
    assert use_attention(model, "auto") == ("sdpa", "no CUDA device")
    reasons = {
        "flash_attention_2": r"no CUDA device.*vlmtune\[flash\]",
        "flash_attention_3": "no CUDA device.*hopper",
        "flex_attention": "no CUDA device; it has no backward pass on a CPU",
    }
    for choice, reason in reasons.items():
        with pytest.raises(RecipeError, match=f"model.attention: {choice} cannot run: {reason}"):
            use_attention(model, choice)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_blocks_of_samples_are_the_loop_over_samples(window: int | None) -> None:
    """FlexAttention computes forward on a CPU, so its mask is tested here."""
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, sum(LENGTHS), 16, generator=draw)
    key, value = (torch.randn(1, 2, sum(LENGTHS), 16, generator=draw) for _ in range(2))
    module = tiny_model()[0].model.language_model.layers[0].self_attn
    ends = torch.tensor([0, *LENGTHS]).cumsum(0, dtype=torch.int32)
    given = {"cu_seqlens": ends, "max_seqlen": max(LENGTHS), "scaling": 0.25, "sliding_window": window}
    with torch.no_grad():
        expected, found = (
            ALL_ATTENTION_FUNCTIONS[NAMES[name]](module, query, key, value, None, **given)[0]
            for name in ("sdpa", "flex_attention")
        )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.flash
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("choice", ["flash_attention_2", "flash_attention_3", "flex_attention"])
def test_kernels_for_packed_rows_equal_the_loop(choice: str) -> None:
    if why := obstacle(choice):
        pytest.skip(why)
    model, _ = tiny_model()
    model.to("cuda", torch.bfloat16)
    rows, pixels = make_rows(model)
    inputs = packed_inputs([row.cuda() for row in rows]) | {"pixel_values": pixels.to("cuda", torch.bfloat16)}
    inputs["cu_seqlens"] = inputs["cu_seqlens"].cuda()
    use_attention(model, "sdpa")
    expected = model(**inputs).logits
    use_attention(model, choice)
    torch.testing.assert_close(model(**inputs).logits, expected, atol=2e-2, rtol=2e-2)


def test_segments_are_faster_than_a_block_diagonal_mask() -> None:
    """Prints the two times; asserts that both agree (times are not asserted: machines are shared)."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 64}
    language = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    inputs = packed_inputs([torch.arange(256) % 64 for _ in range(16)])

    def run(implementation: str) -> tuple[torch.Tensor, float]:
        language.set_attn_implementation(implementation)
        begun = time.perf_counter()
        logits = language(**inputs).logits
        logits.sum().backward()
        return logits, time.perf_counter() - begun

    (stock, stock_seconds), (ours, our_seconds) = run("sdpa"), run("vlmtune_packed")
    print(f"16 x 256: block-diagonal mask {stock_seconds:.3f} s, per segment {our_seconds:.3f} s")
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=0)
