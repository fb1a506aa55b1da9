"""Figures of the GPU path, in stages that can be resumed: correctness first, then timings.

    python -m benchmarks.gpu OUT [STAGE ...]

Each stage writes OUT/STAGE.json and is passed over where that exists; `report` gathers them into
`benchmarks/results/gpu.json`. A stage takes a minute or two at most.

- `correct`: the Triton kernel against the reference, 100 steps of one recorded sequence, float32
  and bfloat16 carries, odd sizes, the same numbers when run twice; replays by cuDNN;
- `step`: milliseconds and share of the memory roofline (measured by a copy) of LSTM 8 and LSTM
  2x20 with both carries, from 10^5 to 86 million parameters, `torch.optim.AdamW(fused=True)` beside
  them;
- `tiles`: LSTM 8 and LSTM 2x20 by coordinates of a program, warps, and precision of products;
- `vit`: a parameter set of ViT-B's shapes (86 M) through `LearnedOptimizer`, eager and as a CUDA
  graph;
- `replay`: the sampled replay against an autograd loop;
- `meta`: inner steps per second of meta-training, MLP and ConvNet, by copies;
- `networks`: training steps of ResNet-20 and ResNet-18 at batch 128, gradients captured in a CUDA
  graph and not, in full space and in a subspace of 40;
- `full_space`: meta-training on all 11 million parameters of ResNet-18 on CIFAR-10 (the smaller
  JPEG copy of it, a folder `cifar10_jpeg` below STEPSMITH_DATA_DIR): memory, rate, and what the
  rule has learned.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import one_of, report, row
from stepsmith import LearnedOptimizer, TrainedRule, kernels, make_task, meta_train
from stepsmith.evaluate.run import MakeStepper, by_rule, by_torch
from stepsmith.machine import machine, peak_memory, start_peak, versions
from stepsmith.meta import adjoint_window
from stepsmith.rules import joined, l2o_dm, make_rule, rnnprop
from stepsmith.rules.lstm import LSTMRule
from stepsmith.subspace import random
from stepsmith.tasks import SubspaceTask, Task
from stepsmith.testing import fresh_weights
from stepsmith.unroll import Copies, RuleStepper, roll

RULES: dict[str, LSTMRule] = {
    "LSTM 8": rnnprop(), "LSTM 8 joined": joined(scaling="absolute"),
    "LSTM 2x20": l2o_dm(),
}  # fmt: skip
SIZES = (100_000, 1_000_000, 10_000_000, 86_000_000)
CARRIES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def device() -> torch.device:
    return torch.device("cuda")


def seconds(run: Callable[..., object], *arguments: Any, rounds: int = 11) -> float:
    """Median of single calls, timed by the device's own events."""
    for _ in range(3):
        run(*arguments)
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run(*arguments)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def bandwidth() -> float:
    """Bytes a second of a copy, reading and writing counted."""
    source = torch.empty(1 << 28, device=device())
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / seconds(target.copy_, source)


def bytes_of(rule: LSTMRule, carry: torch.dtype) -> int:
    """Bytes a coordinate of one step must move: gradient, step, statistics, carry."""
    kept = {"raw": 0, "log_sign": 0, "adam": 2, "joined": 2}[rule.inputs]
    kept += rule.frame == "hold" and not kept
    return 8 + 8 * kept + 2 * 2 * rule.layers * rule.hidden * carry.itemsize


def stepper(
    rule: LSTMRule, n: int, carry_dtype: torch.dtype, backend: str
) -> Callable[[torch.Tensor], torch.Tensor]:
    params = torch.zeros(1, n, device=device())
    state = kernels.init_state(rule, params)
    carry = rule.init_carry(n, dtype=carry_dtype, device=device())
    advance = kernels.advance_function(
        rule, fresh_weights(rule), torch.float32, device(), backend, carry_dtype
    )
    return lambda grad: advance(grad, params, state, carry)


