"""Merging folders: what is written, what is refused, how much memory it takes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from tests.tiny import tiny_model
from vlmtune.errors import CheckpointError
from vlmtune.export.average import Output, merge_models
from vlmtune.export.combine import Average, Copy, Dare, Method, Slerp, Ties
from vlmtune.export.hf import export_model
from vlmtune.export.probe import probe_batch
from vlmtune.models.build import load_model

PARTS = ("vision", "projector", "language")


def every(method: Method) -> dict[str, Method]:
    return dict.fromkeys(PARTS, method)


def export(folder: Path, *names: str, dtype: torch.dtype | None = None, **options: Any) -> Path:
    model, processor = tiny_model(*names, **options)
    return export_model(model, processor, folder, dtype, probe_batch(model, processor), {}).path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three models of one architecture, each with other weights; the same tokens."""
    root = tmp_path_factory.mktemp("models")
    return [export(root / f"model{seed}", seed=seed) for seed in range(3)]


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def parts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())["parts"]


def part(name: str) -> str:
    words = {"vision_tower": "vision", "multi_modal_projector": "projector", "language_model": "language"}
    return words[name.partition(".")[0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [2, 3])
def test_the_average_of_a_model_with_itself_is_the_model(
    tmp_path: Path, dtype: torch.dtype, count: int
) -> None:
    folder = export(tmp_path / "model", dtype=dtype)
    for methods in (every(Average()), every(Average((0.3, 0.7, 0.1)[:count]))):
        out = merge_models([folder] * count, methods, None, Output(tmp_path / "out"))
        assert (out / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
        assert parts(out) == parts(folder)


def test_the_result_is_a_whole_folder_like_the_first(tmp_path: Path, folders: list[Path]) -> None:
    out = merge_models(folders[:2], every(Average()), None, Output(tmp_path / "out"))
    assert {path.name for path in out.iterdir()} == {path.name for path in folders[0].iterdir()}
    changed = {"model.safetensors", "manifest.json", "README.md"}
    for path in folders[0].iterdir():
        if path.suffix == ".json" and path.name not in changed:
            assert json.loads(path.read_text()) == json.loads((out / path.name).read_text()), path.name
    assert str(tmp_path.parent) not in (out / "config.json").read_text()
    model = AutoModelForImageTextToText.from_pretrained(out, local_files_only=True)
    assert type(model) is LlavaForConditionalGeneration
    assert AutoProcessor.from_pretrained(out, local_files_only=True, backend="pil").chat_template
    a, b, merged = weights(folders[0]), weights(folders[1]), weights(out)
    assert merged.keys() == a.keys()
    for name, value in merged.items():
        torch.testing.assert_close(value, (a[name] + b[name]) / 2, rtol=0, atol=1e-6)


def test_slerp_ends_are_the_models(tmp_path: Path, folders: list[Path]) -> None:
    for t, end in ((0.0, folders[0]), (1.0, folders[1])):
        out = merge_models(folders[:2], every(Slerp(t)), None, Output(tmp_path / "out"))
        assert (out / "model.safetensors").read_bytes() == (end / "model.safetensors").read_bytes()
    out = merge_models(folders[:2], every(Slerp(0.5)), None, Output(tmp_path / "out"))
    assert parts(out) not in (parts(folders[0]), parts(folders[1]))


def test_each_part_its_own_way(tmp_path: Path, folders: list[Path]) -> None:
    """TIES on the language model, the mean on the projector, the first model's tower."""
    methods: dict[str, Method] = {"vision": Copy(), "projector": Average((1, 3)), "language": Ties(0.3, 0.9)}
    base, *models = folders
    out = merge_models(models, methods, base, Output(tmp_path / "out"))
    origin, a, b, merged = map(weights, (base, *models, out))
    for name, value in merged.items():
        changes = [a[name] - origin[name], b[name] - origin[name]]
        expected = {
            "vision": a[name],
            "projector": (a[name] + 3 * b[name]) / 4,
            "language": origin[name] + 0.9 * merge_utils.ties(changes, torch.ones(2), 0.3),
        }[part(name)]
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    assert parts(out)["vision"] == parts(models[0])["vision"]
    merge = json.loads((out / "manifest.json").read_text())["merge"]
    assert merge["parts"]["language"] == {"method": "ties", "density": 0.3, "scale": 0.9, "weights": []}
    assert [each["path"] for each in merge["inputs"]] == [str(path) for path in models]
    assert merge["base"]["path"] == str(base) and len(merge["base"]["sha256"]) == 64
    card = (out / "README.md").read_text()
    assert "language: method ties, density 0.3" in card and merge["inputs"][1]["sha256"][:16] in card


@pytest.mark.parametrize("method", [Average(), Ties(), Dare()])
def test_files_do_not_change_the_result(tmp_path: Path, folders: list[Path], method: Method) -> None:
    """One file or several, in and out: the same tensors."""
    small = Output(tmp_path / "many", shard_bytes=60_000)
    split = merge_models([folders[1]], every(Average()), None, small).rename(tmp_path / "split")
    index = json.loads((split / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 5 and {path.name for path in split.glob("*.safetensors")} == files
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in weights(split).values())
    assert parts(split) == parts(folders[1])
    one = merge_models([folders[0], folders[1]], every(method), folders[2], Output(tmp_path / "one"))
    many = merge_models([folders[0], split], every(method), folders[2], small)
    assert parts(many) == parts(one)
    assert load_model(many)[0].dtype == torch.float32


def step_folder(root: Path, *names: str, **options: Any) -> Path:
    """As training saves it: names in memory partly, the processor as it is."""
    model, processor = tiny_model(*names, **options)
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    (root / "manifest.json").write_text('{"kind": "step", "step": 1}')
    return root


@pytest.mark.parametrize("projector", ["mlp2x", "linear", "resampler"])
@pytest.mark.parametrize("tower", ["clip", "dinov2"])
def test_steps_and_exports_are_merged_alike(tmp_path: Path, tower: str, projector: str) -> None:
    names = tower, projector
    step = step_folder(tmp_path / "step", *names)
    assert parts(export(tmp_path / "export", *names)) == parts(
        merge_models([step], every(Average()), None, Output(tmp_path / "of_step"))
    )
    if projector != "linear":  # whose export is an mlp2x with an identity, read as such
        out = merge_models([step, tmp_path / "export"], every(Average()), None, Output(tmp_path / "out"))
        assert parts(out) == parts(tmp_path / "export")


def test_names_of_every_version_are_read(tmp_path: Path, folders: list[Path]) -> None:
    """In-memory names (state_dict, zero_to_fp32, transformers 4.52), and a buffer that old versions saved."""
    renamed = weights(folders[0])
    for old, new in (
        ("vision_tower.vision_model.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
    ):
        renamed = {name.replace(old, new): value for name, value in renamed.items()}
    assert not any(name.startswith(("vision_tower", "language_model")) for name in renamed)
    shutil.copytree(folders[0], tmp_path / "memory")
    renamed["model.vision_tower.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(renamed, tmp_path / "memory" / "model.safetensors")
    out = merge_models([tmp_path / "memory", folders[0]], every(Average()), None, Output(tmp_path / "out"))
    assert parts(out) == parts(folders[0])


def test_weights_in_another_type(tmp_path: Path, folders: list[Path]) -> None:
    half = export(tmp_path / "half", seed=1, dtype=torch.bfloat16)
    out = merge_models([half, folders[0]], every(Average()), None, Output(tmp_path / "out"))
    assert {value.dtype for value in weights(out).values()} == {torch.bfloat16}
    out = merge_models([half, half], every(Average()), None, Output(tmp_path / "out", torch.float32))
    assert {value.dtype for value in weights(out).values()} == {torch.float32}
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    both = [export(tmp_path / "export", tied=True), step_folder(tmp_path / "step", tied=True)]
    out = merge_models(both, every(Average()), None, Output(tmp_path / "out"))
    assert parts(out) == parts(both[0])
    model, _ = load_model(out)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_a_template_that_is_not_ours(tmp_path: Path, folders: list[Path]) -> None:
    """llava-hf's have no generation marks: nothing can be rendered for training, but the model can run."""
    foreign = tmp_path / "foreign"
    shutil.copytree(folders[0], foreign)
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (foreign / "chat_template.jinja").write_text(template)
    out = merge_models([foreign, folders[0]], every(Average()), None, Output(tmp_path / "out"))
    assert (out / "chat_template.jinja").read_text() == template
    assert parts(out) == parts(folders[0])


# ---------------------------------------------------------------- refusals


def refuse(match: str, paths: list[Path], out: Path, methods: dict[str, Method] | None = None) -> None:
    with pytest.raises(CheckpointError, match=match):
        merge_models(paths, methods or every(Average()), None, Output(out))
    assert not out.exists() and not [*out.parent.glob(f"{out.name}.*")]


def test_other_architectures_are_refused_with_what_differs(tmp_path: Path, folders: list[Path]) -> None:
    out = tmp_path / "out"
    qwen = export(tmp_path / "qwen", language="qwen2")
    refuse(r"another architecture.*has besides language_model.*q_proj\.bias", [folders[0], qwen], out)
    towers = export(tmp_path / "siglip", "siglip")
    refuse(r"another architecture.*lacks vision_tower\S*class_embedding", [folders[0], towers], out)
    methods: dict[str, Method] = {"vision": Copy(), "projector": Copy(), "language": Average()}
    merge_models([folders[0], towers], methods, None, Output(out))


def copy_with(folder: Path, out: Path, **config: Any) -> Path:
    shutil.copytree(folder, out)
    values = json.loads((out / "config.json").read_text())
    for key, value in config.items():
        part, _, name = key.rpartition("__")
        (values[part] if part else values)[name] = value
    (out / "config.json").write_text(json.dumps(values))
    return out


def test_other_settings_of_the_same_shapes_are_refused(tmp_path: Path, folders: list[Path]) -> None:
    other = copy_with(folders[0], tmp_path / "layer", vision_feature_layer=-1)
    refuse(r"vision_feature_layer is -1 for -2", [folders[0], other], tmp_path / "out")
    other = copy_with(folders[0], tmp_path / "act", text_config__hidden_act="gelu")
    refuse(r"text_config\.hidden_act is 'gelu' for 'silu'", [folders[0], other], tmp_path / "out")


def test_another_vocabulary_is_refused(tmp_path: Path, folders: list[Path]) -> None:
    grown, processor = tiny_model()
    grown.resize_token_embeddings(576)
    grown.save_pretrained(tmp_path / "grown")
    processor.save_pretrained(tmp_path / "grown")
    rows = tiny_model()[0].get_input_embeddings().num_embeddings
    refuse(f"has 576 embeddings and .* has {rows}", [folders[0], tmp_path / "grown"], tmp_path / "out")
    swapped = tmp_path / "swapped"
    shutil.copytree(folders[0], swapped)
    tokens = json.loads((swapped / "tokenizer.json").read_text())
    vocab = tokens["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (swapped / "tokenizer.json").write_text(json.dumps(tokens))
    refuse(r"the token 'a' is number \d+ there and number \d+ here", [folders[0], swapped], tmp_path / "out")
    methods: dict[str, Method] = {"vision": Average(), "projector": Average(), "language": Copy()}
    merge_models([folders[0], swapped], methods, None, Output(tmp_path / "out"))


def test_settings_are_refused_before_anything_is_read(tmp_path: Path, folders: list[Path]) -> None:
    out = tmp_path / "out"
    refuse("vision: slerp: slerp lies between two models, not 3", folders, out, every(Slerp()))
    refuse("dare: .* give the base", folders[:2], out, every(Dare()))
    refuse("no such folder", [tmp_path / "nothing"], out)


def test_adapters_and_shards_are_refused_with_the_remedy(tmp_path: Path, folders: list[Path]) -> None:
    step = step_folder(tmp_path / "step")
    (step / "model" / "model.safetensors").rename(step / "model" / "trained.safetensors")
    refuse(rf"holds adapters.*Run `vlmtune merge {step} OUT` first", [folders[0], step], tmp_path / "out")
    for mark, program in ((".metadata", "dcp_to_torch"), ("latest", "zero_to_fp32")):
        shards = tmp_path / f"shards{mark}"
        shards.mkdir()
        (shards / mark).touch()
        refuse(f"shards of a distributed run.*{program}", [shards], tmp_path / "out")


def changed(folder: Path, out: Path, name: str, value: Tensor | None) -> Path:
    shutil.copytree(folder, out)
    tensors = {key: tensor for key, tensor in load_file(folder / "model.safetensors").items() if key != name}
    save_file(tensors | ({name: value} if value is not None else {}), out / "model.safetensors")
    return out


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, folders: list[Path]) -> None:
    bias = "multi_modal_projector.linear_1.bias"
    wrong = changed(folders[0], tmp_path / "nan", bias, torch.full((64,), torch.nan))
    refuse(f"{bias} is not finite", [folders[1], wrong], tmp_path / "out")
    large = changed(folders[0], tmp_path / "large", bias, torch.full((64,), 3e38))
    refuse("logits that are not finite", [large, large], tmp_path / "out")


def test_a_lost_weight_is_refused(tmp_path: Path, folders: list[Path]) -> None:
    bias = "multi_modal_projector.linear_1.bias"
    lost = changed(folders[0], tmp_path / "lost", bias, None)
    refuse(rf"not what its config says: lacks {bias}", [folders[1], lost], tmp_path / "out")


def test_another_kind_of_folder_is_not_replaced(tmp_path: Path, folders: list[Path]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="not an export"):
        merge_models(folders[:1], every(Average()), None, Output(tmp_path))


# ---------------------------------------------------------------- memory

_MEASURE = """
import sys, threading
from pathlib import Path
import psutil
from vlmtune.export.combine import Average, Ties
from vlmtune.export.average import Output, merge_models

big, small, out = map(Path, sys.argv[1:4])
methods = {"vision": Average(), "projector": Average(), "language": Ties()}
merge_models([small, small], methods, small, Output(out, probe=False))  # imports and caches are there now
process, peak, done = psutil.Process(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.003):
        peak = max(peak, process.memory_info().rss)
start = process.memory_info().rss
watcher = threading.Thread(target=watch)
watcher.start()
merge_models([big, big], methods, big, Output(out, shard_bytes=int(sys.argv[4]), probe=False))
done.set()
watcher.join()
print(peak - start)
"""


def test_memory_stays_below_two_files(tmp_path: Path, folders: list[Path]) -> None:
    """Resident memory of a process that merges two models with a base, 100 MB each in files of 24 MB."""
    model, processor = tiny_model()
    model.config.text_config.num_hidden_layers = 48
    model.config.text_config.intermediate_size = 2560
    with torch.device("meta"):
        big = type(model)(model.config)
    big.to_empty(device="cpu")
    for value in big.parameters():
        torch.nn.init.normal_(value, std=0.02)
    shard = 24 * 10**6
    big.save_pretrained(tmp_path / "big", max_shard_size=shard)
    processor.save_pretrained(tmp_path / "big")
    size = sum(file.stat().st_size for file in (tmp_path / "big").glob("*.safetensors"))
    assert size > 90e6
    del big
    # Freed blocks go back to the system at once, so that resident memory is memory in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "65536"}
    arguments = [str(tmp_path / "big"), str(folders[0]), str(tmp_path / "out"), str(shard)]
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split()[-1])
    print(
        f"{peak / 1e6:.0f} MB at most, for 3 models of {size / 1e6:.0f} MB in files of {shard / 1e6:.0f} MB"
    )
    assert 0 < peak < 2 * shard
    assert len([*(tmp_path / "out").glob("*.safetensors")]) >= 4
