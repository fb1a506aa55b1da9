"""Masked language modelling on the bundled sample."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from transformers import BertForMaskedLM

from stepsmith import LearnedOptimizer, make_task, meta_train
from stepsmith.tasks import LANGUAGE_NETWORKS, MaskedLanguageTask, TextSet, load_text, task_names
from stepsmith.tasks.language import mask
from stepsmith.tasks.module import IGNORED
from stepsmith.tasks.wordpiece import CLS, MASK, PAD, SEP, SPECIAL
from stepsmith.unroll.copies import Copies

EMBEDDINGS = "bert.embeddings.word_embeddings.weight"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(network: str = "bert", text: str | TextSet = "e2e", **options) -> MaskedLanguageTask:
    if isinstance(text, str):
        text = load_text(text, source="sample")
        text = TextSet(text.name, text.origin, text.train[:1000], text.test[:60])
    options = {"width": 16, "length": 20, "batch_size": 16, "vocabulary": 300, **options}
    return MaskedLanguageTask(network, text, **options)


# --- masks ----------------------------------------------------------------------------------------


def test_masks_follow_the_recipe_of_bert():
    vocabulary, size, length = 1005, 4000, 42
    counts = torch.full((1, size), 40)
    tokens = torch.randint(len(SPECIAL), vocabulary, (1, size, length))
    tokens[..., 0], tokens[..., -1] = CLS, SEP
    hidden, positions, targets = mask(tokens, counts, [seeded()], vocabulary)
    assert positions.shape == (1, size, 6)  # 15 % of 40
    assert bool((targets == tokens.gather(-1, positions)).all())
    inside = torch.zeros_like(tokens).scatter(-1, positions, 1)
    assert bool((inside.sum(-1) == 6).all())  # no place twice
    assert int(inside[..., 0].sum()) + int(inside[..., -1].sum()) == 0
    assert bool((hidden == tokens)[inside == 0].all())
    # Every place is as likely as any other.
    share = inside[0, :, 1:-1].float().mean(0)
    assert (share - 0.15).abs().max() < 5 * (0.15 * 0.85 / size) ** 0.5
    seen = hidden.gather(-1, positions)
    chosen = targets.numel()
    for share, want in (
        ((seen == MASK).sum() / chosen, 0.8),
        ((seen == targets).sum() / chosen, 0.1 + 0.1 / 1000),
        (((seen != MASK) & (seen != targets)).sum() / chosen, 0.1 - 0.1 / 1000),
    ):
        assert abs(share - want) < 5 * (want * (1 - want) / chosen) ** 0.5
    replaced = seen[(seen != MASK) & (seen != targets)]
    assert replaced.min() >= len(SPECIAL)
    assert len(replaced.unique()) > 500


@pytest.mark.parametrize(("pieces", "want"), [(1, 1), (3, 1), (13, 2), (20, 3), (30, 4)])
def test_short_sentences_have_fewer_pieces_masked(pieces, want):
    tokens = torch.full((1, 50, 32), PAD)
    tokens[..., 0] = CLS
    tokens[..., 1 : pieces + 1] = 7
    tokens[..., pieces + 1] = SEP
    hidden, positions, targets = mask(tokens, torch.full((1, 50), pieces), [seeded()], 300)
    counted = targets != IGNORED
    assert bool((counted.sum(-1) == want).all())
    assert bool((targets[counted] == 7).all())
    assert positions[counted].min() >= 1
    assert positions[counted].max() <= pieces
    assert bool(((hidden == tokens) | (tokens == 7)).all())


def test_a_seed_means_the_same_masks_whatever_runs_beside_it():
    task = small()
    alone = task.batch(seeded(3), "train")
    beside = task.batches([seeded(2), seeded(3)], "train")
    for one, many in zip(alone, beside, strict=True):
        assert torch.equal(one, many[1])
        assert not torch.equal(one, many[0])
    again = task.batch(seeded(3), "train")
    assert all(torch.equal(a, b) for a, b in zip(alone, again, strict=True))


def test_the_test_split_is_masked_once_and_for_all():
    first, second = (list(small().test_batches()) for _ in range(2))
    assert sum(len(batch[0]) for batch in first) == 60
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_what_validates_is_not_meta_trained_on():
    words = [a + b for a in "bcdfghjklmnpqrstvwxz" for b in "aeiou"]
    text = TextSet("words", "test", tuple(words), ("ba be",))
    task = small(text=text, length=3, batch_size=500)

    def drawn(split: str) -> set[str]:
        *_, targets = task.batch(seeded(), split)
        return {task.tokenizer.id_to_token(int(t)) for t in targets.unique()}

    held_out = {task.tokenizer.encode(word).tokens[0] for word in words[::10]}
    assert drawn("meta_valid") == held_out
    assert not drawn("meta_train") & held_out
    assert len(drawn("meta_train")) > 80


# --- networks -------------------------------------------------------------------------------------


def test_the_network_is_berts_own():
    task = small()
    # Not the seed of the task's own module, whose decoder would go unnoticed in place of the tie.
    params, buffers = task.init(seeded(5))
    batch = tokens, positions, targets = task.batch(seeded(), "train")
    reference = BertForMaskedLM(task.module().config).eval()
    missing = reference.load_state_dict(params, strict=False).missing_keys
    # The decoder shares the embeddings' matrix.
    assert set(missing) <= {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    with torch.no_grad():
        scores = reference(input_ids=tokens, attention_mask=(tokens != PAD).long()).logits
        rows = scores.gather(1, positions[..., None].expand(-1, -1, scores.shape[-1]))
        counted = targets != IGNORED
        want = torch.nn.functional.cross_entropy(rows[counted], targets[counted])
        loss, _, metrics = task.loss(params, buffers, batch, None, False)
    torch.testing.assert_close(loss, want)
    right = (rows[counted].argmax(-1) == targets[counted]).float().mean()
    torch.testing.assert_close(metrics["accuracy"], right)


@pytest.mark.parametrize("network", LANGUAGE_NETWORKS)
def test_parameter_counts(network):
    shape = LANGUAGE_NETWORKS[network]
    task = small(network, width=None, length=16)
    params, _ = task.init(seeded())
    v, w, r = task.vocabulary, shape.width, shape.low_rank
    embeddings = (v + 16 + 1) * w + 2 * w
    head = w * w + w + 2 * w + v  # the decoder's matrix is the embeddings'
    matrices = [(w, w)] * 4 + [(w, 4 * w), (4 * w, w)]
    layer = sum(r * (a + b) if r else a * b + b for a, b in matrices) + 4 * w
    assert sum(p.numel() for p in params.values()) == embeddings + head + shape.layers * layer
    loss, _, _ = task.loss(*task.init(seeded()), task.batch(seeded(), "train"), None, True)
    assert loss.isfinite()


def test_tied_weights_stay_tied():
    task = small()
    copies = Copies(task, [0, 1])
    names = copies.layout.names
    assert EMBEDDINGS in names
    assert not any("decoder" in name for name in names)
    _, grads = copies.gradients(copies.batches("train"))
    copies.theta -= 0.1 * grads
    params = copies.layout.views(copies.theta[1])
    model = task.module(params)
    decoder = model.get_parameter("cls.predictions.decoder.weight")
    assert decoder is model.get_parameter(EMBEDDINGS)
    assert torch.equal(decoder, params[EMBEDDINGS])
    assert model.get_parameter("cls.predictions.decoder.bias") is model.get_parameter(
        "cls.predictions.bias"
    )


@pytest.mark.parametrize("network", ["bert", "bert-lora"])
def test_stacked_copies_agree_with_copies_in_threads_and_alone(network):
    losses, grads = [], []
    for stacking in ("vmap", "threads", "loop"):
        copies = Copies(small(network, stacking=stacking, dtype=torch.float64), [0, 1, 2])
        copies.theta += 0.05 * torch.randn(
            copies.theta.shape, generator=seeded(), dtype=torch.float64
        )
        loss, grad = copies.gradients(copies.batches("train"))
        losses.append(loss)
        grads.append(grad)
    for i in (1, 2):
        torch.testing.assert_close(losses[i], losses[0])
        torch.testing.assert_close(grads[i], grads[0])
    assert small().stacking == "threads"


def test_low_rank_trains_factors_embeddings_norms_and_head():
    task = small("bert-lora")
    params, buffers = task.init(seeded())
    for name in params:
        layered = name.startswith("bert.encoder.layer.")
        assert ("lora_" in name) == (layered and "LayerNorm" not in name), name
    frozen = [name for name in buffers if ".base_layer." in name]
    assert len(frozen) == 2 * 2 * 6  # layers, weight and bias, matrices
    query = "bert.encoder.layer.0.attention.self.query."
    assert params[query + "lora_A.default.weight"].shape == (4, 16)
    assert bool((params[query + "lora_B.default.weight"] == 0).all())
    # The factors' product is added to the frozen matrix.
    a, b = torch.randn(4, 16), torch.randn(16, 4)
    moved = {**params, query + "lora_A.default.weight": a, query + "lora_B.default.weight": b}
    merged = {**buffers, query + "base_layer.weight": buffers[query + "base_layer.weight"] + b @ a}
    batch = task.batch(seeded(), "train")
    torch.testing.assert_close(
        task.loss(moved, buffers, batch, None, False)[0],
        task.loss(params, merged, batch, None, False)[0],
    )
    other = task.init(seeded(1))[1]
    assert not torch.equal(other[query + "base_layer.weight"], buffers[query + "base_layer.weight"])
    assert all(torch.equal(v, task.init(seeded())[1][k]) for k, v in buffers.items())


def test_starts_repeat_by_seed_and_are_berts():
    task = small(width=64)
    first, again, other = (task.init(seeded(seed))[0] for seed in (1, 1, 2))
    for name, value in first.items():
        assert torch.equal(value, again[name])
    weight = "bert.encoder.layer.1.intermediate.dense.weight"
    assert not torch.equal(first[weight], other[weight])
    assert abs(first[weight].std() - 0.02) < 0.001


def test_dropout_draws_from_the_tasks_generator():
    task = small(dropout=0.3)
    assert task.stacking == "loop"
    params, buffers = task.init(seeded())
    batch = task.batch(seeded(), "train")
    losses = [task.loss(params, buffers, batch, seeded(s), True)[0] for s in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    assert (
        small().loss(params, buffers, batch, None, True)[0]
        == task.loss(params, buffers, batch, None, False)[0]
    )


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["bert", "bert-lora"])
def test_adam_lowers_the_loss(network):
    task = small(network, width=32)
    copies = Copies(task, [0])
    before = copies.test()
    theta = copies.theta.clone().requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=0.01)
    for _ in range(60):
        _, theta.grad = copies.gradients(copies.batches("train"))
        optimizer.step()
        copies.theta = theta.detach()
    after = copies.test()
    assert before["loss"].item() == pytest.approx(torch.tensor(300.0).log().item(), rel=0.1)
    assert after["loss"] < before["loss"] - 0.7
    assert after["accuracy"] > before["accuracy"] + 0.04


@pytest.mark.parametrize("network", ["bert", "bert-lora"])
def test_meta_training_runs(network):
    task = small(network, "e2e-mr")
    options = {
        "steps": 24, "horizon": 6, "window": 3, "copies": 2, "validations": 2,
        "validation_copies": 2, "samples": 500,
    }  # fmt: skip
    windows = []
    first, again = (
        meta_train(task, "l2o_dm", on_window=lambda run, window: windows.append(window), **options)
        for _ in range(2)
    )
    assert all(math.isfinite(window.value) for window in windows)
    assert first.manifest["inner_steps"] >= 24
    assert all(torch.equal(value, again.weights[key]) for key, value in first.weights.items())


def test_a_learned_optimizer_trains_the_plain_module():
    model = BertForMaskedLM(small().module().config)
    tokens = torch.randint(5, 300, (4, 12), generator=seeded())
    optimizer = LearnedOptimizer(model.parameters(), "mlp-mnist")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
    assert loss.isfinite()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


# --- names and refusals ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "text"),
    [
        ("bert-e2e", (2, 64, 2, 0), "e2e"),
        ("bert-4layers-e2e", (4, 64, 2, 0), "e2e"),
        ("bert-wide-e2e", (2, 128, 2, 0), "e2e"),
        ("bert-4heads-e2e", (2, 64, 4, 0), "e2e"),
        ("bert-e2e-mr", (2, 64, 2, 0), "e2e-mr"),
        ("bert-lora-e2e", (2, 64, 2, 4), "e2e"),
    ],
)
def test_tasks_by_name(name, shape, text):
    assert name in task_names()
    task = make_task(name, source="sample", batch_size=2, length=16)
    assert isinstance(task, MaskedLanguageTask)
    s = task.shape
    assert (s.layers, s.width, s.heads, s.low_rank) == shape
    assert task.name == name
    assert task.network_name == name.removesuffix(f"-{text}")
    assert task.data_name == f"{text} (sample, 4,000 sentences)"


def test_what_is_changed_shows_in_the_name():
    task = make_task("bert-e2e", source="sample", layers=1, width=32, heads=2, length=8)
    assert task.name == "bert-layers1-width32-e2e"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 30, "heads": 4}, "width must be a multiple of heads, got width 30 and 4 heads"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"low_rank": 99}, r"low_rank must lie in 0 \(none\) to width \(16\), got 99"),
        ({"length": 2}, "length must be at least 3"),
        ({"vocabulary": 7}, "vocabulary must be at least 64"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"network": "bart"}, "unknown network 'bart'; known: bert, .* Did you mean 'bert'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown text set 'e3e': did you mean 'e2e'"):
        make_task("bert-e3e", source="sample")
    with pytest.raises(ValueError, match="unexpected keyword argument 'depth'"):
        make_task("bert-e2e", source="sample", depth=3)


@pytest.mark.parametrize(
    ("library", "name"),
    [("transformers", "bert-e2e"), ("tokenizers", "bert-e2e"), ("peft", "bert-lora-e2e")],
)
def test_a_missing_library_is_one_clear_line(library, name):
    code = (
        f"import sys; sys.modules[{library!r}] = None\n"
        "import stepsmith.tasks\n"
        "print(len(stepsmith.tasks.task_names()))\n"
        "try: stepsmith.make_task(sys.argv[1], source='sample')\n"
        "except ValueError as error: print(error)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, name], capture_output=True, text=True, check=True
    )
    _, said = run.stdout.splitlines()
    assert said.startswith(f"language tasks need {library} (")
    assert said.endswith("pip install transformers tokenizers peft")


def test_listing_tasks_imports_no_language_library():
    code = (
        "import sys, stepsmith.tasks; stepsmith.tasks.task_names(); "
        "print(sorted({'transformers', 'tokenizers', 'peft', 'datasets'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
