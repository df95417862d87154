"""Moments of a video for people to look at: a picture as JPEG, and a short film as MP4 with sound.

Unlike decode.py, this seeks to wherever the container leads and compares nothing, so that any file
is shown quickly. A picture may be some frames off. `plain_copy` is for files that a process with
more to lose is to read: what it returns was written here.
"""

import io
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import torch
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.packet import Packet
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter

from clipvip.data.video.container import (
    Blob,
    DecodeError,
    Video,
    as_decode_errors,
    file_of,
    is_image,
    open_video,
)
from clipvip.data.video.decode import UNSTABLE, open_clip
from clipvip.data.video.pictures import fit, upright_rgb
from clipvip.data.video.pixels import ONE_THREAD, open_image, orientation, rgb_of, turned
from clipvip.data.video.strategies import Mismatch

FRAME_RATE = 30  # of a film, at most
SOUND_RATE = 48_000
MARGIN = 10.0  # seconds
TICKS = Fraction(1, 90_000)
# Fast rather than small: a person waits, and the film is sent to the same machine.
CODING = {"crf": "26", "preset": "ultrafast", "threads": "1", "g": "60"}
# A copy keeps more frames than models read, and more pixels.
COPIED, COPIED_HEIGHT, COPIED_SIDE = 48, 448, 2048
COPY_CODING = {"crf": "12", "preset": "ultrafast", "threads": "1", "g": "1"}


def picture_of(
    path: Path, start: float | None = None, end: float | None = None, *, side: int = 320
) -> bytes:
    """Return one frame of the moment [start, end) as JPEG, at most `side` pixels wide and high.

    It is the keyframe before the middle of the moment, or the first frame where that keyframe lies
    before `start`. start, end: seconds; None for the file's own. Raises DecodeError.
    """
    from PIL import Image

    if is_image(path):
        with as_decode_errors(path), open_image(file_of(path)) as opened:
            opened.draft("RGB", (side, side))  # decodes a large JPEG at a fraction of its size
            image = Image.fromarray(rgb_of(opened))
    else:
        with open_video(path) as video:
            image = Image.fromarray(upright_rgb(video, _frame_in(video, start, end), side))
    image.thumbnail((side, side), Image.Resampling.BICUBIC)
    written = io.BytesIO()
    image.save(written, "JPEG", quality=80)
    return written.getvalue()


def film_of(path: Path, start: float, end: float, *, height: int = 480) -> bytes:
    """Return [start, end) seconds of a video as H.264 and AAC in MP4, at most `height` pixels high.

    Sound that cannot be read is left out. Raises DecodeError.
    """
    try:
        return _film(path, start, end, height, with_sound=True)
    except DecodeError:
        return _film(path, start, end, height, with_sound=False)


def plain_copy(path: Path) -> Blob:
    """Return an image as PNG, or evenly spread frames of a video as MP4, for a model to read.

    Raises DecodeError.
    """
    from PIL import Image

    written = io.BytesIO()
    if is_image(path):
        with as_decode_errors(path), open_image(file_of(path)) as opened:
            image = Image.fromarray(rgb_of(opened))
        image.thumbnail((COPIED_SIDE, COPIED_SIDE), Image.Resampling.BICUBIC)
        image.save(written, "PNG", compress_level=1)
        return Blob("copy.png", written.getvalue())
    with open_clip(path, COPIED) as clip:
        for frames in clip.attempts():
            written = io.BytesIO()
            with suppress(Mismatch), av.open(written, "w", format="mp4") as out:
                pictures = _Pictures(clip.video, out, COPIED_HEIGHT, COPY_CODING)
                for position, (_, frame) in enumerate(frames):
                    pictures.add(frame, position / 10)
                pictures.finish()
                break
        else:
            raise DecodeError(path, UNSTABLE)
    return Blob("copy.mp4", written.getvalue())


# --- pictures -------------------------------------------------------------------------------


def _frame_in(video: Video, start: float | None, end: float | None) -> VideoFrame:
    first = start or 0.0
    last = end if end is not None else _duration(video)
    _seek(video, (first + max(last, first)) / 2)
    found = _first_from(video, first)
    if found is None:  # seeking led to the file's end
        with video.reopened() as again:
            found = _first_from(again, first)
    if found is None:
        raise DecodeError(video.path, "no frames in it")
    return found


def _first_from(video: Video, first: float) -> VideoFrame | None:
    """Return the next frame at or after `first` seconds, or the last one; None at the end."""
    found = None
    for seconds, found in _frames(video, video.packets()):  # noqa: B007
        if seconds is None or seconds >= first:
            break
    return found


def _duration(video: Video) -> float:
    """Return the length in seconds that the header states, 0 where it states none."""
    return (video.container.duration or 0) / av.time_base


# --- films ----------------------------------------------------------------------------------


def _film(path: Path, start: float, end: float, height: int, with_sound: bool) -> bytes:
    buffer = io.BytesIO()
    with open_video(path) as video, av.open(buffer, "w", format="mp4") as out:
        pictures = _Pictures(video, out, height)
        sound = _Sound(video, out) if with_sound and video.container.streams.audio else None
        read = [video.stream, *([sound.read] if sound else [])]
        _seek(video, start)
        began = False
        for packet in _demuxed(video, read):
            if sound and packet.stream is sound.read:
                sound.add(packet, start, end)
                continue
            late = False
            for seconds, frame in _frames(video, iter([packet])):
                # Times that are not known are taken to go on from the last one.
                shown = pictures.next if seconds is None else seconds - start
                late = shown >= end - start
                if shown >= -1e-3 and not late:
                    began |= pictures.add(frame, shown)
            if late:
                break
        if not began:
            raise DecodeError(path, "no frames in this part of it")
        pictures.finish()
        if sound:
            sound.finish()
    return buffer.getvalue()


