"""Tasks from unmodified modules, through `torch.func.functional_call`."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy

from stepsmith.rules.base import require_choice
from stepsmith.tasks.accuracy import Scores, find_scores
from stepsmith.tasks.base import Batch, Buffers, Metrics, Params, Stacking, Task
from stepsmith.tasks.data import as_data
from stepsmith.tasks.plain import fill, run, share_memory, with_gradients
from stepsmith.tasks.probe import (
    Start,
    difference,
    require_carried,
    same_draws,
    stacked_steps,
    task_step,
    then_tested,
)

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

    One batch is tried when the task is made, and compared with an ordinary backward pass of the
    module. Where the two differ (gradient checkpointing, which calls the module again later) every
    step is made by such a pass, one copy at a time.

    Raises:
        ValueError: a batch size below 1, a module without parameters that require gradients or
            with complex ones, a loss that is no single number or does not depend on the parameters;
            a module that keeps state outside its parameters and buffers, changes the shape or dtype
            of a buffer or writes to its own parameters; a loss with parameters of its own; or a
            `stacking` that is unknown or that the module does not stand.
        TypeError: a module in place of a function that makes one.
    """

    library: ClassVar[bool] = False
    """Whether the module is one of this library's, which its own tests compare."""

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
        require_choice("ModuleTask", "stacking", stacking, ("auto", *get_args(Stacking)))
        if isinstance(loss, nn.Module) and any(p.requires_grad for p in loss.parameters()):
            raise ValueError(
                f"the loss {type(loss).__name__} has parameters of its own, which would never be "
                "trained; hold them in the module, and return from it what the loss needs"
            )
        self.device = torch.device(device)
        self.dtype = dtype
        self.batch_size = batch_size
        self._make_module = make_module
        self._loss = loss
        # By the targets' shape: the outputs' shape, and how they are scores.
        self._scores: dict[torch.Size, tuple[torch.Size | None, Scores | None]] = {}
        self.data = as_data(data).to(self.device)
        self._local = threading.local()
        self._shared = False  # whether make_module gives the same tensors out again
        self._plain = False  # whether only an ordinary backward pass gives the gradients
        self._tests_write = False  # whether the module writes to buffers in evaluation mode
        self._local.module = self._build(torch.Generator().manual_seed(0))
        self.name = name or type(self._module).__name__
        self.has_test = self.data.test is not None
        self._check_module()
        self._tied = _has_ties(self._module)
        self._random = False
        self._probe()
        self.stacking = (
            self._choose_stacking() if stacking == "auto" else self._given_stacking(stacking)
        )

    @property
    def data_name(self) -> str:
        """The data's name."""
        return self.data.name

    @property
    def _module(self) -> nn.Module:
        """This thread's own module: tensors are swapped in and out of it."""
        if not hasattr(self._local, "module"):
            self._local.module = self._own()
        return self._local.module

    def _own(self) -> nn.Module:
        """A module that holds no tensor of another one."""
        module = self._build(torch.Generator().manual_seed(0))
        if not self._shared:
            return module
        try:
            return copy.deepcopy(module)
        except Exception as error:
            raise ValueError(
                f"{self.name}: make_module hands the same tensors out every time, and what it "
                f"returns cannot be copied ({error}); build a fresh module there"
            ) from error

    def _build(self, generator: torch.Generator) -> nn.Module:
        with _building, seeded(generator, self.device):
            module = self._make_module()
            if not isinstance(module, nn.Module):
                name = type(module).__name__
                raise ValueError(f"make_module must return an nn.Module, got {name}")
            if any(p.is_complex() for p in module.parameters()):
                raise ValueError("complex parameters are not supported; use torch.view_as_real")
            module = module.to(device=self.device, dtype=self.dtype)
            if any(map(is_lazy, module.parameters())):
                # A call gives lazy parameters their shapes and numbers.
                *inputs, _ = self.batch(torch.Generator().manual_seed(0), "train")
                with torch.no_grad():
                    module.eval()(*inputs)
        # `loss` changes the mode only where it differs, and walks through the module then.
        return module.train()

    def _check_module(self) -> None:
        if not any(p.requires_grad for p in self._module.parameters()):
            raise ValueError(f"{self.name}: no parameter requires a gradient; nothing to optimise")
        self.frozen = frozenset(
            n for n, p in self._module.named_parameters() if not p.requires_grad
        )

    def _probe(self) -> None:
        """Run one batch: whether the training pass draws random numbers (dropout), and what else
        `loss` has to know."""
        start = self.init(torch.Generator().manual_seed(0))
        batches = [self.batch(torch.Generator().manual_seed(seed), "train") for seed in (0, 1)]
        if self.library:
            with same_draws(self.device) as drew:
                self.loss(*start, batches[0], None, True)
                self._random = drew()
            return
        modules = self._module, self._build(torch.Generator().manual_seed(0))
        self._shared = share_memory(*modules)
        if self._shared:
            modules = self._own(), self._own()
        with warnings.catch_warnings():
            # The training itself warns as well.
            warnings.simplefilter("ignore")
            self._compare(*modules, start, batches)

    def _compare(
        self, one: nn.Module, other: nn.Module, start: Start, batches: Sequence[Batch]
    ) -> None:
        """Find the way to make steps that does what an ordinary backward pass of a fresh module
        does, whatever was before."""
        self._plain, self._local.module = True, one
        want = task_step(self, start, batches[0])
        require_carried(self.name, one, start, want)
        self._random = want.drew
        # A module that cannot be tested may be trained all the same; a test says what is wrong.
        with suppress(Exception):
            want = then_tested(self, start, want, batches[0])

        def found() -> str | None:
            # What another batch leaves behind in the module must not show.
            task_step(self, start, batches[1])
            step = task_step(self, start, batches[0])
            if want.tested is not None:
                step = then_tested(self, start, step, batches[0])
            self._tests_write |= step.tests_write
            return difference(step, want, start[1])

        self._plain, self._local.module = False, other
        # Whatever looks at the module's own numbers, in place of those lent to it, finds nan.
        fill(other, *map(_nothing, start))
        try:
            self._plain = found() is not None
        except Exception:
            # What cannot be lent other tensors, or be differentiated in one of them.
            self._plain = True
        if self._plain:
            self._local.module = self._own()
            if (differs := found()) is not None:
                raise ValueError(
                    f"{self.name}: {differs} is another one where another step was made before, so "
                    "that runs would disturb one another; keep what forward remembers in buffers "
                    "(register_buffer), and draw random numbers from torch's own generator"
                )

    def _choose_stacking(self) -> Stacking:
        convolutional = any(
            isinstance(module, nn.modules.conv._ConvNd) for module in self._module.modules()
        )
        if convolutional and self.device.type == "cpu":
            # Random numbers come from torch's one global generator, which threads would share.
            return "loop" if self._random else "threads"
        return "vmap" if self._stands_vmap() else "loop"

    def _given_stacking(self, stacking: Stacking) -> Stacking:
        if stacking == "vmap" and not self._stands_vmap():
            raise ValueError(
                f"{self.name}: stacking='vmap' fails here, or gives other gradients than one copy "
                "at a time; leave stacking='auto'"
            )
        if stacking == "threads" and self._random:
            raise ValueError(
                f"{self.name}: stacking='threads' shares torch's one random generator, from which "
                "the module draws (dropout); leave stacking='auto'"
            )
        return stacking

    def _stands_vmap(self) -> bool:
        """Whether two stacked copies take the steps that they take alone."""
        if self._plain:
            return False
        start = self.init(torch.Generator().manual_seed(0))
        batches = [self.batch(torch.Generator().manual_seed(seed), "train") for seed in (0, 1)]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                steps = stacked_steps(self, start, batches)
                if self.library:
                    return True
                # Neither way may leave anything behind for the other.
                alone = [task_step(self, start, batch) for batch in batches]
                pairs = zip(steps + stacked_steps(self, start, batches), alone * 2, strict=True)
            if self._random or not any(difference(*pair, start[1]) for pair in pairs):
                return True
        except Exception:
            # Any failure under vmap (data-dependent control flow, unsupported operators, in-place
            # writes to unstacked tensors) means the same thing here: run the copies one by one.
            pass
        self._local.module = self._own()
        return False

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
        if train or self._tests_write:
            given = {key: value.clone() for key, value in buffers.items()}
        else:
            given = buffers
        module = self._module
        if module.training != train:
            module.train(train)
        own = generator if train and self._random else None
        with nullcontext() if own is None else seeded(own, self.device):
            if self._plain:
                wanted = torch.is_grad_enabled() and any(p.requires_grad for p in params.values())
                passed = run(module, self._loss, params, given, batch, backward=wanted)
                loss, output, held = passed.loss, passed.output, passed.buffers
                if any(grad is not None for grad in passed.grads.values()):
                    loss = with_gradients(loss, passed.grads, params)
            else:
                held = {**params, **given}
                output = functional_call(module, held, tuple(inputs), tie_weights=self._tied)
                loss = self._loss(output, targets)
        metrics: Metrics = {}
        if not train and (scores := self._scores_of(output, targets)) is not None:
            metrics["accuracy"] = scores.accuracy(output, targets)
        if train:
            # What forward set in place of a buffer; in the next step it is a given number.
            buffers = {k: v.detach() if (v := held[k]).requires_grad else v for k in buffers}
        return loss, buffers, metrics

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
        """A module of its own, holding copies of the given tensors (by default freshly made).

        Raises:
            ValueError: a tensor is missing, is none of the module's or has another shape.
        """
        module = self._own()
        own = self.init(torch.Generator().manual_seed(0))
        fill(
            module,
            *(_fitting(self.name, *pair) for pair in zip((params, buffers), own, strict=True)),
        )
        return module


def _fitting(name: str, given: Mapping[str, Tensor] | None, own: Mapping[str, Tensor]) -> Params:
    """Copies of the given tensors, which must be those that the module has."""
    if given is None:
        return {}
    for key in [*own, *given]:
        have, want = (tuple(p[key].shape) if key in p else "missing" for p in (given, own))
        if have != want:
            raise ValueError(
                f"{name}: the tensors do not fit its module: {key!r} is {have} among those given, "
                f"{want} in the module; give all of them, as init returns them"
            )
    return {key: given[key].detach().to(value, copy=True) for key, value in own.items()}


def _nothing(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        key: torch.full_like(value, torch.nan)
        for key, value in tensors.items()
        if value.is_floating_point()
    }


def _has_ties(module: nn.Module) -> bool:
    """Whether two names mean one tensor; looking for ties at every call would cost a tenth of a
    small network's gradient."""
    return any(
        len(list(members(remove_duplicate=False))) != len(list(members()))
        for members in (module.named_parameters, module.named_buffers)
    )
