import io
from pathlib import Path

import av
import numpy as np

from clipvip.data.video.mp4 import composition_offsets

B_FRAMES = {"g": "10", "bf": "3", "sc_threshold": "0"}


def test_offsets_are_those_of_the_packets(make_video) -> None:
    for name, options in (("b.mp4", B_FRAMES), ("no_b.mp4", {"bf": "0"})):
        path = make_video(name, options=options)
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            track, packets = stream.id, [p for p in container.demux(stream) if p.size]
        with open(path, "rb") as file:
            offsets = composition_offsets(file, track, len(packets))
            assert composition_offsets(file, track + 1, len(packets)) is None
        assert offsets is not None
        if len(offsets):
            assert np.ptp(offsets - [p.pts - p.dts for p in packets]) == 0
        else:
            assert all(p.pts == p.dts for p in packets)


def test_damage_is_no_more_than_an_absent_table(make_video) -> None:
    path: Path = make_video("b.mp4", options=B_FRAMES)
    data = path.read_bytes()
    movie = data.index(b"moov") - 4
    noise = np.random.default_rng(0)
    for stop in range(0, len(data), 7):
        composition_offsets(io.BytesIO(data[:stop]), 1, 60)
    for _ in range(2000):
        bytes_ = bytearray(data)
        for place in noise.integers(movie, len(data), 3):
            bytes_[place] = noise.integers(256)
        found = composition_offsets(io.BytesIO(bytes_), 1, 60)
        assert found is None or found.dtype == np.int64
    assert composition_offsets(io.BytesIO(b""), 1, 60) is None
    assert composition_offsets(io.BytesIO(noise.bytes(10_000)), 1, 60) is None
