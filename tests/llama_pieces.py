"""A tokenizer with LLaMA's rules that cuts the worked example of SQ-LLaVA into LLaMA's own pieces."""

from __future__ import annotations

from itertools import accumulate
from typing import Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vlmtune.types import IMAGE_MARK

_FIRST = ["▁US", "ER", "▁V"]
"""Before the words, so that `▁USER` is `▁US ER` and `▁VUSER` is `▁V USER`, as LLaMA has them."""
_PARTS = ["SS", "IST", "ANT", "uch"]
_WORDS = ["What", "this", "is", "it", "animal", "dog", "color", "Brown", "Where", "On", "a", "A", "co"]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def llama_pieces(scheme: Literal["legacy", "modern"]) -> PreTrainedTokenizerFast:
    """legacy: a space before every piece of text, as transformers' slow tokenizer; modern: before the first only."""
    merges = [pair for piece in _FIRST for pair in _growing(piece)]
    merges += [("U", "S"), ("US", "ER")]
    merges += [pair for word in (*_PARTS, *_WORDS) for pair in _growing(word)]
    merges += [("▁", word) for word in _WORDS]
    merges = list(dict.fromkeys(merges))
    letters = sorted({*map(chr, range(33, 127)), "▁", "\n"})
    pieces = dict.fromkeys(["<unk>", *_BYTES, *letters, *(left + right for left, right in merges)])
    model = models.BPE(
        {piece: number for number, piece in enumerate(pieces)},
        merges,
        byte_fallback=True,
        fuse_unk=True,
        unk_token="<unk>",
    )
    backend = Tokenizer(model)
    if scheme == "legacy":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.add_tokens([AddedToken(IMAGE_MARK, special=True, normalized=False)], special_tokens=True)
    return tokenizer


def _growing(piece: str) -> list[tuple[str, str]]:
    """The merges that make a piece letter by letter."""
    grown = list(accumulate(piece))
    return list(zip(grown, piece[1:], strict=False))
