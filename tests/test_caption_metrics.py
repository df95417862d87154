"""Caption metrics equal the COCO evaluation's own values, and keep their definitions' properties.

Expected tokens and values are those of pycocoevalcap 1.2, COCO's code for Python 3, with its Java
tokenizer, on the same sentences.
"""

import itertools
import random
import sys

import pytest

from clipvip.caption_metrics import METRICS, coco_tokens, exact_match, score_captions

TOKENS = {
    "A man doesn't know he's being filmed.": "a man does n't know he 's being filmed",
    "The dog can't catch it; it's too fast!": "the dog ca n't catch it it 's too fast",
    "He said \"stop\" and she replied 'no'.": "he said stop and she replied no",
    "a well-known chef cooks a 3-course meal": "a well-known chef cooks a 3-course meal",
    "Two people (a man and a woman) walk.": "two people -lrb- a man and a woman -rrb- walk",
    "A man plays. He smiles, then bows.": "a man plays he smiles then bows",
    "A man plays guitar,sings and dances": "a man plays guitar sings and dances",
    "it costs $3.50, or £2.99": "it costs $ 3.50 or # 2.99",
    "1,000 people at 10:30 a.m. on 5/6/2020": "1,000 people at 10:30 a.m. on 5/6/2020",
    "the U.S. flag waves. Mr. Smith speaks.": "the u.s. flag waves mr. smith speaks",
    "hats, gloves etc.": "hats gloves etc.",
    "vitamin C. He eats": "vitamin c he eats",
    "a man is gonna jump... wait -- he cannot!": "a man is gon na jump wait he can not",
    "smart “quotes”, ‘single’ ones… an em—dash": "smart quotes single ones an em dash",
    "they don’t and won’t": "they do n't and wo n't",
    "rock 'n' roll of the '90s, five o'clock": "rock 'n' roll of the '90s five o'clock",
    "girls' team wins women's cup": "girls team wins women 's cup",
    "what?! no!! really?": "what ?! no !! really",
    "he is 6'2\" tall and jumps 5'10\"": "he is 6 2 tall and jumps 5 10",
    "his/her hip-hop/rap, and/or R&B": "his/her hip-hop/rap and/or r&b",
    "1-1/2 cups, ½ cup, 50% off & free": "1-1/2 cups 1/2 cup 50 % off & free",
    "a 4x4 truck, 80kg, 12:30pm, -5 degrees": "a 4x4 truck 80kg 12:30 pm -5 degrees",
    "a dog 🐶 runs 😀😀 fast ♥": "a dog runs fast ♥",
    "un café français à côté de l'église": "un café français à côté de l'église",
    "мужчина играет на гитаре": "мужчина играет на гитаре",
    "हिन्दी में": "हिन्दी में",
    "你好，世界。": "你好 ， 世界 。",
    "a <unk> [sic] {x} a*b a+b a_b": "a <unk> -lsb- sic -rsb- -lcb- x -rcb- a * b a + b a_b",
    "- a list,  with\ttabs\nand lines -": "a list with tabs and lines",
    "Tom &amp; Jerry": "tom & jerry",
    "": "",
    " -- . ?": "",
}

CANDIDATES = [
    "A man is playing the guitar.",
    "a dog catches a frisbee in the park",
    "two women are cooking, and talking",
    "someone is riding a bike",
    "a cat sleeps on a sofa",
    "a man is speaking",
    "A boy doesn't want to eat his well-done steak",
]
REFERENCES = [
    ["A man plays an acoustic guitar.", "the man is playing the guitar on stage", "a guitarist"],
    ["A dog jumps and catches a frisbee.", "the brown dog is catching a frisbee in a park!"],
    ["Two women cook and talk in a kitchen", "women are cooking", "two ladies prepare a meal"],
    ["A person rides a bicycle down the hill."],
    ["a cat sleeps on a sofa", "The cat's asleep on the couch."],
    ["the news anchor is speaking", "a man is speaking about cars", "a man in a suit talks"],
    ["A boy doesn't want to eat", "a child can't finish his well-done steak"],
]

OWN = {"BLEU-4": 63.09288266466838, "ROUGE-L": 69.2982483538856, "CIDEr": 294.21020819811076}
GRAMMAR = {"BLEU-4": 61.3612805443582, "ROUGE-L": 70.04514313683487, "CIDEr": 240.9540597976917}


def sentences(clips: int, each: int, seed: int) -> list[list[str]]:
    """`each` sentences per clip, of a small grammar, in which a clip's sentences are related."""
    choose = random.Random(seed).choice
    told = []
    for _ in range(clips):
        who = [choose(["man", "woman", "dog", "boy", "team"]) for _ in range(2)]
        what = [choose(["runs", "sings", "is cooking", "plays the guitar"]) for _ in range(2)]
        told.append(
            [
                f"{choose(['A', 'The', 'one', 'a young'])} {choose(who)} {choose(what)}"
                f"{choose(['', ' in a park', ' on the well-lit stage', ', and jumps', ' again'])}."
                for _ in range(each)
            ]
        )
    return told


@pytest.mark.parametrize(("text", "tokens"), TOKENS.items())
def test_tokens_equal_those_of_ptb_tokenizer(text, tokens):
    assert " ".join(coco_tokens(text)) == tokens


