"""Downloads against a server on the loopback that cuts, stalls, refuses and corrupts."""

from __future__ import annotations

import concurrent.futures
import errno
import hashlib
import http.server
import io
import random
import re
import tarfile
import threading
import zipfile

import pandas as pd
import pytest
import small

from fastlora.errors import WorkError
from fastlora.finetune import data, homes

CONTENT = random.Random(0).randbytes(300_000)
SUM = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` by path. `plan` says what to do with each request in turn; when it is used up, serve well.

    ("cut", n): close after n bytes; ("stall", n): send n bytes and then nothing; an int: that status; ("flip", n): the
    byte n of the content inverted; "noise": no HTTP at all; "portal": a page in the place of the file.
    """

    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.plan, self.requests, self.over = files, [], 0, threading.Event()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, content = self.server, self.server.files[self.path]
        what = server.plan.pop(0) if server.plan else None
        kind, number = what if isinstance(what, tuple) else (what, 0)
        server.requests += 1
        if kind == "noise":
            self.wfile.write(b"\0" * 200)
        elif isinstance(what, int):
            self.send_error(what)
        else:
            if kind == "flip":
                content = content[:number] + bytes([content[number] ^ 255]) + content[number + 1 :]
            if kind == "portal":
                content = b"<html>Please log in</html>"
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: number if kind in ("cut", "stall") else None])
            if kind == "stall":
                self.wfile.flush()
                server.over.wait(20)
        self.close_connection = True

    def log_message(self, *_):
        """Nothing."""


@pytest.fixture
def server():
    with Server({"/file.bin": CONTENT}) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.over.set()
        server.shutdown()


def remote(server, path="/file.bin", sha256=SUM):
    return f"http://127.0.0.1:{server.server_port}{path}", sha256


def fetch(server, folder):
    return homes.download(*remote(server), folder)


@pytest.mark.parametrize(
    "plan",
    [[], [("cut", 70_000), ("flip", 1)], [("stall", 50_000)], [503, "noise"], ["portal"]],
    ids=str,
)
def test_what_goes_wrong_on_the_way_is_tried_again(server, tmp_path, monkeypatch, capfd, plan):
    monkeypatch.setattr(homes, "TIMEOUT", 0.3)
    server.plan = list(plan)
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.requests == len(plan) + 1
    assert "293k/293k" in capfd.readouterr().err  # the progress bar
    assert [path.name for path in tmp_path.iterdir()] == ["file.bin"]


def test_no_progress_gives_up_with_one_line(server, tmp_path):
    server.plan = [503] * 50
    with pytest.raises(WorkError, match=r"cannot be fetched \(.HTTP Error 503.*--data DIR") as caught:
        fetch(server, tmp_path)
    assert "\n" not in str(caught.value)
    assert server.requests == homes.ATTEMPTS


def test_a_refusal_is_not_asked_again_nor_a_file_that_is_there(server, tmp_path):
    server.plan = [404]
    with pytest.raises(WorkError, match="HTTP Error 404"):
        fetch(server, tmp_path)
    for _ in range(2):
        assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.requests == 2


def test_a_full_disk_is_no_fault_of_the_server(server, tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(homes, "download_url_to_file", lambda *_, **__: (_ for _ in ()).throw(full))
    with pytest.raises(OSError, match="No space left"):
        fetch(server, tmp_path)


def test_a_vocabulary_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    parts = [tmp_path / "encoder.json", tmp_path / "vocab.bpe"]
    for part in parts:
        part.write_bytes(CONTENT)
    small.cut_writes(monkeypatch, after=1)
    with pytest.raises(OSError, match="No space left"):
        homes.convert("gpt2", parts, tmp_path / "gpt2")
    assert [path.name for path in (tmp_path / "gpt2").iterdir()] == ["encoder.json"]


def test_corrupted_content_is_thrown_away(server, tmp_path):
    server.plan = [("flip", 1234)] * homes.ATTEMPTS
    with pytest.raises(WorkError, match="invalid hash value"):
        fetch(server, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert fetch(server, tmp_path).read_bytes() == CONTENT


def _sources(server, monkeypatch, name, **contents):
    parts = []
    for file, content in contents.items():
        path = "/" + file.replace("__", ".")
        server.files[path] = content
        parts.append(remote(server, path, hashlib.sha256(content).hexdigest()))
    monkeypatch.setitem(homes.SOURCES, name, dict(parts))


def test_ag_news_from_its_tables(server, tmp_path, monkeypatch):
    rows = b'"3","Wall St.","Short-sellers, again"\n"1","A ""b""","c"\n'
    _sources(server, monkeypatch, "ag_news", train__csv=rows, test__csv=rows)
    homes.fetch("ag_news", tmp_path)
    frame = pd.read_parquet(tmp_path / "ag_news" / "test.parquet")
    assert frame.text.tolist() == ["Wall St. Short-sellers, again", 'A "b" c']
    assert frame.label.tolist() == [2, 0]
    assert not data.missing(tmp_path, "ag_news")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".ag_news.lock", "ag_news"]


def test_imdb_from_its_archive_reads_only_reviews(server, tmp_path, monkeypatch):
    names = {
        "aclImdb/train/neg/0_2.txt": "bad",
        "aclImdb/train/pos/0_9.txt": "good é",
        "aclImdb/test/pos/7_10.txt": "x",
        "aclImdb/train/unsup/0_0.txt": "none",
        "aclImdb/test/neg/1_1.txt": "y",
        "../aclImdb/test/neg/2_1.txt": "z",
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in names.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    _sources(server, monkeypatch, "imdb", aclImdb__tar__gz=buffer.getvalue())
    homes.fetch("imdb", tmp_path / "in")
    train, test = (pd.read_parquet(tmp_path / "in" / "imdb" / f"{part}.parquet") for part in ("train", "test"))
    assert dict(zip(train.text, train.label, strict=True)) == {"bad": 0, "good é": 1}
    assert dict(zip(test.text, test.label, strict=True)) == {"x": 1, "y": 0}
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_spam_from_its_archive_equals_the_published_split(data_dir, server, tmp_path, monkeypatch):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.write(data_dir / "spam" / "SMSSpamCollection.tsv", "SMSSpamCollection")
    _sources(server, monkeypatch, "spam", sms__zip=buffer.getvalue())
    homes.fetch("spam", tmp_path)
    for part in ("train", "valid", "test"):
        ours, theirs = (pd.read_parquet(folder / "spam" / f"{part}.parquet") for folder in (tmp_path, data_dir))
        pd.testing.assert_frame_equal(ours, theirs)


def test_eight_at_once_fetch_once(server, tmp_path, monkeypatch):
    # Each thread opens the lock file for itself, so that they exclude each other as processes do.
    rows = b'"3","Wall St.","Short-sellers"\n' * 1000
    _sources(server, monkeypatch, "ag_news", train__csv=rows, test__csv=rows)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: homes.fetch("ag_news", tmp_path), range(8)))
    assert server.requests == 2
    assert len(pd.read_parquet(tmp_path / "ag_news" / "train.parquet")) == 1000


def test_auto_looks_in_the_named_folder_then_the_cache_then_the_network(server, tmp_path, monkeypatch):
    named, cache = tmp_path / "named", tmp_path / "cache"
    monkeypatch.setenv("FASTLORA_DATA", str(named))
    monkeypatch.setenv("FASTLORA_CACHE", str(cache))
    _sources(server, monkeypatch, "gpt2", encoder__json=b"{}", vocab__bpe=b"#")
    assert data.locate("auto", "gpt2") == cache / "data"
    assert server.requests == 2
    assert data.locate("auto", "gpt2") == cache / "data"
    (named / "gpt2").mkdir(parents=True)
    for file in data.FILES["gpt2"]:
        (named / file).write_bytes(b"mine")
    assert data.locate("auto", "gpt2") == named
    assert server.requests == 2
    assert data.found()["gpt2"] == str(named)


def test_every_data_set_has_a_home():
    assert set(homes.SOURCES) == set(data.FILES)
    for url, sha256 in (part for parts in homes.SOURCES.values() for part in parts.items()):
        assert re.fullmatch(r"[0-9a-f]{64}", sha256) and url.startswith("https://")
