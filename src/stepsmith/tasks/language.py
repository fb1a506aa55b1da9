"""Masked language modelling: a small BERT on a set of sentences, by name.

Shape letters: C = copies, B = sentences of a batch, L = positions of a sequence, K = masked
positions of a sentence at most, V = pieces of the vocabulary, M = sentences.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepsmith.names import unknown
from stepsmith.tasks.base import Batch, Stacking, onto
from stepsmith.tasks.data import ArrayData
from stepsmith.tasks.module import IGNORED, ModuleTask
from stepsmith.tasks.sources import where_from
from stepsmith.tasks.text_data import TextSet, load_text
from stepsmith.tasks.wordpiece import MASK, SPECIAL, encode, train_tokenizer

MASKED = 0.15
"""Share of a sentence's pieces to be predicted; of these 80 % are hidden behind [MASK], 10 % are
replaced by a random piece and 10 % are left as they are (Devlin et al. 2019, section 3.1)."""

_TEST_SEED = 0  # of the masks of the test split, the same for every task and run


@dataclass(frozen=True)
class Bert:
    """The shape of a small BERT.

    Args:
        layers: how many.
        width: of the hidden states, a multiple of `heads`; feed-forward layers are 4 times as wide.
        heads: of the attention.
        dropout: a probability, of hidden states and attention.
        low_rank: r > 0 trains the attention and feed-forward matrices through factors of rank r
            only (LoRA), their random start and their biases frozen; embeddings, LayerNorms and the
            head train in full. 0 trains everything.

    Raises:
        ValueError: a size out of range.
    """

    layers: int = 2
    width: int = 64
    heads: int = 2
    dropout: float = 0.0
    low_rank: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        if self.width % self.heads:
            raise ValueError(
                f"width must be a multiple of heads, got width {self.width} and {self.heads} heads"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout!r}")
        if not 0 <= self.low_rank <= self.width:
            raise ValueError(
                f"low_rank must lie in 0 (none) to width ({self.width}), got {self.low_rank!r}"
            )


LANGUAGE_NETWORKS: dict[str, Bert] = {
    "bert": Bert(),
    "bert-4layers": Bert(layers=4),
    "bert-wide": Bert(width=128),
    "bert-4heads": Bert(heads=4),
    "bert-lora": Bert(low_rank=4),
}


class MaskedLanguageTask(ModuleTask):
    """A network of `LANGUAGE_NETWORKS` filling in masked pieces of sentences, by cross-entropy.

    The network is `transformers`' `BertForMaskedLM` under its own parameter names, from a random
    start; its pieces are trained on the training sentences. Which pieces are masked is drawn with
    each batch, from the same generator; in the test split once and for all. The loss is the mean
    over the masked pieces of a batch, a test's over its batches weighted by their sentences. The
    accuracy of a test is the share of all its masked pieces.

    Args:
        network: one of `LANGUAGE_NETWORKS`.
        text: a `TextSet`, or the name of one for `load_text`.
        length: L, pieces of a sentence, [CLS] and [SEP] included; longer ones are cut (at 32, 16 %
            of the sentences of `e2e` and half of `e2e-mr`).
        batch_size: B.
        vocabulary: V at most, as for `train_tokenizer`.
        layers, width, heads, dropout, low_rank: in place of the network's own, as for `Bert`.
        source, data_dir: where a named set comes from, as in `load_text`.
        options: as for `ModuleTask`. Where `stacking` is not given, copies run side by side in
            threads on a CPU (one by one with dropout), stacked on a GPU.

    Raises:
        ValueError: unknown network or text, a size out of range, or the optional libraries are
            missing.

    Example:
        >>> task = MaskedLanguageTask("bert", "e2e", source="sample", width=16)
        >>> tokens, positions, targets = task.batch(torch.Generator().manual_seed(0), "train")
        >>> tokens.shape, positions.shape, task.name
        (torch.Size([32, 32]), torch.Size([32, 4]), 'bert-width16-e2e')
    """

    def __init__(
        self,
        network: str,
        text: TextSet | str,
        *,
        length: int = 32,
        batch_size: int = 32,
        vocabulary: int = 1000,
        layers: int | None = None,
        width: int | None = None,
        heads: int | None = None,
        dropout: float | None = None,
        low_rank: int | None = None,
        source: str = "auto",
        data_dir: str | Path | None = None,
        **options: Any,
    ):
        if network not in LANGUAGE_NETWORKS:
            raise unknown("network", network, LANGUAGE_NETWORKS)
        given = {
            "layers": layers, "width": width, "heads": heads,
            "dropout": dropout, "low_rank": low_rank,
        }  # fmt: skip
        named = LANGUAGE_NETWORKS[network]
        changes = {k: v for k, v in given.items() if v is not None and v != getattr(named, k)}
        self.shape = dataclasses.replace(named, **changes)
        self._network = "-".join([network, *(f"{k}{v:g}" for k, v in changes.items())])
        networks = _networks(self.shape)
        if isinstance(text, str):
            text = load_text(text, source=source, data_dir=data_dir)
        self.tokenizer = train_tokenizer(text.train, vocabulary)
        self.vocabulary = self.tokenizer.get_vocab_size()
        self.length = length
        train, test = (encode(part, self.tokenizer, length) for part in (text.train, text.test))

        def make() -> nn.Module:
            sizes = dataclasses.asdict(self.shape)
            rank = sizes.pop("low_rank")
            model = networks.bert(self.vocabulary, length, **sizes)
            return networks.make_low_rank(model, rank) if rank else model

        super().__init__(
            make,
            _mean_loss,
            ArrayData(
                train,
                test,
                f"{text.name} ({where_from(text.origin)}, {len(train[0]):,} sentences)",
            ),
            batch_size=batch_size,
            name=f"{self._network}-{text.name}",
            **options,
        )

    @property
    def network_name(self) -> str:
        """The network's name, with what was changed of it."""
        return self._network

    def _choose_stacking(self) -> Stacking:
        if self.device.type == "cpu":
            # Stacked copies are slower here: 14.4 ms against 12.9 a gradient of `bert`, one core.
            return "loop" if self._random else "threads"
        return super()._choose_stacking()

    def prepared(
        self, inputs: Tensor, targets: Tensor, generators: Sequence[torch.Generator]
    ) -> Batch:
        """Sentences (C, B, L) of so many pieces (C, B), masked: see `mask`."""
        return mask(inputs, targets, generators, self.vocabulary)

    def test_batches(self) -> Iterator[Batch]:
        """The test split in order, 500 sentences at a time, always with the same masks."""
        generator = torch.Generator().manual_seed(_TEST_SEED)
        for tokens_BL, counts_B in self.data.test_batches(500):
            masked = mask(tokens_BL[None], counts_B[None], [generator], self.vocabulary)
            yield tuple(part[0] for part in masked)