def test_values_equal_coco_s_own():
    scores = score_captions(CANDIDATES, REFERENCES)
    assert scores == pytest.approx(OWN, rel=1e-8)
    assert tuple(scores) == METRICS
    clips = sentences(300, 6, seed=0)
    scores = score_captions([x[0] for x in clips], [x[1:] for x in clips])
    assert scores == pytest.approx(GRAMMAR, rel=1e-8)


def test_order_of_clips_and_of_references_does_not_matter():
    clips = sentences(2500, 4, seed=1)  # more than sacrebleu is given at once
    scores = score_captions([x[0] for x in clips], [x[1:] for x in clips])
    random.Random(2).shuffle(clips)
    again = score_captions([x[0] for x in clips], [x[:0:-1] for x in clips])
    assert again == pytest.approx(scores, rel=1e-12)


def test_case_and_punctuation_do_not_matter():
    shouted = [f" {x.upper().rstrip('.')}!" for x in CANDIDATES]
    assert score_captions(shouted, REFERENCES) == score_captions(CANDIDATES, REFERENCES)


def test_a_reference_as_caption_scores_the_most():
    scores = score_captions([x[-1] for x in REFERENCES[1:]], REFERENCES[1:])
    assert scores["ROUGE-L"] == pytest.approx(100)
    assert scores["BLEU-4"] == pytest.approx(100)
    only = [[x[-1]] for x in REFERENCES[1:]]
    assert score_captions([x[0] for x in only], only)["CIDEr"] == pytest.approx(1000)


def test_bleu_counts_over_all_clips():
    alone = [
        score_captions([c], [r])["BLEU-4"] for c, r in zip(CANDIDATES, REFERENCES, strict=True)
    ]
    together = score_captions(CANDIDATES, REFERENCES)["BLEU-4"]
    assert abs(together - sum(alone) / len(alone)) > 1
    twice = score_captions(CANDIDATES * 2, REFERENCES * 2)["BLEU-4"]
    assert twice == pytest.approx(together)


def test_further_references_never_lower_rouge_l():
    clips = sentences(100, 6, seed=3)
    captions = [x[0] for x in clips]
    scores = [score_captions(captions, [x[1:k] for x in clips])["ROUGE-L"] for k in range(2, 7)]
    assert scores == sorted(scores)


def test_rouge_l_finds_the_longest_common_subsequence():
    def longest(first, second):
        return max(
            n
            for n in range(len(first) + 1)
            for kept in itertools.combinations(first, n)
            if n == 0 or contains(second, kept)
        )

    def contains(tokens, kept):
        rest = iter(tokens)
        return all(x in rest for x in kept)

    rng = random.Random(4)
    for _ in range(50):
        first = rng.choices("abc", k=rng.randint(1, 8))
        second = rng.choices("abc", k=rng.randint(1, 12))
        common = longest(first, second)
        precision, recall = common / len(first), common / len(second)
        expected = 244 * precision * recall / (recall + 1.44 * precision) if common else 0
        value = score_captions([" ".join(first)], [[" ".join(second)]])["ROUGE-L"]
        assert value == pytest.approx(expected)


def test_cider_prefers_rare_words():
    references = [["a man rides a unicycle"], ["a man eats"], ["a man sleeps"], ["a man sings"]]
    others = ["a man eats", "a man sleeps", "a man sings"]
    rare = score_captions(["a unicycle", *others], references)["CIDEr"]
    common = score_captions(["a man", *others], references)["CIDEr"]
    assert rare > common


def test_captions_without_words_score_nothing():
    assert score_captions(["", "?"], [["a dog runs home"], ["a cat"]]) == dict.fromkeys(METRICS, 0)
    assert score_captions(["", "a"], [[""], ["🐶"]]) == dict.fromkeys(METRICS, 0)
    one = score_captions(["a dog runs home fast"], [["a dog runs home fast", "a dog"]])
    assert one == pytest.approx({"BLEU-4": 100, "ROUGE-L": 100, "CIDEr": 0})


def test_exact_match_is_up_to_case_and_punctuation():
    assert (
        exact_match(
            ["A dog runs.", "cats", "", "it's"], [["x", "a dog runs"], ["cat"], [""], ["it’s"]]
        )
        == 50
    )
    assert exact_match(["a dog"], [["a dog"]]) == 100


@pytest.mark.parametrize(
    ("captions", "references", "message"),
    [
        ([], [], "no captions to score"),
        (["a"], [], "1 candidates but 0 lists of references"),
        (
            ["a", "b"],
            [["a"], []],
            r"references\[1\] is \[\]; expected a list of at least one string",
        ),
        (["a"], ["a dog"], r"references\[0\] is 'a dog'; expected a list"),
        (["a"], [["a", None]], r"references\[0\] is \['a', None\]"),
        (["a", None], [["a"], ["b"]], r"candidates\[1\] is None; expected a string"),
    ],
)
def test_errors_name_the_clip(captions, references, message):
    for function in (score_captions, exact_match):
        with pytest.raises(ValueError, match=message):
            function(captions, references)


def test_a_missing_sacrebleu_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ValueError, match=r'pip install "clipvip\[captions\]"'):
        score_captions(["a dog"], [["a dog"]])


@pytest.mark.parametrize("unit", ["a,", "a", "a-", "a/", "a'", "a.", "a:-", "<a", "_a&"])
def test_long_texts_are_read_in_linear_time(unit):
    assert "".join(coco_tokens(unit * 50_000)).count("a") == 50_000  # quadratic: minutes
