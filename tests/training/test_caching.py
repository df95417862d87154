"""Gradient caching: any parts give the gradients of the whole batch."""

from contextlib import nullcontext

import pytest
import torch

from clipvip.inputs import sent_ahead
from clipvip.training.build import build_model
from clipvip.training.step import forward_backward_in_parts, to_device
from clipvip.training.task import task_of
from clipvip.training.trainer import train

CLIPS = 7


def batch():
    """Videos of 1 to 4 frames, some without a caption, and two images that are no videos."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, most=256):
        return torch.randint(most, shape, generator=generator)

    lengths = draw(CLIPS, most=4) + 1
    lengths[[2, 5]] = 0
    texts = {}
    for name in ("subtitle", "caption"):
        texts[f"{name}_ids"] = draw(CLIPS, 9, most=500)
        texts[f"{name}_mask"] = torch.ones(CLIPS, 9, dtype=torch.int64)
        texts[f"{name}_present"] = draw(CLIPS, most=3) > 0
    return {
        "pixel_values": draw(int(lengths.sum()), 3, 32, 32).to(torch.uint8),
        "frame_offsets": torch.cat([torch.zeros(1), lengths.cumsum(0)]).to(torch.int32),
        "clip_index": torch.arange(CLIPS),
        "video_present": lengths > 0,
        "image": draw(CLIPS, 3, 32, 32).to(torch.uint8),
        **texts,
    }


def make_towers(make_config, *overrides):
    config = make_config("task=omnisource", *overrides)
    torch.manual_seed(0)
    model, processor = build_model(config, None)
    return task_of(config).towers(model, processor), config


def run(towers, config, micro_batch, device="cpu", bf16=False):
    """The loss and the gradient of each parameter. micro_batch: None for the batch at once."""
    task, whole = task_of(config), batch()

    def send(part):
        return to_device(part, towers.model, task)

    def embed(part):
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            return towers(part)

    def loss_of(features):
        return task.loss(features, whole)

    towers.zero_grad()
    torch.manual_seed(1)
    if micro_batch is None:
        loss = loss_of(embed(send(whole)))
        loss.backward()
    else:
        loss = forward_backward_in_parts(
            *(embed, loss_of, whole, micro_batch),
            send_parts=lambda parts: sent_ahead(parts, send, towers.model.device),
            backward=torch.Tensor.backward,
            without_sync=nullcontext,
        )
    return loss, {name: p.grad.clone() for name, p in towers.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("micro_batch", [1, 3, 6])
def test_gradients_are_those_of_the_whole_batch(make_config, micro_batch):
    towers, config = make_towers(make_config)
    towers.model.text_projection.requires_grad_(False)
    loss, gradients = run(towers, config, None)
    loss_of_parts, gradients_of_parts = run(towers, config, micro_batch)
    torch.testing.assert_close(loss_of_parts, loss)
    assert gradients["model.logit_scale"] != 0
    assert gradients.keys() == gradients_of_parts.keys()
    size = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    for name, gradient in gradients.items():
        assert (gradients_of_parts[name] - gradient).norm() <= 1e-6 * size, name


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_parts_in_bf16_are_as_near_the_exact_gradient_as_the_whole_batch(
    make_config, micro_batch, device
):
    _, exact = run(*make_towers(make_config), None)
    towers, config = make_towers(make_config, "backend=native")
    towers.to(device)

    def far(parts):
        _, found = run(towers, config, parts, device, bf16=True)
        return torch.stack([(found[name].cpu() - exact[name]).norm() for name in exact]).norm()

    whole = far(None)
    assert 0 < whole < 0.1 * torch.stack([gradient.norm() for gradient in exact.values()]).norm()
    assert far(micro_batch) <= 2 * whole


def test_both_passes_draw_the_same_random_numbers(make_config):
    text = "model.config.text_config"
    towers, config = make_towers(make_config, f"{text}.attention_dropout=0.5")
    seen = []
    towers.register_forward_hook(lambda module, given, out: seen.append(out["caption"].detach()))
    run(towers, config, 3)
    after = torch.rand(1)
    assert len(seen) == 6
    for first, second in zip(seen[:3], seen[3:], strict=True):
        assert first.equal(second)
    assert not towers(batch())["caption"][:3].equal(seen[0])  # there is something to draw
    run(towers, config, 3)
    assert torch.rand(1).equal(after)


@pytest.mark.parametrize("overrides", [["micro_batch=3"], ["micro_batch=2", "accumulation=2"]])
def test_a_run_in_parts_is_the_run(make_config, tmp_path, overrides):
    common = ["task=omnisource", "max_steps=4", "save_every=4", *overrides[1:]]
    whole = train(make_config(*common, f"out={tmp_path / 'whole'}"))
    parts = train(make_config(*common, *overrides[:1], f"out={tmp_path / 'parts'}"))
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-4)