def mask(
    tokens_CBL: Tensor,
    counts_CB: Tensor,
    generators: Sequence[torch.Generator],
    vocabulary: int,
) -> Batch:
    """Choose the pieces to be predicted and hide them.

    As in BERT's own code a sentence of n pieces has round(0.15 n) of them predicted, at least one.

    Args:
        tokens_CBL: (C, B, L) sentences as `stepsmith.tasks.wordpiece.encode` makes them.
        counts_CB: (C, B) pieces of each sentence.
        generators: C, one a copy.
        vocabulary: V.

    Returns:
        (C, B, L) tokens with the chosen ones hidden, replaced or left; (C, B, K) positions; and
        (C, B, K) targets: the pieces that stood there, or `IGNORED` where a sentence is too short
        to have as many.
    """
    _, size, length = tokens_CBL.shape
    most = max(1, round(MASKED * (length - 2)))
    shape = (size, most)
    device = tokens_CBL.device
    drawn = [
        (
            torch.rand(size, length, generator=g, device=g.device),
            torch.rand(shape, generator=g, device=g.device),
            torch.randint(len(SPECIAL), vocabulary, shape, generator=g, device=g.device),
        )
        for g in generators
    ]
    order_CBL, fate_CBK, other_CBK = (
        onto(torch.stack(part), device) for part in zip(*drawn, strict=True)
    )
    place_L = torch.arange(length, device=device)
    inside_CBL = (place_L > 0) & (place_L <= counts_CB.unsqueeze(-1))
    positions_CBK = order_CBL.masked_fill(~inside_CBL, -1.0).topk(most).indices
    chosen_CB = (counts_CB * MASKED).round().clamp(min=1)
    is_chosen_CBK = torch.arange(most, device=device) < chosen_CB.unsqueeze(-1)
    old_CBK = tokens_CBL.gather(-1, positions_CBK)
    new_CBK = torch.where(fate_CBK < 0.8, MASK, torch.where(fate_CBK < 0.9, other_CBK, old_CBK))
    hidden_CBL = tokens_CBL.scatter(-1, positions_CBK, torch.where(is_chosen_CBK, new_CBK, old_CBK))
    return hidden_CBL, positions_CBK, torch.where(is_chosen_CBK, old_CBK, IGNORED)


def _mean_loss(scores_BKV: Tensor, targets_BK: Tensor) -> Tensor:
    return F.cross_entropy(scores_BKV.flatten(0, 1), targets_BK.flatten(), ignore_index=IGNORED)


@functools.cache
def _networks(shape: Bert) -> Any:
    """The module that builds BERTs, which needs optional libraries."""
    needed = ["tokenizers", "transformers", *(["peft"] if shape.low_rank else [])]
    for library in needed:
        try:
            importlib.import_module(library)
        except ImportError as error:
            raise ValueError(
                f"language tasks need {library} ({' '.join(str(error).split())[:200]}); "
                "pip install transformers tokenizers peft"
            ) from None
    return importlib.import_module("stepsmith.tasks.networks.bert")