def correct() -> list[dict[str, Any]]:
    rows = []
    for name, rule in RULES.items():
        for n in (1, 63, 100_003):
            generator = torch.Generator().manual_seed(n)
            grads = torch.randn(100, 1, n, generator=generator).to(device()) * 1e-2
            grads[7], grads[8], grads[9] = 0.0, 1e-30, 1e30
            for label, dtype in CARRIES.items():
                ways = ("triton", "triton", "reference")
                runs = [stepper(rule, n, dtype, way) for way in ways]
                error = scale = 0.0
                for grad in grads:
                    one, again, two = (run(grad) for run in runs)
                    assert torch.equal(one, again), (name, n, label)
                    assert one.isfinite().all(), (name, n, label)
                    error = max(error, float((one - two).abs().max()))
                    scale = max(scale, float(two.abs().max()))
                allowed = 1e-5 if dtype == torch.float32 else 5e-2
                assert error <= allowed * scale, (name, n, label, error / scale)
                what = f"{name}, {n:,} coordinates, carry {label}: largest error of 100 steps"
                rows.append(row(what, error / scale, "relative"))
        sampled, steps = 1000, 20
        features = torch.randn(steps, rule.feature_set.count, sampled, device=device())
        adjoint = torch.randn(steps, sampled, device=device())
        carry = rule.init_carry(sampled, device=device())
        fast, slow = (
            kernels.replay(rule, fresh_weights(rule), features, carry, adjoint, None, way)
            for way in ("triton", "reference")
        )
        error = max(float((fast[k] - v).abs().max() / v.abs().max()) for k, v in slow.items())
        assert error < 1e-3, (name, error)
        rows.append(row(f"{name}, replay: largest error of a gradient", error, "relative"))
    return rows


def step() -> list[dict[str, Any]]:
    speed = bandwidth()
    rows = [row("copy of 1 GiB", speed / 1e9, "GB/s")]
    for n in SIZES:
        param = torch.nn.Parameter(torch.randn(n, device=device()))
        param.grad = torch.randn_like(param)
        adamw = torch.optim.AdamW([param], fused=True)
        base = f"AdamW fused, {n:,} parameters"
        fused = seconds(adamw.step)
        rows.append(row(base, fused * 1e3, "ms"))
        grad = torch.randn(1, n, device=device()) * 1e-2
        for name, rule in RULES.items():
            for label, dtype in CARRIES.items():
                run = stepper(rule, n, dtype, "triton")
                took = seconds(run, grad)
                what = f"{name}, carry {label}, {n:,} parameters"
                rows.append(row(what, took * 1e3, "ms", base, took / fused))
                share = n * bytes_of(rule, dtype) / speed / took
                rows.append(row(f"{what}: share of the memory roofline", share, "share"))
                del run
    return rows


TILES = {
    "LSTM 8": ((32, 2), (64, 2), (64, 4), (128, 4), (128, 8), (256, 8)),
    "LSTM 2x20": ((32, 4), (64, 4), (64, 8), (128, 4), (128, 8)),
}
"""Coordinates and warps tried."""


def tiles(n: int = 20_000_000) -> list[dict[str, Any]]:
    from stepsmith.kernels import triton_lstm  # needs Triton

    speed, rows = bandwidth(), []
    params, grad = torch.zeros(1, n, device=device()), torch.randn(1, n, device=device()) * 1e-2
    for name, tried in TILES.items():
        rule = RULES[name]
        for (label, dtype), tile, precision in itertools.product(
            CARRIES.items(), tried, ("ieee", "tf32x3")
        ):
            if precision == "ieee" and name != "LSTM 8":
                continue
            state = kernels.init_state(rule, params)
            carry = rule.init_carry(n, dtype=dtype, device=device())
            run = triton_lstm.TritonAdvance(rule, fresh_weights(rule), device(), precision, tile)
            took = seconds(run, grad, params, state, carry, rounds=5)
            what = f"{name}, carry {label}, {n:,} parameters, {precision}, "
            what += f"{tile[0]} coordinates by {tile[1]} warps"
            rows.append(row(what, took * 1e3, "ms"))
            share = n * bytes_of(rule, dtype) / speed / took
            rows.append(row(f"{what}: share of the memory roofline", share, "share"))
    return rows


def vit_shapes() -> list[tuple[int, ...]]:
    """The parameters of ViT-B/16: 86 million."""
    block = [
        (768,), (768,), (2304, 768), (2304,), (768, 768), (768,), (768,), (768,), (3072, 768),
        (3072,), (768, 3072), (768,),
    ]  # fmt: skip
    around = [(1, 1, 768), (1, 197, 768), (768, 3, 16, 16), (768,), (768,), (768,), (1000, 768),
              (1000,)]  # fmt: skip
    return [*around, *(shape for _ in range(12) for shape in block)]


def vit() -> list[dict[str, Any]]:
    params = [torch.nn.Parameter(torch.randn(shape, device=device())) for shape in vit_shapes()]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-3
    total = sum(param.numel() for param in params)
    base = f"AdamW fused, ViT-B, {total:,} parameters"
    fused = seconds(torch.optim.AdamW(params, fused=True).step)
    rows = [row(base, fused * 1e3, "ms")]
    for name in ("LSTM 8", "LSTM 8 joined"):
        rule = RULES[name]
        trained = TrainedRule(rule, fresh_weights(rule))
        for label, dtype in CARRIES.items():
            optimizer = LearnedOptimizer(params, trained, carry_dtype=dtype, nonfinite="ignore")
            took = seconds(optimizer.step)
            rows.append(row(f"{name}, carry {label}, ViT-B", took * 1e3, "ms", base, took / fused))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            took = seconds(graph.replay)
            what = f"{name}, carry {label}, ViT-B, as a CUDA graph"
            rows.append(row(what, took * 1e3, "ms", base, took / fused))
            del optimizer, graph
            torch.cuda.empty_cache()
    return rows


