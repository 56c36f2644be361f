"""The original LLaVA layout, written here from its description, to transformers and back."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from tests.tiny import TEXTS, template_text, tiny_model
from vlmtune.errors import CheckpointError
from vlmtune.export import original as original_layout
from vlmtune.export.convert import convert
from vlmtune.export.hf import export_model
from vlmtune.export.probe import probe_batch

TEMPLATE = template_text("vicuna_v1")
VISION = CLIPVisionConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=32,
    patch_size=8,
    projection_dim=16,
)
WIDTH = 48
ROWS = 64
FROM_HUB = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava",
    "freeze_mm_mlp_adapter": False,
    "hidden_act": "silu",
    "hidden_size": WIDTH,
    "image_aspect_ratio": "pad",
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_length": 4096,
    "max_position_embeddings": 512,
    "mm_hidden_size": 32,
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.31.0",
    "tune_mm_mlp_adapter": False,
    "unfreeze_mm_vision_tower": False,
    "use_cache": True,
    "use_mm_proj": True,
}
"""The keys of liuhaotian/llava-v1.5-7b/config.json, with small sizes."""


def original_tokenizer() -> PreTrainedTokenizerFast:
    """Like Llama's: no image token, padding with <unk>."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([*TEXTS, "USER: ASSISTANT: " * 3], trainer)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **names)


def original_weights(rows: int, linear: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The language model and projector, and the tower, by the original's names; drawn from a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower = CLIPVisionModel(VISION).state_dict()
        tower = {name: torch.randn_like(value) / 5 for name, value in tower.items()}
        language = LlamaForCausalLM(llama_config(rows)).state_dict()
        shapes = {"weight": (WIDTH, 32), "bias": (WIDTH,)}
        if not linear:
            second = {"2.weight": (WIDTH, WIDTH), "2.bias": (WIDTH,)}
            shapes = {f"0.{name}": shape for name, shape in shapes.items()} | second
        projector = {f"model.mm_projector.{name}": torch.randn(shape) / 6 for name, shape in shapes.items()}
        language = {name: torch.randn_like(value) / 5 for name, value in language.items()}
    prefix = "model.vision_tower.vision_tower.vision_model."
    assert "embeddings.class_embedding" in tower  # transformers 5's names
    return language | projector, {prefix + name: value for name, value in tower.items()}


def llama_config(rows: int) -> LlamaConfig:
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
    }
    return LlamaConfig(vocab_size=rows, **sizes)


def write_original(
    folder: Path,
    tower_in_weights: bool = True,
    files: str = "safetensors",
    linear: bool = False,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """A whole model in the original's layout in `folder`/model, its tower in `folder`/tower."""
    tokenizer = original_tokenizer()
    tokenizer.chat_template = TEMPLATE
    weights, tower = original_weights(len(tokenizer), linear)
    vision = CLIPVisionModel(VISION)
    vision.load_state_dict({name.rpartition("vision_model.")[2]: value for name, value in tower.items()})
    vision.to(dtype).save_pretrained(folder / "tower")
    square = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=square).save_pretrained(folder / "tower")
    path = folder / "model"
    path.mkdir()
    tokenizer.save_pretrained(path)
    projector_type = "linear" if linear else "mlp2x_gelu"
    named = {"mm_vision_tower": str(folder / "tower"), "mm_projector_type": projector_type}
    own = {"vocab_size": len(tokenizer), "torch_dtype": str(dtype).removeprefix("torch.")}
    (path / "config.json").write_text(json.dumps(FROM_HUB | named | own | config))
    whole = {name: value.to(dtype) for name, value in (weights | (tower if tower_in_weights else {})).items()}
    if files == "safetensors":
        save_file(whole, path / "model.safetensors", {"format": "pt"})
    else:
        split(whole, path)
    return path


def split(weights: dict[str, Tensor], path: Path) -> None:
    """Two pickles and an index, as on the hub."""
    names = sorted(weights)
    places = {name: f"pytorch_model-0000{1 + (name > names[20])}-of-00002.bin" for name in names}
    for file in sorted({*places.values()}):
        torch.save({name: weights[name] for name in names if places[name] == file}, path / file)
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))


