"""Tars and manifests of strangers: what is wrong with one costs a clip, or that tar, alone."""

import gzip
import io
import json
import os
import resource
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clipvip.data.loading import LoaderOptions
from clipvip.data.shards import tars, verify_shards
from clipvip.data.shards.manifest import ShardError, load_manifest
from clipvip.data.shards.plan import Shards, Source
from clipvip.data.shards.stream import build_shard_loader
from clipvip.data.shards.tars import Packed, open_url, read_samples, unpack
from clipvip.data.video import DecodeError

Members = list[tuple[str, bytes]]
Add = Callable[[tarfile.TarFile], None]


def tar_of(*parts: Members | Add, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for part in parts:
            if callable(part):
                part(tar)
                continue
            for name, data in part:
                add(tar, name, data)
    return buffer.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **facts: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in facts.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data))


def read(data: bytes) -> list[Packed]:
    return list(read_samples(io.BytesIO(data), "x.tar"))


@pytest.fixture
def video(make_video) -> bytes:
    return make_video("tiny.mp4", count=3).read_bytes()


def good(video: bytes, key: str) -> Members:
    return [(f"{key}.mp4", video), (f"{key}.txt", b"words")]


DEEP = b"[" * 100_000 + b"]" * 100_000
JSON: dict[str, bytes] = {
    "deep": DEEP,
    "deep objects": b'{"text":' * 100_000 + b"1" + b"}" * 100_000,
    "a list": b"[]",
    "a number": b"5",
    "null": b"null",
    "not UTF-8": b'{"text": "\xff"}',
    "no JSON": b"{",
    "empty": b"",
    "NUL": b"\0",
    "digits": b'{"start": ' + b"9" * 5000 + b"}",
    "NaN": b'{"start": NaN}',
    "beyond floats": b'{"start": 1e999}',
    "huge": b'{"end": 1' + b"0" * 400 + b"}",
    "texts of numbers": b'{"text": [1, 2]}',
    "text of objects": b'{"text": {"en": "a"}}',
    "caption of a list": b'{"caption": ["a"]}',
    "true": b'{"start": true}',
}
SOURCES: list[Any] = [
    *(None, 5, "youtube", [], [1], {}, {"url": "http://a"}, {"video": 3}),
    *({"video": "v", "line": line} for line in ("1", -1, 1 << 70, 1.5, None, [], True)),
    {"video": "v", "line": 3, "start": "x"},
]


def test_whatever_json_says_costs_its_clip_alone(video: bytes, tmp_path: Path) -> None:
    samples = [[*good(video, f"{i}"), (f"{i}.json", text)] for i, text in enumerate(JSON.values())]
    check_all_but_some(tmp_path, tar_of(*samples, good(video, "right")), len(JSON), 1)


def test_a_source_of_any_kind_costs_nothing(video: bytes, tmp_path: Path) -> None:
    samples = [
        [*good(video, f"{i}"), (f"{i}.json", json.dumps({"source": source}).encode())]
        for i, source in enumerate(SOURCES)
    ]
    (tmp_path / "0.tar").write_bytes(tar_of(*samples))
    clean, manifest = tmp_path / "clean.jsonl", tmp_path / "manifest.jsonl"
    with pytest.raises(ShardError, match="no clip of it can be read and says"):
        verify_shards(str(tmp_path / "0.tar"), clean, manifest, num_workers=0)
    found = verify_shards(str(tmp_path / "0.tar"), None, manifest, num_workers=0)
    assert (found.clips, found.bad) == (len(SOURCES), [])


def check_all_but_some(folder: Path, data: bytes, bad: int, right: int) -> list[str]:
    """Verify and train from a tar; the reasons why clips were left out."""
    (folder / "0.tar").write_bytes(data)
    found = verify_shards(str(folder / "0.tar"), manifest=folder / "manifest.jsonl", num_workers=0)
    assert (found.clips, len(found.bad)) == (bad + right, bad)
    assert [file for file in found.bad if file.path.endswith(".tar")] == []
    ((url, shard),) = load_manifest(str(folder))
    assert (shard.clips, shard.bad) == (bad + right, bad)
    assert verify_shards(str(folder), num_workers=0).bad == found.bad
    with open_url(url) as file:
        unpacked = [outcome(sample) for sample in read_samples(file, url)]
    assert len(unpacked) == bad + right
    return [file.reason for file in found.bad]


def outcome(sample: Packed) -> str | None:
    try:
        unpack(sample, "x.tar")
    except DecodeError as error:
        return error.reason
    return None


