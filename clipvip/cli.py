"""The command `clipvip`: parse, call, print."""

import gc
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal, Union

if Path(sys.argv[0]).stem == "clipvip" and sys.argv[1:2] == ["train"]:
    from clipvip.training.preemption import leave_on_sigterm

    leave_on_sigterm()  # before the slow imports

import tyro
from tyro.conf import Positional, UseAppendAction, arg, subcommand

from clipvip.data import Decoder
from clipvip.files import shown
from clipvip.terminal import one_line_errors, print_error, safe_output

DESCRIPTION = """Video-text models made from CLIP (CLIP-ViP): search your videos by text, or train.

Search your own videos:
  clipvip embed openai/clip-vit-base-patch32 ~/Videos
  clipvip search 'a dog catches a ball'
  clipvip serve

Train a model on your own or published data:
  clipvip prepare folder ~/Videos train.jsonl
  clipvip train msrvtt model.name=openai/clip-vit-base-patch32 data.train=train.jsonl out=run

Set CLIPVIP_TRACEBACK=1 in the environment to see Python's traceback of an error."""

INDEXES = (Path("index"), Path("demo/out/clip_vip/index"))

# Arguments of several commands.
Model = Annotated[
    Positional[str],
    arg(
        metavar="MODEL",
        help="A model folder or a name on the Hugging Face hub. For a file of weights, see "
        "`clipvip convert`.",
    ),
]
Annotations = Annotated[
    Positional[Path],
    arg(
        metavar="ANNOTATIONS.jsonl",
        help="JSON Lines file with one clip per line; `clipvip prepare` makes it.",
    ),
]
DecodeWith = Annotated[
    Decoder,
    arg(help="Video decoder. auto uses DALI if it is installed and there is a GPU, else PyAV."),
]
MixedPrecision = Annotated[
    Literal["auto", "bf16", "no"],
    arg(
        help="Precision to compute in, named as in training: bf16 (autocast) or no (that of the "
        "weights, usually fp32). auto is bf16 on a CUDA GPU or a CPU (AVX512-BF16) that computes "
        "in it, else no."
    ),
]
DataSet = Literal["msrvtt", "didemo", "lsmdc", "activitynet", "hdvila", "captions", "folder"]
Suite = Literal["ops", "model", "train", "decode", "growth", "all"]
WorkerCount = Annotated[
    int | None,
    arg(help="Number of processes; by default one per core of this machine, or of the cluster."),
]
RunOn = Annotated[
    Literal["local", "ray"],
    arg(
        help="Where the workers run: on this machine, or on a Ray cluster, whose nodes must see "
        "all files under the same paths. That is the cluster at RAY_ADDRESS, else the one that "
        "`ray start` has joined this machine to, else Ray on this machine alone."
    ),
]


def train(
    config: Annotated[Positional[str], arg(metavar="CONFIG")],
    overrides: Annotated[Positional[tuple[str, ...]], arg(metavar="[KEY=VALUE …]")] = (),
    dry_run: bool = False,
    processes: int = 1,
) -> None:
    """Post-pretrain or fine-tune a model.

    See what fine-tuning on MSR-VTT would cost, then start it:
      clipvip train msrvtt model.name=MODEL data.train=train.jsonl out=run --dry-run
      clipvip train msrvtt model.name=MODEL data.train=train.jsonl out=run

    Train on several GPUs:
      torchrun --nproc-per-node 8 -m clipvip.training CONFIG KEY=VALUE …

    On SIGTERM, training saves a checkpoint and exits with status 75. Start it again with
    resume=latest to continue.

    Args:
        config: A YAML file, or the name of a packaged configuration (pretrain, msrvtt, didemo, …).
        overrides: Settings that replace those of CONFIG, such as optimizer.lr=1e-6.
        dry_run: Train nothing. Print what the run costs (parameters, tokens, operations, memory).
            Then take one step on generated clips, with a 32-channel model of the same depth.
        processes: Number of processes to plan for; only with --dry-run.
    """
    from clipvip.training.__main__ import main as train_main

    flags = ("--dry-run", "--processes", str(processes)) if dry_run else ()
    train_main([config, *overrides, *flags])


