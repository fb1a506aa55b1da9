"""Results on disk, the same for every experiment: one folder, never overwritten by another run."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.figure import Figure

from stepsmith.evaluate.records import SCHEMA, Block, Key, Records
from stepsmith.evaluate.statistics import summarise
from stepsmith.machine import machine, versions
from stepsmith.report import figures
from stepsmith.report.break_even import break_even, break_even_figure
from stepsmith.report.epochs import accuracy_curves, accuracy_spreads, update_tracks
from stepsmith.report.matrix import matrix_figures
from stepsmith.report.page import render
from stepsmith.report.style import svg
from stepsmith.store import (
    CheckpointError,
    claimed,
    parsed,
    read_json,
    require_file,
    require_place,
    write_bytes,
)
from stepsmith.terminal import Interrupt

RECORDS, SUMMARY, CONFIG, PAGE = "records.parquet", "summary.json", "config.json", "report.html"
"""Files of a folder of results."""

WAIT = 10.0
"""Seconds to wait for another process that writes results into the same folder."""

_TYPES: dict[str, tuple[type, ...]] = {
    "recipe": (str,), "scale": (str,), "command": (str,), "machine": (dict,), "versions": (dict,),
    "rows": (list,), "findings": (dict,),
}  # fmt: skip
"""Of what is read of summaries and configurations; the rest is shown as it is."""

_log = logging.getLogger("stepsmith")


def new_run_folder(root: Path, name: str) -> Path:
    """Make root/name, or root/name-2, root/name-3, ... where it exists.

    Raises:
        CheckpointError: the folder cannot be made, or nothing can be written there.
    """
    number = 1
    while True:
        folder = root / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
            require_place(folder, "out")
            return folder
        except OSError as error:
            if isinstance(error, FileExistsError) and os.path.lexists(folder):
                number += 1
                continue
            raise CheckpointError(f"{folder}: cannot be made ({error.strerror})") from None


def refuse_results(folder: Path, advice: str = "choose another folder") -> None:
    """Refuse a folder that holds results, best before anything is measured for it.

    Args:
        folder: of the results to come.
        advice: what to do where it is refused.

    Raises:
        ValueError: it does.
    """
    if any((folder / name).exists() for name in (SUMMARY, RECORDS)):
        raise ValueError(f"{folder}: holds the results of an earlier run; {advice}")


def write_results(
    folder: Path,
    records: Records,
    *,
    recipe: str,
    scale: str,
    command: str,
    config: dict[str, Any],
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write records.parquet, config.json and summary.json, then figures as SVG and report.html.

    An interruption waits for the first three. Figures and page that cannot be drawn or written are
    said, and no error: `rerender` draws them later.

    Args:
        folder: made where missing.
        records: everything measured.
        recipe, scale: the experiment, and `full`, `small` or `quick`.
        command: that reproduces it.
        config: resolved configuration, JSON-able.
        overwrite: allow a folder that holds results already.

    Returns:
        The summary: recipe, scale, command, machine, versions, rows, figures (files drawn).

    Raises:
        ValueError: the folder holds results of another run.
        CheckpointError: the disk refused, or another process keeps the folder to itself; the
            message says where else the results are.
    """
    if not overwrite:
        refuse_results(folder)
    summary: dict[str, Any] = {
        "recipe": recipe, "scale": scale, "command": command, "machine": machine(),
        "versions": versions(), "rows": summarise(records), "figures": sorted(_figures(folder)),
    }  # fmt: skip
    try:
        with claimed(folder, WAIT):
            if not overwrite:  # another process may have been faster
                refuse_results(folder)
            _write_numbers(folder, records, summary, config)
            try:
                _tell(folder, records, summary, config)
            except Exception as error:
                fault = not isinstance(error, CheckpointError)  # of ours, or of what draws
                _log.warning(
                    "%s: figures and page could not be drawn (%s); the results are there, and "
                    "`stepsmith report %s` draws them again", folder, error, folder, exc_info=fault,
                )  # fmt: skip
    except CheckpointError as error:
        raise CheckpointError(f"{error} {_spare(records, summary, config)}") from None
    return summary


