"""Prompts to token ids: whether a folder's tokenizer is its text encoder's, and which prompts are too long for it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from transformers import CLIPTokenizer, PreTrainedModel

from sbrush.console import SbrushError, printable

if TYPE_CHECKING:
    from sbrush.models.model import Model

PROBES = ("a cat", "a red dog")
# What published text encoders say of their special tokens, whatever these are: the ids of another model, which
# transformers wrote into every one of CLIP's configurations until 2023. It then takes the highest id as the end.
LEGACY = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
WORDS = 64  # of a vocabulary, that must come out as themselves
BLOCK = 10_000  # prompts at once


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Any:
    """Token ids and attention mask, each int64 [B, L]."""
    length = tokenizer.model_max_length
    return tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")


def check_tokenizers(model: Model) -> None:
    """SbrushError if a tokenizer is not its text encoder's, so that prompts would not be read as they are meant.

    A tokenizer that does not say how long prompts may be (`model_max_length`) gets its text encoder's length.
    """
    parts = [part for part in model.parts if part.startswith("tokenizer")]
    for part, (tokenizer, encoder) in zip(parts, model.text_parts, strict=True):
        if why := _mismatch(tokenizer, encoder):
            raise SbrushError(
                f"{printable(model.name)}: its {part} {why}",
                f"put the {part}/ there that the model was made with",
                code=2,
            )
    lengths = {tokenizer.model_max_length for tokenizer, _ in model.text_parts}
    if len(lengths) > 1:
        raise SbrushError(
            f"{printable(model.name)}: its tokenizers cut prompts at different lengths, {sorted(lengths)}",
            "set model_max_length in both tokenizer_config.json to the same number",
            code=2,
        )


def _mismatch(tokenizer: CLIPTokenizer, encoder: PreTrainedModel) -> str | None:
    """Why a tokenizer is not this encoder's; None if nothing speaks against it."""
    vocabulary, size = tokenizer.get_vocab(), encoder.config.vocab_size
    if (highest := max(vocabulary.values())) >= size:
        return f"has words that the text encoder does not know: id {highest}, of {size}"
    if tokenizer.model_max_length > encoder.config.max_position_embeddings:
        tokenizer.model_max_length = encoder.config.max_position_embeddings
    for name, legacy in LEGACY.items():
        own, theirs = getattr(tokenizer, name), getattr(encoder.config, name)
        if theirs not in (own, legacy):
            return f"has {name} {own}, the text encoder {theirs}"
    # An encoder that does not say its end's id tells by its size whether this is its vocabulary.
    if encoder.config.eos_token_id != tokenizer.eos_token_id and tokenizer.eos_token_id < 0.9 * size:
        return f"ends prompts with id {tokenizer.eos_token_id}, where a vocabulary of {size} has its last ones"
    ids = tokenize(tokenizer, PROBES).input_ids
    if bool((ids[0] == ids[1]).all()):
        return f'turns "{PROBES[0]}" and "{PROBES[1]}" into the same tokens'
    if any(row[0] != tokenizer.bos_token_id or tokenizer.eos_token_id not in row for row in ids.tolist()):
        return "does not mark where a prompt begins and where it ends"
    pieces = tokenizer(list(PROBES), add_special_tokens=False).input_ids
    if any(piece == tokenizer.unk_token_id for row in pieces for piece in row):
        return f'does not know the words of "{PROBES[1]}"'
    words = sorted((word for word in vocabulary if re.fullmatch("[a-z]{2,}</w>", word)), key=vocabulary.__getitem__)
    if chosen := words[:: max(1, len(words) // WORDS)]:
        found = tokenizer([word.removesuffix("</w>") for word in chosen], add_special_tokens=False).input_ids
        whole = sum(row == [vocabulary[word]] for row, word in zip(found, chosen, strict=True))
        if whole < 0.9 * len(chosen):
            return f"splits words of its own vocabulary ({len(chosen) - whole} of {len(chosen)}): its merges are others"
    return None


def truncated_prompts(parts: Iterable[tuple[CLIPTokenizer, object]], texts: Sequence[str]) -> int:
    """How many of the texts are longer than one of the text encoders reads. `parts`: see Model.text_parts."""
    cut = set[int]()
    for tokenizer, _ in parts:
        length, lengths = tokenizer.model_max_length, _Lengths(tokenizer)
        # A letter of ASCII is one token at most; start and end are one each.
        long = [i for i, text in enumerate(texts) if len(text) + 2 > length or not text.isascii()]
        for first in range(0, len(long), BLOCK):
            some = long[first : first + BLOCK]
            cut.update(i for i, n in zip(some, lengths([texts[i] for i in some]), strict=True) if n > length)
    return len(cut)


class _Lengths:
    """Counts texts' tokens, start and end included, without tokenizing a word twice: a million prompts take seconds.

    CLIP's tokens never reach over a space, so that a text has as many as its words together.
    """

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        self._tokenizer, self._known = tokenizer, dict[str, int]()
        self._ends = len(tokenizer("").input_ids)
        whole, parts = self._count(PROBES), [sum(self._count(probe.split())) for probe in PROBES]
        self._by_word = whole == parts

    def __call__(self, texts: Sequence[str]) -> list[int]:
        if not self._by_word:
            return [self._ends + n for n in self._count(texts)]
        split = [text.split(" ") for text in texts]
        new = list({word for words in split for word in words}.difference(self._known))
        self._known.update(zip(new, self._count(new), strict=True))
        return [self._ends + sum(map(self._known.__getitem__, words)) for words in split]

    def _count(self, texts: Sequence[str]) -> list[int]:
        """Each text's tokens, without start and end."""
        if not texts:
            return []
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        return [len(ids) for ids in self._tokenizer(list(texts), **options).input_ids]
