"""The main job, end to end, on the bundled images: meta-train, compare, transfer, report."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from stepsmith.evaluate import Records, evaluate
from stepsmith.hub import TrainedRule
from stepsmith.meta import MetaTrainConfig, meta_train
from stepsmith.meta.checkpoint import RULE
from stepsmith.report import new_run_folder, save_records, write_results
from stepsmith.report.break_even import break_even
from stepsmith.report.folder import PAGE
from stepsmith.report.verdict import cost_sentences, verdicts
from stepsmith.store import CheckpointError
from stepsmith.tasks import make_task
from stepsmith.terminal import telling


@dataclass(frozen=True)
class Stage:
    """One comparison of the demo: how many runs, and which baselines are tuned."""

    task: str
    role: str
    baselines: tuple[str, ...]
    seeds: int
    tuning_seeds: int


STAGES = (
    Stage("mlp-mnist", "the network it was meta-trained for",
          ("sgd", "nag", "adam", "rmsprop"), 16, 4),
    Stage("mlp-fashion_mnist", "another data set", ("nag", "adam"), 16, 4),
    Stage("convnet-mnist", "another network", ("nag", "adam"), 6, 2),
)  # fmt: skip

_log = logging.getLogger("stepsmith")

META_TRAINING: dict[str, Any] = {"copies": 1, "validations": 5, "validation_copies": 4}


def demo(*, seconds: float, seed: int, out: Path, command: str, console: Console) -> Path:
    """Run the demo.

    Args:
        seconds: of meta-training.
        seed: of meta-training.
        out: root of the run's folder.
        command: for the report.
        console: where to talk.

    Returns:
        The run's folder, with `report.html` and the optimizer, `rule.safetensors`.
    """
    settings: dict[str, Any] = {"seconds": seconds, "seed": seed, **META_TRAINING}
    MetaTrainConfig(**settings)  # before a folder is made
    folder = new_run_folder(out, "demo")
    task = make_task("mlp-mnist", source="sample")
    console.print(
        Text("1. Meta-training", "bold"),
        f"a small LSTM to train the MLP 784-20-10 on {task.data_name}, 100 steps an episode, for "
        f"{seconds:.0f} s.",
    )
    trained = meta_train(
        task, "joined", out=folder, progress=True, name="demo", **settings
    )  # fmt: skip
    records = Records()
    config = {
        "seconds": seconds, "seed": seed, "meta_training": META_TRAINING, "data": "sample",
    }  # fmt: skip
    with telling(console) as say:
        for number, stage in enumerate(STAGES, 2):
            console.print(
                Text(f"{number}. Training {stage.task}", "bold").append(",", "not bold"),
                f"{stage.role}: {stage.seeds} fresh starts; {', '.join(stage.baselines)} tuned.",
            )
            records.extend(_compare(stage, trained, say))
            try:  # so that `stepsmith report` has something where a later stage is interrupted
                save_records(folder, records, config)
            except CheckpointError as error:
                _log.warning("demo: %s", error)
        say("drawing the report")
        summary = write_results(
            folder, records, recipe="demo", scale="quick", command=command, config=config,
            overwrite=True,
        )  # fmt: skip
    console.print()
    for sentence in verdicts(summary["rows"]):
        console.print(sentence)
    for sentence in cost_sentences(break_even(summary["rows"], records)):
        console.print(sentence)
    console.print()
    if (folder / PAGE).exists():
        console.print(f"Report     {folder / PAGE}", style="bold")
    if not (folder / RULE).exists():
        trained.save(folder / RULE)  # there may be room by now; where not, this says so
    console.print(f"Optimizer  {folder / RULE}", style="bold")
    return folder


def _compare(stage: Stage, trained: TrainedRule, say: Any) -> Records:
    task = make_task(stage.task, source="sample")
    result = evaluate(
        task, {"learned": trained}, stage.baselines, recipe="demo", scale="quick", say=say,
        seeds=stage.seeds, tuning_seeds=stage.tuning_seeds,
    )  # fmt: skip
    return result.records
