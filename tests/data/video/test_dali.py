"""DALI's CPU pipeline end to end (VP8, VP9, MJPEG); a GPU's codecs where there is a GPU."""

import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from clipvip.data import loading
from clipvip.data.annotations import Clip
from clipvip.data.loading import Batch, ClipLoader, LoaderOptions, build_loader
from clipvip.data.shards import Shards, Source, build_shard_loader, write_shards
from clipvip.data.video import dali, engines
from clipvip.data.video.container import Blob, Media
from clipvip.data.video.dali import DaliDecoder, Refused, encode
from clipvip.data.video.decode import Frames, open_clip, read_frames
from clipvip.data.video.engines import DaliError, choose_engine
from clipvip.data.video.sampling import Choice
from clipvip.ops.resize_crop import RESIZES

needs_dali = pytest.mark.skipif(
    find_spec("nvidia") is None or find_spec("nvidia.dali") is None,
    reason='NVIDIA DALI is not installed: pip install "clipvip[dali]"',
)
MEAN = 1.0  # of 255: how far DALI's frames may be from PyAV's; 0.2 to 0.6 is usual
QUICK = {"deadline": "realtime", "cpu-used": "8"}
ON_CPU = {
    "vp9.webm": {"codec": "libvpx-vp9", "options": QUICK | {"g": "10"}},
    "vp8.webm": {"codec": "libvpx", "options": QUICK | {"g": "10"}},
    "mjpeg.mkv": {"codec": "mjpeg", "pixel_format": "yuvj420p"},
}
ON_GPU = {
    "h264.mp4": {"codec": "libx264", "options": {"g": "20", "bf": "3", "b-pyramid": "normal"}},
    "h264-closed.ts": {"codec": "libx264", "options": {"g": "20", "bf": "2"}},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=error:keyint=20"}},
    "vp9.webm": ON_CPU["vp9.webm"],
    "alt-ref.webm": {
        "codec": "libvpx-vp9",
        "options": {"cpu-used": "4", "g": "20", "auto-alt-ref": "1", "lag-in-frames": "10"},
    },
    "vp8.webm": ON_CPU["vp8.webm"],
    "av1.mp4": {"codec": "libsvtav1", "options": {"preset": "10", "g": "20"}},
}
SIZE = 32
STORED = (176, 144)  # video engines take no smaller frames


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch) -> None:
    """What DALI decodes on by default: on the CPU, also on a machine with a GPU."""

    def choose(decoder: str) -> dali.Engine | None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: False)
            return choose_engine(decoder)

    monkeypatch.setattr(engines, "choose_engine", choose)


@pytest.fixture
def cuda(cuda: str, monkeypatch) -> str:
    if not engines._has_nvdec():
        pytest.skip("no video engine of the GPU: the driver's libnvcuvid.so.1 is not found")
    monkeypatch.setattr(engines, "choose_engine", choose_engine)
    return cuda


@pytest.fixture(scope="module", params=ON_CPU)
def video(request, make_video) -> Path:
    """60 frames that tell their number by their brightness, of each codec for the CPU."""
    return make_video(f"dali-{request.param}", size=STORED, **ON_CPU[request.param])


@pytest.fixture(scope="module")
def vp9(make_video) -> Path:
    return make_video("dali-vp9.webm", size=STORED, **ON_CPU["vp9.webm"])


@pytest.fixture(scope="module")
def h264(make_video) -> Path:
    return make_video("dali-h264.mp4", size=STORED, options={"g": "10", "bf": "2"})


@pytest.fixture(scope="module")
def decoder() -> DaliDecoder:
    return DaliDecoder(SIZE, engines.CPU)


def by_dali(media: Media, num_frames: int, decoder: DaliDecoder, **clip: Any) -> Tensor:
    engine = engines.CPU if decoder.device == "cpu" else engines.GPU
    with open_clip(media, num_frames, **clip) as opened:
        encoded = encode(opened, engine)
    (decoded,) = decoder.decode([encoded])
    assert isinstance(decoded, Frames), decoded
    return joined(decoded)


def by_pyav(media: Media, num_frames: int, **clip: Any) -> Tensor:
    with open_clip(media, num_frames, **clip) as opened:
        return joined(opened.decode(SIZE))


def joined(decoded: Frames) -> Tensor:
    """All frames, the middle one last."""
    frames, middle = decoded
    return frames if middle is None else torch.cat([frames, middle[None]])


def far(ours: Tensor, theirs: Tensor) -> float:
    return (ours.float() - theirs.float()).abs().mean().item()


