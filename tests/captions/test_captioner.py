"""How captioners of several kinds are asked, and what is taken from their output."""

import json
import shutil
from contextlib import suppress
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from clipvip.captions.captioner import Asking, Captioner
from clipvip.captions.filters import fault_of, said

GENERATOR = np.random.default_rng(3)
# Of several shapes, as frames of several videos are.
PICTURES = [
    GENERATOR.integers(0, 255, (height, width, 3)).astype(np.uint8)
    for height, width in ((40, 60), (64, 32), (33, 47), (48, 48), (20, 90))
]
KINDS = ("blip", "blip2", "git", "llava", "vit_gpt2")


@pytest.fixture(scope="module")
def load(captioners):
    """load(kind, **options of Asking) → a captioner on the CPU, in fp32."""

    def load(kind, precision="no", **asking):
        options = {"length": 9, **asking}
        return Captioner(str(captioners[kind]), Asking(**options), "cpu", precision).start()

    return load


def texts(captioner, clips):
    inputs = captioner.prepare(clips)
    return [answer.text for answer in captioner.answer(inputs, [*map(len, clips)])]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beams", [1, 3])
def test_a_clips_caption_does_not_depend_on_the_others_of_its_batch(load, kind, beams):
    captioner = load(kind, beams=beams)
    together = texts(captioner, [[picture] for picture in PICTURES])
    assert together == [texts(captioner, [[picture]])[0] for picture in PICTURES]
    assert len({*together}) > 1  # it looks at the pictures


@pytest.mark.parametrize("kind", ["blip", "blip2", "git", "llava"])
def test_the_prompt_is_not_part_of_the_caption(load, kind):
    prompt = "a picture of the dog"
    captioner = load(kind, prompt=prompt)
    tokenizer = captioner.prepare.processor.tokenizer
    for picture in PICTURES:
        (ours,) = texts(captioner, [[picture]])
        inputs = captioner.prepare([[picture]])
        raw = captioner.model.generate(**inputs, max_new_tokens=9, do_sample=False)
        said = tokenizer.decode(raw[0], skip_special_tokens=True)
        if kind == "llava":
            prompt = f"user : {prompt} assistant :" if "user" not in prompt else prompt
        assert said == f"{prompt} {ours}".rstrip()


