"""The exported folder: complete, equal to the model, in place only when it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration, PreTrainedModel

from tests import tiny
from vlmtune.errors import CheckpointError
from vlmtune.export import compare, weights
from vlmtune.export.hf import ExportReport, export_model
from vlmtune.export.probe import probe_batch
from vlmtune.models.attention import use_attention
from vlmtune.models.vlm import VLM

FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "manifest.json",
    "model.safetensors",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
MODELS = [
    ("clip", "mlp2x", "llama", False),
    ("siglip", "mlp2x", "qwen2", True),
    ("dinov2", "linear", "llama", True),
    ("clip", "linear", "qwen2", False),
    ("siglip2", "pixel_shuffle", "llama", False),
    ("clip", "resampler", "qwen2", True),
]


def export(model: VLM, processor, out: Path, dtype: torch.dtype | None = None) -> ExportReport:
    return export_model(model, processor, out, dtype, probe_batch(model, processor), {"recipe": "tiny"})


def tiny_model(*names: str, **options: Any) -> tuple[VLM, Any]:
    """As a run has it: the attention for packed rows in force."""
    model, processor = tiny.tiny_model(*names, **options)
    use_attention(model, "auto")
    return model, processor


def read(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.mark.parametrize(("tower", "projector", "language", "tied"), MODELS)
def test_export_is_the_model(tmp_path: Path, tower: str, projector: str, language: str, tied: bool) -> None:
    model, processor = tiny_model(tower, projector, language, tied=tied)
    report = export(model, processor, tmp_path / "export")
    stock = projector in ("linear", "mlp2x")
    assert report == replace(report, path=tmp_path / "export", stock=stock)
    assert report.difference.largest <= 1e-6
    assert {path.name for path in report.path.iterdir()} == FILES
    config = read(report.path / "config.json")
    assert config["model_type"] == ("llava" if stock else "vlmtune")
    reopened = AutoModelForImageTextToText.from_pretrained(report.path, local_files_only=True)
    assert type(reopened) is (LlavaForConditionalGeneration if stock else VLM)
    tying = reopened.lm_head.weight.data_ptr() == reopened.get_input_embeddings().weight.data_ptr()
    assert tying == tied


@pytest.mark.parametrize("packing", ["isolated", "none"])
def test_packed_and_padded_batches_give_the_same_probes(packing: str) -> None:
    from tests.chat_batches import encoded_samples
    from vlmtune.data.collate import collate
    from vlmtune.models.vision import token_counter

    model, _ = tiny_model()
    samples = encoded_samples(model.config.image_token_id, token_counter(model.config)(0, 0), 32)
    *probes, made_up = compare.probes(model, collate(samples, packing))
    for probe, sample in zip(probes, samples, strict=False):
        assert torch.equal(probe.input_ids[0], sample.input_ids)
        if sample.pixel_values is None:
            assert probe.pixel_values is None
        else:
            assert torch.equal(probe.pixel_values, sample.pixel_values)
    assert len(probes) == 4
    assert made_up.pixel_values is not None  # the tower runs even if the batch has no picture


def test_v4_left_the_tower_random(tmp_path: Path) -> None:
    """transformers 4 looks for `vision_tower.vision_model.`, and for dinov2's names of that time."""
    for tower, name in (
        ("clip", "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight"),
        ("siglip", "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight"),
        ("dinov2", "vision_tower.encoder.layer.0.attention.attention.query.weight"),
    ):
        model, processor = tiny_model(tower)
        names = load_file(export(model, processor, tmp_path / tower).path / "model.safetensors").keys()
        assert name in names
        assert "language_model.model.layers.0.self_attn.q_proj.weight" in names
        assert "language_model.lm_head.weight" in names


def test_names_do_not_depend_on_the_file_the_model_came_from(tmp_path: Path) -> None:
    from vlmtune.models.build import load_model

    model, processor = tiny_model("siglip")
    first = export(model, processor, tmp_path / "first").path
    second = export(*load_model(first), tmp_path / "second").path
    model.save_pretrained(tmp_path / "step")
    processor.save_pretrained(tmp_path / "step")
    third = export(*load_model(tmp_path / "step"), tmp_path / "third").path
    parts = [read(path / "manifest.json")["parts"] for path in (first, second, third)]
    assert parts[0] == parts[1] == parts[2]