def replay() -> list[dict[str, Any]]:
    rows = []
    for name in ("LSTM 8 joined", "LSTM 2x20"):
        rule = RULES[name]
        for steps, sampled in ((20, 2000), (100, 2000), (100, 100_000)):
            features = torch.randn(steps, rule.feature_set.count, sampled, device=device())
            adjoint = torch.randn(steps, sampled, device=device())
            carry, weights = rule.init_carry(sampled, device=device()), fresh_weights(rule)
            size = f"{name}, {steps} steps of {sampled:,}"
            given = (rule, weights, features, carry, adjoint, None)
            times = {
                way: seconds(kernels.replay, *given, way, rounds=5)
                for way in ("reference", "chunked", "triton")
            }
            base = f"{size}, reference"
            for way, took in times.items():
                rows.append(
                    row(f"{size}, {way}", took * 1e3, "ms", base, times["reference"] / took)
                )
    return rows


def meta() -> list[dict[str, Any]]:
    rows = []
    for task_name in ("mlp-mnist", "convnet-mnist"):
        task = make_task(task_name, source="sample", device=device())
        for copies in (1, 16, 64):
            rule = joined(scaling="absolute")
            weights = {k: v.to(device()).requires_grad_() for k, v in rule.init().items()}
            group = Copies(task, range(copies))
            runner = RuleStepper(rule, weights, group.theta, group.layout)
            share = min(1.0, 40_000 / group.layout.total / 20)
            window = functools.partial(
                adjoint_window, group, runner, weights, 20, losses="before", fraction=share,
                generator=torch.Generator().manual_seed(0),
            )  # fmt: skip
            window()
            torch.cuda.synchronize()
            begun = time.perf_counter()
            for _ in range(3):
                window()
            torch.cuda.synchronize()
            rate = 60 * copies / (time.perf_counter() - begun)
            rows.append(row(f"{task_name}, {copies} copies", rate, "inner steps/s"))
    return rows


def networks() -> list[dict[str, Any]]:
    rows = []
    for name in ("resnet20", "resnet18"):
        task = image_task(f"{name}-fashion_mnist@rgb32@crop@flip@standardised", "sample")
        params, _ = task.init(torch.Generator().manual_seed(0))
        basis = random(params, 40, generator=torch.Generator().manual_seed(0))
        agree(task, name, rows)
        base = f"{name}, batch {BATCH}, full space, SGD"
        within = SubspaceTask(task, basis)
        plain = {
            (place, stepper_name): step_seconds(where, make)
            for place, where in (("full space", task), ("subspace of 40", within))
            for stepper_name, make in STEPPERS.items()
        }
        task.capturable = False
        plain["full space", "SGD, not captured"] = step_seconds(task, STEPPERS["SGD"])
        task.capturable = True
        against = plain["full space", "SGD"]
        for (place, stepper_name), took in plain.items():
            what = f"{name}, batch {BATCH}, {place}, {stepper_name}"
            rows.append(row(what, took * 1e3, "ms", base, took / against))
        for what, took in variants(task).items():
            full = f"{name}, batch {BATCH}, full space, SGD, {what}"
            rows.append(row(full, took * 1e3, "ms", base, took / against))
    return rows


BATCH = 128


def image_task(name: str, source: str) -> Task:
    return make_task(name, source=source, batch_size=BATCH, device=device())


SL2O = rnnprop(step_scale=1e-3, faithful=True)
STEPPERS = {
    "SGD": by_torch(functools.partial(torch.optim.SGD, lr=0.1)),
    "LSTM 8": by_rule(TrainedRule(SL2O, fresh_weights(SL2O))),
}


def step_seconds(task: Task, make: MakeStepper, rounds: int = 3) -> float:
    """Of a whole training step, batch drawn and augmented; the median of rounds of 20 steps."""
    copies = Copies(task, [0])
    run = make(copies)
    roll(copies, run, 5)
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        roll(copies, run, 20)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begun) / 20)
    return statistics.median(times)