def evaluate(
    model: Model,
    annotations: Annotations,
    out: Path | None = None,
    task: Literal["retrieval", "captioning"] | None = None,
    decoder: DecodeWith = "auto",
    mixed_precision: MixedPrecision = "auto",
) -> None:
    """Measure how well a model retrieves videos by text, and texts by video; or captions videos.

    Prints recall at 1, 5 and 10 and the median and mean rank, with and without dual softmax; for
    captions, how well they match the clips' texts, as COCO measures it.
    For example:
      clipvip eval run/last test.jsonl --out scores.json

    Args:
        out: Also write the scores, and all captions, to this JSON file.
        task: What to measure, by default captioning if the model has a decoder, else retrieval.
    """
    from clipvip.training.evaluate import evaluate_checkpoint

    options: dict[str, Any] = {"decoder": decoder, "mixed_precision": mixed_precision}
    evaluate_checkpoint(model, annotations, task=task, out=out, **options)


def convert(
    source: Annotated[Positional[str], arg(metavar="SOURCE")],
    destination: Annotated[Positional[Path], arg(metavar="DESTINATION")],
    to: Literal["clipvip", "clip", "authors"] = "clipvip",
    tokenizer: str | None = None,
    activation: Literal["gelu", "quick_gelu"] | None = None,
    head_width: int | None = None,
    image_size: int | None = None,
    text_length: int | None = None,
) -> None:
    """Convert a CLIP or CLIP-ViP checkpoint to a model folder, or back to the authors' format.

    Turn a file of the CLIP-ViP authors into a model that reads videos as their code does:
      clipvip convert pretrain_clipvip_base_32.pt MODEL --tokenizer openai/clip-vit-base-patch32

    Turn a file of OpenAI, of open_clip's trainer or of CLIP4Clip into a CLIP to search with:
      clipvip convert ViT-B-32.pt MODEL --to clip --tokenizer openai/clip-vit-base-patch32
      clipvip convert epoch_32.pt MODEL --to clip --tokenizer … --activation gelu

    Make a model for larger frames, to be trained further:
      clipvip convert openai/clip-vit-base-patch16 MODEL --image-size 336

    No code in a file is run.

    Args:
        source: A model folder, a name on the Hugging Face hub, or a file of weights.
            Folders and hub names may hold the files of transformers or of open_clip.
        destination: The folder (--to clipvip, --to clip) or .pt file (--to authors) to write.
        to: Format to write.
            clipvip: a video model; proxies are added to a plain CLIP, and wait to be trained.
            clip: a plain CLIP as transformers saves it.
            authors: a file for the code of the CLIP-ViP authors.
        tokenizer: Folder or hub name to take the tokenizer from. By default it is SOURCE's.
            Files of weights have none.
        activation: Activation that a file of open_clip was trained with, which it does not say.
            Models whose names end in -quickgelu have quick_gelu, the others gelu.
        head_width: Channels of a head of the vision tower, if a file of open_clip does not say.
            It is needed only for widths that none of open_clip's own models has.
        image_size: Side in pixels of the frames that the model is to read, a multiple of its patch
            size. Positions of patches are interpolated bicubically.
        text_length: Number of tokens that the model is to read. Positions of texts are interpolated
            linearly. To only cut off texts earlier, set data.text_length in training instead.
    """
    from clipvip.convert import convert as convert_checkpoint

    convert_checkpoint(
        source,
        destination,
        to=to,
        tokenizer=tokenizer,
        activation=activation,
        head_width=head_width,
        image_size=image_size,
        text_length=text_length,
    )
    print(f"wrote {shown(destination)}")


def export(
    model: Model,
    out: Annotated[Positional[Path], arg(metavar="OUT")],
    onnx: bool = False,
) -> None:
    """Export a model's video and text towers, to be run without this package.

    Writes OUT/video.pt2 and OUT/text.pt2, programs of torch.export; with --onnx also video.onnx and
    text.onnx. Beside them are the tokenizer's files and export.json, which describes inputs,
    outputs and how frames are prepared. For example:
      clipvip export openai/clip-vit-base-patch32 OUT --onnx

    Batch size, number of frames and length of texts are free. Weights are written in fp32. All
    files are run and compared with the model before OUT appears.

    Args:
        out: The folder to write.
        onnx: Also write ONNX; needs `pip install "clipvip[export]"`.
    """
    from clipvip.export import export as export_model

    done = export_model(model, out, onnx)
    if done.stored != "float32":
        print(f"weights are stored in {done.stored}; they are exported in float32")
    print(f"{shown(out)}: {', '.join(done.files)}")
    print(f"largest difference from the model's unit features: {done.difference:.1e}")


