"""What a Ross run's denoiser paints from the hidden states of pictures, beside the pictures themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from vlmtune.config.plugins import ObjectiveConfig, ReconstructionConfig
from vlmtune.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlavaProcessor

    from vlmtune.models.vlm import VLM
    from vlmtune.objectives.reconstruction import Reconstruction, Rows
    from vlmtune.types import ChatBatch


def reconstruct_images(folder: Path, images: Sequence[Path], out: Path | None, steps: int, seed: int) -> Path:
    """The PNG written: a row per picture with the picture, its target decoded, and the reconstruction.

    `folder` is a step, a run (its last step is taken) or an export that lies beside its step, which has the denoiser.
    Without `out` the PNG becomes a part of the run's report.md. Raises CheckpointError when there is no denoiser, or
    when its target cannot be shown.
    """
    import torch

    from vlmtune.evaluation.charts import draw_pictures
    from vlmtune.evaluation.report import RECONSTRUCTION, write_report
    from vlmtune.objectives.reconstruction import denoiser_file
    from vlmtune.objectives.spine import hidden_states

    step = denoiser_file(step_of_export(folder) or folder).parent
    objective, processor = open_objective(step)
    batch = picture_batch(objective.model, processor, images)
    with torch.no_grad():
        rows = objective.rows(hidden_states(objective.model, batch), batch)
        target, painted = paint(objective, rows, steps, seed)
        shown = [objective.target.decode(tokens) for tokens in (target, painted)]
    if shown[0] is None or shown[1] is None:
        raise CheckpointError("its target cannot be shown as a picture", str(step), "Train on vae or pixels.")
    columns = zip(
        ("picture", "target", "reconstruction"),
        (objective.target.normalisation.undo(rows.pixels), *shown),
        strict=True,
    )
    run = run_folder_of(step)
    path = run / RECONSTRUCTION if out is None else out
    draw_pictures(path, {title: each.permute(0, 2, 3, 1).cpu().numpy() for title, each in columns})
    if out is None:
        write_report(run)
    return path


def paint(objective: Reconstruction, rows: Rows, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """Target tokens as encoded (the posterior's mean), and as the objective's own head makes them of hidden states."""
    import torch

    from vlmtune.models.denoiser import Denoiser, Regressor, sample
    from vlmtune.training.logging import progress

    noise = rows.pixels.new_zeros(len(rows.pixels), *objective.target.latent)
    target = objective.target.encode(rows.pixels, noise)
    if isinstance(objective.denoiser, Regressor):
        return target, objective.denoiser(rows.hidden)
    assert isinstance(objective.denoiser, Denoiser)
    generator = torch.Generator().manual_seed(seed)
    with progress("paint") as advance:
        channels = objective.target.channels
        return target, sample(objective.denoiser, rows.hidden, channels, steps, generator, advance)


def step_of_export(folder: Path) -> Path | None:
    """The step folder that an export was made of, if it is still in the run around it."""
    from vlmtune.training.checkpoint import read_manifest, step_folders

    if not (folder / "manifest.json").is_file() or (made := read_manifest(folder))["kind"] != "export":
        return None
    run = folder.absolute().parent
    # A run of one stage has its steps beside the export, one of several in its stages' folders.
    steps = [*step_folders(run), *step_folders(run / made.get("stage", ""))]
    same = ("key", "step")
    found = (step for step in steps if all(read_manifest(step).get(name) == made.get(name) for name in same))
    return next(found, None)


def open_objective(step: Path) -> tuple[Reconstruction, LlavaProcessor]:
    """The objective of a step folder with its model and denoiser in eval mode, and the processor.

    Raises CheckpointError where no denoiser was trained, or for an export, which has none.
    """
    from vlmtune.models.attention import use_attention
    from vlmtune.models.build import load_model
    from vlmtune.objectives import build_objective
    from vlmtune.objectives.reconstruction import Reconstruction, denoiser_file
    from vlmtune.training.checkpoint import read_manifest

    step = denoiser_file(step).parent
    config = TypeAdapter(ObjectiveConfig).validate_python(read_manifest(step)["objective"])
    assert isinstance(config, ReconstructionConfig)  # no other objective leaves such a file
    model, processor = load_model(step / "model")
    use_attention(model, "sdpa")
    objective = build_objective(config.model_copy(update={"weights": str(step)}), model, processor, 0)
    assert isinstance(objective, Reconstruction)
    return objective.eval(), processor


def picture_batch(model: VLM, processor: LlavaProcessor, images: Sequence[Path]) -> ChatBatch:
    """Each picture in a conversation of its own, up to where an answer would begin."""
    import torch

    from vlmtune.data.collate import collate
    from vlmtune.data.images import open_image
    from vlmtune.data.render import Renderer
    from vlmtune.models.vision import token_counter
    from vlmtune.types import IGNORE, IMAGE_MARK, ChatSample, Encoded, ImageRef, Size, Turn

    renderer = Renderer(processor.tokenizer, token_counter(model.config), processor.chat_template)
    samples = []
    for path in images:
        ref = ImageRef(str(path))
        picture = open_image(ref)
        sample = ChatSample(str(path), (ref,), (Turn("user", f"{IMAGE_MARK}\n"), Turn("assistant", "")))
        ids = torch.tensor(renderer.prompt(sample, [Size(*picture.size)]))
        pixels = processor.image_processor([picture], return_tensors="pt")["pixel_values"]
        samples.append(Encoded(sample.key, ids, torch.full_like(ids, IGNORE), pixels))
    return collate(samples, "isolated")


def run_folder_of(step: Path) -> Path:
    """The folder of the run that a step folder belongs to: its stage's, or the one above with the recipe."""
    stage = step.absolute().parent
    return stage.parent if (stage.parent / "recipe.lock.yaml").exists() else stage
