"""Twenty-three small everyday problems: does any bundled rule end above its start, or leap?

    python -m benchmarks.everyday [--rules NAME ...] [--problems NAME ...] [--steps 300 3000]

Every rule trains every problem as a user would, by `LearnedOptimizer` with its defaults. Told of
each run: the loss at the end over that at the start (on the same examples), and the largest loss
of any step over that at the start. AdamW at its own default rate stands beside them, and with
`--bare` the rules without trust.

The problems differ in what rules stumble over: the loss's units, scales of inputs and parameters,
starts at zero, plateaus, gradients that touch few rows, and starts on trained networks.
"""

from __future__ import annotations

import argparse
import itertools
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import one_of, report, row
from stepsmith import LearnedOptimizer, load_images
from stepsmith.hub import BUNDLED

BATCH = 64

ROUNDING = 1 + 1e-4
"""A run that ends above its start by less has stayed there."""


@dataclass
class Problem:
    """A module, and the loss of a batch drawn by a generator."""

    module: nn.Module
    loss: Callable[[torch.Generator], Tensor]


@cache
def digits(name: str = "mnist") -> tuple[Tensor, Tensor]:
    """4,000 images of 8x8, flat, of mean zero and variance one, and their labels."""
    images = load_images(name, source="sample")
    small = F.avg_pool2d(images.train_images[:4000].float().view(-1, 1, 28, 28), 3, 3, 1)
    small = F.interpolate(small, (8, 8), mode="area") / 255
    flat = small.flatten(1)
    return (flat - flat.mean()) / flat.std(), images.train_labels[:4000].long()


def picked(data: tuple[Tensor, ...], generator: torch.Generator) -> list[Tensor]:
    place = torch.randint(len(data[0]), (BATCH,), generator=generator)
    return [part[place] for part in data]


def supervised(module: nn.Module, loss: Callable, data: tuple[Tensor, ...]) -> Problem:
    def of_batch(generator: torch.Generator) -> Tensor:
        x, y = picked(data, generator)
        return loss(module(x), y)

    return Problem(module, of_batch)


def perceptron(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for here, there in itertools.pairwise(widths):
        layers += [nn.Linear(here, there), activation()]
    return nn.Sequential(*layers[:-1])


def zeroed(module: nn.Module) -> nn.Module:
    for param in module.parameters():
        nn.init.zeros_(param)
    return module


def linear(scales: bool = False, zero: bool = False) -> Problem:
    x = torch.randn(2000, 20)
    y = x @ torch.randn(20, 1) + 0.1 * torch.randn(2000, 1)
    if scales:
        x = x * torch.logspace(-1, 2, 20)
    module = nn.Linear(20, 1)
    return supervised(zeroed(module) if zero else module, F.mse_loss, (x, y))


def classifier(*widths: int, activation: type[nn.Module] = nn.ReLU, name: str = "mnist") -> Problem:
    return supervised(
        perceptron(*widths, activation=activation), F.cross_entropy, digits(name)
    )  # fmt: skip


def softmax_from_zero() -> Problem:
    return supervised(zeroed(nn.Linear(64, 10)), F.cross_entropy, digits())


def rescaled_loss(factor: float) -> Problem:
    module = perceptron(64, 32, 10)
    return supervised(module, lambda z, y: factor * F.cross_entropy(z, y), digits())


def autoencoder() -> Problem:
    x, _ = digits()
    return supervised(perceptron(64, 32, 8, 32, 64), F.mse_loss, (x, x))


def variational() -> Problem:
    encoder, decoder = perceptron(64, 64, 16), perceptron(8, 64, 64)
    x, _ = digits()
    x = (x > 0).float()

    def loss(generator: torch.Generator) -> Tensor:
        (batch,) = picked((x,), generator)
        mean, log_var = encoder(batch).chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=generator)
        seen = decoder(mean + (0.5 * log_var).exp() * noise)
        told = F.binary_cross_entropy_with_logits(seen, batch, reduction="sum") / BATCH
        return told + 0.5 * (log_var.exp() + mean**2 - 1 - log_var).sum(1).mean()

    return Problem(nn.ModuleList([encoder, decoder]), loss)


def convolutional(norm: bool) -> Problem:
    def block(here: int, there: int) -> list[nn.Module]:
        return [nn.Conv2d(here, there, 3, padding=1), *([nn.BatchNorm2d(there)] * norm), nn.ReLU()]

    module = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), *block(1, 8), nn.MaxPool2d(2), *block(8, 16), nn.Flatten(),
        nn.Linear(256, 10),
    )  # fmt: skip
    return supervised(module, F.cross_entropy, digits("fashion_mnist"))