def embed(
    model: Model,
    videos: Annotated[Positional[tuple[str, ...]], arg(metavar="VIDEOS …")],
    out: str | None = None,
    window: float | None = None,
    stride: float | None = None,
    scenes: bool = False,
    decoder: DecodeWith = "auto",
    mixed_precision: MixedPrecision = "auto",
    workers: int | None = None,
    on: RunOn = "local",
    tokens: bool = False,
    layer: int | None = None,
    dtype: Literal["fp16", "bf16", "fp32"] | None = None,
) -> None:
    """Embed your videos into an index that `clipvip search` can search by text.

    For example, with a plain CLIP, whose features of a video's frames are averaged:
      clipvip embed openai/clip-vit-base-patch32 ~/Videos 'clips/*.mkv'

    A long video is divided into moments of 10 seconds, a new one every 5 seconds, so that a search
    finds the moment. A video no longer than that is one moment.

    Run the same command again after changes. Only new and changed videos are embedded, renamed
    ones are recognised, and deleted ones are dropped. Other videos can be added at any time. After
    an interruption, the same command resumes.

    On several GPUs, which share the videos:
      torchrun --nproc-per-node 8 -m clipvip.cli embed MODEL ~/Videos

    On a Ray cluster, with all of its GPUs, or its cores if it has none:
      clipvip embed MODEL /shared/videos --out /shared/index --on ray

    With --tokens, write the model's tokens of each clip to a file instead, such as a language
    model takes them, and list the files in OUT/clips.jsonl:
      clipvip embed MODEL ~/Videos --tokens --layer -2 --out tokens

    Args:
        videos: Videos, images, folders (searched recursively for videos) and patterns in quotes.
            Also lists (.txt, one path per line) and annotations (.jsonl), whose clips with a start
            or end become moments as they are. Hits show the captions of annotations.
        out: Folder of the index, by default ./index; of the tokens, by default ./tokens.
            An index may also be in a bucket, such as s3://bucket/index.
        window: Length of a moment in seconds, by default 10. Longer moments give more context and
            a smaller index; shorter ones find brief events.
        stride: Seconds from the start of a moment to the start of the next, by default half of
            --window. Moments that overlap leave no event cut in two.
        scenes: Make a moment of each scene, from cut to cut, instead of fixed windows.
            Scenes longer than two windows are divided. This decodes every frame.
        workers: Number of processes that decode, by default one per core. With --on ray, number of
            workers that each hold the model, by default one per GPU, or without GPUs one per four
            cores.
        tokens: Write each clip's proxies [M, C] and patches [N, L, C] to a .safetensors file.
        layer: Layer to take tokens from, counted from 1 or, from the last, -1 (the default).
            0 is the input of the first layer. Only with --tokens.
        dtype: Precision to store tokens in, by default fp16. Only with --tokens.
    """
    given: dict[str, Any] = {"window": window, "stride": stride, "scenes": scenes or None}
    given |= {"workers": workers, "on": on if on != "local" else None}
    given = {name: value for name, value in given.items() if value is not None}
    if tokens:
        if given:
            named = " and ".join(f"--{name}" for name in given)
            raise ValueError(f"--tokens writes one file per clip; leave {named} out")
        from clipvip.token_files import save_tokens

        options: dict[str, Any] = {"layer": layer, "dtype": dtype}
        options = {name: value for name, value in options.items() if value is not None}
        options |= {"decoder": decoder, "mixed_precision": mixed_precision}
        save_tokens(model, videos, Path(out or "tokens"), **options)
        return
    if layer is not None or dtype is not None:
        raise ValueError("--layer and --dtype say which tokens to write; give --tokens as well")
    from clipvip.index.build import build_and_leave

    given |= {"decoder": decoder, "mixed_precision": mixed_precision}
    if "workers" in given:
        given["num_workers"] = given.pop("workers")
    build_and_leave("index" if out is None else out, model, videos, **given)


