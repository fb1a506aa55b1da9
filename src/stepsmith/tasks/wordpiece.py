"""A vocabulary of word pieces of a task's own, trained on its training sentences.

Shape letters: M = sentences, L = positions of a sequence.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stepsmith.tasks.files import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""The first pieces of every vocabulary, in this order: a piece's number is its place here."""

PAD, UNK, CLS, SEP, MASK = range(len(SPECIAL))
SMALLEST = 64  # pieces; fewer leave no room for words beside the letters


@functools.lru_cache(maxsize=8)
def train_tokenizer(sentences: tuple[str, ...], vocabulary: int = 1000) -> Tokenizer:
    """Train BERT's lower-case WordPiece tokenizer: the same sentences give the same pieces.

    Args:
        sentences: what to train on.
        vocabulary: pieces to stop at, `SPECIAL` included; there are fewer where the sentences
            hold no more.

    Returns:
        The tokenizer; its encoding adds neither [CLS] nor [SEP].

    Raises:
        ValueError: a vocabulary below `SMALLEST`.
        ImportError: the `tokenizers` library is not installed.

    Source: Devlin et al. 2019, arXiv:1810.04805, section 3; Wu et al. 2016, arXiv:1609.08144.
    """
    if vocabulary < SMALLEST:
        raise ValueError(f"vocabulary must be at least {SMALLEST} pieces, got {vocabulary!r}")
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    def tokenizer(pieces: dict[str, int] | None) -> Tokenizer:
        made = Tokenizer(models.WordPiece(pieces, unk_token=SPECIAL[UNK]))
        made.normalizer = normalizers.BertNormalizer(lowercase=True)  # pyright: ignore
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore
        return made

    normal = normalizers.BertNormalizer(lowercase=True)
    counts = Counter(c for s in sentences for c in normal.normalize_str(s) if not c.isspace())
    frequent = sorted(counts, key=lambda c: (-counts[c], c))
    letters = sorted(frequent[: (vocabulary - len(SPECIAL)) // 4])
    # The trainer numbers the letters inside words in the order of a hash table, and breaks ties by
    # number: two runs would give two vocabularies (huggingface/tokenizers, issue 1794). Named
    # beforehand, they have fixed numbers; the trainer's special treatment of them is left behind.
    first = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters)]
    learner = tokenizer(None)
    learner.train_from_iterator(
        sentences,
        trainers.WordPieceTrainer(
            vocab_size=vocabulary,
            special_tokens=first,
            initial_alphabet=letters,
            limit_alphabet=len(letters),
            show_progress=False,
        ),
    )
    return tokenizer(learner.get_vocab(with_added_tokens=True))


@functools.lru_cache(maxsize=8)
def encode(sentences: tuple[str, ...], tokenizer: Tokenizer, length: int) -> tuple[Tensor, Tensor]:
    """Sentences as numbers: [CLS], pieces, [SEP], [PAD]...; longer ones are cut.

    Args:
        sentences: those without a single piece are left out.
        tokenizer: as `train_tokenizer` makes it.
        length: L, at least 3.

    Returns:
        (M, L) int64 tokens and (M,) int64 counts of pieces: sentence m has its own at positions
        1 to counts[m]. Kept for the next call: do not write to them.

    Raises:
        ValueError: a length below 3.
        DataError: no sentence has a piece.
    """
    if length < 3:
        raise ValueError(f"length must be at least 3 ([CLS], one piece, [SEP]), got {length!r}")
    rows = [encoding.ids[: length - 2] for encoding in tokenizer.encode_batch(list(sentences))]
    rows = [row for row in rows if row]
    if not rows:
        raise DataError("no sentence holds a piece of text; pass others")
    tokens = [[CLS, *row, SEP] + [PAD] * (length - 2 - len(row)) for row in rows]
    return torch.tensor(tokens), torch.tensor([len(row) for row in rows])