def sine(scale: float = 1.0) -> Problem:
    x = torch.rand(2000, 1) * 6 - 3
    return supervised(perceptron(1, 64, 64, 1, activation=nn.Tanh), F.mse_loss,
                      (x, scale * (2 * x).sin()))  # fmt: skip


def factorisation() -> Problem:
    users, items = nn.Embedding(200, 8), nn.Embedding(300, 8)
    for table in (users, items):
        nn.init.normal_(table.weight, std=0.1)
    one, two = torch.randn(200, 4), torch.randn(300, 4)
    pairs = (torch.randint(200, (5000,)), torch.randint(300, (5000,)))
    stars = (one[pairs[0]] * two[pairs[1]]).sum(1)

    def loss(generator: torch.Generator) -> Tensor:
        user, item, star = picked((*pairs, stars), generator)
        return F.mse_loss((users(user) * items(item)).sum(1), star)

    return Problem(nn.ModuleList([users, items]), loss)


def text(length: int = 24) -> Tensor:
    """Lines of an invented language of 30 letters, each letter decided by two before it."""
    after = torch.softmax(3 * torch.randn(30, 30, 30), dim=-1)
    lines = torch.randint(30, (1500, length + 1))
    for place in range(2, length + 1):
        chances = after[lines[:, place - 2], lines[:, place - 1]]
        lines[:, place] = torch.multinomial(chances, 1)[:, 0]
    return lines


class Transformer(nn.Module):
    """Two layers, 32 wide."""

    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Embedding(30, 32), nn.Embedding(24, 32)
        layer = partial(nn.TransformerEncoderLayer, 32, 4, 64, 0.0, batch_first=True)
        self.blocks = nn.ModuleList([layer(norm_first=True) for _ in range(2)])
        self.head = nn.Linear(32, 30)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) letters to (B, 30, T) scores."""
        x = self.embed(tokens) + self.place.weight[: tokens.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return self.head(x).transpose(1, 2)


class Recurrent(nn.Module):
    """A GRU over letters."""

    def __init__(self):
        super().__init__()
        self.embed, self.body = nn.Embedding(30, 16), nn.GRU(16, 32, batch_first=True)
        self.head = nn.Linear(32, 30)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) letters to (B, 30, T) scores."""
        return self.head(self.body(self.embed(tokens))[0]).transpose(1, 2)


def language(make: Callable[[], nn.Module]) -> Problem:
    lines = text()
    return supervised(make(), F.cross_entropy, (lines[:, :-1], lines[:, 1:]))


def moons() -> Problem:
    angle = torch.rand(2000) * math.pi
    side = (torch.rand(2000) < 0.1).float()  # one in ten
    x = torch.stack([angle.cos() + side, (1 - 2 * side) * angle.sin() + 0.5 * side], 1)
    x = x + 0.1 * torch.randn(2000, 2)
    return supervised(perceptron(2, 16, 16, 1), F.binary_cross_entropy_with_logits,
                      (x, side[:, None]))  # fmt: skip


def counts() -> Problem:
    x = torch.randn(2000, 10)
    y = torch.poisson((x @ torch.randn(10, 1) * 0.5 + 1).exp())
    return supervised(zeroed(nn.Linear(10, 1)), F.poisson_nll_loss, (x, y))


def margin() -> Problem:
    x, y = digits()
    return supervised(nn.Linear(64, 10), F.multi_margin_loss, (x, y))


def mixture() -> Problem:
    x = torch.rand(2000, 1) * 2 - 1
    y = torch.where(torch.rand(2000, 1) < 0.5, (3 * x).sin(), -x) + 0.05 * torch.randn(2000, 1)

    def loss(told: Tensor, y: Tensor) -> Tensor:
        share, mean, log_width = told.chunk(3, dim=1)
        each = -log_width - 0.5 * ((y - mean) / log_width.exp()) ** 2
        return -torch.logsumexp(share.log_softmax(1) + each, 1).mean() + 4

    return supervised(perceptron(1, 32, 9, activation=nn.Tanh), loss, (x, y))


def rosenbrock() -> Problem:
    module = nn.ParameterList([torch.tensor([-1.2, 1.0])])

    def loss(generator: torch.Generator) -> Tensor:
        x, y = module[0]
        return (1 - x) ** 2 + 100 * (y - x**2) ** 2

    return Problem(module, loss)


