"""The command `clipvip`: parse, call, print."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from clipvip.training.preemption import leave_on_sigterm

if Path(sys.argv[0]).stem == "clipvip" and sys.argv[1:2] == ["train"]:
    leave_on_sigterm()  # before the slow imports

import tyro
from tyro.conf import Positional, arg

from clipvip.data import Decoder
from clipvip.files import shown
from clipvip.terminal import one_line_errors, print_error, safe_output

Model = Annotated[Positional[str], arg(metavar="MODEL")]
INDEXES = (Path("index"), Path("demo/out/clip_vip/index"))
Annotations = Annotated[Positional[Path], arg(metavar="ANNOTATIONS.jsonl")]


def train(
    config: Annotated[Positional[str], arg(metavar="CONFIG")],
    overrides: Annotated[Positional[tuple[str, ...]], arg(metavar="[KEY=VALUE …]")] = (),
    dry_run: bool = False,
    processes: int = 1,
) -> None:
    """Post-pretrain or fine-tune by a configuration.

    Several processes: `torchrun --nproc-per-node 8 -m clipvip.training CONFIG.yaml key=value`.
    On SIGTERM it saves and ends with status 75; resume=latest goes on.

    Args:
        config: A YAML file, or the name of a packaged one (pretrain, msrvtt, didemo, …).
        overrides: Settings that replace the file's, as key=value (optimizer.lr=1e-6).
        dry_run: Print what the run will cost (parameters, tokens, operations, memory, steps) and
            take one step through all its parts on made-up clips, with a model hardly any wide.
        processes: Those that a dry run plans for.
    """
    from clipvip.training.__main__ import main as train_main

    flags = ("--dry-run", "--processes", str(processes)) if dry_run else ()
    train_main([config, *overrides, *flags])


def evaluate(
    model: Model,
    annotations: Annotations,
    out: Path | None = None,
    decoder: Decoder = "auto",
) -> None:
    """Measure text-video retrieval: both directions, with and without dual softmax.

    Args:
        model: A model folder or hub name, which says how videos and texts are read. Of one of the
            authors' .pt files, `clipvip convert` makes a folder.
        annotations: JSON Lines, one clip a line, with `video` and `text`.
        out: Also write the figures to this JSON file.
        decoder: Of the videos; auto is DALI where it and a GPU are, else PyAV.
    """
    from clipvip.training.evaluate import evaluate_checkpoint

    evaluate_checkpoint(model, annotations, out=out, decoder=decoder)


def convert(
    source: Annotated[Positional[str], arg(metavar="SOURCE")],
    destination: Annotated[Positional[Path], arg(metavar="DESTINATION")],
    to: Literal["clipvip", "authors"] = "clipvip",
    tokenizer: str | None = None,
) -> None:
    """Convert a checkpoint: CLIP or the authors' into ours, or ours into the authors' names.

    `clipvip convert pretrain_clipvip_base_32.pt FOLDER --tokenizer openai/clip-vit-base-patch32`
    makes all of a model that reads videos as the authors' code does.

    Args:
        source: A model folder, hub name, or one of the authors' .pt files.
        destination: A folder (to clipvip) or a .pt file (to authors).
        to: The layout to write.
        tokenizer: A folder or hub name whose tokenizer is taken, as the authors' files have none;
            by default the source's.
    """
    from clipvip.convert import convert as convert_checkpoint

    convert_checkpoint(source, destination, to=to, tokenizer=tokenizer)


def embed(
    model: Model,
    videos: Annotated[Positional[tuple[str, ...]], arg(metavar="VIDEOS …")],
    out: Path = Path("index"),
    decoder: Decoder = "auto",
) -> None:
    """Embed one's own videos into an index that can be searched by text.

    `clipvip embed MODEL a.mp4 folder/ 'clips/*.mkv' list.txt annotations.jsonl`

    Args:
        model: A model folder or hub name. A plain CLIP's features of the frames are averaged.
        videos: Videos, images, folders (searched recursively for videos), patterns in quotes,
            lists (.txt, a path per line), annotations (.jsonl).
        out: Where the index goes; videos that are in it and unchanged are not embedded again.
        decoder: Of the videos; auto is DALI where it and a GPU are, else PyAV.
    """
    from clipvip.index import build_index

    build_index(model, videos, out, decoder=decoder)


def search(
    query: Annotated[Positional[str], arg(metavar="QUERY")],
    index: Path | None = None,
    k: Annotated[int, arg(aliases=["-k"])] = 10,
) -> None:
    """Rank the videos of an index by a sentence.

    Args:
        query: What to look for, in words.
        index: A folder that `clipvip embed` made; by default ./index, or where there is none,
            that of the demo.
        k: How many videos to show.
    """
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    from clipvip.index import search as search_index

    index = index or next((path for path in INDEXES if path.is_dir()), INDEXES[0])
    video = Column("video", overflow="fold")
    title = Text(shown(query), style="italic")  # Text, as brackets in a str are markup
    table = Table("rank", "score", video, "seconds", title=title)
    for rank, hit in enumerate(search_index(index, query, k), start=1):
        path = hit.path.relative_to(Path.cwd()) if hit.path.is_relative_to(Path.cwd()) else hit.path
        whole = hit.start is None and hit.end is None
        span = "" if whole else f"{hit.start or 0:g}–{'' if hit.end is None else f'{hit.end:g}'}"
        table.add_row(str(rank), f"{hit.score:.3f}", Text(shown(path)), span)
    Console().print(table)


def prepare(
    kind: Annotated[
        Positional[
            Literal["msrvtt", "didemo", "lsmdc", "activitynet", "hdvila", "captions", "folder"]
        ],
        arg(metavar="SET"),
    ],
    source: Annotated[Positional[Path], arg(metavar="SRC")],
    out: Annotated[Positional[Path], arg(metavar="OUT.jsonl")],
    split: Literal[
        "train", "val", "test", "train-9k", "train-7k", "train-full", "test-1k", "test-full"
    ] = "train",
    videos: Path | None = None,
    first_30s: bool = False,
) -> None:
    """Write annotations of a known data set, or of a folder of videos with texts beside them.

    Videos are found by name anywhere in their folder. Those that are missing are named and left
    out; so is a line or file that cannot be used. `clipvip prepare folder ~/videos mine.jsonl`
    takes x.mp4 with x.txt, a text per line.

    Args:
        kind: msrvtt (its JSON or frozen-in-time's, with lists as CSV, .txt or JSON), didemo, lsmdc,
            activitynet, hdvila (.jsonl, with LMDBs of subtitles and captions), captions (one file
            of {clip_id, text}, as the CLIP-ViP authors have it, or {video, caption}, as LAVIS and
            VindLU have it), folder.
        source: The folder with the set's own files, or one of them.
        out: JSON Lines, for `clipvip train`, `eval`, `shard` or `verify`.
        split: Of the set; hdvila and folder have none. Only msrvtt has the ones with a number or
            "full"; there train is train-9k, else 7k, else full, and test is test-1k (1k-A), else
            full, by what SRC holds.
        videos: Where the videos lie, if not in SRC.
        first_30s: End each clip of DiDeMo after 30 seconds, as annotators saw no more and ClipBERT,
            Singularity and VindLU read no more (CLIP4Clip 31). The CLIP-ViP authors' loader reads
            whole files.
    """
    from clipvip.data.prepare import prepare as prepare_set
    from clipvip.files import write_whole

    done = prepare_set(kind, source, out, videos=videos, split=split, first_30s=first_30s)
    for note in done.notes:
        print(shown(note))
    print(f"{shown(out)}: {done.clips} clips")
    for name, what, entries in (
        ("missing", "videos are missing and were left out", done.missing),
        ("mute", "clips have no text and were left out", done.mute),
        ("bad", "lines or files cannot be used and were left out", done.bad),
        ("guessed", "texts are not UTF-8 and were read as Windows-1252", done.guessed),
        ("repaired", "clips' texts held half a character, now U+FFFD", done.repaired),
    ):
        lines = [shown(entry) for entry in entries]
        if lines:
            print(f"{len(lines)} {what}: {'; '.join(lines[:5] + ['…'] * (len(lines) > 5))}")
        if len(lines) > 5:
            path = out.with_suffix(f".{name}.txt")
            write_whole(path, "".join(f"{line}\n" for line in lines))
            print(f"all of them: {shown(path)}")


def shard(
    annotations: Annotations,
    out: Annotated[Positional[Path], arg(metavar="OUT")],
    clips_per_shard: int = 1000,
    cut: bool = False,
    size: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    max_bad_share: float = 0.05,
) -> None:
    """Write WebDataset tars to train from: OUT/00000.tar, 00001.tar, … and a manifest.

    Run again after a crash it goes on; finished shards are not written again. Train on them with
    `clipvip train … data.train='OUT/{00000..00099}.tar'`, or just data.train=OUT.

    Args:
        annotations: JSON Lines, one clip a line; `clipvip prepare` makes it of known data sets.
        out: A folder, new or of an earlier run with the same options.
        clips_per_shard: Aim at 0.1 to 1 GB a shard.
        cut: Store of a long video only what the clip (start, end) needs; frames stay the same.
        size: Store the clip coded anew as H.264, its shortest side this; 256 suits training at
            224. Much smaller and faster to decode.
        seed: Of the order in which clips are spread over the shards.
        workers: Processes; by default one a core.
        max_bad_share: Of clips that may be unreadable; they are left out and listed in
            OUT/bad_files.jsonl.
    """
    from clipvip.data.shards import write_shards

    shards = write_shards(
        annotations,
        out,
        clips_per_shard=clips_per_shard,
        cut=cut,
        size=size,
        seed=seed,
        num_workers=workers,
        max_bad_share=max_bad_share,
    )
    bad = sum(shard.bad for shard in shards)
    left_out = f", {bad} left out (see {shown(out / 'bad_files.jsonl')})" if bad else ""
    gigabytes = sum(shard.bytes for shard in shards) / 1e9
    print(
        f"{shown(out)}: {len(shards)} shards, {sum(shard.clips for shard in shards)} clips, "
        f"{gigabytes:.3g} GB{left_out}"
    )


def verify(
    source: Annotated[Positional[str], arg(metavar="SOURCE")],
    clean: Annotated[Positional[Path | None], arg(metavar="[CLEAN.jsonl]")] = None,
    manifest: Path | None = None,
    workers: int | None = None,
) -> None:
    """Check that clips can be read: decodes the first, middle and last frame of each.

    Names what cannot be, and then ends with exit status 1.

    Args:
        source: Annotations (JSON Lines), or shards: their folder, or tars such as
            'shards/{00000..00099}.tar' or any fsspec URL; their checksums are compared too.
        clean: Write the annotations of the clips that can be read to this file.
        manifest: Of tars made elsewhere: write the manifest that training from them needs.
        workers: Processes; by default one a core.
    """
    from clipvip.data.shards import is_shards, verify_shards
    from clipvip.data.verify import verify_files

    if is_shards(source) or manifest is not None:
        clips, bad = verify_shards(source, clean, manifest, num_workers=workers)
    else:
        clips, bad = verify_files(Path(source), clean, num_workers=workers)
    for file in bad:
        line = f" (line {file.line})" if file.line else ""
        print(f"{shown(file.path)}{line}: {shown(file.reason)}")
    print(f"{shown(source)}: {clips} clips, {len(bad)} bad")
    if any(file.path.endswith(".tar") for file in bad):
        print(
            "delete a bad tar and run `clipvip shard` again with the options it had, which writes "
            "what is missing; fetch one made elsewhere again"
        )
    for written in (clean, manifest):
        if written is not None:
            print(f"wrote {shown(written)}")
    if bad:
        raise SystemExit(1)


def bench(
    suite: Annotated[
        Positional[Literal["ops", "model", "train", "decode", "growth", "all"]],
        arg(metavar="SUITE"),
    ] = "all",
    device: Literal["auto", "cuda", "cpu"] = "auto",
    quick: bool = False,
    only: Annotated[str, arg(metavar="REGEX")] = "",
    minutes: Annotated[float | None, arg(metavar="M")] = None,
    out: Path | None = None,
    resume: Path | None = None,
    profile: Annotated[str | None, arg(metavar="CONTESTANT")] = None,
    compare: Annotated[tuple[Path, Path] | None, arg(metavar="BEFORE AFTER")] = None,
    allow: float = 0.1,
) -> None:
    """Measure kernels, losses, model, training step and decoding against their peers here.

    Results are checked before they are timed; contestants take turns. Every case runs in a process
    of its own (on a GPU for 90 seconds at most, a training step for twice that), the most important
    ones first; a case that crashes or hangs is recorded as that. Prints the table so far after
    every case, writes a record per case and a report. Ends with status 1 if a case failed.

    Args:
        suite: ops, model, train, decode, growth, or all.
        device: Where to measure. auto is the GPU if there is one.
        quick: A few small cases of each suite: about three minutes on a CPU with two cores.
        only: Measure only the cases that this expression finds, by suite and name as the tables
            print them: 'ops proxy_attention-b16.*both'.
        minutes: Stop in time to be done after this many minutes, and name what was not reached,
            which is no failure.
        out: Where records and report go: a folder, or a file NAME.jsonl that takes a record per
            line, with the report beside it. By default bench/results in a checkout, else
            ./clipvip-bench.
        resume: Records of an earlier run (a folder or file as --out). A case that this commit
            already measured on this machine is taken from there instead of measured again. On a
            GPU that also holds for the records in --out.
        profile: Also write torch.profiler traces, to traces/ beside the records: of one contestant,
            such as ours, or of all.
        compare: Measure nothing; say what moved beyond noise between two runs, each a record or a
            folder of records. Ends with status 1 if ours got worse or was lost, 2 if they cannot be
            compared. A case that is absent counts as lost if its suite was run as before (so not
            by --quick where it was run in full).
        allow: By what share ours may get worse in a comparison: its time as a ratio to the
            baseline's (itself where there is none), or its peak memory.
    """
    from clipvip import benchmark

    if compare is None:
        done = benchmark.run(
            suite,
            device=device,
            quick=quick,
            only=only,
            minutes=minutes,
            out=out,
            resume=resume,
            profile=profile,
        )
        if not done:
            raise SystemExit(1)
        return
    try:
        better = benchmark.compare(*compare, allow)
    except ValueError as error:
        print_error(error)
        raise SystemExit(2) from None
    if not better:
        raise SystemExit(1)


def doctor() -> None:
    """Say what was built, what runs here, and what is missing."""
    from clipvip.doctor import report

    if not report():
        raise SystemExit(1)


COMMANDS: dict[str, Any] = {
    "train": train,
    "eval": evaluate,
    "convert": convert,
    "embed": embed,
    "search": search,
    "prepare": prepare,
    "shard": shard,
    "verify": verify,
    "bench": bench,
    "doctor": doctor,
}


def main() -> None:
    """Run one command."""
    with safe_output(), one_line_errors():
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="clipvip", description="Video-text models from CLIP, trained fast."
        )


if __name__ == "__main__":
    main()