def _write_numbers(
    folder: Path, records: Records, summary: dict[str, Any], config: dict[str, Any]
) -> None:
    """Write what cannot be drawn again."""
    with Interrupt() as interrupt:
        save_records(folder, records, config)
        write_bytes(folder / SUMMARY, _json(summary))
    if interrupt.asked:
        raise KeyboardInterrupt(f"interrupted; the results are in {folder}, without figures")


def save_records(folder: Path, records: Records, config: dict[str, Any]) -> None:
    """Write records and configuration alone, from which `rerender` makes all else.

    Raises:
        CheckpointError: the disk refused.
    """
    records.save(folder / RECORDS)
    write_bytes(folder / CONFIG, _json(config))


def _spare(records: Records, summary: dict[str, Any], config: dict[str, Any]) -> str:
    """Write results among the system's temporary files; says where."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="stepsmith-"))
        _write_numbers(folder, records, summary, config)
    except (CheckpointError, OSError) as error:
        return f"Nor could they be kept elsewhere ({error})."
    return f"The results are in {folder}."


def read_results(folder: Path) -> tuple[Records, dict[str, Any], dict[str, Any]]:
    """Records, summary and configuration of a folder. A run that was killed before it wrote the
    last two left records alone: what they do not say is empty then.

    Raises:
        CheckpointError: the records are missing, or a file is not readable, or not as
            `write_results` writes it.
    """
    records = _read_records(folder / RECORDS)
    key = records.blocks[0].key if records.blocks else Key()
    summary: dict[str, Any] = {
        "recipe": key.recipe, "scale": key.scale, "command": "", "machine": {}, "versions": {},
        "rows": [], "figures": [],
    }  # fmt: skip
    if (folder / SUMMARY).exists():
        summary = _read_json(folder / SUMMARY, ("recipe", "command", "machine", "versions"))
    config = _read_json(folder / CONFIG) if (folder / CONFIG).exists() else {}
    return records, summary, config


def rerender(folder: Path) -> Path:
    """Draw figures and page again from a folder's records; returns the page's path.

    Raises:
        CheckpointError: as `read_results`, or the disk refused, or another process keeps the folder
            to itself.
    """
    records, summary, config = read_results(folder)
    summary["rows"] = summarise(records)
    with claimed(folder, WAIT):
        summary["figures"] = sorted(_figures(folder))
        write_bytes(folder / SUMMARY, _json(summary))
        _tell(folder, records, summary, config)
    return folder / PAGE


def _tell(folder: Path, records: Records, summary: dict[str, Any], config: dict[str, Any]) -> None:
    """Draw figures and page, and name the figures in the summary; figures that an earlier summary
    names and that are no more go."""
    earlier = set(summary["figures"])
    drawn = _draw(folder, records, summary["rows"])
    summary["figures"] = drawn
    write_bytes(folder / SUMMARY, _json(summary))
    page = render(
        records, summary["rows"], title=f"Stepsmith: {summary['recipe']}",
        command=summary["command"], config=config, machine=summary["machine"],
        versions=summary["versions"],
    )  # fmt: skip
    write_bytes(folder / PAGE, page.encode())
    for name in earlier - set(drawn):
        (folder / name).unlink(missing_ok=True)


def _figures(folder: Path) -> set[str]:
    """Figures that the summary of a folder names, where there is one that can be read."""
    try:
        named = _read_json(folder / SUMMARY).get("figures", [])
    except CheckpointError:
        return set()
    names = {name for name in named if isinstance(name, str)} if isinstance(named, list) else set()
    return {name for name in names if name == Path(name).name and name.endswith(".svg")}


def _draw(folder: Path, records: Records, rows: list[dict[str, Any]]) -> list[str]:
    """Write the figures; returns their files' names."""
    made: list[str] = []
    for panel, name in figures.panel_files(records).items():
        drawn = {
            f"{name}.svg": figures.loss_curves(records, panel),
            f"{name}-accuracy.svg": figures.accuracies(records, panel),
            f"{name}-cost.svg": figures.step_costs(records, panel),
            f"{name}-epochs.svg": accuracy_curves(records, panel),
            f"{name}-stability.svg": accuracy_spreads(records, panel),
            f"{name}-updates.svg": update_tracks(records, panel),
        }
        made += _write_figures(folder, drawn)
    drawn = {
        "meta-training.svg": figures.meta_curve(records),
        "break-even.svg": break_even_figure(break_even(rows, records)),
        **{f"{name}.svg": figure for name, figure in matrix_figures(rows).items()},
    }
    made += _write_figures(folder, drawn)
    return sorted(made)


