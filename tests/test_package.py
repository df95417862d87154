"""The package as installed: what importing it costs, what the build offers, what the CLI says."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from clipvip import _C
from clipvip.cli import COMMANDS, main
from clipvip.ops import _native
from clipvip.terminal import one_line_errors

HEAVY = ("transformers", "accelerate", "av", "omegaconf", "tyro", "rich")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment
    )


@pytest.fixture
def clipvip(monkeypatch, capsys):
    """Runs one command in this process; returns (exit status, output, errors)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["clipvip", *arguments])
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_import_leaves_heavy_packages_alone():
    # torch's own imports do not count: only what importing clipvip adds.
    code = (
        "import sys, torch; before = set(sys.modules); import clipvip; "
        f"print([m for m in {HEAVY} if m in set(sys.modules) - before])"
    )
    assert python(code).stdout.strip() == "[]"


def test_the_packages_names_are_loaded_on_first_use():
    import clipvip
    from clipvip.model import CLIPViPModel

    assert clipvip.CLIPViPModel is CLIPViPModel
    assert set(clipvip.__all__) <= set(dir(clipvip))
    assert all(getattr(clipvip, name) is not None for name in clipvip.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'CLIPVipModel'"):
        clipvip.CLIPVipModel  # noqa: B018


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_one_openmp_runtime_is_loaded():
    torch.ones(1)
    _C.build_info()
    paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    assert len([path for path in paths if "libgomp" in path or "libiomp" in path]) == 1


def test_cpu_capability_follows_the_environment():
    code = "from clipvip import _C; print(_C.cpu_capability())"
    assert python(code, CLIPVIP_CPU="plain").stdout.strip() == "plain"
    assert "'sse9' cannot be used here" in python(code, CLIPVIP_CPU="sse9").stderr


def test_unknown_cpu_capability_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'sse9'.*runs plain"):
        _C.set_cpu_capability("sse9")


def test_doctor_finds_no_problem(clipvip):
    status, output, _ = clipvip("doctor")
    assert status == 0, output
    assert "CPU kernels chosen" in output
    assert "problem" not in output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("train", "nowhere.yaml"), "nowhere.yaml"),
        (("eval", "nowhere", "clips.jsonl"), "clips.jsonl"),
        (("search", "a cat", "--index", "nowhere"), "nowhere"),
        (("convert", "nowhere.pt", "out"), "nowhere.pt"),
        (("embed", "nowhere", "no-videos"), "no-videos"),
    ],
)
def test_bad_input_is_one_line_and_a_failure(clipvip, arguments, expected):
    status, _, errors = clipvip(*arguments)
    assert status == 1
    (line,) = errors.strip().splitlines()
    assert line.startswith("clipvip: error: ")
    assert expected in line


@pytest.mark.parametrize(
    ("rank", "error", "status", "printed"),
    [
        ("0", ValueError("a\n b"), 1, "clipvip: error: a b\n"),
        ("3", ValueError("the same on every rank"), 1, ""),
        ("3", OSError("disk"), 1, "clipvip, rank 3: error: disk\n"),
        ("0", KeyboardInterrupt(), 130, ""),
    ],
)
def test_an_error_is_one_line_and_once_for_all_ranks(
    monkeypatch, capsys, rank, error, status, printed
):
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as stop, one_line_errors(alike=(ValueError,)):
        raise error
    assert (stop.value.code, capsys.readouterr().err) == (status, printed)
    monkeypatch.setenv("CLIPVIP_TRACEBACK", "1")
    expected = SystemExit if status == 130 else type(error)
    with pytest.raises(expected), one_line_errors(alike=(ValueError,)):
        raise error


def test_help_lists_the_commands_with_one_line_each(clipvip):
    status, output, _ = clipvip("--help")
    assert status == 0
    assert all(command.__doc__.splitlines()[0][:40] in output for command in COMMANDS.values())
    assert "Args" not in output and "JSON Lines" not in output


