"""The commands that merge, convert and upload models: a part of the command line, as thin as the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Push = Annotated[
    str | None, typer.Option(metavar="REPO", help="Then upload the folder to this hub repository.")
]
Public = Annotated[bool, typer.Option("--public", help="Make the repository public; private otherwise.")]


def upload(folder: Path, repo: str | None, public: bool) -> None:
    """Uploads a finished folder, if a repository is named."""
    from vlmtune.shipping import push

    if repo is not None:
        typer.echo(push(folder, repo, not public))


def merge(  # noqa: PLR0913, PLR0917  # foreign: typer makes an option of each parameter
    paths: Annotated[
        list[Path], typer.Argument(metavar="MODEL... OUT", help="Folders to merge, and the folder to write.")
    ],
    method: Annotated[
        str | None,
        typer.Option(help="average, slerp, ties, dare or copy, for parts that --part does not name."),
    ] = None,
    part: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PART=METHOD", help="Method of vision, projector or language: language=ties,density=0.3."
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="One for each model: 0.3,0.7. Averages divide them by their sum.")
    ] = None,
    ema: Annotated[
        float | None, typer.Option(help="Moving average over a run's steps with this decay, such as 0.9.")
    ] = None,
    t: Annotated[float | None, typer.Option("--t", help="slerp: 0 is the first model, 1 the second.")] = None,
    base: Annotated[
        Path | None, typer.Option(help="ties, dare: the folder that all models were tuned from.")
    ] = None,
    density: Annotated[float | None, typer.Option(help="ties, dare: share of changes kept (0.2).")] = None,
    scale: Annotated[float | None, typer.Option(help="ties, dare: factor of the merged change (1).")] = None,
    seed: Annotated[int | None, typer.Option(help="dare: of its draws (0).")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16; default: the first model's.")] = None,
    shard_size: Annotated[float | None, typer.Option(help="Largest file in GB (5).")] = None,
    probe: Annotated[
        bool, typer.Option(help="Open the result and run it once: takes memory for the whole model.")
    ] = True,
    push: Push = None,
    public: Public = False,
) -> None:
    """Merge the adapters of one step folder into its weights, or several models into one.

    One folder and no method: its LoRA, DoRA or QLoRA adapters and every part trained whole become plain weights.

        vlmtune merge runs/x/step_000500 merged

    Several: exports or step folders of one architecture and vocabulary; a run's folder stands for all its steps.
    They are read tensor by tensor, in memory of less than two files (--no-probe leaves out the one run that needs
    the whole model). Config, tokenizer and chat template are those of the first.

        vlmtune merge a b soup --method average --weights 0.3,0.7

        vlmtune merge runs/x soup --ema 0.9

        vlmtune merge a b both --part language=ties,density=0.2 --part projector=average --part vision=copy --base llava
    """
    from vlmtune import shipping

    *models, out = paths
    how = shipping.Merging(method, part or (), base, weights, ema, t, density, scale, seed)
    typer.echo(shipping.merge(models, out, how, dtype, shard_size, probe))
    upload(out, push, public)


def convert(  # foreign: typer makes an option of each parameter
    path: Annotated[Path, typer.Argument(metavar="IN", help="A folder of either layout.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[str | None, typer.Option(help="hf or llava; default: the other one.")] = None,
    base: Annotated[
        Path | None, typer.Option(help="The language model of a folder with LoRA or a projector alone.")
    ] = None,
    vision_tower: Annotated[
        str | None,
        typer.Option(help="Into hf: where the tower is. Into llava: its name in the config."),
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="Into hf: chat template, such as vicuna_v1; default: the tokenizer's.")
    ] = None,
    push: Push = None,
    public: Public = False,
) -> None:
    """Turn a model in the layout of the original LLaVA code into a llava of transformers, or back.

    Both layouts compute the same samples, and the largest difference of a logit is written into the manifest.

        vlmtune convert llava-v1.5-7b llava-hf --template vicuna_v1

        vlmtune convert llava-v1.5-7b-lora merged-hf --base vicuna-7b-v1.5 --template vicuna_v1

        vlmtune convert runs/x/export original --vision-tower openai/clip-vit-large-patch14-336
    """
    from vlmtune import shipping

    typer.echo(shipping.convert(path, out, to, base, vision_tower, template))
    upload(out, push, public)
