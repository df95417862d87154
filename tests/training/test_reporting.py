"""What a run says of itself on a terminal."""

import io
from types import SimpleNamespace

from rich.console import Console

from clipvip.training.reporting import Reporter


def test_names_are_shown_as_they_are(tmp_path, capsys):
    out = tmp_path / "[b]run\x1b[2J"
    out.mkdir()
    accelerator = SimpleNamespace(is_main_process=True, trackers=[])
    with Reporter(accelerator, out, step=0, total=10) as reporter:
        reporter.say("bad files: [/b] \x1b[2J caf\udce9.mp4")
        drawn = Console(file=io.StringIO(), width=200)
        drawn.print(reporter.bar.get_renderable())
    assert r"[b]run\x1b[2J" in drawn.file.getvalue()
    assert capsys.readouterr().out == "bad files: [/b] \\x1b[2J caf\\xe9.mp4\n"
