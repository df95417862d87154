"""Headers of coded frames: where a decoder may begin, and whether one set-up serves all frames.

DALI sets up its decoder by the first frame. If a later frame has another size or format, pictures
come out black or garbled without an error. If a packet holds no picture to show, or more than one,
all later pictures are mistaken for others. Both are detected here from headers alone, by RFC 6386
(VP8), the VP9 and AV1 bitstream specifications, ISO/IEC 14496-2 (MPEG-4), 14496-15 (H.264 and HEVC
in files) and 10918-1 (JPEG).
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from av.packet import Packet
from av.video.stream import VideoStream

from clipvip.data.video.container import NAL, holds_picture, nal_units
from clipvip.data.video.frame_index import SMALL

CLOSED = frozenset({"vp8", "vp9", "av1", "mjpeg"})  # no frame refers to one before a keyframe
# Types of NAL units that are IDR pictures, and of the parameter sets that state the size.
IDR = {"h264": (5,), "hevc": (19, 20)}
SEQUENCES = {"h264": 7, "hevc": 33}
# Header of a video object layer of MPEG-4.
LAYER = re.compile(rb"\x00\x00\x01[\x20-\x2f].*?(?=\x00\x00\x01|\Z)", re.DOTALL)

CHANGED = "its frames change size or format"
UNPAIRED = "packets hold no frame to show, or several"
UNREADABLE = "headers of its frames cannot be read"


def is_reset(packet: Packet, stream: VideoStream) -> bool:
    """Return whether decoding can start at a packet: no packet from there on, in decoding order,
    refers to an earlier one.

    For the codecs in CLOSED these are keyframes. For H.264 and HEVC they are IDR pictures, since in
    open groups of pictures some refer to the group before. For other codecs they are unknown.
    """
    codec = stream.codec_context.codec.canonical_name
    if not packet.is_keyframe or codec not in IDR:
        return packet.is_keyframe and codec in CLOSED
    return any(kind in IDR[codec] for kind, _ in nal_units(packet, stream))


def difference(stream: VideoStream, packets: Sequence[Packet]) -> str | None:
    """Return how packets, in decoding order, differ from one frame to show per packet, all of one
    size and format; None where they do not."""
    codec = stream.codec_context.codec.canonical_name
    head = stream.codec_context.extradata or b""
    keyframes = [packet for packet in packets if packet.is_keyframe]
    try:
        if codec in NAL:
            if not all(packet.size > SMALL or holds_picture(packet, stream) for packet in packets):
                return UNPAIRED
            units = (unit for packet in keyframes for unit in nal_units(packet, stream))
            sets = {bytes(unit).rstrip(b"\0") for kind, unit in units if kind == SEQUENCES[codec]}
            return _of_sets(head, sets, packets)
        if codec == "mpeg4":
            sets = {layer for packet in keyframes for layer in LAYER.findall(bytes(packet))}
            return _of_sets(head, sets, packets)
        reader = _Av1(head) if codec == "av1" else {"vp8": _vp8, "vp9": _vp9, "mjpeg": _jpeg}[codec]
        return _of_frames(reader, packets)
    except (ValueError, LookupError):
        return UNREADABLE


def _of_sets(head: bytes, sets: set[bytes], packets: Sequence[Packet]) -> str | None:
    """Return CHANGED unless all parameter sets are the same: in the packets (`sets`), in the
    codec's extradata (`head`) if any, and in extradata that an MP4 file has for later packets."""
    alike = len(sets) <= 1 and (not head or all(parameters in head for parameters in sets))
    return None if alike and not any(map(has_new_head, packets)) else CHANGED


def has_new_head(packet: Packet) -> bool:
    """Return whether an MP4 file has other extradata from this packet on."""
    return hasattr(packet, "has_sidedata") and packet.has_sidedata("new_extradata")  # PyAV 16


class _Frame(NamedTuple):
    """Facts from a frame's header. form: its size and format, in any encoding that can be compared;
    None where the frame takes over an earlier frame's."""

    shown: bool
    form: object


def _of_frames(read: Callable[[bytes], list[_Frame]], packets: Sequence[Packet]) -> str | None:
    forms: set[object] = set()
    for packet in packets:
        frames = read(bytes(packet))
        if sum(frame.shown for frame in frames) != 1:
            return UNPAIRED
        forms.update(frame.form for frame in frames)
    return None if len(forms - {None}) == 1 else CHANGED


class _Bits:
    """Reader of a header's bits, from the first on."""

    def __init__(self, data: bytes) -> None:
        self.value = int.from_bytes(data, "big")
        self.left = 8 * len(data)

    def take(self, count: int) -> int:
        self.left -= count
        if self.left < 0:
            raise ValueError("a header that is cut off")
        return self.value >> self.left & (1 << count) - 1


# --- JPEG, VP8, VP9 -------------------------------------------------------------------------


