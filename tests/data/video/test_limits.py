"""Files that ask for more than themselves: other files, the network, programs, memory, time."""

import io
import os
import pickle
import resource
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from clipvip.data.video import container
from clipvip.data.video.container import FORMATS, Blob
from clipvip.data.video.decode import DecodeError, read_frames
from clipvip.data.video.mp4 import Impossible, check_claims

# --- scripts -------------------------------------------------------------------------------------


@pytest.fixture
def multicast() -> Iterator[tuple[str, int]]:
    """An address to which a reader of the session description would listen; nobody does now."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    yield "239.7.7.7", port // 2 * 2


@pytest.fixture
def server() -> Iterator[tuple[str, list[object]]]:
    """The URL of a listener, and what it heard."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        heard: list[object] = []
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/a.mp4", heard
        with suppress(TimeoutError):
            heard.append(listener.accept())
        assert heard == []


def scripts(target: str, group: str, port: int) -> dict[str, str]:
    """Texts that libav, by its defaults, reads as a video that is elsewhere."""
    return {
        "sdp": f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 {group}\nt=0 0\n"
        f"m=video {port} RTP/AVP 96\na=rtpmap:96 H264/90000\n",
        "concat": f"ffconcat version 1.0\nfile '{target}'\n",
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{target}\n#EXT-X-ENDLIST\n",
        "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        'mediaPresentationDuration="PT10S"><Period><AdaptationSet mimeType="video/mp4">'
        f'<Representation id="1" bandwidth="1"><BaseURL>{target}</BaseURL></Representation>'
        "</AdaptationSet></Period></MPD>",
        "vobsub": "# VobSub index file, v7\nid: en, index: 0\ntimestamp: 0:00:00:000, filepos: 0\n",
        "asx": f'<asx version="3.0"><entry><ref href="{target}"/></entry></asx>',
        "smil": f'<smil><body><video src="{target}"/></body></smil>',
        "rtsp": f"RTSPtext {target}",
    }


def test_a_script_opens_no_other_file_and_no_port(
    make_video, multicast: tuple[str, int], server: tuple[str, list[object]], tmp_path: Path
) -> None:
    target = make_video("target.mp4")
    for place in (str(target), f"file:{target}", target.name, server[0]):
        (tmp_path / target.name).write_bytes(target.read_bytes())
        for name, text in scripts(place, *multicast).items():
            for suffix in (".mp4", ".ts", ".m3u8", ".sdp", ".mkv", ".idx", ".avi"):
                path = tmp_path / f"{name}{suffix}"
                path.write_text(text)
                for source in (path, Blob(path.name, text.encode())):
                    with pytest.raises(DecodeError):
                        read_frames(source, 1, size=16)
                    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as still_free:
                        still_free.bind(("", multicast[1]))


def test_parts_of_a_film_are_not_looked_for(tmp_path: Path) -> None:
    """libav's demuxer of Magic Lantern's films opens a.m00, a.m01, … beside a.mp4."""
    head = b"MLVI" + struct.pack("<I8sQHHIHHIIII", 52, b"v2.0", 1, 0, 2, 0, 1, 0, 1, 0, 25, 1)
    size = b"RAWI" + struct.pack("<IQHHI", 180, 0, 64, 48, 1) + bytes(156)
    frame = b"VIDF" + struct.pack("<IQ", 32 + 64 * 48 * 2, 0) + bytes(16 + 64 * 48 * 2)
    (tmp_path / "a.mp4").write_bytes(head + size + frame)
    with pytest.raises(DecodeError, match="not a video: "):
        read_frames(tmp_path / "a.mp4", 1, size=16)


def test_numbered_images_are_not_looked_for(tmp_path: Path) -> None:
    for number in range(3):
        Image.new("RGB", (32, 32), (0, 80 * number, 0)).save(tmp_path / f"a{number}.png")
    for name in ("a%d.png.mp4", "a%d.gif", "a*.gif", "a%01d.mjpeg"):
        (tmp_path / name).write_bytes(b"nothing")
        with pytest.raises(DecodeError):
            read_frames(tmp_path / name, 1, size=16)
    Image.new("RGB", (32, 32), (200, 0, 0)).save(tmp_path / "b%d.gif")
    assert read_frames(tmp_path / "b%d.gif", 1, size=16)[0, 0].min() > 190


