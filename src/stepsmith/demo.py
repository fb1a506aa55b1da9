"""The main job, end to end, on the bundled images: meta-train, compare, transfer, report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from stepsmith.evaluate import Records, evaluate
from stepsmith.hub import TrainedRule
from stepsmith.meta import MetaTrainConfig, meta_train
from stepsmith.report import new_run_folder, write_results
from stepsmith.report.break_even import break_even
from stepsmith.report.verdict import cost_sentences, verdicts
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
        f"[bold]1. Meta-training[/] a small LSTM to train the MLP 784-20-10 on "
        f"{escape(task.data_name)}, 100 steps an episode, for {seconds:.0f} s."
    )
    trained = meta_train(
        task, "joined", out=folder, progress=True, name="demo", **settings
    )  # fmt: skip
    records = Records()
    with telling(console) as say:
        for number, stage in enumerate(STAGES, 2):
            console.print(
                f"[bold]{number}. Training {stage.task}[/], {stage.role}: {stage.seeds} fresh "
                f"starts; {', '.join(stage.baselines)} tuned."
            )
            records.extend(_compare(stage, trained, say))
        say("drawing the report")
        config = {
            "seconds": seconds,
            "seed": seed,
            "meta_training": META_TRAINING,
            "data": "sample",
        }
        summary = write_results(
            folder, records, recipe="demo", scale="quick", command=command, config=config,
            overwrite=True,
        )  # fmt: skip
    console.print()
    for sentence in verdicts(summary["rows"]):
        console.print(sentence, markup=False)
    for sentence in cost_sentences(break_even(summary["rows"], records)):
        console.print(sentence, markup=False)
    console.print(f"\nReport     [bold]{escape(str(folder / 'report.html'))}[/]")
    console.print(f"Optimizer  [bold]{escape(str(folder / 'rule.safetensors'))}[/]")
    return folder


def _compare(stage: Stage, trained: TrainedRule, say: Any) -> Records:
    task = make_task(stage.task, source="sample")
    result = evaluate(
        task, {"learned": trained}, stage.baselines, recipe="demo", scale="quick", say=say,
        seeds=stage.seeds, tuning_seeds=stage.tuning_seeds,
    )  # fmt: skip
    return result.records
