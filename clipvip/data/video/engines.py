"""Which engine DALI decodes on, if any: chosen by what is installed, believed after a trial."""

import ctypes
import functools
import io
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from importlib.util import find_spec

import av
import numpy as np
import torch
from av.packet import Packet
from av.video.frame import VideoFrame

from clipvip.data import DECODERS
from clipvip.data.video.container import PLAIN, Blob
from clipvip.data.video.dali import DaliDecoder, Engine, encode, reason_of
from clipvip.data.video.decode import open_clip

logger = logging.getLogger(__name__)

AV1_SINCE = (8, 6)  # compute capability
YUV420 = frozenset({"yuv420p", "yuvj420p"})
YUV = YUV420 | {"yuv422p", "yuvj422p", "yuv444p", "yuvj444p"}
CPU = Engine("cpu", frozenset({"vp8", "vp9", "mjpeg"}), YUV)
GPU = Engine("gpu", frozenset({"h264", "hevc", "vp8", "vp9", "av1", "mpeg4"}), YUV420)


class DaliError(ValueError):
    """DALI was asked for and is not available."""


def choose_engine(decoder: str) -> Engine | None:
    """Return the engine for `decoder`, one of DECODERS; None for PyAV.

    "auto" chooses DALI where there is a GPU with a video engine. Raises DaliError for "dali" where
    it is not installed, or cannot reach the GPU's video engine.
    """
    if decoder not in DECODERS:
        raise ValueError(f"decoder is {decoder!r}; expected one of {', '.join(DECODERS)}")
    if decoder == "pyav":
        return None
    installed = find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
    gpu = torch.cuda.is_available()
    if decoder == "auto" and not (installed and gpu and _has_nvdec()):
        return None
    if not installed:
        raise DaliError('decoder is "dali", which is not installed: pip install "clipvip[dali]"')
    if not gpu:
        return CPU
    if not _has_nvdec():
        raise DaliError(
            'decoder is "dali", but the driver\'s video library (libnvcuvid.so.1) is not found; '
            "a container needs NVIDIA_DRIVER_CAPABILITIES=compute,utility,video"
        )
    with_av1 = torch.cuda.get_device_capability() >= AV1_SINCE
    return GPU if with_av1 else GPU._replace(codecs=GPU.codecs - {"av1"})


def start_engine(decoder: str) -> Engine | None:
    """Return the engine that choose_engine chooses, with the codecs of which DALI has decoded a
    small clip on it as PyAV does; the log says which it has not. If there are none, "auto" falls
    back to PyAV (None) and logs why; "dali" raises DaliError."""
    engine = choose_engine(decoder)
    if engine is None:
        return None
    problems = _problems(engine)
    right = engine.codecs - problems.keys()
    if right:
        for codec, problem in problems.items():
            _warn_once(f"DALI cannot decode {codec} ({problem}): PyAV decodes it")
        return engine._replace(codecs=right)
    problem = next(iter(problems.values()))
    if decoder == "dali":
        raise DaliError(f'decoder is "dali", which cannot start ({problem}); use auto or pyav')
    _warn_once(f"DALI cannot start ({problem}): PyAV decodes all clips")
    return None


_warn_once = functools.cache(logger.warning)


SAMPLE_FRAMES, SAMPLE_STEP = 12, 16  # frames of a small clip, and by how much each is brighter
SAMPLE_ERROR = 4.0  # mean error, of 255, below which a frame is the one that PyAV gives
SAMPLE_SIZE = (176, 150)  # above video engines' least; coded as 176 × 160 by H.264
# Encoders, with frames that refer to later ones, as most files of these codecs have.
ENCODERS: dict[str, tuple[str, dict[str, str]]] = {
    "h264": ("libx264", {"bf": "3", "x264-params": "b-adapt=0:b-pyramid=normal"}),
    "hevc": ("libx265", {"x265-params": "log-level=error:bframes=3:b-adapt=0:b-pyramid=1"}),
    "vp8": ("libvpx", {"deadline": "realtime", "cpu-used": "8"}),
    "vp9": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
    "av1": ("libsvtav1", {"preset": "12"}),
    "mpeg4": ("mpeg4", {"bf": "2"}),
    "mjpeg": ("mjpeg", {}),
}


