"""The command line: `stepsmith demo`, `train`, `evaluate`, `transfer`, `bench`, `report`, ..."""

from __future__ import annotations

import dataclasses
import functools
import importlib.machinery
import itertools
import json
import logging
import shlex
import signal
import statistics
import sys
import traceback
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer

from stepsmith import demo as demonstration
from stepsmith import store, tables
from stepsmith.evaluate import BASELINES, Key, Records, evaluate, transfer, transfer_matrix
from stepsmith.evaluate.cost import MakeOptimizer, seconds_per_step
from stepsmith.evaluate.run import Settings, add_meta_training, learned_key
from stepsmith.evaluate.statistics import summarise
from stepsmith.hub import BUNDLED, TrainedRule, load
from stepsmith.kernels import BACKENDS, resolve
from stepsmith.machine import require_device
from stepsmith.meta.checkpoint import RULE
from stepsmith.meta.config import MetaTrainConfig
from stepsmith.meta.curriculum import curriculum_stages, train_curriculum
from stepsmith.meta.episodes import joint_name
from stepsmith.meta.progress import require_tensorboard
from stepsmith.meta.trainer import meta_train
from stepsmith.names import file_name, shown
from stepsmith.optim import LearnedOptimizer
from stepsmith.recipes import SCALES
from stepsmith.recipes import command as recipe_commands
from stepsmith.report import new_run_folder, refuse_results, rerender, write_results
from stepsmith.report.folder import PAGE
from stepsmith.report.verdict import verdicts
from stepsmith.rules import CLASSIC, LEARNED, make_rule
from stepsmith.rules.base import require_choice
from stepsmith.store import CheckpointError, require_place
from stepsmith.tasks import (
    DATA_SETS,
    FORMS,
    KNOWN_TEXTS,
    LANGUAGE_NETWORKS,
    NETWORKS,
    VARIANTS,
    Task,
    make_task,
)
from stepsmith.tasks.networks.mlp import ACTIVATIONS
from stepsmith.terminal import (
    FAULT,
    INTERRUPTED,
    STOPS,
    Terminal,
    Warnings,
    guarded,
    hangs_on,
    lasting,
    mistake,
    telling,
    users_code,
)

