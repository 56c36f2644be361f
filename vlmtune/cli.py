"""The command line: a thin function each, everything heavy imported inside."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

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
) -> None:
    """Answer MIX with MODEL by greedy generation and score the answers."""
    from vlmtune.run import evaluate_folder

    scores = evaluate_folder(model, mix, out, batch_size, max_new_tokens, limit)
    for line in scores.lines():
        print(line)


@app.command()
def chat(
    model: ModelPath,
    question: Annotated[
        str | None, typer.Argument(help="One question; without it a conversation opens.")
    ] = None,
    image: Annotated[list[Path] | None, typer.Option(help="A picture; may be given several times.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 256,
) -> None:
    """Ask MODEL about pictures."""
    from vlmtune.evaluation.chat import Conversation

    talk = Conversation(model, image or [], max_new_tokens)
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
) -> None:
    """Write CHECKPOINT as a Hugging Face folder, reopen it, and compare the logits before ending well."""
    from vlmtune.run import export_step

    report = export_step(checkpoint, out, dtype)
    print(f"{report.path}: reopened, largest logit difference {report.max_abs_diff:.2g}")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write RUN/report.md again: loss curves, scores, sample predictions, the time of each phase."""
    from vlmtune.evaluation.report import write_report

    print(write_report(run))


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
