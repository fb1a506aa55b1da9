"""The choices behind SL2O's rule: its inputs beside L2O-DM's, its windows, its episodes.

Source: Chen et al., "Scalable Learning to Optimize", ECCV 2022, supplement, sections 2.7 and 2.8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from stepsmith.evaluate import Key
from stepsmith.evaluate.run import add_meta_cost, learned_key
from stepsmith.hub import TrainedRule
from stepsmith.recipes.paper_b.comparisons import (
    SL2O,
    against_subspace,
    learn_episodes,
    of_episodes,
)
from stepsmith.recipes.paper_b.deep import (
    META_RATE,
    deep_recipe,
    depth,
    fresh_places,
    learn,
    place,
)
from stepsmith.recipes.study import Study
from stepsmith.rules import l2o_dm

UNROLLS = (5, 10, 15, 20)
EPISODES = (200, 500, 1000, 2000)
PUBLISHED_DM = (0.01, META_RATE)
"""Of L2O-DM as published: the factor on its outputs, and meta-Adam's rate."""
FACTORS_OF_DM = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)
RATES_OF_DM = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Both to choose from by validation."""


def versus_dm(study: Study) -> None:
    """Section 2.7: one LSTM on raw gradients, as published and tuned: the factor on its outputs,
    then the meta-rate at the best factor, each until both neighbours of the best do worse."""
    net = depth(study).network
    here = place(study, net)
    found: dict[tuple[float, float], TrainedRule] = {}

    def validated(tried: tuple[float, float]) -> float:
        if tried in found:
            return found[tried].manifest["validation"]["score"]
        factor, rate = tried
        rule = l2o_dm(hidden=20, layers=1, inputs="raw", step_scale=factor, faithful=True)
        label = f"l2o-dm-{net}-{factor:g}" + ("" if rate == META_RATE else f"-{rate:g}")
        found[tried] = learn(study, label, here.sub, rule, lr=rate)
        return found[tried].manifest["validation"]["score"]

    validated(PUBLISHED_DM)
    factor = climb(lambda factor: validated((factor, META_RATE)), FACTORS_OF_DM, 0.1)
    rate = climb(lambda rate: validated((factor, rate)), RATES_OF_DM, META_RATE)
    key = Key(recipe=study.recipe, scale=study.scale.name)
    for (factor_tried, rate_tried), trained in found.items():  # tested or not, they are paid for
        label = f"L2O-DM, outputs times {factor_tried:g}, meta-rate {rate_tried:g}"
        add_meta_cost(study.records, learned_key(key, label, trained), trained)
    rules = {
        SL2O: learn(study, f"sl2o-{net}", here.sub), "L2O-DM as published": found[PUBLISHED_DM],
    }  # fmt: skip
    if (factor, rate) != PUBLISHED_DM:
        rules["L2O-DM, tuned"] = found[factor, rate]
    against_subspace(study, net, here, fresh_places(study, net), rules)
    study.findings["tuning"] = [
        {
            "outputs_times": tried[0], "meta_rate": tried[1],
            "validation": trained.manifest["validation"]["score"],
            "meta_seconds": trained.manifest["seconds"], "chosen": tried == (factor, rate),
        }
        for tried, trained in sorted(found.items())
    ]  # fmt: skip


def climb(score: Callable[[float], float], ladder: Sequence[float], start: float) -> float:
    """The best rung tried of a ladder: from `start` on, neighbours of the best are tried until
    there are none that are new.

    >>> climb(lambda rung: abs(rung - 9), (1, 3, 10, 30), 1)
    10
    """
    scores: dict[float, float] = {}
    best = start
    while True:
        place = ladder.index(best)
        new = [rung for rung in ladder[max(0, place - 1) : place + 2] if rung not in scores]
        if not new:
            return best
        for rung in new:
            value = score(rung)
            scores[rung] = value if math.isfinite(value) else math.inf
        best = min(scores, key=scores.__getitem__)


def unrolls(study: Study) -> None:
    """Section 2.8, figure 6 left: windows of 5 to 20 steps at equal budgets."""
    amounts = depth(study)
    here = place(study, amounts.network)
    known = UNROLLS if study.scale.name != "quick" else (2, 3)
    episode = 60 * (amounts.episode // 60) or amounts.episode  # 5 to 20 all divide it
    rules = {
        f"{SL2O}, windows of {steps}": learn(
            study, f"sl2o-{amounts.network}-T{steps}", here.sub, unroll=steps, episode=episode
        )
        for steps in known
    }
    against_subspace(study, amounts.network, here, fresh_places(study, amounts.network), rules)


def episodes(study: Study) -> None:
    """Section 2.8, figure 6 right and table 4: episodes of 200 to 2,000 steps, equal budgets."""
    amounts = depth(study)
    here = place(study, amounts.network)
    known = EPISODES if study.scale.name != "quick" else (3, 6)
    rules = {
        of_episodes(steps): learn_episodes(study, amounts.network, here, steps) for steps in known
    }
    against_subspace(study, amounts.network, here, fresh_places(study, amounts.network), rules)


RECIPES = (
    deep_recipe("b8-versus-l2o-dm", "SL2O and L2O-DM in one subspace (section 2.7)", versus_dm),
    deep_recipe("b9-unroll-length", "windows of meta-training (section 2.8)", unrolls),
    deep_recipe("b10-episode-length", "episodes of meta-training (section 2.8, table 4)", episodes),
)