app = typer.Typer(
    help="Learned optimizers: meta-train an update rule, use it, measure it.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)  # fmt: skip
app.add_typer(recipe_commands.app, name="recipe")
console = Terminal()

# Of click's, or of the copy that comes with typer.
_UsageError: Any = typer.BadParameter.__base__

TaskOption = Annotated[
    str, typer.Option("--task", "-t", help="Task by name (`stepsmith tasks`) or module:function.")
]
DataDir = Annotated[
    Path | None,
    typer.Option(help="Folder with parquet, idx or image files; or set STEPSMITH_DATA_DIR."),
]
Source = Annotated[str, typer.Option(help="Data from: auto, sample, directory or hub.")]
Device = Annotated[str, typer.Option(help="Where tasks made by name run: cpu or cuda.")]
CacheDir = Annotated[
    Path | None,
    typer.Option("--cache", help="Folder where tuned baselines and rules' runs are kept."),
]
Out = Annotated[Path, typer.Option(help="Folder for runs; a run never overwrites an older one.")]


@app.command()
@guarded
def demo(
    seconds: Annotated[float, typer.Option(help="Seconds of meta-training.")] = 170.0,
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
    out: Out = Path("runs"),
) -> None:
    """Meta-train on real images, compare with tuned Adam and NAG, transfer, write a report."""
    demonstration.demo(seconds=seconds, seed=seed, out=out, command=_command(), console=console)


@app.command()
@guarded
def train(
    context: typer.Context,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", "-t", help="As elsewhere; repeatable, to train on several at once."),
    ] = None,
    rule: Annotated[
        str, typer.Option("--rule", "-r", help="joined, l2o_dm or rnnprop.")
    ] = "joined",
    seconds: Annotated[
        float | None, typer.Option(help="Budget in seconds (120 by default).")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Budget in inner steps; reproducible.")] = None,
    horizon: Annotated[
        int | None, typer.Option(help="Steps of an episode (100 by default).")
    ] = None,
    curriculum: Annotated[
        str | None, typer.Option(help="Stages of growing horizon, such as 100,200,500,1000.")
    ] = None,
    window: Annotated[int | None, typer.Option(help="Steps of a window (the horizon).")] = None,
    copies: Annotated[int, typer.Option(help="Optimizees at once.")] = 1,
    samples: Annotated[int, typer.Option(help="Coordinate-steps replayed a window.")] = 40_000,
    loss: Annotated[str, typer.Option(help="Meta-loss: mean, final or log.")] = "mean",
    lr: Annotated[float, typer.Option(help="Meta-Adam's peak rate.")] = 1e-2,
    imitation: Annotated[
        float, typer.Option(help="Chance that an episode follows a teacher, Adam.")
    ] = 0.0,
    teacher_lr: Annotated[float | None, typer.Option(help="The teacher's rate (0.01).")] = None,
    proportions: Annotated[
        str | None, typer.Option(help="Shares of the windows, one a task, such as 2,1,1.")
    ] = None,
    accumulate: Annotated[
        int, typer.Option(help="Windows averaged for a meta-update, of as many tasks.")
    ] = 1,
    balance: Annotated[
        str | None, typer.Option(help="Of several tasks' meta-gradients: gradient, loss or none.")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="End after so many validations that were no better.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
    hidden: Annotated[int | None, typer.Option(help="LSTM units a layer.")] = None,
    layers: Annotated[int | None, typer.Option(help="LSTM layers.")] = None,
    inputs: Annotated[str | None, typer.Option(help="raw, log_sign, adam or joined.")] = None,
    step_scale: Annotated[
        float | None, typer.Option(help="Factor on the step (joined: 3; absolute: 0.1).")
    ] = None,
    scaling: Annotated[
        str | None,
        typer.Option(help="Units of gradients and steps: relative, warmed or absolute."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the trained rule.")] = None,
    source: Source = "auto",
    data_dir: DataDir = None,
    device: Device = "cpu",
    out: Out = Path("runs"),
    resume: Annotated[
        Path | None,
        typer.Option(help="Continue this run's folder, by its own settings; others are refused."),
    ] = None,
    run_code: Annotated[
        bool,
        typer.Option("--run-code", help="Let --resume import the module:function tasks of FOLDER."),
    ] = False,
    checkpoint_seconds: Annotated[
        float | None,
        typer.Option(help="Longest time between checkpoints (120); the first come sooner."),
    ] = None,
    tensorboard: Annotated[bool, typer.Option(help="Write TensorBoard events too.")] = False,
) -> None:
    """Meta-train an update rule on a task, or on several."""
    given = {
        "hidden": hidden, "layers": layers, "inputs": inputs, "step_scale": step_scale,
        "scaling": scaling,
    }  # fmt: skip
    if steps is not None and seconds is not None:
        raise ValueError("train: give --seconds or --steps, not both")
    if steps is None and seconds is None:
        seconds = 120.0
    budget = {"seconds": seconds} if steps is None else {"steps": steps}
    optional = {
        "teacher_lr": teacher_lr, "balance": balance, "patience": patience,
        "checkpoint_seconds": checkpoint_seconds,
    }  # fmt: skip
    optional = {key: value for key, value in optional.items() if value is not None}
    config: dict[str, Any] = {
        "tasks": task or ["mlp-mnist"], "source": source,
        "data_dir": str(data_dir) if data_dir else None, "device": device,
        "rule": rule, "rule_arguments": {k: v for k, v in given.items() if v is not None},
        "meta_training": {
            **budget, **_horizons(horizon, curriculum), "window": window, "copies": copies,
            "samples": samples, "loss": loss, "lr": lr, "seed": seed, "imitation": imitation,
            "accumulate": accumulate, "proportions": _numbers(proportions), **optional,
        },
        "name": name, "command": _command(),
    }  # fmt: skip
    folder = resume
    if folder is not None:
        sources = {name: context.get_parameter_source(name) for name in context.params}
        typed = {name for name, found in sources.items() if found and found.name == "COMMANDLINE"}
        config = _resumed(folder, config, typed, out=out, run_code=run_code)
    elif run_code:
        raise ValueError("train: --run-code goes with --resume; tasks that you name are imported")
    if tensorboard:
        require_tensorboard()
    if folder is None:
        require_place(out, "--out")
    made = [_made(config, name) for name in config["tasks"]]
    title = joint_name(made)
    made_rule = make_rule(config["rule"], **config["rule_arguments"])
    _require_settings(config["meta_training"])
    if folder is None:
        label = title if len(made) > 1 else config["tasks"][0]
        folder = new_run_folder(out, f"train-{file_name(label)}")
        store.write_bytes(folder / "config.json", json.dumps(config, indent=2).encode())
    console.print(f"Meta-training {config['rule']} on {title} in {folder}", style="bold")
    console.print("Ctrl-C finishes the window and saves; --resume continues.", style="dim")
    learn = train_curriculum if "horizons" in config["meta_training"] else meta_train
    trained = learn(
        made, made_rule, out=folder, resume=resume is not None, progress=True,
        tensorboard=tensorboard, name=config["name"], **config["meta_training"],
    )  # fmt: skip
    manifest = trained.manifest
    console.print(
        f"Best validation {manifest['validation']['score']:.4g} after {manifest['inner_steps']:,} "
        f"inner steps in {manifest['seconds']:.0f} s."
    )
    if not (folder / RULE).exists():
        trained.save(folder / RULE)  # there may be room by now; where not, this says so
    console.print(f"The optimizer: {folder / RULE}")
    records = Records()
    key = Key(
        recipe="train", scale="full", task=title,
        network=", ".join(dict.fromkeys(one.network_name for one in made)),
        data=trained.manifest["data"], horizon=trained.manifest["horizon"],
    )  # fmt: skip
    add_meta_training(records, learned_key(key, f"learned ({trained.name})", trained), trained)
    write_results(
        folder, records, recipe="train", scale="full", command=config["command"], config=config,
        overwrite=True,
    )  # fmt: skip


@app.command("evaluate")
@guarded
def evaluate_command(
    task: TaskOption = "mlp-mnist",
    rule: Annotated[
        list[str] | None, typer.Option("--rule", "-r", help="Bundled name or file; repeatable.")
    ] = None,
    baseline: Annotated[
        list[str] | None, typer.Option("--baseline", "-b", help="Repeatable; all by default.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Horizon.")] = 100,
    seeds: Annotated[int, typer.Option(help="Runs of each optimizer.")] = 32,
    tuning_seeds: Annotated[int, typer.Option(help="Runs of each rate.")] = 8,
    timing: Annotated[bool, typer.Option(help="Measure seconds per step.")] = True,
    recipe: Annotated[str, typer.Option(help="Name in the records.")] = "evaluate",
    scale: Annotated[str, typer.Option(help="full, hundred, small or quick.")] = "full",
    folder: Annotated[Path | None, typer.Option(help="Write exactly here.")] = None,
    cache: CacheDir = None,
    source: Source = "auto",
    data_dir: DataDir = None,
    device: Device = "cpu",
    out: Out = Path("runs"),
) -> None:
    """Compare rules with tuned baselines on fresh starts of a task."""
    require_choice("evaluate", "scale", scale, tuple(SCALES))
    _require_places(folder, out, cache)
    config: dict[str, Any] = {
        "task": task, "source": source, "data_dir": str(data_dir) if data_dir else None,
        "device": device, "rules": rule or [],
        "baselines": baseline if baseline is not None else list(BASELINES),
        "steps": steps, "seeds": seeds, "tuning_seeds": tuning_seeds,
    }  # fmt: skip
    made = _made(config, task)
    trained = [load(name) for name in config["rules"]]
    with telling(console) as say:
        result = evaluate(
            made, trained, config["baselines"], recipe=recipe, scale=scale, say=say,
            steps=steps, seeds=seeds, tuning_seeds=tuning_seeds,
            timing_rounds=Settings.timing_rounds if timing else 0, cache=cache,
        )  # fmt: skip

    def show(rows: list[dict[str, Any]]) -> None:
        console.print(tables.losses(rows))
        for sentence in verdicts(rows):
            console.print(sentence)

    _conclude(
        result.records, folder, out, f"evaluate-{file_name(task)}", show, recipe=recipe,
        scale=scale, config=config,
    )  # fmt: skip


@app.command("transfer")
@guarded
def transfer_command(
    rule: Annotated[
        list[str], typer.Option("--rule", "-r", help="Bundled name or file; repeatable.")
    ],
    task: Annotated[
        list[str], typer.Option("--task", "-t", help="Task (`stepsmith tasks`); repeatable.")
    ],
    baseline: Annotated[
        list[str] | None, typer.Option("--baseline", "-b", help="Repeatable; all by default.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Horizon.")] = 100,
    seeds: Annotated[int, typer.Option(help="Runs of each optimizer.")] = 32,
    tuning_seeds: Annotated[int, typer.Option(help="Runs of each rate.")] = 8,
    timing: Annotated[bool, typer.Option(help="Measure seconds per step.")] = True,
    recipe: Annotated[str, typer.Option(help="Name in the records.")] = "transfer",
    scale: Annotated[str, typer.Option(help="full, hundred, small or quick.")] = "full",
    folder: Annotated[Path | None, typer.Option(help="Write exactly here.")] = None,
    cache: CacheDir = None,
    source: Source = "auto",
    data_dir: DataDir = None,
    device: Device = "cpu",
    out: Out = Path("runs"),
) -> None:
    """Test rules on tasks they were not meta-trained for: rules in rows, tasks in columns.

    Interrupted, the same command goes on where it stopped (by the cache, OUT/cache by default).
    """
    require_choice("transfer", "scale", scale, tuple(SCALES))
    kept = cache if cache is not None else out / "cache"
    _require_places(folder, out, kept)
    config: dict[str, Any] = {
        "tasks": task, "source": source, "data_dir": str(data_dir) if data_dir else None,
        "device": device, "rules": rule,
        "baselines": baseline if baseline is not None else list(BASELINES),
        "steps": steps, "seeds": seeds, "tuning_seeds": tuning_seeds,
    }  # fmt: skip
    made = [_made(config, name) for name in task]
    trained = [load(name) for name in rule]
    with telling(console) as say:
        result = transfer(
            trained, made, config["baselines"], recipe=recipe, scale=scale, say=say,
            steps=steps, seeds=seeds, tuning_seeds=tuning_seeds, cache=kept,
            timing_rounds=Settings.timing_rounds if timing else 0,
        )  # fmt: skip

    def show(rows: list[dict[str, Any]]) -> None:
        for metric, label in (("mean_train_loss", "mean loss"), ("final_train_loss", "final loss")):
            console.print(tables.matrix(transfer_matrix(rows, metric), label))

    _conclude(
        result.records, folder, out, "transfer", show, recipe=recipe, scale=scale, config=config
    )


@app.command()
@guarded
def bench(
    task: TaskOption = "mlp-mnist",
    rule: Annotated[
        list[str] | None,
        typer.Option("--rule", "-r", help="Rule, bundled name or file; repeatable; all rules."),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timings of each, taken in turn.")] = 15,
    backend: Annotated[str, typer.Option(help=f"One of {', '.join(BACKENDS)}.")] = "auto",
    source: Source = "auto",
    data_dir: DataDir = None,
    device: Device = "cpu",
) -> None:
    """Time each rule's step on this machine and this model, beside fused AdamW's."""
    if rounds < 1:
        raise ValueError(f"bench: rounds must be at least 1, got {rounds}")
    made = _made({"source": source, "data_dir": data_dir, "device": device}, task)
    named = {name: _any_rule(name) for name in rule or list(LEARNED)}
    optimizers: dict[str, MakeOptimizer] = {
        name: functools.partial(LearnedOptimizer, rule=trained, backend=backend)
        for name, trained in named.items()
    }
    optimizers["adamw, fused"] = functools.partial(torch.optim.AdamW, fused=True)
    generator = torch.Generator().manual_seed(0)
    count = sum(value.numel() for value in made.init(generator)[0].values())
    with console.status(f"timing {made.name}"):
        times = seconds_per_step(made, optimizers, rounds=rounds)
    table = tables.table_of(
        "optimizer", "backend", "step, ms", "ns a parameter", "share of training"
    )
    for name, taken in times.items():
        step = statistics.median(one.whole - one.gradient for one in taken)
        share = statistics.median((one.whole - one.gradient) / one.whole for one in taken)
        used = ""
        if name in named:
            used = resolve(named[name].rule, backend, torch.float32, made.device)
        tables.add_row(
            table, name, used, f"{step * 1e3:.3g}", f"{step / count * 1e9:.3g}", f"{share:.0%}"
        )
    console.print(table)
    gradient = statistics.median(one.gradient for taken in times.values() for one in taken)
    console.print(
        f"{made.name}: {count:,} parameters; its gradient takes {gradient * 1e3:.3g} ms. Medians "
        f"of {rounds} rounds, {torch.get_num_threads()} threads."
    )


def _any_rule(name: str) -> TrainedRule:
    """A trained rule, or a rule with fresh weights, which cost as much to run."""
    if name in LEARNED:
        rule = make_rule(name)
        return TrainedRule(rule, rule.init(), {"name": name})
    return load(name)


@app.command()
@guarded
def report(folder: Annotated[Path, typer.Argument(help="Folder of a run.")]) -> None:
    """Draw a run's figures and page again, from its records alone."""
    console.print(f"Report: {rerender(folder)}")


@app.command()
@guarded
def info(checkpoint: Annotated[str, typer.Argument(help="Bundled name or file.")]) -> None:
    """Say what a trained rule is and how it came to be."""
    console.print(tables.described(load(checkpoint)))


@app.command()
@guarded
def tasks() -> None:
    """List the tasks: networks, data sets, and how their names make a task's."""
    for label, names in (
        ("networks", [*NETWORKS, *FORMS, *LANGUAGE_NETWORKS]),
        ("activations", list(ACTIVATIONS)),
        ("data sets", [*DATA_SETS, *KNOWN_TEXTS]),
        ("tasks", ["quadratic", "NETWORK-DATA", "module:function"]),
    ):
        console.print(f"{label}: {', '.join(names)}")
    console.print(
        "Such as mlp-mnist, mlp32x32-tanh-fashion_mnist, cnn8x16-bn-mnist or bert-e2e; DATA may be "
        "any image set (for a BERT, any text set) by name, hub id or folder too, and variants of "
        f"image sets, such as mnist@1000@shift ({', '.join(VARIANTS)}, or a number of training "
        "images).",
        style="dim",
    )


@app.command()
@guarded
def rules() -> None:
    """List the rules and the trained ones that come with the package."""
    console.print(f"learned: {', '.join(LEARNED)}")
    console.print(f"classic: {', '.join(CLASSIC)}")
    console.print(f"trained, bundled: {', '.join(BUNDLED)}")


def _made(config: dict[str, Any], name: str) -> Task:
    """A task by name, where a configuration says that data come from and tasks run."""
    device = config.get("device", "cpu")
    require_device(device)
    recipe_commands.require_data(config["source"], config["data_dir"])
    if ":" not in name:
        where = {key: config[key] for key in ("source", "data_dir")}
        return make_task(name, **where, device=device)
    if device != "cpu":
        raise ValueError(
            f"task {name!r}: --device is for tasks made by name; make your own there, such as by "
            f"Task.from_module(..., device={device!r})"
        )
    with users_code(name):
        return make_task(name)  # a user's own function gets no options of ours


def _require_settings(given: dict[str, Any]) -> None:
    """Check the settings of a meta-training before a folder is made for it."""
    if "horizons" in given:
        curriculum_stages(**given)
    else:
        MetaTrainConfig(**given).require_a_window("meta_train")


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"train: --proportions takes numbers with commas between, such as 2,1,1; got {text!r}"
        ) from None


def _horizons(horizon: int | None, curriculum: str | None) -> dict[str, Any]:
    if curriculum is None:
        return {"horizon": 100 if horizon is None else horizon}
    if horizon is not None:
        raise ValueError("train: give --horizon or --curriculum, not both")
    try:
        return {"horizons": [int(steps) for steps in curriculum.split(",")]}
    except ValueError:
        raise ValueError(
            "train: --curriculum takes numbers of steps with commas between, such as 100,200,500; "
            f"got {curriculum!r}"
        ) from None


def _require_places(folder: Path | None, out: Path, cache: Path | None) -> None:
    """Try the folders that a comparison will write to, before anything is measured."""
    if folder is not None:
        refuse_results(folder)
        require_place(folder, "--folder")
    else:
        require_place(out, "--out")
    if cache is not None:
        require_place(cache, "--cache")


def _conclude(
    records: Records,
    folder: Path | None,
    out: Path,
    name: str,
    show: Callable[[list[dict[str, Any]]], None],
    **told: Any,
) -> None:
    """Write results, show them and say where they are. Those that cannot be written are shown."""
    failed = None
    with telling(console) as say:
        say("drawing the report")
        try:
            where = folder or new_run_folder(out, name)
        except CheckpointError:
            where = out / name  # writing there says why it fails, and where the results are
        try:
            rows = write_results(where, records, command=_command(), **told)["rows"]
        except ValueError as error:
            rows, failed = summarise(records), error
    show(rows)
    if failed is not None:
        raise failed
    done = where / PAGE
    console.print(f"Report: {done}" if done.exists() else f"Results: {where}")


_CONFIG: dict[str, Any] = {
    "tasks": list, "source": str, "data_dir": str | None, "device": str, "rule": str,
    "rule_arguments": dict, "meta_training": dict, "name": str | None, "command": str,
}  # fmt: skip
"""What `config.json` of a meta-training holds that a run goes on from."""


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = store.read_json(path)
    except CheckpointError as error:
        raise ValueError(f"{error}; --resume takes the folder of a run") from None
    if isinstance(config, dict):
        config.setdefault("device", "cpu")  # which the first versions did not write
    odd = [
        key for key, kind in _CONFIG.items()
        if not isinstance(config, dict) or key not in config or not isinstance(config[key], kind)
    ]  # fmt: skip
    if odd or not config["tasks"] or not all(isinstance(name, str) for name in config["tasks"]):
        raise ValueError(
            f"{path}: not of a run of `stepsmith train` as this version writes it (see "
            f"{', '.join(odd or ['tasks'])})"
        )
    known = {field.name for field in dataclasses.fields(MetaTrainConfig)} | {"horizons"}
    if unknown := sorted(config["meta_training"].keys() - known):
        raise ValueError(
            f"{path}: meta_training has {', '.join(unknown)}, which this version does not know; "
            "go on with the version that wrote it"
        )
    return config


def _resumed(
    folder: Path, given: dict[str, Any], typed: set[str], *, out: Path, run_code: bool
) -> dict[str, Any]:
    """The configuration that a run goes on with: its folder's.

    Args:
        folder: of the run.
        given: a new run's configuration by the options given.
        typed: names of those that the user typed.
        out: as given.
        run_code: whether tasks that the folder alone names may be imported.

    Raises:
        ValueError: no readable configuration, an option that says otherwise, or a task of the
            user's own that neither option lets run.
    """
    config = _read_config(folder)
    own = [name for name in config["tasks"] if ":" in name]
    confirmed = given["tasks"] if "task" in typed else []
    if not run_code and (unasked := [name for name in own if name not in confirmed]):
        again = " ".join(f"--task {shlex.quote(name)}" for name in unasked if name.isprintable())
        raise ValueError(
            f"train: {folder}/config.json names code to run: {', '.join(map(_code, unasked))}. If "
            f"you trust it, repeat it ({again}) or give --run-code"
        )
    differ = []
    for option in sorted(typed - {"resume", "run_code", "tensorboard", "checkpoint_seconds"}):
        wanted, kept = _both(option, given, config, out, folder)
        if wanted != kept:
            differ.append(f"--{option.replace('_', '-')} (the run has {kept!r})")
    if differ:
        raise ValueError(
            f"train: --resume goes on with the settings in {folder}/config.json, and these differ: "
            f"{', '.join(differ)}; leave them out, or begin another run"
        )
    if "checkpoint_seconds" in typed:
        config["meta_training"]["checkpoint_seconds"] = given["meta_training"]["checkpoint_seconds"]
    return config


def _both(
    option: str, given: dict[str, Any], config: dict[str, Any], out: Path, folder: Path
) -> tuple[Any, Any]:
    """What an option asks for, and what a run has in its place."""
    if option == "out":
        return out.resolve(), folder.resolve().parent
    if option == "task":  # some of them, to confirm that they may run
        named = [name for name in given["tasks"] if name in config["tasks"]]
        return given["tasks"], named if named == given["tasks"] else config["tasks"]
    key = {"curriculum": "horizons"}.get(option, option)
    for part in ("meta_training", "rule_arguments"):
        if key in given[part]:
            return given[part][key], config[part].get(key)
    return given[key], config[key]


def _code(name: str) -> str:
    """A task of the user's own, and the file that would be imported first, found without running
    anything."""
    top = name.partition(":")[0].partition(".")[0]
    path = [str(Path.cwd()), *sys.path]
    found = importlib.machinery.PathFinder.find_spec(top, path) if top else None
    places = [] if found is None else [found.origin, *(found.submodule_search_locations or [])]
    place = next((place for place in places if place), "no file of this name here")
    return f"{name!r} ({place})"


def _command() -> str:
    return shlex.join(["stepsmith", *sys.argv[1:]])


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a user's mistake is one line and exit code 2, never a traceback. A
    fault of this library is a traceback and exit code 1."""
    given = sys.argv[1:] if arguments is None else arguments
    with lasting() as streams:
        logging.basicConfig(level=logging.WARNING, handlers=[Warnings()])
        # Being asked to stop is an interruption, however it is asked.
        for number in STOPS:
            if number != signal.SIGINT and not hangs_on(number):
                signal.signal(number, signal.default_int_handler)
        try:
            _require_values(given)
            code = app(arguments, standalone_mode=False)
        except (KeyboardInterrupt, typer.Abort):
            _fail(INTERRUPTED)
        except _UsageError as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                error.show()
                raise SystemExit(2) from None
            asked = error.ctx.command_path if error.ctx is not None else "stepsmith"
            said = error.format_message().rstrip(".") + _given(error, given)
            _fail(f"{said}; see `{asked} --help`")
        except Exception as error:
            said = mistake(error)
            if said is None:
                traceback.print_exception(error)
                print(FAULT, file=sys.stderr)
                raise SystemExit(1) from None
            _fail(said)
        for stream in streams:
            stream.flush()
            if stream.lost is not None and not code:
                _fail(f"not all that was to be printed could be ({stream.lost})")
        raise SystemExit(code if isinstance(code, int) else 0)


def _given(error: Any, arguments: list[str]) -> str:
    """What was given for the option that a usage error is about, which it does not say."""
    names = getattr(getattr(error, "param", None), "opts", ())
    for argument, following in itertools.pairwise([*arguments, ""]):
        option, equals, value = argument.partition("=")
        if option in names:
            return f", got {value if equals else following!r}"
    return ""


def _require_values(arguments: list[str]) -> None:
    """No option or argument of ours may be empty, as a shell's variable that is not set is, or hold
    what cannot be printed."""
    for place, argument in enumerate(arguments):
        if any(unicodedata.category(letter) == "Cc" for letter in argument):
            raise ValueError(f"{argument!r}: holds a control character; leave it out")
        option, equals, value = argument.partition("=")
        if not argument.strip() or (argument.startswith("--") and equals and not value.strip()):
            before = [part for part in arguments[:place] if part.startswith("-")]
            whose = option if equals else before[-1] if before else "an argument"
            raise ValueError(f"{whose}: is empty; give a value, or leave it out")


def _fail(message: str) -> NoReturn:
    print(f"stepsmith: {shown(' '.join(message.split()))}", file=sys.stderr)
    raise SystemExit(2)
