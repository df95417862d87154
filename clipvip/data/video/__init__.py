"""From one video or image file to frames as pixels.

    file ─ container ─ known_index ─ sampling ─ strategies ─ pixels ─ frames
           opens it    its frames'   which      decode       to RGB
                       times         frames     them         squares

decode.py goes this way by PyAV; dali.py divides it between workers, which choose frames and copy
their packets, and DALI, which decodes them; engines.py says what is left to DALI; transcode.py
stores clips in shards; pictures.py gives whole frames to other people's models; preview.py shows
moments to people. The names below are for the rest of the package; all others are private to this
folder.
"""

from clipvip.data.video.container import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    Blob,
    DecodeError,
    Media,
    as_decode_errors,
    is_image,
)
from clipvip.data.video.dali import (
    DaliDecoder,
    Encoded,
    Engine,
    Refused,
    encode,
)
from clipvip.data.video.decode import (
    Frames,
    OpenClip,
    OpenVideo,
    Span,
    check_decodes,
    decode_small,
    open_clip,
    open_whole,
    read_frames,
)
from clipvip.data.video.engines import start_engine
from clipvip.data.video.pictures import Pictures, read_pictures
from clipvip.data.video.pixels import rgb_of
from clipvip.data.video.preview import film_of, picture_of, plain_copy
from clipvip.data.video.sampling import check_sampling
from clipvip.data.video.transcode import CODING, Cut, cut, reencode, whole

__all__ = [
    "CODING",
    "IMAGE_SUFFIXES",
    "VIDEO_SUFFIXES",
    "Blob",
    "Cut",
    "DaliDecoder",
    "DecodeError",
    "Encoded",
    "Engine",
    "Frames",
    "Media",
    "OpenClip",
    "OpenVideo",
    "Pictures",
    "Refused",
    "Span",
    "as_decode_errors",
    "check_decodes",
    "check_sampling",
    "cut",
    "decode_small",
    "encode",
    "film_of",
    "is_image",
    "open_clip",
    "open_whole",
    "picture_of",
    "plain_copy",
    "read_frames",
    "read_pictures",
    "reencode",
    "rgb_of",
    "start_engine",
    "whole",
]
