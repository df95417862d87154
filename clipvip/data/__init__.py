"""Annotations and data sets; and three folders: video (one file to frames), loading (clips to
batches), shards (clips to tars, tars to batches)."""

from typing import Literal, get_args

Decoder = Literal["auto", "dali", "pyav"]
"""What decodes videos: NVIDIA DALI, PyAV, or "auto": DALI if it and a GPU are there, else PyAV."""
DECODERS: tuple[str, ...] = get_args(Decoder)