def search(
    queries: Annotated[Positional[tuple[str, ...]], arg(metavar="[QUERY …]")] = (),
    index: str | None = None,
    k: Annotated[int, arg(aliases=["-k"])] = 10,
    image: tuple[Path, ...] = (),
    video: tuple[Path, ...] = (),
    weights: tuple[float, ...] = (),
    like: str | None = None,
    folder: Path | None = None,
    min_duration: str | None = None,
    max_duration: str | None = None,
    after: str | None = None,
    before: str | None = None,
    json: bool = False,
) -> None:
    """Find the moments of your videos that match a sentence, an image or a video, best first.

    For example:
      clipvip search 'a dog catches a ball' -k 5
      clipvip search 'a beach' 'people' --weights 1 -0.5 --folder ~/Videos/2024
      clipvip search --image dog.jpg --json

    Several queries are added up: their vectors are weighted, and the sum is searched for. A hit is
    a stretch of one video; its best moment is shown, with its caption if the index has one.

    Args:
        queries: Sentences to search for. They come first: --image, --video and --weights take
            all that follows them.
        index: Folder that `clipvip embed` wrote. By default ./index, else that of the demo.
        k: Number of hits to show.
        image: Images to search for.
        video: Videos to search for, each as a whole.
        weights: One number per query, first of the sentences, then of the images, then of the
            videos. Negative numbers search for what is unlike that query. By default all are 1.
        like: Search for more like this moment, given by its id, which --json shows.
        folder: Look only at files in this folder and below.
        min_duration: Look only at videos at least this long, in seconds or as 1:30 or 1:02:03.
        max_duration: Look only at videos at most this long.
        after: Look only at videos recorded on this day or later, such as 2024-05-01. Where a video
            does not say when it was recorded, this is the date of its file.
        before: Look only at videos recorded before this day.
        json: Print one hit per line, as JSON.
    """
    with _quick_imports():
        from clipvip.index import VideoIndex, Where
        from clipvip.index.show import day, duration, print_hits

        found = VideoIndex(index or next((path for path in INDEXES if path.is_dir()), INDEXES[0]))
        _ = found.store  # imports LanceDB
    where = Where(
        None if folder is None else os.path.abspath(folder),
        duration("--min-duration", min_duration),
        duration("--max-duration", max_duration),
        day("--after", after),
        day("--before", before),
    )
    given: list[Any] = [*queries, *image, *video]
    if like is not None and (given or weights):
        raise ValueError("--like takes no other query; leave out the sentences, images and weights")
    if like is None and not given:
        raise ValueError("there is no query; expected a sentence, --image, --video or --like")
    if like is not None:
        hits = found.like(like, k, where=where)
    else:
        hits = found.search(given, k, weights=weights or None, where=where)
    title = ", ".join([*queries, *map(str, (*image, *video))]) or f"like {like}"
    print_hits(hits, title, json)


def serve(
    index: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
) -> None:
    """Serve a page on which you search the videos of an index and watch what is found.

    Start it, then open http://127.0.0.1:8000 in a browser:
      clipvip serve

    The page is served to this machine only. To let others search and watch, give --host 0.0.0.0:
    there is no password. The page /docs describes the JSON API.

    Args:
        index: Folder that `clipvip embed` wrote. By default ./index, else that of the demo.
        host: Address to listen on.
        port: Port to listen on; 0 for any that is free.
    """
    # Threads of NumPy would spin after each product, at the cost of torch's.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        from clipvip.serve import serve as serve_index
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn", "anyio"):
            raise
        raise ValueError(f'{error.name} is missing; run: pip install "clipvip[search]"') from None

    try:
        serve_index(index or next(filter(Path.is_dir, INDEXES), INDEXES[0]), host, port)
    except (KeyboardInterrupt, SystemExit) as stop:
        # The server has stopped. Python would now take seconds to free torch piece by piece, and
        # could crash where a thread is still loading a model.
        sys.stdout.flush()
        os._exit(130 if isinstance(stop, KeyboardInterrupt) else 128 + signal.SIGTERM)


def classify(
    model: Model,
    videos: Annotated[Positional[tuple[str, ...]], arg(metavar="VIDEOS …")],
    labels: Path,
    template: UseAppendAction[tuple[str, ...]] = (),
    templates: Path | None = None,
    top: int = 5,
    csv: str | None = None,
    decoder: DecodeWith = "auto",
    mixed_precision: MixedPrecision = "auto",
) -> None:
    """Say which of your labels fit each video best. Nothing is trained.

    For example, with one label per line in labels.txt:
      clipvip classify openai/clip-vit-base-patch32 ~/Videos --labels labels.txt
      clipvip classify MODEL ~/Videos --labels actions.txt --template 'a person is {}.'
      clipvip classify MODEL ~/Videos --labels labels.txt --csv labels.csv

    Probabilities are relative to the given labels: they add up to 1 over these, even if none fits.

    Args:
        videos: Videos, images, folders (searched recursively for videos) and patterns in quotes.
            Also lists (.txt, one path per line) and annotations (.jsonl).
        labels: Text file with one label per line.
            Blank lines and lines that begin with # are skipped.
            Sentences after a label, separated by tabs, replace the templates for this label.
        template: Sentence in which {} stands for the label, such as 'a video of {}.'.
            May be given several times: a label's vector is the mean over its sentences.
            By default a few that suit most labels.
        templates: Text file with one such sentence per line.
        top: Number of labels to show per video.
        csv: Write a row per video and rank to this file instead of printing a table.
            A dash (-) is standard output.
    """
    from clipvip.classify import (
        TEMPLATES,
        classify_to_csv,
        print_table,
        read_labels,
        read_templates,
    )
    from clipvip.classify import classify as classify_videos

    if csv not in (None, "-") and Path(str(csv)).suffix.lower() != ".csv":
        raise ValueError(f"--csv is {csv}; expected a name that ends in .csv, or -")
    wanted = read_labels(labels)
    given = [*template, *(read_templates(templates) if templates else ())]
    options: dict[str, Any] = {"top": top, "decoder": decoder, "mixed_precision": mixed_precision}
    options["templates"] = given or TEMPLATES
    if csv is None:
        print_table(classify_videos(model, videos, wanted, **options), len(wanted))
        return
    out = None if csv == "-" else Path(csv)
    clips = classify_to_csv(model, videos, wanted, out, **options)
    if out is not None:
        print(f"{shown(out)}: {clips} clips")


