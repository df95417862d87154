"""Clips to batches: read in worker processes, replaced where they cannot be, packed and tokenised.

These names are for the rest of the package; all others are private to this folder.
"""

from clipvip.data.loading import workers
from clipvip.data.loading.bad_files import COUNTED_FROM, BadFile, BadFiles, Failure, LoaderError
from clipvip.data.loading.collate import Batch
from clipvip.data.loading.loader import ClipLoader, build_loader, counted, reading_of
from clipvip.data.loading.options import LoaderOptions
from clipvip.data.loading.samples import Reading, Sample
from clipvip.data.loading.workers import Workers, cores

__all__ = [
    "COUNTED_FROM",
    "BadFile",
    "BadFiles",
    "Batch",
    "ClipLoader",
    "Failure",
    "LoaderError",
    "LoaderOptions",
    "Reading",
    "Sample",
    "Workers",
    "build_loader",
    "cores",
    "counted",
    "reading_of",
    "workers",
]