def test_an_external_reference_of_a_quicktime_file_is_not_followed(
    make_video, tmp_path: Path
) -> None:
    """Samples of a track may be declared to lie in another file (dref with an alias)."""
    shown = make_video("inside.mov")
    name = b"elsewhere.mov"
    (tmp_path / name.decode()).write_bytes(make_video("elsewhere.mov", count=7).read_bytes())
    alias = bytearray(150)
    alias[10:12] = b"\0\2"
    alias[50 : 51 + len(name)] = bytes([len(name)]) + name
    reference = full(b"dref", words(1), box(b"alis", bytes(4), alias))
    data = shown.read_bytes()
    at = data.index(b"dref") - 4
    own = data[at : at + struct.unpack_from(">I", data, at)[0]]
    grown = len(reference) - len(own)
    for holder in (b"moov", b"trak", b"mdia", b"minf", b"dinf"):  # whose sizes grow with it
        place = data.index(holder) - 4
        size = struct.pack(">I", struct.unpack_from(">I", data, place)[0] + grown)
        data = data[:place] + size + data[place + 4 :]
    (tmp_path / "a.mov").write_bytes(data.replace(own, reference))
    own_frames = read_frames(shown, 3, size=16)
    assert torch.equal(read_frames(tmp_path / "a.mov", 3, size=16), own_frames)


def test_every_format_that_is_read_is_one_of_libav_and_reads_one_file() -> None:
    formats = set(FORMATS.split(","))
    known = {part for name in av.formats_available for part in name.split(",")}
    assert {"mov", "matroska", "avi", "mpegts", "mpeg", "ogg", "flv", "asf"} <= formats & known
    elsewhere = {"concat", "hls", "applehttp", "dash", "imf", "sdp", "rtsp", "rtp", "sap", "image2"}
    elsewhere |= {"mlv"}
    devices = {"lavfi", "fbdev", "x11grab", "alsa", "oss", "v4l2", "kmsgrab", "pulse", "vobsub"}
    assert not formats & (elsewhere | devices)


POSTSCRIPT = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 32 32
%%EndComments
0 0 32 32 rectfill showpage
%%EOF
"""


def test_no_program_is_started_for_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = tmp_path / "called"
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {called}\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail(f"started {a}"))
    for name in ("a.jpg", "a.png", "a.tiff", "a.webp"):
        (tmp_path / name).write_bytes(POSTSCRIPT)
        for source in (tmp_path / name, Blob(name, POSTSCRIPT)):
            with pytest.raises(DecodeError, match="not an image of a known format"):
                read_frames(source, 1, size=16)
    assert not called.exists()


def test_images_under_another_images_name_are_read(tmp_path: Path) -> None:
    for kind in ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP", "JPEG2000"):
        path = tmp_path / f"{kind}.jpg"
        Image.new("RGB", (40, 32), (0, 200, 0)).save(path, kind)
        assert read_frames(path, 1, size=16)[0, 1].float().mean() > 190


# --- what is no file -----------------------------------------------------------------------------


def test_pipes_sockets_and_devices_are_refused_unopened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.mp4").symlink_to("/dev/zero")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as bound:
        here = os.getcwd()
        os.chdir(tmp_path)  # names of sockets are short
        try:
            bound.bind("socket.mp4")
        finally:
            os.chdir(here)
        for name in ("pipe.mp4", "pipe.jpg", "zero.mp4", "zero.png", "socket.mp4"):
            with pytest.raises(DecodeError, match="a pipe, socket or device"):
                read_frames(tmp_path / name, 1, size=16)


# --- claims --------------------------------------------------------------------------------------


def box(name: bytes, *parts: bytes) -> bytes:
    return struct.pack(">I4s", 8 + sum(map(len, parts)), name) + b"".join(parts)


def full(name: bytes, *parts: bytes) -> bytes:
    return box(name, bytes(4), *parts)


def words(*values: int) -> bytes:
    return struct.pack(f">{len(values)}I", *values)


def movie(
    *,
    sizes: tuple[int, ...] = (0, 1, 8),
    stts: tuple[int, ...] = (1, 1, 1),
    stsc: tuple[int, ...] = (1, 1, 1, 1),
    handler: bytes = b"vide",
    more: bytes = b"",
    more_tables: bytes = b"",
    packed: bool = False,
) -> bytes:
    """An MP4 of one track and 44 kB; the tables' words as given."""
    entry = bytes(6) + b"\0\1" + bytes(16) + struct.pack(">HH", 64, 48) + words(0x480000, 0x480000)
    entry += bytes(4) + b"\0\1" + bytes(32) + b"\0\x18\xff\xff"
    tables = full(b"stsd", words(1), box(b"avc1", entry)) + full(b"stts", words(*stts))
    tables += full(b"stsc", words(*stsc)) + full(b"stsz", words(*sizes))
    tables += full(b"stco", words(1, 48)) + more_tables
    media = full(b"mdhd", words(0, 0, 1000, 1000, 0))
    media += full(b"hdlr", bytes(4) + handler + bytes(13)) + box(b"minf", box(b"stbl", tables))
    head = full(b"tkhd", words(0, 0, 1, 0, 1000), bytes(60))
    content = full(b"mvhd", words(0, 0, 1000, 1000), bytes(80))
    content += box(b"trak", head, box(b"mdia", media)) + more
    moov = box(b"moov", content)
    if packed:
        inside = box(b"dcom", b"zlib") + box(b"cmvd", words(len(moov)), zlib.compress(moov, 9))
        moov = box(b"moov", box(b"cmov", inside))
    return box(b"ftyp", b"isom" + bytes(4) + b"isom") + box(b"mdat", bytes(44_000)) + moov


