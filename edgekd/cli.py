"""The `edgekd` command: each verb reads its options, calls one function, and prints what came back."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgekd import __version__
from edgekd.errors import EdgekdError
from edgekd.processes import here, silent

if TYPE_CHECKING:
    from edgekd.recipe import Recipe
    from edgekd.types import Say

DONE, USER_ERROR, NO_VARIANT, INTERRUPTED = 0, 2, 3, 130
Command = TypeVar("Command", bound=Callable[..., Any])


class Group(click.Group):
    """Lists the verbs in the order of the work, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names as they were added."""
        return list(self.commands)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="edgekd")
def cli() -> None:
    """Turn a trained PyTorch model into one that runs well on an edge device, and prove it.

    Exit codes: 0 done; 2 something you can fix; 3 done, but no variant meets the budget; 130 interrupted
    (the same command goes on where it stopped).
    """


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(function: Command) -> Command:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


_targets = click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="NAME",
    help="Platform, or a path to its TOML file; may be given several times.",
)
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document as the last thing on stdout.")
_quick = click.option("--quick", is_flag=True, help="A tenth of the epochs and short measurements: to try things out.")
_verbose = click.option("-v", "--verbose", is_flag=True, help="Show every event.")
_threads = click.option(
    "--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads that latency is measured with."
)
_store = click.option(
    "--store",
    type=click.Path(path_type=Path),
    envvar="EDGEKD_STORE",
    default=Path(".edgekd"),
    show_default=True,
    help="Folder of finished builds, reused by later runs.",
)
_seed = click.option("--seed", type=int, help="Instead of the recipe's.")
_budget = _options(
    click.option(
        "--max-drop", metavar="FRACTION", help="Accuracy that may be lost against the teacher, e.g. 0.01 or 1%."
    ),
    click.option("--max-latency", metavar="TIME", help="Median latency of one sample, e.g. 5ms."),
    click.option("--max-size", metavar="SIZE", help="Size of the model file, e.g. 4MB."),
    click.option("--max-memory", metavar="SIZE", help="Peak memory of inference, as measured on this machine."),
)
_time_budget = click.option(
    "--time-budget", metavar="TIME", help="Wall-clock bound of the run, e.g. 20m: what does not fit is left out."
)
_search = _options(
    click.option("--search", "search", type=int, metavar="N", help="Try N students: widths, or how much is pruned."),
    click.option(
        "--search-epochs", type=int, metavar="N", help="Epochs of a candidate; those on the front are trained in full."
    ),
    click.option(
        "--search-storage", metavar="PLACE",
        help="File or database URL of the search, for several processes to join; left out: a file beside the report.",
    ),
)  # fmt: skip


@cli.command()
@click.argument("data", required=False, default="images")
@click.option(
    "--recipe",
    "path",
    type=click.Path(path_type=Path),
    default=Path("edgekd.toml"),
    show_default=True,
    help="File to write.",
)
@click.option("--name", default=None, help="Name of the run; left out: the data folder's name.")
@click.option("--teacher", default="resnet56", show_default=True, help="Teacher model.")
@click.option("--student", default="resnet8", show_default=True, help="Student model.")
@click.option("--target", default="jetson", show_default=True, help="Target that the recipe's comment names.")
def init(data: str, path: Path, name: str | None, teacher: str, student: str, target: str) -> None:
    """Write a recipe for your own model and DATA, a folder (or zip) of images."""
    from edgekd.starter import init as write

    write(path, name=name or Path(data).stem or "model", data=data, teacher=teacher, student=student, target=target)
    click.echo(f"{path} is written; edit it, then: edgekd compress --target {target}", err=True)


@cli.command()
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@_targets
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder of the results; left out: runs/<name>.")
@_store
@_seed
@_budget
@_time_budget
@_search
@_threads
@_quick
@_json
@_verbose
def compress(
    recipe: Path | None, targets: tuple[str, ...], out: Path | None, store: Path, seed: int | None,
    time_budget: str | None, search: int | None, search_epochs: int | None, search_storage: str | None,
    threads: int, quick: bool, as_json: bool, verbose: bool, **limits: str | None,
) -> int:  # fmt: skip
    """Distil, export, quantize, check, measure, report and bundle, as RECIPE says.

    Left out, RECIPE is ./edgekd.toml; where there is none, the built-in recipe runs on handwritten digits.
    """
    from edgekd import target as target_files
    from edgekd import units
    from edgekd.clock import Deadline
    from edgekd.recipe import overridden, search_of
    from edgekd.store import make_folder

    deadline = Deadline(None if time_budget is None else units.seconds(time_budget, "--time-budget"))
    plan = search_of(search, search_epochs, search_storage)
    read = overridden(_recipe(recipe), seed=seed, **limits)
    found = [target_files.load(name) for name in (targets or ("host",))]
    wanted = list({target.name: target for target in found}.values())  # one named twice is made once
    folder = make_folder(out or Path("runs") / read.name)
    with _told_in(folder / "log.jsonl", verbose) as say:
        if recipe is None and read.source == "built-in recipe":
            say("note", text="no edgekd.toml here: the built-in recipe runs; `edgekd init` writes one of your own")
        how: dict[str, Any] = {"store": store, "threads": threads, "quick": quick, "deadline": deadline, "say": say}
        if plan is None:
            from edgekd.pipeline import compress as run

            report = run(read, wanted, folder, **how)
        else:
            from edgekd.search.run import search as run_search

            report = run_search(read, wanted, folder, plan=plan, **how)
    return _told(report, folder, as_json)


@cli.command()
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder of the results; left out: runs/<name>.")
@_store
@_seed
@_quick
@_json
@_verbose
def distill(
    recipe: Path | None, out: Path | None, store: Path, seed: int | None, quick: bool, as_json: bool, verbose: bool
) -> int:
    """Train the teachers and the student of RECIPE, and nothing else: student.safetensors and distill.json.

    It takes what `compress` takes, and recipes of several tasks as well.
    """
    from edgekd import target as target_files
    from edgekd.recipe import overridden
    from edgekd.store import make_folder

    read = overridden(_recipe(recipe), seed=seed)
    folder = make_folder(out or Path("runs") / read.name)
    with _told_in(folder / "log.jsonl", verbose) as say:
        from edgekd.pipeline import distill as run
        from edgekd.pipeline import distilled_text

        found = run(read, folder, store=store, quick=quick, say=say, targets=[target_files.load("host")])
    if here().first:
        click.echo(distilled_text(found, folder), err=True)
    if here().first and as_json:
        click.echo(json.dumps(found, indent=1))
    return DONE


@cli.command()
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@click.option("--macs", metavar="FRACTION", help="Multiply-accumulates to keep, e.g. 50%.")
@click.option("--parameters", metavar="FRACTION", help="Parameters to keep, e.g. 30%.")
@click.option("--size", metavar="SIZE", help="Of the fp32 weights file, at most, e.g. 2MB.")
@click.option("--latency", metavar="TIME", help="Of one sample in fp32 on one thread here, at most, e.g. 2ms.")
@_targets
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder of the results; left out: runs/<name>.")
@_store
@_seed
@_quick
@_json
@_verbose
def prune(
    recipe: Path | None, macs: str | None, parameters: str | None, size: str | None, latency: str | None,
    targets: tuple[str, ...], out: Path | None, store: Path, seed: int | None, quick: bool, as_json: bool,
    verbose: bool,
) -> int:  # fmt: skip
    """Cut a student out of the teacher of RECIPE, and distil it: student.safetensors, its shapes, and prune.json.

    A goal given here counts instead of the recipe's [prune]; the recipe's own student is left out where it is another
    network. Channels are kept in multiples that the kernels of the targets like.
    """
    from edgekd import recipe as recipes
    from edgekd import target as target_files
    from edgekd.goals import goals_of
    from edgekd.store import make_folder

    read = recipes.overridden(_recipe(recipe), seed=seed)
    read = recipes.pruned(read, goals_of(macs, parameters, size, latency))
    wanted = [target_files.load(name) for name in (targets or ("host",))]
    folder = make_folder(out or Path("runs") / read.name)
    with _told_in(folder / "log.jsonl", verbose) as say:
        from edgekd.pipeline import distill as run
        from edgekd.pipeline import distilled_text

        name = "prune.json"
        found = run(read, folder, store=store, quick=quick, say=say, targets=wanted, name=name)
    if here().first:
        click.echo(distilled_text(found, folder, name), err=True)
    if here().first and as_json:
        click.echo(json.dumps(found, indent=1))
    return DONE


@cli.command()
@click.argument("source", required=False, type=click.Path(path_type=Path), metavar="[RECIPE | MODEL.onnx]")
@_targets
@click.option(
    "--data", type=click.Path(path_type=Path), help="Of an .onnx file: samples (folder or zip of images, .npz)."
)
@click.option("--mean", metavar="NUMBERS", help="Of an .onnx file that takes float images: 0.485,0.456,0.406.")
@click.option("--std", metavar="NUMBERS", help="The same: 0.229,0.224,0.225, of values in [0, 1].")
@click.option("--precision", "precisions", multiple=True, help="What to make; left out: what the target allows.")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path),
    help="Folder of the results; left out: runs/<name>-quantized, of an .onnx file runs/<name>.",
)  # fmt: skip
@_store
@_seed
@_budget
@_threads
@_quick
@_json
@_verbose
def quantize(
    source: Path | None, targets: tuple[str, ...], data: Path | None, mean: str | None, std: str | None,
    precisions: tuple[str, ...], out: Path | None, store: Path, seed: int | None, threads: int, quick: bool,
    as_json: bool, verbose: bool, **limits: str | None,
) -> int:  # fmt: skip
    """Quantize a trained model as it is, without a student: the [teacher] of RECIPE, or MODEL.onnx with --data.

    What is made is checked, measured beside the float model and reported; quantize.json says how it was made.
    """
    from edgekd import target as target_files
    from edgekd.alone import asked, quantize_alone
    from edgekd.store import make_folder

    order = asked(source, data=data, mean=mean, std=std, precisions=precisions, seed=seed, **limits)
    found = [target_files.load(name) for name in dict.fromkeys(targets or ("host",))]
    folder = make_folder(out or Path("runs") / order.run)
    with _told_in(folder / "log.jsonl", verbose) as say:
        report = quantize_alone(order, found, folder, store=store, threads=threads, quick=quick, say=say)
    return _told(report, folder, as_json)


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("others", nargs=-1, type=click.Path(path_type=Path))
@_threads
@_quick
@_json
@_verbose
def bench(model: Path, others: tuple[Path, ...], threads: int, quick: bool, as_json: bool, verbose: bool) -> int:
    """Measure MODEL (an .onnx file, a bundle or a run folder) on this machine; several are measured interleaved."""
    from edgekd.bench.command import bench as run
    from edgekd.progress import Progress

    with Progress(verbose=verbose) as say:
        result = run([model, *others], threads=threads, quick=quick, say=say)
    click.echo(json.dumps(result.as_json(), indent=1) if as_json else result.as_text())
    return DONE


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@_budget
@_json
def report(run: Path, as_json: bool, **limits: str | None) -> int:
    """Write the report of RUN (a run folder) anew, e.g. against another budget. Nothing is built or measured.

    Limits that are left out are those of the run's recipe, whatever the report was written for last.
    """
    from edgekd import report as reports
    from edgekd.recipe import budget_in, budget_of

    found = reports.load(run / "report.json")
    found = reports.rejudged(found, budget_of(budget_in(run, found.budget), **limits))
    reports.render(found, run)
    return _told(found, run, as_json)


@cli.command()
@click.argument("name", required=False)
@_json
def targets(name: str | None, as_json: bool) -> None:
    """List the targets, or tell all about the target NAME."""
    from edgekd import target as target_files

    found = [target_files.load(name)] if name else [target_files.load(each) for each in target_files.names()]
    click.echo(
        json.dumps([target_files.as_json(t) for t in found], indent=1) if as_json else target_files.as_text(found)
    )


@cli.command()
@_json
def doctor(as_json: bool) -> None:
    """Tell what this machine has: versions, processor, runtimes, and what each target can do here."""
    from edgekd.doctor import examine

    found = examine()
    click.echo(json.dumps(found.as_json(), indent=1) if as_json else found.as_text())


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    help="Port on this machine; 0 takes a free one.",
)
@click.option("--browse/--no-browse", default=True, help="Open a browser window.")
def view(model: Path, port: int, browse: bool) -> None:
    """Look at MODEL (an .onnx file, a bundle or a run folder) in Netron; Ctrl-C ends it."""
    from edgekd.view import view as show

    show(model, port=port, browse=browse)


@cli.group()
def bundle() -> None:
    """Work on a bundle: the folder that an app embeds."""


@bundle.command()
@click.argument("folder", type=click.Path(path_type=Path))
@_json
def verify(folder: Path, as_json: bool) -> int:
    """Check FOLDER: every file by its hash, the manifest, and the golden samples where the runtime is here."""
    from edgekd.bundle import verify as check

    found = check(folder)
    if as_json:
        click.echo(json.dumps(asdict(found) | {"sound": found.sound}, indent=1))
    else:
        click.echo("\n".join([*map(str, found.findings), *found.skipped, f"{found.files} files checked"]))
    return DONE if found.sound else USER_ERROR


def _recipe(path: Path | None) -> Recipe:
    from edgekd import recipe
    from edgekd.starter import built_in

    if path is not None:
        return recipe.load(path)
    return recipe.load(recipe.DEFAULT_FILE) if recipe.DEFAULT_FILE.exists() else built_in()


def _told(report: Any, folder: Path, as_json: bool) -> int:
    from edgekd import report as reports

    if not here().first:
        return DONE
    click.echo(reports.summary(report, folder), err=True)
    if as_json:
        click.echo((folder / "report.json").read_text(encoding="utf-8"), nl=False)
    return DONE if all(report.chosen.values()) else NO_VARIANT


def _told_in(log: Path, verbose: bool) -> AbstractContextManager[Say]:
    """Where events go: of several processes the first one shows and logs them."""
    from edgekd.progress import Progress

    return Progress(log, verbose=verbose) if here().first else nullcontext(silent)


def main() -> None:
    """Run the command line and leave with the exit code of the contract."""
    processes = here()
    processes.watch()
    try:
        code = cli.main(standalone_mode=False)
        processes.leave(sound=True)
    except EdgekdError as problem:
        processes.leave(sound=False)
        click.echo(f"edgekd{'' if processes.first else f' (process {processes.rank})'}: {problem}", err=True)
        code = USER_ERROR
    except click.ClickException as problem:
        if processes.first:
            problem.show()
        code = USER_ERROR
    except (KeyboardInterrupt, click.exceptions.Abort):
        if processes.first:
            click.echo("edgekd: interrupted; the same command goes on where it stopped.", err=True)
        code = INTERRUPTED
    sys.exit(code or DONE)
