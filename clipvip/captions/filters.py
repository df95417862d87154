"""Captions that are no use to train on: empty ones, ones that are no text, and repetitions."""

import re
import unicodedata

THINK = "<think>"
THOUGHT = re.compile(r"^.*</think>", re.DOTALL)
# A phrase of n words that follows itself this often is a loop. People say things three times too.
WORD_TIMES, PAIR_TIMES, PHRASE_TIMES = 4.0, 3.0, 2.5
LETTER_TIMES, SYLLABLE_TIMES = 6, 3  # the same within a word, or in a script without spaces
LONG, FEW = 12, 0.25  # so many words are a loop if at most this share of them differ


def said(text: str) -> str:
    """Return a caption as one line, its white space normalised, without what the model thought."""
    return " ".join(THOUGHT.sub("", text).split())


def fault_of(caption: str) -> str | None:
    """Return why a caption, as `said` gives it, is filtered; None if it is not.

    "empty": nothing was said. "unfinished": the model still thinks (`<think>`).
    "not text": it holds control characters or U+FFFD, or less than half of it are letters and
    digits, or it has no letter of any script.
    "repeated": a word, a phrase or a syllable is said over and over.
    """
    if not caption:
        return "empty"
    if THINK in caption:
        return "unfinished"
    if not _is_text(caption):
        return "not text"
    if _is_repeated(caption):
        return "repeated"
    return None


def _is_text(caption: str) -> bool:
    kinds = [unicodedata.category(letter) for letter in caption if letter != " "]
    if "\ufffd" in caption or any(kind in ("Cc", "Cs", "Co", "Cn") for kind in kinds):
        return False
    # Vowel signs (M) are letters too; joiners (Cf) belong to some scripts, and count for neither.
    kinds = [kind for kind in kinds if kind != "Cf"]
    letters = sum(kind[0] in "LM" for kind in kinds)
    return letters > 0 and letters + sum(kind[0] == "N" for kind in kinds) >= len(kinds) / 2


def _is_repeated(caption: str) -> bool:
    stripped = (word.strip(".,;:!?'\"()-") for word in caption.lower().split())
    words = [word for word in stripped if word]
    if len(words) >= LONG and len({*words}) <= FEW * len(words):
        return True
    for period in range(1, len(words) // 2 + 1):
        times = {1: WORD_TIMES, 2: PAIR_TIMES}.get(period, PHRASE_TIMES)
        if _longest(words, period) >= times * period:
            return True
    letters = [letter for letter in caption.lower() if unicodedata.category(letter)[0] in "LMN"]
    for period in range(1, min(len(letters) // 2, 64) + 1):
        longest = max((_longest(word, period) for word in words), default=0)
        times = LETTER_TIMES if period == 1 else SYLLABLE_TIMES
        # Within a long caption, such a word may be what a sign says.
        if longest >= times * period and longest >= LETTER_TIMES and longest >= len(letters) / 2:
            return True
    return False


def _longest(items: list[str] | str, period: int) -> int:
    """Return the length of the longest stretch that repeats itself every `period` items."""
    longest = run = 0
    for here, before in zip(items[period:], items, strict=False):
        run = run + 1 if here == before else 0
        longest = max(longest, run)
    return longest + period if longest else 0
