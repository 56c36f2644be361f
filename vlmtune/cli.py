"""The command line: a thin function each, everything heavy imported inside."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from vlmtune.cli_shipping import Public, Push, convert, merge, upload
from vlmtune.errors import VlmtuneError

app = typer.Typer(
    name="vlmtune",
    help="Tune LLaVA-style vision-language models: one recipe file becomes a trained, exported, evaluated model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipes/*.yaml file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe, such as run.seed=1 optim.lr=1e-4."),
]
ModelPath = Annotated[
    str, typer.Argument(metavar="MODEL", help="An exported folder, a step folder, or a hub id.")
]
FirstTurn = Annotated[
    bool,
    typer.Option(
        "--first-turn",
        help="Questions with nothing but the image before them (self_question: first_turn: true).",
    ),
]


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Move an earlier run with other settings aside instead of refusing."),
    ] = False,
) -> None:
    """Train every stage of RECIPE, export, and score. Run it again to resume; finished stages are skipped."""
    from vlmtune.config.loader import load_recipe
    from vlmtune.run import run

    report = run(load_recipe(recipe, overrides or ()), fresh=fresh)
    for line in report.lines():
        print(line)


@app.command()
def check(
    recipe: RecipePath,
    overrides: Overrides = None,
    data: Annotated[bool, typer.Option(help="Also walk the samples of every mix.")] = True,
    most: Annotated[int, typer.Option(help="Stop after this many faulty samples per mix.")] = 50,
) -> None:
    """List every fault of RECIPE and of its data at once (file:line, sample key); exit code 1 if there is one."""
    from vlmtune.config.loader import load_recipe

    recipes = load_recipe(recipe, overrides or ())
    if data:
        from vlmtune.run import check_data

        check_data(recipes, most)
    print(f"{recipe}: no fault found in {', '.join(each.stage for each in recipes)}")


@app.command()
def show(
    recipe: Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="A recipes/*.yaml file.")] = None,
    overrides: Overrides = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="The JSON Schema that editors complete with.")
    ] = False,
) -> None:
    """Print RECIPE with everything resolved, or the schema of recipes."""
    import json

    import yaml

    from vlmtune.config.loader import load_recipe, recipe_schema

    if schema:
        print(json.dumps(recipe_schema(), indent=1))
        return
    if recipe is None:
        raise typer.BadParameter("give a RECIPE, or --schema")
    for stage in load_recipe(recipe, overrides or ()):
        print(f"# stage {stage.stage}")
        print(yaml.safe_dump(stage.model_dump(mode="json"), sort_keys=False))


@app.command()
def inspect(
    recipe: RecipePath,
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(help="How many samples to show.")] = 3,
    sample: Annotated[str | None, typer.Option(help="Show the sample with this key (source#row).")] = None,
    lengths: Annotated[bool, typer.Option("--lengths", help="Also a table of the token lengths.")] = False,
) -> None:
    """Show samples of RECIPE as the model sees them: every token, what is learned in colour, images folded."""
    from vlmtune.config.loader import load_recipe
    from vlmtune.inspection import show_samples

    show_samples(load_recipe(recipe, overrides or ()), samples, sample, lengths)


@app.command("eval")
def evaluate(
    model: ModelPath,
    mix: Annotated[Path, typer.Option(help="A data_mixes/*.yaml file with the questions and answers.")],
    out: Annotated[Path | None, typer.Option(help="Folder of predictions.jsonl and metrics.json.")] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts generated together.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 64,
    limit: Annotated[int | None, typer.Option(help="Answer only the first N samples of each source.")] = None,
    questions: Annotated[
        bool,
        typer.Option("--questions", help="Score MIX's questions instead: likelihood, and need of the image."),
    ] = False,
    first_turn: FirstTurn = False,
) -> None:
    """Answer MIX with MODEL by greedy generation and score the answers.

    With --questions nothing is generated: the mean negative log likelihood of the questions in the questioner's
    turn (SQ-LLaVA), of the answers, and how much it grows with another sample's image.
    """
    if questions:
        _question_scores(model, mix, out, batch_size, limit, first_turn)
        return
    from vlmtune.run import evaluate_folder

    scores = evaluate_folder(model, mix, out, batch_size, max_new_tokens, limit)
    for line in scores.lines():
        print(line)


def _question_scores(
    model: str, mix: Path, out: Path | None, batch_size: int, limit: int | None, first_turn: bool
) -> None:
    import json

    from vlmtune.evaluation.question_scores import score_mix
    from vlmtune.run import CACHE
    from vlmtune.training.logging import progress

    with progress(f"questions of {mix.stem}") as advance:
        scores = score_mix(model, mix, CACHE, limit, first_turn, batch_size, advance)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "questions.json").write_text(json.dumps(scores.as_dict(), indent=1) + "\n")
    print(*scores.lines(), sep="\n")


@app.command()
def ask(  # noqa: PLR0913, PLR0917  # foreign: typer reads the options from the signature
    model: ModelPath,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES...", help="Pictures, or folders of them.")],
    out: Annotated[Path, typer.Option(help="The .jsonl file to write, or to go on with.")],
    number: Annotated[int, typer.Option(min=1, help="Questions drawn for each picture.")] = 3,
    answers: Annotated[
        bool, typer.Option("--answers", help="Also answer them: a line is a conversation about one picture.")
    ] = False,
    first_turn: FirstTurn = False,
    temperature: Annotated[float, typer.Option(help="Of the draws.")] = 1.2,
    top_k: Annotated[int, typer.Option(help="Draw from the K likeliest tokens.")] = 300,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that have this share.")] = 0.95,
    max_new_tokens: Annotated[int, typer.Option(help="Longest question in tokens.")] = 300,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Prompts generated together.")] = 16,
) -> None:
    """Let MODEL ask about pictures: data that `train` reads (format chat_jsonl), with a mix beside it.

    MODEL learned it by the transform self_question (SQ-LLaVA). Without --answers a line is one question in the
    questioner's turn. Run it again to go on; pictures that are in the file are skipped.
    """
    from vlmtune.evaluation.asking import Asking
    from vlmtune.evaluation.question_file import ask_pictures
    from vlmtune.training.logging import progress

    draws = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "max_new_tokens": max_new_tokens}
    asking = Asking(number, first_turn, answers, seed=seed, **draws)
    with progress("ask") as advance:
        report = ask_pictures(model, images, out, asking, batch_size, advance)
    print(*report.lines(), sep="\n")


@app.command()
def chat(
    model: ModelPath,
    question: Annotated[
        str | None, typer.Argument(help="One question; without it a conversation opens.")
    ] = None,
    image: Annotated[list[Path] | None, typer.Option(help="A picture; may be given several times.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 256,
    ask: Annotated[
        int,
        typer.Option(metavar="N", help="First let MODEL ask N questions about the pictures and answer them."),
    ] = 0,
    first_turn: FirstTurn = False,
) -> None:
    """Ask MODEL about pictures, or let it ask."""
    from vlmtune.evaluation.chat import Conversation

    talk = Conversation(model, image or [], max_new_tokens)
    for each in talk.questions(ask, first_turn) if ask else ():
        print(f"{each.text}\n  {each.answer}")
    if ask and question is None:
        return
    if question is not None:
        print(talk.ask(question))
        return
    while question := typer.prompt("you", default="", show_default=False).strip():
        print(talk.ask(question))


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A step folder of a run.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16; default: the training type.")
    ] = None,
    push: Push = None,
    public: Public = False,
) -> None:
    """Write CHECKPOINT as a Hugging Face folder, reopen it, and compare the logits before ending well."""
    from vlmtune.run import export_step

    report = export_step(checkpoint, out, dtype)
    print(f"{report.path}: reopened, {report.difference}")
    upload(out, push, public)


app.command()(merge)
app.command()(convert)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write RUN/report.md again: loss curves, scores, sample predictions, the time of each phase."""
    from vlmtune.evaluation.report import write_report

    print(write_report(run))