def _jpeg(data: bytes) -> list[_Frame]:
    """Take the segment that states the size and how components are sampled."""
    at = 2
    while not (0xC0 <= data[at + 1] <= 0xCF and data[at + 1] not in (0xC4, 0xC8, 0xCC)):
        if data[at] != 0xFF or data[at + 1] == 0xDA:
            raise ValueError("no frame before the scan")
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return [_Frame(True, data[at : at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")])]


def _vp8(data: bytes) -> list[_Frame]:
    inter, shown = data[0] & 1, bool(data[0] >> 4 & 1)
    return [_Frame(shown, None if inter else data[6:10])]


def _vp9(data: bytes) -> list[_Frame]:
    return [_vp9_frame(_Bits(part[:32])) for part in _vp9_parts(data)]


def _vp9_parts(data: bytes) -> Iterator[bytes]:
    """Yield the frames of a superframe, whose sizes are stored at its end."""
    marker = data[-1]
    count, width = (marker & 7) + 1, (marker >> 3 & 3) + 1
    index = data[-(2 + width * count) :]
    if marker >> 5 != 0b110 or index[0] != marker:
        yield data
        return
    at = 0
    for place in range(1, 1 + width * count, width):
        size = int.from_bytes(index[place : place + width], "little")
        if size:
            yield data[at : at + size]
        at += size


def _vp9_frame(bits: _Bits) -> _Frame:
    if bits.take(2) != 2:
        raise ValueError("no VP9 frame")
    profile = bits.take(1) | bits.take(1) << 1
    bits.take(profile == 3)
    if bits.take(1):  # a frame that was decoded before
        return _Frame(True, None)
    inter, shown, resilient = bits.take(1), bool(bits.take(1)), bits.take(1)
    if not inter:
        bits.take(24)
        return _Frame(shown, (_vp9_colours(bits, profile), bits.take(32)))
    intra = not shown and bits.take(1)
    bits.take(0 if resilient else 2)
    if intra:
        bits.take(24)
        colours = _vp9_colours(bits, profile) if profile else None
        bits.take(8)
        return _Frame(shown, (colours, bits.take(32)))
    bits.take(8 + 3 * 4)
    if any(bits.take(1) for _ in range(3)):  # the size is that of a frame that it refers to
        return _Frame(shown, None)
    return _Frame(shown, (None, bits.take(32)))


def _vp9_colours(bits: _Bits, profile: int) -> tuple[int | None, ...]:
    depth = bits.take(1) if profile >= 2 else None
    space = bits.take(3)
    if space == 7:  # RGB
        bits.take(profile & 1)
        return depth, space
    return depth, space, bits.take(1), bits.take(3 if profile & 1 else 0)


# --- AV1 ------------------------------------------------------------------------------------

SEQUENCE, FRAME_HEADER, FRAME = 1, 3, 6  # kinds of units
KEY, SWITCH = 0, 3  # kinds of frames
BY_FRAME = 2  # stated by each frame


class _Sequence(NamedTuple):
    """Fields of a sequence header on which the layout of frames' headers depends."""

    reduced: bool
    screen: int
    integer: int
    id_bits: int


class _Av1:
    """Reader of packets, some of which hold the sequence header that the others need."""

    def __init__(self, head: bytes) -> None:
        self.form, self.sequence = b"", _Sequence(True, BY_FRAME, BY_FRAME, 0)
        # In MP4 and Matroska four bytes that describe it come first.
        self(head[4:] if head[:1] == b"\x81" else head)

    def __call__(self, data: bytes) -> list[_Frame]:
        frames = []
        for kind, unit in _av1_units(data):
            if kind == SEQUENCE:
                self.form, self.sequence = unit, _av1_sequence(_Bits(unit))
            elif kind in (FRAME_HEADER, FRAME):
                shown, sized = _av1_frame(_Bits(unit[:16]), self.sequence)
                frames.append(_Frame(shown, (self.form, sized)))
        return frames


def _av1_units(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        head = data[at]
        at += 1 + (head >> 2 & 1)
        size, shift = 0, 0
        while head & 2:
            size |= (data[at] & 127) << shift
            shift += 7
            at += 1
            if data[at - 1] < 128:
                break
        end = at + size if head & 2 else len(data)
        yield head >> 3 & 15, data[at:end]
        at = end


def _av1_sequence(bits: _Bits) -> _Sequence:
    bits.take(4)
    reduced = bool(bits.take(1))
    if reduced:
        bits.take(5)
    else:
        if bits.take(1):
            _av1_timing(bits)
        delay = bits.take(1)
        for _ in range(bits.take(5) + 1):
            bits.take(12)
            bits.take(bits.take(5) > 7)
            bits.take(4 if delay and bits.take(1) else 0)
    bits.take(bits.take(4) + bits.take(4) + 2)
    id_bits = 0 if reduced or not bits.take(1) else bits.take(4) + bits.take(3) + 3
    bits.take(3)
    screen = integer = BY_FRAME
    if not reduced:
        bits.take(4)
        bits.take(2 if bits.take(1) else 0)
        screen = BY_FRAME if bits.take(1) else bits.take(1)
        if screen:
            integer = BY_FRAME if bits.take(1) else bits.take(1)
    return _Sequence(reduced, screen, integer, id_bits)


def _av1_timing(bits: _Bits) -> None:
    bits.take(64)
    if bits.take(1):
        zeros = 0
        while not bits.take(1):
            zeros += 1
        bits.take(zeros)
    if bits.take(1):
        raise ValueError("a decoder model, which moves the fields that follow")


def _av1_frame(bits: _Bits, sequence: _Sequence) -> tuple[bool, bool]:
    """Return whether a frame is shown, and whether it has a size of its own."""
    if sequence.reduced or bits.take(1):  # the bit: show a frame that was decoded before
        return True, False
    kind, shown = bits.take(2), bool(bits.take(1))
    bits.take(0 if shown else 1)
    bits.take(0 if kind == SWITCH or (kind == KEY and shown) else 1)
    bits.take(1)
    screen = bits.take(1) if sequence.screen == BY_FRAME else sequence.screen
    bits.take(1 if screen and sequence.integer == BY_FRAME else 0)
    bits.take(sequence.id_bits)
    return shown, kind == SWITCH or bool(bits.take(1))
