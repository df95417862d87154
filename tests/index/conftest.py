"""Small models to embed and search with."""

import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
MERGES = [("d", "o"), ("do", "g</w>"), ("c", "a"), ("ca", "t</w>"), ("1", "2</w>")]


@pytest.fixture(scope="session")
def save_model():
    """A function that saves a small model, and returns what `load_for_embedding` loads from it."""
    from transformers import CLIPTokenizer

    from clipvip.embedding import load_for_embedding
    from clipvip.model import CLIPViPConfig, CLIPViPModel, CLIPViPProcessor

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{x}</w>" for x in letters), *map("".join, MERGES)]
    words += ["<|startoftext|>", "<|endoftext|>"]

    def save(folder, seed=0, dtype=torch.float32, shard="1GB", **text):
        tokenizer = CLIPTokenizer(vocab={x: i for i, x in enumerate(words)}, merges=MERGES)
        torch.manual_seed(seed)
        config = CLIPViPConfig(
            text_config={
                **TOWER,
                "vocab_size": len(words),
                "max_position_embeddings": 20,
                "bos_token_id": len(words) - 2,
                "eos_token_id": len(words) - 1,
                **text,
            },
            vision_config={**TOWER, "image_size": 32, "patch_size": 16},
            projection_dim=16,
            num_frames=2,
            attention_backend="reference",
        )
        model = CLIPViPModel(config)
        for name, weight in model.text_model.named_parameters():
            if name.endswith("proj.weight") or "mlp" in name or "embedding" in name:
                torch.nn.init.normal_(weight, std=0.3)  # as after training, every token matters
        model.to(dtype).save_pretrained(folder, max_shard_size=shard)
        CLIPViPProcessor(tokenizer, image_size=32, num_frames=2).save_pretrained(folder)
        return load_for_embedding(folder)

    return save
