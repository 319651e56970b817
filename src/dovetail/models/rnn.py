"""Recurrent systems: language models and sequence-to-sequence by LSTM or GRU. Arrangements of parts, nothing more.

`Decoder` and `EncoderDecoder` take recurrent mixers as they take any other; these two say how they used to be put
together. No layout was ever published for them: save with format="dovetail".
"""

from __future__ import annotations

from typing import Literal

from dovetail.models.decoder import Decoder
from dovetail.models.encoder_decoder import EncoderDecoder
from dovetail.parts.attention.softmax import Attention
from dovetail.parts.containers import Stack
from dovetail.parts.embedding import LinearHead
from dovetail.parts.position.base import NoPosition
from dovetail.parts.recurrent.block import RecurrentBlock
from dovetail.parts.recurrent.rnn import Gru, Lstm
from dovetail.spec import Ref

Cell = Literal["lstm", "gru"]
_CELLS = {"lstm": Lstm(), "gru": Gru()}


def language_model(
    vocab: int, dim: int = 650, depth: int = 2, cell: Cell = "lstm", dropout: float = 0.5, tied: bool = False
) -> Decoder:
    """A stacked recurrent language model; the defaults are the medium model of Zaremba et al. 2014, section 4.1.

    Dropout is on the embedding and on every layer's output, never on the recurrence. tied: Press and Wolf 2017.
    """
    return Decoder(
        vocab=vocab,
        dim=dim,
        depth=depth,
        blocks=(RecurrentBlock(mixer=_CELLS[cell], dropout=dropout),) * depth,
        norm=None,
        dropout=dropout,
        head=Ref(path="embedding") if tied else LinearHead(bias=True),
    )


def sequence_to_sequence(
    vocab: int,
    dim: int = 512,
    depth: int = 2,
    cell: Cell = "lstm",
    dropout: float = 0.2,
    decoder_vocab: int | None = None,
) -> EncoderDecoder:
    """A recurrent encoder-decoder with attention: a two-way encoder (Bahdanau et al. 2015, section 3.2), and a
    decoder whose last layer looks at it with one head of multiplicative attention (Luong et al. 2015, "general").

    What is found is added to the stream, where Luong concatenates. Nothing else comes from the encoder: the decoder
    starts from zero. Without attention, from the encoder's last states: `sequence_to_sequence_by_state`.
    """
    mixer = _CELLS[cell]
    attention = Attention(heads=1, position=NoPosition(), dropout=dropout)
    block = RecurrentBlock(mixer=mixer, dropout=dropout)
    encoder = Stack(
        depth=depth,
        blocks=(block.replace(mixer=mixer.replace(bidirectional=True)),) * depth,
        norm=None,
        dropout=dropout,
    )
    decoder = Stack(
        depth=depth,
        blocks=(*[block] * (depth - 1), block.replace(cross=attention)),
        norm=None,
        dropout=dropout,
    )
    return EncoderDecoder(
        vocab=vocab,
        dim=dim,
        decoder_vocab=decoder_vocab,
        decoder_embedding=Ref(path="embedding") if decoder_vocab in (None, vocab) else {"kind": "token"},  # type: ignore[arg-type]
        encoder=encoder,
        decoder=decoder,
        head=LinearHead(bias=True),
    )


def sequence_to_sequence_by_state(
    vocab: int,
    dim: int = 1000,
    depth: int = 4,
    cell: Cell = "lstm",
    dropout: float = 0.0,
    decoder_vocab: int | None = None,
) -> EncoderDecoder:
    """Two stacks of recurrences and no attention: each decoder layer starts from the last state of the encoder's.

    The defaults are the sizes of Sutskever et al. 2014, section 3.4. That they read the source backwards is a matter of
    the data: give the source's tokens in reverse.
    """
    stack = Stack(
        depth=depth, blocks=(RecurrentBlock(mixer=_CELLS[cell], dropout=dropout),) * depth, norm=None, dropout=dropout
    )
    return EncoderDecoder(
        vocab=vocab,
        dim=dim,
        decoder_vocab=decoder_vocab,
        decoder_embedding={"kind": "token"},  # type: ignore[arg-type]
        encoder=stack,
        decoder=stack,
        bridge="last_state",
        head=LinearHead(bias=True),
    )
