"""Small BERTs for masked language modelling, from `transformers`; low-rank forms through `peft`.

Both libraries are optional (the extra `text`); importing this module without
`transformers` fails.

Shape letters: B = sentences of a batch, L = positions of a sequence, K = masked positions,
W = width, V = pieces of the vocabulary.

Source: Devlin et al. 2019, "BERT", arXiv:1810.04805; Hu et al. 2021, "LoRA", arXiv:2106.09685.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

from stepsmith.tasks.wordpiece import PAD

LOW_RANK_TARGETS = (
    r"bert\.encoder\.layer\.\d+\."
    r"(attention\.self\.(query|key|value)|attention\.output\.dense|intermediate\.dense"
    r"|output\.dense)"
)
"""The matrices that get low-rank factors: attention and feed-forward, of every layer."""


class MaskedBert(BertForMaskedLM):
    """`BertForMaskedLM`, weights and names included, that scores the masked positions only.

    Scoring all positions and dropping most of them makes a small BERT's gradient half as slow
    again. Padding is masked here, where stacked copies (`torch.func.vmap`) can follow.
    """

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, tokens: Tensor, positions: Tensor
    ) -> Tensor:
        """(B, K, V) scores at `positions` (B, K) of `tokens` (B, L), both int64."""
        embedded_BLW = self.bert.embeddings(input_ids=tokens)
        dtype = embedded_BLW.dtype
        padding_B11L = tokens[:, None, None, :] == PAD
        mask_B11L = torch.zeros_like(padding_B11L, dtype=dtype)
        mask_B11L = mask_B11L.masked_fill(padding_B11L, torch.finfo(dtype).min)
        hidden_BLW = self.bert.encoder(embedded_BLW, attention_mask=mask_B11L)[0]
        index_BKW = positions.unsqueeze(-1).expand(*positions.shape, hidden_BLW.shape[-1])
        return self.cls(hidden_BLW.gather(1, index_BKW))


def bert(
    vocabulary: int, length: int, *, layers: int, width: int, heads: int, dropout: float
) -> MaskedBert:
    """A randomly initialised BERT; nothing is downloaded.

    Args:
        vocabulary: V.
        length: L.
        layers: how many.
        width: W, a multiple of `heads`; the feed-forward layers are four times as wide.
        heads: of the attention.
        dropout: of hidden states and attention, a probability.
    """
    return MaskedBert(
        BertConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            max_position_embeddings=length,
            type_vocab_size=1,  # one sentence, no pair
            pad_token_id=PAD,
            # The fused attention has no rule for stacked copies, and at this size no lead.
            attn_implementation="eager",  # pyright: ignore[reportCallIssue]
        )
    )


def make_low_rank(model: MaskedBert, rank: int) -> MaskedBert:
    """Freeze the matrices of `LOW_RANK_TARGETS` and add to each a product of two thin factors.

    Their biases are frozen too. Embeddings, LayerNorms and the head train in full. In place.

    Args:
        model: a BERT.
        rank: r; W x W' becomes frozen W x W' plus B (W x r) times A (r x W'), B zero at the start.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=LOW_RANK_TARGETS, lora_dropout=0.0, bias="none"
    )
    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".base_layer." not in name)
    return model
