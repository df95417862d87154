"""Files whose stamps are missing, late, repeated, those of decoding, or of packets without a frame.

Frames of made videos say which they are; what a plain decode gives, in order, is what is right.
"""

import re
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.bitstream
import numpy as np
import pytest
from av.packet import Packet
from av.video.frame import PictureType
from torch import Tensor

from clipvip.data.video.container import DecodeError, open_video
from clipvip.data.video.decode import decode_clip, open_clip, read_frames
from clipvip.data.video.frame_index import Trust
from clipvip.data.video.known_index import known_index

Numbers = Callable[[Tensor], list[int]]
CODED = {"options": {"g": "10", "bf": "3", "sc_threshold": "0"}}
MPEG = {"codec": "mpeg2video", "options": {"g": "10", "bf": "2", "b": "9M", "qmax": "2"}}


def remux(
    source: Path,
    target: Path,
    change: Callable[[Packet, int], list[Packet] | None] = lambda packet, number: None,
    **options: Any,
) -> Path:
    """The packets of a video in another container, each as `change` leaves it, or what it gives."""
    with av.open(str(source)) as given, av.open(str(target), "w", **options) as out:
        stream = given.streams.video[0]
        copy = out.add_stream_from_template(stream, opaque=True)
        copy.time_base = stream.time_base
        number = 0
        for packet in given.demux(stream):
            if not packet.size:
                continue
            packets = change(packet, number)
            for each in [packet] if packets is None else packets:
                each.stream, each.time_base = copy, stream.time_base
                out.mux(each)
            number += 1
    return target


def plain(path: Path) -> list[int]:
    """The numbers of all frames that decoding in order gives, packets with errors passed over."""
    found = []
    with av.open(str(path)) as container:
        for packet in container.demux(video=0):
            with suppress(av.InvalidDataError):
                found += [number_of(frame) for frame in packet.decode()]
    return found


def annexb(container: Any, stream: Any) -> Iterator[Packet]:
    """Packets of H.264 as AVI and raw streams hold them, from an MP4."""
    filters = av.bitstream.BitStreamFilterContext("h264_mp4toannexb", stream)
    for packet in container.demux(stream):
        yield from filters.filter(packet if packet.size else None)


def number_of(frame: av.VideoFrame) -> int:
    return round(float(frame.to_ndarray(format="rgb24").mean()) / 4)


def all_of(path: Path, numbers: Numbers, count: int, **part: float) -> list[int]:
    """Every frame of a part, by read_frames, which then gives each once."""
    return numbers(read_frames(path, count, size=16, **part))