MANY = 100_000_000
FRAGMENTS = box(b"mvex", full(b"trex", words(1, 1, 1, 1, 0)))
RUN = box(b"moof", full(b"mfhd", words(1)), box(b"traf", full(b"tfhd", words(1))))
KEYS = full(b"hdlr", bytes(4) + b"mdta" + bytes(13)) + full(b"keys", words(0x1FFFFFFF))
CLAIMS = {
    "samples of one size": movie(sizes=(1, MANY)),
    "samples of many sizes": movie(sizes=(0, MANY)),
    "sound": movie(sizes=(1, MANY), handler=b"soun", stts=(1, MANY, 2)),
    "sound by the tick": movie(
        sizes=(1, MANY), handler=b"soun", stts=(1, MANY, 1), stsc=(1, 1, 0x7FFFFFFF, 1)
    ),
    "sound by the tick with times of its own": movie(
        sizes=(1, MANY),
        handler=b"soun",
        stts=(1, MANY, 1),
        more_tables=full(b"ctts", words(1, 1, 5)),
    ),
    "sound by the tick, of two tables the second harmless": movie(
        sizes=(1, MANY),
        handler=b"soun",
        stts=(1, MANY, 1),
        stsc=(1, 1, 0x7FFFFFFF, 1),
        more_tables=full(b"stsc", words(1, 1, 1, 1)),
    ),
    "sound by the tick, more than any integer": movie(
        handler=b"soun",
        stts=(1, MANY, 1),
        stsc=(200_000, *(1, 0x7FFFFFFF, 1, 60_000, 0x7FFFFFFF, 1) * 100_000),
        more_tables=full(b"stco", words(60_000)),
    ),
    "sound by the tick that says it is video too": movie(
        handler=b"soun",
        stts=(1, MANY, 1),
        stsc=(1, 1, 0x7FFFFFFF, 1),
        more_tables=full(b"hdlr", bytes(4) + b"vide"),
    ),
    "video that says it is sound too": movie(
        sizes=(1, MANY),
        stts=(1, MANY, 1),
        handler=b"soun",
        more_tables=full(b"hdlr", bytes(4) + b"vide"),
    ),
    "composition times": movie(more_tables=full(b"ctts", words(MANY, 1, 0))),
    "places": movie(more_tables=full(b"co64", words(MANY))),
    "edits": movie(more_tables=full(b"elst", words(MANY))),
    "keys": movie(more=box(b"udta", full(b"meta", KEYS))),
    "a compressed movie": movie(sizes=(1, MANY), packed=True),
    "a hidden movie": movie(sizes=(1, MANY)).replace(b"moov", b"hoov"),
    "runs of fragments": movie(more=FRAGMENTS)
    + b"".join(
        box(b"moof", full(b"mfhd", words(i)), box(b"traf", full(b"trun", words(60_000))))
        for i in range(9)
    ),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_claims_beyond_a_files_bytes_are_refused_before_memory_is(name: str) -> None:
    data = CLAIMS[name]
    with pytest.raises(Impossible, match="more than the file's"):
        check_claims(io.BytesIO(data))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DecodeError, match="damaged: its table"):
        read_frames(Blob("a.mp4", data), 3, size=16)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_what_a_file_can_hold_is_not_refused(make_video) -> None:
    check_claims(io.BytesIO(movie()))
    check_claims(io.BytesIO(movie(sizes=(1, 44_000))))
    # Ten minutes of sound in 4 bytes for 160 ticks.
    check_claims(
        io.BytesIO(
            movie(sizes=(1, MANY), handler=b"soun", stts=(1, MANY, 1), stsc=(1, 1, 1_700_000, 1))
        )
    )
    for name in ("a.mp4", "a.mov", "a.mkv", "a.avi", "a.ts"):
        with open(make_video(name), "rb") as file:
            check_claims(file)


def test_damaged_tables_never_break_the_check(make_video) -> None:
    data = make_video("damage.mp4").read_bytes()
    noise = np.random.default_rng(0)
    for _ in range(500):
        damaged = bytearray(data)
        for place in noise.integers(data.index(b"moov") - 4, len(data), 3):
            damaged[place] = noise.integers(256)
        try:
            check_claims(io.BytesIO(damaged[: int(noise.integers(len(data)))]))
            check_claims(io.BytesIO(damaged))
        except Impossible:
            pass
    nested = b""
    for _ in range(3000):
        nested = box(b"moov", nested)
    check_claims(io.BytesIO(nested))


