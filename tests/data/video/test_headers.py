"""What headers say, against what decoding gives."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import pytest
from av.packet import Packet
from av.video.stream import VideoStream

from clipvip.data.video.headers import CHANGED, UNPAIRED, UNREADABLE, difference

QUICK = {"deadline": "realtime", "cpu-used": "8"}
X265 = {"x265-params": "log-level=error"}
CODINGS: dict[str, dict[str, Any]] = {
    "h264.ts": {"codec": "libx264", "options": {"bf": "2"}},
    "hevc.ts": {"codec": "libx265", "options": X265},
    "mpeg4.ts": {"codec": "mpeg4"},
    "vp8.mkv": {"codec": "libvpx", "options": QUICK},
    "vp9.mkv": {"codec": "libvpx-vp9", "options": QUICK},
    "mjpeg.mkv": {"codec": "mjpeg", "pixel_format": "yuvj420p"},
    "av1.mkv": {"codec": "libsvtav1", "options": {"preset": "10"}},
}
WIDE, SMALL = (176, 144), (160, 128)


@contextmanager
def opened(path: Path) -> Iterator[tuple[VideoStream, list[Packet]]]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        yield stream, [packet for packet in container.demux(stream) if packet.size]


@pytest.mark.parametrize("name", CODINGS)
def test_a_change_of_size_is_found_and_nothing_where_there_is_none(
    name: str, changing_video: Callable[..., Path]
) -> None:
    for sizes, expected in [
        ([WIDE], None),
        ([WIDE, WIDE], None),
        ([WIDE, SMALL], CHANGED),
        ([WIDE, SMALL, WIDE], CHANGED),
    ]:
        path = changing_video(name, sizes, **CODINGS[name])
        with opened(path) as (stream, packets):
            assert difference(stream, packets) == expected, sizes
        with av.open(str(path)) as container:
            found = {(frame.width, frame.height) for frame in container.decode(video=0)}
        assert found == set(sizes)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("b-frames.mp4", {"codec": "libx264", "options": {"bf": "3", "g": "10"}}),
        ("hevc.mp4", {"codec": "libx265", "options": X265}),
        ("mpeg4.mp4", {"codec": "mpeg4", "options": {"bf": "2"}}),
        ("av1.mp4", {"codec": "libsvtav1", "options": {"preset": "8", "g": "20"}}),
        ("444.mkv", {"codec": "libvpx-vp9", "pixel_format": "yuv444p", "options": QUICK}),
        (
            "hidden-within.webm",
            {
                "codec": "libvpx-vp9",
                "options": {"cpu-used": "4", "g": "20", "auto-alt-ref": "1", "lag-in-frames": "10"},
            },
        ),
    ],
)
def test_files_as_encoders_make_them_are_alike_throughout(name: str, options, make_video) -> None:
    with opened(make_video(name, size=WIDE, **options)) as (stream, packets):
        assert difference(stream, packets) is None


def bits(*fields: tuple[int, int]) -> bytes:
    """(value, how many bits) of each, and zeros up to a length that any header has."""
    text = "".join(f"{value:0{count}b}" for value, count in fields)
    return int(text.ljust(256, "0"), 2).to_bytes(32, "big")


def of_another_size_in(name: str) -> bytes:
    """A frame that is no keyframe and has a size of its own, as video calls have them."""
    if name == "vp9.mkv":  # marker, profile, new, inter, shown, resilient, refresh, 3 references
        start = [(2, 2), (0, 2), (0, 1), (1, 1), (1, 1), (1, 1), (0, 8), (0, 12)]
        return bits(*start, (0, 3), (SMALL[0] - 1, 16), (SMALL[1] - 1, 16))
    # A unit of kind 6, its length; new, of kind "switch", shown.
    return bytes([0x32, 32]) + bits((0, 1), (3, 2), (1, 1))


@pytest.mark.parametrize("name", ["vp9.mkv", "av1.mkv"])
def test_a_change_without_a_keyframe_is_found(name: str, changing_video) -> None:
    with opened(changing_video(name, [WIDE], **CODINGS[name])) as (stream, packets):
        frame = Packet(of_another_size_in(name))
        assert difference(stream, [*packets, frame, *packets]) == CHANGED


def test_packets_of_no_frame_to_show_are_found(changing_video) -> None:
    with opened(changing_video("vp8.mkv", [WIDE], **CODINGS["vp8.mkv"])) as (stream, packets):
        hidden = bytearray(bytes(packets[3]))
        hidden[0] &= ~0x10
        assert difference(stream, [*packets[:3], Packet(bytes(hidden))]) == UNPAIRED
    with opened(changing_video("h264.ts", [WIDE], **CODINGS["h264.ts"])) as (stream, packets):
        message = Packet(b"\0\0\0\1\x06\x05\x01\xff\x80")
        assert difference(stream, [*packets, message]) == UNPAIRED


def test_what_cannot_be_read_is_not_vouched_for(changing_video, make_video) -> None:
    with opened(changing_video("vp9.mkv", [WIDE], **CODINGS["vp9.mkv"])) as (stream, packets):
        assert difference(stream, [*packets, Packet(b"\x00" * 40)]) == UNREADABLE
    with opened(make_video("unknown.mpg", codec="mpeg2video")) as (stream, packets):
        assert difference(stream, packets) == UNREADABLE