def _write_figures(folder: Path, drawn: Mapping[str, Figure | None]) -> list[str]:
    """Write those that there are; returns their files' names."""
    made = {name: figure for name, figure in drawn.items() if figure is not None}
    for name, figure in made.items():
        write_bytes(folder / name, svg(figure).encode())
    return list(made)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def _read_json(path: Path, needed: Iterable[str] = ()) -> dict[str, Any]:
    read = read_json(path)
    if not isinstance(read, dict) or not set(needed) <= read.keys():
        raise CheckpointError(f"{path}: not of a run as this version writes it")
    for name, types in _TYPES.items():
        if name in read and not isinstance(read[name], types):
            raise CheckpointError(
                f"{path}: {name!r} should be a {types[0].__name__}, is {read[name]!r:.60}; use the "
                "original file"
            )
    return read


def _read_records(path: Path) -> Records:
    require_file(path)
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError):
        return Records.load(path)  # which says what is wrong
    for column in SCHEMA:
        if column.name in schema.names:
            have = schema.field(column.name).type
            if not _alike(have, column.type):
                raise CheckpointError(
                    f"{path}: column {column.name!r} should be {column.type}, is {have}; use the "
                    "original file"
                )
    try:
        records = Records.load(path)
    except (TypeError, OverflowError) as error:
        raise CheckpointError(
            f"{path}: not records as this version writes them ({error})"
        ) from None
    for block in records.blocks:
        _require_told(path, block)
    return records


def _alike(have: pa.DataType, want: pa.DataType) -> bool:
    """Whether a column holds texts, whole numbers or numbers, as it should."""
    have, want = (
        one.value_type if isinstance(one, pa.DictionaryType) else one for one in (have, want)
    )
    kinds = (
        lambda one: pa.types.is_string(one) or pa.types.is_large_string(one), pa.types.is_integer,
        pa.types.is_floating,
    )  # fmt: skip
    return any(kind(have) and kind(want) for kind in kinds)


def _require_told(path: Path, block: Block) -> None:
    """Check what figures read from the texts of records.

    Raises:
        CheckpointError: hyper-parameters that are no JSON mapping, or of a tuning run without a
            rate.
    """
    told = f"{block.metric} of {block.key.optimizer!r} on {block.key.task!r}"
    needed: tuple[str, ...] = ()
    if block.key.purpose == "tuning":
        needed = ("lr", "share") if block.metric == "final_loss" else ("lr",)
    try:
        parameters = parsed(block.key.hyper_parameters)
        if not isinstance(parameters, dict):
            raise ValueError(f"expected a mapping, got {parameters!r:.60}")
        for name in needed:
            if type(parameters.get(name)) not in (int, float):
                raise ValueError(f"expected a number {name!r}, got {parameters.get(name)!r:.60}")
    except ValueError as error:
        raise CheckpointError(f"{path}: hyper_parameters of {told}: {error}") from None
    if block.key.horizon < 0 or not block.values.size:
        raise CheckpointError(
            f"{path}: {told} has {block.values.size} values and a horizon of {block.key.horizon}"
        )
