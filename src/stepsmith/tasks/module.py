"""Tasks from unmodified modules, through `torch.func.functional_call`."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from stepsmith.tasks.accuracy import Scores, find_scores
from stepsmith.tasks.base import Batch, Buffers, Metrics, Params, Stacking, Task
from stepsmith.tasks.data import as_data

IGNORED = -100
"""A target that counts neither in the loss nor in the accuracy: `cross_entropy`'s own default."""

# Threads build one after the other: torch's global generator is seeded meanwhile, and transformers
# replaces functions of torch.nn.init.
_building = threading.RLock()


@contextmanager
def seeded(generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators from `generator` inside, put them back after."""
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


class ModuleTask(Task):
    """Any `nn.Module`, a loss function and data, as a task.

    Args:
        make_module: builds a freshly initialised module (called under a seeded generator).
        loss: `loss(output, target) -> ()` tensor, mean over the batch.
        data: (inputs, targets) tensors, a (train, test) pair of those, an `ImageSet` or a map-style
            data set; see `stepsmith.tasks.data.as_data`.
        batch_size: B.
        name: for records and errors; by default the module's class.
        device: where everything runs.
        dtype: of parameters and floating-point inputs.
        stacking: `"vmap"`, `"loop"`, `"threads"`, or `"auto"`: threads where the module has
            convolutions on a CPU and draws no random numbers, loop where it cannot be stacked,
            vmap otherwise.

    Raises:
        ValueError: a batch size below 1, a module without parameters that require gradients or
            with complex ones, or a loss that is no single number.
        TypeError: a module in place of a function that makes one.
    """

    def __init__(
        self,
        make_module: Callable[[], nn.Module],
        loss: Callable[[Any, Tensor], Tensor],
        data: Any,
        *,
        batch_size: int = 128,
        name: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        stacking: Literal["auto"] | Stacking = "auto",
    ):
        if isinstance(make_module, nn.Module) or not callable(make_module):
            raise TypeError(
                "make_module must be a function that builds a fresh module, so that every run has "
                f"a start of its own; got {type(make_module).__name__}. Pass lambda: MyModule(...)"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size!r}")
        self.device = torch.device(device)
        self.dtype = dtype
        self.batch_size = batch_size
        self._make_module = make_module
        self._loss = loss
        # By the targets' shape: the outputs' shape, and how they are scores.
        self._scores: dict[torch.Size, tuple[torch.Size | None, Scores | None]] = {}
        self.data = as_data(data).to(self.device)
        self._local = threading.local()
        self._local.module = self._build(torch.Generator().manual_seed(0))
        self.name = name or type(self._module).__name__
        self.has_test = self.data.test is not None
        self._check_module()
        self._tied = _has_ties(self._module)
        self._random = False
        self._random = self._probe()
        if stacking == "auto":
            stacking = self._choose_stacking()
        self.stacking = stacking

    @property
    def data_name(self) -> str:
        """The data's name."""
        return self.data.name

    @property
    def _module(self) -> nn.Module:
        """This thread's own module: `functional_call` swaps tensors in and out of it."""
        if not hasattr(self._local, "module"):
            self._local.module = self._build(torch.Generator().manual_seed(0))
        return self._local.module

    def _build(self, generator: torch.Generator) -> nn.Module:
        with _building, seeded(generator, self.device):
            module = self._make_module()
        if not isinstance(module, nn.Module):
            raise ValueError(f"make_module must return an nn.Module, got {type(module).__name__}")
        if any(p.is_complex() for p in module.parameters()):
            raise ValueError("complex parameters are not supported; use torch.view_as_real")
        # `loss` changes the mode only where it differs, and walks through the module then.
        return module.to(device=self.device, dtype=self.dtype).train()

    def _check_module(self) -> None:
        if not any(p.requires_grad for p in self._module.parameters()):
            raise ValueError(f"{self.name}: no parameter requires a gradient; nothing to optimise")
        self.frozen = frozenset(
            n for n, p in self._module.named_parameters() if not p.requires_grad
        )

    def _probe(self) -> bool:
        """Run one batch; whether the training pass draws random numbers (dropout)."""
        generator = torch.Generator().manual_seed(0)
        params, buffers = self.init(generator)
        batch = self.batch(generator, "train")
        with torch.random.fork_rng(devices=[]):
            before = torch.random.get_rng_state()
            loss, _, _ = self.loss(params, buffers, batch, None, True)
            drew = not torch.equal(before, torch.random.get_rng_state())
        if not isinstance(loss, Tensor) or loss.shape != ():
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"{self.name}: the loss must be a single number (shape ()), got {shape}; "
                "reduce it over the batch, for example by .mean()"
            )
        return drew

    def _choose_stacking(self) -> Stacking:
        convolutional = any(
            isinstance(module, nn.modules.conv._ConvNd) for module in self._module.modules()
        )
        if convolutional and self.device.type == "cpu":
            # Random numbers come from torch's one global generator, which threads would share.
            return "loop" if self._random else "threads"
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        params, buffers = self.init(generators[0])
        two_params, two_buffers = (
            {k: torch.stack([v, v]) for k, v in part.items()} for part in (params, buffers)
        )
        try:
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.func.vmap(
                    lambda p, b, batch: self.loss(p, b, batch, None, True)[0],
                    randomness="different",
                )(two_params, two_buffers, self.batches(generators, "train"))
        except Exception:
            # Any failure under vmap (data-dependent control flow, unsupported operators, in-place
            # writes to unstacked tensors) means the same thing here: run the copies one by one.
            return "loop"
        return "vmap"

    def init(self, generator: torch.Generator) -> tuple[Params, Buffers]:
        """Parameters that require gradients; everything else the module holds as buffers."""
        module = self._build(generator)
        params = {k: p.detach().clone() for k, p in module.named_parameters() if p.requires_grad}
        buffers = {
            k: p.detach().clone() for k, p in module.named_parameters() if not p.requires_grad
        }
        buffers |= {k: b.detach().clone() for k, b in module.named_buffers()}
        return params, buffers

    def batch(self, generator: torch.Generator, split: str) -> Batch:
        """(B, ...) inputs and targets, drawn with replacement."""
        return tuple(part[0] for part in self.batches([generator], split))

    def batches(self, generators: Sequence[torch.Generator], split: str) -> Batch:
        """(C, B, ...) inputs and targets, drawn with replacement."""
        inputs, targets = self.data.draw(generators, split, self.batch_size)
        return self.prepared(inputs, targets, generators)

    def stream(self, generators: Sequence[torch.Generator], split: str) -> Iterator[Batch]:
        """What the data's own stream hands out."""
        for inputs, targets in self.data.stream(generators, split, self.batch_size):
            yield self.prepared(inputs, targets, generators)

    def prepared(
        self, inputs: Tensor, targets: Tensor, generators: Sequence[torch.Generator]
    ) -> Batch:
        """(C, B, ...) drawn examples as `loss` takes them; what is random comes from
        `generators`."""
        return self._cast(inputs), targets

    def test_batches(self) -> Iterator[Batch]:
        """The test split in order, 500 examples at a time."""
        for inputs, targets in self.data.test_batches(500):
            yield self._cast(inputs), targets

    def _cast(self, inputs: Tensor) -> Tensor:
        return inputs.to(self.dtype) if inputs.is_floating_point() else inputs

    def randomness(self, generator: torch.Generator) -> AbstractContextManager[None]:
        """Dropout under vmap draws from torch's global generators: seeded from the first copy's."""
        return seeded(generator, self.device) if self._random else nullcontext()

    def loss(
        self,
        params: Params,
        buffers: Buffers,
        batch: Batch,
        generator: torch.Generator | None,
        train: bool,
    ) -> tuple[Tensor, Buffers, Metrics]:
        """The loss; the accuracy too where not training and the loss takes the outputs for scores
        of classes.

        The module is called with every part of the batch but the last, the targets. A target that
        the loss leaves out, such as `IGNORED` in torch's own, does not count in the accuracy.
        """
        *inputs, targets = batch
        # Batch-norm updates its statistics in place.
        buffers = {key: value.clone() for key, value in buffers.items()} if train else buffers
        if self._module.training != train:
            self._module.train(train)
        own = generator if train and self._random else None
        with nullcontext() if own is None else seeded(own, self.device):
            output = functional_call(
                self._module, {**params, **buffers}, tuple(inputs), tie_weights=self._tied
            )
        metrics: Metrics = {}
        if not train and (scores := self._scores_of(output, targets)) is not None:
            metrics["accuracy"] = scores.accuracy(output, targets)
        return self._loss(output, targets), buffers, metrics

    def _scores_of(self, output: Any, targets: Tensor) -> Scores | None:
        """How outputs like this one are scores; found once, by trying the loss."""
        shape = output.shape[1:] if isinstance(output, Tensor) else None
        known = self._scores.get(targets.shape[1:])
        if known is None or known[0] != shape:
            known = (shape, find_scores(self._loss, output, targets))
            self._scores[targets.shape[1:]] = known
        return known[1]

    def test_weight(self, metric: str, batch: Batch) -> int:
        """The targets that count, for an accuracy; the examples otherwise."""
        scores = self._scores.get(batch[-1].shape[1:], (None, None))[1]
        if metric != "accuracy" or scores is None:
            return super().test_weight(metric, batch)
        return int(scores.counted(batch[-1]).sum())

    def module(self, params: Params | None = None, buffers: Buffers | None = None) -> nn.Module:
        """A module of its own, holding copies of the given tensors (by default freshly made)."""
        module = copy.deepcopy(self._module)
        module.load_state_dict({**(params or {}), **(buffers or {})}, strict=False)
        return module


def _has_ties(module: nn.Module) -> bool:
    """Whether two names mean one tensor; looking for ties at every call would cost a tenth of a
    small network's gradient."""
    return any(
        len(list(members(remove_duplicate=False))) != len(list(members()))
        for members in (module.named_parameters, module.named_buffers)
    )
