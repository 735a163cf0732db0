"""Notes about prompts before they are drawn: truncated ones, and unknown words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sbrush.console import count, info, printable
from sbrush.sampling.generation import Drawer
from sbrush.stickers.world import unknown_words

NAMED_WORDS = 10  # unknown words that a note names


def unknown_words_note(model: Drawer, prompts: Iterable[str]) -> str | None:
    """A line on the words that no caption of the built-in world holds; None without such, or for another model."""
    if model.about.get("world") != "stickers":
        return None
    if words := sorted({word for prompt in prompts for word in unknown_words(prompt)}):
        more = f" and {count(len(words) - NAMED_WORDS, 'other')}" if len(words) > NAMED_WORDS else ""
        return f"the built-in world has never seen: {printable(', '.join(words[:NAMED_WORDS]))}{more}"
    return None


def note_unknown_words(model: Drawer, prompts: Iterable[str]) -> None:
    """Prints that line."""
    if note := unknown_words_note(model, prompts):
        info(f"note: {note}")


def note_truncated_prompts(model: Drawer, texts: Sequence[str]) -> None:
    """Tells how many prompts are cut off, if any: two prompts that differ behind the cut are the same image."""
    if cut := model.truncated_prompts(texts):
        length = model.longest_prompt
        info(f"note: {cut} of {len(texts)} prompts are longer than the {length} tokens read; their ends are cut off")
