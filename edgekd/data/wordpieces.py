"""Texts become ids: a tokenizer that is trained here or read from a file, never from the network."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgekd.errors import DataError, nearest

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

PAD, UNKNOWN, FIRST, LAST = _SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")  # BERT's names, at 0, 1, 2, 3
_PADS = (PAD, "<pad>")
_CHARACTERS = 1000  # different ones that get a piece of their own, the most frequent first; as in BERT
_CHUNK = 8192  # texts that are encoded at once


@dataclass(frozen=True, slots=True)
class Encoded:
    """Texts as ids, all of one length."""

    ids: np.ndarray  # int32, texts × length, the padding at the end
    counts: np.ndarray  # int32, how many ids of each text are no padding
    cut: int  # number of texts that were longer


def trained(texts: Iterable[str], vocabulary: int, where: str) -> Tokenizer:
    """A lower-case WordPiece tokenizer for `texts`: equal texts in any order give equal pieces.

    WordPiece because its encoding (the longest known piece first) is a few lines in any language, so that an app needs
    no library for it. The library's trainer numbers the single characters in the order of a hash map, and later ties
    are broken by those numbers; here they are given to it in a fixed order.

    Args:
        texts: to count pieces in.
        vocabulary: number of pieces at most, [PAD] [UNK] [CLS] [SEP] among them.
        where: what the errors are about.

    Raises:
        DataError: the vocabulary is too small for the characters of the texts.

    Reference: Wu et al., "Google's neural machine translation system", arXiv 2016, section 4.1 (WordPiece).
    """
    from tokenizers import Tokenizer, models, trainers

    blank = _shaped(Tokenizer(models.WordPiece(unk_token=UNKNOWN)))
    assert blank.normalizer is not None
    assert blank.pre_tokenizer is not None
    words = Counter(
        word for text in texts for word, _ in blank.pre_tokenizer.pre_tokenize_str(blank.normalizer.normalize_str(text))
    )
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            counts[character] += count
    kept = sorted(counts, key=lambda character: (-counts[character], character))[:_CHARACTERS]
    inner = sorted({"##" + character for word in words for character in word[1:]} & {"##" + c for c in kept})
    least = len(_SPECIAL) + len(inner) + len(kept)
    if vocabulary < least:
        raise DataError(f"vocabulary is {vocabulary}", where=where, expected=f"at least {least}, for single characters")
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary,
        special_tokens=[*_SPECIAL, *inner],
        initial_alphabet=kept,
        limit_alphabet=len(kept),
        show_progress=False,
    )
    with _alone():
        blank.train_from_iterator((word for word, count in sorted(words.items()) for _ in range(count)), trainer)
    pieces = sorted(blank.get_vocab().items(), key=lambda item: item[1])
    made = _shaped(Tokenizer(models.WordPiece(dict(pieces), unk_token=UNKNOWN)))  # without `inner` as special tokens
    made.add_special_tokens(list(_SPECIAL))
    return made


def _shaped(tokenizer: Tokenizer) -> Tokenizer:
    """BERT's lower-casing, splitting at spaces and punctuation, and [CLS] … [SEP]."""
    from tokenizers import normalizers, pre_tokenizers, processors

    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing((LAST, _SPECIAL.index(LAST)), (FIRST, _SPECIAL.index(FIRST)))
    return tokenizer


def loaded(path: Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json, or in a folder that holds one, as Hugging Face libraries save it.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    from tokenizers import Tokenizer

    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        siblings = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
        raise DataError(
            "no such tokenizer",
            where=str(file),
            nearest=nearest(file.name, siblings),
            fix="of a model without tokenizer.json: AutoTokenizer.from_pretrained(model).save_pretrained(folder)",
        )
    try:
        return Tokenizer.from_file(str(file))
    except Exception as problem:  # the library raises a bare Exception
        raise DataError(f"not a tokenizer: {problem}", where=str(file)) from problem


def values(tokenizer: Tokenizer) -> int:
    """Number of ids: one more than the highest."""
    return max(tokenizer.get_vocab().values()) + 1


def fit(tokenizer: Tokenizer, length: int, where: str) -> None:
    """Sets the tokenizer to cut and pad every text to `length` ids, the padding at the end.

    Saved so, it gives an app just what training got.

    Raises:
        DataError: nothing would be left of a text beside the marks that the tokenizer puts around it.
    """
    marks = tokenizer.num_special_tokens_to_add(False)
    if length <= marks:
        raise DataError(f"length is {length}", where=where, expected=f"more than the {marks} marks around a text")
    known = tokenizer.get_vocab()
    own = (tokenizer.padding or {}).get("pad_token")
    pad = next((token for token in (own, *_PADS) if token in known), None)
    pad = pad or min(known, key=lambda token: known[token])  # a model without one never sees it: the mask is 0
    tokenizer.enable_padding(direction="right", pad_id=known[pad], pad_token=pad, length=length)
    tokenizer.enable_truncation(length)


def lengths(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """Number of ids of each text, nothing cut or padded."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    counts = [len(encoding.ids) for chunk in _chunks(texts) for encoding in _encodings(tokenizer, chunk)]
    return np.array(counts, dtype=np.int64)


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Encoded:
    """What a tokenizer from `fit` makes of the texts."""
    rows, counts, cut = [], [], 0
    for chunk in _chunks(texts):
        encodings = _encodings(tokenizer, chunk)
        rows.append(np.array([encoding.ids for encoding in encodings], dtype=np.int32))
        counts.append(np.array([sum(encoding.attention_mask) for encoding in encodings], dtype=np.int32))
        cut += sum(bool(encoding.overflowing) for encoding in encodings)
    return Encoded(np.concatenate(rows), np.concatenate(counts), cut)


def _encodings(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Encoding]:
    with _alone():
        return tokenizer.encode_batch(list(texts))


def _chunks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    yield from (texts[start : start + _CHUNK] for start in range(0, len(texts), _CHUNK))


@contextmanager
def _alone() -> Iterator[None]:
    """Keep the library to one thread: once it has used several it warns whenever this process forks a worker."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
