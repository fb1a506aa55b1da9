"""Findings of recipes as tables, in Markdown and on the page."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from stepsmith.evaluate import Key, Records
from stepsmith.report import findings_tables, write_results

ROOT = Path(__file__).parents[2]
SPEED = {
    "task": "net", "protocol": "as-published", "rule": "mine", "against": "adamw", "steps": 690.0,
    "baseline_steps": 1100.0, "ratio": 0.62727, "ratio_of_each_seed": [0.6, None],
}  # fmt: skip


def markdown(findings) -> str:
    return "\n".join(table.markdown() for table in findings_tables(findings))


def test_a_list_of_entries_is_a_table_with_its_key_as_a_caption():
    (table,) = findings_tables(
        {
            "clock": [
                {"task": "net", "protocol": "as-published", "optimizer": "a", "with_all": None},
                {"task": "net", "protocol": "as-published", "optimizer": "b", "with_all": 12345.6},
            ]
        }
    )
    assert table.caption == "clock, net, as-published"
    assert table.head == ["optimizer", "with all"]
    assert table.lines == [["a", "–"], ["b", "12,346"]]
    assert table.markdown().splitlines() == [
        "**clock, net, as-published**", "", "| optimizer | with all |", "|---|---|", "| a | – |",
        "| b | 12,346 |",
    ]  # fmt: skip


def test_what_is_nested_under_a_networks_name_is_captioned_by_it():
    tables = findings_tables(
        {
            "net": {
                "parameters": 77850, "explained": 0.987654, "against_subspace": SPEED,
                "tuned": {"sgd": {"rate": 0.1, "at_edge": False}},
            }
        }
    )  # fmt: skip
    assert [table.caption for table in tables] == [
        "net", "net: against subspace, as-published", "net: tuned: sgd",
    ]  # fmt: skip
    assert tables[0].lines == [["77,850", "0.9877"]]
    assert tables[1].lines == [["mine", "adamw", "690", "1,100", "0.6273", "0.6, –"]]
    assert tables[2].lines == [["0.1", "no"]]


def test_entries_of_several_keys_share_a_table():
    (table,) = findings_tables({"tuned": {"a": {"rate": 0.1}, "b": {"rate": 0.001}}})
    assert (table.caption, table.head) == ("tuned", ["", "rate"])
    assert table.lines == [["a", "0.1"], ["b", "0.001"]]
    # An entry that says its name is not named twice.
    (table,) = findings_tables({name: SPEED | {"rule": name} for name in ("a", "b")})
    assert table.head[0] == "rule"


def test_one_value_of_each_on_several_tasks_has_the_tasks_as_columns():
    entry = {"optimizer": "a", "ratio": 1.02, "low": 1.0, "high": None}
    (table,) = findings_tables({"mlp": [entry], "convnet": [entry, {**entry, "optimizer": "b"}]})
    assert table.head == ["optimizer", "mlp", "convnet"]
    assert table.lines == [["a", "1.020 [1.000, –]", "1.020 [1.000, –]"],
                           ["b", "", "1.020 [1.000, –]"]]  # fmt: skip


def test_techniques_have_a_table_for_each_criterion():
    found = [
        {"task": "net", "horizon": horizon, "criterion": criterion, "technique": name,
         "ratio": 0.97, "low": 0.96, "high": 0.98, "ratios": [0.95, 0.99]}
        for horizon in (100, 1000) for criterion in ("mean", "final") for name in ("plain", "x")
    ]  # fmt: skip
    mean, final = findings_tables({"techniques": found})
    assert mean.caption == "techniques, net, mean loss: ratio"
    assert final.caption == "techniques, net, final loss: ratio"
    assert mean.head == ["technique", "100 steps", "1,000 steps"]
    assert mean.lines[1] == ["x", *["0.970 [0.960, 0.980] (0.950, 0.990)"] * 2]


def test_markdown_escapes_what_would_end_a_cell():
    assert "| a\\|b |" in markdown({"left_out": "a|b"})
    assert findings_tables({}) == []


def test_the_page_shows_them_escaped(tmp_path):
    records = Records()
    key = Key(task="net", optimizer="adam", kind="baseline", tuned_for="mean,final", horizon=2)
    records.add(key, "train_loss", [[1, 2]], seeds=[0], steps=range(2))
    config = {"findings": {"memory": [{"network": "<b>", "peak_bytes": 123456}]}}
    write_results(tmp_path, records, recipe="r", scale="quick", command="c", config=config)
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Findings</h2>" in page
    assert "<th>peak bytes</th>" in page
    assert "<td>&lt;b&gt;</td><td>123,456</td>" in page
    write_results(tmp_path, records, recipe="r", scale="quick", command="c", config={},
                  overwrite=True)  # fmt: skip
    assert "Findings" not in (tmp_path / "report.html").read_text()


@pytest.fixture(scope="module")
def make_tables():
    spec = importlib.util.spec_from_file_location("make_tables", ROOT / "scripts/make_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def written(root: Path, recipe: str, findings) -> None:
    folder = root / recipe / "hundred"
    folder.mkdir(parents=True)
    rows = [
        {"protocol": "corrected", "task": "net", "horizon": 100, "optimizer": "mine",
         "kind": "learned", "metric": f"{what}_train_loss", "mean": 0.5, "median": 0.5,
         "ratio": None, "diverged": 0, "seeds": 4, "hyper_parameters": {}}
        for what in ("mean", "final")
    ]  # fmt: skip
    summary = {
        "recipe": recipe, "scale": "hundred", "command": "c", "rows": rows,
        "machine": {"processor": "Abacus"},
    }  # fmt: skip
    config = {"core_hours": {"comparisons": 0.388, "meta_training": 123.4}, "findings": findings}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.json").write_text(json.dumps(config))


def test_tables_of_the_pages_end_with_cost_and_findings(make_tables, tmp_path):
    long = [{"number": n} for n in range(31)]
    written(tmp_path, "a13-spikes", {"left_out": [], "long": long})
    text = make_tables.table("a13-spikes", tmp_path)
    assert "| **mine** |" in text
    assert "`results/a13-spikes/hundred`; Abacus; comparisons 0.39, meta-training 123 core-hours." \
        in text  # fmt: skip
    assert text.endswith(
        "<details>\n<summary>Tables: long</summary>\n\n| left out |\n|---|\n| – |\n\n"
        "**long**: 31 lines, in the report.\n\n</details>"
    )
    assert "Not yet run" in make_tables.table("a1-quadratic", tmp_path)


def test_findings_stand_for_the_losses_of_very_many_rules(make_tables, tmp_path):
    written(tmp_path, "a15-techniques", {"techniques": [{"technique": "plain", "ratio": 1.0}]})
    text = make_tables.table("a15-techniques", tmp_path)
    assert "mine" not in text
    assert "| plain | 1 |" in text


def test_hours_of_several_recipes_count_what_they_share_once(make_tables, tmp_path):
    for recipe, own in (("b1", 3600.0), ("b2", 1800.0)):
        records = Records()
        for optimizer, seconds in (("sgd", 7200.0), ("adam", own)):
            key = Key(recipe=recipe, purpose="spent", optimizer=optimizer)
            records.add(key, "core_seconds", [seconds], seeds=[0], steps=[0])
        meta = Key(recipe=recipe, purpose="meta", checkpoint="the same")
        records.add(meta, "meta_training_core_seconds", [5400.0], seeds=[0], steps=[0])
        (tmp_path / recipe / "small").mkdir(parents=True)
        records.save(tmp_path / recipe / "small" / "records.parquet")
    assert make_tables.hours("small", ["b1", "b2", "b3"], tmp_path) == (
        "2 recipes in all: 3.5 core-hours of bases, tuning and tests, 1.5 of meta-training. "
        "Not yet run: b3."
    )


def test_markdown_of_names_is_text():
    names = [
        "a|b",
        "<b>x</b>",
        "[x](http://y)",
        "`c`",
        "*d*",
        "$x$",
        "_e_",
        "f\ng",
        "mlp-fashion_mnist",
    ]
    (table,) = findings_tables({"found": [{"rule": name, "value": 1.0} for name in names]})
    cells = [line.split(" | ")[0][2:] for line in table.markdown().splitlines()[4:]]
    assert cells == [
        r"a\|b", "&lt;b>x&lt;/b>", r"[x\](http://y)", r"\`c\`", r"\*d\*", r"\$x\$", r"\_e\_",
        r"f\ng", "mlp-fashion_mnist",
    ]  # fmt: skip
    assert r"a\|b" in findings_tables({"x": [{"a|b": 1.0, "c": 2.0}]})[0].markdown()


@pytest.mark.parametrize(
    "findings",
    [
        {"a": [1, {"b": 2}]},
        {"a": [{"protocol": {"x": 1}, "v": 1.0}]},
        {"a": [{"horizon": "many", "task": "t", "rule": "r", "v": 1.0}, {"rule": "s", "v": 2.0}]},
        {"a": [{"rule": "r", "v": "high", "low": "x", "high": None, "ratios": 3}]},
        {"a": [{"rule": "r", "v": 1.0, "low": 0.5}]},
        {"a": [{"rule": "r", "v": 1.0, "ratios": ["x", None]}]},
        {"a": {"b": {"c": []}}},
        {"a": [[1, 2], [3, 4]]},
    ],
    ids=str,
)  # fmt: skip
def test_findings_of_any_form_make_tables(findings):
    for table in findings_tables(findings):
        assert all(len(line) == len(table.head) for line in table.lines)
        table.markdown()