def naive_logits(
    weights: dict[str, Tensor], ids: list[int], pixels: Tensor, config: dict[str, Any]
) -> Tensor:
    """The original's forward, written out: embed the text, put the projected patches at -200, run the Llama."""
    vision = CLIPVisionModel(VISION).eval()
    prefix = "model.vision_tower.vision_tower.vision_model."
    vision.load_state_dict({n.removeprefix(prefix): v for n, v in weights.items() if n.startswith(prefix)})
    language = LlamaForCausalLM(llama_config(config["vocab_size"])).eval()
    language.load_state_dict(
        {n: v for n, v in weights.items() if "mm_projector" not in n and "vision_tower" not in n}
    )
    with torch.no_grad():
        hidden = vision(pixels, output_hidden_states=True).hidden_states
        patches = hidden[config["mm_vision_select_layer"]]
        if config["mm_vision_select_feature"] == "patch":
            patches = patches[:, 1:]
        at = "model.mm_projector."
        if config["mm_projector_type"] == "linear":
            features = patches @ weights[at + "weight"].T + weights[at + "bias"]
        else:
            first = patches @ weights[at + "0.weight"].T + weights[at + "0.bias"]
            features = torch.nn.functional.gelu(first) @ weights[at + "2.weight"].T + weights[at + "2.bias"]
        rows, image = [], 0
        for number in ids:
            if number == -200:
                rows += [*features[image]]
                image += 1
            else:
                rows.append(weights["model.embed_tokens.weight"][number])
        return language(inputs_embeds=torch.stack(rows)[None]).logits


QUESTION = "USER: <image>\nIs it red? ASSISTANT:"


