"""Clips that PyAV decodes in place of DALI, for wrong frames, damage or failures; DALI's memory."""

import io
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.bitstream import BitStreamFilterContext
from torch import Tensor

from clipvip.data.video import dali, engines, headers
from clipvip.data.video.container import File, open_file
from clipvip.data.video.dali import DaliDecoder, Encoded, Refused, encode
from clipvip.data.video.decode import Frames, open_clip, read_frames
from clipvip.data.video.engines import start_engine
from clipvip.ops.resize_crop import RESIZES, resize_frames

needs_dali = pytest.mark.skipif(
    find_spec("nvidia") is None or find_spec("nvidia.dali") is None,
    reason='NVIDIA DALI is not installed: pip install "clipvip[dali]"',
)
SIZE = 32
STORED = (176, 144)
QUICK = {"deadline": "realtime", "cpu-used": "8", "g": "10"}


def encoded(path: Path, num_frames: int = 3, engine: dali.Engine = engines.GPU, **clip) -> Encoded:
    with open_clip(path, num_frames, **clip) as opened:
        return encode(opened, engine)


def stored_frames(clip: Encoded) -> Tensor:
    """All frames of the copy for DALI, by PyAV: uint8 [F, 3, H, W]."""
    with av.open(io.BytesIO(clip.data.numpy().tobytes())) as copy:
        frames = [frame.to_ndarray(format="rgb24") for frame in copy.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


# --- codecs are tried before they are left to DALI --------------------------------------------


class Gpu:
    """Stands for DALI on a GPU; gives the frame before the wanted one for the codecs in `late`."""

    late: frozenset[str] = frozenset()

    def __init__(self, size: int, engine: dali.Engine) -> None:
        self.size = size

    def decode(self, clips: Sequence[Encoded]) -> list[Frames | str]:
        return [self._decode(clip) for clip in clips]

    def _decode(self, clip: Encoded) -> Frames:
        numbers = np.maximum(clip.chosen.positions - (clip.kind[0] in self.late), 0)
        frames = stored_frames(clip)[numbers, :, : clip.height, : clip.width]
        return Frames(resize_frames(frames.contiguous(), self.size, "crop"))


@pytest.fixture
def gpu(monkeypatch) -> Iterator[type[Gpu]]:
    """A machine with a GPU, on which DALI has not been tried yet."""
    engines._problems.cache_clear()
    engines._warn_once.cache_clear()
    monkeypatch.setattr(engines, "choose_engine", lambda decoder: engines.GPU)
    monkeypatch.setattr(engines, "DaliDecoder", Gpu)
    monkeypatch.setattr(Gpu, "late", frozenset())
    yield Gpu
    engines._problems.cache_clear()


def test_codecs_whose_frames_are_pyavs_are_left_to_dali(gpu: type[Gpu], caplog) -> None:
    assert start_engine("auto") == start_engine("dali") == engines.GPU
    assert not caplog.messages


def test_codecs_whose_frames_shift_are_left_to_pyav(gpu: type[Gpu], caplog) -> None:
    gpu.late = frozenset({"av1", "vp9"})
    for decoder in ("auto", "dali"):
        engine = start_engine(decoder)
        assert engine is not None and engine.codecs == engines.GPU.codecs - gpu.late
    for said, codec in zip(caplog.messages, sorted(gpu.late), strict=True):
        assert said.startswith(f"DALI cannot decode {codec} (1")
        assert said.endswith(" of 12 frames of a test clip are wrong): PyAV decodes it")


def test_codecs_that_cannot_be_tried_are_left_to_pyav(gpu, caplog, monkeypatch) -> None:
    monkeypatch.setitem(engines.ENCODERS, "h264", ("unbuilt", {}))
    engine = start_engine("auto")
    assert engine is not None and engine.codecs == engines.GPU.codecs - {"h264"}
    (said,) = caplog.messages
    assert said.startswith(
        "DALI cannot decode h264 (no test clip could be made: UnknownCodecError("
    )


@needs_dali
def test_a_codec_that_dali_does_not_know_is_left_to_pyav(monkeypatch, caplog) -> None:
    known = engines.CPU._replace(codecs=engines.CPU.codecs | {"h264"})
    monkeypatch.setattr(engines, "choose_engine", lambda decoder: known)
    assert start_engine("dali") == engines.CPU
    (said,) = caplog.messages
    assert said.startswith("DALI cannot decode h264 (DALI: ")


@pytest.mark.parametrize("codec", sorted(engines.ENCODERS))
def test_codecs_are_tried_on_frames_out_of_order_and_hidden_frames(codec: str) -> None:
    with open_file(File(Path(f"{codec}.mkv"), engines._sample(codec))) as video:
        packets = [packet for packet in video.packets() if packet.size]
        head = video.stream.codec_context.extradata or b""
    times = [packet.pts for packet in packets]
    assert len(packets) == engines.SAMPLE_FRAMES
    assert (times != sorted(times)) == (codec in ("h264", "hevc", "mpeg4"))
    if codec in ("vp9", "av1"):
        read: Callable = headers._vp9 if codec == "vp9" else headers._Av1(head)
        assert any(len(read(bytes(packet))) > 1 for packet in packets)
        assert min(packet.size for packet in packets) <= 3  # shows a frame that came before


# --- what is refused for a GPU ----------------------------------------------------------------


def refusal(path: Path, **clip: Any) -> str:
    with pytest.raises(Refused) as refused:
        encoded(path, **clip)
    return refused.value.reason


def test_packets_that_came_damaged_are_left_to_pyav(make_video, tmp_path: Path) -> None:
    options = {"g": "10", "bf": "2", "crf": "0"}
    whole = make_video("whole.ts", size=STORED, options=options)
    path = tmp_path / "holes.ts"
    data = whole.read_bytes()
    parts = [data[at : at + 188] for at in range(0, len(data), 188)]
    video = [i for i, part in enumerate(parts) if part[1:3] in (b"\x01\x00", b"\x41\x00")]
    del parts[video[len(video) // 2]]
    path.write_bytes(b"".join(parts))
    with av.open(str(path)) as container:
        assert any(packet.is_corrupt for packet in container.demux(video=0))
    assert encoded(whole).kind == ("h264", *STORED)
    with open_clip(path, 60) as clip:
        assert clip.index.lost
        for _ in range(2):
            with pytest.raises(Refused, match="damaged"):
                encode(clip, engines.GPU)
            clip.index = replace(clip.index, lost=())  # as if its tables had been read only


def test_frames_that_wait_for_longer_than_dali_does_are_left_to_pyav(
    make_video, monkeypatch
) -> None:
    video = make_video("late.mp4", size=STORED, options={"bf": "2", "x264-params": "b-adapt=0"})
    assert encoded(video).kind == ("h264", *STORED)
    monkeypatch.setattr(dali, "WAITING", 1)
    assert refusal(video) == "frames out of order"


def test_a_kind_that_dali_fails_on_is_refused_before_a_copy_is_made(
    make_video, monkeypatch
) -> None:
    video = make_video("kind.mp4", size=STORED)
    monkeypatch.setattr(dali, "remux", None)
    engine = engines.GPU._replace(refused=frozenset({("h264", *STORED)}))
    assert refusal(video, engine=engine) == "DALI fails on h264 of 176 × 144"


# --- sizes that are coded larger than shown -----------------------------------------------------


@pytest.mark.parametrize(
    ("name", "codec", "coded"),
    [
        ("cut.mp4", "libx264", (176, 160)),
        ("cut.ts", "libx264", (176, 160)),
        ("cut.mkv", "libx264", (176, 160)),
        ("cut-hevc.mp4", "libx265", (176, 152)),
        ("cut-hevc.ts", "libx265", (176, 152)),
        ("whole.mp4", "libx264", None),
    ],
)
def test_a_gpu_is_given_whole_coded_pictures(
    name: str, codec: str, coded: tuple[int, int] | None, make_video
) -> None:
    options = {"x265-params": "log-level=error"} if codec == "libx265" else {"g": "10", "bf": "2"}
    shown = (174, 150) if coded else STORED
    video = make_video(name, size=shown, codec=codec, options=options)
    clip = encoded(video, 7)
    with av.open(io.BytesIO(clip.data.numpy().tobytes())) as copy:
        stream = copy.streams.video[0]
        assert (stream.width, stream.height) == (coded or shown)
    frames = stored_frames(clip)
    assert (clip.width, clip.height) == shown and frames.shape[:1:-1] == (coded or shown)
    ours = resize_frames(
        frames[clip.chosen.frames, :, : shown[1], : shown[0]].contiguous(), SIZE, "crop"
    )
    theirs = read_frames(video, 7, size=SIZE)
    assert (ours.float() - theirs.float()).abs().mean() < 1.5  # two converters to RGB


def test_pictures_whose_left_or_upper_edge_is_cut_off_are_left_to_pyav(
    make_video, tmp_path: Path
) -> None:
    video, path = make_video("edges.mp4", size=STORED), tmp_path / "edges.mkv"
    with av.open(str(video)) as given, av.open(str(path), "w") as out:
        stream = given.streams.video[0]
        copy = out.add_stream_from_template(stream)
        edit = BitStreamFilterContext("h264_metadata=crop_top=2", stream, copy)
        copy.width, copy.height = STORED[0], STORED[1] - 2
        for packet in given.demux(stream):
            if packet.size:
                for edited in edit.filter(packet):
                    edited.stream = copy
                    out.mux(edited)
    assert refusal(path) == "a cut left or upper edge"


@needs_dali
@pytest.mark.parametrize("resize", RESIZES)
def test_hidden_edges_are_not_shown(resize: str, write_video, tmp_path: Path) -> None:
    width, height = STORED
    pixels = np.full((height, width, 3), 90, np.uint8)
    pixels[: height // 2, : width // 2] = 30
    pixels[height - 16 :] = pixels[:, width - 6 :] = 255  # not to be seen
    video = write_video(tmp_path / "edges.webm", [pixels] * 4, codec="libvpx-vp9", options=QUICK)
    clip = replace(encoded(video, 2, engines.CPU), width=width - 6, height=height - 16)
    (decoded,) = DaliDecoder(64, engines.CPU, resize=resize).decode([clip])
    assert isinstance(decoded, Frames)
    frames = stored_frames(clip)[:2, :, : height - 16, : width - 6].contiguous()
    error = (decoded.frames.float() - resize_frames(frames, 64, resize).float()).abs()
    assert error.mean() < 1 and error.max() < 12


# --- failures, and memory -----------------------------------------------------------------------


class Failing(DaliDecoder):
    """Fails on clips for which `fails` is true, as DALI does: with all clips of the run."""

    def __init__(self, fails: Callable[[Encoded], bool] = lambda clip: True) -> None:
        super().__init__(SIZE, engines.CPU)
        self.fails = fails
        self.runs: list[int] = []
        self.built: list[int] = []
        self.room = 1000  # clips for which there is memory

    def _build(self, most: int) -> object:
        self.built.append(most)
        if most > self.room:
            raise MemoryError("out of memory")
        return object()

    def _run(self, clips: Sequence[Encoded]) -> Tensor:
        self.runs.append(len(clips))
        if any(map(self.fails, clips)):
            raise RuntimeError("no such luck")
        count = sum(len(clip.chosen.positions) for clip in clips)
        return torch.zeros(count, 3, SIZE, SIZE, dtype=torch.uint8)


@pytest.fixture(scope="module")
def vp9(make_video) -> Encoded:
    return encoded(
        make_video("limits.webm", size=STORED, codec="libvpx-vp9", options=QUICK), 3, engines.CPU
    )


def of_width(clip: Encoded, width: int) -> Encoded:
    return replace(clip, kind=("vp9", width, 144))


def test_a_kind_that_only_fails_is_given_up_after_few_runs(vp9: Encoded, caplog) -> None:
    decoder = Failing(lambda clip: clip.kind[1] == 1)
    bad, good = of_width(vp9, 1), of_width(vp9, 2)
    decoded = decoder.decode([bad] * 64)
    assert all(isinstance(each, str) for each in decoded)
    assert len(decoder.runs) < 12  # 127 if each half were tried again to the end
    assert decoder.engine is not None and decoder.engine.refused == {bad.kind}
    (said,) = caplog.messages
    assert said == "DALI fails on vp9 of 1 × 144 (DALI: no such luck): PyAV decodes these clips"
    decoder.runs.clear()
    decoded = decoder.decode([bad, good, bad, good])
    assert decoder.runs == [2]
    assert [isinstance(each, Frames) for each in decoded] == [False, True, False, True]


def test_a_kind_of_which_some_are_decoded_is_not_given_up(vp9: Encoded, caplog) -> None:
    ruined = replace(vp9, data=vp9.data[:100])
    decoder = Failing(lambda clip: clip is ruined)
    decoded = decoder.decode([vp9, *[ruined] * 20, vp9])
    assert [isinstance(each, Frames) for each in decoded] == [True, *[False] * 20, True]
    assert decoder.engine == engines.CPU and not caplog.messages


def test_dali_is_given_up_when_all_kinds_fail(vp9: Encoded, caplog) -> None:
    decoder = Failing()
    for first in range(0, 400, 8):
        clips = [of_width(vp9, first + i) for i in range(8)]
        assert all(isinstance(each, str) for each in decoder.decode(clips))
    assert len(decoder.runs) < 3 * dali.IN_A_ROW
    assert decoder.engine is None
    (said,) = caplog.messages
    assert said == (
        "DALI failed on 32 clips in a row (DALI: no such luck): PyAV decodes all clips from here on"
    )


def test_failures_now_and_then_do_not_add_up(vp9: Encoded) -> None:
    decoder = Failing(lambda clip: clip.kind[1] > 0)
    for width in range(1, 2 * dali.IN_A_ROW):
        decoder.decode([of_width(vp9, width), of_width(vp9, 0)])
    assert decoder.engine == engines.CPU


def test_more_clips_than_there_is_memory_for_are_decoded_in_parts(vp9: Encoded) -> None:
    decoder = Failing(lambda clip: False)
    decoder.room = 3
    for _ in range(2):
        assert all(isinstance(each, Frames) for each in decoder.decode([vp9] * 8))
    assert max(decoder.runs) <= 3
    decoder.room = 0
    decoder._pipeline = None
    assert decoder.decode([vp9]) == ["DALI: out of memory"]


def test_a_pipeline_that_failed_holds_no_memory_while_the_next_ones_decode(vp9: Encoded) -> None:
    class Pipeline:
        def run(self, clips: int) -> None:
            frames = self, [0] * clips  # as those of a whole batch, on the GPU
            if len(frames[1]) > 1:
                raise RuntimeError("out of memory")

    class Decoder(Failing):
        def _build(self, most: int) -> Pipeline:
            pipeline = Pipeline()
            built.append(weakref.ref(pipeline))
            return pipeline

        def _run(self, clips: Sequence[Encoded]) -> Tensor:
            alive.append(sum(made() is not None for made in built))
            self._pipeline.run(len(clips))
            return super()._run(clips)

    built: list[weakref.ref] = []
    alive: list[int] = []
    decoder = Decoder(lambda clip: False)
    assert all(isinstance(each, Frames) for each in decoder.decode([vp9] * 8))
    assert len(built) > 3 and set(alive) == {1}


def test_memory_of_clips_decoded_at_once_is_bounded(vp9: Encoded) -> None:
    """With what a GPU holds besides the frames: 8 that wait to be shown, and up to 20 surfaces."""
    for width, height, frames in [(1920, 1080, 12), (1280, 720, 12), (640, 360, 64), (320, 240, 3)]:
        chosen = replace_frames(vp9, frames)
        clips = [replace(chosen, width=width, height=height) for _ in range(200)]
        portions = list(dali._portions(clips))
        assert sum(map(len, portions)) == len(clips)
        clip = width * height * (3 * (frames + 8) + 20 * 1.5)
        counts = Counter(map(len, portions))
        assert max(counts) * clip <= dali.AT_ONCE
        assert max(counts) * clip > dali.AT_ONCE / 3 or len(portions) == 1


def replace_frames(clip: Encoded, count: int) -> Encoded:
    return replace(clip, chosen=clip.chosen._replace(frames=np.zeros(count, np.int32)))
