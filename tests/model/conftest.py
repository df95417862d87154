import sys
from unittest import mock

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.utils import is_torchvision_available

from clipvip.model import CLIPViPConfig, CLIPViPModel

LETTERS = "abcdefghijklmnopqrstuvwxyz&;'"
VOCABULARY = [*LETTERS, *(f"{x}</w>" for x in LETTERS), "<|startoftext|>", "<|endoftext|>"]
SPECIAL = {
    "bos_token_id": len(VOCABULARY) - 2,
    "eos_token_id": len(VOCABULARY) - 1,
    "pad_token_id": len(VOCABULARY) - 1,
}


@pytest.fixture(scope="session")
def tower_configs():
    """Two layers, two heads of 64, 16 patches of 8 × 8 pixels."""
    shape = {
        "hidden_size": 128,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 24,
    }
    return {
        "text_config": {
            **shape,
            **SPECIAL,
            "vocab_size": len(VOCABULARY),
            "max_position_embeddings": 16,
        },
        "vision_config": {**shape, "image_size": 32, "patch_size": 8},
        "projection_dim": 24,
    }


@pytest.fixture(params=["native", "reference"])
def backend(request):
    return request.param


@pytest.fixture
def make_model(tower_configs):
    """Build a model in eval mode whose features depend on every token, as after training."""

    def build(**options):
        torch.manual_seed(0)
        model = CLIPViPModel(CLIPViPConfig(**tower_configs, **options)).eval()
        torch.nn.init.normal_(model.vision_model.embeddings.temporal_embedding)
        for name, weight in model.vision_model.named_parameters():
            if name.endswith("proj.weight") or name.endswith("patch_embedding.weight"):
                torch.nn.init.normal_(weight, std=0.1)
        return model

    return build


@pytest.fixture(scope="session")
def clip_folder(tower_configs, tmp_path_factory):
    """A plain CLIP checkpoint with random weights."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(CLIPConfig(**tower_configs)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    vocab = {token: i for i, token in enumerate(VOCABULARY)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16)


@pytest.fixture
def texts():
    """Token ids and mask of three texts, padded with the end-of-text token."""
    first, end = SPECIAL["bos_token_id"], SPECIAL["eos_token_id"]
    ids = torch.tensor(
        [[first, 3, 4, 5, end], [first, 7, end, end, end], [first, end, end, end, end]]
    )
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="session")
def open_clip():
    """The package open_clip, whose models need no torchvision, although importing it does."""
    absent = ["", ".ops", ".ops.misc", ".transforms", ".transforms.functional"]
    if is_torchvision_available():  # asks once, before the stand-ins are there
        absent = []
    stand_ins = {f"torchvision{name}": mock.MagicMock() for name in absent}
    sys.modules.update(stand_ins)
    try:
        return pytest.importorskip("open_clip")
    finally:
        for name in stand_ins:
            del sys.modules[name]
