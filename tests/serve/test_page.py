"""The page in a real browser, and the command that serves it."""

import base64
import itertools
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import uvicorn

import clipvip
from clipvip.index.tables import moment_id
from clipvip.serve.app import build_app
from clipvip.serve.server import listen

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class Browser:
    """A headless Chromium with one page, driven over a pipe by the DevTools protocol.

    errors: what the page has reported so far: exceptions, messages of the console, and refusals.
    """

    def __init__(self, program: str, profile: Path, width: int = 1280, height: int = 900) -> None:
        to_browser, ours_out = os.pipe()
        ours_in, from_browser = os.pipe()
        flags = (
            *("--headless=new", "--no-sandbox", "--remote-debugging-pipe", "--mute-audio"),
            *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
            *("--autoplay-policy=no-user-gesture-required", "--disable-gpu", "--lang=en-GB"),
        )
        options = [*flags, f"--user-data-dir={profile}", f"--window-size={width},{height}"]
        # The browser reads from descriptor 3 and writes to 4.
        script = 'exec 3<&"$1" 4>&"$2"; shift 2; exec "$@"'
        self.process = subprocess.Popen(
            ["bash", "-c", script, "bash", str(to_browser), str(from_browser), program, *options],
            pass_fds=(to_browser, from_browser),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self.out, self.input = ours_out, ours_in
        self.rest = b""
        self.numbers = itertools.count(1)
        self.errors: list[str] = []
        self.session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, seconds: float = 30.0, **parameters: Any) -> dict[str, Any]:
        number = next(self.numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + seconds
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == number:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self.rest:
            ready, *_ = select.select([self.input], [], [], max(deadline - time.monotonic(), 0))
            assert ready, "the browser does not answer"
            piece = os.read(self.input, 1 << 20)
            assert piece, "the browser has ended"
            self.rest += piece
        message, _, self.rest = self.rest.partition(b"\0")
        event = json.loads(message)
        if event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(event["params"]["exceptionDetails"]))
        if event.get("method") in ("Log.entryAdded", "Runtime.consoleAPICalled"):
            self.errors.append(json.dumps(event["params"]))
        return event

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def run(self, expression: str) -> Any:
        """Return the value of an expression in the page; of a promise, what it becomes."""
        result = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, expression: str, seconds: float = 60.0) -> Any:
        """Return the value of an expression once it is true."""
        deadline = time.monotonic() + seconds
        while not (value := self.run(expression)):
            assert time.monotonic() < deadline, f"{expression} did not become true; {self.errors}"
            time.sleep(0.05)
        return value

    def press(self, key: str) -> None:
        codes = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39}
        codes["ArrowDown"] = 40
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        code = codes.get(key, ord(key.upper()[0]))
        keys = {"key": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **keys)
        self.call("Input.dispatchKeyEvent", type="keyUp", **keys)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def screenshot(self, path: Path) -> None:
        data = self.call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        os.close(self.out)
        os.close(self.input)


@pytest.fixture(scope="module")
def address(index):
    app = build_app(index, index.where)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    with listen("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium in PATH")
def test_captions_fit_a_phone(address, tmp_path):
    browser = Browser(CHROMIUM, tmp_path)
    try:
        phone = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
        browser.call("Emulation.setDeviceMetricsOverride", **phone)
        browser.open(f"{address}/?q=red")
        browser.wait("document.querySelectorAll('.hit').length === 4")
        assert browser.run("document.documentElement.scrollWidth") == 360
        browser.run("document.querySelector('.open').click()")
        browser.wait("document.getElementById('player').open")
        box = "document.getElementById('caption').getBoundingClientRect()"
        assert browser.run(f"{box}.left >= 0 && {box}.right <= 360 && {box}.height < 100")
        assert browser.run("document.getElementById('player').scrollWidth") <= 360
        assert browser.run("document.activeElement.id") == "close"
    finally:
        browser.close()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium in PATH")