def equation() -> Problem:
    """u'' = -sin(3 x), u = 0 at both ends, by a network."""
    module = perceptron(1, 32, 32, 1, activation=nn.Tanh)
    ends = torch.tensor([[-2.0], [2.0]])

    def loss(generator: torch.Generator) -> Tensor:
        x = (torch.rand(BATCH, 1, generator=generator) * 4 - 2).requires_grad_()
        u = module(x)
        for _ in range(2):
            (u,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return (u + (3 * x).sin()).square().mean() + module(ends).square().mean()

    return Problem(module, loss)


def trained(make: Callable[[], Problem], steps: int = 3000) -> Problem:
    """Where AdamW ends."""
    problem, generator = make(), torch.Generator().manual_seed(99)
    optimizer = torch.optim.AdamW(problem.module.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        problem.loss(generator).backward()
        optimizer.step()
        schedule.step()
    return problem


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "linear regression": linear,
    "linear regression, inputs of .1 to 100, from zero": partial(linear, True, True),
    "softmax regression from zero": softmax_from_zero,
    "classifier 64-32-10": partial(classifier, 64, 32, 10),
    "classifier of seven layers, tanh": partial(
        classifier, 64, *[24] * 6, 10, activation=nn.Tanh, name="fashion_mnist"
    ),
    "classifier of sigmoids": partial(classifier, 64, 32, 32, 10, activation=nn.Sigmoid),
    "classifier, loss of 1e-4 times": partial(rescaled_loss, 1e-4),
    "classifier, loss of 1e4 times": partial(rescaled_loss, 1e4),
    "autoencoder": autoencoder,
    "variational autoencoder": variational,
    "convolutions": partial(convolutional, False),
    "convolutions, batch-norm": partial(convolutional, True),
    "sine": sine,
    "sine, targets of 1000 times": partial(sine, 1000.0),
    "factorisation": factorisation,
    "transformer": partial(language, Transformer),
    "recurrent network": partial(language, Recurrent),
    "moons, one in ten": moons,
    "counts": counts,
    "mixture density": mixture,
    "rosenbrock": rosenbrock,
    "differential equation": equation,
    "trained classifier": partial(trained, partial(classifier, 64, 128, 10)),
}


def start(name: str, seed: int) -> Problem:
    """The problem, its data and start the same for the same name and seed."""
    torch.manual_seed(zlib.crc32(name.encode()) + seed)
    return PROBLEMS[name]()


def loss_now(problem: Problem) -> float:
    """The mean loss of sixteen batches, always the same."""
    generator = torch.Generator().manual_seed(12345)
    with torch.enable_grad():  # a differential equation takes derivatives
        return sum(float(problem.loss(generator).detach()) for _ in range(16)) / 16


def run(name: str, make: Callable, steps: int, seed: int = 0) -> tuple[float, float, float]:
    """The loss at the start, at the end, and the largest of any step."""
    problem = start(name, seed)
    optimizer = make(problem.module.parameters())
    generator, first, peak = torch.Generator().manual_seed(seed), loss_now(problem), 0.0
    for _ in range(steps):
        optimizer.zero_grad()
        loss = problem.loss(generator)
        loss.backward()
        optimizer.step()
        value = float(loss.detach())
        peak = max(peak, value) if math.isfinite(value) else math.inf
    last = loss_now(problem)
    return first, last if math.isfinite(last) else math.inf, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rules", nargs="*", default=list(BUNDLED))
    parser.add_argument("--problems", nargs="*", type=one_of(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--steps", nargs="*", type=int, default=[300, 3000])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bare", action="store_true", help="rules without trust, too")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    made: dict[str, Callable] = {
        name: partial(LearnedOptimizer, rule=name) for name in chosen.rules
    }
    if chosen.bare:
        for name in chosen.rules:
            made[f"{name}, bare"] = partial(LearnedOptimizer, rule=name, trust=False)
    made["AdamW, .001"] = torch.optim.AdamW
    rows = []
    for steps in chosen.steps:
        for rule, make in made.items():
            ended, leapt = [], []
            for problem in chosen.problems:
                first, last, peak = run(problem, make, steps, chosen.seed)
                ended.append(last > ROUNDING * first)
                leapt.append(peak > 10 * first)
                mark = "ABOVE START " * ended[-1] + "LEAP" * leapt[-1]
                print(f"{steps:5} {rule:16} {problem:50} {first:10.4g} -> {last:10.4g}, "
                      f"at most {peak:10.4g}  {mark}", flush=True)  # fmt: skip
                begun = f"{rule}: {problem}, {steps} steps: start"
                rows.append(row(begun, first, "loss"))
                rows.append(row(f"{begun} to end", last, "loss", begun, last / first))
                rows.append(row(f"{begun} to largest", peak, "loss", begun, peak / first))
            count = f"{steps} steps, of {len(ended)} problems"
            rows.append(row(f"{rule}: ends above its start, {count}", sum(ended), "runs"))
            rows.append(row(f"{rule}: above ten times its start, {count}", sum(leapt), "runs"))
    report("everyday", rows)


if __name__ == "__main__":
    main()
