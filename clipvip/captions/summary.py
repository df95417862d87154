"""Summary of a run of captions: counts, examples, and captions that many clips share."""

import hashlib
from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clipvip.captions.work import Record
from clipvip.files import shown

KNOWN_TEXTS = 100_000  # distinct captions whose text is remembered
# A caption is suspicious if so many clips have it, and so large a share of the captioned ones.
MANY, MANY_SHARE = 10, 0.05
SOME, SOME_SHARE = 3, 0.5
EXAMPLE = 60  # letters


@dataclass
class Summary:
    """Counts of a run.

    clips: all clips. kept: those that had a caption and were not captioned. captioned: those that
    got one. earlier: those in shards that an earlier run finished; the other counts leave them out.
    left_out: number of others by the reason (see filters.fault_of, and "unreadable"). cut: captions
    that reached the most tokens. examples: of filtered texts, by the reason.
    """

    clips: int = 0
    kept: int = 0
    captioned: int = 0
    earlier: int = 0
    cut: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    # These depend on the order of the results, which is that in which workers finish.
    examples: dict[str, str] = field(default_factory=dict, compare=False)
    _hashes: "array[int]" = field(default_factory=lambda: array("Q"), repr=False, compare=False)
    _texts: dict[int, str] = field(default_factory=dict, repr=False, compare=False)

    def add(self, record: Record) -> None:
        if record.caption is None:
            assert record.left_out is not None
            self.left_out[record.left_out] += 1
            self.examples.setdefault(record.left_out, record.said)
            return
        self.captioned += 1
        self.cut += record.cut
        digest = hashlib.blake2b(record.caption.lower().rstrip(" .").encode(), digest_size=8)
        number = int.from_bytes(digest.digest(), "little")
        self._hashes.append(number)
        if len(self._texts) < KNOWN_TEXTS:
            self._texts.setdefault(number, record.caption)

    def join(self, other: "Summary") -> None:
        """Add the counts of another process."""
        for name in ("clips", "kept", "captioned", "earlier", "cut"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.left_out += other.left_out
        self.examples = {**other.examples, **self.examples}
        self._hashes.extend(other._hashes)
        self._texts = {**other._texts, **self._texts}

    def most_common(self) -> tuple[str, int]:
        """Return the most frequent caption, ignoring case and full stop, and how many have it."""
        if not self._hashes:
            return "", 0
        values, counts = np.unique(np.frombuffer(self._hashes, np.uint64), return_counts=True)
        top = int(counts.argmax())
        return self._texts.get(int(values[top]), "…"), int(counts[top])

    def is_suspicious(self) -> bool:
        """Whether one caption was given to so many clips that the model may not look at them."""
        _, count = self.most_common()
        share = count / max(self.captioned, 1)
        return (count >= MANY and share >= MANY_SHARE) or (count >= SOME and share >= SOME_SHARE)

    def record(self) -> dict[str, Any]:
        """Return the counts for a JSON file."""
        text, count = self.most_common()
        return {
            "clips": self.clips,
            "kept": self.kept,
            "captioned": self.captioned,
            "cut": self.cut,
            "left_out": dict(self.left_out.most_common()),
            "most_common": {"caption": text, "clips": count},
        }

    def lines(self, length: int) -> list[str]:
        """Describe the run for people. length: most tokens of a caption."""
        found = [f"{self.captioned} of {self.clips} clips captioned"]
        if self.kept:
            found[0] += f", {self.kept} had a caption already"
        if self.earlier:
            found[0] += f"; {self.earlier} are in shards that an earlier run finished"
        for reason, count in self.left_out.most_common():
            example = shown(self.examples.get(reason, ""))
            example = example[:EXAMPLE] + "…" * (len(example) > EXAMPLE)
            found.append(
                f"{count} without a caption: {reason}" + f", such as {example!r}" * bool(example)
            )
        if self.cut:
            captions = "caption" if self.cut == 1 else "captions"
            found.append(f"{self.cut} {captions} cut off after {length} tokens (--length)")
        if self.is_suspicious():
            text, count = self.most_common()
            share = f"{count} of {self.captioned} captions ({count / self.captioned:.0%})"
            found.append(
                f"warning: {share} are {shown(text)[:EXAMPLE]!r}; they were kept. Look at some of "
                "these clips, and try another prompt or model"
            )
        return found


def joined(parts: list[Summary]) -> Summary:
    whole = Summary()
    for part in parts:
        whole.join(part)
    return whole
