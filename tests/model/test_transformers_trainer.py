"""transformers' Trainer trains and evaluates our model on batches of our processor."""

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoProcessor, Trainer, TrainingArguments

from clipvip import CLIPViPModel, CLIPViPProcessor

COLOURS = {"red": (220, 20, 20), "green": (20, 220, 20), "blue": (20, 20, 220), "grey": (128,) * 3}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["packed", "regular"])
def parts(request, tokenizer):
    """Clips, and a collator: videos of 1 to 3 frames packed, or of 2 frames as [B, N, 3, H, W]."""
    packed = request.param == "packed"
    processor = CLIPViPProcessor(tokenizer, image_size=32)

    def clips(count):
        lengths = [1 + i % 3 if packed else 2 for i in range(count)]
        names = (list(COLOURS) * count)[:count]
        return [
            {"text": name, "video": np.full((length, 32, 32, 3), COLOURS[name], np.uint8)}
            for name, length in zip(names, lengths, strict=True)
        ]

    def collate(rows):
        batch = processor(*([row[key] for row in rows] for key in ("text", "video")))
        if not packed:
            offsets = batch.pop("frame_offsets")
            batch["pixel_values"] = batch["pixel_values"].unflatten(0, (len(offsets) - 1, -1))
        return {**batch, "return_loss": True}

    return clips, collate, processor


@pytest.fixture
def make_trainer(make_model, parts, tmp_path):
    clips, collate, processor = parts

    def make(folder, **options):
        args = TrainingArguments(
            str(tmp_path / folder),
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            remove_unused_columns=False,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            logging_steps=1,
            **{"max_steps": 10, "learning_rate": 1e-3, **options},
        )
        return Trainer(
            make_model(),
            args,
            data_collator=collate,
            train_dataset=clips(12),
            eval_dataset=clips(7),  # the last batch is smaller
            processing_class=processor,
        )

    return make


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_it_trains_evaluates_saves_and_loads(make_trainer, parts, tmp_path):
    trainer = make_trainer("run", eval_strategy="steps", eval_steps=5, save_steps=5)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    curve = losses(trainer)
    assert sum(curve[-3:]) < 0.5 * sum(curve[:3])
    assert trainer.evaluate()["eval_loss"] < 0.5 * before

    clips, collate, _ = parts
    _, _, videos, texts = trainer.predict(clips(7)).predictions
    model = trainer.model.eval()
    with torch.inference_mode():
        wanted = model(**collate(clips(7)))
    np.testing.assert_allclose(videos, wanted.video_embeds, atol=1e-5)
    np.testing.assert_allclose(texts, wanted.text_embeds, atol=1e-5)

    trainer.save_model(str(tmp_path / "saved"))
    for auto, own in ((AutoModel, CLIPViPModel), (AutoProcessor, CLIPViPProcessor)):
        assert type(auto.from_pretrained(tmp_path / "saved")) is own
    loaded = AutoModel.from_pretrained(tmp_path / "saved").state_dict()
    assert all(loaded[name].equal(weight) for name, weight in model.state_dict().items())

    resumed = make_trainer("run", eval_strategy="steps", eval_steps=5, save_steps=5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"))
    assert losses(resumed) == curve


def test_a_step_of_two_batches_takes_their_mean_and_checkpointing_changes_nothing(make_trainer):
    single = make_trainer("single", max_steps=2, learning_rate=0.0)
    both = {"max_steps": 1, "gradient_accumulation_steps": 2, "learning_rate": 0.0}
    plain = make_trainer("plain", **both)
    checkpointed = make_trainer("less-memory", **both, gradient_checkpointing=True)
    for trainer in (single, plain, checkpointed):
        trainer.train()
    assert losses(plain) == pytest.approx([sum(losses(single)) / 2], rel=1e-5)
    norms = [trainer.state.log_history[0]["grad_norm"] for trainer in (plain, checkpointed)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5) and norms[0] > 0


def test_data_parallel_may_not_split_packed_frames(make_model):
    replica = make_model()._replicate_for_data_parallel()
    frames, offsets = torch.zeros(2, 3, 32, 32), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="splits packed frames in the middle of videos"):
        replica.get_video_features(frames, offsets)
    replica.get_video_features(frames[:, None])