# --- frames ---------------------------------------------------------------------------------


def coded_anew(source: Path, path: Path, codec: str, **context: Any) -> Path:
    """The first 60 frames."""
    options = QUICK | {"g": "25"} if "vpx" in codec else {}
    with av.open(str(source)) as given, av.open(str(path), "w") as out:
        stream, pixels = out.add_stream(codec, rate=25, options=options), given.streams.video[0]
        stream.width, stream.height = pixels.width, pixels.height
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        for count, frame in zip(range(60), given.decode(video=0), strict=False):
            same = frame.reformat(format=stream.pix_fmt)
            same.pts, same.time_base = count, Fraction(1, 25)
            out.mux(stream.encode(same))
        out.mux(stream.encode())
    return path


@needs_dali
@pytest.mark.parametrize(
    ("codec", "colours"),
    [
        ("libvpx-vp9", {}),
        ("libvpx", {}),
        ("mjpeg", {}),
        ("libvpx-vp9", {"colorspace": 5, "color_range": 2}),  # BT.601, all 256 values
    ],
)
@pytest.mark.parametrize("name", ["bikes", "carphone_pristine"])  # made smaller, made larger
def test_frames_are_pyavs(name: str, codec: str, colours, real_clips, tmp_path: Path) -> None:
    path = coded_anew(real_clips[name], tmp_path / "real.mkv", codec, **colours)
    size = 224
    ours = by_dali(path, 12, DaliDecoder(size, engines.CPU))
    theirs = read_frames(path, 12, size=size)
    assert ours.shape == theirs.shape == (12, 3, size, size) and ours.dtype == torch.uint8
    assert far(ours, theirs) < MEAN
    assert far(ours.flip(0), theirs) > 3 * MEAN  # the bound tells frames apart


@needs_dali
@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("name", ["bikes", "carphone_pristine"])
def test_every_resize_is_pyavs(name: str, resize: str, real_clips, tmp_path: Path) -> None:
    path = coded_anew(real_clips[name], tmp_path / "real.mkv", "libvpx-vp9")
    for size in (224, 33):
        ours = by_dali(path, 3, DaliDecoder(size, engines.CPU, resize=resize))
        assert far(ours, read_frames(path, 3, size=size, resize=resize)) < MEAN
        for other in RESIZES:
            if other != resize:
                assert far(ours, read_frames(path, 3, size=size, resize=other)) > 3 * MEAN


@needs_dali
@pytest.mark.parametrize(
    "clip",
    [
        {},
        {"start": 0.5, "end": 1.3},
        {"start": 1.37},
        {"end": 0.2, "sampling": "clip:25"},
        {"with_middle": True, "start": 0.9},
        {"sampling": "fps:3"},
    ],
    ids=str,
)
def test_which_frames_is_as_with_pyav(video: Path, clip, decoder: DaliDecoder, numbers) -> None:
    theirs = by_pyav(video, 7, **clip)
    assert numbers(by_dali(video, 7, decoder, **clip)) == numbers(theirs)
    blob = Blob(video.name, video.read_bytes())
    assert numbers(by_dali(blob, 7, decoder, **clip)) == numbers(theirs)


@needs_dali
def test_uneven_times_and_a_late_start_change_no_frame(make_video, decoder, numbers) -> None:
    times = [int(5000 + 40 * i + 10 * (i % 3)) for i in range(60)]
    video = make_video("uneven.webm", size=STORED, times=times, **ON_CPU["vp9.webm"])
    for start in (None, 0.7):
        theirs = read_frames(video, 9, size=SIZE, start=start)
        assert numbers(by_dali(video, 9, decoder, start=start)) == numbers(theirs)


@needs_dali
def test_frames_before_an_edit_lists_start_are_not_counted(
    vp9: Path, decoder: DaliDecoder, numbers, tmp_path: Path
) -> None:
    path = tmp_path / "edited.mp4"
    with av.open(str(vp9)) as given, av.open(str(path), "w") as out:
        copy = out.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(video=0):
            if packet.size:
                packet.pts -= 240  # of 1/1000 s: six frames before the start
                packet.dts, packet.stream = packet.pts, copy
                out.mux(packet)
    theirs = read_frames(path, 6, size=SIZE)
    assert numbers(theirs)[0] == 6
    assert numbers(by_dali(path, 6, decoder)) == numbers(theirs)


