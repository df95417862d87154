"""Write captions of clips with an image-to-text model of transformers, for post-pretraining.

captioner.py asks a model; work.py makes a record of a clip; filters.py says which captions are no
use; journal.py keeps what is done; run.py and shards.py caption annotations and shards;
on_ray.py does so on a cluster.
"""

from clipvip.captions.captioner import Asking, Captioner
from clipvip.captions.run import Job, caption, caption_and_leave
from clipvip.captions.summary import Summary
from clipvip.captions.work import Record

__all__ = [
    "Asking",
    "Captioner",
    "Job",
    "Record",
    "Summary",
    "caption",
    "caption_and_leave",
]
