"""Post-pretraining, fine-tuning and evaluation; `python -m clipvip.training CONFIG key=value …`."""
