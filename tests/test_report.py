"""The report shows every record, needs nothing from elsewhere, and fits exponents rightly."""

import ast
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import records
import report
import tables

BENCH = Path(__file__).parents[1] / "bench"
MACHINE = {
    "cpu": "A <fast> CPU & more",
    "cores": 2,
    "torch": "2.13.0",
    "malloc": "default",
    "load": 0.5,
    "date": "2026-01-01",
    "commit": "abc",
    "ceilings": {"matmul_fp32_gflops": 100.0, "matmul_bf16_gflops": 400.0, "copy_gib_s": 10.0},
}
VOID = {"meta", "br", "hr", "img", "input", "link"}


def result(ms: float, mib: float, ratio: float | None = None) -> dict:
    figures = {"median_ms": ms, "low_ms": 0.9 * ms, "high_ms": 1.2 * ms, "min_ms": 0.9 * ms}
    return figures | {"ratio": ratio, "rounds": 5, "error": 1e-6, "peak_mib": mib}


def record(suite: str, case: str, results: dict, **more) -> dict:
    params = {"dtype": "float32"}
    rest = {"machine": MACHINE, "params": params, "left_out": {}, "work": {}} | more
    return {"suite": suite, "case": case, "results": results, **rest}


def sweep(case: str, over: str, values: list[int], forms: dict) -> dict:
    points = [
        {
            "value": n,
            "results": {each: result(*form(n)) for each, form in forms.items()},
            "left_out": {"masked SDPA": "minutes"} if n > 4 else {},
        }
        for n in values
    ]
    return record(
        "growth",
        case,
        points[-1]["results"],
        sweep={"over": over, "values": values},
        points=points,
    )


RECORDS = [
    record(
        "ops",
        "attention-b16-both-default",
        {
            "eager": result(20, 100, 1.0),
            "two SDPA": result(16, 50, 0.8),
            "ours": result(8, 25, 0.4),
        },
        work={"flop": 4e8, "bytes": 2**20},
        left_out={"FlexAttention": "no <backward> & such"},
    ),
    record(
        "ops",
        "loss-fp32-4096-tuned",
        {"naive": result(20, 0.0, 1.0), "ours": result(10, 0.0, 0.5)},
        machine=MACHINE | {"malloc": "tuned"},
    ),
    record("ops", "loss-fp32-32768-default", {"chunked": result(9, 5), "ours": result(8, 4)}),
    record("train", "b16", {"eager": result(2000, 900, 1.0)}),
    record("decode", "340x256", {"ours": result(10, 3, 1.0), "decord": result(20, 3, 2.0)}),
    record("other", "x", {"eager": result(1, 1, 1.0), "ours": result(1, 1, 1.0)}, machine={}),
    record(
        "ops",
        "attention-b16-batch32-both-cuda",
        {
            "eager": result(4, 900, 1.0) | {"host_ms": 0.3},
            "FlexAttention": result(2, 500, 0.5) | {"host_ms": 0.2},
            "ours": result(1, 90, 0.25) | {"host_ms": 0.05},
        },
        params={"dtype": "bfloat16", "device": "cuda"},
        work={"flop": 1.6e8, "bytes": 1e6},
        machine=MACHINE | {"gpu": "H200"},
    ),
    record(
        "ops",
        "attention-b16-batch128-both-cuda",
        {"eager": result(4, 900, 1.0)},
        params={"dtype": "bfloat16", "device": "cuda"},
        left_out={"ours": "died of SIGSEGV"},
    ),
    record("ops", "loss-bf16-64-cuda", {}, params={"device": "cuda"}, left_out={"ours": "hung"}),
    sweep(
        "rows",
        "rows",
        [1, 2, 4, 8, 16],
        {"naive": lambda n: (3 * n**2, 5 * n**2), "ours": lambda n: (n**2 / 4, 7 * n)},
    ),
]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for each in RECORDS:
        (tmp_path / f"{each['suite']}-{each['case']}.json").write_text(json.dumps(each))
    (tmp_path / "demo.json").write_text(json.dumps({"R@1": 84.7}))
    (tmp_path / "list.json").write_text("[1, 2]")
    return tmp_path


