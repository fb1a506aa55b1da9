"""Write the tables of docs/7-paper-a.md from the records under results/, between its markers.

    python scripts/make_tables.py [--check]

A line `<!-- table: RECIPE -->` is followed by the table of that recipe's largest scale there is, up
to `<!-- end -->`. With --check nothing is written, and the exit code says whether it would change.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from stepsmith.report.verdict import ratio_text

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "7-paper-a.md"
SCALES = ("full", "hundred", "quick")
HEAD = (
    "| protocol | task, steps | optimizer | rate | mean loss | ratio | final loss | median | ratio "
    "| diverged |\n|---|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    chosen = parser.parse_args()
    before = PAGE.read_text()
    after = re.sub(
        r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{table(found[2])}\n{found[3]}", before, flags=re.DOTALL,
    )  # fmt: skip
    if chosen.check:
        raise SystemExit(int(after != before))
    PAGE.write_text(after)


def table(recipe: str) -> str:
    """The Markdown table of a recipe, or a line that says that it was not run."""
    for scale in SCALES:
        path = ROOT / "results" / recipe / scale / "summary.json"
        if path.exists():
            return _table(json.loads(path.read_text()), scale)
    return f"\nNot yet run: `stepsmith recipe run {recipe}`.\n"


def _table(summary: dict[str, Any], scale: str) -> str:
    found: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in summary["rows"]:
        key = (row["protocol"], row["task"], row["horizon"], row["optimizer"])
        found.setdefault(key, {})[row["metric"]] = row
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
            f"{mean['diverged']}/{mean['seeds']}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    where = f"`results/{summary['recipe']}/{scale}`; {summary['machine']['processor']}."
    return "\n".join([*lines, "", where])


if __name__ == "__main__":
    main()
