"""Whether a teacher knows a token's words already, and whether it can read a prompt that holds it."""

from __future__ import annotations

from collections.abc import Iterable

from sbrush.models.model import Model
from sbrush.stickers.world import unknown_words

LONGEST = 2  # pieces of a token in the built-in world, whose captions have ten tokens with both ends
COMMON = 0.9  # share of CLIP's vocabulary, in which words are sorted by how often they were met: sks is at .97


def ordinary_words(teacher: Model, words: Iterable[str]) -> list[str]:
    """Those of the words that the teacher has been told often: a caption's words, or one frequent token of CLIP's."""
    if teacher.about.get("world") == "stickers":
        return [word for word in words if not unknown_words(word)]
    tokenizer = teacher.text_parts[0][0]
    vocabulary, size = tokenizer.get_vocab(), len(tokenizer)
    return [word for word in words if vocabulary.get(f"{word}</w>", size) < COMMON * size]


def too_long_for_world(teacher: Model, token: str) -> bool:
    """Whether a token pushes a caption's last words, its background, to where the built-in text encoder knows none."""
    pieces = teacher.text_parts[0][0].tokenize(token)
    return teacher.about.get("world") == "stickers" and len(pieces) > LONGEST