@functools.cache
def _problems(engine: Engine) -> dict[str, str]:
    """Decode a small clip of each codec by DALI and by PyAV. Return the codecs whose frames differ,
    each with the reason: DALI can mistake frames for others without an error."""
    size, problems = 64, {}
    encoded, expected = [], {}
    for codec in sorted(engine.codecs):
        try:
            with open_clip(Blob(f"{codec}.mkv", _sample(codec)), SAMPLE_FRAMES) as clip:
                copy, right = encode(clip, engine), clip.decode(size).frames
        except Exception as error:  # such as PyAV built without the encoder
            problems[codec] = f"no test clip could be made: {error!r}"
            continue
        encoded.append(copy)
        expected[codec] = right
    try:
        decoded = DaliDecoder(size, engine).decode(encoded)
    except Exception as error:  # raised by DALI, its libraries or the driver
        return dict.fromkeys(sorted(engine.codecs), reason_of(error))
    for (codec, right), given in zip(expected.items(), decoded, strict=True):
        if isinstance(given, str):
            problems[codec] = given
            continue
        far = (given.frames.cpu().float() - right.float()).abs().mean((1, 2, 3)) > SAMPLE_ERROR
        if far.any():
            problems[codec] = f"{int(far.sum())} of {len(far)} frames of a test clip are wrong"
    return problems


def _sample(codec: str) -> bytes:
    """Make a video file of SAMPLE_FRAMES frames that differ. Raises errors of PyAV.

    It is encoded in a thread of its own: as root, the encoder of AV1 gives its caller's thread
    real-time priority, and whatever that thread does later would keep all else from running.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_encoded_sample, codec).result()


def _encoded_sample(codec: str) -> bytes:
    os.environ.setdefault("SVT_LOG", "1")  # or the encoder of AV1 prints its settings
    (width, height), (name, options) = SAMPLE_SIZE, ENCODERS[codec]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska", options=PLAIN) as out:
        stream = out.add_stream(name, rate=25, options=options)
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        packets = []
        for number in range(SAMPLE_FRAMES):
            planes = np.empty((height * 3 // 2, width), np.uint8)
            planes[:] = np.linspace(90, 160, len(planes))[:, None]
            planes[:height] = SAMPLE_STEP * (number + 1) + np.arange(width) % 24
            frame = VideoFrame.from_ndarray(planes, format=stream.pix_fmt)
            frame.pts, frame.time_base = number, Fraction(1, 25)
            packets += stream.encode(frame)
        packets += stream.encode()
        if codec == "vp9":
            packets = _with_hidden_frame(packets)
        out.mux(packets)
    return buffer.getvalue()


def _with_hidden_frame(packets: list[Packet]) -> list[Packet]:
    """Hide the first frame of a VP9 stream, which others refer to, and let the second be shown
    twice, as encoders do: the VP9 bitstream specification, 7.2 and Annex B."""
    key, following = bytes(packets[0]), bytes(packets[1])
    sizes = b"".join(len(part).to_bytes(2, "little") for part in (key, following))
    hidden = bytes([key[0] & ~2]) + key[1:]  # the bit says that it is shown
    index = b"\xc9" + sizes + b"\xc9"  # two frames, sizes of two bytes
    data = [hidden + following + index, b"\x88", *map(bytes, packets[2:])]
    made = []
    for packet, content in zip(packets, data, strict=True):
        new = Packet(content)
        new.pts, new.dts, new.time_base = packet.pts, packet.dts, packet.time_base
        new.stream, new.is_keyframe = packet.stream, packet.is_keyframe
        made.append(new)
    return made


def _has_nvdec() -> bool:
    """Return whether the driver's video library is there; containers may lack it."""
    try:
        ctypes.CDLL("libnvcuvid.so.1")
    except OSError:
        return False
    return True