def describe(
    model: Model,
    videos: Annotated[Positional[tuple[str, ...]], arg(metavar="[VIDEOS …]")] = (),
    window: float | None = None,
    beams: int = 5,
    length: int | None = None,
    json: bool = False,
    index: str | None = None,
    overwrite: bool = False,
    decoder: DecodeWith = "auto",
    mixed_precision: MixedPrecision = "auto",
) -> None:
    """Say what videos show, a sentence for each, with a model that was trained to caption.

    Train it with `clipvip train msrvtt_captions`. For example:
      clipvip describe run/best dog.mp4 ~/Videos
      clipvip describe run/best film.mkv --window 10 --json

    A video that cannot be read is listed at the end; all others are described.

    With --index and without VIDEOS, write a caption for each moment of an index that has none;
    `clipvip search` and `clipvip serve` then show it. After an interruption, the same command
    resumes:
      clipvip describe run/best --index index

    Args:
        videos: Videos, images, folders (searched recursively for videos) and patterns in quotes.
            Also lists (.txt, one path per line) and annotations (.jsonl).
        window: Describe each moment of so many seconds, instead of each video as a whole.
        beams: Width of the beam search. 1 is fastest.
        length: Number of tokens at which a caption is cut off, by default as in training.
        json: Print one clip per line, as JSON with path, start, end and caption.
        index: Folder of an index, that `clipvip embed` wrote, to put captions into.
        overwrite: Write captions for all moments of the index, in place of those that they have.
    """
    options: dict[str, Any] = {"decoder": decoder, "mixed_precision": mixed_precision}
    options |= {"beams": beams, "length": length}
    if index is not None:
        if videos or window is not None or json:
            raise ValueError(
                "--index describes the moments of an index; leave videos, --window and --json out"
            )
        from clipvip.index import VideoIndex

        VideoIndex(index).describe(model, overwrite=overwrite, **options)
        return
    if overwrite or not videos:
        raise ValueError("no videos were named; expected videos, or --index with an index")
    from clipvip.describe import describe as describe_videos
    from clipvip.describe import print_captions

    print_captions(describe_videos(model, videos, window=window, **options), json)


def explain(
    model: Model,
    video: Annotated[Positional[Path], arg(metavar="VIDEO")],
    texts: Annotated[Positional[tuple[str, ...]], arg(metavar="TEXT …")],
    out: Path | None = None,
    json: Path | None = None,
    layers: int = 3,
) -> None:
    """Draw what a model attends to in a video, and how well texts fit the video over time.

    For example, which writes dog.explain.png:
      clipvip explain openai/clip-vit-base-patch32 dog.mp4 'a dog runs' 'a dog sleeps'

    The picture shows the frames that the model reads, the attention of its video proxies (a plain
    CLIP's class token) to each frame's patches, and the similarity to each text: of the whole
    video, of parts of it, and of single frames. Attention is the same for every text.

    Args:
        video: A video or image.
        texts: One to ten texts, each in quotes.
        out: PNG file to write, by default VIDEO.explain.png in the current folder.
            An earlier picture of this command is replaced; any other existing file is refused.
        json: Also write the numbers to this JSON file.
        layers: Number of layers, counted from the last, over which attention is averaged.
    """
    from clipvip.explain_picture import explain_to_files

    written = explain_to_files(model, video, texts, layers, out=out, numbers=json)
    for path in filter(None, (written, json)):
        print(f"wrote {shown(path)}")