@pytest.mark.parametrize("num_workers", [0, 1])
def test_training_skips_unusable_clips_of_other_tools(
    num_workers: int, video: bytes, tokenizer: Any, tmp_path: Path
) -> None:
    bad = [[*good(video, f"{i}"), (f"{i}.json", text)] for i, text in enumerate(JSON.values())]
    bad.append([("twice.mp4", video), *good(video, "twice")])
    right = [good(video, f"r{i}") for i in range(20)]
    check_all_but_some(tmp_path, tar_of(*bad, *right), len(bad), len(right))
    loader = build_shard_loader(
        Shards([Source(str(tmp_path))]),
        LoaderOptions(
            tokenizer=tokenizer,
            image_size=16,
            num_frames=1,
            text_length=8,
            task="retrieval",
            batch_size=2,
            seed=0,
            num_workers=num_workers,
            max_bad_share=1.0,
        ),
    )
    batches = list(loader)
    places = {place for batch in batches for place in batch["clip_index"].tolist()}
    assert places and min(places) >= len(bad)
    assert len(loader.bad_files) >= len(bad) - 1


def linked(name: str, kind: bytes) -> Add:
    return lambda tar: add(tar, name, type=kind, linkname="/etc/passwd", devmajor=1, devminor=5)


KINDS = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_of_any_kind_and_name_cost_their_sample_alone(
    format: int, video: bytes, tmp_path: Path
) -> None:
    long, byte = "x" * 300, os.fsdecode(b"\xff")
    names = ["a/../../b", "/etc/a", "é", long, f"{long}/{long}", byte, "a\nb", "./c", "//d"]
    links = [linked(f"l{i}.mp4", kind) for i, kind in enumerate(KINDS)]
    fine = [good(video, name) for name in names]
    others: Members = [("no suffix", b"x"), (".hidden.mp4", b"x"), ("d/._a.mp4", b"x")]
    others += [("__meta__", b"x"), ("", b"x"), ("..", b"x"), (".mp4", b"x")]
    bad: list[Members] = [
        [("empty.mp4", b"")],
        [("twice.mp4", video), ("twice.MP4", video)],
        [("two.mp4", video), ("two.jpg", video)],
        [("none.txt", b"words")],
        [("cls.cls", b"5")],
        [("deep.json", DEEP)],
    ]
    data = tar_of(*links, *fine, others, *bad, good(video, "last"), format=format)
    reasons = check_all_but_some(tmp_path, data, len(bad), len(names) + 1)
    assert reasons[:2] == ["empty file (0 bytes)", "two members have the suffix .mp4"]
    assert [sample.key for sample in read(data)][: len(names)] == names


def test_names_of_pax_may_hold_anything(video: bytes, tmp_path: Path) -> None:
    def named(key: str) -> Add:
        return lambda tar: add(tar, "x.mp4", video, pax_headers={"path": f"{key}.mp4"})

    keys = ["a\0b", "half \ud83d", "..", "a" * 70_000]
    data = tar_of(*map(named, keys[:1]), good(video, "right"), named(keys[3]))
    check_all_but_some(tmp_path, data, 0, 3)
    assert [sample.key for sample in read(data)] == ["a\0b", "right", keys[3]]


def block(name: str, data: bytes, kind: bytes = tarfile.REGTYPE, size: int | None = None) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data) if size is None else size
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


