"""Data at a URL is what it is on the disk, and leaves nothing there."""

import functools
import http.server
import importlib.util
import json
import tempfile
import threading

import fsspec
import pytest

from lizard_jax.errors import UserError
from tests.data.test_records import read, texts


@pytest.fixture(autouse=True)
def beside(tmp_path, monkeypatch):
    """Where copies lie while they are read."""
    place = tmp_path / "beside"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield place
    assert not list(place.iterdir())


@pytest.fixture
def store():
    """An object store in this process's memory."""
    found = fsspec.filesystem("memory")
    found.pipe("/bucket/a.txt", b"one<|endoftext|>two")
    found.pipe("/bucket/deep/b.jsonl", b'{"text": "three"}\n{"text": "four"}\n')
    found.pipe("/bucket/README.md", b"what this is")
    found.pipe("/bucket/bad.csv", b"not read")
    yield found
    found.rm("/bucket", recursive=True)


@pytest.fixture
def web(tmp_path):
    """A server of files on this machine; gives its address and folder."""
    folder = tmp_path / "web"
    folder.mkdir()

    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(quiet, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", folder
        server.shutdown()
        thread.join()


def test_a_file_and_a_directory_of_a_store(store):
    assert texts("memory://bucket/a.txt") == ["one", "two"]
    assert texts("memory://bucket/deep/b.jsonl") == ["three", "four"]
    assert texts("memory://bucket") == texts("memory://bucket/") == ["one", "two", "three", "four"]


def test_a_file_of_the_web(web):
    address, folder = web
    # A text with links in it is a text.
    (folder / "a.txt").write_text(f'<a href="{address}/b.txt">there</a><|endoftext|>two')
    assert texts(f"{address}/a.txt?version=2") == [f'<a href="{address}/b.txt">there</a>', "two"]
    with pytest.raises(UserError, match=rf"no data at {address}/none.txt: there is no such file or directory"):
        texts(f"{address}/none.txt")


def test_what_is_wrong_is_told_of_the_url(store):
    store.pipe("/bucket/deep/c.jsonl", b'{"text": "one"}\n{"text"\n')
    with pytest.raises(UserError, match=r"malformed JSON in memory://bucket/deep/c.jsonl, line 2: "):
        texts("memory://bucket/deep/c.jsonl")
    store.pipe("/bucket/deep/d.jsonl", json.dumps({"instruction": 3, "output": "x"}).encode())
    with pytest.raises(UserError, match=r"memory://bucket/deep/d.jsonl, line 1 is not an Alpaca record: 'instruction'"):
        read("memory://bucket/deep/d.jsonl")
    with pytest.raises(UserError, match=r"^no data at memory://bucket/none: there is no such file or directory$"):
        texts("memory://bucket/none")
    store.pipe("/bucket/images/a.png", b"")
    with pytest.raises(UserError, match=r"^the directory memory://bucket/images holds no data: none of its files ends"):
        texts("memory://bucket/images/")


def test_a_store_that_is_not_known_or_not_installed_is_told():
    with pytest.raises(UserError, match=r"^cannot read nowhere://bucket/a.txt: Protocol not known: nowhere"):
        texts("nowhere://bucket/a.txt")
    if importlib.util.find_spec("gcsfs") is None:
        with pytest.raises(UserError, match=r"^cannot read gs://bucket/a.txt: .*gcsfs"):
            texts("gs://bucket/a.txt")


def test_a_reader_that_stops_leaves_nothing(store):
    from lizard_jax.config import DataConfig
    from lizard_jax.data.records import documents
    from tests.data.toy import character_tokenizer

    found = documents(DataConfig(path="memory://bucket/a.txt"), character_tokenizer())
    assert next(found).text == "one"
    found.close()