def prepare(
    kind: Annotated[Positional[DataSet], arg(metavar="SET")],
    source: Annotated[Positional[Path], arg(metavar="SRC")],
    out: Annotated[Positional[Path], arg(metavar="OUT.jsonl")],
    split: Literal[
        "train", "val", "test", "train-9k", "train-7k", "train-full", "test-1k", "test-full"
    ] = "train",
    videos: Path | None = None,
    first_30s: bool = False,
) -> None:
    """Write annotations for a published data set, or for a folder of videos and texts.

    Annotations are a JSON Lines file that `clipvip train`, `eval`, `shard` and `verify` read. For
    MSR-VTT, and for a folder of videos x.mp4 with their texts in x.txt, one per line:
      clipvip prepare msrvtt ~/MSRVTT train.jsonl --split train-9k
      clipvip prepare folder ~/Videos mine.jsonl

    Videos are found by name in any subfolder. Missing videos and unusable entries are reported
    and left out.

    Args:
        kind: The data set.
            msrvtt: its JSON file or frozen-in-time's, and split lists (.csv, .txt, .json).
            didemo, lsmdc, activitynet: the files that their authors publish.
            hdvila: .jsonl files of clips, and LMDBs of subtitles and captions.
            captions: a file of {clip_id, text} (CLIP-ViP) or {video, caption} (LAVIS, VindLU).
            folder: videos and images, each with a .txt file of its texts.
        source: Folder with the set's own files, or one of these files.
        out: JSON Lines file to write.
        split: Part of the set; hdvila and folder have none.
            Splits with a number or "full" in their names exist only for msrvtt.
            There, train is the first of train-9k, train-7k and train-full that SRC holds.
            Likewise, test is test-1k (known as 1k-A) or test-full.
        videos: Folder with the videos, if it is not SRC.
        first_30s: End each clip after 30 seconds; only for DiDeMo.
            Its annotators saw no more, and ClipBERT, Singularity and VindLU read no more.
            CLIP4Clip reads 31 seconds, the CLIP-ViP authors' loader the whole file.
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
        ("repaired", "clips had half a character in a text, now U+FFFD", done.repaired),
    ):
        lines = [shown(entry) for entry in entries]
        if lines:
            print(f"{len(lines)} {what}: {'; '.join(lines[:5] + ['…'] * (len(lines) > 5))}")
        if len(lines) > 5:
            path = out.with_suffix(f".{name}.txt")
            write_whole(path, "".join(f"{line}\n" for line in lines))
            print(f"full list: {shown(path)}")


def shard(
    annotations: Annotations,
    out: Annotated[Positional[Path], arg(metavar="OUT")],
    clips_per_shard: int = 1000,
    cut: bool = False,
    size: int | None = None,
    seed: int = 0,
    workers: WorkerCount = None,
    on: RunOn = "local",
    max_bad_share: float = 0.05,
) -> None:
    """Pack clips into WebDataset tar files (shards) to train from.

    Writes OUT/00000.tar, 00001.tar, … and a manifest with their checksums. For example:
      clipvip shard train.jsonl SHARDS --size 256
      clipvip train msrvtt data.train=SHARDS …

    On a Ray cluster, with all of its cores:
      clipvip shard train.jsonl SHARDS --size 256 --on ray

    If a run stops early, run the same command again: it keeps the finished shards. To train on
    some of the shards, use data.train='SHARDS/{00000..00099}.tar'.

    Args:
        out: Folder to write to: a new one, or that of an earlier run with the same options.
        clips_per_shard: Number of clips per shard. Choose it so that a shard has 0.1 to 1 GB.
        cut: Store only the part of a video that the clip (start, end) needs.
            The frames do not change.
        size: Re-encode each clip as H.264 with this shortest side, in pixels.
            256 suits training at 224. Such clips are much smaller and decode faster.
        seed: Random seed for the order of the clips.
        max_bad_share: Share of unreadable clips above which the command fails.
            Unreadable clips are left out and listed in OUT/bad_files.jsonl.
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
        on=on,
        max_bad_share=max_bad_share,
    )
    bad = sum(shard.bad for shard in shards)
    left_out = f", {bad} left out (see {shown(out / 'bad_files.jsonl')})" if bad else ""
    gigabytes = sum(shard.bytes for shard in shards) / 1e9
    print(
        f"{shown(out)}: {len(shards)} shards, {sum(shard.clips for shard in shards)} clips, "
        f"{gigabytes:.3g} GB{left_out}"
    )