@app.command()
def plan(  # noqa: PLR0913, PLR0917  # foreign: typer makes an option of each parameter
    recipe: RecipePath,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="Ranks, one a GPU.")] = 8,
    memory: Annotated[str, typer.Option(help="Of one GPU, such as 80GiB or 24GB.")] = "80GiB",
    strategy: Annotated[
        str | None,
        typer.Option(help="ddp, zero1, zero2, zero3, zero3_offload, fsdp2; default: the first that fits."),
    ] = None,
    mfu: Annotated[
        float, typer.Option(help="Share of the peak that is reached, recomputation counted.")
    ] = 0.4,
    gpu_tflops: Annotated[
        float, typer.Option(help="Peak of one GPU in bfloat16 (A100: 312, H100: 989).")
    ] = 312,
    samples: Annotated[int | None, typer.Option(help="Samples of an epoch, if the mix is not here.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Numbers for programs, in bytes and seconds.")] = False,
) -> None:
    """Say before a launch what RECIPE takes: memory, batches and operations by rank, hours, the fastest that fits."""
    from vlmtune.planning.estimate import Machine
    from vlmtune.planning.plan import bytes_of, make_plans
    from vlmtune.planning.report import json_text, show

    machine = Machine(gpus, bytes_of(memory), gpu_tflops, mfu)
    plans = make_plans(recipe, overrides or (), machine, strategy, samples)
    print(json_text(plans)) if json else show(plans)


@app.command()
def vae(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Such as recipes/ross/tiny_vae.yaml.")],
    overrides: Overrides = None,
) -> None:
    """Train a small image autoencoder on the pictures of a mix: a target for objective reconstruction (Ross)."""
    from vlmtune.config.autoencoder import load_vae_recipe
    from vlmtune.run import CACHE
    from vlmtune.training.autoencoder import train_vae
    from vlmtune.training.logging import quiet_libraries

    quiet_libraries()
    one = load_vae_recipe(recipe, overrides or ())
    report = train_vae(one, CACHE)
    print(f"{one.output}: {report.pictures:,} pictures, {report.psnr:.1f} dB")


@app.command()
def reconstruct(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="STEP", help="Step folder, run (its last step), or an export beside its step."
        ),
    ],
    images: Annotated[list[Path], typer.Argument(help="Pictures to paint from what the model knows.")],
    out: Annotated[Path | None, typer.Option(help="PNG to write; default: into the run's report.md.")] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps; 1000 are the paper's DDPM, fewer DDIM.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the noise that painting begins with.")] = 0,
) -> None:
    """Write a picture grid: original, what the target holds of it, and what the denoiser of STEP paints."""
    from vlmtune.reconstruct import reconstruct_images

    print(reconstruct_images(folder, images, out, steps, seed))


@app.command()
def doctor() -> None:
    """List versions and devices, and what is on, what is off and why."""
    from vlmtune.diagnosis import lines

    for line in lines():
        print(line)


def main() -> None:
    """Runs the command line; faults of the user's making are listed, without a traceback."""
    try:
        app()
    except VlmtuneError as error:
        count = len(error.faults)
        for fault in error.faults:
            print(fault, file=sys.stderr)
        if count > 1:
            print(f"{count} faults", file=sys.stderr)
        sys.exit(1)
