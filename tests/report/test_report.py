"""Figures, sentences, the page and the folder, from made-up records."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stepsmith import store
from stepsmith.evaluate import records as records_module
from stepsmith.evaluate.records import Key, Records
from stepsmith.evaluate.statistics import summarise
from stepsmith.names import shown
from stepsmith.report import (
    break_even,
    cost_sentences,
    figures,
    folder,
    new_run_folder,
    page,
    read_results,
    rerender,
    verdicts,
    write_results,
)
from stepsmith.report import folder as module
from stepsmith.report.break_even import break_even_figure
from stepsmith.report.style import CROWD, STRONG, colours, dashes, svg
from stepsmith.store import CheckpointError

STEPS, SEEDS = 100, 8
TOY = figures.Panel("toy", STEPS)


def made(learned_rate=0.1, factor=1.0, task="toy", bad=0, ms=(4.0, 1.0), name="mine") -> Records:
    records = Records()
    rng = np.random.default_rng(1)
    noise = rng.random((SEEDS, STEPS)) * 0.02
    for optimizer, rate in ((name, learned_rate), ("adam", 0.06), ("sgd", 0.02)):
        learned = optimizer == name
        losses = 2 * np.exp(-rate * np.arange(STEPS)) * (factor if learned else 1) + 0.3 + noise
        if learned:
            losses[:bad, 50:] = np.nan
        key = Key(
            recipe="test", scale="quick", task=task, data="noise", optimizer=optimizer,
            horizon=STEPS, kind="learned" if learned else "baseline",
            tuned_for="" if learned else "mean,final", hyper_parameters=json.dumps({"lr": 0.1}),
        )  # fmt: skip
        seeds, steps = range(SEEDS), range(STEPS)
        records.add(key, "train_loss", losses, seeds=seeds, steps=steps, split="train")
        records.add(key, "test_accuracy", 0.9 - losses[:, :1] / 100, seeds=seeds, steps=[STEPS])
        cost = Key(task=task, purpose="cost", optimizer=optimizer, horizon=STEPS)
        step_ms = ms[0] if learned else ms[1]
        for metric, value in (("seconds_per_step", step_ms), ("gradient_seconds", 0.8)):
            records.add(cost, metric, np.full(5, value / 1e3), seeds=range(5), steps=[0])
        if learned:
            meta = Key(task=task, purpose="meta", optimizer=optimizer, checkpoint="c")
            records.add(meta, "meta_training_seconds", [30.0], seeds=[0], steps=[0])
            records.add(meta, "meta_training_core_seconds", [55.0], seeds=[0], steps=[0])
            records.add(meta, "validation_score", [[1.0, 0.5]], seeds=[0], steps=[0, 100])
        if not learned:
            tuning = Key(
                task=task, purpose="tuning", optimizer=optimizer, horizon=STEPS,
                hyper_parameters=json.dumps({"lr": 0.1}),
            )  # fmt: skip
            records.add(tuning, "train_loss", losses, seeds=seeds, steps=steps)
    return records


def test_the_verdict_names_the_leader_of_both_losses():
    (sentence,) = verdicts(summarise(made()))
    assert re.search(r"best tuned baseline, adam: mine leads", sentence)
    (sentence,) = verdicts(summarise(made(learned_rate=0.06)))
    assert "no clear difference" in sentence
    (sentence,) = verdicts(summarise(made(learned_rate=0.01)))
    assert sentence.count("adam leads") == 2
    assert "diverged" not in sentence
    (sentence,) = verdicts(summarise(made(bad=2)))
    assert "2 of its runs diverged" in sentence


@pytest.mark.parametrize(("seeds", "says"), [(1, "adam: a single run"), (3, "in each of 3 runs")])
def test_few_seeds_are_said_to_be_few(seeds, says):
    records = made()
    few = [replace(b, seeds=b.seeds[:seeds], values=b.values[:seeds]) for b in records.blocks]
    (sentence,) = verdicts(summarise(Records(few)))
    assert says in sentence


def test_what_was_not_tuned_is_not_called_so():
    records = made()
    given = [replace(b, key=replace(b.key, tuned_for="")) for b in records.blocks]
    (sentence,) = verdicts(summarise(Records(given)))
    assert "best baseline (as given, not tuned), adam" in sentence


def test_break_even_is_meta_seconds_over_seconds_saved():
    records = made(learned_rate=0.3, ms=(1.5, 1.0))
    rows = summarise(records)
    (entry,) = break_even(rows, records)
    saved = entry["baseline_steps"] * 1e-3 - entry["steps"] * 1.5e-3
    assert saved > 0
    assert entry["trainings"] == pytest.approx(30.0 / saved)
    assert "repaid after" in cost_sentences([entry])[0]
    assert "meta-training took 30 s (55 core-seconds)." in cost_sentences([entry])[0]


def test_break_even_prefers_the_meta_training_timed_beside_the_steps():
    records = made(learned_rate=0.3, ms=(1.5, 1.0))
    meta = next(records.select("meta_training_seconds")).key
    (before,) = break_even(summarise(records), records)
    records.add(meta, "meta_training_seconds_here", [60.0], seeds=[0], steps=[0])
    (entry,) = break_even(summarise(records), records)
    assert (entry["meta_seconds"], entry["meta_core_seconds"]) == (60.0, 55.0)
    assert entry["trainings"] == pytest.approx(2 * before["trainings"])


def test_break_even_takes_each_tasks_own_meta_training():
    records = made(task="one")
    others = made(task="other")
    for block in others.blocks:
        if block.metric.startswith("meta_training"):
            block.values[:] *= 10
    records.extend(others)
    entries = break_even(summarise(records), records)
    assert {entry["task"]: entry["meta_seconds"] for entry in entries} == {"one": 30, "other": 300}
    assert {entry["meta_core_seconds"] for entry in entries} == {55, 550}


def test_core_seconds_not_recorded_are_not_told():
    records = made()
    blocks = [b for b in records.blocks if b.metric != "meta_training_core_seconds"]
    (entry,) = break_even(summarise(records), Records(blocks))
    assert entry["meta_core_seconds"] is None
    assert "meta-training took 30 s. " in cost_sentences([entry])[0]


def test_the_break_even_figure_shows_trainings_and_says_why_never():
    records = made(task="quick", learned_rate=0.3, ms=(1.5, 1.0))
    records.extend(made(task="slow", ms=(40.0, 1.0)))
    records.extend(made(task="worse", learned_rate=0.001))
    quick, slow, worse = entries = break_even(summarise(records), records)
    figure = break_even_figure(entries)
    assert figure is not None
    repaid, never = figure.axes
    assert [line.get_xdata()[0] for line in repaid.lines] == [quick["trainings"]]
    assert repaid.get_xscale() == "log"
    low, high = repaid.get_xlim()
    assert low < quick["trainings"] < high
    assert len(never.lines) == 2
    text = svg(figure)
    for told in ("slower: 2.48 s against 0.1 s", "never reaches adam's final loss", ">never<",
                 ">quick<", ">slow<", ">worse<"):  # fmt: skip
        assert told in text, told
    assert worse["trainings"] is None
    assert ">none<" in svg(break_even_figure([slow]))
    free = break_even_figure([{**quick, "trainings": 0.0}])
    assert free.axes[0].lines[0].get_xdata()[0] > 0
    assert break_even_figure([]) is None


def test_what_is_slower_is_never_repaid():
    records = made(ms=(40.0, 1.0))
    (entry,) = break_even(summarise(records), records)
    assert entry["trainings"] is None
    assert "never repaid" in cost_sentences([entry])[0]
    assert "5,570 s against" in cost_sentences([{**entry, "seconds": 5569.5}])[0]
    records = made(learned_rate=0.001)
    (entry,) = break_even(summarise(records), records)
    assert entry["seconds"] is None
    assert "never reaches adam's final loss" in cost_sentences([entry])[0]


@pytest.mark.parametrize("bad", [0, 3, SEEDS])
def test_every_figure_draws_even_with_diverged_runs(bad):
    records = made(bad=bad)
    for figure in (
        figures.loss_curves(records, TOY), figures.accuracies(records, TOY),
        figures.step_costs(records, TOY), figures.meta_curve(records),
        figures.tuning_curves(records, TOY),
    ):  # fmt: skip
        assert figure is not None
        assert svg(figure).startswith("<svg")
    if 0 < bad < SEEDS:
        assert f"({bad} diverged)" in svg(figures.loss_curves(records, TOY))


def test_figures_are_the_same_every_time():
    one, two = (svg(figures.loss_curves(made(), TOY)) for _ in range(2))
    assert one == two


def validated(*rules: tuple[str, str, list[float]]) -> Records:
    """Records of meta-trainings: optimizer, meta-task and scores."""
    records = Records()
    for number, (optimizer, task, scores) in enumerate(rules):
        key = Key(purpose="meta", optimizer=optimizer, meta_task=task, checkpoint=str(number))
        records.add(key, "validation_score", [scores], seeds=[0], steps=range(len(scores)))
    return records


def meta_axes(*rules: tuple[str, str, list[float]]):
    return figures.meta_curve(validated(*rules)).axes[0]


@pytest.mark.parametrize(
    ("scores", "scale"),
    [([4262, 2.6, 0.3], "log"), ([2.4, 0.5], "linear"), ([9, 0.0], "linear"),
     ([np.inf, 2.0, 1.0], "linear")],
)  # fmt: skip
def test_meta_training_has_a_logarithmic_axis_where_scores_span_much(scores, scale):
    assert meta_axes(("mine", "toy", scores)).get_yscale() == scale


def test_each_rule_has_a_line_of_its_own_in_the_figure_of_meta_training():
    axes = meta_axes(("raw", "mlp", [1, 2]), ("raw", "quadratic", [1, 2]), ("own", "mlp", [1, 2]))
    assert [line.get_label() for line in axes.lines] == ["raw, on mlp", "raw, on quadratic", "own"]
    assert len({line.get_color() for line in axes.lines}) == 3


def test_a_rule_by_two_names_is_drawn_once_in_the_figure_of_meta_training():
    records = validated(("mine", "mlp", [1, 2]), ("other", "mlp", [1, 2]))
    for block in list(records.blocks):
        key = replace(block.key, optimizer=f"{block.key.optimizer}, cosine")
        records.add(key, "validation_score", block.values, seeds=[0], steps=range(2))
    lines = figures.meta_curve(records).axes[0].lines
    assert [line.get_label() for line in lines] == ["mine", "other"]


def test_rules_that_differ_in_their_seed_have_one_colour_and_other_dashes():
    names = [f"{name}, seed {seed}" for name in "abcdefghijkl" for seed in (0, 1)]
    palette = colours((name, "learned") for name in names)
    assert len(set(palette.values())) == 12
    assert palette["a, seed 0"] == palette["a, seed 1"] == STRONG[0]
    assert dashes("a, seed 0", "learned") != dashes("a, seed 1", "learned")
    assert dashes("b, seed 1", "learned") == dashes("a, seed 1", "learned")
    axes = meta_axes(("a, seed 0", "mlp", [1, 2]), ("a, seed 1", "mlp", [1, 2]))
    assert [line.get_color() for line in axes.lines] == [STRONG[0]] * 2


def test_a_rule_has_its_colour_under_a_schedule_too():
    names = ["a", "b in subspace", "a, cosine", "b in subspace, cosine to half"]
    palette = colours((name, "learned") for name in names)
    assert palette["a"] == palette["a, cosine"] != palette["b in subspace"]
    assert palette["b in subspace"] == palette["b in subspace, cosine to half"]
    lines = [dashes(name, "learned") for name in names]
    assert lines[:2] == ["-", "--"]
    assert lines[2] == lines[3] not in lines[:2]
    assert dashes("adamw in subspace, cosine", "baseline") == "--"
    assert dashes("adamw in subspace, cosine to half", "baseline") == lines[2]


@pytest.mark.parametrize("names", [
    [f"rule {number}" for number in range(CROWD)], ["one letter " * 6, "another letter " * 6],
])  # fmt: skip
def test_names_that_are_many_or_long_stand_below_and_fit(names):
    records = Records()
    for name in names:
        records.extend(made(name=name))
    figure = figures.loss_curves(records, TOY)
    assert figure.axes[0].get_legend() is None
    (legend,) = figure.legends
    assert len(legend.get_texts()) == len(figure.axes[0].lines)
    figure.draw_without_rendering()
    assert legend.get_window_extent().width <= figure.bbox.width
    assert figures.loss_curves(made(), TOY).legends == []


def test_losses_that_span_little_have_labels_too():
    records = made(ms=(4.0, 1.0))
    for block in records.select("train_loss"):
        block.values[:] = 4.5 + block.values / block.values.max()
    axes = figures.loss_curves(records, TOY).axes[0]
    axes.figure.canvas.draw()
    low, high = axes.get_ylim()
    shown = [tick for tick in axes.yaxis.get_ticklabels() if low <= tick.get_position()[1] <= high]
    assert len([tick for tick in shown if tick.get_text()]) >= 3


def test_figures_of_what_was_not_measured():
    empty = Records()
    assert figures.accuracies(empty, TOY) is None
    assert figures.step_costs(empty, TOY) is None
    assert figures.meta_curve(empty) is None
    assert figures.tuning_curves(empty, TOY) is None


def written(folder, **options) -> dict:
    return write_results(
        folder, made(**options), recipe="test", scale="quick", command="stepsmith <test>",
        config={"seeds": SEEDS},
    )  # fmt: skip


def test_a_folder_holds_everything(tmp_path):
    summary = written(tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.json", "records.parquet", "summary.json", "report.html", "toy.svg"} <= names
    assert set(summary) == {"recipe", "scale", "command", "machine", "versions", "rows", "figures"}
    row = summary["rows"][0]
    assert set(row) == {
        "protocol", "optimizer", "kind", "tuned_for", "rule", "meta_task", "hyper_parameters",
        "task", "horizon", "metric", "mean", "median", "low", "high", "seeds", "diverged",
        "against", "ratio", "ratio_low", "ratio_high",
    }  # fmt: skip
    records, again, config = read_results(tmp_path / "run")
    assert json.loads(json.dumps(summary)) == again
    assert config == {"seeds": SEEDS}
    assert summarise(records) == summary["rows"]


def test_a_folder_is_never_overwritten(tmp_path):
    written(tmp_path / "run")
    with pytest.raises(ValueError, match="results of an earlier run"):
        written(tmp_path / "run")
    names = [new_run_folder(tmp_path, "run").name for _ in range(3)]
    assert names == ["run-2", "run-3", "run-4"]


def test_the_page_is_self_contained_and_escaped(tmp_path):
    written(tmp_path / "run", name="<b>mine</b>")
    page = (tmp_path / "run" / "report.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page)
    assert "@import" not in page
    assert "<script" not in page
    assert "<b>mine" not in page
    assert "&lt;b&gt;mine&lt;/b&gt;" in page
    assert "stepsmith &lt;test&gt;" in page
    assert page.count("<svg") >= 4
    for word in ("nan", "None", "inf"):
        assert not re.search(rf">\s*{word}\s*<", page)


def test_a_page_is_drawn_again_from_records_alone(tmp_path):
    folder = tmp_path / "run"
    written(folder)
    before = (folder / "report.html").read_text()
    (folder / "report.html").unlink()
    (folder / "toy.svg").unlink()
    assert rerender(folder).read_text() == before
    assert (folder / "toy.svg").exists()


def test_a_folder_of_a_transfer_has_its_figures(tmp_path):
    records = made(task="toy")
    records.extend(made(task="toy@shift", bad=2))
    options = {"recipe": "t", "scale": "quick", "command": "c", "config": {}}
    write_results(tmp_path / "run", records, **options)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"transfer-mean-100.svg", "transfer-final-100.svg", "break-even.svg"} <= names
    page = (tmp_path / "run" / "report.html").read_text()
    assert "rules in rows, tasks in columns" in page
    assert page.count("25% diverged") == 2
    assert "What meta-training costs" in page
    written(tmp_path / "alone")
    alone = tmp_path / "alone"
    assert not list(alone.glob("transfer*"))
    assert "rules in rows" not in (alone / "report.html").read_text()


def test_figures_that_are_no_more_go(tmp_path):
    folder = tmp_path / "run"
    options = {"recipe": "t", "scale": "quick", "command": "c", "config": {}}
    (tmp_path / "outside.svg").write_text("")
    summary = write_results(folder, made(task="first"), **options)
    assert set(summary["figures"]) == {path.name for path in folder.glob("*.svg")}
    (folder / "mine.svg").write_text("")
    summary["figures"].append("../outside.svg")
    (folder / "summary.json").write_text(json.dumps(summary))
    write_results(folder, made(task="second"), overwrite=True, **options)
    names = {path.name for path in folder.glob("*.svg")}
    assert {"second.svg", "mine.svg"} <= names
    assert not any(name.startswith("first") for name in names)
    assert (tmp_path / "outside.svg").exists()
    (folder / "summary.json").write_text("{")
    write_results(folder, made(task="third"), overwrite=True, **options)
    assert (folder / "third.svg").exists()


def test_results_are_there_before_figures_and_survive_them(tmp_path, monkeypatch, caplog):
    folder = tmp_path / "run"
    seen = []

    def draw(*arguments):
        seen.extend(sorted(path.name for path in folder.iterdir() if path.suffix))
        raise CheckpointError("toy.svg: could not be written (No space left on device)")

    with monkeypatch.context() as patched:
        patched.setattr("stepsmith.report.folder._draw", draw)
        summary = written(folder)
    assert seen == ["config.json", "records.parquet", "summary.json"]
    assert "No space left" in caplog.text
    assert f"stepsmith report {folder}" in caplog.text
    assert summary["rows"] == summarise(made())
    assert summary["figures"] == []
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert rerender(folder).exists()
    assert (folder / "toy.svg").exists()


@pytest.mark.parametrize("lost", [["summary.json"], ["summary.json", "config.json"]])
def test_records_alone_are_enough_for_a_report(tmp_path, lost):
    whole = written(tmp_path / "run")
    for name in [*lost, "report.html", "toy.svg"]:
        (tmp_path / "run" / name).unlink()
    assert "<svg" in rerender(tmp_path / "run").read_text()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for key in ("rows", "recipe", "scale", "figures"):
        assert summary[key] == json.loads(json.dumps(whole[key])), key
    assert summary["machine"] == {}  # not this one's: nobody knows
    assert read_results(tmp_path / "run")[2] == ({} if "config.json" in lost else {"seeds": SEEDS})


def test_records_without_a_summary_are_not_overwritten(tmp_path):
    written(tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(ValueError, match="results of an earlier run"):
        written(tmp_path / "run", factor=2.0)


@pytest.mark.parametrize("name", ["records.parquet", "config.json", "summary.json"])
def test_results_that_a_folder_refuses_are_kept_elsewhere(tmp_path, monkeypatch, name):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    put = module.write_bytes

    def refused(path, data):
        if path.parent == tmp_path / "run" and path.name == name:
            raise CheckpointError(f"{path}: could not be written (full)")
        put(path, data)

    for one in (records_module, module):
        monkeypatch.setattr(one, "write_bytes", refused)
    with pytest.raises(CheckpointError, match=r"full.* The results are in .*stepsmith-"):
        written(tmp_path / "run")
    (spare,) = tmp_path.glob("stepsmith-*")
    assert read_results(spare)[1]["rows"] == json.loads(json.dumps(summarise(made())))
    assert rerender(spare).exists()


def test_results_that_can_be_kept_nowhere(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "void"))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/run.* Nor could they be kept elsewhere"):
        written(tmp_path / "file" / "run")


@pytest.mark.parametrize("figures", ["toy.svg", 5, None, [5, None, ["x.svg"], "../out.svg"], {}])
def test_figures_that_a_summary_garbles_are_none(tmp_path, figures):
    (tmp_path / "out.svg").write_text("")
    summary = written(tmp_path / "run")
    summary["figures"] = figures
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    rerender(tmp_path / "run")
    assert (tmp_path / "run" / "toy.svg").exists()
    assert (tmp_path / "out.svg").exists()


def test_a_run_folder_where_a_link_leads_nowhere(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "void" / "void")
    with pytest.raises(CheckpointError, match="cannot be made"):
        new_run_folder(tmp_path / "link", "run")


def test_folders_that_are_none(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        rerender(tmp_path)
    written(tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text("{")
    with pytest.raises(CheckpointError, match="not readable as JSON"):
        rerender(tmp_path / "run")
    for content in ("[]", "{}"):
        (tmp_path / "run" / "summary.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"summary\.json: not of a run"):
            rerender(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be made"):
        new_run_folder(tmp_path / "file", "run")


NAMES = {
    "formula": "$x^2$", "dollar": "a$b", "open": "$\\frac{", "hidden": "_x", "escaped": "\\$5",
    "rich": "[red]x[/red]", "html": "</text></svg><script>alert(1)</script>&amp;]]>-->",
    "jinja": "{{ 7 * 7 }}{% raw %}", "terminal": "a\x1b[2Jb\x00", "turned": "\u202ecba",
    "letters": "中文 👍",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_names_in_figures_are_no_formulas_markup_or_commands(name):
    records = made(name=name, task=name)
    panel = figures.Panel(name, STEPS)
    drawn = [
        figures.loss_curves(records, panel), figures.accuracies(records, panel),
        figures.step_costs(records, panel),
    ]  # fmt: skip
    for figure in drawn:
        text = svg(figure)
        found = ["".join(one.itertext()) for one in ElementTree.fromstring(text).iter()]
        assert any(shown(name) in one for one in found)
        assert not set("\x1b\x00\u202e") & set(text)
    legend = drawn[0].axes[0].get_legend() or drawn[0].legends[0]
    assert sorted(one.get_text() for one in legend.get_texts()) == sorted(["adam", "sgd", name])


def test_a_seed_of_many_digits_has_a_dash():
    assert dashes("x, seed " + "9" * 5000, "learned") == dashes("x, seed 99", "learned")


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    place = tmp_path_factory.mktemp("once") / "run"
    written(place)
    return place


@pytest.fixture
def run(once, tmp_path):
    """A folder of results, for a test to spoil."""
    return Path(shutil.copytree(once, tmp_path / "run"))


def test_names_on_a_page_are_text(tmp_path):
    name = "".join(NAMES[kind] for kind in ("html", "terminal", "jinja", "formula"))
    config = {"findings": {name: [{"task": name, "rule": name, "value": 1.0}]}, name: name}
    records = made(name=name, task=name)
    summary = write_results(
        tmp_path / "run", records, recipe=name, scale="quick", command=name, config=config
    )
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<script" not in page
    assert not set("\x1b\x00\u202e") & set(page)
    assert html.escape(shown(name)).replace("&#x27;", "&#39;") in page
    assert {path.name for path in (tmp_path / "run").glob("*.svg")} == set(summary["figures"])


def test_panels_that_would_be_called_alike_are_told_apart():
    tasks = ["a b", "a-b", "A.b", "a/b", "a@b", "a-b-cost", "meta-training", "transfer-mean-100"]
    records = Records()
    for task in tasks:
        records.extend(made(task=task))
    names = figures.panel_files(records)
    files = [f"{name}{end}".lower() for name in names.values() for end in figures.ENDINGS]
    assert len(names) == len(tasks)
    assert len(set(files)) == len(files)
    assert not {"meta-training", "transfer-mean-100"} & set(files)
    assert names[figures.Panel("a b", STEPS)] == "a-b"


def test_an_optimizers_rate_may_be_anything():
    records = made()
    given = json.dumps({"lr": "tensor(0.1)"})
    records.blocks = [
        replace(b, key=replace(b.key, hyper_parameters=given)) if b.key.purpose == "test" else b
        for b in records.blocks
    ]
    cells = {row["metric"]: row for row in summarise(records) if row["optimizer"] == "adam"}
    assert page._rates(cells) == "tensor(0.1)"


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("summary.json", {"recipe": 3}, "'recipe' should be a str, is 3"),
        ("summary.json", {"command": None}, "'command'"),
        ("summary.json", {"machine": []}, "'machine' should be a dict"),
        ("summary.json", {"versions": "1"}, "'versions'"),
        ("config.json", {"findings": [1]}, "'findings' should be a dict"),
        ("config.json", {"findings": "a"}, "'findings'"),
    ],
)
def test_fields_of_a_folders_files_are_typed(run, file, change, says):
    path = run / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=says) as caught:
        rerender(run)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"a": 1, "a": 2}', "[" * 100_000, '{"a": 1' + "0" * 5000 + "}"]
)
@pytest.mark.parametrize("file", ["summary.json", "config.json"])
def test_files_that_are_no_json_of_ours(run, file, text):
    (run / file).write_text(text)
    with pytest.raises(CheckpointError) as caught:
        rerender(run)
    assert str(caught.value).startswith(str(run / file))
    assert len(str(caught.value)) < len(str(run)) + 200


@pytest.mark.parametrize("file", ["summary.json", "config.json", "records.parquet"])
def test_pipes_in_a_folder_do_not_wait(run, file):
    (run / file).unlink()
    os.mkfifo(run / file)
    with pytest.raises(CheckpointError, match=f"{file}: no such file; it is a pipe"):
        rerender(run)


@pytest.mark.parametrize(
    ("column", "values", "says"),
    [
        ("seed", pa.string(), "column 'seed' should be int64, is string"),
        ("value", pa.string(), "column 'value' should be double"),
        ("horizon", pa.float64(), "column 'horizon'"),
        ("task", pa.int64(), "column 'task'"),
    ],
)
def test_columns_of_records_are_typed(run, column, values, says):
    path = run / "records.parquet"
    table = pq.read_table(path)
    place = table.column_names.index(column)
    pq.write_table(table.set_column(place, column, pa.array([None] * len(table), values)), path)
    with pytest.raises(CheckpointError, match=says):
        rerender(run)


@pytest.mark.parametrize("told", ["", "{", "[]", '{"lr": "x"}', "{}", '{"lr": true}'])
def test_hyper_parameters_of_tuning_runs_are_read_or_refused(run, told):
    records = made()
    records.blocks = [
        replace(b, key=replace(b.key, hyper_parameters=told)) if b.key.purpose == "tuning" else b
        for b in records.blocks
    ]
    records.save(run / "records.parquet")
    with pytest.raises(CheckpointError, match=r"records.parquet: hyper_parameters of train_loss"):
        rerender(run)


def test_one_process_at_a_time_writes_results(run, tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "WAIT", 0.0)
    with store.claimed(tmp_path / "new"), pytest.raises(CheckpointError, match="another process"):
        written(tmp_path / "new")
    assert not (tmp_path / "new" / "summary.json").exists()
    with store.claimed(run), pytest.raises(CheckpointError, match="another process"):
        rerender(run)


def test_results_that_came_meanwhile_are_not_overwritten(tmp_path, monkeypatch):
    @contextmanager
    def overtaken(place, wait):
        place.mkdir()
        (place / "summary.json").write_text("{}")
        yield

    monkeypatch.setattr(folder, "claimed", overtaken)
    with pytest.raises(ValueError, match="results of an earlier run"):
        written(tmp_path / "run")
    assert (tmp_path / "run" / "summary.json").read_text() == "{}"
