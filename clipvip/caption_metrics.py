"""BLEU-4, ROUGE-L and CIDEr of captions, as the COCO caption evaluation computes them.

sacrebleu computes BLEU. ROUGE-L and CIDEr are written here: no maintained library computes COCO's
variants without Java or large models. COCO tokenizes by Stanford's PTBTokenizer, a Java program;
coco_tokens follows its rules.
"""

import html
import importlib.util
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import zip_longest

METRICS = ("BLEU-4", "ROUGE-L", "CIDEr")

_CLIPS_AT_ONCE = 1000  # limits the memory that sacrebleu takes for the n-grams of references
_LENGTHS = (1, 2, 3, 4)  # of the n-grams in BLEU and CIDEr
_SIGMA = 6.0  # CIDEr-D: tolerance for differences in length
_BETA = 1.2  # COCO's ROUGE-L: weight of recall relative to precision

# Characters that PTBTokenizer spells differently, and a hyphen, a space and a selector it drops.
_SPELLINGS = str.maketrans(
    {
        "’": "'",
        "‘": "'",
        "–": " -- ",
        "—": " -- ",
        "―": " -- ",
        "…": " ... ",
        "£": "#",
        "€": "$",
        "¢": " cents",
        "¼": " 1/4",
        "½": " 1/2",
        "¾": " 3/4",
        "\u00ad": None,
        "\u200b": " ",
        "\ufe0f": " ",
    }
)
_BRACKETS = str.maketrans(
    {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
)
# Abbreviations that keep their full stop, even at the end of a sentence.
_ABBREVIATIONS = (
    "adj|adm|adv|al|ala|alex|apr|ark|assoc|aug|ave|az|bhd|bros|cf|cie|co|col|"
    "conn|corp|cos|cpl|ct|dak|dec|del|det|dr|drs|elec|ens|esq|est|etc|ext|feb|"
    "fla|fri|ft|ga|gen|gov|hon|inc|ind|intl|jan|jos|jr|jul|jun|kan|ky|la|lt|"
    "ltd|maj|mar|mass|md|mfg|mme|mo|mon|mr|mrs|ms|mt|mtg|neb|nev|nov|oct|pa|"
    "penn|pfc|ph|plc|pptes|pres|prof|pte|pty|pvt|rd|rep|rev|rt|sen|sep|seq|sfc|"
    "sgt|spc|sq|sr|st|ste|supt|sys|tel|tex|thu|tue|va|vs|vt|wed|wis|wm|wyo"
)
# Words that open a sentence. A single letter before one of them does not keep its full stop.
_OPENERS = (
    "A|About|According|Additionally|After|An|As|At|But|He|Her|Here|However|If|In|"
    "It|Last|Many|More|Now|Once|One|Other|Our|She|Since|So|Some|Such|That|The|"
    "Their|Then|There|These|They|This|We|What|When|While|Yet|You"
)
# Python's \w lacks combining marks and the vowel signs of Hebrew, Arabic, Indic and Thai script.
_W = r"(?:[^\W_]|[\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u0dff\u0e31-\u0e4e])"
_END = rf"(?!{_W})"
_TOKEN = re.compile(
    rf"""
    (?i: can(?=not{_END}) | (?:gon|wan)(?=na{_END}) | got(?=ta{_END}) | (?:lem|gim)(?=me{_END}) )
  | [A-Za-z]+(?=\s)                                                # most words, for speed
  | </?[A-Za-z][^<>\s]*>                                           # <unk>
  | -[LRlr][RCSrcs][Bb]-                                           # -LRB-, a bracket
  | (?i: [^\W\d_]+?(?=n't{_END}) | n't{_END} )                     # does n't
  | (?i: '(?:[smd]|ll|re|ve){_END} )                               # it 's
  | (?i: 'n' | '(?:n|em|till?|cause){_END} | 't(?=(?:is|was){_END}) )
  | '(?:[2-9]0s|\d\d)(?!{_W}|["'])                                 # the '90s
  | (?i: [jy]'(?=[a-z]) | [dlon]'[^\W\d_]+ | [a-z]*[aeiouy]'[aeiou][a-z]* )  # o'clock, ma'am
  | (?i: (?:c'mon|s'mores|ev'ry|li'l|nor'easter|cap'n|nat'l){_END} | (?:ol|dunkin|somethin)'{_END} )
  | [A-Za-z0-9]+(?:-[A-Za-z]+){{0,2}}(?:/[A-Za-z0-9]+(?:-[A-Za-z]+){{0,2}}){{1,2}}  # and/or
  | \d+-\d+/\d+                                                    # 1-1/2
  | {_W}+(?:[.,]+{_W}+){{0,4}}[.,]{{0,4}}(?:[-‐‑]{_W}+)+           # 3.5-inch
  | (?<!-)[-+]?\d*(?:[.,:]\d+)+ | (?<!-)[-+]\d+                    # 12:30, 1,000, -5
  | (?:[A-Za-z]\.)+[A-Za-z]\.{_END} | (?i:ph\.d\.) | [A-Za-z]+(?:\.[A-Za-z]+)+  # U.S., a.com
  | (?i: (?:{_ABBREVIATIONS})\. ) | (?:Ill|Miss|Ore|Wash)\.
  | (?i: (?:nos?|art|fig|pp|op|prop|ca)\.(?=\s*\d) )               # no. 5
  | [A-Za-z]\.(?!\s+(?:{_OPENERS}){_END})                          # vitamin C.
  | [A-Z]+&[A-Z]+{_END} | \#[A-Za-z]+ | @[A-Za-z]\w*               # R&B
  | {_W}+(?:_{_W}+)*
  | [:;=]['-]?[()DPp|]{_END} | [?!]{{2,}} | \*+ | _+ | -{{5,}} | << | >>
  | [^\s'"`“”«»‹›.,:;?!‐‑‒\U00010000-\U0010ffff-]                  # symbols, not punctuation
    """,
    re.VERBOSE,
)


def coco_tokens(text: str) -> list[str]:
    """Split a caption into the tokens that the COCO caption evaluation compares.

    These are the tokens of `PTBTokenizer -lowerCase` from Stanford CoreNLP 3.4.1 without the
    punctuation in COCO's list: "A man can't see." gives a, man, ca, n't, see. Brackets stay, as
    -lrb- and -rrb-, because COCO's list has them in capitals only. Most emoji are dropped.
    """
    found = _TOKEN.findall(html.unescape(text).translate(_SPELLINGS))
    return " ".join(found).lower().translate(_BRACKETS).split()


def check_installed() -> None:
    """Raise ValueError if sacrebleu is missing, for calls before captions are generated."""
    if importlib.util.find_spec("sacrebleu") is None:
        raise ValueError('sacrebleu is not installed: pip install "clipvip[captions]"')


def score_captions(
    candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Score one caption per clip against the clip's references, as the COCO evaluation does.

    candidates: one caption per clip, in any order of clips; an empty one matches nothing.
    references: for each clip, at least one caption written by a person.
    Returns the values of METRICS in the units of papers, 100 times COCO's numbers:
        BLEU-4: from the n-gram counts of all clips together, with the closest reference length;
            0 to 100 (Papineni et al., 2002). Computed by sacrebleu.
        ROUGE-L: F-score (beta 1.2) of the longest common subsequence, with the best precision and
            the best recall over a clip's references; mean over clips, 0 to 100 (Lin, 2004).
        CIDEr: CIDEr-D with sigma 6; mean over clips, 0 to 1000, for people about 100 (Vedantam et
            al., 2015, section 5). Rare n-grams count more: the document frequencies are those of
            these references. So values on different sets of clips are not comparable, and a single
            clip scores 0, as in COCO's code.
    Raises ValueError if there is no clip, a list does not fit, a clip has no reference, or
    sacrebleu is not installed.
    """
    check_installed()
    tokens, reference_tokens = _tokenized(candidates, references)
    values = (
        _bleu(tokens, reference_tokens),
        _rouge_l(tokens, reference_tokens),
        _cider(tokens, reference_tokens),
    )
    return dict(zip(METRICS, values, strict=True))


def exact_match(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the percentage of captions with the same coco_tokens as one of their references.

    Arguments and errors are those of score_captions. A caption without any token never matches.
    """
    pairs = list(zip(*_tokenized(candidates, references), strict=True))
    return 100 * sum(bool(caption) and caption in refs for caption, refs in pairs) / len(pairs)


def _tokenized(
    candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Check the arguments of score_captions, and return their tokens."""
    if len(candidates) != len(references):
        raise ValueError(
            f"{len(candidates)} candidates but {len(references)} lists of references; expected one "
            "candidate and one list per clip"
        )
    if not len(candidates):
        raise ValueError("no captions to score; expected at least one clip")
    for position, (caption, refs) in enumerate(zip(candidates, references, strict=True)):
        if not isinstance(caption, str):
            raise ValueError(f"candidates[{position}] is {caption!r:.80}; expected a string")
        if isinstance(refs, str) or not len(refs) or not all(isinstance(x, str) for x in refs):
            raise ValueError(
                f"references[{position}] is {refs!r:.80}; expected a list of at least one string"
            )
    return [coco_tokens(x) for x in candidates], [[coco_tokens(x) for x in r] for r in references]


def _bleu(candidates: list[list[str]], references: list[list[list[str]]]) -> float:
    """Corpus BLEU-4 in percent; sacrebleu counts, on tokens joined by spaces."""
    from sacrebleu.metrics import BLEU

    bleu = BLEU(tokenize="none", force=True, smooth_method="none")
    correct, total = [0] * len(_LENGTHS), [0] * len(_LENGTHS)
    length = reference_length = 0
    for start in range(0, len(candidates), _CLIPS_AT_ONCE):
        captions = [" ".join(x) for x in candidates[start : start + _CLIPS_AT_ONCE]]
        texts = [[" ".join(x) for x in r] for r in references[start : start + _CLIPS_AT_ONCE]]
        # The k-th stream holds the k-th reference of every clip, and None where there is none.
        part = bleu.corpus_score(captions, list(zip_longest(*texts)))
        correct = [x + y for x, y in zip(correct, part.counts, strict=True)]
        total = [x + y for x, y in zip(total, part.totals, strict=True)]
        length, reference_length = length + part.sys_len, reference_length + part.ref_len
    return BLEU.compute_bleu(correct, total, length, reference_length).score


def _rouge_l(candidates: list[list[str]], references: list[list[list[str]]]) -> float:
    """Mean ROUGE-L in percent."""
    scores = []
    for caption, refs in zip(candidates, references, strict=True):
        common = [_common_subsequence(caption, ref) for ref in refs]
        if not any(common):
            continue
        precision = max(common) / len(caption)
        recall = max(x / max(len(ref), 1) for x, ref in zip(common, refs, strict=True))
        scores.append((1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision))
    return 100 * math.fsum(scores) / len(candidates)


def _common_subsequence(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence, by bit-parallel dynamic programming (Hyyrö, 2004).

    Bit i of `row` is 0 if the subsequence grows by one at position i of `first`.
    """
    positions: dict[str, int] = {}
    for i, token in enumerate(first):
        positions[token] = positions.get(token, 0) | 1 << i
    row = everything = (1 << len(first)) - 1
    for token in second:
        matches = row & positions.get(token, 0)
        row = (row + matches | row - matches) & everything
    return len(first) - row.bit_count()


def _cider(candidates: list[list[str]], references: list[list[list[str]]]) -> float:
    """Mean CIDEr-D, 100 times COCO's value.

    Between a caption and a reference it is, for n-grams of one length,
    10 · exp(-Δ²/2σ²) · Σ min(c, r)·r / (|c|·|r|), where c and r are the tf-idf weights of their
    n-grams and Δ is the difference of their lengths. It is averaged over the n-gram lengths 1 to 4
    and over the references.
    """
    frequency = Counter(
        gram
        for refs in references
        for gram in {x for r in refs for n in _LENGTHS for x in _grams(r, n)}
    )
    log_clips = math.log(len(references))
    idf = {gram: log_clips - math.log(clips) for gram, clips in frequency.items()}
    scores = []
    for caption, refs in zip(candidates, references, strict=True):
        similarity = 0.0
        for n in _LENGTHS:
            own = {x: k * idf.get(x, log_clips) for x, k in Counter(_grams(caption, n)).items()}
            own_norm = math.sqrt(sum(x * x for x in own.values()))
            for ref in refs if own_norm else ():
                dot = square = 0.0
                for gram, count in Counter(_grams(ref, n)).items():
                    weight = count * idf[gram]
                    square += weight * weight
                    if gram in own:
                        dot += min(own[gram], weight) * weight
                if dot:
                    # COCO's code takes the number of bigrams for the length.
                    difference = max(len(caption) - 1, 0) - max(len(ref) - 1, 0)
                    penalty = math.exp(-(difference**2) / (2 * _SIGMA**2))
                    similarity += penalty * dot / (own_norm * math.sqrt(square))
        scores.append(similarity / len(refs))
    return 100 * 10 * math.fsum(scores) / len(_LENGTHS) / len(candidates)


def _grams(tokens: list[str], n: int) -> Iterator[tuple[str, ...]]:
    """All n-grams of a caption, in their order."""
    return zip(*(tokens[i:] for i in range(n)), strict=False)