def agree(task: Task, name: str, rows: list[dict[str, Any]]) -> None:
    """A captured gradient is the gradient."""
    errors = []
    both = []
    for captured in (True, False):
        task.capturable = captured
        both.append(Copies(task, [0]))
    task.capturable = True
    for _ in range(3):
        batch = both[0].batches("train")
        (loss, grad), (loss_2, grad_2) = (copies.gradients(batch) for copies in both)
        errors += [float((grad - grad_2).norm() / grad_2.norm()), float((loss - loss_2).abs())]
        for copies in both:
            copies.theta -= 0.1 * grad_2
        for key, value in both[0].buffers.items():
            other = both[1].buffers[key]
            assert torch.allclose(value.double(), other.double(), rtol=1e-2, atol=1e-3), key
    assert max(errors) < 2e-2, (name, errors)
    rows.append(row(f"{name}, captured gradient: largest error", max(errors), "relative"))


def variants(task: Task) -> dict[str, float]:
    """Choices that are not made for users: how much they would bring."""
    found = {}
    torch.backends.cudnn.benchmark = True
    found["kernels chosen by trial"] = step_seconds(task, STEPPERS["SGD"])
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    found["no TF32"] = step_seconds(task, STEPPERS["SGD"])
    torch.backends.cudnn.allow_tf32 = True
    return found


HORIZON = 200


def full_space(seconds_of_learning: float = 45.0) -> list[dict[str, Any]]:
    task = image_task("resnet18-cifar10_jpeg@crop@flip@standardised", "auto")
    rule = make_rule("joined")
    drawn = TrainedRule(rule, rule.init(torch.Generator().manual_seed(0)))
    name = "ResNet-18, 11.17 M parameters, batch 128"
    rows = []

    before = start_peak(device())
    copies = Copies(task, [0])
    roll(copies, by_rule(drawn)(copies), 20)
    deployed = peak_memory(device()) - before
    rows.append(row(f"{name}: memory of deployment", deployed / 2**20, "MiB"))
    del copies
    before = start_peak(device())
    trained = meta_train(
        task, rule, seconds=seconds_of_learning, horizon=HORIZON, window=50, copies=1,
        samples=400_000, validations=3, validation_copies=1, lr=0.01, loss="mean",
    )  # fmt: skip
    learned = peak_memory(device()) - before
    base = f"{name}: memory of deployment"
    ratio = learned / deployed
    rows.append(row(f"{name}: memory of meta-training", learned / 2**20, "MiB", base, ratio))
    told = trained.manifest
    rows.append(row(f"{name}: meta-training, inner steps", told["inner_steps"], "steps"))
    rows.append(row(f"{name}: meta-training, validations included", told["seconds"], "s"))
    runs = {
        "meta-trained rule": by_rule(trained), "the rule as it was drawn": by_rule(drawn),
        **{
            f"AdamW at {lr:g}": by_torch(functools.partial(torch.optim.AdamW, lr=lr))
            for lr in (3e-4, 1e-3, 3e-3)
        },
    }  # fmt: skip
    for label, make in runs.items():
        copies = Copies(task, [0])
        losses = roll(copies, make(copies), 2 * HORIZON)[:, 0]
        for steps in (HORIZON, 2 * HORIZON):
            what = f"{name}: loss of the last tenth of {steps} steps, {label}"
            rows.append(row(what, losses[steps - steps // 10 : steps].mean().item(), "nats"))
    return rows


STAGES = {
    "correct": correct, "step": step, "networks": networks, "vit": vit, "replay": replay,
    "meta": meta, "full_space": full_space, "tiles": tiles,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("stages", nargs="*", type=one_of([*STAGES, "report"]), metavar="STAGE")
    chosen = parser.parse_args()
    if chosen.stages != ["report"] and not torch.cuda.is_available():
        parser.error("needs a CUDA device, and a PyTorch built for it")
    chosen.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in chosen.stages or STAGES:
        if name == "report":
            stages = [json.loads((chosen.out / f"{stage}.json").read_text()) for stage in STAGES]
            gathered = [entry for stage in stages for entry in stage["rows"]]
            report("gpu", gathered, stages[0]["machine"], stages[0]["versions"])
            continue
        path = chosen.out / f"{name}.json"
        if path.exists():
            print(f"{name}: done before")
            continue
        begun = time.perf_counter()
        try:
            rows = STAGES[name]()
        except Exception:  # the others are worth their time on a lent GPU
            traceback.print_exc()
            failed.append(name)
            continue
        for entry in rows:
            entry["what"] = f"{entry['what']} [{torch.cuda.get_device_name()}]"
            if entry["against"]:
                entry["against"] = f"{entry['against']} [{torch.cuda.get_device_name()}]"
        told = {"machine": machine(), "versions": versions(), "rows": rows}
        path.write_text(json.dumps(told, indent=1) + "\n")
        print(f"{name}: {time.perf_counter() - begun:.0f} s", flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