@pytest.mark.parametrize(
    "command", ["train", "eval", "convert", "embed", "search", "explain", "doctor"]
)
def test_help_describes_every_command(clipvip, command):
    status, output, _ = clipvip(command, "--help")
    assert status == 0
    assert "usage: clipvip" in output


class TestGpu:
    """What is said where there are no kernels for a GPU; no GPU is needed to see it."""

    @pytest.fixture(autouse=True)
    def fresh(self):
        _native._check_gpu.cache_clear()
        yield
        _native._check_gpu.cache_clear()

    def test_a_build_without_cuda_says_how_to_get_it(self, monkeypatch):
        module = SimpleNamespace(build_info=lambda: {"cuda": None})
        monkeypatch.setattr(_native, "module", lambda: module)
        with pytest.raises(RuntimeError, match=r"built without CUDA kernels; .*CLIPVIP_CUDA=1"):
            _native._check_gpu(0)

    @pytest.mark.parametrize(("capability", "accepted"), [((7, 5), False), ((8, 0), True)])
    def test_an_old_gpu_is_named(self, monkeypatch, capability, accepted):
        module = SimpleNamespace(build_info=lambda: {"cuda": "80-real"})
        monkeypatch.setattr(_native, "module", lambda: module)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
        if accepted:
            _native._check_gpu(0)
        else:
            with pytest.raises(RuntimeError, match=r"Tesla T4 has .* 7\.5, .* need 8\.0"):
                _native._check_gpu(0)


PRINTS = r"""
import contextlib, os, sys
from clipvip.terminal import safe_output

with safe_output():
    kept = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
    for number in range(2000):
        print("text \u2192 video", number)
    print("caf\u00e9 \u2192 \udce9", file=sys.stderr)
    with contextlib.suppress(OSError):
        os.write(2, b"a library's\n")
    os.write(kept, b"kept")
"""


class TestOutput:
    """No terminal, pipe or full disk ends a command before its work is done."""

    @pytest.fixture
    def run(self, tmp_path):
        def run(redirect="", **environment):
            command = ["bash", "-c", f'"$@" {redirect}', "bash"]
            command += [sys.executable, "-c", PRINTS, str(tmp_path / "kept")]
            done = subprocess.run(command, capture_output=True, env=os.environ | environment)
            assert (tmp_path / "kept").read_bytes() == b"kept"
            return done

        return run

    @pytest.mark.parametrize("encoding", ["ascii", "latin-1", "ascii:strict", "utf-8"])
    def test_letters_that_a_terminal_lacks_are_escaped(self, run, encoding):
        done = run(PYTHONIOENCODING=encoding)
        assert done.returncode == 0
        arrow = "\u2192" if encoding == "utf-8" else r"\u2192"
        assert done.stdout.decode("utf-8").startswith(f"text {arrow} video 0\n")
        assert b"\\udce9" in done.stderr and b"Traceback" not in done.stderr

    def test_a_reader_that_leaves_ends_nothing(self, run):
        done = run("| head -1; exit ${PIPESTATUS[0]}")
        assert done.returncode == 0 and done.stdout.count(b"\n") == 1
        assert b"Traceback" not in done.stderr and b"Broken" not in done.stderr

    @pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
    def test_what_is_printed_to_closed_files_gets_into_no_other(self, run, closed):
        assert run(closed).returncode == 0

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
    def test_output_that_is_lost_to_a_full_disk_is_reported(self, run):
        done = run(">/dev/full")
        assert done.returncode == 1
        last = done.stderr.decode().splitlines()[-1]
        assert last.startswith("clipvip: error: output was lost: ") and "No space left" in last
        assert run("2>/dev/full").returncode == 0

    def test_a_full_pipe_that_does_not_block_is_waited_for(self, tmp_path):
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        command = [sys.executable, "-c", PRINTS.replace("2000", "20000"), str(tmp_path / "kept")]
        with subprocess.Popen(command, stdout=writer, stderr=subprocess.PIPE) as run:
            os.close(writer)
            with open(reader, "rb") as file:
                assert file.read().count(b"\n") == 20000
            run.communicate()
        assert run.returncode == 0
