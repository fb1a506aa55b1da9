"""What is optimised: tasks, their data and their networks."""

from __future__ import annotations

import difflib
import importlib
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from stepsmith.tasks.base import Task
from stepsmith.tasks.data import ArrayData
from stepsmith.tasks.datasets import ImageSet, load_images
from stepsmith.tasks.images import ImageTask
from stepsmith.tasks.language import LANGUAGE_NETWORKS, MaskedLanguageTask
from stepsmith.tasks.module import ModuleTask
from stepsmith.tasks.networks import FORMS, NETWORKS, find_network
from stepsmith.tasks.quadratic import Quadratic
from stepsmith.tasks.rescaled import RandomlyScaled
from stepsmith.tasks.subspace import SubspaceTask
from stepsmith.tasks.text_data import KNOWN_TEXTS, TextSet, load_text
from stepsmith.tasks.variants import VARIANTS, load_variant

DATA_SETS = ("mnist", "fashion_mnist", "kmnist", "cifar10", "cifar100")
"""Image sets the listed task names use; any other set `load_images` knows joins by its name."""


def task_names() -> list[str]:
    """`quadratic`, and `NETWORK-DATA` for every pair of `NETWORKS` and `DATA_SETS`, and of
    `LANGUAGE_NETWORKS` and `KNOWN_TEXTS`; networks named by a form (`FORMS`) and other data sets
    join by name."""
    images = (f"{network}-{data}" for data in DATA_SETS for network in NETWORKS)
    texts = (f"{network}-{text}" for text in KNOWN_TEXTS for network in LANGUAGE_NETWORKS)
    return ["quadratic", *images, *texts]


def make_task(name: str, **options: Any) -> Task:
    """Make a task by name.

    Args:
        name: `quadratic`; `NETWORK-DATA`, such as `mlp-mnist`, `mlp32x32-tanh-fashion_mnist` or
            `bert-e2e`, where NETWORK is a name `stepsmith.tasks.networks` knows or one of
            `LANGUAGE_NETWORKS`, and DATA any image set (for a BERT, any text set) by name, hub id
            or folder, image sets with variants such as `mlp-mnist@1000@shift`; or
            `module:function`, a
            function of the user's own that returns a `Task`.
        options: the task's own (`source`, `data_dir`, `batch_size`, `device`, ...).

    Raises:
        ValueError: unknown name (lists the known ones and the nearest), or an option it lacks.
    """
    if ":" in name:
        return _imported_task(name, options)
    try:
        if name == "quadratic":
            quadratic_options = {
                k: v for k, v in options.items() if k not in ("source", "data_dir")
            }
            return Quadratic(**quadratic_options)
        network, data = split_name(name)
        if network in LANGUAGE_NETWORKS:
            return MaskedLanguageTask(network, data, **options)
        if network:
            return ImageTask(network, data, **options)
    except TypeError as error:
        raise ValueError(f"task {name!r}: {error}") from None
    raise _unknown_task(name)


def split_name(name: str) -> tuple[str, str]:
    """NETWORK and DATA of a `NETWORK-DATA` name: the longest network there is (a data set's name
    may hold dashes too); two empty strings where there is none.

    >>> split_name("cnn8x16-bn-fashion_mnist")
    ('cnn8x16-bn', 'fashion_mnist')
    """
    dashes = [place for place, letter in enumerate(name) if letter == "-"]
    for place in reversed(dashes):
        if name[:place] in LANGUAGE_NETWORKS or find_network(name[:place]) is not None:
            return name[:place], name[place + 1 :]
    return "", ""


def _unknown_task(name: str) -> ValueError:
    nearest = difflib.get_close_matches(name, task_names(), n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return ValueError(
        f"unknown task {name!r}; known: quadratic, NETWORK-DATA and module:function, NETWORK being "
        f"one of {', '.join([*NETWORKS, *FORMS, *LANGUAGE_NETWORKS])}, DATA one of "
        f"{', '.join([*DATA_SETS, *KNOWN_TEXTS])} or any set by name, hub id or folder.{hint}"
    )


def _imported_task(name: str, options: dict[str, Any]) -> Task:
    module_name, _, function_name = name.partition(":")
    here = str(Path.cwd())
    own = here not in sys.path
    sys.path.insert(0, here)
    try:
        try:
            make = getattr(importlib.import_module(module_name), function_name)
        except ImportError as error:
            raise ValueError(f"task {name!r}: cannot import {module_name!r}: {error}") from None
        except AttributeError:
            raise ValueError(f"task {name!r}: {module_name!r} has no {function_name!r}") from None
        task = make(**options)
    finally:
        with suppress(ValueError):  # the module may have changed the path too
            sys.path.remove(here)
        if own:  # last: functions may import a neighbour later, and other code none by accident
            sys.path.append(here)
    if not isinstance(task, Task):
        raise ValueError(f"task {name!r} must return a Task, got {type(task).__name__}")
    called = getattr(task, "name", None)
    if not isinstance(called, str) or not called.strip():
        raise ValueError(
            f"task {name!r}: its Task needs a name for records and files, a text; got {called!r}"
        )
    return task


__all__ = [
    "DATA_SETS", "FORMS", "KNOWN_TEXTS", "LANGUAGE_NETWORKS", "NETWORKS", "VARIANTS", "ArrayData",
    "ImageSet", "ImageTask", "MaskedLanguageTask", "ModuleTask", "Quadratic", "RandomlyScaled",
    "SubspaceTask", "Task", "TextSet", "load_images", "load_text", "load_variant", "make_task",
    "split_name", "task_names",
]  # fmt: skip
