from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

import scfm
from scfm.checkpoints import _pins, fetch, fetch_file
from scfm.checkpoints._registry import ByHand, Citation, Entry, Licence, Mirror, RemoteFile

OPEN = Licence("MIT", "https://example.org/mit", "yes", "Do what you like.")
CLOSED = Licence("Research only", "https://example.org/closed", "no", "No commercial use.")


CONTENT = bytes(range(256)) * 2000


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def make_entry(name: str = "toy", *, files: list[RemoteFile], licence: Licence = OPEN, **values: object) -> Entry:
    return Entry(
        name=name,
        backbone=values.pop("backbone", "toy"),
        title="a toy",
        files=tuple(files),
        licence=licence,
        citation=Citation("Nobody. A toy. 2020.", "10.1000/toy"),
        by_hand=ByHand("https://example.org/folder", "Open the folder and take the files."),
        **values,
    )


def break_off(handler, content):
    """Promise everything, send half, hang up."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[: len(content) // 2])
    handler.wfile.flush()
    handler.close_connection = True


def unavailable(handler, content):
    handler.send_error(503)


def remote(server, name="weights.bin", content=CONTENT, **values):
    server.content[name] = content
    values = {"sha256": sha256(content), "hash_verified": True, "hash_source": "the authors", **values}
    return RemoteFile(name, "weights", url=f"{server.url}/{name}", **values)


def files_in(directory):
    return sorted(path.name for path in directory.iterdir())


def test_download_is_verified_and_not_repeated(server, register):
    register(
        make_entry(files=[remote(server), remote(server, "genes.txt", b"A\nB\n", sha256=None, hash_verified=False)])
    )
    directory = fetch("toy")
    assert directory == scfm.settings.cachedir / "toy"
    assert (directory / "weights.bin").read_bytes() == CONTENT
    assert fetch("TOY") == directory
    assert sorted(server.requests) == ["genes.txt", "weights.bin"]
    assert files_in(directory) == ["genes.txt", "genes.txt.sha256", "weights.bin", "weights.bin.sha256"]


def test_one_file_only(server, register):
    register(make_entry(files=[remote(server), remote(server, "genes.txt", b"A\n")]))
    assert fetch_file("toy", "genes.txt").read_text() == "A\n"
    assert server.requests == ["genes.txt"]


def test_optional_files_are_left_out(server, register):
    register(make_entry(files=[remote(server), remote(server, "side.txt", b"x", required=False)]))
    fetch("toy")
    assert server.requests == ["weights.bin"]


def test_wrong_hash_keeps_nothing(server, register):
    register(make_entry(files=[remote(server, sha256="0" * 64)]))
    with pytest.raises(scfm.CheckpointError, match=r"download of weights\.bin.*expected is 0{64}.*Nothing was kept"):
        fetch("toy")
    assert files_in(scfm.settings.cachedir / "toy") == []


def test_uncertain_hash_warns_and_pins(server, register, capsys):
    register(make_entry(files=[remote(server, sha256="0" * 64, hash_verified=False, hash_source="third party")]))
    path = fetch("toy") / "weights.bin"
    assert "The expected hash is not certain" in capsys.readouterr().err
    fetch("toy")
    assert "not certain" not in capsys.readouterr().err
    path.write_bytes(b"changed")
    with pytest.raises(scfm.CheckpointError, match="at first use"):
        fetch("toy")


def test_broken_transfer_is_tried_again(server, register):
    register(make_entry(files=[remote(server, sha256=None, hash_verified=False)]))
    server.behaviour["weights.bin"] = [break_off, unavailable]
    assert (fetch("toy") / "weights.bin").read_bytes() == CONTENT
    assert len(server.requests) == 3


def test_transfer_that_always_breaks_leaves_nothing(server, register):
    register(make_entry(files=[remote(server, sha256=None, hash_verified=False)]))
    server.behaviour["weights.bin"] = [break_off] * 3
    with pytest.raises(ConnectionError, match="broke off") as error:
        fetch("toy")
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__
    assert files_in(scfm.settings.cachedir / "toy") == []
    assert (fetch("toy") / "weights.bin").read_bytes() == CONTENT


class Versioned:
    """Names the version of the file, answers ranges of it, and hangs up after ``n_bytes``."""

    def __init__(self, tag: str, n_bytes: int | None = None, shift: int = 0) -> None:
        self.tag, self.n_bytes, self.shift = tag, n_bytes, shift

    def __call__(self, handler, content):
        asked = handler.headers.get("Range", "")
        whole = not asked or handler.headers["If-Range"] != self.tag
        begin = 0 if whole else int(asked.removeprefix("bytes=").removesuffix("-")) + self.shift
        handler.send_response(200 if whole else 206)
        if not whole:
            handler.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        handler.send_header("ETag", self.tag)
        handler.send_header("Content-Length", str(len(content) - begin))
        handler.end_headers()
        handler.wfile.write(content[begin:][: self.n_bytes])
        handler.close_connection = True


HALF = len(CONTENT) // 2


def test_broken_transfer_goes_on_where_it_ended(server, register):
    register(make_entry(files=[remote(server)]))
    server.behaviour["weights.bin"] = [Versioned('"a"', HALF), Versioned('"a"', 1000), Versioned('"a"')]
    assert (fetch("toy") / "weights.bin").read_bytes() == CONTENT
    assert server.ranges == ["", f"bytes={HALF}-", f"bytes={HALF + 1000}-"]
    assert files_in(scfm.settings.cachedir / "toy") == ["weights.bin", "weights.bin.sha256"]


def test_a_later_call_goes_on_where_an_earlier_one_ended(server, register):
    register(make_entry(files=[remote(server)]))
    server.behaviour["weights.bin"] = [Versioned('"a"', HALF), unavailable, unavailable, Versioned('"a"')]
    with pytest.raises(ConnectionError, match="503"):
        fetch("toy")
    assert not (scfm.settings.cachedir / "toy" / "weights.bin").exists()
    assert (fetch("toy") / "weights.bin").read_bytes() == CONTENT
    assert server.ranges[-1] == f"bytes={HALF}-"
    assert files_in(scfm.settings.cachedir / "toy") == ["weights.bin", "weights.bin.sha256"]


@pytest.mark.parametrize("tags", [('"a"', '"b"'), ('W/"a"', 'W/"a"')], ids=["changed", "weak"])
def test_a_file_that_may_have_changed_starts_again(server, register, tags):
    old = bytes(len(CONTENT))
    register(make_entry(files=[remote(server)]))

    def first(handler, content):
        Versioned(tags[0], HALF)(handler, old)

    server.behaviour["weights.bin"] = [first, Versioned(tags[1])]
    assert (fetch("toy") / "weights.bin").read_bytes() == CONTENT


def test_the_wrong_part_is_not_joined(server, register):
    register(make_entry(files=[remote(server)]))
    server.behaviour["weights.bin"] = [Versioned('"a"', HALF), Versioned('"a"', shift=1), Versioned('"a"')]
    assert (fetch("toy") / "weights.bin").read_bytes() == CONTENT
    assert server.ranges == ["", f"bytes={HALF}-", ""]


def test_a_part_longer_than_the_file_starts_again(server, register):
    register(make_entry(files=[remote(server)]))

    def refuse(handler, content):
        handler.send_error(416)

    server.behaviour["weights.bin"] = [Versioned('"a"', HALF), refuse, Versioned('"a"')]
    assert (fetch("toy") / "weights.bin").read_bytes() == CONTENT
    assert server.ranges == ["", f"bytes={HALF}-", ""]


def test_wrong_hash_of_a_joined_file_keeps_nothing(server, register):
    register(make_entry(files=[remote(server, sha256=sha256(b"other"))]))
    server.behaviour["weights.bin"] = [Versioned('"a"', HALF), Versioned('"a"')]
    with pytest.raises(scfm.CheckpointError):
        fetch("toy")
    assert files_in(scfm.settings.cachedir / "toy") == []


def test_refusal_is_not_repeated(server, register):
    register(make_entry(files=[replace(remote(server), url=f"{server.url}/gone")]))
    with pytest.raises(ConnectionError, match="the server answers 404") as error:
        fetch("toy")
    assert not isinstance(error.value, scfm.OfflineError)
    assert server.requests == ["gone"]


def test_no_network(server, register):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/weights.bin"
    register(make_entry(files=[replace(remote(server), url=url)]))
    with pytest.raises(scfm.OfflineError, match="cannot be reached.*Check the network") as error:
        fetch("toy")
    assert error.value.__suppress_context__
    assert len(str(error.value)) < 300


def test_full_disk_names_the_setting(server, register, monkeypatch):
    import pooch

    def full(self, url, output, pooch):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", full)
    register(make_entry(files=[remote(server)]))
    with pytest.raises(OSError, match="no space left.*SCFM_CACHE"):
        fetch("toy")


# -- offline and by hand ---------------------------------------------------------------------------------------------


def test_offline_opens_no_socket_and_says_what_to_do(server, register, monkeypatch):
    register(make_entry(files=[remote(server), RemoteFile("by_hand.bin", "config")]))
    scfm.settings.offline = True
    monkeypatch.setattr(socket, "socket", lambda *args, **kwargs: pytest.fail("a socket was opened"))
    with pytest.raises(scfm.OfflineError) as error:
        fetch("toy")
    for part in (
        "weights.bin",
        "by_hand.bin",
        server.url,
        "https://example.org/folder",
        str(scfm.settings.cachedir / "toy"),
    ):
        assert part in str(error.value)
    assert not scfm.settings.cachedir.exists()


def test_files_put_by_hand_are_used_offline(server, register):
    register(make_entry(files=[remote(server), RemoteFile("by_hand.bin", "config")]))
    scfm.settings.offline = True
    directory = scfm.settings.cachedir / "toy"
    directory.mkdir(parents=True)
    (directory / "weights.bin").write_bytes(CONTENT)
    (directory / "by_hand.bin").write_bytes(b"anything")
    assert fetch("toy") == directory
    assert server.requests == []


def test_wrong_file_put_by_hand_is_refused_and_kept(server, register):
    register(make_entry(files=[remote(server)]))
    directory = scfm.settings.cachedir / "toy"
    directory.mkdir(parents=True)
    (directory / "weights.bin").write_bytes(CONTENT[:-1])
    with pytest.raises(scfm.CheckpointError, match=r"damaged, cut off or was changed.*fetch it again"):
        fetch("toy")
    assert (directory / "weights.bin").read_bytes() == CONTENT[:-1]
    assert server.requests == []


def test_by_hand_file_is_explained(server, register):
    register(make_entry(files=[RemoteFile("by_hand.bin", "weights"), remote(server, "genes.txt", b"A")]))
    with pytest.raises(
        FileNotFoundError, match=r"(?s)by_hand\.bin cannot be downloaded.*example\.org/folder.*put by_hand\.bin into"
    ):
        fetch("toy")
    assert server.requests == []


def test_mirror_is_used_only_when_named(server, register):
    server.content["copy"] = CONTENT
    mirror = Mirror(
        "elsewhere", "https://example.org/copy", "a copy of somebody else", {"weights.bin": f"{server.url}/copy"}
    )
    register(make_entry(files=[RemoteFile("weights.bin", "weights")], mirrors=(mirror,)))
    with pytest.raises(FileNotFoundError, match=r"(?s)a copy of somebody else.*mirror='elsewhere'"):
        fetch("toy")
    assert (fetch("toy", mirror="elsewhere") / "weights.bin").read_bytes() == CONTENT


def test_own_directory(server, register, tmp_path):
    register(make_entry(files=[remote(server)]))
    own = tmp_path / "own"
    own.mkdir()
    with pytest.raises(FileNotFoundError, match=r"own lacks weights\.bin"):
        fetch("toy", path=own)
    (own / "weights.bin").write_bytes(CONTENT)
    assert fetch("toy", path=own) == own
    assert files_in(own) == ["weights.bin"]
    (own / "weights.bin").write_bytes(b"other")
    with pytest.raises(scfm.CheckpointError, match="damaged"):
        fetch("toy", path=str(own))
    assert server.requests == []


# -- licences --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("commercial", ["no", "unstated"])
def test_licence_gate(server, register, commercial):
    register(make_entry(files=[remote(server)], licence=replace(CLOSED, commercial=commercial)))
    with pytest.raises(scfm.LicenseError, match=r"(?s)Research only.*accept_licenses = True.*SCFM_ACCEPT_LICENSES=1"):
        fetch("toy")
    assert server.requests == []
    scfm.settings.accept_licenses = True
    assert (fetch("toy") / "weights.bin").is_file()
    scfm.settings.accept_licenses = False
    fetch("toy")


def test_open_side_files_pass_the_gate(server, register):
    register(
        make_entry(files=[remote(server), remote(server, "genes.txt", b"A", licence="Apache-2.0")], licence=CLOSED)
    )
    assert fetch_file("toy", "genes.txt").is_file()
    with pytest.raises(scfm.LicenseError):
        fetch("toy")


def test_licence_is_shown_once(register, capsys, monkeypatch):
    from scfm.checkpoints.fetch import show_licence

    monkeypatch.setattr(sys.modules["scfm.checkpoints.fetch"], "_shown", set())
    entry = make_entry(files=[], licence=OPEN)
    show_licence(entry)
    text = capsys.readouterr().err
    assert "MIT" in text
    assert "Do what you like." in text
    assert "10.1000/toy" in text
    show_licence(entry)
    assert capsys.readouterr().err == ""


# -- the cache -------------------------------------------------------------------------------------------------------


def test_read_only_cache(server, register, read_only):
    register(make_entry(files=[remote(server)]), make_entry("other", files=[remote(server, "other.bin")]))
    directory = scfm.settings.cachedir / "toy"
    directory.mkdir(parents=True)
    (directory / "weights.bin").write_bytes(CONTENT)
    read_only(scfm.settings.cachedir)
    assert fetch("toy") == directory
    with pytest.raises(PermissionError, match="cannot write to.*SCFM_CACHE"):
        fetch("other")
    assert server.requests == []
    assert files_in(directory) == ["weights.bin"]


def test_cache_below_a_file(server, register, tmp_path):
    (tmp_path / "file").touch()
    scfm.settings.cachedir = tmp_path / "file" / "cache"
    register(make_entry(files=[remote(server)]))
    with pytest.raises(PermissionError, match="SCFM_CACHE"):
        fetch("toy")


_CHILD = """
import sys
from scfm.checkpoints import _registry, fetch
from scfm.checkpoints._registry import Citation, Entry, Licence, RemoteFile
file = RemoteFile("weights.bin", "weights", url=sys.argv[1], sha256=sys.argv[2] or None, hash_verified=bool(sys.argv[2]))
entry = Entry("toy", "toy", "a toy", (file,), Licence("MIT", "", "yes", ""), Citation(""))
_registry._released = lambda: [entry]
print("start", flush=True)
print((fetch("toy") / "weights.bin").stat().st_size, flush=True)
"""


def child(server, digest):
    environment = {**os.environ, "SCFM_OFFLINE": "0", "SCFM_CACHE": str(scfm.settings.cachedir), "SCFM_VERBOSITY": "1"}
    command = [sys.executable, "-c", _CHILD, f"{server.url}/weights.bin", digest]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


class Gate:
    """Sends the first half, then the second one when it is opened."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, handler, content):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[: len(content) // 2])
        handler.wfile.flush()
        self.reached.set()
        self.opened.wait(20)
        try:
            handler.wfile.write(content[len(content) // 2 :])
        except OSError:
            handler.close_connection = True


def test_two_processes_at_once_download_once(server):
    remote(server)
    gate = Gate()
    server.behaviour["weights.bin"] = [gate]
    processes = [child(server, sha256(CONTENT)) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "start\n"
    assert gate.reached.wait(20)
    time.sleep(0.3)
    assert not (scfm.settings.cachedir / "toy" / "weights.bin").exists()
    gate.opened.set()
    assert [process.communicate(timeout=20)[0] for process in processes] == [f"{len(CONTENT)}\n"] * 2
    assert server.requests == ["weights.bin"]


def test_killed_download_leaves_no_file_and_is_restarted(server, register):
    file = remote(server, sha256=None, hash_verified=False)
    gate = Gate()
    server.behaviour["weights.bin"] = [gate]
    process = child(server, "")
    assert gate.reached.wait(20)
    process.kill()
    process.wait()
    process.stdout.close()
    gate.opened.set()
    directory = scfm.settings.cachedir / "toy"
    assert not (directory / "weights.bin").exists()
    assert ".partial" in files_in(directory)
    register(make_entry(files=[file]))
    assert (fetch("toy") / "weights.bin").read_bytes() == CONTENT
    assert files_in(directory) == ["weights.bin", "weights.bin.sha256"]


# -- trust on first use ----------------------------------------------------------------------------------------------


@pytest.fixture
def by_hand(register):
    register(make_entry(files=[RemoteFile("weights.bin", "weights")]))
    directory = scfm.settings.cachedir / "toy"
    directory.mkdir(parents=True)
    path = directory / "weights.bin"
    path.write_bytes(CONTENT)
    fetch("toy")
    return path


def test_first_use_is_remembered(by_hand):
    assert f"{sha256(CONTENT)}  weights.bin\n" in _pins.pin_path(by_hand).read_text()
    by_hand.write_bytes(CONTENT + b"!")
    with pytest.raises(scfm.CheckpointError, match=r"at first use.*Move it and weights\.bin\.sha256 away"):
        fetch("toy")
    _pins.pin_path(by_hand).unlink()
    fetch("toy")


def test_pin_has_the_format_of_sha256sum(by_hand):
    import shutil

    if shutil.which("sha256sum") is None:
        pytest.skip("sha256sum is not installed")
    command = ["sha256sum", "--check", "--strict", _pins.pin_path(by_hand).name]
    assert subprocess.run(command, cwd=by_hand.parent, capture_output=True, check=False).returncode == 0


def test_unchanged_file_is_not_hashed_again(by_hand, monkeypatch):
    monkeypatch.setattr(_pins, "sha256", lambda path: pytest.fail("hashed again"))
    fetch("toy")
    assert _pins.pinned(by_hand) == sha256(CONTENT)


def test_touched_file_is_hashed_and_accepted(by_hand):
    before = _pins.pin_path(by_hand).read_text()
    os.utime(by_hand, ns=(1, 1))
    fetch("toy")
    assert "modified 1 ns" in _pins.pin_path(by_hand).read_text()
    assert _pins.pin_path(by_hand).read_text() != before


def test_unreadable_pin_is_written_anew(by_hand, capsys):
    _pins.pin_path(by_hand).write_text("nonsense")
    fetch("toy")
    assert "written anew" in capsys.readouterr().err
    assert sha256(CONTENT) in _pins.pin_path(by_hand).read_text()


def test_hash_that_becomes_known_later_is_enforced(by_hand, register):
    register(make_entry(files=[RemoteFile("weights.bin", "weights", sha256="1" * 64, hash_verified=True)]))
    with pytest.raises(scfm.CheckpointError, match="expected is 1{64}"):
        fetch("toy")
