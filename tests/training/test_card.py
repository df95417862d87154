"""The model card of a run's checkpoints."""

from pathlib import Path

from huggingface_hub import ModelCard

from clipvip.training.trainer import train


def test_a_checkpoints_card_tells_its_run_and_may_be_edited(make_config, world):
    config = make_config(f"data.validation={world / 'annotations.jsonl'}", "max_steps=2")
    best = train(config)["best_metric"]
    path = Path(config.out) / "best" / "README.md"
    card = ModelCard.load(path)
    (result,) = (r for r in card.data.eval_results if r.metric_name == "text to video R@1")
    assert result.metric_value == round(best, 2) and result.dataset_name == "annotations.jsonl"
    assert card.data.license is None and card.data.library_name == "clipvip"
    assert "| optimizer.lr | 0.001 |" in card.text and "16 of annotations.jsonl" in card.text
    assert str(world) not in card.content and str(config.out) not in card.content
    path.write_text(card.content.replace("library_name", "license: mit\nlibrary_name"))
    train(make_config("max_steps=3", "resume=latest"))
    assert "license: mit" in path.read_text()
