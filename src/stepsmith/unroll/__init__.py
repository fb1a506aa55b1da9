"""The forward roll: many copies of an optimizee under any rule or optimizer.

One function, below meta-training and evaluation alike, so that both measure the same thing.
"""

from stepsmith.unroll.copies import Copies
from stepsmith.unroll.roll import Start, roll
from stepsmith.unroll.steppers import RuleStepper, Stepper, TorchStepper
from stepsmith.unroll.trusted import TrustedStepper

__all__ = ["Copies", "RuleStepper", "Start", "Stepper", "TorchStepper", "TrustedStepper", "roll"]