def test_git_continues_a_prompt_that_no_separator_ends(load):
    captioner = load("git", prompt="a picture of")
    tokenizer = captioner.prepare.processor.tokenizer
    ids = captioner.prepare([[PICTURES[0]]])["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids[0]) == ["[CLS]", "a", "picture", "of"]


def test_a_chat_model_is_asked_for_one_sentence_and_gets_one_start_token(load):
    captioner = load("llava")
    tokenizer = captioner.prepare.processor.tokenizer
    ids = captioner.prepare([[PICTURES[0]], [PICTURES[1]]])["input_ids"]
    text = tokenizer.decode(ids[0])
    assert text.count("<s>") == 1 and text.endswith("assistant :")
    assert "describe this image in one sentence ." in text


def test_a_template_that_writes_the_start_token_gets_no_second(make_captioner, tmp_path):
    template = "<s> {% for m in messages %}{% for p in m['content'] %}{% if p['type'] == 'image' %}"
    template += "<image> {% else %}{{ p['text'] }} {% endif %}{% endfor %}{% endfor %}assistant :"
    captioner = Captioner(str(make_captioner("llava", tmp_path, template=template)), Asking())
    ids = captioner.prepare([[PICTURES[0]]])["input_ids"]
    assert captioner.prepare.processor.tokenizer.decode(ids[0]).count("<s>") == 1


def test_a_thought_that_the_template_opens_and_nothing_closes_is_unfinished(
    make_captioner, tmp_path
):
    template = "{% for p in messages[0]['content'] %}{% if p['type'] == 'image' %}<image> "
    template += "{% else %}{{ p['text'] }} {% endif %}{% endfor %}assistant : "
    template += "{% if add_generation_prompt %}<think>\n{% endif %}"
    folder = str(make_captioner("llava", tmp_path, template=template))
    captioner = Captioner(folder, Asking(length=8), "cpu")
    (answer,) = captioner.answer(captioner.prepare([[PICTURES[0]]]), [1])
    assert fault_of(said(answer.text)) == "unfinished"
    assert said(f"{answer.text}</think> A dog.") == "A dog."


def test_prompts_are_padded_on_the_left(load):
    captioner = load("llava", frames=2)
    mask = captioner.prepare([[PICTURES[0], PICTURES[1]], [PICTURES[2]]])["attention_mask"]
    assert mask[0].all() and not mask[1, 0] and mask[1, -1]


def test_a_chat_model_reads_the_frames_of_a_clip_together(load):
    captioner = load("llava", frames=3)
    clips = [PICTURES[:3], PICTURES[2:], [PICTURES[1], PICTURES[0]], [PICTURES[4]]]
    together = texts(captioner, clips)
    assert together == [texts(captioner, [clip])[0] for clip in clips]
    assert texts(captioner, [clips[0][::-1]]) != together[:1]  # their order matters


def test_git_for_video_reads_the_frames_of_a_clip_together(make_captioner, tmp_path):
    folder = str(make_captioner("git", tmp_path, frames=4))
    captioner = Captioner(folder, Asking(length=9, frames=3), "cpu", "no").start()
    clips = [PICTURES[:3], [PICTURES[1], PICTURES[0]]]
    assert captioner.prepare(clips)["pixel_values"].shape == (2, 3, 3, 32, 32)
    assert texts(captioner, clips) == [texts(captioner, [clip])[0] for clip in clips]
    more = Captioner(folder, Asking(length=9, frames=5), "cpu", "no")
    assert more.prepare.at_once == 1  # more frames than it has embeddings for


@pytest.mark.parametrize("kind", ["blip", "blip2", "git", "vit_gpt2"])
@pytest.mark.parametrize("beams", [1, 2])
def test_of_the_frames_captions_the_likeliest_is_taken(load, kind, beams):
    one, many = load(kind, beams=beams), load(kind, beams=beams, frames=len(PICTURES))
    alone = texts(one, [[picture] for picture in PICTURES])
    (best,) = texts(many, [PICTURES])
    assert best in alone
    assert texts(many, [PICTURES[::-1]]) == [best]
    pairs = [texts(many, [[PICTURES[0], picture]])[0] for picture in PICTURES]
    ahead = [pair != alone[0] for pair in pairs]
    assert any(ahead) or best == alone[0]
    assert texts(many, [PICTURES[:2], PICTURES[:1], PICTURES]) == [
        texts(many, [PICTURES[:2]])[0],
        alone[0],
        best,
    ]


def test_the_likeliest_caption_has_the_highest_mean_log_probability(load):
    captioner = load("git", frames=2)
    best, rows = [], []
    for picture in PICTURES:
        inputs = captioner.prepare([[picture]])
        found = captioner.model.generate(
            **inputs, max_new_tokens=9, do_sample=False,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        scores = captioner.model.compute_transition_scores(
            found.sequences, found.scores, normalize_logits=True
        )
        rows.append(scores.mean().item())
        best.append(captioner.answer(inputs, [1])[0].text)
    expected = best[int(np.argmax(rows))]
    assert texts(captioner, [PICTURES]) == [expected]


def test_a_caption_that_the_model_did_not_end_is_cut(load):
    captioner = load("blip", length=40)
    inputs = captioner.prepare([[picture] for picture in PICTURES])
    long = captioner.answer(inputs, [1] * len(PICTURES))
    tokens = [len(answer.text.split()) for answer in long]
    assert any(not answer.cut for answer in long)
    short = load("blip", length=2)
    for answer, cut, count in zip(long, short.answer(inputs, [1] * 5), tokens, strict=True):
        assert cut.cut == (answer.cut or count >= 2)


def test_bf16_converts_the_weights(load):
    captioner = load("blip", precision="bf16")
    assert captioner.model.dtype == torch.bfloat16
    assert len(texts(captioner, [[picture] for picture in PICTURES])) == len(PICTURES)


def test_the_fingerprint_is_of_weights_and_settings_not_of_the_folder(captioners, tmp_path):
    def fingerprint(folder, **asking):
        return Captioner(str(folder), Asking(**asking), "cpu", "no").fingerprint()

    folder = captioners["git"]
    copy = shutil.copytree(folder, tmp_path / "copy")
    first = fingerprint(folder)
    assert fingerprint(copy) == first
    config = json.loads((copy / "processor_config.json").read_text())
    config["image_processor"]["image_mean"] = [0.1, 0.2, 0.3]
    (copy / "processor_config.json").write_text(json.dumps(config))
    assert fingerprint(copy) != first


# --- what is refused ------------------------------------------------------------------------


def refused(folder, **asking) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        Captioner(str(folder), Asking(**asking), "cpu", "no")
    return " ".join(str(caught.value).split())


def changed(folder, destination, name, **changes):
    copy = shutil.copytree(folder, destination)
    content = json.loads((copy / name).read_text()) if (copy / name).exists() else {}
    (copy / name).write_text(json.dumps({**content, **changes}))
    return copy


def test_models_of_another_kind_are_refused(captioners, tmp_path):
    from transformers import CLIPConfig

    CLIPConfig().save_pretrained(tmp_path)
    assert "of the type 'clip'" in refused(tmp_path)
    assert "does not exist" in refused(tmp_path / "none")


def test_code_of_a_models_author_is_not_run(captioners, tmp_path):
    copy = changed(
        captioners["blip"], tmp_path / "a", "config.json",
        model_type="theirs", auto_map={"AutoConfig": "theirs.Config"},
    )  # fmt: skip
    (copy / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert refused(copy)
    copy = changed(
        captioners["blip"], tmp_path / "b", "processor_config.json",
        auto_map={"AutoProcessor": "theirs.Processor"}, processor_class="Theirs",
    )  # fmt: skip
    shutil.copy(tmp_path / "a" / "theirs.py", copy)
    with suppress(ValueError):
        Captioner(str(copy), Asking(), "cpu", "no")
    assert not (tmp_path / "ran").exists()


def test_code_in_weights_is_not_run(captioners, tmp_path):
    class Planted:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    copy = shutil.copytree(captioners["blip"], tmp_path / "a")
    (copy / "model.safetensors").unlink()
    torch.save({"a": Planted()}, copy / "pytorch_model.bin")
    assert "holds more than weights" in refused(copy)
    assert not (tmp_path / "ran").exists()


def test_a_model_that_needs_torchvision_says_so(captioners, tmp_path):
    copy = changed(
        captioners["llava"], tmp_path / "a", "processor_config.json",
        processor_class="Qwen2VLProcessor",
        video_processor={"video_processor_type": "Qwen2VLVideoProcessor"},
    )  # fmt: skip
    if find_spec("torchvision") is None:
        assert "pip install torchvision" in refused(copy)


def test_a_model_that_cannot_generate_says_so_when_it_starts(load, monkeypatch):
    captioner = load("git")

    def fails(**inputs):
        raise RuntimeError("no image tokens")

    monkeypatch.setattr(captioner.model, "generate", fails)
    with pytest.raises(ValueError, match=r"grey picture \(RuntimeError: no image.*give --prompt"):
        captioner.start()


def test_weights_that_are_missing_are_an_error(captioners, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(captioners["blip"], tmp_path / "a")
    weights = load_file(copy / "model.safetensors")
    gone = next(name for name in weights if "crossattention" in name)
    save_file(
        {name: weight for name, weight in weights.items() if name != gone},
        copy / "model.safetensors",
        {"format": "pt"},
    )
    assert gone in refused(copy)


def test_what_cannot_be_asked_is_refused_before_the_run(captioners):
    assert "takes no prompt" in refused(captioners["vit_gpt2"], prompt="a dog")
    for name in ("length", "beams", "frames"):
        with pytest.raises(ValueError, match=f"{name} is 0"):
            Asking(**{name: 0})
    with pytest.raises(ValueError, match="prompt is empty"):
        Asking(prompt=" ")
