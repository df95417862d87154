"""Turn clips into batches: read in worker processes, replaced if unreadable, packed, tokenised.

The names below are for the rest of the package; all others are private to this folder.
loader.py gives the steps and where they are.
"""

from clipvip.data.loading.bad_files import COUNTED_FROM, BadFile, BadFiles, Failure, LoaderError
from clipvip.data.loading.in_actor import RayJob
from clipvip.data.loading.in_worker import check_not_excluded, limit_memory, set_place
from clipvip.data.loading.loader import ClipLoader, build_loader, counted
from clipvip.data.loading.on_ray import RayWorkers, check_seen, start_workers
from clipvip.data.loading.order import ClipSource, ClipSources, apportioned, shares_of
from clipvip.data.loading.ray_cluster import On, is_ray, joined_cluster
from clipvip.data.loading.reader import ClipReader, for_each_clip, names_of, some_files
from clipvip.data.loading.roles import COMPARED, texts_compared
from clipvip.data.loading.samples import Batch, LoaderOptions, Sample
from clipvip.data.loading.windows import (
    Division,
    Facts,
    MomentBatch,
    PartReader,
    divide_files,
    moment_batches,
)
from clipvip.data.loading.workers import Workers, worker_count

__all__ = [
    "COMPARED",
    "COUNTED_FROM",
    "BadFile",
    "BadFiles",
    "Batch",
    "ClipLoader",
    "ClipReader",
    "ClipSource",
    "ClipSources",
    "Division",
    "Facts",
    "Failure",
    "LoaderError",
    "LoaderOptions",
    "MomentBatch",
    "On",
    "PartReader",
    "RayJob",
    "RayWorkers",
    "Sample",
    "Workers",
    "apportioned",
    "build_loader",
    "check_not_excluded",
    "check_seen",
    "counted",
    "divide_files",
    "for_each_clip",
    "is_ray",
    "joined_cluster",
    "limit_memory",
    "moment_batches",
    "names_of",
    "set_place",
    "shares_of",
    "some_files",
    "start_workers",
    "texts_compared",
    "worker_count",
]
