"""The command line: parses, calls, prints."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

import click

from epmq.errors import EpmqError

FOLDER = click.Path(path_type=Path)
RECIPE_HELP = "RECIPE is a YAML file, see docs/recipes.md."


@click.group(help="Merge fine-tuned experts and quantize towards them.")
def app() -> None:
    pass


@app.command(help=f"Write the merged model of a recipe. {RECIPE_HELP}")
@click.argument("recipe", type=FOLDER)
@click.option("--out", required=True, type=FOLDER, help="New folder for the merged model.")
def merge(recipe: Path, out: Path) -> None:
    from epmq.jobs import merge_to_folder
    from epmq.recipe import read_recipe

    merge_to_folder(read_recipe(recipe), out)
    click.echo(f"merged model in {out}")


@app.command(help=f"Merge and quantize in one go; the merged model is not written. {RECIPE_HELP}")
@click.argument("recipe", type=FOLDER)
@click.option("--out", required=True, type=FOLDER, help="New folder for the quantized model.")
def quantize(recipe: Path, out: Path) -> None:
    from epmq.jobs import quantize_to_folder, summary
    from epmq.recipe import read_recipe

    report = quantize_to_folder(read_recipe(recipe), out)
    click.echo("\n".join(summary(report)))
    click.echo(f"quantized model and report.json in {out}")


@app.command(name="eval", help="Score MODEL, a quantized or plain checkpoint folder, on a recipe's evaluation tasks.")
@click.argument("model", type=FOLDER)
@click.option("--recipe", required=True, type=FOLDER, help="Recipe with an evaluation: section.")
@click.option("--json", "json_file", type=FOLDER, help="Also write the row to this file.")
def evaluate(model: Path, recipe: Path, json_file: Path | None) -> None:
    from epmq.evaluate import markdown_table
    from epmq.files import write_text
    from epmq.jobs import evaluate_folder
    from epmq.recipe import read_recipe

    result = evaluate_folder(read_recipe(recipe), model)
    click.echo(markdown_table([result]))
    if json_file is not None:
        write_text(json_file, json.dumps(result, indent=1))


@app.command(help="Train a small vision transformer and experts on digits, merge, quantize, print the table.")
@click.option("--out", default=Path("demo"), type=FOLDER, show_default=True, help="New folder for all results.")
@click.option("--seed", default=0, show_default=True, help="Seed of data, training and calibration.")
def demo(out: Path, seed: int) -> None:
    from epmq.demo import run_demo

    run_demo(out, seed)


@app.command(help="Tell versions, the machine, and which implementation of each operation is used.")
def env() -> None:
    from epmq.environment import describe

    click.echo("\n".join(describe()))


@app.command(help="Time the int4 kernels on this GPU for layers of a size and keep the fastest configurations.")
@click.option("--shape", "shapes", multiple=True, required=True, metavar="NxK", help="Output by input features.")
@click.option("--tokens", multiple=True, type=int, default=(1, 16, 64, 256, 1024, 4096), show_default=True)
@click.option("--group-size", default=128, show_default=True, help="32, 64, a multiple of 128, or -1 for the row.")
@click.option("--dtype", default="bf16", show_default=True, type=click.Choice(["fp16", "bf16"]))
def tune(shapes: tuple[str, ...], tokens: tuple[int, ...], group_size: int, dtype: str) -> None:
    from epmq.kernels.tune import tune_command

    click.echo("\n".join(tune_command(shapes, tokens, group_size, dtype)))


def main() -> None:
    """Entry point: refusals are one sentence on stderr and exit status 2, an interruption is 130."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        app(standalone_mode=False)
    except EpmqError as error:
        print(f"epmq: {error}", file=sys.stderr)
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        print("epmq: interrupted; nothing half-written was left.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