def caption(
    model: Annotated[
        Positional[str],
        arg(
            metavar="MODEL",
            help="Folder or hub name of an image-to-text model of transformers, such as "
            "Salesforce/blip-image-captioning-large or Qwen/Qwen2.5-VL-3B-Instruct.",
        ),
    ],
    source: Annotated[Positional[str], arg(metavar="SOURCE")],
    out: Annotated[Positional[Path], arg(metavar="OUT")],
    prompt: str | None = None,
    length: int = 40,
    beams: int = 1,
    frames: int = 1,
    overwrite: bool = False,
    batch_size: int = 16,
    mixed_precision: MixedPrecision = "auto",
    workers: int | None = None,
    on: RunOn = "local",
    max_bad_share: float = 0.05,
) -> None:
    """Write a caption for the middle frame of every clip, as post-pretraining needs.

    For example:
      clipvip caption Salesforce/blip-image-captioning-large clips.jsonl captioned.jsonl
      clipvip caption Qwen/Qwen2.5-VL-3B-Instruct SHARDS CAPTIONED --batch-size 32

    On several GPUs, which share the clips; the captions do not depend on their number:
      torchrun --nproc-per-node 8 -m clipvip.cli caption MODEL clips.jsonl captioned.jsonl

    On a Ray cluster, with all of its GPUs, or its cores if it has none:
      clipvip caption MODEL /shared/SHARDS /shared/CAPTIONED --on ray --mixed-precision bf16

    Clips that have a caption keep it. Clips whose caption is empty, no text or a repetition stay
    in OUT without one. Run the same command again to resume a run that was stopped or killed.
    Frames are decoded by PyAV. See docs/caption.md.

    Args:
        source: Annotations (.jsonl), or shards: a folder, a pattern of tars, or an fsspec URL.
        out: For annotations, the file (.jsonl) to write; for shards, the folder.
        prompt: What a chat model is asked, by default for one sentence. For BLIP and GIT, a text
            that the caption continues, by default none; it is not part of the caption.
        length: Number of tokens after which a caption is cut off.
        beams: Number of beams of the search for the likeliest caption; 1 takes the likeliest token.
        frames: Number of frames per clip, spread evenly. A chat model reads them together. From
            other models, the likeliest of the frames' captions is taken. A clip that has an
            annotated image is captioned by that image.
        overwrite: Also caption clips that have a caption.
        batch_size: Number of clips per call of the model.
        workers: Number of processes that read, by default one per core. With --on ray, number of
            workers that each hold the model, by default one per GPU, or without GPUs one per four
            cores.
        max_bad_share: Share of unreadable clips above which the command fails.
            Unreadable clips stay in OUT as they are, and are listed: in OUT/bad_files.jsonl, or
            beside OUT.jsonl in OUT.bad_files.jsonl.
    """
    from clipvip.captions import Asking, caption_and_leave

    caption_and_leave(
        model,
        source,
        out,
        asking=Asking(prompt, length, beams, frames),
        overwrite=overwrite,
        batch_size=batch_size,
        num_workers=workers,
        mixed_precision=mixed_precision,
        on=on,
        max_bad_share=max_bad_share,
    )


def verify(
    source: Annotated[Positional[str], arg(metavar="SOURCE")],
    clean: Annotated[Positional[Path | None], arg(metavar="[CLEAN.jsonl]")] = None,
    manifest: Path | None = None,
    workers: WorkerCount = None,
    on: RunOn = "local",
) -> None:
    """Verify that clips can be read, by decoding the first, middle and last frame of each.

    Lists the clips that cannot be read. If there are any, exits with status 1. For example:
      clipvip verify train.jsonl clean.jsonl
      clipvip verify 'https://example.org/shards/{00000..00099}.tar'
      clipvip verify train.jsonl clean.jsonl --on ray

    Args:
        source: Annotations (.jsonl), or shards: a folder, a pattern of tars, or an fsspec URL.
            The checksums of shards are verified too.
        clean: Write the annotations of the readable clips to this file.
        manifest: Write a manifest of the tars to this file; SOURCE must be a pattern of tars.
            Training needs a manifest, and tars that another tool made have none.
    """
    from clipvip.data.shards import is_shards, verify_files, verify_shards

    if is_shards(source) or manifest is not None:
        clips, bad = verify_shards(source, clean, manifest, num_workers=workers, on=on)
    else:
        clips, bad = verify_files(Path(source), clean, num_workers=workers, on=on)
    for file in bad:
        line = f" (line {file.line})" if file.line else ""
        print(f"{shown(file.path)}{line}: {shown(file.reason)}")
    print(f"{shown(source)}: {clips} clips, {len(bad)} bad")
    if any(file.path.endswith(".tar") for file in bad):
        print(
            "to replace a bad tar: delete it and run `clipvip shard` again with the same options, "
            "or download it again"
        )
    for written in filter(None, (clean, manifest)):
        print(f"wrote {shown(written)}")
    if bad:
        raise SystemExit(1)


