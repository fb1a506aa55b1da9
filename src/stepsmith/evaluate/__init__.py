"""Meta-test: runs, tuning, records, statistics, cost."""

from stepsmith.evaluate.baselines import BASELINES, Baseline
from stepsmith.evaluate.records import Key, Records
from stepsmith.evaluate.run import Evaluation, evaluate, train
from stepsmith.evaluate.statistics import summarise

__all__ = [
    "BASELINES", "Baseline", "Evaluation", "Key", "Records", "evaluate", "summarise", "train",
]  # fmt: skip