def test_the_page_finds_plays_and_is_driven_by_keys(address, tmp_path):
    browser = Browser(CHROMIUM, tmp_path)
    try:
        browser.open(f"{address}/?q=red")
        browser.wait("document.querySelectorAll('.hit').length === 4")
        # Names of files are text, whatever they hold.
        assert browser.run("document.body.textContent.includes('<img src=x onerror=alert(1)>')")
        assert browser.run("document.querySelector('.time').textContent") == "00:00:00–00:00:02"
        # So are captions, of which three lines are shown.
        captions = "[...document.querySelectorAll('#hits .caption')]"
        assert browser.run(f"{captions}.length") == 3
        hostile = r"'<img src=x onerror=alert(2)> \\x1b[31m\\u202e & </p>'"
        assert browser.run(f"{captions}.some(one => one.textContent === {hostile})")
        assert browser.run("document.querySelectorAll('img[src=x]').length") == 0
        cut = f"{captions}.filter(one => one.scrollHeight > one.clientHeight + 1)"
        assert browser.run(f"{cut}.map(one => one.clientHeight < 70)") == [True]
        whole = browser.run(f"{cut}[0].title")
        assert whole == browser.run(f"{cut}[0].textContent") and len(whole) > 200

        browser.press("/")
        browser.run("document.getElementById('q').select()")
        browser.type("blue")
        browser.press("Enter")
        browser.wait("location.search === '?q=blue'")
        browser.wait("document.querySelector('.name').textContent === 'blue.png'")
        browser.run("history.back()")
        browser.wait("document.querySelector('.name').textContent === 'red.mp4'")
        assert browser.run("document.getElementById('q').value") == "red"

        focused = "[...document.querySelectorAll('.open')].indexOf(document.activeElement)"
        browser.press("/")
        browser.press("ArrowDown")
        assert browser.run(focused) == 0
        browser.press("ArrowRight")
        assert browser.run(focused) == 1
        browser.press("ArrowLeft")
        browser.press("Enter")
        playing = "document.getElementById('player').open && !document.getElementById('video')"
        browser.wait(f"{playing}.paused && document.getElementById('video').videoWidth === 64")
        assert browser.run("document.getElementById('caption').textContent") == whole
        browser.press("ArrowRight")
        next_caption = "document.getElementById('caption').textContent"
        browser.wait(f"{next_caption} !== {json.dumps(whole)}")
        browser.press("ArrowLeft")
        browser.wait(f"{next_caption} === {json.dumps(whole)}")
        browser.press("Escape")
        browser.wait("!document.getElementById('player').open")
        assert browser.run(focused) == 0

        # What a browser cannot play is converted.
        old = "[...document.querySelectorAll('.hit')].find(hit => hit.textContent.includes('.avi'))"
        browser.run(f"{old}.querySelector('.open').click()")
        browser.wait("document.getElementById('video').src.includes('/api/clip/')")
        browser.wait("document.getElementById('video').videoWidth > 0")
        browser.press("m")
        browser.wait("location.search.startsWith('?like=')")
        browser.wait("document.querySelectorAll('.hit').length > 1")
        assert not [error for error in browser.errors if "/api/video/" not in error]
    finally:
        browser.close()


def test_the_command_starts_and_stops_and_says_why_it_cannot_start(index, tmp_path):
    command = tmp_path / "bin" / "clipvip"
    command.parent.mkdir()
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code += "\nif __name__ == '__main__':\n    from clipvip.cli import main\n    main()"
    command.write_text(code)
    here = tmp_path / "here"  # it may come from a stranger, as an index may
    here.mkdir()
    for name in ("signal", "socket"):
        (here / f"{name}.py").write_text("open('was imported', 'w').close()")

    def start(*arguments):
        return subprocess.Popen(
            [sys.executable, command, "serve", *map(str, arguments)],
            cwd=here,
            env=os.environ | {"PYTHONPATH": str(Path(clipvip.__file__).parents[1])},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    server = start("--index", os.path.relpath(index.where, here), "--port", 0)
    none = start("--index", tmp_path / "none", "--port", 0)
    line = server.stdout.readline()
    address = line.split("search at ")[1].split()[0]
    with urllib.request.urlopen(f"{address}/api/index") as answer:
        assert answer.status == 200
    blue = next(file.path for file in index.videos() if file.path.endswith("blue.png"))
    with urllib.request.urlopen(
        f"{address}/api/thumbnail/{moment_id(blue, None, None)}.jpg"
    ) as answer:
        assert answer.status == 200
    assert not (here / "was imported").exists()
    taken = start("--index", index.where, "--port", address.rpartition(":")[2])
    for refused, reason in ((taken, "is in use"), (none, "none")):
        _, error = refused.communicate(timeout=60)
        assert refused.returncode == 1 and reason in error and error.count("\n") == 1, error
    name, port = address.removeprefix("http://").split(":")
    half = b"POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
    with socket.create_connection((name, int(port))) as slow:  # still sends when the server stops
        slow.sendall(half + b"Content-Length: 9\r\n\r\n1")
        time.sleep(0.2)
        server.send_signal(signal.SIGINT)
        began = time.monotonic()
        assert server.wait(60) == 130
        assert time.monotonic() - began < 20
    assert server.stderr.read() == ""
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(address)
