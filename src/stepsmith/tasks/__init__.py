"""What is optimised: tasks, their data and their networks."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from stepsmith.names import unknown
from stepsmith.tasks.augment import VARIANTS, load_variant
from stepsmith.tasks.base import Task
from stepsmith.tasks.data import ArrayData
from stepsmith.tasks.datasets import ImageSet, load_images
from stepsmith.tasks.images import NETWORKS, ImageTask
from stepsmith.tasks.language import LANGUAGE_NETWORKS, MaskedLanguageTask
from stepsmith.tasks.module import ModuleTask
from stepsmith.tasks.quadratic import Quadratic
from stepsmith.tasks.text_data import KNOWN_TEXTS, TextSet, load_text

DATA_SETS = ("mnist", "fashion_mnist", "kmnist")
"""Image sets the listed task names use; any other set `load_images` knows joins by its name."""


def task_names() -> list[str]:
    """The names `make_task` lists: `quadratic`, and `NETWORK-DATA` for every pair."""
    images = (f"{network}-{data}" for data in DATA_SETS for network in NETWORKS)
    texts = (f"{network}-{text}" for text in KNOWN_TEXTS for network in LANGUAGE_NETWORKS)
    return ["quadratic", *images, *texts]


def make_task(name: str, **options: Any) -> Task:
    """Make a task by name.

    Args:
        name: `quadratic`; `NETWORK-DATA`, such as `mlp-mnist`, `convnet5x5-fashion_mnist` or
            `bert-e2e`, where DATA is any image set (for a BERT, any text set) by name, hub id or
            folder, image sets with variants such as `mlp-mnist@1000@shift`; or `module:function`, a
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
        for network in sorted([*NETWORKS, *LANGUAGE_NETWORKS], key=len, reverse=True):
            if name.startswith(f"{network}-"):
                kind = ImageTask if network in NETWORKS else MaskedLanguageTask
                return kind(network, name.removeprefix(f"{network}-"), **options)
    except TypeError as error:
        raise ValueError(f"task {name!r}: {error}") from None
    raise unknown("task", name, task_names())


def _imported_task(name: str, options: dict[str, Any]) -> Task:
    module_name, _, function_name = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        make = getattr(importlib.import_module(module_name), function_name)
    except ImportError as error:
        raise ValueError(f"task {name!r}: cannot import {module_name!r}: {error}") from None
    except AttributeError:
        raise ValueError(f"task {name!r}: {module_name!r} has no {function_name!r}") from None
    task = make(**options)
    if not isinstance(task, Task):
        raise ValueError(f"task {name!r} must return a Task, got {type(task).__name__}")
    return task


__all__ = [
    "DATA_SETS", "KNOWN_TEXTS", "LANGUAGE_NETWORKS", "NETWORKS", "VARIANTS", "ArrayData",
    "ImageSet", "ImageTask", "MaskedLanguageTask", "ModuleTask", "Quadratic", "Task", "TextSet",
    "load_images", "load_text", "load_variant", "make_task", "task_names",
]  # fmt: skip