class _Pictures:
    """The frames of a film, to be encoded as H.264."""

    def __init__(
        self, video: Video, out: Any, height: int, coding: dict[str, str] = CODING
    ) -> None:
        self.video, self.out, self.height = video, out, height
        self.stream = out.add_stream("libx264", rate=FRAME_RATE, options=coding)
        self.stream.pix_fmt = "yuv420p"
        self.stream.codec_context.time_base = self.stream.time_base = TICKS
        self.reformatter = VideoReformatter()
        self.next = 0.0  # the time before which no further frame is wanted

    def add(self, frame: VideoFrame, seconds: float) -> bool:
        """Encode a frame shown at `seconds`, unless it follows the last one too closely."""
        if seconds < self.next - 1e-3:
            return False
        self.next = max(self.next + 1 / FRAME_RATE, seconds)
        upright = self._upright(frame)
        if not self.stream.codec_context.is_open:
            self.stream.width, self.stream.height = upright.width, upright.height
            self.stream.codec_context.colorspace = int(frame.colorspace)
            self.stream.codec_context.color_range = int(upright.color_range)
        if (upright.width, upright.height) != (self.stream.width, self.stream.height):
            upright = self._reformat(upright, self.stream.width, self.stream.height, "yuv420p")
        upright.pts, upright.time_base = round(max(seconds, 0.0) / TICKS), TICKS
        upright.pict_type = PictureType.NONE  # for the encoder to choose
        self.out.mux(self.stream.encode(upright))
        return True

    def finish(self) -> None:
        self.out.mux(self.stream.encode())

    def _upright(self, frame: VideoFrame) -> VideoFrame:
        turn = orientation(frame)
        width, height = fit(self.video, frame, self.height * 16 // 9, self.height)
        if turn[0]:
            width, height = fit(self.video, frame, self.height, self.height * 16 // 9)
        width, height = (side + side % 2 for side in (width, height))
        if not any(turn):
            return self._reformat(frame, width, height, "yuv420p")
        planes = torch.from_numpy(self._reformat(frame, width, height, "yuv444p").to_ndarray())
        upright = VideoFrame.from_ndarray(turned(planes, turn).contiguous().numpy(), "yuv444p")
        return self._reformat(upright, upright.width, upright.height, "yuv420p")

    def _reformat(self, frame: VideoFrame, width: int, height: int, pixels: str) -> VideoFrame:
        return self.reformatter.reformat(
            frame, width, height, pixels, interpolation=Interpolation.BILINEAR, **ONE_THREAD
        )


class _Sound:
    """The sound of a film, to be encoded as AAC in stereo."""

    def __init__(self, video: Video, out: Any) -> None:
        self.out = out
        self.read = video.container.streams.audio[0]
        self.zero = _zero(video)
        self.stream = out.add_stream("aac", rate=SOUND_RATE, layout="stereo")
        self.resampler = AudioResampler("fltp", "stereo", SOUND_RATE)

    def add(self, packet: Packet, start: float, end: float) -> None:
        try:
            frames = packet.decode()
        except av.InvalidDataError:
            return
        for frame in frames:
            if not isinstance(frame, AudioFrame) or frame.time is None:
                continue
            seconds = frame.time - self.zero - start
            if 0 <= seconds < end - start:
                frame.pts, frame.time_base = round(seconds * SOUND_RATE), Fraction(1, SOUND_RATE)
                for sound in self.resampler.resample(frame):
                    self.out.mux(self.stream.encode(sound))

    def finish(self) -> None:
        for sound in self.resampler.resample(None):
            self.out.mux(self.stream.encode(sound))
        self.out.mux(self.stream.encode())


# --- reading --------------------------------------------------------------------------------


def _zero(video: Video) -> float:
    return (video.stream.start_time or 0) * video.tick


def _seek(video: Video, seconds: float) -> None:
    """Go to a keyframe before `seconds`, or stay at the start where the file cannot be sought."""
    if not video.seekable:  # it leads somewhere near, and perhaps between keyframes
        seconds -= MARGIN
    offset = (video.stream.start_time or 0) + int(seconds / video.tick)
    if seconds > 0 and offset < 1 << 62:  # the most ticks that libav counts to
        with suppress(av.FFmpegError):
            video.container.seek(offset, stream=video.stream)


def _demuxed(video: Video, streams: list[Any]) -> Iterator[Packet]:
    while True:
        try:
            yield from video.container.demux(*streams)
            return
        except IndexError:  # see Video.packets
            continue


def _frames(video: Video, packets: Iterator[Packet]) -> Iterator[tuple[float | None, VideoFrame]]:
    """Yield the frames in packets with their seconds, None where a file does not say. Packets that
    cannot be decoded are skipped."""
    zero = _zero(video)
    for packet in packets:
        try:
            frames = packet.decode()
        except av.InvalidDataError:
            continue
        for frame in frames:
            if isinstance(frame, VideoFrame):
                yield (None if frame.time is None else frame.time - zero), frame
