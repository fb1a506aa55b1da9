"""Meta-test: runs, tuning, records, statistics, cost."""

from stepsmith.evaluate.baselines import BASELINES, Baseline
from stepsmith.evaluate.records import Key, Records
from stepsmith.evaluate.run import Evaluation, evaluate, train
from stepsmith.evaluate.statistics import summarise
from stepsmith.evaluate.transfer import transfer, transfer_matrix

__all__ = [
    "BASELINES", "Baseline", "Evaluation", "Key", "Records", "evaluate", "summarise", "train",
    "transfer", "transfer_matrix",
]  # fmt: skip