def hf_logits(folder: Path) -> tuple[Tensor, list[int], Tensor]:
    """Logits of the stock model on a question, the ids with -200 for the image, and the pixels."""
    model = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True).eval()
    assert type(model) is LlavaForConditionalGeneration
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    picture = Image.linear_gradient("L").resize((50, 31)).convert("RGB")
    inputs = processor(images=picture, text=QUESTION, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    ids = inputs["input_ids"][0].tolist()
    image = model.config.image_token_id
    marked = [
        -200 if number == image else number
        for place, number in enumerate(ids)
        if number != image or ids[place - 1] != image
    ]
    return logits, marked, inputs["pixel_values"]


def assert_same_logits(weights: dict[str, Tensor], config: dict[str, Any], folder: Path) -> None:
    logits, ids, pixels = hf_logits(folder)
    assert ids.count(-200) == 1
    expected = naive_logits(weights, ids, pixels, config)
    torch.testing.assert_close(logits[..., : config["vocab_size"]], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("files", "linear", "config"),
    [
        ("safetensors", False, {}),
        ("bin", False, {"mm_vision_select_layer": -1, "image_aspect_ratio": None}),
        ("safetensors", True, {"mm_vision_select_feature": "cls_patch", "rope_theta": 5000.0}),
    ],
)
def test_there_and_back_is_identical(
    tmp_path: Path, files: str, linear: bool, config: dict[str, Any]
) -> None:
    path = write_original(tmp_path, files=files, linear=linear, **config)
    before, settings = read_weights(path), json.loads((path / "config.json").read_text())
    there = convert(path, tmp_path / "hf")
    assert there.layout == "hf" and there.max_abs_diff < 1e-5
    if "rope_theta" not in config:
        assert_same_logits(before, settings, there.path)
    back = convert(there.path, tmp_path / "back")
    assert back.layout == "llava" and back.max_abs_diff < 1e-5
    after = load_file(back.path / "model.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert json.loads((back.path / "config.json").read_text()) == settings
    ours, theirs = (PreTrainedTokenizerFast.from_pretrained(folder) for folder in (path, back.path))
    assert ours.get_vocab() == theirs.get_vocab() and ours.pad_token == theirs.pad_token
    text = "USER: <image>\nIs it red?</s>"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    for folder, difference in ((there.path, there.max_abs_diff), (back.path, back.max_abs_diff)):
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["converted"]["largest_logit_difference"] == difference
        assert f"logit difference {difference:.2g}" in (folder / "README.md").read_text()


def read_weights(path: Path) -> dict[str, Tensor]:
    if (path / "model.safetensors").is_file():
        return load_file(path / "model.safetensors")
    return {k: v for file in path.glob("*.bin") for k, v in torch.load(file, weights_only=True).items()}


def test_the_folder_in_between(tmp_path: Path) -> None:
    path = write_original(tmp_path)
    hf = convert(path, tmp_path / "hf").path
    config = json.loads((hf / "config.json").read_text())
    rows = json.loads((path / "config.json").read_text())["vocab_size"]
    tokenizer = AutoTokenizer.from_pretrained(hf)
    assert config["model_type"] == "llava" and config["image_token_index"] == rows
    assert tokenizer.convert_tokens_to_ids("<image>") == rows
    assert config["text_config"]["vocab_size"] % 64 == 0
    weights = load_file(hf / "model.safetensors")
    embeddings = weights["language_model.model.embed_tokens.weight"]
    assert torch.allclose(embeddings[rows:], embeddings[:rows].mean(0))
    assert any(name.startswith("vision_tower.vision_model.") for name in weights)
    processor = AutoProcessor.from_pretrained(hf, backend="pil")
    assert processor.image_processor.do_pad and processor.chat_template == TEMPLATE


def test_a_tower_elsewhere(tmp_path: Path) -> None:
    """Weights without the tower: it is taken from where the config says, and left there on the way back."""
    path = write_original(tmp_path, tower_in_weights=False)
    hf = convert(path, tmp_path / "hf").path
    tower = original_weights(ROWS, False)[1]
    assert_same_logits(read_weights(path) | tower, json.loads((path / "config.json").read_text()), hf)
    assert (
        load_file(convert(hf, tmp_path / "back").path / "model.safetensors").keys()
        == read_weights(path).keys()
    )
    # A tower that was tuned meanwhile is not the one with that name any more: it is written.
    (tmp_path / "tower" / "model.safetensors").write_bytes(changed(tmp_path / "tower" / "model.safetensors"))
    again = load_file(convert(hf, tmp_path / "back").path / "model.safetensors")
    assert again.keys() == read_weights(path).keys() | tower.keys()


def changed(file: Path) -> bytes:
    from safetensors.torch import save

    return save({name: value + 1 for name, value in load_file(file).items()}, {"format": "pt"})


def test_half_precision_is_kept(tmp_path: Path) -> None:
    path = write_original(tmp_path, dtype=torch.float16)
    hf = convert(path, tmp_path / "hf").path
    assert {value.dtype for value in load_file(hf / "model.safetensors").values()} == {torch.float16}
    after, before = load_file(convert(hf, tmp_path / "back").path / "model.safetensors"), read_weights(path)
    assert all(torch.equal(after[name], before[name]) for name in before)


# ---------------------------------------------------------------- parts of a model


def write_base(folder: Path) -> Path:
    """The language model alone, as lmsys/vicuna-7b-v1.5."""
    tokenizer = original_tokenizer()
    tokenizer.chat_template = TEMPLATE
    weights = {
        name: value
        for name, value in original_weights(len(tokenizer), False)[0].items()
        if "mm_projector" not in name
    }
    language = LlamaForCausalLM(llama_config(len(tokenizer)))
    language.load_state_dict(weights)
    language.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def only_config(whole: Path, folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text((whole / "config.json").read_text())
    return folder


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_lora_and_its_base(tmp_path: Path, suffix: str) -> None:
    """adapter_model, and non_lora_trainables with peft's prefix, over a language model."""
    whole = write_original(tmp_path, tower_in_weights=False)
    base = write_base(tmp_path / "base")
    path = only_config(whole, tmp_path / "lora")
    weights = read_weights(whole)
    torch.manual_seed(1)
    adapters, merged = {}, dict(weights) | original_weights(ROWS, False)[1]
    for layer in range(2):
        for target, (wide, narrow) in {"self_attn.q_proj": (48, 48), "mlp.up_proj": (96, 48)}.items():
            name = f"model.layers.{layer}.{target}"
            a, b = torch.randn(4, narrow) / 5, torch.randn(wide, 4) / 5
            adapters |= {f"base_model.model.{name}.lora_A.weight": a}
            adapters |= {f"base_model.model.{name}.lora_B.weight": b}
            merged[f"{name}.weight"] = weights[f"{name}.weight"] + 8 / 4 * b @ a
    projector = {name: value + 0.1 for name, value in weights.items() if "mm_projector" in name}
    merged |= projector
    others = {f"base_model.model.{name}": value for name, value in projector.items()}
    store = save_file if suffix == "safetensors" else torch.save
    store(adapters, path / f"adapter_model.{suffix}")
    store(others, path / f"non_lora_trainables.{suffix}")
    options = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "lora_dropout": 0.05}
    options |= {"target_modules": ["q_proj", "up_proj"], "bias": "none", "base_model_name_or_path": "lmsys/x"}
    (path / "adapter_config.json").write_text(json.dumps(options))
    with pytest.raises(CheckpointError, match="--base"):
        convert(path, tmp_path / "hf")
    report = convert(path, tmp_path / "hf", base=base)
    assert report.max_abs_diff < 1e-4
    assert_same_logits(merged, json.loads((path / "config.json").read_text()), report.path)
    assert not any("lora" in name for name in load_file(report.path / "model.safetensors"))
    del adapters["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]
    store(adapters, path / f"adapter_model.{suffix}")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj"):
        convert(path, tmp_path / "other", base=base)


def test_a_projector_and_its_base(tmp_path: Path) -> None:
    whole = write_original(tmp_path, tower_in_weights=False)
    path = only_config(whole, tmp_path / "projector")
    weights = read_weights(whole)
    torch.save({n: v for n, v in weights.items() if "mm_projector" in n}, path / "mm_projector.bin")
    hf = convert(path, tmp_path / "hf", base=write_base(tmp_path / "base")).path
    config = json.loads((path / "config.json").read_text())
    assert_same_logits(weights | original_weights(ROWS, False)[1], config, hf)


# ---------------------------------------------------------------- from our own exports


def test_an_export_in_the_original_layout(tmp_path: Path) -> None:
    """Its image token stands among the others, so that it stays; nobody recorded a config."""
    model, processor = tiny_model()
    export_model(model, processor, tmp_path / "export", None, probe_batch(model, processor), {})
    with pytest.raises(CheckpointError, match="--vision-tower"):
        convert(tmp_path / "export", tmp_path / "out")
    out = convert(tmp_path / "export", tmp_path / "out", tower="openai/clip-vit-large-patch14-336").path
    config = json.loads((out / "config.json").read_text())
    assert config["vocab_size"] == model.get_input_embeddings().num_embeddings
    assert (config["mm_projector_type"], config["mm_hidden_size"]) == ("mlp2x_gelu", 32)
    state = model.state_dict()
    weights = load_file(out / "model.safetensors")
    assert torch.equal(
        weights["model.mm_projector.2.weight"], state["model.multi_modal_projector.linear_2.weight"]
    )
    assert len(weights) == len(state)
    assert "LlavaLlamaForCausalLM" in (out / "README.md").read_text()


def test_a_template_that_is_not_ours(tmp_path: Path) -> None:
    model, processor = tiny_model()
    export_model(model, processor, tmp_path / "export", None, probe_batch(model, processor), {})
    (tmp_path / "export" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert convert(tmp_path / "export", tmp_path / "out", tower="x/y").max_abs_diff < 1e-5


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("siglip",), "vision tower is siglip"),
        (("clip", "resampler"), "projector is resampler"),
        (("clip", "mlp2x", "qwen2"), "language model is qwen2"),
    ],
)
def test_what_the_original_cannot_compute(tmp_path: Path, names: tuple[str, ...], reason: str) -> None:
    model, processor = tiny_model(*names)
    export_model(model, processor, tmp_path / "export", None, probe_batch(model, processor), {})
    with pytest.raises(CheckpointError, match=reason):
        convert(tmp_path / "export", tmp_path / "out", tower="x/y")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"architectures": ["LlavaMptForCausalLM"]}, "LlavaMptForCausalLM"),
        ({"mm_projector_type": "mlp3x_gelu"}, "mlp3x_gelu"),
        ({"image_aspect_ratio": "anyres"}, "tiles"),
        ({"mm_use_im_start_end": True}, "start and end"),
    ],
)
def test_what_transformers_cannot_compute(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    path = write_original(tmp_path)
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(values | config))
    with pytest.raises(CheckpointError, match=reason):
        convert(path, tmp_path / "out")


