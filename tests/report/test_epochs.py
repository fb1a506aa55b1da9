"""Figures of long trainings are drawn where there is something to draw."""

from __future__ import annotations

import numpy as np

from stepsmith.evaluate import Key, Records
from stepsmith.report.epochs import accuracy_curves, accuracy_spreads, update_tracks
from stepsmith.report.figures import panels
from stepsmith.report.folder import write_results
from stepsmith.report.style import colours, dashes


def records(epochs: int = 4, directions: int = 3) -> Records:
    found = Records()
    draw = np.random.default_rng(0)
    for name, kind in (("adamw in subspace, cosine", "baseline"), ("SL2O", "learned")):
        key = Key(task="net", optimizer=name, kind=kind, tuned_for="mean,final", horizon=8)
        seeds = range(3)
        found.add(key, "train_loss", 1 + draw.random((3, 8)), seeds=seeds, steps=range(8))
        steps = range(8 // epochs, 9, 8 // epochs)
        values = draw.random((3, epochs))
        found.add(key, "test_accuracy", values, seeds=seeds, steps=steps, split="test")
        for k in range(directions):
            values = draw.standard_normal((3, 8))
            found.add(key, f"update_{k + 1}", values, seeds=seeds, steps=range(8))
    return found


def test_accuracy_by_epoch():
    found = records()
    (panel,) = panels(found)
    figure = accuracy_curves(found, panel)
    assert figure is not None
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    (block,) = found.select("test_accuracy", optimizer="SL2O")
    np.testing.assert_allclose(lines["SL2O"].get_ydata(), 100 * block.values.mean(0))
    assert lines["adamw in subspace, cosine"].get_linestyle() == "--"
    assert accuracy_curves(records(epochs=1), panel) is None


def test_the_spread_of_accuracy():
    found = records(epochs=8)
    (panel,) = panels(found)
    figure = accuracy_spreads(found, panel)
    assert figure is not None
    assert len(figure.axes[0].get_yticklabels()) == 2
    assert accuracy_spreads(records(epochs=4), panel) is None  # one test in the last third


def test_updates_of_directions():
    found = records()
    (panel,) = panels(found)
    figure = update_tracks(found, panel)
    assert figure is not None
    assert len(figure.axes) == 6
    (block,) = found.select("update_2", optimizer="SL2O")
    *others, first = figure.axes[4].lines[1:]
    np.testing.assert_allclose(first.get_ydata(), block.values[0])
    assert len(others) == 2
    assert update_tracks(records(directions=0), panel) is None


def test_the_folder_and_the_page_hold_them(tmp_path):
    write_results(tmp_path, records(), recipe="r", scale="quick", command="c", config={})
    page = (tmp_path / "report.html").read_text()
    assert (tmp_path / "net-epochs.svg").exists()
    assert (tmp_path / "net-updates.svg").exists()
    assert "direction 3" in page
    assert "<th>test accuracy</th>" in page
    assert "<th>ms a step</th>" not in page  # nobody timed them
    assert page.count("<figure") >= 4


def test_a_subspaces_baseline_has_its_optimizers_colour_dashed():
    palette = colours([("adamw", "baseline"), ("adamw in subspace, cosine", "baseline")])
    assert len(set(palette.values())) == 1
    drawn = [dashes(name, "baseline") for name in ("adamw", "adamw in subspace")]
    assert drawn == ["-", "--"]