# --- pictures ------------------------------------------------------------------------------------


def png(width: int, height: int, rows: bytes = b"", *more: tuple[bytes, bytes]) -> bytes:
    """A PNG of one bit per pixel; more: names and data of further chunks."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return words(len(data)) + name + data + words(zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    image = zlib.compress(rows or bytes((width + 7) // 8 + 1) * height, 9)
    chunks = ((b"IHDR", head), *more, (b"IDAT", image), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def jpeg_of_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan, of a few bytes, is repeated."""
    file = io.BytesIO()
    Image.new("RGB", (4000, 4000)).save(file, "JPEG", progressive=True, quality=5)
    data = file.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * count + data[-2:]


def gif(width: int, height: int) -> bytes:
    data = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    frame = b"\x21\xf9\x04\x00\x0a\x00\x00\x00\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0)
    return data + (frame + b"\x02\x02\x44\x01\x00") * 3 + b"\x3b"


TEXT = b"a\0\0" + zlib.compress(bytes(200_000_000), 9)
SMALL = {  # the file, what is said of it, and megabytes that it may take
    "thin.png": (png(1, 60_000), "1 3 224 224", 60),
    "flat.png": (png(60_000, 1), "1 3 224 224", 60),
    "large.png": (png(9000, 9000, b" "), "9000 × 9000 pixels, more than the 67.2 million", 60),
    "larger.png": (png(60_000, 60_000, b" "), "Image size (3600000000 pixels)", 60),
    "large.gif": (gif(16_000, 16_000), "no frame could be decoded", 60),
    "png.mp4": (png(64, 48, b"", (b"zTXt", TEXT)), "not a video: an image", 60),
    "text.png": (png(64, 48, b"", (b"zTXt", TEXT)), "MAX_TEXT_CHUNK", 60),
    "scans.jpg": (jpeg_of_scans(100_000), "a JPEG of more than 500 scans", 60),
    "whole.png": (png(8000, 8000), "1 3 224 224", 900),
}
# In a process of its own, whose memory is not that of other tests.
MEASURED = """
import pickle, resource, sys
from clipvip.data.video import Blob, DecodeError, read_frames
files = pickle.load(sys.stdin.buffer)
read_frames(Blob("warm.png", files["warm.png"][0]), 1, size=224)
for name, (data, *_) in files.items():
    before = resource.getrusage(resource.RUSAGE_SELF)
    try:
        said = " ".join(map(str, read_frames(Blob(name, data), 3, size=224).shape))
    except DecodeError as error:
        said = error.reason
    after = resource.getrusage(resource.RUSAGE_SELF)
    megabytes = (after.ru_maxrss - before.ru_maxrss) // 1024
    print(megabytes, after.ru_utime - before.ru_utime, said)
"""


def test_a_small_file_takes_little_memory_and_time() -> None:
    files = {"warm.png": (png(64, 48), "1 3 224 224", 60), **SMALL}
    command, given = [sys.executable, "-c", MEASURED], pickle.dumps(files)
    done = subprocess.run(command, input=given, capture_output=True, check=True)
    assert "DecompressionBombWarning" not in done.stderr.decode()
    for line, name in zip(done.stdout.decode().splitlines(), files, strict=True):
        megabytes, seconds, answer = line.split(" ", 2)
        _, said, most = files[name]
        assert said in answer and int(megabytes) < most and float(seconds) < 10, (name, line)


def test_the_limit_of_pictures_is_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 8192 * 8192 <= container.MAX_PIXELS < 1e8
    monkeypatch.setenv(container.VARIABLE, "0.001")
    assert container._megapixels() == 0.001
    for wrong in ("", "many", "-1", "0", "nan", "1e9"):
        monkeypatch.setenv(container.VARIABLE, wrong)
        with pytest.raises(ValueError, match=f"{container.VARIABLE} is {wrong!r}; expected"):
            container._megapixels()


def test_frames_beyond_the_limit_are_refused_with_the_option(make_video) -> None:
    path = make_video("large.mp4", count=5)
    environment = {**os.environ, container.VARIABLE: "0.001"}
    code = "from clipvip.data.video.decode import read_frames; import sys\n"
    command = [sys.executable, "-c", code + "read_frames(sys.argv[1], 1, size=8)", path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    said = f"DecodeError: {path}: 48 × 32 pixels, more than the 0.001 million allowed"
    assert f"{said}; {container.VARIABLE} changes that" in done.stderr
