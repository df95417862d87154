"""Tiny captioners of several kinds with random weights, and a few short videos."""

import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    OPTConfig,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
)

WORDS = [
    *("a", "the", "dog", "cat", "ball", "child", "red", "green", "runs", "jumps", "on", "grass"),
    *("water", "with", "and", "to", "left", "right", "describe", "this", "image", "in", "one"),
    *("sentence", "these", "are", "frames", "of", "video", "it", "picture", "user", "assistant"),
    *(".", ":"),
]
SIZE, PATCH = 32, 16
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
VISION = {**TOWER, "image_size": SIZE, "patch_size": PATCH}
CHAT = (
    "{% for message in messages %}{{ message['role'] }} : {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)


def words(*special: str) -> tuple[Tokenizer, list[str]]:
    """A tokenizer of whole words, and its tokens."""
    tokens = [*special, *WORDS]
    inner = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, special[0]))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return inner, tokens


def bert() -> BertTokenizer:
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    return BertTokenizer(vocab={token: i for i, token in enumerate([*special, *WORDS])})


def blip(folder: Path) -> Path:
    tokenizer = bert()
    text = {**TOWER, "vocab_size": len(tokenizer), "encoder_hidden_size": 32, "pad_token_id": 0}
    text |= {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "projection_dim": 16}
    config = BlipConfig(
        text_config=text,
        vision_config={**VISION, "projection_dim": 16},
        projection_dim=16,
        image_text_hidden_size=16,
    )
    _save(folder, BlipForConditionalGeneration(config))
    images = BlipImageProcessor(size={"height": SIZE, "width": SIZE})
    BlipProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def blip2(folder: Path) -> Path:
    """With OPT, whose first token is also its last, as in the published models."""
    inner, tokens = words("<unk>", "<pad>", "</s>")
    inner.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="</s>",
        eos_token="</s>",
    )
    images = BlipImageProcessor(size={"height": SIZE, "width": SIZE})
    processor = Blip2Processor(images, tokenizer, num_query_tokens=4)  # adds <image>
    text = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=32, ffn_dim=32, num_hidden_layers=1,
        num_attention_heads=2, word_embed_proj_dim=32, bos_token_id=2, eos_token_id=2,
        pad_token_id=1,
    )  # fmt: skip
    config = Blip2Config(
        vision_config=VISION,
        qformer_config={**TOWER, "encoder_hidden_size": 32, "vocab_size": len(tokenizer)},
        text_config={**text.to_dict(), "model_type": "opt"},
        num_query_tokens=4,
        image_token_index=len(tokens),
    )
    _save(folder, Blip2ForConditionalGeneration(config))
    processor.save_pretrained(folder)
    return folder


def git(folder: Path, frames: int | None = None) -> Path:
    tokenizer = bert()
    ends = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    config = GitConfig(
        vision_config=VISION,
        vocab_size=len(tokenizer),
        num_image_with_embedding=frames,
        **TOWER,
        **ends,
    )
    _save(folder, GitForCausalLM(config))
    images = CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    )
    GitProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def llava(folder: Path, template: str | None = CHAT) -> Path:
    inner, tokens = words("<unk>", "<s>", "</s>", "<pad>", "<image>")
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(
            vocab_size=len(tokens),
            num_key_value_heads=2,
            max_position_embeddings=256,
            **TOWER,
            **ends,
        ),
        image_token_index=4,
        vision_feature_layer=-1,
        image_seq_length=4,
    )
    model = LlavaForConditionalGeneration(config)
    _save(folder, model)
    images = CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    )
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    processor.save_pretrained(folder)
    return folder


def vit_gpt2(folder: Path) -> Path:
    inner, tokens = words("<|endoftext|>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    )
    decoder = GPT2Config(
        vocab_size=len(tokens), n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0,
        add_cross_attention=True, is_decoder=True,
    )  # fmt: skip
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**VISION), decoder)
    config.decoder_start_token_id = config.pad_token_id = config.eos_token_id = 0
    model = VisionEncoderDecoderModel(config)
    model.generation_config.decoder_start_token_id = 0
    model.generation_config.pad_token_id = model.generation_config.eos_token_id = 0
    _save(folder, model)
    ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _save(folder: Path, model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.dim() > 1 or name.endswith("class_embedding"):  # others start from ones and zeros
            weight.data.normal_(0, 0.4, generator=generator)  # answers depend on the picture
    model.save_pretrained(folder)


COLOURS = [
    (220, 30, 30),
    (30, 200, 30),
    (30, 30, 220),
    (200, 200, 20),
    (20, 200, 200),
    (90, 90, 90),
]


KINDS = {"blip": blip, "blip2": blip2, "git": git, "llava": llava, "vit_gpt2": vit_gpt2}


@pytest.fixture(autouse=True)
def one_thread():
    """Threads cost such small models more than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def captioners(tmp_path_factory) -> dict[str, Path]:
    """Kind of captioner → folder."""
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in KINDS.items()}


@pytest.fixture(scope="session")
def make_captioner():
    """make_captioner(kind, folder, **options) → folder, for captioners that differ from those."""
    return lambda kind, folder, **options: KINDS[kind](folder, **options)


def write_video(path: Path, colours, size=(48, 32)) -> Path:
    """A video of one frame per colour, with noise that tells frames apart."""
    noise = np.random.default_rng(len(colours)).integers(0, 60, (size[1], size[0], 3))
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number, colour in enumerate(colours):
            pixels = np.clip(np.roll(noise, number * 5, 1) + colour, 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="session")
def annotations(tmp_path_factory) -> Path:
    """Annotations of eleven clips: videos, spans, an image, one with a caption, one missing."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("clips")
    records = []
    for number, colour in enumerate(COLOURS):
        write_video(folder / f"{number}.mp4", [colour, COLOURS[number - 1], colour, colour[::-1]])
        records.append({"video": f"{number}.mp4", "text": f"text {number}"})
    Image.fromarray(np.full((30, 50, 3), (250, 120, 10), np.uint8)).save(folder / "other.png")
    records += [
        {"video": "0.mp4", "start": 0.1, "end": 0.3, "subtitle": "so now"},
        {"video": "1.mp4", "caption": "an old caption", "text": ["one", "two"]},
        {"video": "missing.mp4", "text": "nobody sees it"},
        {"video": "other.png"},
        {"video": "2.mp4", "image": "other.png", "subtitle": "this is it"},
    ]
    path = folder / "clips.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