NONSENSE = {
    "no records": b"nonsense",
    "no length": b" path=a\n",
    "too long": b"99 path=a\n",
    "too short": b"3 path=a\n",
    "nothing": b"0 path=a\n",
    "negative": b"-9 path=a\n",
    "endless": b"9" * 400 + b" path=a\n",
    "no end": b"9 path=ab",
    "size of letters": b"12 size=abc\n",
    "negative size": b"11 size=-5\n",
    "size beyond": b"109 size=" + b"9" * 99 + b"\n",
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_of_pax_costs_its_member(name: str, video: bytes) -> None:
    strange = block("pax", NONSENSE[name], tarfile.XHDTYPE) + block("b.mp4", video)
    data = block("a.mp4", video) + strange + block("c.mp4", video) + bytes(1024)
    found = {sample.key: sample.fault for sample in read(data)}
    assert found == {"a": None, "b": "its pax header is damaged", "c": None}


def test_global_headers_say_nothing_of_members(video: bytes) -> None:
    strange = block("g", b"14 path=b.mp4\n" + NONSENSE["size of letters"], tarfile.XGLTYPE)
    (sample,) = read(strange + block("a.mp4", video) + bytes(1024))
    assert (sample.key, sample.members, sample.fault) == ("a", {"mp4": video}, None)


def sparse(video: bytes) -> bytes:
    """6 GB of holes in the old form of GNU tar, whose map goes on in blocks of its own."""
    info = tarfile.TarInfo("s.mp4")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, len(video)
    head = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    head[386:410] = b"%011o\0%011o\0" % (0, len(video))
    head[482] = 1
    head[483:495] = b"%011o\0" % 6_500_000_000
    head[148:156] = b"        "
    head[148:156] = b"%06o\0 " % sum(head[:512])
    more = bytes(504) + b"\1" + bytes(7) + bytes(512)
    return bytes(head) + more + video + bytes(-len(video) % 512)


def sparse_pax(video: bytes, version: str) -> bytes:
    """The same in the later forms."""
    facts = {"major": version[0], "minor": version[2], "name": "s.mp4", "realsize": 6_500_000_000}
    if version != "1.0":
        facts |= {"map": f"0,{len(video)},6500000000,0", "numblocks": 2, "size": 6_500_000_000}
    holes = b"1\n0\n%d\n" % len(video) if version == "1.0" else b""
    data = holes.ljust(-(-len(holes) // 512) * 512, b"\0") + video
    records = b"".join(record(f"GNU.sparse.{key}", str(value)) for key, value in facts.items())
    return block("pax", records, tarfile.XHDTYPE) + block("GNUSparseFile.1/s.mp4", data)


def record(key: str, value: str) -> bytes:
    text = f" {key}={value}\n".encode()
    return next(b"%d" % n + text for n in range(5, 999) if len(b"%d" % n + text) == n)


def test_holes_are_not_expanded(video: bytes, tmp_path: Path) -> None:
    first, last = block("a.mp4", video), block("z.mp4", video) + bytes(1024)
    forms = [sparse(video), *(sparse_pax(video, version) for version in ("0.0", "0.1", "1.0"))]
    for form in forms:
        found = read(first + form + last)
        assert [(sample.key, sample.fault is None) for sample in found] == [
            ("a", True),
            ("s", False),
            ("z", True),
        ]
        assert found[1].fault is not None and "sparse" in found[1].fault
    check_all_but_some(tmp_path, first + forms[0] + last, 1, 2)


def test_a_compressed_tar_is_refused_unexpanded(video: bytes, tmp_path: Path) -> None:
    data = gzip.compress(tar_of(good(video, "a")))
    (tmp_path / "0.tar").write_bytes(data)
    (tmp_path / "1.tar").write_bytes(tar_of(good(video, "a")))
    source, manifest = f"{tmp_path}/{{0..1}}.tar", tmp_path / "manifest.jsonl"
    found = verify_shards(source, manifest=manifest, num_workers=0)
    ((path, reason, _),) = found.bad
    assert path.endswith("0.tar") and found.clips == 1
    assert reason == "compressed (gzip); only plain tars are read, so decompress it"
    assert [url for url, _ in load_manifest(str(tmp_path))] == [str(tmp_path / "1.tar")]


@pytest.mark.parametrize("suffix", ["txt", "json"])
def test_a_text_as_large_as_a_video_is_not_held(suffix: str, video: bytes, monkeypatch) -> None:
    monkeypatch.setattr(tars, "TEXT_BYTES", 1000)
    long = [("a.mp4", video), (f"a.{suffix}", b" " * 1001)]
    first, second = read(tar_of(long, [("b.mp4", video), (f"b.{suffix}", b" " * 1000)]))
    assert first.fault == f"1001 bytes of .{suffix}; expected at most 1000"
    assert suffix not in first.members or not first.members[suffix]
    assert second.fault is None and len(second.members[suffix]) == 1000


def test_what_no_sample_needs_is_not_held(video: bytes) -> None:
    (sample,) = read(tar_of([("a.mp4", video), ("a.npy", b"x" * 999), ("a.b.mp4", b"x")]))
    assert sample.members == {"mp4": video}


@pytest.mark.parametrize("claimed", [10**7, 1 << 40, (1 << 63) - 1, 1 << 80])
def test_a_claim_of_size_allocates_nothing(claimed: int, video: bytes) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = []
    with pytest.raises(DecodeError, match=r"cut off|damaged"):
        for sample in read_samples(
            io.BytesIO(block("a.mp4", video) + block("b.mp4", video, size=claimed)), "x.tar"
        ):
            found.append(sample.key)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_a_tar_is_read_up_to_its_damage(video: bytes) -> None:
    whole = tar_of(*(good(video, f"{i}") for i in range(4)))
    ends = [0, 1, 511, 512, 700, len(whole) // 2, len(whole) // 2 + 100]
    keys = [sample.key for sample in read(whole)]
    for end in ends:
        found: list[str] = []
        try:
            for sample in read_samples(io.BytesIO(whole[:end]), "x.tar"):
                found.append(sample.key)
        except DecodeError as error:
            assert error.reason.startswith(("cut off", "damaged", "empty", "not a tar"))
        assert found == keys[: len(found)]
    assert read(bytes(10240)) == []
    for data in (b"<html>" * 200, b"\xff" * 2000):
        with pytest.raises(DecodeError, match="not a tar"):
            read(data)


def test_damage_anywhere_is_a_fault_of_the_tar_or_its_clips(video: bytes) -> None:
    whole = tar_of(*(good(video, f"{i}") for i in range(2)), format=tarfile.GNU_FORMAT)
    for at in [*range(0, 512, 3), *range(len(whole) - 10752, len(whole) - 10240, 7)]:
        for value in (0, 0x80, 0xFF):
            data = bytearray(whole)
            data[at] = value
            try:
                for sample in read(bytes(data)):
                    outcome(sample)
            except DecodeError:
                pass


def test_a_pipe_is_no_tar_and_no_manifest(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "0.tar")
    found = verify_shards(str(tmp_path / "0.tar"), manifest=tmp_path / "m.jsonl", num_workers=0)
    assert [file.reason for file in found.bad] == ["a folder, pipe, socket or device, not a file"]
    os.mkfifo(tmp_path / "manifest.jsonl")
    with pytest.raises(ShardError, match="a folder, pipe"):
        load_manifest(str(tmp_path))


@pytest.mark.parametrize("scheme", ["", "file:", "file://", "local:", "local://"])
def test_a_device_is_no_tar_by_any_name(scheme: str, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="a folder, pipe"), open_url(f"{scheme}/dev/zero"):
        pass
    (tmp_path / "a[0].tar").write_bytes(b"12")
    with open_url(f"{scheme}{tmp_path}/a[0].tar") as file:
        assert file.read(3) == b"12"


def test_records_without_end_are_not_kept(video: bytes) -> None:
    """A header of pax for one member may follow another, each with a megabyte of records."""
    headers = [
        block("pax", b"".join(record(f"{n}.{i}", "") for i in range(1000)), tarfile.XHDTYPE)
        for n in range(100)
    ]
    data = b"".join(headers) + block("a.mp4", video) + bytes(1024)
    tracemalloc.start()
    (sample,) = read(data)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (sample.key, sample.members, sample.fault) == ("a", {"mp4": video}, None)
    assert most < 500_000


RIGHT = {"shard": "0.tar", "clips": 1, "bytes": 10240, "sha256": "0" * 64, "texts": 1}
RIGHT |= {"subtitles": 0, "captions": 0, "bad": 0}


@pytest.mark.parametrize(
    "wrong",
    [
        *(
            {"shard": name}
            for name in (
                "",
                "../0.tar",
                "a/../../0.tar",
                "a\0",
                5,
                None,
                [],
                "\ud83d",
                "zip::0.tar",
            )
        ),
        *({"clips": count} for count in (-1, 1.0, "1", None, True, [], 10**30, 21)),
        *({key: 2} for key in ("texts", "subtitles", "captions")),
        *({"bad": bad} for bad in (-1, "0", None)),
        *({"bytes": size} for size in (-1, 0, "10240", None)),
        *({"sha256": digest} for digest in ("", 5, None, "0" * 63, "g" * 64)),
        {"clips": 10**15, "bytes": 10**30},
        {"more": 1},
    ],
    ids=str,
)
def test_a_manifest_of_wrong_types_is_one_error(wrong: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_text(json.dumps(RIGHT) + "\n")
    load_manifest(str(path))
    path.write_text(json.dumps(RIGHT | wrong) + "\n")
    for source in (str(path), str(tmp_path), str(tmp_path / "0.tar")):
        with pytest.raises(ShardError, match=r"manifest\.jsonl:") as caught:
            load_manifest(source)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("line", [DEEP, b"[]", b"5", b"\xff", b"\0", b"{}", b'{"shard": 1e999}'])
def test_a_manifest_of_anything_is_one_error(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(line)
    with pytest.raises(ShardError, match=r"manifest\.jsonl:1: expected a shard"):
        load_manifest(str(path))
