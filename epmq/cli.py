"""The command line: parses, calls, prints."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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
@click.option("--resume", is_flag=True, help="Go on with a run that was cut off; see docs/running.md.")
@click.option(
    "--statistics",
    "statistics",
    multiple=True,
    type=FOLDER,
    help="Folder made by collect, one per expert; no data are read.",
)
@click.option("--dry-run", is_flag=True, help="Tell what it would take in time, memory and disk, and stop.")
def quantize(recipe: Path, out: Path, resume: bool, statistics: tuple[Path, ...], dry_run: bool) -> None:
    from epmq.jobs import estimate_job, quantize_to_folder, summary
    from epmq.recipe import read_recipe
    from epmq.statistics_jobs import quantize_statistics_to_folder

    if dry_run:
        click.echo(estimate_job(read_recipe(recipe), out))
        return
    if statistics and resume:
        raise click.UsageError("--resume and --statistics do not go together: such a run is short and begins anew.")
    told = (lambda line: click.echo(line, err=True)) if sys.stderr.isatty() else lambda line: None
    if statistics:
        report = quantize_statistics_to_folder(read_recipe(recipe), statistics, out)
    else:
        report = quantize_to_folder(read_recipe(recipe), out, resume, told)
    if report:
        click.echo("\n".join(summary(report)))
        click.echo(f"quantized model and report.json in {out}")


@app.command(help=f"Gather what quantize --statistics needs of one expert and its data. {RECIPE_HELP}")
@click.argument("recipe", type=FOLDER)
@click.option("--task", required=True, help="Task of the recipe whose expert and data to take.")
@click.option("--out", required=True, type=FOLDER, help="New folder for the statistics.")
def collect(recipe: Path, task: str, out: Path) -> None:
    from epmq.recipe import read_recipe
    from epmq.statistics_jobs import collect_to_folder

    collect_to_folder(read_recipe(recipe), task, out)
    click.echo(f"statistics of {task} in {out}")


@app.command(name="eval", help="Score MODEL, a quantized or plain checkpoint folder, on a recipe's evaluation tasks.")
@click.argument("model", type=FOLDER)
@click.option("--recipe", required=True, type=FOLDER, help="Recipe with an evaluation: section.")
@click.option("--json", "json_file", type=FOLDER, help="Also write the row to this file.")
def evaluate(model: Path, recipe: Path, json_file: Path | None) -> None:
    from epmq.evaluate import markdown_table
    from epmq.files import write_text
    from epmq.jobs import evaluate_folder
    from epmq.recipe import read_recipe
    from epmq.world import world

    result = evaluate_folder(read_recipe(recipe), model)
    if not world().main:
        return
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


class _Terminated(KeyboardInterrupt):
    """SIGTERM, ended as orderly as an interruption."""


def _terminate(signum: int, frame: object) -> None:
    raise _Terminated


@contextmanager
def _orderly_end() -> Iterator[None]:
    """While active, SIGTERM raises; once anything has ended the run, what is said of it is not cut off by a signal."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _heed_no_signal() -> None:
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)


def main() -> None:
    """Entry point: refusals are one sentence on stderr and exit status 2; an interruption is 130, SIGTERM 143."""
    # Of several processes that do the same, one tells.
    level = logging.WARNING if os.environ.get("RANK", "0") == "0" else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s")
    with _orderly_end():
        _run()


def _run() -> None:
    try:
        app(standalone_mode=False)
    except EpmqError as error:
        _heed_no_signal()
        _tell(str(error), error)
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort) as error:
        _heed_no_signal()
        # click turns an interruption into an Abort.
        cause = error.__cause__ or error
        ended = "terminated" if isinstance(cause, _Terminated) else "interrupted"
        _tell(f"{ended}." if hasattr(cause, "__notes__") else f"{ended}; nothing half-written was left.", cause)
        sys.exit(143 if isinstance(cause, _Terminated) else 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    _leave_the_others()


def _tell(message: str, error: BaseException) -> None:
    """One line about what ended the run and what is left of it, by one of its processes."""
    if "RANK" in os.environ:
        from epmq.world import world

        if isinstance(error, KeyboardInterrupt):
            # What started the processes ends those that are left when one has died.
            message = world().lost() or message
        if not world().speaks(message):
            return
    line = " ".join([message, *getattr(error, "__notes__", [])])
    print(f"epmq: {line}", file=sys.stderr)


def _leave_the_others() -> None:
    if "RANK" in os.environ:
        from epmq.world import world

        world().close()


if __name__ == "__main__":
    main()
