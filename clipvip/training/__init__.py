"""Post-pretraining, fine-tuning and evaluation; `python -m clipvip.training CONFIG key=value …`.

To read it, start at trainer.py, which sets up a run and loops over step.py's train_step. task.py
has the objectives, state.py the parts and counters of a run and how a checkpoint keeps them,
config.py the settings. The other modules hold one topic each.
"""
