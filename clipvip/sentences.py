"""Texts from people, as they are read before a tokenizer sees them; needs no torch."""

import html

# A text of megabytes would take seconds and much memory, and no model reads that far.
MOST_CHARACTERS = 20_000


def sentence(text: str, what: str) -> str:
    """Return a text from a person, without the spaces before it.

    what: subject of the errors. Raises ValueError if it is empty or no text.
    """
    if not text.strip():
        raise ValueError(f"{what} is empty; expected a sentence")
    try:
        # In an ASCII locale, Python stores other bytes of the command line as surrogates.
        return text.encode(errors="surrogateescape").decode().lstrip()
    except UnicodeError:
        raise ValueError(f"{what} {text!r} is not UTF-8; expected a sentence") from None


def plain(text: str) -> str:
    """Resolve HTML entities, as CLIP's own tokenizer does; only MOST_CHARACTERS are read."""
    return html.unescape(html.unescape(text[:MOST_CHARACTERS]))
