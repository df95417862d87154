"""Which captions are kept, and which are filtered."""

import pytest

from clipvip.captions.filters import fault_of, said

GOOD = [
    "a dog runs across the grass",
    "a man and a woman and a child are sitting at a table",
    "a very very very large dog",
    "no, no, no, says the sign",
    "two men, one in red and one in blue, play tennis; the man in red serves",
    "a sign that says aaaaaaah",
    "a close up of a person holding a cup of coffee in a cup holder",
    "the letters a b c d e f g",
    "a plate of food on a table next to a plate of food and a cup",
    "1990s computer",
    "ein Hund läuft über die Straße",
    "собака бежит по траве",
    "一只狗在草地上奔跑",
    "犬が芝生の上を走っている",
    "강아지가 잔디밭을 달린다",
    "כלב רץ על הדשא",
    "كلب يركض على العشب",
    "कुत्ता घास पर दौड़ रहा है",
    "สุนัขกำลังวิ่งบนสนามหญ้า",
    "می‌خواهم سگ را ببینم",
    "a dog 🐕 on the beach",
    "haha",
]
FAULTY = {
    "empty": ["", "   \n\t ", "<think>what is it</think>  "],
    "unfinished": ["<think> the user wants one sentence, so"],
    "not text": [
        "!!!!!!!!", "... . .. .", "12 : 45", "a \ufffd\ufffd dog", "a\x00b", "\x1b[31mred",
        "🐕🐕🐕", "a = { } ( ) [ ] ; ; ; ;", "-", "\ue000 private",
    ],
    "repeated": [
        "dog dog dog dog", "a dog a dog a dog", "the the the the dog",
        "a man in a suit and a man in a suit and a man in a suit",
        "Dog, dog. DOG! dog", "hahahaha", "啊啊啊啊啊啊啊", "一只狗一只狗一只狗",
        "aaaaaaaaaaaa", "a b b a b a a b a b b a a b b b",
    ],
}  # fmt: skip


@pytest.mark.parametrize("text", GOOD)
def test_captions_of_any_language_are_kept(text):
    assert fault_of(said(text)) is None


@pytest.mark.parametrize("fault,text", [(f, text) for f, texts in FAULTY.items() for text in texts])
def test_degenerate_captions_are_told_apart(fault, text):
    assert fault_of(said(text)) == fault


def test_a_caption_is_one_line_without_thoughts():
    assert said("  a dog\n\n runs\u2028away \t") == "a dog runs away"
    assert said("<think>\nit may be\n a cat</think>\n\nA dog.") == "A dog."


@pytest.mark.parametrize("times", [2, 50, 2000])
def test_a_long_loop_is_found_quickly(times):
    assert (fault_of(said("the dog of the house " * times)) == "repeated") == (times > 2)
