"""The command line: parses, calls, prints."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from epmq import __version__, extension, ops
from epmq.ending import drop_output, run_to_its_end
from epmq.errors import OutputError

if TYPE_CHECKING:
    from epmq.recipe import Recipe

FOLDER = click.Path(path_type=Path)
RECIPE_HELP = "RECIPE is a YAML file, see docs/recipes.md."
FLOATS = ("float32", "float16", "bfloat16")
DEVICE = click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda or cuda:1; auto is a GPU where there is one."
)
DTYPE = click.option("--dtype", type=click.Choice(FLOATS), help="What the model runs in.  [default: the checkpoint's]")
SEED = click.IntRange(0, 2**63 - 1)


def _say(text: str, nl: bool = True) -> None:
    """Print; raises OutputError when the standard output takes no more."""
    try:
        click.echo(text, nl=nl)
    except BrokenPipeError:
        raise
    except OSError as error:
        # Nothing that waits there may be tried again at the interpreter's end.
        drop_output()
        raise OutputError(f"the standard output cannot be written ({error.strerror}); nothing else failed.") from error


@click.group(help="Merge fine-tuned experts and quantize towards them.")
@click.version_option(__version__, prog_name="epmq", message="%(prog)s %(version)s")
def app() -> None:
    extension.check()
    ops.wanted_backend()


MERGEKIT = click.option("--mergekit", type=FOLDER, help="A mergekit configuration, instead of RECIPE.")


@app.command(help=f"Write the merged model of a recipe. {RECIPE_HELP}")
@click.argument("recipe", type=FOLDER, required=False)
@MERGEKIT
@click.option("--out", required=True, type=FOLDER, help="New folder for the merged model.")
def merge(recipe: Path | None, mergekit: Path | None, out: Path) -> None:
    from epmq.merge_jobs import merge_to_folder

    if _stands_by():
        return
    merge_to_folder(_recipe(recipe, mergekit, ()), out)
    _say(f"merged model in {out}")


@app.command(help=f"Merge and quantize in one go; the merged model is not written. {RECIPE_HELP}")
@click.argument("recipe", type=FOLDER, required=False)
@MERGEKIT
@click.option("--calibration", multiple=True, metavar="EXPERT=FILE", help="With --mergekit: an expert's texts (jsonl).")
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
def quantize(
    recipe: Path | None,
    mergekit: Path | None,
    calibration: tuple[str, ...],
    out: Path,
    resume: bool,
    statistics: tuple[Path, ...],
    dry_run: bool,
) -> None:
    from epmq.jobs import estimate_job, quantize_to_folder, summary
    from epmq.statistics_jobs import estimate_statistics_job, quantize_statistics_to_folder

    if statistics and resume:
        raise click.UsageError("--resume and --statistics do not go together: such a run is short and begins anew.")
    job = _recipe(recipe, mergekit, calibration)
    if dry_run:
        told = estimate_statistics_job(job, statistics, out) if statistics else estimate_job(job, out, resume)
        if not _stands_by():
            _say(told)
        return
    tell = (lambda line: click.echo(line, err=True)) if sys.stderr.isatty() else lambda line: None
    if statistics:
        report = quantize_statistics_to_folder(job, statistics, out)
    else:
        report = quantize_to_folder(job, out, resume, tell)
    if report:
        _say("\n".join(summary(report)))
        _say(f"quantized model, report.json and report.html in {out}")


@app.command(help=f"Gather what quantize --statistics needs of one expert and its data. {RECIPE_HELP}")
@click.argument("recipe", type=FOLDER)
@click.option("--task", required=True, help="Task of the recipe whose expert and data to take.")
@click.option("--out", required=True, type=FOLDER, help="New folder for the statistics.")
def collect(recipe: Path, task: str, out: Path) -> None:
    from epmq.recipe import read_recipe
    from epmq.statistics_jobs import collect_to_folder

    if _stands_by():
        return
    collect_to_folder(read_recipe(recipe), task, out)
    _say(f"statistics of {task} in {out}")


def _stands_by() -> bool:
    """Whether this is one of several processes of which the first does all the work."""
    from epmq.world import world

    return not world().main


def _recipe(recipe: Path | None, mergekit: Path | None, calibration: tuple[str, ...]) -> Recipe:
    from epmq.recipe import read_recipe, recipe_of_mergekit

    if (recipe is None) == (mergekit is None):
        raise click.UsageError("Give either RECIPE or --mergekit FILE.")
    if mergekit is None:
        assert recipe is not None
        if calibration:
            raise click.UsageError("--calibration belongs to --mergekit; a recipe has a calibration: section.")
        return read_recipe(recipe)
    texts: dict[str, Path] = {}
    for entry in calibration:
        name, _, file = entry.partition("=")
        if not name or not file:
            raise click.UsageError("--calibration expects EXPERT=FILE.")
        if name in texts:
            raise click.UsageError(f"--calibration: expert {name!r} is given twice; give one file for each.")
        texts[name] = Path(file)
    return recipe_of_mergekit(mergekit, texts)


@app.command(name="eval")
@click.argument("model", type=FOLDER)
@click.option("--recipe", type=FOLDER, help="Recipe with an evaluation: section: accuracy per task.")
@click.option("--text", type=FOLDER, help="Text file: perplexity of a causal language model on it.")
@click.option("--window", type=int, help="Tokens read at once for --text.  [default: 2048, or what the model reads]")
@click.option("--stride", type=int, help="Tokens from one window to the next.  [default: the window]")
@click.option("--lm-eval", "tasks", help="Tasks of lm-eval, with commas between them (pip install 'epmq[lm-eval]').")
@click.option("--include", type=FOLDER, help="Folder with lm-eval tasks of your own.")
@click.option("--limit", type=click.IntRange(1), help="Only so many examples per task of lm-eval.")
@click.option("--json", "json_file", type=FOLDER, help="Also write the result to this file.")
@DEVICE
@DTYPE
def evaluate(
    model: Path,
    recipe: Path | None,
    text: Path | None,
    window: int | None,
    stride: int | None,
    tasks: str | None,
    include: Path | None,
    limit: int | None,
    json_file: Path | None,
    device: str,
    dtype: str | None,
) -> None:
    """Score MODEL, a quantized or plain checkpoint folder, by one of --recipe, --text and --lm-eval."""
    from epmq.files import check_file, write_text
    from epmq.world import world

    if sum(choice is not None for choice in (recipe, text, tasks)) != 1:
        raise click.UsageError("give one of --recipe, --text and --lm-eval.")
    if text is None and (window is not None or stride is not None):
        raise click.UsageError("--window and --stride belong to --text.")
    if tasks is None and (include is not None or limit is not None):
        raise click.UsageError("--include and --limit belong to --lm-eval.")
    if json_file is not None:
        check_file(json_file)
    if recipe is not None:
        from epmq.evaluate import markdown_table
        from epmq.recipe import read_recipe
        from epmq.scoring import evaluate_folder

        result = evaluate_folder(read_recipe(recipe), model, device, dtype)
        told = [markdown_table([result])]
    elif text is not None:
        from epmq.language import text_perplexity

        result = text_perplexity(model, text, window, stride, device, dtype)
        line = "perplexity {perplexity:.4f} ({scored} of {tokens} tokens scored, window {window}, stride {stride})"
        told = [line.format(**result)]
    else:
        from epmq.harness import lines, run_tasks

        result = run_tasks(
            model,
            [name.strip() for name in str(tasks).split(",")],
            include,
            limit,
            device=device,
            dtype=dtype,
        )
        told = lines(result)
    if not world().main:
        return
    _say("\n".join(told))
    if json_file is not None:
        write_text(json_file, json.dumps(result, indent=1) + "\n")


@app.command()
@click.argument("folder", type=FOLDER)
@click.argument("wide", type=FOLDER)
@click.option("--out", required=True, type=FOLDER, help="New GGUF file.")
@click.option(
    "--embeddings", type=click.Choice(["q8_0"], case_sensitive=False), help="Round embeddings and head to it too."
)
def gguf(folder: Path, wide: Path, out: Path, embeddings: str | None) -> None:
    """Put the codes of FOLDER, a quantized checkpoint, into WIDE, the 16- or 32-bit GGUF file that llama.cpp's
    convert_hf_to_gguf.py makes of it. llama-quantize would round the weights anew; here they keep their codes."""
    from epmq.gguf_jobs import gguf_file

    if _stands_by():
        return
    _say("\n".join(gguf_file(folder, wide, out, "Q8_0" if embeddings else None).lines()))
    _say(f"GGUF file in {out}")


@app.command(help="Train a small vision transformer and experts on digits, merge, quantize, print the table.")
@click.option("--out", default=Path("demo"), type=FOLDER, show_default=True, help="New folder for all results.")
@click.option("--seed", default=0, show_default=True, type=SEED, help="Seed of data, training and calibration.")
def demo(out: Path, seed: int) -> None:
    from epmq.demo import run_demo
    from epmq.evaluate import markdown_table

    if _stands_by():
        return
    _say(markdown_table(run_demo(out, seed)["rows"]))
    _say(f"int4 checkpoint, report.html, report.json, results.json and accuracy.png in {out}")


@app.command(
    help="Make FOLDER/report.html from the report.json (and results.json) there: one page, to look at anywhere."
)
@click.argument("folder", type=FOLDER)
def report(folder: Path) -> None:
    from epmq.page.document import write_page

    _say(f"report in {write_page(folder)}")


@app.command(help="Continue a prompt with the causal language model in FOLDER; tokens per second go to stderr.")
@click.argument("folder", type=FOLDER)
@click.option("--prompt", required=True, help="The text to continue, used as it is.")
@click.option("--max-new-tokens", default=128, show_default=True, help="At most so many.")
@click.option("--temperature", default=0.0, show_default=True, help="0 takes the likeliest token, above draws.")
@click.option("--seed", default=0, show_default=True, type=SEED, help="Seed of the drawing.")
@DEVICE
@DTYPE
def generate(
    folder: Path, prompt: str, max_new_tokens: int, temperature: float, seed: int, device: str, dtype: str | None
) -> None:
    from epmq.language import generate_text

    def write(piece: str) -> None:
        _say(piece, nl=False)

    speed = generate_text(folder, prompt, write, max_new_tokens, temperature, seed, device, dtype)
    click.echo("\n".join(speed.lines()), err=True)


@app.command()
@click.option("--shape", "shapes", default="4096x4096,11008x4096", show_default=True, help="OUTxIN, with commas.")
@click.option("--tokens", default="1,16,256", show_default=True, help="Rows of the input, with commas.")
@click.option("--bits", default=4, show_default=True)
@click.option("--group-size", default=128, show_default=True)
@click.option("--dtype", default="float32", show_default=True, type=click.Choice(FLOATS))
@click.option("--device", default="cpu", show_default=True)
@click.option("--seconds", default=1.0, show_default=True, type=click.FloatRange(0, 3600), help="Time for each line.")
def bench(shapes: str, tokens: str, bits: int, group_size: int, dtype: str, device: str, seconds: float) -> None:
    """Time QuantLinear beside the dense nn.Linear on this machine, interleaved. In a checkout, make bench times every
    operation against its rivals."""
    import torch

    from epmq.bench import parse_counts, parse_shapes, time_layers
    from epmq.report import machine

    layers, counts = parse_shapes(shapes), parse_counts(tokens)
    wanted: torch.dtype = getattr(torch, dtype)
    times = time_layers(layers, counts, bits, group_size, wanted, device, seconds)
    facts = machine()
    _say(f"{facts['processor']}, {facts['threads']} threads, torch {facts['torch']}, {device}, {dtype}")
    _say("| out | in | tokens | quantized, ms | dense, ms | speed-up | weight, quantized / dense |")
    _say("|---|---|---|---|---|---|---|")
    for row in times:
        _say(
            f"| {row.rows} | {row.columns} | {row.tokens} | {row.quantized_ms:.3f} | {row.dense_ms:.3f}"
            f" | {row.dense_ms / row.quantized_ms:.2f} | {row.quantized_bytes / row.dense_bytes:.3f} |"
        )


@app.command(help="Measure a paper's benchmark and print its table beside the published one; see docs/families.md.")
@click.argument("paper", type=FOLDER)
@click.option(
    "--out", required=True, type=FOLDER, help="Folder of the results; rows that are there are not made again."
)
@click.option("--device", default="cpu", show_default=True, help="Where models are scored, such as cuda.")
@click.option("--table", is_flag=True, help="Only print the table of what is there.")
def paper(paper: Path, out: Path, device: str, table: bool) -> None:
    from epmq.papers.run import read_results, run_paper, tables
    from epmq.papers.settings import read_paper

    if _stands_by():
        return
    settings = read_paper(paper)
    results = read_results(settings, out) if table else run_paper(settings, out, device)
    _say(tables(settings, results))


@app.command(help="Tell versions, the machine, and which implementation of each operation is used.")
def env() -> None:
    from epmq.environment import describe

    _say("\n".join(describe()))


@app.command(help="Time the int4 kernels on this GPU for layers of a size and keep the fastest configurations.")
@click.option("--shape", "shapes", multiple=True, required=True, metavar="NxK", help="Output by input features.")
@click.option("--tokens", multiple=True, type=int, default=(1, 16, 64, 256, 1024, 4096), show_default=True)
@click.option("--group-size", default=128, show_default=True, help="32, 64, a multiple of 128, or -1 for the row.")
@click.option("--dtype", default="bf16", show_default=True, type=click.Choice(["fp16", "bf16"]))
def tune(shapes: tuple[str, ...], tokens: tuple[int, ...], group_size: int, dtype: str) -> None:
    from epmq.kernels.tune import tune_command

    _say("\n".join(tune_command(shapes, tokens, group_size, dtype)))


def main() -> None:
    """Entry point: refusals are one sentence on stderr and exit status 2; an interruption is 130, SIGTERM 143."""
    # Of several processes that do the same, one tells.
    level = logging.WARNING if os.environ.get("RANK", "0") == "0" else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # What the terminal's encoding lacks is written as on stderr.
        sys.stdout.reconfigure(errors="backslashreplace")
    run_to_its_end(app)


if __name__ == "__main__":
    main()
