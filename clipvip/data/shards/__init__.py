"""Write clips into WebDataset tars, verify and copy them, and make training batches from tars.

The names below are for the rest of the package; all others are private to this folder.
"""

from clipvip.data.shards.copy import ShardCopies
from clipvip.data.shards.manifest import Shard, ShardError, is_shards, load_manifest
from clipvip.data.shards.plan import Shards, Source
from clipvip.data.shards.stream import build_shard_loader
from clipvip.data.shards.tars import Stored
from clipvip.data.shards.verify import verify_files, verify_shards
from clipvip.data.shards.write import write_shards

__all__ = [
    "Shard",
    "ShardCopies",
    "ShardError",
    "Shards",
    "Source",
    "Stored",
    "build_shard_loader",
    "is_shards",
    "load_manifest",
    "verify_files",
    "verify_shards",
    "write_shards",
]