class Page(HTMLParser):
    """Open elements are closed in order; what is asked for from elsewhere; the text of cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wanted: list[str] = []
        self.ids: list[str] = []
        self.cells: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag not in VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")
        self.wanted += [value for key, value in attrs if key in ("src", "href", "xlink:href")]
        self.ids += [value for key, value in attrs if key == "id"]

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.cells[-1] += data


def test_the_page_is_whole_and_needs_nothing_from_elsewhere(directory: Path):
    table, page = report.write(directory)
    assert [table.name, page.name] == ["report.md", "report.html"]
    text = page.read_text()
    parsed = Page(text)
    assert parsed.wanted and all(value.startswith("#") for value in parsed.wanted)
    assert set(value[1:] for value in parsed.wanted) <= set(parsed.ids)
    assert len(set(parsed.ids)) == len(parsed.ids)
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert not list(directory.glob("*.partial"))


def test_every_record_and_contestant_is_shown(directory: Path):
    text = report.write(directory)[1].read_text()
    cells = Page(text).cells
    for each in RECORDS:
        for contestant in each["results"]:
            assert contestant in cells
        if "points" not in each and each["results"]:
            assert records.name(each) in cells
    assert "no &lt;backward&gt; &amp; such" in text and "minutes" in text
    assert "<b>ours</b> (bf16-64): hung" in text  # which has no results to show
    assert "A <fast> CPU & more" in cells
    assert "demo.json" in text and "list.json" in text


def test_the_same_records_make_the_same_page(directory: Path):
    once = [path.read_bytes() for path in report.write(directory)]
    assert once == [path.read_bytes() for path in report.write(directory)]


def test_markdown_has_a_line_a_record(directory: Path):
    lines = tables.markdown(records.read(directory)[0]).splitlines()
    for each in RECORDS:
        assert any(line.startswith(f"| {records.name(each)}") for line in lines)
    (line,) = (line for line in lines if line.startswith("| b16-both"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    # 4e8 operations in 8 ms are half of 100 GFLOP/s
    figures = ["20.0", "16.0 (two SDPA)", "**8.00**", "0.40", "0.50", "100", "25.0", "0.25", "50%"]
    assert cells[1:] == figures
    columns = [line.count("|") for line in lines if line.startswith("|")]
    assert all(count in (5, 4, 11, 14) for count in columns)


def test_a_gpus_lines_have_both_floors_and_say_where_ours_fails(directory: Path):
    lines = tables.markdown(records.read(directory)[0]).splitlines()
    (line,) = (line for line in lines if line.startswith("| b16-batch32-both"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    # 1.6e8 operations at 400 GFLOP/s, 1e6 bytes at 10 GiB/s; at an H100's 800 TFLOP/s and 3 TB/s
    figures = ["4.00", "2.00 (FlexAttention)", "**1.00**", "0.05", "0.25", "0.50"]
    figures += ["0.40", "0.00033", "40%", "900", "90.0", "0.10"]
    assert cells[1:] == figures
    (line,) = (line for line in lines if line.startswith("| b16-batch128-both"))
    assert "| 4.00 | – | **fails** | – |" in line
    step = record("train", "b16", {"eager": result(2000, 900, 1.0)}, params={"videos": 8})
    assert "   4.00" in tables.contestants(step)  # clips per second
    text = tables.summary(RECORDS)
    assert "floor ms  H100 floor" in text and "left out of 1 of" in text
    (line,) = (x for x in text.splitlines() if x.startswith("ops loss-bf16-64-cuda"))
    assert "fails" in line


def test_without_matplotlib_there_is_no_page_and_a_line_says_so(
    directory: Path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    report.main([str(directory)])
    assert "report.html needs matplotlib and was not written" in capsys.readouterr().out
    assert (directory / "report.md").exists() and not (directory / "report.html").exists()


@pytest.mark.parametrize("power", [0.5, 1, 2])
def test_exponents_are_those_of_a_power(power: float):
    values = [1, 2, 4, 8, 16, 32]
    found = records.fit(values, [3 * n**power for n in values])
    assert found and found.exponent == pytest.approx(power) and found.factor == pytest.approx(3)
    assert found.first == 8


def test_exponents_are_of_the_larger_half_and_pass_over_nothing():
    values = [1, 2, 4, 8, 16, 32]
    late = [5, 5, 5, 64, 256, 1024]  # a constant that the square overtakes
    fitted = records.fit(values, late)
    assert fitted and fitted.exponent == pytest.approx(2)
    assert records.fit(values, [0, 0, 0, 0, 0, 7]) is None
    rows = next(each for each in RECORDS if each["suite"] == "growth")
    assert records.exponents(rows)["naive"] == pytest.approx({"time": 2, "memory": 2})
    assert records.exponents(rows)["ours"] == pytest.approx({"time": 2, "memory": 1})


def test_the_pages_hold_the_tables_of_the_results():
    for path, table in report.pages(records.read(report.RESULTS)[0]).items():
        before, after = report.around(path)
        expected = f"{before}{report.MARKS[0]}\n\n{table}\n\n{report.MARKS[1]}{after}"
        assert path.read_text() == expected, "run `python bench/report.py --pages`"


def test_the_readmes_table_has_every_row_and_names_machine_dates_and_command():
    table, footer = tables.short(records.read(report.RESULTS)[0]).split("\n\n")
    assert len(table.splitlines()) == 2 + len(tables.SHORT)
    assert "AMD EPYC, 2 cores, torch 2.13.0" in footer and "`clipvip bench`" in footer
    assert re.search(r"\d{4}-\d\d-\d\d", footer)
    with pytest.raises(ValueError, match="none of the 6 cases"):
        tables.short(RECORDS)
    title, case = tables.SHORT[0]
    suite, case = case.split(" ")
    timed = {
        "eager": result(2000, 100, 1.0),
        "two SDPA": result(16, 50),
        "ours": result(8, 25, 0.4),
    }
    (row,) = (x for x in tables.short([record(suite, case, timed)]).splitlines() if title in x)
    figures = "| 2.00 s | 16.0 ms (two SDPA) | **8.00 ms** | 0.40 | 0.25 |"
    assert row == f"| {title} {figures}"


def test_tables_go_between_the_marks_and_nowhere_else(tmp_path: Path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.MARKS[0]}\nold\n{report.MARKS[1]}\nafter\n")
    report.put_into(readme, "new")
    report.put_into(readme, "newer")
    marked = f"before\n{report.MARKS[0]}\n\nnewer\n\n{report.MARKS[1]}\nafter\n"
    assert readme.read_text() == marked
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="does not hold the lines"):
        report.put_into(readme, "new")


MEASURING = ("harness", "device", "machine", "cases", "peers")
PRESENTING = ("tables", "pictures", "page", "report", "changes")


def imports_of(module: str) -> set[str]:
    """First names of all that a module of bench/ imports, anywhere in its file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((BENCH / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).partition(".")[0])
    return found


def test_measuring_imports_records_and_nothing_that_presents():
    suites = [name for suite in records.SUITES.values() for name in suite.modules]
    for module in ("records", *MEASURING, *suites):
        assert not imports_of(module) & {*PRESENTING}, module
    for module in ("records", *PRESENTING):
        assert not imports_of(module) & {*MEASURING, *suites, "torch"}, module


def test_bad_directories_end_with_a_line(tmp_path: Path):
    with pytest.raises(SystemExit, match="holds no benchmark records"):
        report.main([str(tmp_path)])
    (tmp_path / "ops-x.json").write_text("{")
    with pytest.raises(SystemExit, match=r"ops-x\.json is not JSON"):
        report.main([str(tmp_path)])
