"""`stepsmith recipe`: list the recipes, run one, make one of their rules."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from stepsmith.machine import require_device
from stepsmith.recipes import RECIPES, SCALES, Study, recipe, run_recipe
from stepsmith.recipes.paper_a.rules import RULES, learned
from stepsmith.report.folder import PAGE
from stepsmith.tasks.sources import data_root
from stepsmith.terminal import Terminal, guarded, telling

app = typer.Typer(help="Figures and tables of the papers as programs.", no_args_is_help=True)
console = Terminal()

Quick = Annotated[bool, typer.Option("--quick", help="A small version, on the bundled sample.")]
CacheDir = Annotated[
    Path, typer.Option("--cache", help="Folder of tuned baselines, runs and meta-trained rules.")
]
Source = Annotated[
    str | None, typer.Option(help="Data from: auto, sample, directory or hub (the scale's).")
]
DataDir = Annotated[
    str | None, typer.Option(help="Folder with the data sets; or set STEPSMITH_DATA_DIR.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace results that are there.")]


def require_data(source: str, data_dir: str | Path | None) -> None:
    """Check where data are to come from, whether a task reads any or not.

    Raises:
        ValueError: an unknown source, or a folder that is not there.
    """
    data_root("data", source, data_dir)
    if data_dir is not None and not Path(data_dir).expanduser().is_dir():
        raise ValueError(f"data: {data_dir} is no folder; give one that is there, or leave it out")


@app.command("list")
@guarded
def list_command() -> None:
    """List the recipes and the rules they meta-train."""
    table = Table("recipe", "what")
    for entry in RECIPES.values():
        table.add_row(entry.name, entry.what)
    console.print(table)
    listed = [name for name in RULES if not name.startswith("technique-")]
    console.print(f"rules: {', '.join(listed)}; and technique-NAME-SEED of a15-techniques")


@app.command("run")
@guarded
def run_command(
    name: Annotated[str, typer.Argument(help="Of `stepsmith recipe list`.")],
    quick: Quick = False,
    hundred: Annotated[
        bool, typer.Option("--hundred", help="The full scale without its longer horizons.")
    ] = False,
    small: Annotated[
        bool, typer.Option("--small", help="The deep networks of SL2O for two cores.")
    ] = False,
    out: Annotated[
        Path, typer.Option(help="Results go to OUT/NAME/SCALE, and overwrite none.")
    ] = Path("results"),
    cache: CacheDir = Path("runs/cache"),
    overwrite: Overwrite = False,
    source: Source = None,
    data_dir: DataDir = None,
    device: Annotated[str, typer.Option(help="Where tasks run: cpu or cuda.")] = "cpu",
) -> None:
    """Run a recipe. Interrupted, the same command goes on where it stopped."""
    asked = [key for key, given in (("quick", quick), ("hundred", hundred), ("small", small))
             if given]  # fmt: skip
    if len(asked) > 1:
        raise ValueError("recipe run: give one of --quick, --hundred and --small")
    chosen = recipe(name)
    require_device(device)
    require_data(source or "auto", data_dir)
    scale = SCALES[asked[0] if asked else "full"]
    # What decides the results, whatever folders this machine has.
    flags = [f"--{key}" for key in asked]
    flags += ["--device", device] if device != "cpu" else []
    flags += ["--source", source] if source else []
    folder = out / chosen.name / scale.name
    with telling(console) as say:
        summary = run_recipe(
            chosen, scale, folder=folder, cache=cache, overwrite=overwrite,
            command=shlex.join(["stepsmith", "recipe", "run", name, *flags]), source=source,
            data_dir=data_dir, device=device, say=say,
        )  # fmt: skip
    for sentence in summary["verdicts"]:
        console.print(sentence)
    done = folder / PAGE
    console.print(f"Report: {done}" if done.exists() else f"Results: {folder}")


@app.command("rule")
@guarded
def rule_command(
    name: Annotated[str, typer.Argument(help="A rule of `stepsmith recipe list`.")],
    quick: Quick = False,
    cache: CacheDir = Path("runs/cache"),
    source: Source = None,
    data_dir: DataDir = None,
) -> None:
    """Meta-train one of the recipes' rules, or find it in the cache."""
    require_data(source or "auto", data_dir)
    scale = SCALES["quick" if quick else "full"]
    with telling(console) as say:
        study = Study("rule", scale, cache, source, data_dir, say)
        trained = learned(study, name)
    manifest = trained.manifest
    console.print(
        f"{name}: validation {manifest['validation']['score']:.4g} after "
        f"{manifest['inner_steps']:,} inner steps in {manifest['seconds']:.0f} s"
    )
