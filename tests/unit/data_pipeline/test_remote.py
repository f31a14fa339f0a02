"""Reading through faults: exact bytes, the right requests, and errors that name what happened."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.remote import Counters, Fetcher, RemoteOptions, TransientError, Version
from data_pipeline.sources import open_source, printable
from data_pipeline.tar_headers import ShardError
from tests.loopback import Cut, Drip, IgnoreRange, Loopback, Status

ROOT = Path(__file__).resolve().parents[3]
DATA = bytes(range(256)) * 8192  # 2 MiB; every 256th byte repeats, so offsets off by one show
NAME = "set/a.tar"


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def clock(self) -> float:
        return self.now


@pytest.fixture
def server() -> Iterator[Loopback]:
    with Loopback({NAME: DATA}) as server:
        yield server


@pytest.fixture
def time() -> Time:
    return Time()


def fetcher(location: str, time: Time, **options) -> Fetcher:
    chosen = RemoteOptions(**options)
    source = open_source(location, chosen.timeout_s, chosen.allow_pipe)
    return Fetcher(source, chosen, Counters(), sleep=time.sleep, clock=time.clock)


def test_a_range_is_one_request_and_exact(server: Loopback, time: Time) -> None:
    fetch = fetcher(f"{server.url}/set", time)
    assert fetch.read("a.tar", 1000, 1010) == DATA[1000:1010]
    assert fetch.read("a.tar") == DATA
    assert [request.range for request in server.requests] == [(1000, 1010), None]
    assert fetch.counters.as_dict()["bytes"] == 10 + len(DATA)
    assert time.slept == []


@pytest.mark.parametrize(
    "fault",
    [Status(503), Status(500), Status(429), Status(408), Cut(0), Cut(5), Cut(5, reset=True)],
)
def test_a_fault_that_passes_is_not_seen(server: Loopback, time: Time, fault) -> None:
    server.script(NAME, fault)
    fetch = fetcher(f"{server.url}/set", time)
    assert fetch.read("a.tar", 7, 1007) == DATA[7:1007]
    assert fetch.counters.as_dict()["retries"] == len(time.slept) == 1
    assert 0.25 <= time.slept[0] <= 0.5


def test_a_cut_download_goes_on_at_the_byte(server: Loopback, time: Time) -> None:
    server.script(NAME, Cut(1000), Status(503), Cut(3))
    fetch = fetcher(f"{server.url}/set", time)
    assert fetch.read("a.tar", 10, None) == DATA[10:]
    tag = server.requests[-1].headers["if-match"]
    assert [request.range for request in server.requests] == [
        (10, None), (1010, None), (1010, None), (1013, None),
    ]  # fmt: skip
    assert tag and "if-match" not in server.requests[0].headers
    assert fetch.counters.as_dict()["bytes"] == len(DATA) - 10


def test_waiting_grows_and_ends(server: Loopback, time: Time) -> None:
    server.script(NAME, *[Status(503)] * 9)
    with pytest.raises(TransientError) as caught:
        fetcher(f"{server.url}/set", time).read("a.tar")
    message = str(caught.value)
    assert f"{server.url}/set/a.tar" in message and "9 tries" in message and "503" in message
    assert len(time.slept) == 8 and len(server.requests) == 9
    assert time.slept[-1] >= 15 and max(time.slept) <= 30


def test_retry_after_is_honoured(server: Loopback, time: Time) -> None:
    server.script(NAME, Status(429, retry_after="17"))
    assert fetcher(f"{server.url}/set", time).read("a.tar") == DATA
    assert time.slept == [17]


def test_retry_after_beyond_the_deadline_ends_at_once(server: Loopback, time: Time) -> None:
    server.script(NAME, Status(503, retry_after="601"))
    with pytest.raises(TransientError, match="asks to wait 601 s"):
        fetcher(f"{server.url}/set", time, deadline_s=600).read("a.tar")
    assert time.slept == []


def test_a_server_that_drips_for_ever_is_given_up(server: Loopback, time: Time) -> None:
    def between() -> None:
        time.now += 100

    server.script(NAME, Drip(1, between))
    with pytest.raises(TransientError, match="too slow"):
        fetcher(f"{server.url}/set", time, deadline_s=600).read("a.tar")


def test_progress_gives_new_patience(server: Loopback, time: Time) -> None:
    # Four faults with two retries: allowed, for a MiB came between the second and the third.
    server.script(NAME, Status(503), Status(503), Cut((1 << 20) + 5), Status(503))
    assert fetcher(f"{server.url}/set", time, retries=2).read("a.tar") == DATA


def test_a_silent_server_is_a_time_out(server: Loopback, time: Time) -> None:
    release = threading.Event()
    server.script(NAME, Drip(10, release.wait))  # type: ignore[arg-type]
    fetch = fetcher(f"{server.url}/set", time, timeout_s=0.05)
    try:
        assert fetch.read("a.tar", 0, 100) == DATA[:100]
    finally:
        release.set()
    assert [request.range for request in server.requests] == [(0, 100), (10, 100)]


def test_nobody_listens(time: Time) -> None:
    with Loopback({}) as gone:
        url = gone.url
    with pytest.raises(TransientError, match="ConnectionRefused"):
        fetcher(url, time, retries=1).read("a.tar")
    assert len(time.slept) == 1


def test_a_server_that_ignores_ranges_costs_only_time(server: Loopback, time: Time) -> None:
    server.script(NAME, IgnoreRange(), Cut(300_500))
    fetch = fetcher(f"{server.url}/set", time)
    assert fetch.read("a.tar", 300_000, 300_100) == DATA[300_000:300_100]
    server.ranges = False
    assert fetch.read("a.tar", 300_000, 301_000) == DATA[300_000:301_000]


@settings(max_examples=25, deadline=None)
@given(
    start=st.integers(0, len(DATA) - 1),
    length=st.integers(1, 200_000),
    faults=st.lists(
        st.one_of(
            st.builds(Cut, st.integers(0, 150_000), st.booleans()),
            st.sampled_from([Status(503), Status(429, "2"), IgnoreRange()]),
        ),
        max_size=6,
    ),
)
def test_any_weather_gives_the_same_bytes(start: int, length: int, faults: list) -> None:
    time = Time()
    with Loopback({NAME: DATA}) as server:
        server.script(NAME, *faults)
        stop = min(start + length, len(DATA))
        assert fetcher(f"{server.url}/set", time).read("a.tar", start, stop) == DATA[start:stop]
        asked = [request.range for request in server.requests]
    assert all(range is not None and range[1] == stop for range in asked)
    starts = [range[0] for range in asked if range]
    assert starts == sorted(starts) and starts[0] == start


# -- what no retry helps against --------------------------------------------------------------------


def test_a_changed_file_is_a_stale_index(server: Loopback, time: Time) -> None:
    server.script(NAME, Cut(1000))
    stream = fetcher(f"{server.url}/set", time).stream("a.tar")
    assert next(stream)
    server.files[NAME] = DATA[::-1]
    with pytest.raises(ShardError, match="a.tar: stale index.*espalier data index"):
        list(stream)
    assert [request.range for request in server.requests] == [None, (1000, None)]


def test_a_changed_tag_is_seen_where_if_match_is_not(server: Loopback, time: Time) -> None:
    # Weak tags never match, so they are compared instead of sent.
    version = Version(etag='W/"other"')
    with pytest.raises(ShardError, match="entity tag changed"):
        fetcher(f"{server.url}/set", time).read("a.tar", 0, 5, version)
    assert "if-match" not in server.requests[0].headers


def test_another_size_is_a_stale_index(server: Loopback, time: Time) -> None:
    fetch = fetcher(f"{server.url}/set", time)
    with pytest.raises(ShardError, match=f"stale index: {len(DATA)} bytes, expected 99"):
        fetch.read("a.tar", 0, 5, Version(99))
    with pytest.raises(ShardError, match="stale index"):
        fetch.read("a.tar", len(DATA) + 5, len(DATA) + 9)
    assert time.slept == []


@pytest.mark.parametrize(
    ("status", "error"),
    [(404, FileNotFoundError), (403, PermissionError), (401, PermissionError), (400, OSError)],
)
def test_refusals_are_not_repeated(server: Loopback, time: Time, status: int, error: type) -> None:
    server.script(NAME, Status(status))
    with pytest.raises(error, match=f"a.tar.*{status}"):
        fetcher(f"{server.url}/set", time).read("a.tar")
    assert len(server.requests) == 1


# -- http details -----------------------------------------------------------------------------------


def test_connections_are_kept(server: Loopback, time: Time) -> None:
    fetch = fetcher(f"{server.url}/set", time)
    for start in range(0, 1000, 100):
        assert fetch.read("a.tar", start, start + 50) == DATA[start : start + 50]
    assert fetch.read("a.tar") == DATA
    with pytest.raises(FileNotFoundError):
        fetch.read("b.tar")
    assert fetch.read("a.tar", 0, 5) == DATA[:5]
    assert server.connections == 1
    fetch.source.close()
    assert fetch.read("a.tar", 0, 5) == DATA[:5]
    assert server.connections == 2


def test_a_kept_connection_that_was_closed_is_no_fault(server: Loopback, time: Time) -> None:
    server.script(NAME, Cut(50))  # the whole answer, then the end of the connection
    fetch = fetcher(f"{server.url}/set", time)
    assert fetch.read("a.tar", 0, 50) == DATA[:50]
    assert fetch.read("a.tar", 50, 60) == DATA[50:60]
    assert time.slept == []


def test_credentials_travel_but_are_not_printed(server: Loopback, time: Time) -> None:
    host = server.url.removeprefix("http://")
    location = f"http://me:s%40cret@{host}/set?sig=t0ken"
    with Loopback({"there/a.tar": DATA}) as other:
        server.script(NAME, Status(302, location=f"{other.url}/there/a.tar?key=t0ken"))
        fetch = fetcher(location, time)
        assert fetch.read("a.tar", 0, 5) == DATA[:5]
        # "me:s@cret"; another host never sees it.
        assert server.requests[0].headers["authorization"] == "Basic bWU6c0BjcmV0"
        assert "authorization" not in other.requests[0].headers
        server.script(NAME, *[Status(302, location=f"{other.url}/gone?key=t0ken")] * 2)
        with pytest.raises(FileNotFoundError) as caught:
            fetch.read("a.tar", 0, 5)
    for text in (str(caught.value), printable(location), fetch.source.url("a.tar")):
        assert "cret" not in text and "t0ken" not in text
    assert printable(location) == f"{server.url}/set"


def test_redirects_do_not_go_on_for_ever(server: Loopback, time: Time) -> None:
    server.script(NAME, *[Status(302, location=f"/{NAME}")] * 9)
    with pytest.raises(OSError, match="more than 5 redirects"):
        fetcher(f"{server.url}/set", time).read("a.tar")


def test_a_proxy_of_the_environment_is_used(
    server: Loopback, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.delenv("no_proxy", raising=False)
    assert fetcher("http://far.invalid/set", time).read("a.tar", 0, 9) == DATA[:9]
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert fetcher(f"{server.url}/set", time).read("a.tar", 0, 9) == DATA[:9]


# -- commands ---------------------------------------------------------------------------------------


def test_a_command_is_asked_for_and_runs_without_a_shell(tmp_path: Path, time: Time) -> None:
    odd = "a; touch hurt; .tar"
    (tmp_path / odd).write_bytes(DATA)
    location = f"pipe:cat {shlex.quote(str(tmp_path))}/{{name}}"
    with pytest.raises(ValueError, match="data.remote.allow_pipe=true"):
        fetcher(location, time)
    fetch = fetcher(location, time, allow_pipe=True)
    assert fetch.read(odd) == DATA
    assert fetch.read(odd, 5000, 5010) == DATA[5000:5010]
    assert sorted(os.listdir(tmp_path)) == [odd]
    with pytest.raises(ValueError, match=r"must contain \{name\}"):
        fetcher("pipe:cat x", time, allow_pipe=True)


def test_a_command_that_fails_is_tried_again(tmp_path: Path, time: Time) -> None:
    script = tmp_path / "flaky.py"
    script.write_text(
        textwrap.dedent(
            """
            import pathlib, sys
            count = pathlib.Path(sys.argv[1]); tries = int(count.read_text()) + 1
            count.write_text(str(tries))
            print("abcdef"[: 2 * tries], end="")
            sys.exit("lost https://u:pw@host/x?sig=pw" if tries < 3 else 0)
            """
        )
    )
    (tmp_path / "count").write_text("0")
    location = f"pipe:{sys.executable} {script} {tmp_path}/{{name}}"
    assert fetcher(location, time, allow_pipe=True).read("count") == b"abcdef"
    assert len(time.slept) == 2
    (tmp_path / "count").write_text("0")
    with pytest.raises(TransientError, match="status 1: lost https://host/x") as caught:
        fetcher(location, time, allow_pipe=True, retries=1).read("count")
    assert "pw" not in str(caught.value)


def test_a_stuck_command_is_stopped(time: Time) -> None:
    fetch = fetcher("pipe:sleep 1000 {name}", time, allow_pipe=True, retries=0, timeout_s=0.05)
    with pytest.raises(TransientError, match=r"printed nothing for 0\.05 s"):
        fetch.read("0")


# -- object stores ----------------------------------------------------------------------------------


def test_without_obstore_the_error_says_what_to_install(
    time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ValueError, match=r"pip install 'espalier\[remote\]'"):
        fetcher("s3://bucket/set", time)


def run_cloud(server: Loopback, body: str) -> str:
    """In a process of its own: where obstore was used, forks are no longer safe."""
    pytest.importorskip("obstore")
    code = textwrap.dedent(
        """
            import os
            from data_pipeline.remote import *
            from data_pipeline.sources import open_source
            slept = []
            options = RemoteOptions(retries=3)
            source = open_source("s3://bucket/set", 5.0)
            fetch = Fetcher(source, options, Counters(), sleep=slept.append)
            """
    ) + textwrap.dedent(body)
    env = os.environ | {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "me",
        "AWS_SECRET_ACCESS_KEY": "s3cret",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_s3_goes_on_at_the_byte(server: Loopback) -> None:
    name = f"bucket/{NAME}"
    server.files[name] = DATA
    server.script(name, Cut(1000), Status(503), Cut(20, reset=True))
    out = run_cloud(
        server,
        """
        import xxhash
        data = fetch.read("a.tar", 5)
        print(len(data), xxhash.xxh3_64_hexdigest(data), len(slept))
        for call in (lambda: fetch.read("b.tar"), lambda: fetch.read("a.tar", 0, 5, Version(7))):
            try:
                call()
            except Exception as error:
                print(type(error).__name__, error)
        """,
    )

    lines = out.splitlines()
    assert lines[0] == f"{len(DATA) - 5} {xxhash.xxh3_64_hexdigest(DATA[5:])} 3"
    asked = server.asked(name)
    # One request a try: obstore repeats nothing by itself.
    assert len(asked) == 5
    assert [request.range for request in asked[:3]] == [(5, None), (1005, None), (1005, None)]
    assert asked[0].headers["authorization"].startswith("AWS4-HMAC-SHA256")
    assert asked[1].headers["if-match"]
    assert lines[1].startswith("FileNotFoundError s3://bucket/set/b.tar")
    assert lines[2].startswith("ShardError s3://bucket/set/a.tar: stale index")


def test_s3_errors_are_told_apart(server: Loopback) -> None:
    name = f"bucket/{NAME}"
    server.files[name] = DATA
    server.script(name, Status(403), *[Status(500)] * 4, Cut(100))
    out = run_cloud(
        server,
        """
        for _ in range(2):
            try:
                fetch.read("a.tar")
            except Exception as error:
                print(type(error).__name__, error)
        stream = fetch.stream("a.tar")
        next(stream)
        print("ready", flush=True)
        """,
    )
    lines = out.splitlines()
    assert lines[0].startswith("PermissionError s3://bucket/set/a.tar")
    assert lines[1].startswith("TransientError s3://bucket/set/a.tar: gave up after 4 tries")
    assert "s3cret" not in out and lines[2] == "ready"


def test_obstore_is_refused_in_a_forked_child_instead_of_hanging(server: Loopback) -> None:
    server.files[f"bucket/{NAME}"] = DATA
    out = run_cloud(
        server,
        """
        fetch.read("a.tar", 0, 9)
        if os.fork() == 0:
            try:
                fetch.read("a.tar", 0, 9)
            except RuntimeError as error:
                print(error, flush=True)
            os._exit(0)
        os.wait()
        """,
    )
    assert "forkserver" in out


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="data.remote.cache_gb must be positive"):
        RemoteOptions(cache_gb=0)
    with pytest.raises(ValueError, match="data.remote.retries"):
        RemoteOptions(retries=-1)
    with pytest.raises(ValueError, match="unknown scheme 'ftp'"):
        open_source("ftp://host/x", 1.0)