def check(path: Path, numbers: Numbers, times: np.ndarray) -> None:
    """Frames i of a video are those shown at times[i]: all of it, parts of it, one by one."""
    assert plain(path) == list(range(len(times)))
    with open_clip(path, len(times)) as clip:
        found = numbers(clip.decode(16).frames)
        assert np.allclose(clip.index.times, times, atol=2e-3)
        assert clip.index.duration == pytest.approx(times[-1] + np.diff(times)[-1], abs=0.05)
    with_times = list(decode_clip(path))
    assert np.allclose([seconds for seconds, _ in with_times], times, atol=2e-3)
    nearest = [int(np.abs(times - t).argmin()) for t in np.linspace(0, times[-1], len(times))]
    assert found == nearest
    end = len(times) - 1
    for first, stop in ((end // 3, 2 * end // 3), (0, 5), (end - 4, end), (end // 2, end // 2 + 1)):
        part = {"start": float(times[first]) + 2e-3, "end": float(times[stop]) - 2e-3}
        expected = list(range(first, stop))
        assert sorted(set(all_of(path, numbers, 3 * len(times), **part))) == expected, part
        shown = [seconds for seconds, _ in decode_clip(path, **part)]
        assert np.allclose(shown, times[first:stop] - times[first], atol=2e-3), part


def test_avi_of_packets_in_decoding_order_with_empty_ones_between(
    make_video, numbers: Numbers, tmp_path: Path
) -> None:
    source = make_video("gop10.mp4", **CODED)

    path = tmp_path / "copied.avi"
    with av.open(str(source)) as given, av.open(str(path), "w") as out:
        stream = given.streams.video[0]
        copy = out.add_stream("libx264", rate=50)  # ticks; frames come at half of them
        copy.width, copy.height, copy.pix_fmt = stream.width, stream.height, "yuv420p"
        for number, packet in enumerate(p for p in annexb(given, stream)):
            packet.stream, packet.time_base = copy, Fraction(1, 50)
            packet.pts, packet.dts, packet.duration = 2 * number, 2 * number, 2
            out.mux(packet)
    with open_clip(path, 4) as clip:  # one pass is enough where the packets say how many there are
        clip.decode(16)
        assert clip.index.trust is Trust.PACKETS
    check(path, numbers, np.arange(60) / 25)


def test_avi_with_gaps(make_video, numbers: Numbers) -> None:
    times = [200 * i for i in range(10)] + [2000 + 40 * i for i in range(20)] + [5000, 5040]
    for codec in ("mpeg4", "mjpeg"):
        pixels = "yuv420p" if codec == "mpeg4" else "yuvj420p"
        path = make_video(
            f"gaps-{codec}.avi",
            count=len(times),
            times=times,
            codec=codec,
            pixel_format=pixels,
            options={"qmin": "1", "qmax": "2", "q": "1"},
        )
        with open_clip(path, 2) as clip:
            seconds = clip.index.times
        assert np.allclose(seconds, np.array(times) / 1000, atol=0.021)  # in ticks of the container
        check(path, numbers, seconds)


@pytest.mark.parametrize("reordered", ["0", "2"])
def test_avi_has_the_same_times_by_packets_and_by_decoding(reordered: str, make_video) -> None:
    times = [40 * i for i in range(30)] + [2000 + 40 * i for i in range(30)]
    options = {"g": "10", "bf": reordered}
    path = make_video(f"gap-{reordered}.avi", times=times, fps=50, options=options)
    found = []
    for trust in (Trust.PACKETS, Trust.DECODER):
        with open_video(path) as video:
            found.append(known_index(video, trust=trust).times)
    assert np.allclose(*found)


@pytest.mark.parametrize("container", ["avi", "mkv", "mp4"])
def test_packets_that_give_no_frame(
    container: str, make_video, numbers: Numbers, tmp_path: Path
) -> None:
    # Every fourth picture is followed by a packet of filler (NAL unit type 12), half a frame on.
    source, path = make_video("gop10.mp4", **CODED), tmp_path / f"x.{container}"
    filler = bytes([12, *[255] * 10, 128])
    with av.open(str(source)) as given, av.open(str(path), "w") as out:
        stream = given.streams.video[0]
        in_avi = container == "avi"
        if in_avi:
            copy = out.add_stream("libx264", rate=50)
            copy.width, copy.height, copy.pix_fmt = stream.width, stream.height, "yuv420p"
        else:
            copy = out.add_stream_from_template(stream, opaque=True)
        tick = Fraction(1, 50) if in_avi else stream.time_base
        half = round(1 / 50 / tick)
        packets = annexb(given, stream) if in_avi else (p for p in given.demux(stream) if p.size)
        for number, packet in enumerate(packets):
            head = b"\0\0\0\1" if in_avi else len(filler).to_bytes(4, "big")
            nothing = Packet(head + filler)
            if in_avi:
                packet.pts, packet.dts, packet.duration = 2 * number, 2 * number, 2
            nothing.pts, nothing.dts = packet.pts + half, packet.dts + half
            for each in [packet, nothing][: 1 if number % 4 else 2]:
                each.stream, each.time_base = copy, tick
                out.mux(each)
    assert plain(path) == list(range(60))
    with open_clip(path, 60) as clip:
        assert numbers(clip.decode(16).frames) == list(range(60))
        assert np.allclose(clip.index.times[clip.chosen.frames], np.arange(60) / 25, atol=2e-3)
    assert [number_of(frame) for _, frame in decode_clip(path)] == list(range(60))


@pytest.mark.parametrize("name", ["mpeg2.mpg", "gop10.ts", "mpeg2.ts"])
@pytest.mark.parametrize("parts", [2, 3])
def test_joined_files_are_stitched_at_each_restart(
    name: str, parts: int, make_video, numbers: Numbers, tmp_path: Path
) -> None:
    part = make_video(name, **(CODED if name.startswith("gop10") else MPEG))
    path = tmp_path / name
    path.write_bytes(part.read_bytes() * parts)
    with open_clip(path, 60 * parts) as clip:
        found = numbers(clip.decode(16).frames)
        assert np.allclose(clip.index.times, np.arange(60 * parts) / 25, atol=0.021)
    assert found == list(range(60)) * parts
    for start, first in ((1.0, 25), (2.4 * (parts - 1) + 1.0, 25)):
        found = numbers(read_frames(path, 10, size=16, start=start, end=start + 0.4))
        assert abs(found[0] - first) <= 1 and abs(found[-1] - first - 9) <= 1
        assert found == sorted(found)


def test_a_recording_joined_to_a_later_one_has_no_hole(
    make_video, write_video, numbers: Numbers, tmp_path: Path
) -> None:
    first = make_video("gop10.ts", **CODED)

    def later(packet: Packet, number: int) -> None:
        packet.pts, packet.dts = packet.pts + 3600 * 90000, packet.dts + 3600 * 90000

    second = remux(first, tmp_path / "later.ts", later)
    path = tmp_path / "both.ts"
    path.write_bytes(first.read_bytes() + second.read_bytes())
    with open_clip(path, 120) as clip:
        found = numbers(clip.decode(16).frames)
        assert clip.index.duration == pytest.approx(4.8, abs=0.1)
    assert sorted(found) == sorted(2 * list(range(60)))


def test_a_part_of_joined_files_is_that_of_the_first(
    write_video, numbers: Numbers, tmp_path: Path
) -> None:
    path, data = tmp_path / "both.ogv", b""
    for first in (0, 40):  # the same stamps, twice
        frames = [np.full((32, 48, 3), 4 * (first + i), np.uint8) for i in range(40 - first // 2)]
        part = write_video(tmp_path / f"{first}.ogv", frames, codec="libvpx", options={"g": "10"})
        data += part.read_bytes()
    path.write_bytes(data)
    for first, stop in ((4, 8), (10, 14)):
        part = {"start": first / 25 + 0.01, "end": stop / 25 - 0.01}
        assert sorted(set(all_of(path, numbers, 8, **part))) == list(range(first, stop))


def test_a_part_after_a_leap_to_other_stamps(make_video, numbers: Numbers, tmp_path: Path) -> None:
    first = make_video("leap.ogv", codec="libvpx", options={"g": "10"})

    def later(packet: Packet, number: int) -> None:
        packet.pts, packet.dts = packet.pts + 12500, packet.dts + 12500

    second = remux(first, tmp_path / "later.ogv", later)
    path = tmp_path / "both.ogv"
    path.write_bytes(first.read_bytes() + second.read_bytes() + first.read_bytes())
    for start in (2.81, 5.21):
        found = numbers(read_frames(path, 10, size=16, start=start, end=start + 0.38))
        assert found == list(range(10, 20))


def test_frames_before_what_no_demuxer_can_read_are_read(
    make_video, numbers: Numbers, tmp_path: Path
) -> None:
    data = make_video("gop10.nut", **CODED).read_bytes()
    path = tmp_path / "noise.nut"
    noise = np.random.default_rng(0).integers(0, 256, 600, np.uint8).tobytes()
    path.write_bytes(data[:-600] + noise)
    with open_clip(path, 60) as clip:
        found = sorted(set(numbers(clip.decode(16).frames)))
    assert len(found) >= 40 and found == list(range(len(found)))


@pytest.mark.parametrize("name", ["wmv", "asf", "flv", "mkv", "nut", "ts", "mp4", "mov", "webm"])
def test_a_late_first_stamp_moves_nothing(
    name: str, make_video, numbers: Numbers, tmp_path: Path
) -> None:
    codecs = {
        "wmv": {"codec": "wmv2", "options": {"g": "10", "qmin": "1", "qmax": "2", "b": "9M"}},
        "flv": {"codec": "flv1", "options": {"g": "10", "qmin": "1", "qmax": "2", "b": "9M"}},
        "webm": {"codec": "libvpx", "options": {"g": "10", "deadline": "realtime", "crf": "4"}},
    }
    options = codecs.get(name, CODED)
    source = make_video(f"on-time.{name if name in codecs else 'mp4'}", **options)

    def late(packet: Packet, number: int) -> None:
        shift = round(60 / packet.time_base)
        packet.pts, packet.dts = packet.pts + shift, packet.dts + shift

    path = remux(source, tmp_path / f"late.{name}", late)
    times = np.arange(60) / 25
    check(path, numbers, times)
    with pytest.raises(DecodeError, match=r"start 62 s lies after its end \(2\.3\d s\)"):
        read_frames(path, 2, size=16, start=62, end=63)


@pytest.mark.parametrize("first", [30, 60])
def test_matroska_without_keyframe_flags(
    first: int, make_video, numbers: Numbers, tmp_path: Path
) -> None:
    def unflagged(packet: Packet, number: int) -> None:
        packet.is_keyframe = packet.is_keyframe and number >= first

    path = remux(make_video("gop10.mp4", **CODED), tmp_path / "x.mkv", unflagged)
    check(path, numbers, np.arange(60) / 25)


@pytest.mark.parametrize("name", ["mkv", "mp4"])
def test_a_part_without_reordering_is_not_read_from_the_first_frame(
    name: str, numbers: Numbers, tmp_path: Path
) -> None:
    path = tmp_path / f"x.{name}"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25, options=CODED["options"])
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for number in range(60):
            pixels = np.full((32, 48, 3), 4 * number, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = number
            if number >= 25:
                frame.pict_type = PictureType.P
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    with open_clip(path, 5, start=1.601, end=1.799) as clip:
        assert clip.index.pts.min() >= 1.0 / clip.video.stream.time_base
        assert numbers(clip.decode(16).frames) == [40, 41, 42, 43, 44]
    check(path, numbers, np.arange(60) / 25)


def edited(source: Path, target: Path, edits: list[tuple[float, float]]) -> Path:
    """An MP4 with an edit list of its own: (seconds to show, from which second of the media)."""
    data = source.read_bytes()
    with av.open(str(source)) as container:
        ticks = int(1 / container.streams.video[0].time_base)
    at = data.index(b"moov") - 4
    assert data.index(b"mdat") < at  # or offsets would move
    movie = struct.unpack_from(">I", data, data.index(b"mvhd") + 16)[0]
    entries = b"".join(
        struct.pack(">IiI", round(length * movie), -1 if t < 0 else round(t * ticks), 1 << 16)
        for length, t in edits
    )
    elst = struct.pack(">I4sII", 16 + len(entries), b"elst", 0, len(edits)) + entries
    edts = struct.pack(">I4s", 8 + len(elst), b"edts") + elst
    old = data.find(b"edts")
    if old >= 0:
        size = struct.unpack_from(">I", data, old - 4)[0]
        begin, end = old - 4, old - 4 + size
    else:
        begin = end = data.index(b"mdia") - 4
    changed = bytearray(data[:begin] + edts + data[end:])
    for box in (at, data.index(b"trak") - 4):
        size = struct.unpack_from(">I", changed, box)[0] + len(edts) - (end - begin)
        struct.pack_into(">I", changed, box, size)
    target.write_bytes(changed)
    return target


@pytest.mark.parametrize(
    "edits",
    [
        [(0.8, 0.4), (0.8, 1.4)],
        [(0.5, 1.0), (0.5, 0.1)],
        [(1.0, -1), (1.0, 0.5)],
        [(0.4, 0.0), (0.4, 0.8), (0.4, 1.6)],
    ],
    ids=str,
)
def test_a_part_of_an_edited_video_has_the_frames_of_the_whole(
    edits: list[tuple[float, float]], make_video, numbers: Numbers, tmp_path: Path
) -> None:
    path = edited(make_video("gop10.mp4", **CODED), tmp_path / "x.mp4", edits)
    whole = plain(path)
    with open_clip(path, len(whole)) as clip:
        found, times = numbers(clip.decode(16).frames), clip.index.times
    assert len(times) == len(whole)
    assert [number for number in found if number not in whole] == []
    for first, stop in ((2, 8), (len(whole) // 2, len(whole) - 1)):
        part = {"start": float(times[first]) + 1e-3, "end": float(times[stop]) - 1e-3}
        given = all_of(path, numbers, 60, **part)
        assert sorted(set(given)) == sorted(set(whole[first:stop]))


def test_leading_pictures_that_cannot_be_decoded_are_not_listed(
    make_video, numbers: Numbers, tmp_path: Path
) -> None:
    source = make_video(
        "open.mp4", options={"g": "10", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}
    )
    keys = 0

    def from_second_key(packet: Packet, number: int) -> list[Packet] | None:
        nonlocal keys
        keys += packet.is_keyframe
        return None if keys > 1 else []

    path = remux(source, tmp_path / "cut.mkv", from_second_key)
    right = plain(path)
    assert len(right) < 60
    found = numbers(read_frames(path, len(right), size=16))
    assert set(found) <= set(right) and found == sorted(found)
    assert [number_of(frame) for _, frame in decode_clip(path)] == right


def test_a_stretch_that_is_lost_costs_no_frame_elsewhere(
    make_video, numbers: Numbers, tmp_path: Path
) -> None:
    data = bytearray(make_video("gop10.ts", count=60, size=(160, 128), **CODED).read_bytes())
    lost = slice(len(data) // 2 // 188 * 188, (len(data) // 2 + len(data) // 8) // 188 * 188)
    path = tmp_path / "lost.ts"
    for damage in (b"", b"\xff" * (lost.stop - lost.start)):
        path.write_bytes(bytes(data[: lost.start]) + damage + bytes(data[lost.stop :]))
        for start, end, first, last in ((0.2, 0.8, 5, 19), (2.0, 2.4, 50, 59)):
            with open_clip(path, 10, start=start, end=end) as clip:
                found = numbers(clip.decode(16).frames)
                assert (found[0], found[-1]) == (first, last)
        wrong = 0
        for number in range(60):
            try:
                (found,) = numbers(
                    read_frames(path, 1, size=16, start=number / 25 + 0.01, end=number / 25 + 0.02)
                )
            except DecodeError as error:
                assert "damaged at" in error.reason
                continue
            wrong += found != number
        assert wrong <= 12  # those that are gone: the one shown until the next comes


def test_what_decodes_to_other_frames_than_its_packets_say_is_read_by_decoding(
    make_video, numbers: Numbers, tmp_path: Path
) -> None:
    # Stamps of decoding taken for those of showing, as in an AVI's copy to MP4.
    def by_decoding_time(packet: Packet, number: int) -> None:
        packet.pts = packet.dts = 512 * number

    path = remux(make_video("gop10.mp4", **CODED), tmp_path / "x.mp4", by_decoding_time)
    check(path, numbers, np.arange(60) / 25)
    path = remux(make_video("gop10.mp4", **CODED), tmp_path / "x.mkv", by_decoding_time)
    check(path, numbers, np.arange(60) / 25)


def test_two_frames_in_one_packet_and_none_in_the_next(
    make_video, numbers: Numbers, tmp_path: Path
) -> None:
    options = {"g": "12", "bf": "1", "sc_threshold": "1000000000", "qmin": "1", "qmax": "2"}
    source = make_video("b.mkv", codec="mpeg4", options=options)
    with av.open(str(source)) as container:
        coded = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    vop = b"\0\0\1\xb6"
    nothing = vop + b"\x50\0\0"
    for number, data in enumerate(coded):
        # Every other B-frame goes into the packet before: not all stamps are in decoding order.
        if data[data.index(vop) + 4] >> 6 == 2 and number // 2 % 2:
            coded[number - 1] += data
            coded[number] = nothing
    assert coded.count(nothing) > 10

    def packed(packet: Packet, number: int) -> list[Packet]:
        changed = Packet(coded[number])
        changed.pts, changed.dts = packet.pts + 40, packet.dts + 40
        if nothing in coded[number : number + 2]:
            changed.pts, changed.dts = 40 * number + 40, 40 * number
        changed.is_keyframe = packet.is_keyframe
        return [changed]

    path = remux(source, tmp_path / "packed.mkv", packed)
    mark = re.search(rb"Lavc[0-9.]+", path.read_bytes())
    assert mark is not None
    by_divx = b"DivX503b" + b"1" * (len(mark[0]) - 9) + b"p"
    path.write_bytes(path.read_bytes().replace(mark[0], by_divx))
    check(path, numbers, np.arange(60) / 25)
    for number in range(60):
        at = number / 25
        assert all_of(path, numbers, 1, start=at + 2e-3, end=at + 1e-2) == [number]


def test_hidden_frames_of_vp8_are_not_counted(make_video, numbers: Numbers, tmp_path: Path) -> None:
    source = make_video("vp8.webm", codec="libvpx", options={"g": "10", "deadline": "realtime"})

    def repeated_in_secret(packet: Packet, number: int) -> list[Packet]:
        if packet.is_keyframe:
            return [packet]
        data = bytes(packet)
        hidden = Packet(bytes([data[0] & ~0x10]) + data[1:])
        hidden.pts = hidden.dts = packet.pts - 20
        return [hidden, packet]

    path = remux(source, tmp_path / "x.webm", repeated_in_secret)
    right = plain(path)
    assert len(right) == 60
    with open_clip(path, 60) as clip:
        assert numbers(clip.decode(16).frames) == right
        assert len(clip.index.times) == 60 and clip.index.trust is Trust.PACKETS


def test_a_fragment_of_a_longer_movie_is_no_file_cut_off(make_video, numbers, tmp_path) -> None:
    source = make_video("gop10.mp4", **CODED)
    options = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
    data = remux(source, tmp_path / "x.mp4", options=options).read_bytes()
    # The length of all that the head speaks of, in its first box (mvhd) and in the track's.
    long = bytearray(data)
    for box in (b"mvhd", b"mdhd"):
        start = long.index(box) + 4
        assert long[start] == 0  # version: times of four bytes
        struct.pack_into(
            ">I", long, start + 16, struct.unpack_from(">I", long, start + 12)[0] * 900
        )
    path = tmp_path / "long.mp4"
    path.write_bytes(long)
    assert numbers(read_frames(path, 60, size=16)) == list(range(60))
    path.write_bytes(long[: len(long) * 2 // 3])
    with pytest.raises(DecodeError, match="cut off"):
        read_frames(path, 60, size=16)


def test_one_damaged_frame_among_whole_ones_is_left_out(make_video, numbers, tmp_path) -> None:
    # The last picture before a keyframe, which no other refers to.
    source = make_video("p.mkv", options={"g": "10", "bf": "0", "sc_threshold": "0"})

    def spoiled(packet: Packet, number: int) -> list[Packet] | None:
        if number != 29:
            return None
        broken = Packet(bytes(packet)[:6] + b"\xff" * (packet.size - 6))
        broken.pts, broken.dts = packet.pts, packet.pts
        return [broken]

    path = remux(source, tmp_path / "x.mkv", spoiled)
    with open_clip(path, 60) as clip:
        found = numbers(clip.decode(16).frames)
    assert len(found) == 60 and set(found) >= set(range(60)) - {29}
    assert abs(found[29] - 29) <= 1