def test_weights_lost_or_left_over_are_refused(tmp_path: Path) -> None:
    path = write_original(tmp_path)
    weights = read_weights(path)
    save_file(weights | {"model.image_newline": torch.zeros(WIDTH)}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match="image_newline"):
        convert(path, tmp_path / "out")
    for lost in ("model.norm.weight", "model.mm_projector.2.bias"):
        save_file({n: v for n, v in weights.items() if n != lost}, path / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"norm\.weight|2\.bias"):
            convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_wrong_mapping_is_found_by_the_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_original(tmp_path)
    features = original_layout.OriginalLlava.features
    monkeypatch.setattr(
        original_layout.OriginalLlava, "features", lambda self, pixels: features(self, pixels).flip(1)
    )
    with pytest.raises(CheckpointError, match="logits of the two layouts differ"):
        convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    class Planted:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    path = write_original(tmp_path)
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": Planted()}))
    with pytest.raises(CheckpointError, match="Nothing in it was run"):
        convert(path, tmp_path / "out")
    torch.save({"model.norm.weight": Planted()}, path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="Nothing in it was run"):
        convert(path, tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_the_layout_asked_for_is_there_already(tmp_path: Path) -> None:
    path = write_original(tmp_path)
    with pytest.raises(CheckpointError, match="in the layout llava already"):
        convert(path, tmp_path / "out", "llava")
