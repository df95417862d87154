"""Annotations, published data sets, and three folders: video (one file to frames), loading (clips
to batches) and shards (clips to tars, and tars to clips)."""

from typing import Literal, get_args

Decoder = Literal["auto", "dali", "pyav"]
"""Video decoder: NVIDIA DALI, PyAV, or "auto": DALI if it and a GPU are present, else PyAV."""
DECODERS: tuple[str, ...] = get_args(Decoder)
