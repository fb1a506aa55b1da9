"""Write the tables of the papers' pages from the records under results/, between their markers.

    python scripts/make_tables.py [--check]

A line `<!-- table: RECIPE -->` is followed by the table of losses of that recipe's largest scale
there is and by those of its findings, up to `<!-- end -->`; a line `<!-- hours: SCALE RECIPES -->`
by what these took together. With --check nothing is written, and the exit code says whether it
would change.
"""

from __future__ import annotations

import argparse
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stepsmith.evaluate import Records
from stepsmith.recipes import core_hours
from stepsmith.report.findings import FindingsTable, findings_tables
from stepsmith.report.verdict import ratio_text

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "docs" / "7-paper-a.md", ROOT / "docs" / "9-paper-b.md")
SCALES = ("full", "hundred", "small", "quick")
HEAD = (
    "| protocol | task, steps | optimizer | rate | mean loss | ratio | final loss | median | ratio "
    "| points | diverged |\n|---|---|---|---|---|---|---|---|---|---|---|"
)
"""Points of test accuracy above the best baseline."""
DEEP_HEAD = (
    "| protocol | task, steps | optimizer | rate | final loss | ratio | test accuracy, % | points "
    "| steps to best | diverged |\n|---|---|---|---|---|---|---|---|---|---|"
)
"""Of the deep networks' contests: every optimizer is shown."""
FINDINGS_ALONE = ("a15-techniques",)
"""Recipes of so many rules that what is found of them stands for their losses."""
LONGEST = 30
"""Lines of a table of findings; longer ones are left to the report."""
OPEN = 15
"""Lines of a recipe's findings, all tables together; more are folded away."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    chosen = parser.parse_args()
    stale = False
    for page in PAGES:
        before = page.read_text()
        after = re.sub(
            r"(<!-- (table|hours): (.+?) -->\n).*?(<!-- end -->)", _filled, before, flags=re.DOTALL
        )
        stale |= after != before
        if not chosen.check:
            page.write_text(after)
    if chosen.check:
        raise SystemExit(int(stale))


def _filled(found: re.Match[str]) -> str:
    kind, (first, *others) = found[2], found[3].split()
    text = table(first) if kind == "table" else hours(first, others)
    return f"{found[1]}{text}\n{found[4]}"


def hours(scale: str, recipes: Sequence[str], results: Path = ROOT / "results") -> str:
    """A line of what recipes took together: what they share was done once, and counts once."""
    run = [name for name in recipes if (results / name / scale / "records.parquet").exists()]
    found = [Records.load(results / name / scale / "records.parquet") for name in run]
    spent = {
        block.values.tobytes(): block
        for records in found
        for block in records.select("core_seconds")
    }
    learned = [
        block
        for records in found
        for metric in ("meta_training_core_seconds", "parent_core_seconds")
        for block in records.select(metric)
    ]
    together = core_hours(Records([*spent.values(), *learned]))
    left = [name for name in recipes if name not in run]
    return (
        f"{len(run)} recipes in all: {together['comparisons']:.1f} core-hours of bases, tuning and "
        f"tests, {together['meta_training']:.1f} of meta-training."
        + (f" Not yet run: {', '.join(left)}." if left else "")
    )


def table(recipe: str, results: Path = ROOT / "results") -> str:
    """The Markdown tables of a recipe, or a line that says that it was not run."""
    for scale in SCALES:
        folder = results / recipe / scale
        if not (folder / "summary.json").exists():
            continue
        summary = json.loads((folder / "summary.json").read_text())
        config = json.loads((folder / "config.json").read_text())
        where, findings = _where(summary, config, scale), findings_tables(config["findings"])
        if recipe in FINDINGS_ALONE:
            return "\n\n".join([where, *map(_shown, findings)])
        losses = (_deep_table if recipe.startswith("b") else _table)(summary)
        return "\n\n".join([losses, where, *_folded(findings)])
    return f"\nNot yet run: `stepsmith recipe run {recipe}`.\n"


def _shown(found: FindingsTable) -> str:
    if len(found.lines) <= LONGEST:
        return found.markdown()
    return f"**{found.caption}**: {len(found.lines)} lines, in the report."


def _folded(findings: list[FindingsTable]) -> list[str]:
    """The tables, behind a line that opens them where they are long."""
    shown = [_shown(found) for found in findings]
    if sum(len(found.lines) for found in findings) <= OPEN:
        return shown
    topics = dict.fromkeys(re.split("[:,]", found.caption)[0] for found in findings)
    names = html.escape(", ".join(topic for topic in topics if topic))
    return [f"<details>\n<summary>Tables: {names}</summary>", *shown, "</details>"]


def _cells(summary: dict[str, Any]) -> dict[tuple[Any, ...], dict[str, dict[str, Any]]]:
    """(protocol, task, horizon, optimizer) -> metric -> row."""
    found: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in summary["rows"]:
        key = (row["protocol"], row["task"], row["horizon"], row["optimizer"])
        found.setdefault(key, {})[row["metric"]] = row
    return found


def _where(summary: dict[str, Any], config: dict[str, Any], scale: str) -> str:
    used = summary["machine"]["processor"]
    if "--device cuda" in summary["command"]:
        used = summary["machine"]["accelerator"]
    comparisons, meta_training = (
        f"{hours:.2g}" if hours < 10 else f"{hours:,.0f}"
        for hours in (config["core_hours"][what] for what in ("comparisons", "meta_training"))
    )
    return (
        f"`results/{summary['recipe']}/{scale}`; {used}; comparisons {comparisons}, "
        f"meta-training {meta_training} core-hours."
    )


def _deep_table(summary: dict[str, Any]) -> str:
    lines = [DEEP_HEAD]
    for (protocol, task, horizon, name), cells in _cells(summary).items():
        final, steps = cells["final_train_loss"], cells.get("steps_to_baseline")
        test = cells.get("test_accuracy")
        rate = final["hyper_parameters"].get("lr") if final["kind"] == "baseline" else None
        reached = "" if steps is None else "never" if steps["mean"] is None else steps["mean"]
        parts = (
            protocol, f"{task}, {horizon:,}", f"**{name}**" if final["kind"] == "learned" else name,
            "" if rate is None else f"{rate:g}", f"{final['mean']:.4g}", ratio_text(final),
            "" if test is None else f"{100 * test['mean']:.2f}",
            _points(test),
            reached if isinstance(reached, str) else f"{reached:,.0f}",
            f"{final['diverged']}/{final['seeds']}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(parts)} |")
    return "\n".join(lines)


def _points(test: dict[str, Any] | None) -> str:
    return "" if test is None or test["ratio"] is None else f"{test['ratio']:+.2f}"


def _table(summary: dict[str, Any]) -> str:
    found = _cells(summary)
    best = {}  # of the baselines, the three with the lowest mean loss
    for key, cells in found.items():
        if cells["mean_train_loss"]["kind"] == "baseline":
            best.setdefault(key[:3], []).append((cells["mean_train_loss"]["mean"], key[3]))
    lines = [HEAD]
    for key in sorted(found, key=lambda k: (k[0] != "as-published", k[2], k[1])):
        mean, final = (found[key][metric] for metric in ("mean_train_loss", "final_train_loss"))
        ranks = [name for _, name in sorted(best.get(key[:3], []))[:3]]
        if mean["kind"] == "baseline" and key[3] not in (*ranks, "adam", "nag"):
            continue
        rates = [row["hyper_parameters"].get("lr") for row in (mean, final)]
        rate = "" if mean["kind"] == "learned" else " / ".join(
            dict.fromkeys(f"{value:g}" for value in rates if value is not None)
        )  # fmt: skip
        name = f"**{key[3]}**" if mean["kind"] == "learned" else key[3]
        cells = (
            key[0], f"{key[1]}, {key[2]:,}", name, rate, f"{mean['mean']:.4g}", ratio_text(mean),
            f"{final['mean']:.4g}", f"{final['median']:.4g}", ratio_text(final),
            _points(found[key].get("test_accuracy")), f"{mean['diverged']}/{mean['seeds']}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
