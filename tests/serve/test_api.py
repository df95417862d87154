"""Properties of the API: what it answers, and what it refuses."""

import io
import json
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import av
import pytest
from PIL import Image
from starlette.testclient import TestClient

from clipvip.index.rows import Moment
from clipvip.serve import app as app_module
from clipvip.serve import media
from clipvip.serve.app import build_app
from clipvip.serve.routes import ROUTES


def search(client, **query):
    answer = client.get("/api/search", params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()["hits"]


@pytest.fixture
def red(client):
    return search(client, q="red", folder=None)[0]


def error(answer, status):
    """The sentence of an error."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    (sentence,) = answer.json().values()
    return sentence


# --- searches -------------------------------------------------------------------------------


def test_hits_come_best_first_with_all_that_a_client_needs(client, index):
    hits = search(client, q="something red")
    assert hits[0]["name"] == "red.mp4" and hits[0]["score"] == pytest.approx(1)
    assert (hits[0]["start"], hits[0]["end"], hits[0]["film"]) == (0, 2, [0, 7])
    assert [hit["score"] for hit in hits] == sorted((hit["score"] for hit in hits), reverse=True)
    assert search(client, q="blue")[0]["image"] is True
    assert len(search(client, q="red", k=1)) == 1


def test_lengths_too_large_for_json_are_described(client, index, monkeypatch):
    files = [replace(file, duration=1.7e308) for file in index.videos()]
    monkeypatch.setattr(index, "videos", lambda where=None: files)
    assert client.get("/api/index").json()["videos"] == len(files)


def test_filters_leave_files_out(client, index):
    names = {hit["name"] for hit in search(client, q="red", min_duration=1)}
    assert "blue.png" not in names and "red.mp4" in names
    found = search(client, q="red", after="2004-01-01", before="2010-01-01")
    assert {hit["name"] for hit in found} == {"green.avi"}
    folder = os.path.dirname(search(client, q="red")[0]["path"])
    assert search(client, q="red", folder=folder) == search(client, q="red")
    assert search(client, q="red", folder=folder[:-1]) == []


@pytest.mark.parametrize(
    "query",
    [
        "",
        "q=",
        "q=no+colour",
        "q=red&k=0",
        "q=red&k=201",
        "q=red&k=2e1",
        "q=red&k=%D9%A3",
        "q=red&q=blue",
        "&".join(f"a{number}=1" for number in range(51)),
        "q=red&folder=videos",
        "q=red&after=yesterday",
        "q=red&after=0000-00-00",
        "q=red&min_duration=nan",
        "q=red&max_duration=1e999",
        "q=" + "x" * 1001,
    ],
)
def test_a_wrong_value_is_named(client, query):
    assert error(client.get(f"/api/search?{query}"), 400)


def test_queries_of_any_bytes_are_answered(client):
    for query in ("red%00", "red%ff%fe", "red%ED%A0%80", "red%F0%9F%90%95", "%22red%22+--"):
        assert client.get(f"/api/search?q={query}").status_code == 200


def test_more_like_a_moment_leaves_it_out(client, red):
    answer = client.get(f"/api/like/{red['id']}")
    assert answer.status_code == 200
    assert red["id"] not in [hit["id"] for hit in answer.json()["hits"]]


def test_hits_have_captions_that_are_safe_to_show(client):
    texts = {hit["name"]: hit["caption"] for hit in search(client, q="red")}
    hostile = next(name for name in texts if name.startswith("<img"))
    assert texts.pop(hostile) == r"<img src=x onerror=alert(2)> \x1b[31m\u202e & </p>"
    assert texts.pop("red.mp4").startswith("a red square with a white bar")
    assert texts == {"blue.png": "a blue square", "green.avi": None}
    assert "caption" in client.get("/openapi.json").text


def test_what_is_in_the_index(client, index):
    about = client.get("/api/index").json()
    assert about["captions"] == 3
    assert about["moments"] == 5 and about["videos"] == 4 and about["can_add"] is True
    (folder,) = about["folders"]
    assert len(search(client, q="red", folder=folder["text"])) == len(search(client, q="red"))
    listed = client.get("/api/videos?limit=2&offset=1").json()
    assert listed["total"] == 4
    assert [file["name"] for file in listed["videos"]] == ["blue.png", "green.avi"]


def test_all_pictures_of_a_page_may_be_asked_for_at_once(client, red):
    url = f"/api/thumbnail/{red['id']}.jpg"
    with ThreadPoolExecutor(100) as pool:
        answers = pool.map(lambda _: client.get(url).status_code, range(100))
        assert set(answers) == {200}


# --- uploads --------------------------------------------------------------------------------


def test_an_image_and_a_video_are_searched_and_deleted(client, index, tmp_path, monkeypatch):
    monkeypatch.setattr(app_module.tempfile, "tempdir", str(tmp_path))
    picture = io.BytesIO()
    Image.new("RGB", (30, 20), "green").save(picture, "JPEG")
    film = next(f for f in index.videos() if f.path.endswith("green.avi"))
    for kind, data in (
        ("image/jpeg", picture.getvalue()),
        ("video/x-msvideo", Path(film.path).read_bytes()),
        ("application/octet-stream", Path(film.path).read_bytes()),
        ("application/octet-stream", picture.getvalue()),
    ):
        answer = client.post("/api/search?k=2", content=data, headers={"content-type": kind})
        assert answer.status_code == 200, answer.text
        assert answer.json()["hits"][0]["score"] == pytest.approx(1)
    assert not list(tmp_path.glob("clipvip-*"))


def test_an_upload_is_limited_and_checked(client, tmp_path, monkeypatch):
    monkeypatch.setattr(app_module.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(app_module, "UPLOAD_BYTES", 1 << 20)

    def post(data, kind="image/png"):
        return client.post("/api/search", content=data, headers={"content-type": kind})

    large = b"x" * ((1 << 20) + 1)
    assert "1 MB" in error(post(large), 413)
    assert "1 MB" in error(post(piece for piece in (large[:9], large)), 413)  # of unknown length
    assert "no image" in error(post(b"not an image"), 400)
    assert "empty" in error(post(b""), 400)
    for kind in ("text/plain", "multipart/form-data; boundary=x", "", "imagery/png"):
        assert error(post(b"x", kind), 415)
    assert not list(tmp_path.glob("clipvip-*"))


# --- files ----------------------------------------------------------------------------------


def test_a_thumbnail_shows_its_moment(client):
    hits = {(hit["name"], hit["start"]): hit for hit in search(client, q="red")}
    for (name, start), hit in hits.items():
        answer = client.get(f"/api/thumbnail/{hit['id']}.jpg")
        assert answer.status_code == 200, answer.text
        picture = Image.open(io.BytesIO(answer.content)).convert("RGB")
        if name == "red.mp4":  # the bar tells the second
            bright = sum(picture.getpixel((x, 18))[1] > 128 for x in range(64)) / 6
            assert start - 0.1 <= bright < start + 2
    again = client.get(
        f"/api/thumbnail/{hit['id']}.jpg", headers={"if-none-match": answer.headers["etag"]}
    )
    assert again.status_code == 304 and not again.content


def test_a_clip_is_a_film_of_the_moment_with_sound(client, index):
    for hit in search(client, q="red"):
        answer = client.get(f"/api/clip/{hit['id']}.mp4")
        if hit["image"]:
            assert error(answer, 422)
            continue
        assert answer.headers["content-type"] == "video/mp4"
        with av.open(io.BytesIO(answer.content)) as film:
            assert film.streams.video[0].codec_context.name == "h264"
            assert len(film.streams.audio) == (hit["name"] == "red.mp4")
            shown = min(hit["film"][1], 4) - hit["film"][0]
            assert film.duration / 1e6 == pytest.approx(shown, abs=0.3)


def test_parts_of_a_file_are_sent_as_rfc_9110_says(client, red):
    url, data = f"/api/video/{red['id']}", Path(red["path"]).read_bytes()
    size = len(data)
    whole = client.get(url)
    assert whole.status_code == 200 and whole.content == data
    assert whole.headers["accept-ranges"] == "bytes"
    tag = whole.headers["etag"]
    for given, start, stop in (
        ("bytes=0-0", 0, 1),
        ("bytes=5-9", 5, 10),
        ("bytes=7-", 7, size),
        ("bytes=-4", size - 4, size),
        (f"bytes=-{size + 9}", 0, size),
        (f"bytes=10-{size + 9}", 10, size),
    ):
        part = client.get(url, headers={"range": given})
        assert part.status_code == 206, given
        assert part.content == data[start:stop]
        assert part.headers["content-range"] == f"bytes {start}-{stop - 1}/{size}"
    for given in (f"bytes={size}-", "bytes=-0", "bytes=" + "9" * 18 + "-"):
        answer = client.get(url, headers={"range": given})
        assert error(answer, 416)
    for given in ("bytes=0-1,3-4", "lines=1-2", "bytes=9-5", "bytes=-", "bytes=a-b", "bytes=٣-"):
        answer = client.get(url, headers={"range": given.encode()})
        assert answer.status_code == 200 and answer.content == data, given
    kept = client.get(url, headers={"range": "bytes=0-1", "if-range": tag})
    assert kept.status_code == 206
    changed = client.get(url, headers={"range": "bytes=0-1", "if-range": '"other"'})
    assert changed.status_code == 200
    head = client.head(url)
    assert head.headers["content-length"] == str(size) and not head.content
    clip = client.get(f"/api/clip/{red['id']}.mp4", headers={"range": "bytes=4-7"})
    assert clip.status_code == 206 and clip.content == b"ftyp"


@pytest.mark.parametrize(
    "given",
    ["../../../etc/passwd", "..%2f..%2fetc%2fpasswd", "0" * 15, "0" * 17, "G" * 16, "%00", "%2e"],
)
def test_files_are_reached_by_ids_alone(client, given):
    for url in ("/api/video/{}", "/api/thumbnail/{}.jpg", "/api/clip/{}.mp4", "/api/like/{}"):
        answer = client.get(url.format(given))
        assert answer.status_code in (400, 404) and answer.json()["error"]
    assert error(client.get("/page/../app.py"), 404)
    assert error(client.get("/page/%2e%2e/app.py"), 404)


def test_an_unknown_id_is_not_found(client):
    for url in ("/api/video/{}", "/api/thumbnail/{}.jpg", "/api/clip/{}.mp4", "/api/like/{}"):
        assert error(client.get(url.format("0123456789abcdef")), 404)


def test_only_the_file_that_was_embedded_is_sent(index, tmp_path):
    """An index from a stranger may name any file."""
    video = tmp_path / "v.mp4"
    shutil.copy(next(f.path for f in index.videos() if f.path.endswith("red.mp4")), video)
    status = os.stat(video)

    def named(path, size=status.st_size):
        file = media.FileState(str(path), size, 0, "", "", 1.0, 0.0)
        return media.open_file(Moment("0" * 16, file, None, None).file)

    os.close(named(video))
    (tmp_path / "secret.txt").write_bytes(video.read_bytes())
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "folder.mp4").mkdir()
    for path, size in (
        (tmp_path / "secret.txt", status.st_size),
        (tmp_path / "pipe.mp4", 0),
        (tmp_path / "folder.mp4", os.stat(tmp_path / "folder.mp4").st_size),
        (tmp_path / "none.mp4", 0),
        (tmp_path / "nul\0.mp4", 0),
        ("/dev/zero", 0),
        (video, status.st_size + 1),
    ):
        with pytest.raises(media.ApiError) as raised:
            named(path, size)
        assert raised.value.status == 404


def test_hostile_names_are_safe_everywhere(client):
    answer = client.get("/api/search?q=red")
    hit = next(hit for hit in answer.json()["hits"] if "onerror" in hit["name"])
    assert answer.content.isascii()
    assert "\x1b" not in hit["name"] and "\u202e" not in hit["name"]
    assert hit["name"].encode() and hit["name"].endswith("\\xe9.mp4")
    for url in (f"/api/video/{hit['id']}", f"/api/thumbnail/{hit['id']}.jpg"):
        answer = client.get(url)
        assert answer.status_code == 200
        assert "onerror" not in str(answer.headers)
    assert client.get("/api/videos").content.isascii()


# --- who may ask ----------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "", "127.0.0.1@evil"])
def test_requests_for_another_host_are_refused(client, host):
    assert error(client.get("/api/index", headers={"host": host}), 403)
    assert error(client.get("/", headers={"host": host}), 403)


@pytest.mark.parametrize("host", ["localhost:9", "127.0.0.1", "[::1]:8000", "LOCALHOST"])
def test_requests_for_this_machine_are_answered(client, host):
    assert client.get("/api/index", headers={"host": host}).status_code == 200


def test_other_sites_may_open_the_page_and_nothing_else(client):
    foreign = {"origin": "http://evil.example"}
    for headers in (
        foreign,
        {"origin": "null"},
        {"origin": "http://["},
        {"sec-fetch-site": "cross-site"},
    ):
        assert error(client.post("/api/add", json={"path": "/"}, headers=headers), 403)
        assert error(client.post("/api/search", content=b"x", headers=headers), 403)
    cross = {"sec-fetch-site": "cross-site"}
    assert error(client.get("/api/index", headers=cross), 403)
    assert client.get("/", headers=cross).status_code == 200
    same = {"origin": "http://127.0.0.1:8000", "sec-fetch-site": "same-origin"}
    assert error(client.post("/api/add", json={"path": "relative"}, headers=same), 400)


def test_every_answer_forbids_scripts_from_elsewhere(client, red):
    for url in ("/", "/docs", "/api/index", "/nothing", "/api/search", f"/api/video/{red['id']}"):
        headers = client.get(url).headers
        assert "default-src '" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers
    assert "sandbox" in client.get(f"/api/video/{red['id']}").headers["content-security-policy"]


def test_the_page_holds_no_script_or_style_and_fetches_nothing_from_elsewhere(client):
    for url in ("/", "/docs", "/page/page.css", "/page/page.js"):
        text = client.get(url).text
        assert not re.search(r"<script[^>]*>[^<]|<style|\sstyle=|\son\w+=|innerHTML", text)
        assert "https://" not in text and "http://" not in text.replace("http://www.w3.org", "")


def test_a_server_for_others_adds_no_folders(index):
    with TestClient(build_app(index, index.where, "0.0.0.0", False), "http://10.0.0.2") as other:
        assert other.get("/api/index").json()["can_add"] is False
        assert error(other.post("/api/add", json={"path": "/"}), 403)


# --- adding ---------------------------------------------------------------------------------


def test_what_cannot_be_added_is_refused(client, tmp_path):
    def post(**given):
        return client.post("/api/add", **given)

    for path in ("", "Videos", str(tmp_path / "none"), "/nul\0", 5, None, "x" * 9999):
        assert error(post(json={"path": path}), 400)
    for body in (b"", b"{", b"[]", b"[" * 9999, b"\xff"):
        headers = {"content-type": "application/json"}
        assert error(post(content=body, headers=headers), 400)
    assert error(post(content=b"{}", headers={"content-type": "text/plain"}), 415)
    assert client.get("/api/add").json() == {"state": "idle"}


def test_adding_ends_with_a_message_and_its_time(index):
    with TestClient(build_app(index, index.where), base_url="http://localhost") as own:
        began = time.monotonic()
        state = own.post("/api/add", json={"path": os.path.dirname(index.where)}).json()
        while state["state"] == "running" and time.monotonic() - began < 100:
            time.sleep(0.1)
            state = own.get("/api/add").json()
    assert state["state"] == "failed" and "is not on this machine" in state["message"], state
    assert 0 < state["seconds"] <= time.monotonic() - began + 0.05  # it is rounded


# --- the table of routes --------------------------------------------------------------------


def test_each_route_is_documented_and_errors_are_sentences(client):
    described = client.get("/openapi.json").json()["paths"]
    page = client.get("/docs").text
    for route in ROUTES:
        assert described[route.path][route.method.lower()]["summary"] == route.summary
        assert route.path in page
        named = {p["name"] for p in described[route.path][route.method.lower()]["parameters"]}
        assert set(re.findall(r"{(\w+)}", route.path)) <= named
    assert error(client.get("/api/nothing"), 404)
    assert error(client.delete("/api/index"), 405)
    json.dumps(described)
