"""Transfer: rules meta-trained on some tasks, tested on others, against baselines tuned on each."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from stepsmith.evaluate.baselines import BASELINES, Baseline
from stepsmith.evaluate.run import (
    AnyRule,
    Evaluation,
    Settings,
    chosen_baselines,
    evaluate,
    named_rules,
)
from stepsmith.evaluate.statistics import METRICS
from stepsmith.rules.base import require_choice, require_kind
from stepsmith.tasks.base import Task


def transfer(
    rules: AnyRule | Mapping[str, AnyRule] | Iterable[AnyRule],
    tasks: Task | Iterable[Task],
    baselines: str | Baseline | Iterable[str | Baseline] = tuple(BASELINES),
    *,
    cache: str | Path | None = None,
    recipe: str = "transfer",
    say: Callable[[str], None] = lambda message: None,
    **settings: Any,
) -> Evaluation:
    """Test every rule on every task, each beside the baselines tuned on that task.

    Args:
        rules: as for `evaluate`.
        tasks: of different names.
        baselines: as for `evaluate`; tuned on each task anew.
        cache: folder as for `evaluate`: an interrupted transfer goes on where it stopped, and a
            further rule or task costs only its own runs.
        recipe: for the records.
        say: told what is being done.
        settings: as for `evaluate`.

    Returns:
        The records of all tasks, and their tuned baselines as `TASK/BASELINE`.

    Raises:
        ValueError: no rule, no task, two tasks of one name; or as `evaluate`.
        TypeError: an argument of another type.
    """
    require_kind("transfer", "tasks", tasks, Task | Iterable, "one or several")
    rules = named_rules(rules)  # once, not for every task
    tasks = [tasks] if isinstance(tasks, Task) else list(tasks)
    for task in tasks:
        require_kind("transfer", "each of tasks", task, Task)
    baselines = chosen_baselines("transfer", baselines)
    own = {field.name for field in dataclasses.fields(Settings)}
    # Before the first task is looked at.
    Settings(**{name: value for name, value in settings.items() if name in own})
    names = [task.name for task in tasks]
    if not rules or not tasks:
        raise ValueError(
            f"transfer: needs a rule and a task at least, got {len(rules)} and {len(tasks)}"
        )
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"transfer: {names.count(name)} tasks are called {name!r}; rename one")
    whole = Evaluation()
    for place, task in enumerate(tasks, 1):

        def told(message: str, place: int = place) -> None:
            say(f"task {place} of {len(tasks)}: {message}")

        result = evaluate(
            task, rules, baselines, cache=cache, recipe=recipe, say=told, **settings
        )  # fmt: skip
        whole.records.extend(result.records)
        whole.tuned |= {f"{task.name}/{name}": tuned for name, tuned in result.tuned.items()}
    return whole


def transfer_matrix(
    rows: Iterable[dict[str, Any]], metric: str = "mean_train_loss"
) -> list[dict[str, Any]]:
    """The cells of a transfer: how each learned rule does on each task.

    Args:
        rows: of a summary.
        metric: one of the losses.

    Returns:
        Dictionaries with `protocol`, `horizon`, `rule` (its name), `task`, `ratio`, `low` and
        `high` (mean loss over that of the best tuned baseline, `against`, and the 95 % interval;
        None where no baseline was run, or for an end that diverged), `diverged` (share of runs, 0
        to 1), `seeds`, and `own` (whether the rule was meta-trained on the task).

    Raises:
        ValueError: an unknown metric.
    """
    require_choice("transfer_matrix", "metric", metric, METRICS)
    return [
        {
            "protocol": row["protocol"], "horizon": row["horizon"], "rule": row["optimizer"],
            "task": row["task"], "ratio": row["ratio"], "low": row["ratio_low"],
            "high": row["ratio_high"], "against": row["against"],
            "diverged": row["diverged"] / row["seeds"], "seeds": row["seeds"],
            # Names of tasks hold commas too, but with a space after.
            "own": row["task"] in re.split(r",(?! )", row["meta_task"]),
        }
        for row in rows
        if row["metric"] == metric and row["kind"] == "learned"
    ]  # fmt: skip
