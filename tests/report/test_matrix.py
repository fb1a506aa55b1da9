"""The heat map of a transfer."""

from __future__ import annotations

import math

import pytest

from stepsmith.report.matrix import LIMIT, heat_maps, matrix_figures
from stepsmith.report.style import short, svg, wrapped


def row(rule="a", task="one", ratio=0.9, **changed) -> dict:
    return {
        "protocol": "corrected", "horizon": 100, "metric": "mean_train_loss", "kind": "learned",
        "optimizer": f"learned ({rule})", "meta_task": rule, "rule": "LSTMRule",
        "hyper_parameters": {}, "task": task, "ratio": ratio, "against": "nag", "diverged": 0,
        "ratio_low": ratio and ratio - 0.01, "ratio_high": ratio and ratio + 0.02, "seeds": 8,
        **changed,
    }  # fmt: skip


def patches(figure) -> list:
    return figure.axes[0].patches


def test_a_cell_tells_ratio_interval_and_diverged_runs():
    rows = [row(), row(task="two", ratio=1.25, diverged=2)]
    (figure,) = heat_maps(rows).values()
    text = svg(figure)
    for told in ("0.900", "0.890 to 0.920", "1.250", "1.240 to 1.270", "25% diverged", ">one<",
                 ">two<", "100 steps"):  # fmt: skip
        assert told in text, told
    assert text.count("diverged") == 1


def test_colours_go_by_the_logarithm_and_are_even_about_one():
    ratios = {"even": 1.0, "better": 0.8, "worse": 1.25, "best": 1 / LIMIT, "off": 1e-6}
    (figure,) = heat_maps([row(task=task, ratio=r) for task, r in ratios.items()]).values()
    found = dict(zip(ratios, (patch.get_facecolor() for patch in patches(figure)), strict=True))
    assert found["even"] == pytest.approx((1, 1, 1, 1), abs=0.01)
    assert found["off"] == found["best"]

    def strength(colour):
        return 3 - sum(colour[:3])

    share = math.log(1.25) / math.log(LIMIT)
    assert strength(found["better"]) / strength(found["best"]) == pytest.approx(share, abs=0.02)
    red, green, _, _ = found["worse"]
    assert red > green
    red, green, _, _ = found["better"]
    assert green > red


def test_a_rules_own_task_is_outlined():
    rows = [row(r, t) for r in ("one", "two") for t in ("one", "two")]
    (figure,) = heat_maps(rows).values()
    assert [patch.get_linewidth() > 1 for patch in patches(figure)] == [True, False, False, True]


def test_a_heat_map_for_each_protocol_and_horizon_with_several_tasks():
    rows = [row(task=task, horizon=h, protocol=p, metric=m) for task in ("one", "two")
            for h, p in ((100, "corrected"), (100, "as-published"), (1000, "corrected"))
            for m in ("mean_train_loss", "final_train_loss")]  # fmt: skip
    alone = [row(horizon=5), row(task="one", horizon=6, ratio=None),
             row(task="two", horizon=6, ratio=None)]  # fmt: skip
    assert set(matrix_figures(rows + alone)) == {
        f"transfer-{m}-{rest}" for m in ("mean", "final")
        for rest in ("100", "100-as-published", "1000")
    }  # fmt: skip
    baselines = [row(task=task, kind="baseline") for task in ("one", "two")]
    assert matrix_figures(baselines) == {}


def test_the_title_says_what_the_baselines_were_tuned_for():
    metrics = ("mean_train_loss", "final_train_loss")
    rows = [row(task=task, metric=m, **more) for task in ("one", "two") for m in metrics
            for more in ({}, {"kind": "baseline", "tuned_for": "final"})]  # fmt: skip
    texts = {name: svg(figure) for name, figure in matrix_figures(rows).items()}
    # Titles are wrapped: one word from each.
    assert "(tuned" in texts["transfer-mean-100"]
    assert "(tuned" not in texts["transfer-final-100"]


def test_pairs_that_were_not_run_stay_empty():
    rows = [row("a", "one"), row("a", "two"), row("b", "two")]
    (figure,) = heat_maps(rows).values()
    assert len(patches(figure)) == 3


def test_a_label_that_is_another_rule_elsewhere_has_no_row():
    rows = [row("a", task, optimizer=label, meta_task=meta) for task, label, meta in (
        ("one", "own", "one"), ("two", "own", "two"), ("one", "same", "one"), ("two", "same", "one")
    )]  # fmt: skip
    (figure,) = heat_maps(rows).values()
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["same"]
    assert heat_maps(rows[:2]) == {}
    halved = [row("a", "one"), row("a", "two", hyper_parameters={"step_scale": 0.5})]
    assert heat_maps(halved) == {}


def test_names_are_shortened_and_wrapped():
    assert short("learned (mlp-mnist)") == "mlp-mnist"
    assert short("learned (a)'") == "a'"
    assert short("mine") == "mine"
    assert wrapped("mlp-mnist") == "mlp-mnist"
    assert wrapped("mlp-mnist@1000@shift@rotate").replace("\n", "") == "mlp-mnist@1000@shift@rotate"
    assert max(map(len, wrapped("convnet5x5-fashion_mnist@noise").split("\n"))) <= 15