def bench(
    suite: Annotated[Positional[Suite], arg(metavar="SUITE")] = "all",
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
    """Measure the speed and memory of kernels, model, training and decoding on this machine.

    Compares this package (ours) with a baseline and with other libraries, which take turns. Their
    results are checked before they are timed. For example:
      clipvip bench ops --quick

    Each case runs in a process of its own, the most important cases first. On a GPU a case may take
    90 seconds, a training step 180. After each case the table so far is printed and a record is
    written; a report follows at the end. If a case fails, crashes or hangs, the record says so and
    the command exits with status 1.

    Args:
        suite: Group of cases to measure: ops, model, train, decode, growth, or all.
        device: Device to measure on; auto is the GPU if there is one.
        quick: Measure a few small cases of each suite (three minutes on a CPU with two cores).
        only: Measure only the cases whose suite and name, as tables show them, match this
            expression, such as 'ops proxy_attention-b16.*both'.
        minutes: Finish within this many minutes, and name the cases that were not reached.
            These do not count as failures.
        out: Folder for records and report, or a file NAME.jsonl for one record per line, with the
            report beside it. By default bench/results in a checkout, else ./clipvip-bench.
        resume: Records of an earlier run, a folder or file like --out.
            Cases that this commit already measured on this machine are taken from there.
            On a GPU the records in --out are used likewise.
        profile: Also write torch.profiler traces to traces/ beside the records.
            Name one contestant, such as ours, or all.
        compare: Measure nothing. Compare two runs and print what changed by more than noise.
            Each run is a record or a folder of records.
            Exits with status 1 if ours got worse or is missing, 2 if they cannot be compared.
            A missing case counts only if its suite was run alike (not with --quick once).
        allow: Share by which ours may get worse in a comparison, in time and in peak memory.
            The time is taken relative to the baseline's, if there is one.
    """
    from clipvip import benchmark

    if compare is None:
        good = benchmark.run(
            suite,
            device=device,
            quick=quick,
            only=only,
            minutes=minutes,
            out=out,
            resume=resume,
            profile=profile,
        )
    else:
        try:
            good = benchmark.compare(*compare, allow)
        except ValueError as error:
            print_error(error)
            raise SystemExit(2) from None
    if not good:
        raise SystemExit(1)


def doctor() -> None:
    """Show what was built, what works on this machine, and what is missing."""
    from clipvip.doctor import report

    if not report():
        raise SystemExit(1)


COMMANDS: dict[str, Any] = {
    "train": train,
    "eval": evaluate,
    "convert": convert,
    "export": export,
    "embed": embed,
    "search": search,
    "serve": serve,
    "classify": classify,
    "describe": describe,
    "explain": explain,
    "prepare": prepare,
    "caption": caption,
    "shard": shard,
    "verify": verify,
    "bench": bench,
    "doctor": doctor,
}


@contextmanager
def _quick_imports() -> Iterator[None]:
    """Import what a search needs in less time: it is most of what a search takes."""
    if "numpy" not in sys.modules:
        # The products for one sentence are so small that threads cost more than they save.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    collects = gc.isenabled()
    gc.disable()  # LanceDB makes very many objects that stay
    try:
        yield
    finally:
        if collects:
            gc.enable()


@contextmanager
def _sigterm_exits() -> Iterator[None]:
    """Let SIGTERM end this process as an exception does, so that unfinished files are deleted."""

    def leave(*_: Any) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> None:
    """Run one command."""
    overview = not COMMANDS.keys() & set(sys.argv[1:2])  # shows one line per command
    commands = []
    for name, command in COMMANDS.items():
        summary = (command.__doc__ or "").partition("\n")[0] if overview else None
        commands.append(Annotated[Any, subcommand(name, constructor=command, description=summary)])
    choice: Any = Union[tuple(commands)]  # noqa: UP007
    training = sys.argv[1:2] == ["train"]  # which saves a checkpoint on SIGTERM
    with safe_output(), one_line_errors(), nullcontext() if training else _sigterm_exits():
        tyro.cli(choice, prog="clipvip", description=DESCRIPTION)


if __name__ == "__main__":
    main()