def test_rope_settings_where_each_version_looks(tmp_path: Path) -> None:
    model, processor = tiny_model(language="qwen2")
    model.config.text_config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    model = VLM(model.config)
    text = read(export(model, processor, tmp_path / "export").path / "config.json")["text_config"]
    assert text["rope_theta"] == 5e5
    assert text["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert text["rope_parameters"] == text["rope_scaling"] | {"rope_theta": 5e5}


def test_bfloat16(tmp_path: Path) -> None:
    model, processor = tiny_model()
    report = export(model, processor, tmp_path / "export", torch.bfloat16)
    assert 0 < report.difference.largest < 0.05
    tensors = load_file(report.path / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert read(report.path / "config.json")["dtype"] == "bfloat16"
    assert model.dtype == torch.float32


def test_several_files_and_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny_model()
    one = export(model, processor, tmp_path / "one").path
    monkeypatch.setattr(weights, "_SHARD_BYTES", 100_000)
    many = export(model, processor, tmp_path / "many").path
    index = read(many / "model.safetensors.index.json")
    assert len(set(index["weight_map"].values())) > 3
    assert {path.name for path in many.glob("*.safetensors")} == set(index["weight_map"].values())
    digests = [read(path / "manifest.json")["parts"] for path in (one, many)]
    assert digests[0] == digests[1]
    assert sum(part["parameters"] for part in digests[0].values()) == sum(
        p.numel() for p in model.parameters()
    )
    with torch.no_grad():
        model.model.vision_tower.get_parameter("embeddings.class_embedding").add_(1e-3)
    changed = read(export(model, processor, tmp_path / "one").path / "manifest.json")["parts"]
    assert [part for part in changed if changed[part] != digests[0][part]] == ["vision"]


def test_generation_ends_where_the_template_does(tmp_path: Path) -> None:
    model, processor = tiny_model(template="chatml")
    model.generation_config.temperature = (
        0.3  # sampling settings of a base model: not valid with greedy decoding
    )
    config = read(export(model, processor, tmp_path / "export").path / "generation_config.json")
    ends = config["eos_token_id"]
    assert processor.tokenizer.eos_token_id in (ends if isinstance(ends, list) else [ends])
    assert "temperature" not in config


def test_a_failed_comparison_leaves_nothing_and_keeps_the_old_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = tiny_model()
    out = tmp_path / "export"
    export(model, processor, out)
    before = (out / "model.safetensors").read_bytes()
    reopen = AutoModelForImageTextToText.from_pretrained

    def wrong(*args: object, **options: object) -> tuple[PreTrainedModel, dict]:
        model, info = reopen(*args, **options)
        model.lm_head.weight.data += 0.1
        return model, info

    monkeypatch.setattr(compare.AutoModelForImageTextToText, "from_pretrained", wrong)
    with pytest.raises(CheckpointError, match="differ by"):
        export(tiny_model(seed=1)[0], processor, out)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert (out / "model.safetensors").read_bytes() == before


def test_a_lost_weight_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny_model()
    tensors = weights.file_tensors(model)
    del tensors["multi_modal_projector.linear_1.bias"]
    monkeypatch.setattr("vlmtune.export.hf.file_tensors", lambda model: tensors)
    with pytest.raises(CheckpointError, match=r"linear_1\.bias"):
        export(model, processor, tmp_path / "export")
    assert not any(tmp_path.iterdir())


def test_not_a_number_is_refused(tmp_path: Path) -> None:
    model, processor = tiny_model()
    model.lm_head.weight.data[0] = float("nan")
    with pytest.raises(CheckpointError, match="differ by nan"):
        export(model, processor, tmp_path / "export")


def test_a_changed_processor_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny_model()
    save = type(processor).save_pretrained

    def forgetful(self: object, folder: Path) -> None:
        save(self, folder)
        (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")

    monkeypatch.setattr(type(processor), "save_pretrained", forgetful)
    with pytest.raises(CheckpointError, match="other chat template, prompt"):
        export(model, processor, tmp_path / "export")


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    model, processor = tiny_model()
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="not an export"):
        export(model, processor, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_model_keeps_its_mode_and_weights(tmp_path: Path) -> None:
    model, processor = tiny_model(projector="linear")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    export(model, processor, tmp_path / "export")
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_card_says_what_it_needs(tmp_path: Path) -> None:
    stock = export(*tiny_model(), tmp_path / "stock").path / "README.md"
    own = export(*tiny_model(projector="resampler"), tmp_path / "own").path / "README.md"
    assert "import vlmtune" not in stock.read_text()
    assert "import vlmtune.models.vlm\n" in own.read_text()
    assert "Recipe: `tiny`" in stock.read_text()


def test_the_card_s_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from PIL import Image

    folder = export(*tiny_model(), tmp_path / "export").path
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder)
    Image.new("RGB", (40, 30), "teal").save("picture.png")
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.endswith("\n")