@needs_dali
@pytest.mark.parametrize("matrix", [(0, 1, -1, 0), (0, -1, 1, 0), (-1, 0, 0, -1), (-1, 0, 0, 1)])
def test_display_matrix_is_applied(matrix, turned_video, decoder: DaliDecoder) -> None:
    video = turned_video(matrix, codec="libvpx-vp9")
    assert far(by_dali(video, 2, decoder), read_frames(video, 2, size=SIZE)) < 3


@needs_dali
def test_only_packets_that_are_needed_are_passed_on(vp9: Path) -> None:
    with open_clip(vp9, 4) as whole, open_clip(vp9, 4, start=1.0, end=1.3) as part:
        everything, some = encode(whole, engines.CPU), encode(part, engines.CPU)
    assert len(some.data) < len(everything.data) / 2
    assert everything.chosen.frames.tolist() == [0, 10, 29, 39]  # 0-9, 20-29, 30-39 and 50-59 of 60
    assert some.chosen.frames.max() < 20


KEYS = "keyint=10:min-keyint=10:scenecut=0"


@pytest.mark.parametrize(
    ("name", "codec", "options", "closed"),
    [
        ("idr.mp4", "libx264", {"g": "10", "bf": "2", "sc_threshold": "0"}, True),
        ("idr.ts", "libx264", {"g": "10", "bf": "2", "sc_threshold": "0"}, True),
        ("open.mp4", "libx264", {"bf": "3", "x264-params": f"open-gop=1:{KEYS}"}, False),
        ("open.ts", "libx264", {"bf": "3", "x264-params": f"open-gop=1:{KEYS}"}, False),
        ("idr-hevc.mp4", "libx265", {"x265-params": f"log-level=error:open-gop=0:{KEYS}"}, True),
        ("idr-hevc.ts", "libx265", {"x265-params": f"log-level=error:open-gop=0:{KEYS}"}, True),
        ("cra-hevc.mp4", "libx265", {"x265-params": f"log-level=error:open-gop=1:{KEYS}"}, False),
        ("av1.mp4", "libsvtav1", {"preset": "10", "g": "10"}, True),
        ("vp8.webm", "libvpx", QUICK | {"g": "10"}, True),
        ("mpeg4.mp4", "mpeg4", {"g": "10", "bf": "2"}, False),
    ],
)
@pytest.mark.parametrize("clip", [{}, {"start": 0.5, "end": 2.3}], ids=str)
def test_groups_of_pictures_without_a_wanted_frame_are_left_out_where_closed(
    name: str, codec: str, options, closed: bool, clip, make_video, numbers
) -> None:
    video = make_video(f"groups-{name}", size=STORED, codec=codec, options=options)
    with open_clip(video, 3, **clip) as opened:
        encoded = encode(opened, engines.GPU)
    wanted = numbers(read_frames(video, 3, size=SIZE, **clip))
    with av.open(io.BytesIO(encoded.data.numpy().tobytes())) as copy:
        frames = [frame.to_ndarray(format="rgb24") for frame in copy.decode(video=0)]
    copied = numbers(torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2))
    assert [copied[number] for number in encoded.chosen.frames] == wanted
    groups = {number // 10 for number in wanted}
    between = set(range(min(groups), max(groups) + 1))
    assert len(groups) < len(between)
    there = {number // 10 for number in copied}
    assert there == groups if closed else there >= between


@needs_dali
def test_clips_of_several_sizes_and_lengths_keep_their_order(
    video: Path, make_video, decoder: DaliDecoder, numbers, monkeypatch
) -> None:
    tall = make_video("tall.webm", size=(64, 110), count=30, **ON_CPU["vp9.webm"])
    asked = [(video, 5), (tall, 1), (video, 1), (tall, 8)]
    expected = [numbers(read_frames(path, count, size=SIZE)) for path, count in asked]
    for at_once in (dali.AT_ONCE, 1):
        monkeypatch.setattr(dali, "AT_ONCE", at_once)
        encoded = []
        for path, count in asked:
            with open_clip(path, count) as clip:
                encoded.append(encode(clip, engines.CPU))
        assert [numbers(decoded.frames) for decoded in decoder.decode(encoded)] == expected
    assert decoder.decode([]) == []


@needs_dali
def test_a_frame_past_the_end_is_an_error_not_a_black_frame(vp9: Path, decoder, numbers) -> None:
    with open_clip(vp9, 3) as clip:
        good = encode(clip, engines.CPU)
    end = int(good.chosen.frames[-1])
    long = replace(good, chosen=Choice(np.array([0, end, end + 1], np.int32)))
    first, said, last = decoder.decode([good, long, good])
    assert numbers(first.frames) == numbers(last.frames) == [0, 30, 59]
    assert f"out-of-bounds frame index {end + 1}" in said


@needs_dali
def test_a_change_of_size_is_left_to_pyav(changing_video, decoder: DaliDecoder, numbers) -> None:
    sizes = [STORED, (STORED[0] // 2, STORED[1] // 2)]
    video = changing_video("changing.webm", sizes, codec="libvpx", options=QUICK)
    theirs = read_frames(video, 3, size=SIZE, end=0.4)
    assert numbers(by_dali(video, 3, decoder, end=0.4)) == numbers(theirs)
    for part in ({}, {"start": 0.3, "end": 0.5}, {"start": 0.6}):
        with pytest.raises(Refused) as refused, open_clip(video, 3, **part) as clip:
            encode(clip, engines.CPU)
        assert refused.value.reason == "its frames change size or format"


@needs_dali
@pytest.mark.parametrize(
    ("matrix", "number", "full", "codec"),
    [
        ("bt601", 5, False, "libvpx-vp9"),
        ("bt601", 5, True, "libvpx-vp9"),
        ("bt601", 6, False, "libvpx-vp9"),
        ("bt601", 2, False, "libvpx-vp9"),
        ("bt601", 5, True, "mjpeg"),
        ("bt601", 5, False, "libvpx"),
        ("bt709", 1, False, "libvpx-vp9"),
        ("bt709", 1, True, "libvpx-vp9"),
        ("bt2020", 9, False, "libvpx-vp9"),
    ],
)
def test_saturated_colours_are_right_or_left_to_pyav(
    matrix: str, number: int, full: bool, codec: str, decoder: DaliDecoder, flat_video
) -> None:
    path, exact = flat_video(matrix, number, full, codec)
    theirs = read_frames(path, len(exact), size=SIZE)
    assert (theirs - exact).abs().max() <= 3
    if matrix == "bt601":
        assert (by_dali(path, len(exact), decoder) - exact).abs().max() <= 3
        return
    with pytest.raises(Refused) as refused, open_clip(path, 2) as clip:
        encode(clip, engines.CPU)
    assert refused.value.reason == f"{matrix} colours"


def test_what_dali_cannot_decode_is_refused(h264: Path, make_video) -> None:
    uncounted = make_video("dali.avi", codec="mjpeg", pixel_format="yuvj420p")
    full = make_video("full.webm", codec="libvpx-vp9", pixel_format="yuv444p", count=3)
    odd = make_video("odd.webm", size=(47, 33), count=3, **ON_CPU["vp9.webm"])
    for path, engine, reason in [
        (h264, engines.CPU, "h264 on the CPU"),
        (uncounted, engines.CPU, "no times of showing in the file"),
        (full, engines.GPU, "yuv444p pixels on the GPU"),
        (odd, engines.GPU, "a width or height that is odd"),
    ]:
        with pytest.raises(Refused) as refused, open_clip(path, 2) as clip:
            encode(clip, engine)
        assert refused.value.reason == reason


# --- loaders --------------------------------------------------------------------------------

Load = Callable[..., ClipLoader]


@pytest.fixture(scope="module")
def clips(make_video) -> list[Clip]:
    """Clips that overlap, of VP9, H.264 and VP8 in turn."""
    videos = [
        make_video("dali-vp9.webm", size=STORED, **ON_CPU["vp9.webm"]),
        make_video("dali-h264.mp4", size=STORED, options={"g": "10", "bf": "2"}),
        make_video("dali-vp8.webm", size=STORED, **ON_CPU["vp8.webm"]),
    ]
    return [
        Clip(
            videos[i % 3],
            start=0.1 * i,
            end=0.1 * i + 0.6,
            text=(f"text {i}", f"other {i}"),
            subtitle=f"speech {i}",
            caption=f"picture {i}" if i % 4 else None,
            line=i + 1,
        )
        for i in range(18)
    ]


def loader_options(tokenizer: Any, **options: Any) -> LoaderOptions:
    settings: dict[str, Any] = {
        "tokenizer": tokenizer,
        "image_size": SIZE,
        "num_frames": 3,
        "text_length": 16,
        "task": "retrieval",
        "seed": 3,
    }
    return LoaderOptions(**(settings | options))


@pytest.fixture
def load(clips: list[Clip], tokenizer: Any) -> Load:
    def make(
        given: list[Clip] | None = None, *, training: bool = True, **options: Any
    ) -> ClipLoader:
        settings = {"batch_size": 6, "max_bad_share": 0.2, "decoder": "dali", **options}
        return build_loader(
            given or clips, loader_options(tokenizer, **settings), training=training
        )

    return make


def alike(ours: list[Batch], theirs: list[Batch], numbers: Callable[[Tensor], list[int]]) -> bool:
    """Equal, except for the differences allowed between pixels."""
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for key in mine:
            if mine[key].ndim == 4:
                assert numbers(mine[key]) == numbers(other[key]), key
            else:
                assert torch.equal(mine[key], other[key]), key
    return True


@needs_dali
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("task", ["retrieval", "omnisource"])
@pytest.mark.parametrize("training", [True, False])
def test_either_decoder_gives_the_same_batches(
    training: bool, task: str, workers: int, load: Load, numbers
) -> None:
    options: dict[str, Any] = {"task": task, "training": training, "sampling": "fps:4"}
    ours, theirs = load(num_workers=workers, **options), load(decoder="pyav", **options)
    for epoch in (0, 1):
        ours.set_epoch(epoch)
        theirs.set_epoch(epoch)
        assert alike(list(ours), list(theirs), numbers)
    assert ours.decoded == {"DALI": 24, "PyAV (h264 on the CPU)": 12}
    assert theirs.decoded == {"PyAV": 36}


@needs_dali
def test_either_decoder_gives_the_same_batches_of_shards(
    clips: list[Clip], tokenizer: Any, tmp_path: Path, numbers
) -> None:
    Image.fromarray(np.full((20, 30, 3), 200, np.uint8)).save(tmp_path / "a.png")
    lines = [
        {"video": str(c.video), "start": c.start, "end": c.end, "subtitle": c.subtitle}
        for c in clips
    ]
    lines += [{"video": "a.png", "caption": "picture"}] * 3
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = [
        write_shards(tmp_path / "a.jsonl", tmp_path / name, clips_per_shard=5, cut=name == "cut")
        for name in ("whole", "cut")
    ]
    assert all(made)
    for name in ("whole", "cut"):
        settings: dict[str, Any] = {
            "tokenizer": tokenizer,
            "image_size": SIZE,
            "num_frames": 3,
            "text_length": 16,
            "task": "omnisource",
            "batch_size": 5,
            "seed": 3,
        }
        shards = Shards([Source(str(tmp_path / name))])
        theirs = list(build_shard_loader(shards, LoaderOptions(**settings), shuffle=4))
        for workers in (0, 2):
            options = LoaderOptions(decoder="dali", num_workers=workers, **settings)
            ours = build_shard_loader(shards, options, shuffle=4)
            assert alike(list(ours), theirs, numbers)
            assert ours.decoded["DALI"] > 8 and ours.decoded["PyAV (h264 on the CPU)"] > 4


@needs_dali
def test_who_decoded_what_is_reported(
    load: Load, clips: list[Clip], tmp_path: Path, caplog
) -> None:
    picture = tmp_path / "picture.png"
    Image.fromarray(np.full((20, 30, 3), 200, np.uint8)).save(picture)
    list(load([*clips, Clip(picture, text=("a",))], training=False))
    assert caplog.messages == [
        "decoding a clip by PyAV (h264 on the CPU); later ones are only counted",
        "decoding a clip by PyAV (an image); later ones are only counted",
        "clips decoded by: DALI 12, PyAV (h264 on the CPU) 6, PyAV (an image) 1",
    ]


HEADER = 12  # bytes of a frame


@pytest.fixture(scope="module")
def ruined(vp9: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole container, in its middle noise behind frames' headers: only decoding finds out."""
    path = tmp_path_factory.mktemp("ruined") / "ruined.webm"
    noise = np.random.default_rng(0)
    with av.open(str(vp9)) as given, av.open(str(path), "w") as out:
        copy = out.add_stream_from_template(given.streams.video[0])
        for count, packet in enumerate(given.demux(video=0)):
            if packet.size > HEADER and 22 <= count < 40:
                spoiled = av.Packet(bytes(packet)[:HEADER] + noise.bytes(packet.size - HEADER))
                for name in ("pts", "dts", "time_base", "is_keyframe"):
                    setattr(spoiled, name, getattr(packet, name))
                packet = spoiled
            if packet.size:
                packet.stream = copy
                out.mux(packet)
    return path


@needs_dali
@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_file_that_only_decoding_finds_costs_no_other_clip(
    workers: int, load: Load, clips: list[Clip], ruined: Path, numbers, tmp_path: Path, caplog
) -> None:
    spoiled = list(clips)
    for training in (True, False):
        # Under another name, since damage that was found is remembered, and DALI not tried again.
        ruined = Path(shutil.copy(ruined, tmp_path / f"{training}.webm"))
        spoiled[4] = Clip(ruined, text=("a",), line=5)
        spoiled[9] = Clip(ruined, text=("b",), line=10)
        listed = tmp_path / f"bad-{training}.jsonl"
        ours = load(spoiled, training=training, num_workers=workers, bad_files=listed)
        theirs = load(spoiled, training=training, decoder="pyav")
        assert alike(list(ours), list(theirs), numbers)
        assert ours.bad_files == theirs.bad_files and len(ours.bad_files) == 1
        (line,) = listed.read_text().splitlines()
        assert json.loads(line)["path"] == str(ruined)
        assert any(f"DALI could not decode {ruined}" in text for text in caplog.messages)
        caplog.clear()


@needs_dali
def test_shards_too_lose_only_the_bad_clip(
    clips: list[Clip], ruined: Path, tokenizer: Any, tmp_path: Path, numbers
) -> None:
    # Written by another tool: ours would have found it out.
    from clipvip.data.shards import tars

    lines = [{"video": str(c.video), "text": list(c.text)} for c in clips[:12]]
    lines[5]["video"] = str(ruined)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tars, "check_decodes", lambda *args, **options: None)
        write_shards(tmp_path / "a.jsonl", tmp_path / "out", clips_per_shard=5, num_workers=0)
    shards = Shards([Source(str(tmp_path / "out"))])
    settings: dict[str, Any] = {"batch_size": 4, "max_bad_share": 0.5}
    ours = build_shard_loader(shards, loader_options(tokenizer, decoder="dali", **settings))
    theirs = build_shard_loader(shards, loader_options(tokenizer, **settings))
    assert alike(list(ours), list(theirs), numbers)
    assert ours.bad_files == theirs.bad_files and len(ours.bad_files) == 1


@needs_dali
@pytest.mark.parametrize("workers", [0, 2])
def test_what_only_dali_cannot_decode_is_no_bad_file_and_is_not_tried_for_ever(
    workers: int, load: Load, monkeypatch, caplog
) -> None:
    wrong = engines.CPU._replace(codecs=engines.CPU.codecs | {"h264"})
    with monkeypatch.context() as patch:
        patch.setattr(loading.loader, "start_engine", lambda decoder: wrong)
        ours = load(num_workers=workers)
    theirs = load(decoder="pyav")
    for epoch in range(2):
        before = ours.decoded.copy()
        ours.set_epoch(epoch)
        theirs.set_epoch(epoch)
        for mine, other in zip(ours, theirs, strict=True):
            assert mine["clip_index"].tolist() == other["clip_index"].tolist()
            assert far(mine["pixel_values"], other["pixel_values"]) < 2
        decoded = ours.decoded - before
        assert decoded["DALI"] == 12 and decoded.total() == 18
    assert decoded == {"DALI": 12, "PyAV (DALI fails on h264 of 176 × 144)": 6}
    assert ours.decoded["PyAV (DALI could not)"] >= dali.FAILURES and not ours.bad_files
    said = [text for text in caplog.messages if "PyAV decodes these clips" in text]
    assert len(said) == 1 and said[0].startswith("DALI fails on h264 of 176 × 144 (DALI: ")


@needs_dali
def test_leaving_an_epoch_early_does_not_disturb_the_next(load: Load, numbers) -> None:
    loader = load(num_workers=2)
    next(iter(loader))
    assert alike(list(loader), list(load(decoder="pyav")), numbers)


@needs_dali
def test_memory_and_handles_stay_as_they_are(load: Load) -> None:
    loader = load(num_workers=2)

    def used() -> tuple[int, int]:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return len(os.listdir("/proc/self/fd")), pages * os.sysconf("SC_PAGE_SIZE")

    def epochs(count: int) -> tuple[int, int]:
        for _ in range(count):
            for _ in loader:
                pass
        return used()

    handles, memory = epochs(10)
    later_handles, later_memory = epochs(30)
    assert later_handles <= handles
    assert later_memory < memory + 20e6


# --- which decoder --------------------------------------------------------------------------


def test_dali_where_it_is_not_installed_is_an_error_that_says_what_to_do(
    load: Load, monkeypatch
) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(DaliError, match=r'which is not installed: pip install "clipvip\[dali\]"$'):
        load()
    assert choose_engine("auto") is None
    with pytest.raises(ValueError, match="decoder is 'nvdec'; expected one of auto, dali, pyav"):
        choose_engine("nvdec")


def test_auto_is_dali_only_where_a_gpu_can_decode(monkeypatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: True)
    for gpu, engine in [(False, True), (True, False), (True, True)]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
        monkeypatch.setattr(engines, "_has_nvdec", lambda engine=engine: engine)
        chosen = choose_engine("auto")
        assert (chosen is not None) == (gpu and engine)
    assert chosen is not None and "h264" in chosen.codecs and "av1" not in chosen.codecs
    assert choose_engine("pyav") is None
    monkeypatch.setattr(engines, "_has_nvdec", lambda: False)
    with pytest.raises(DaliError, match="NVIDIA_DRIVER_CAPABILITIES=compute,utility,video"):
        choose_engine("dali")


# --- where it cannot start ------------------------------------------------------------------


@pytest.fixture
def unstarted(monkeypatch) -> Iterator[pytest.MonkeyPatch]:
    """A process that has not started DALI yet."""
    engines._problems.cache_clear()
    engines._warn_once.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    engines._problems.cache_clear()


def _no_session(*given: Any) -> None:
    raise RuntimeError("Critical error in pipeline:\nencountered:\n\nno session\nStacktrace (9)")


@needs_dali
@pytest.mark.parametrize("fails", ["_build", "_run"])
def test_auto_leaves_to_pyav_what_dali_cannot_start(
    fails: str, device: str, load: Load, clips: list[Clip], numbers, caplog, unstarted
) -> None:
    if device == "cpu":
        unstarted.setattr(engines, "choose_engine", lambda decoder: engines.CPU)
    unstarted.setattr(DaliDecoder, fails, _no_session)
    ours, again = load(decoder="auto", num_workers=2), load(decoder="auto")
    line = "DALI cannot start (DALI: no session): PyAV decodes all clips"
    assert caplog.messages == [line]
    theirs = list(load(decoder="pyav"))
    assert alike(list(ours), theirs, numbers) and alike(list(again), theirs, numbers)
    assert ours.decoded == again.decoded == {"PyAV": 18}
    assert caplog.messages == [line]


@needs_dali
@pytest.mark.parametrize("fails", ["_build", "_run"])
def test_dali_that_was_asked_for_and_cannot_start_is_an_error_of_one_line(
    fails: str, device: str, load: Load, unstarted
) -> None:
    unstarted.setattr(DaliDecoder, fails, _no_session)
    said = 'decoder is "dali", which cannot start (DALI: no session); use auto or pyav'
    with pytest.raises(DaliError, match=f"^{re.escape(said)}$"):
        load()


@needs_dali
def test_libraries_that_cannot_be_loaded_are_a_reason_too(caplog, unstarted) -> None:
    def unloaded(*given: Any) -> None:
        raise OSError("libnvidia-encode.so.1: cannot open shared object file")

    unstarted.setattr(DaliDecoder, "_build", unloaded)
    unstarted.setattr(engines, "choose_engine", lambda decoder: engines.CPU)
    assert engines.start_engine("auto") is None
    (line,) = caplog.messages
    assert "libnvidia-encode.so.1: cannot open shared object file" in line and "\n" not in line


# --- on a GPU -------------------------------------------------------------------------------


@needs_dali
@pytest.mark.parametrize("name", ON_GPU)
@pytest.mark.parametrize("clip", [{}, {"start": 0.9, "end": 1.7}, {"with_middle": True}], ids=str)
def test_which_frames_on_a_gpu(name: str, clip, cuda: str, make_video, numbers) -> None:
    """DALI decodes a codec right, or it is found out when it starts."""
    video = make_video(f"dali-{name}", size=STORED, **ON_GPU[name])
    engine = engines.start_engine("dali")
    assert engine is not None and {"h264", "hevc"} <= engine.codecs
    with open_clip(video, 7, **clip) as opened:
        codec = opened.video.stream.codec_context.codec.canonical_name
        if codec not in engine.codecs:
            with pytest.raises(Refused, match=f"{codec} on the GPU"):
                encode(opened, engine)
            return
    ours = by_dali(video, 7, DaliDecoder(SIZE, engine), **clip)
    assert ours.is_cuda
    assert numbers(ours.cpu()) == numbers(by_pyav(video, 7, **clip))


@needs_dali
@pytest.mark.parametrize("name", ["bikes", "bigbuckbunny"])
def test_frames_on_a_gpu_are_pyavs(name: str, cuda: str, real_clips) -> None:
    ours = by_dali(real_clips[name], 12, DaliDecoder(224, engines.GPU))
    assert far(ours.cpu(), read_frames(real_clips[name], 12, size=224)) < 2 * MEAN


@needs_dali
@pytest.mark.parametrize("size", [(640, 360), (640, 352)], ids=str)
def test_frames_on_a_gpu_are_pyavs_whatever_size_they_are_coded_in(
    size: tuple[int, int], cuda: str, make_video, numbers
) -> None:
    video = make_video(f"dali-{size[1]}.mp4", size=size, options={"g": "10", "bf": "2"})
    ours = by_dali(video, 7, DaliDecoder(SIZE, engines.GPU)).cpu()
    theirs = by_pyav(video, 7)
    assert numbers(ours) == numbers(theirs) and far(ours, theirs) < 2 * MEAN


@needs_dali
def test_a_gpu_gives_the_same_batches(cuda: str, load: Load, numbers, ruined: Path, clips) -> None:
    spoiled = [*clips[:4], Clip(ruined, text=("a",), line=5), *clips[5:]]
    ours = load(spoiled, num_workers=2)
    batches = list(ours)
    assert all(batch["pixel_values"].is_cuda for batch in batches)
    on_cpu = [{key: value.cpu() for key, value in batch.items()} for batch in batches]
    assert alike(on_cpu, list(load(spoiled, decoder="pyav")), numbers)
    engine = engines.start_engine("dali")
    assert engine is not None
    assert ours.decoded["DALI"] >= 6 * len(engine.codecs & {"h264", "vp8", "vp9"}) - 1


@needs_dali
@pytest.mark.parametrize("task", ["retrieval", "omnisource"])
def test_batches_stay_what_they_are_while_their_device_is_busy_and_reuses_memory(
    task: str, device: str, load: Load, numbers
) -> None:
    ours, theirs = load(task=task, num_workers=2), load(task=task, decoder="pyav")
    on_gpu = device == "cuda"
    streams = [torch.cuda.Stream() for _ in range(3)] if on_gpu else []
    factor = torch.rand(4096, 4096, device=device) if on_gpu else torch.rand(64, 64)

    def sums(batch: Batch) -> Tensor:
        return torch.stack([x.long().sum().to(device) for x in batch.values()])

    def compute(like: Tensor) -> None:
        """Work that takes memory of the batch's sizes, writes to it and leaves it."""
        for _ in range(8):
            torch.full_like(like, 255)
            factor @ factor

    for epoch in range(4):
        ours.set_epoch(epoch)
        theirs.set_epoch(epoch)
        kept, dropped = [], []
        for batch in ours:
            for stream in streams:
                with torch.cuda.stream(stream):
                    compute(batch["pixel_values"])
            kept.append((batch, sums(batch)))
        for batch, before in kept:
            assert torch.equal(sums(batch), before)
        on_cpu = [{key: value.cpu() for key, value in batch.items()} for batch, _ in kept]
        assert alike(on_cpu, list(theirs), numbers)
        ours.set_epoch(epoch)
        for batch in ours:  # each is let go while what reads it waits for other work
            compute(batch["pixel_values"])
            dropped.append(sums(batch))
        for again, (_, before) in zip(dropped, kept, strict=True):
            assert torch.equal(again, before)


@needs_dali
@pytest.mark.parametrize("size", [(640, 360), (298, 224), (1920, 1080)], ids=str)
def test_memory_of_a_gpu_is_flat_over_200_batches(
    size: tuple[int, int], cuda: str, make_video, load: Load
) -> None:
    options = {"preset": "ultrafast", "g": "10"}
    video = make_video(f"flat-{size[0]}.mp4", size=size, count=30, options=options)
    clips = [Clip(video, start=0.01 * i, text=("a",), line=i + 1) for i in range(40)]
    loader = load(clips, batch_size=4, num_workers=2)
    free = []
    for epoch in range(20):
        loader.set_epoch(epoch)
        for batch in loader:
            assert batch["pixel_values"].is_cuda
        torch.cuda.synchronize()
        free.append(torch.cuda.mem_get_info()[0])
    assert loader.decoded == {"DALI": 800}
    assert min(free[10:]) > free[4] - 64e6
