"""The clients of the bench, and what its scenarios make of their answers.

Rules: machines get their bytes whole, one at a time, and in two pieces with every cut; the programs
talk to a server of a few lines, over real sockets. No figure is judged.
"""

import json
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import attrs
import pytest
import trio

sys.path.append(str(Path(__file__).parent.parent))  # last: what is installed is what is tested

from bench import rounds
from bench.clients import batch, holding
from bench.clients.links import spread
from bench.holding import holding as holding_client
from bench.measuring import Address, Cores, answer_of
from bench.rounds import Round
from bench.scenario import Bench
from bench.scenarios import connect, drain, idle, reconnect, saturate
from bench.servers import OURS, Ask, Contract, Running, Server, Work

PATIENCE = 20.0
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    """Make a chunk of a body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def tick(n: int) -> bytes:
    """Make a frame, as a peer does."""
    data = {"type": "custom", "seq": n, "name": "tick", "value": {"n": n}}
    return b"id: %d\nevent: custom\ndata: %b\n\n" % (
        n,
        json.dumps(data, separators=(",", ":")).encode(),
    )


def ways(data: bytes) -> list[list[bytes]]:
    """Cut bytes: not at all, everywhere, and once at every place."""
    whole, bytewise = [data], [data[n : n + 1] for n in range(len(data))]
    return [whole, bytewise, *([data[:n], data[n:]] for n in range(1, len(data)))]


# The batch ----------------------------------------------------------------------------------------


def counted(pieces: Sequence[bytes]) -> batch.Stream:
    """Feed a stream of a batch; nothing more is fed to it once it says so."""
    stream = batch.Stream()
    for now, piece in enumerate(pieces, 1):
        if not stream.feed(bytearray(piece) + b"old bytes", len(piece), now):
            break
    return stream


def test_a_stream_counts_its_events_however_it_is_cut() -> None:
    """Each tick counts once, and the last chunk is seen, wherever the bytes are cut."""
    data = HEAD + chunk(tick(1)) + chunk(tick(2) + tick(3)) + LAST_CHUNK
    for pieces in ways(data):
        stream = counted(pieces)
        assert (3, len(data)) == (stream.ticks, stream.received)
        assert (1, len(pieces)) == (stream.began_at, stream.ended_at)
        assert stream.failure(3, b"") is None


def test_a_stream_without_all_its_events_has_failed() -> None:
    """Too few events are a failure, though the response has its end."""
    stream = counted([HEAD + chunk(tick(1)) + LAST_CHUNK])
    expected = "expected 2 events and the last chunk, got 1 and its end"
    assert expected == stream.failure(2, b"")


def test_a_stream_without_its_last_chunk_has_failed() -> None:
    """All events without an end are a failure, which says how the connection ended."""
    stream = counted([HEAD + chunk(tick(1))])
    late = "expected 1 events and the last chunk, got 1 and no end in time"
    assert late == stream.failure(1, b"")
    stream.lose("a reset (ECONNRESET)", 5)
    stream.lose("the connection's end", 6)
    reset = "expected 1 events and the last chunk, got 1 and a reset (ECONNRESET)"
    assert reset == stream.failure(1, b"")


def test_a_stream_that_never_began_says_why() -> None:
    """Without a byte, the failure is that of the connection."""
    stream = batch.Stream()
    stream.lose("no connection: Connection refused", 1)
    assert "expected a response, got no connection: Connection refused" == stream.failure(1, b"")


def test_a_refusal_is_not_read_on() -> None:
    """Another status than 200 ends a stream at once: its body has no chunks to wait for."""
    refusal = b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy"
    for pieces in ways(refusal):
        stream = counted(pieces)
        failure = stream.failure(1, b"")
        assert failure is not None
        assert failure.startswith("expected status 200, got b'HTTP/1.1 5")


def test_a_stream_must_have_the_end_of_its_server() -> None:
    """Where a server has a last event, the last chunk alone is not enough."""
    end = b'"outcome":"success"'
    finished = b'id: 2\nevent: run_finished\ndata: {"outcome":"success"}\n\n'
    assert counted([HEAD + chunk(tick(1)) + chunk(finished) + LAST_CHUNK]).failure(1, end) is None
    failure = counted([HEAD + chunk(tick(1)) + LAST_CHUNK]).failure(1, end)
    assert f"expected {end!r} before the last chunk, got none" == failure


def test_a_spread_of_values() -> None:
    """The middle, the 99th percentile and the highest; None of nothing."""
    assert spread([]) is None
    assert {"p50": 7, "p99": 7, "max": 7} == spread([7])
    assert {"p50": 101, "p99": 199, "max": 200} == spread(list(range(200, 0, -1)))


# Streams that are held ----------------------------------------------------------------------------


def test_a_body_is_what_its_chunks_hold() -> None:
    """Heads, extensions and line ends go, wherever the bytes are cut."""
    data = chunk(b"a\r\n0\r\n\r\nb") + b"3;x=y\r\n\r\n\n\r\n" + b"A\r\n0123456789\r\n" + LAST_CHUNK
    for pieces in ways(data):
        body = holding.Body()
        assert b"a\r\n0\r\n\r\nb\r\n\n0123456789" == b"".join(body.feed(piece) for piece in pieces)
        assert body.is_complete


def test_a_body_without_its_last_chunk_is_not_complete() -> None:
    """What is there is there, and more may come."""
    body = holding.Body()
    assert b"abc" == body.feed(b"5\r\nabc")
    assert not body.is_complete
    assert b"de" == body.feed(b"de\r\n")
    assert not body.is_complete


def held(pieces: Sequence[bytes], *, last: int = 0) -> holding.Stream:
    """Feed a stream that is held."""
    stream = holding.Stream(last=last)
    for now, piece in enumerate(pieces, 1):
        stream.feed(piece, now)
    return stream


def test_a_held_stream_knows_what_came() -> None:
    """Events, comments and the last id, wherever the bytes are cut."""
    data = HEAD + chunk(b"retry: 2000\n\n: hello\n\n" + tick(1)) + chunk(b":\n\n") + chunk(tick(2))
    for pieces in ways(data):
        stream = held(pieces)
        assert (2, 2, 2, True) == (stream.events, stream.comments, stream.last, stream.is_gapless)
        assert (None, "custom") == (stream.ending, stream.last_word)


def test_a_held_stream_reads_frames_with_carriage_returns() -> None:
    """Lines that end with CRLF, as sse-starlette's do, are as good as any."""
    frames = (b": ping - now\n\n" + tick(1) + tick(2)).replace(b"\n", b"\r\n")
    for pieces in ways(HEAD + chunk(frames) + LAST_CHUNK):
        stream = held(pieces)
        assert (2, 1, 2) == (stream.events, stream.comments, stream.last)
        assert "complete" == stream.ending


def test_an_event_that_is_not_whole_has_not_come() -> None:
    """The id of a frame counts from its blank line on."""
    stream = held([HEAD + chunk(tick(1)), chunk(tick(2)[:-1])])
    assert 1 == stream.last
    stream.feed(chunk(b"\n"), 3)
    assert 2 == stream.last


@pytest.mark.parametrize("ids", [[5, 7], [5, 5], [4], [6], [5, 7, 6]])
def test_an_event_missed_or_repeated_is_a_gap(ids: list[int]) -> None:
    """Behind event 4 comes 5, then 6, each once and in order."""
    assert held([HEAD + chunk(tick(5)), chunk(tick(6))], last=4).is_gapless
    assert not held([HEAD + chunk(b"".join(map(tick, ids)))], last=4).is_gapless
    assert not held([HEAD, *(chunk(tick(n)) for n in ids)], last=4).is_gapless


def test_the_last_word_of_a_run_says_why() -> None:
    """Of a terminal event: the outcome, and the cause where it has one."""
    event = {"type": "run_finished", "outcome": "cancelled", "receipt": {"cause": "shutdown"}}
    frame = b"id: 1\ndata: %b\n\n" % json.dumps(event).encode()
    assert "run_finished cancelled (shutdown)" == held([HEAD + chunk(frame)]).last_word
    assert "nothing" == held([HEAD]).last_word


def test_a_held_stream_that_is_refused_has_ended() -> None:
    """Another status than 200 is an ending, and says what came; the first ending stands."""
    stream = held([b"HTTP/1.1 404 Not found\r\n\r\n"])
    assert stream.ending is not None
    assert stream.ending.startswith("expected status 200, got b'HTTP/1.1 404")
    stream.lose("the connection's end", 2)
    assert stream.ending.startswith("expected status 200")
    assert 1 == stream.ended_at


# Over real sockets --------------------------------------------------------------------------------


async def _answer(stream: trio.SocketStream, events: int) -> None:
    """Be a server: the events behind Last-Event-ID, and their end but for those who ask to HOLD."""
    request = b""
    while b"\r\n\r\n" not in request:
        request += await stream.receive_some()
    last = int(request.partition(b"Last-Event-ID: ")[2].split(b"\r\n")[0] or 0)
    await stream.send_all(HEAD + b"".join(chunk(tick(n)) for n in range(last + 1, events + 1)))
    if b"HOLD" in request:
        await trio.sleep_forever()
    await stream.send_all(LAST_CHUNK)


async def _answer_while_there(events: int, stream: trio.SocketStream) -> None:
    try:
        async with stream:
            await _answer(stream, events)
    except trio.BrokenResourceError:
        pass


@asynccontextmanager
async def toy(events: int) -> AsyncIterator[Running]:
    """Serve, in this process."""
    async with trio.open_nursery() as nursery:
        serve = partial(trio.serve_tcp, host="127.0.0.1")
        listeners: list[trio.SocketListener] = await nursery.start(
            serve, partial(_answer_while_there, events), 0
        )
        port = listeners[0].socket.getsockname()[1]
        yield Running(Server("toy", (), Contract()), Address(0, "127.0.0.1", port))
        nursery.cancel_scope.cancel()


def free_port() -> int:
    """Find a port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


BENCH = Bench(quick=True, only=(), cores=Cores(None, None), progress=lambda _line: None)
SIZE = rounds.Size(streams=50, events=3, opened=False, seconds=PATIENCE)


@pytest.mark.parametrize("opened", [False, True])
async def test_a_batch_reads_all_its_streams(*, opened: bool) -> None:
    """Whether or not the connections are there before, all events come, and no stream fails."""
    with trio.fail_after(PATIENCE):
        async with toy(events=3) as running:
            found = await rounds.load(BENCH, running, attrs.evolve(SIZE, opened=opened))
    assert (50, 150, 0) == (found.streams, found.events, found.failed)
    assert found.first_ms is not None
    assert found.end_ms is not None
    assert 0 < found.first_ms["p50"] <= found.end_ms["max"] <= found.seconds * 1e3


async def test_a_batch_names_what_failed() -> None:
    """Streams without their events have failed, and the first failures are told."""
    with trio.fail_after(PATIENCE):
        async with toy(events=2) as running:
            found = await rounds.load(BENCH, running, SIZE)
    assert 50 == found.failed
    expected = "50 of 50: expected 3 events and the last chunk, got 2 and its end"
    assert expected == rounds.failure_of([found])
    assert found.stream_rate is None


@pytest.mark.parametrize("opened", [[], ["--opened"]])
async def test_a_batch_outlives_a_server_that_is_not_there(opened: list[str]) -> None:
    """Where nobody listens all streams have failed, and the client says so like any other."""
    command = [
        sys.executable, "-m", "bench.clients.batch", "--host", "127.0.0.1",
        "--port", str(free_port()), "--request", "GET / HTTP/1.1\r\n\r\n",
        "--streams", "40", "--events", "1", "--seconds", "5", *opened,
    ]  # fmt: skip
    with trio.fail_after(PATIENCE):
        answer = await answer_of(command, None)
    assert 40 == answer["failed"]
    assert "expected a response, got no connection" in answer["failures"][0]


async def test_streams_are_held_cut_and_resumed() -> None:
    """The client opens streams, counts what comes, cuts them, comes back for the rest, and ends."""
    hold = Ask("GET", "/HOLD")
    with trio.fail_after(PATIENCE):
        async with (
            toy(events=5) as running,
            holding_client(BENCH, running, [hold], streams=40, seconds=PATIENCE) as client,
        ):
            opened = await client.do("open", window=7)
            reached = await client.do("reach", id=5)
            count = await client.do("count")
            await client.do("cut")
            came = await client.do("return", after=2, until=5)
    assert (40, 0, []) == (opened["open"], opened["failed"], opened["failures"])
    assert (40, 0) == (reached["there"], reached["gaps"])
    assert (200, 0, 40) == (count["events"], count["comments"], count["open"])
    assert (40, 120, 0) == (came["there"], came["events"], came["gaps"])
    assert 0 < came["first_ms"]["p50"] <= came["there_ms"]["max"]


async def test_streams_are_held_to_their_end() -> None:
    """How streams have ended is told by kind, with what each of them said last."""
    with trio.fail_after(PATIENCE):
        async with (
            toy(events=2) as running,
            holding_client(
                BENCH, running, [Ask("GET", "/KEY")], streams=10, seconds=PATIENCE
            ) as client,
        ):
            await client.do("open", window=3)
            ended = await client.do("end", since=0)
    assert [["complete", "custom", 10]] == ended["endings"]
    assert (0, 0, 0) == (ended["before"], ended["failed"], ended["gaps"])


async def test_held_streams_that_come_to_nothing_are_told() -> None:
    """What has not come true in time is a failure with a reason, and the client goes on."""
    with trio.fail_after(PATIENCE):
        async with (
            toy(events=2) as running,
            holding_client(
                BENCH, running, [Ask("GET", "/HOLD"), Ask("GET", "/")], streams=10, seconds=0.5
            ) as client,
        ):
            await client.do("open", window=10)
            reached = await client.do("reach", id=3)
            ended = await client.do("end", since=0)
    assert (0, 10) == (reached["there"], reached["failed"])
    assert ["5 streams: complete", "5 streams: too late"] == sorted(reached["failures"])
    assert [["complete", "custom", 5], [None, "custom", 5]] == sorted(
        ended["endings"], key=lambda ending: ending[0] is None
    )


# What is made of it -------------------------------------------------------------------------------

GOOD = Round(
    streams=100,
    seconds=2.0,
    asked=0.1,
    events=1_000,
    bytes=200_000,
    failed=0,
    failures=(),
    client_cpu=0.5,
    server_cpu=0.25,
    first_ms={"p50": 1, "p99": 2, "max": 3},
    end_ms={"p50": 4, "p99": 5, "max": 6},
)
BAD = attrs.evolve(GOOD, failed=3, failures=["no end", "no end", "no end"])


def test_a_ratio_is_not_judged_where_a_figure_is_missing() -> None:
    """A target has no value where either server has none."""
    assert 2.0 == rounds.at_least("x", {"agentsse": 4.0, "node": 2.0}, "node", 1).value
    for figures in ({"agentsse": 4.0}, {"node": 2.0}, {"agentsse": None, "node": 2.0}):
        assert rounds.at_least("x", figures, "node", 1).value is None


def test_processor_time_is_known_for_all_rounds_or_for_none() -> None:
    """A unit's time is that of all rounds; one that could not be read spoils it."""
    assert 250.0 == rounds.cpu_us([GOOD, GOOD], 2_000)
    assert rounds.cpu_us([GOOD, attrs.evolve(GOOD, server_cpu=None)], 2_000) is None
    assert rounds.cpu_us([GOOD], 0) is None


def test_a_row_of_saturation() -> None:
    """The median and the best of the rounds that were good; failures are told."""
    fast = attrs.evolve(GOOD, seconds=1.0)
    row = saturate._row("node", [GOOD, fast, fast, BAD], {"now": 10.0, "peak": 12.0})
    assert (1_000.0, 1_000.0, 250.0, 200.0) == (row["rate"], row["best"], row["us"], row["bytes"])
    assert "3 of 400: no end" == row["failed"]
    assert set(row) >= {column.key for column in saturate.COLUMNS}


def test_events_of_different_sizes_are_noted() -> None:
    """Rates compare where events have one size, within a tenth."""
    rows = [{"server": "a", "bytes": 200.0}, {"server": "b", "bytes": 215.0}]
    assert [] == list(saturate._notes({}, rows))
    rows.append({"server": "c", "bytes": 250.0})
    (note,) = saturate._notes({}, rows)
    assert note.startswith("events are not of one size: 200 bytes from a, 250 from c")


def test_a_busy_client_is_noted() -> None:
    """A client that needed its core may have been what was measured."""
    busy = attrs.evolve(GOOD, client_cpu=1.9)
    (note,) = rounds.busy_client({"node": [GOOD, busy], "go": [GOOD]})
    assert "the client was busy while node served: it may have been the bottleneck" == note


def test_a_row_of_a_storm() -> None:
    """Rates and times are medians of the rounds, the highest is that of all."""
    slow = attrs.evolve(GOOD, seconds=4.0, end_ms={"p50": 8, "p99": 9, "max": 10})
    row = connect._row("node", 100, [GOOD, slow])
    assert (37.5, 2_500.0) == (row["rate"], row["us"])
    assert (6.0, 7.0, 10) == (row["end_p50"], row["end_p99"], row["end_max"])
    assert set(row) >= {column.key for column in connect.COLUMNS}


def test_a_row_of_a_storm_in_which_streams_failed() -> None:
    """A round with failures has no rate."""
    row = connect._row("node", 100, [BAD])
    assert (None, "3 of 100: no end") == (row["rate"], row["failed"])


def test_the_kernels_objects_are_read_where_they_may_be() -> None:
    """What the system tells is a size; what it does not tell is None."""
    found = idle.kernel_objects()
    assert found is None or found >= 0


def test_what_a_drain_did_to_its_streams() -> None:
    """Streams that had ended before the signal are not counted as drained."""
    ended = {
        "endings": [
            ["complete", "run_finished success", 60],
            ["the connection's end", "custom", 25],
            ["a reset (ECONNRESET)", "custom", 10],
            [None, "custom", 5],
        ],
        "before": 20,
        "end_ms": {"p50": 1_000, "p99": 1_500, "max": 2_000},
    }
    seen = drain._seen(ended, 100)
    assert (80, 40, 30, 10) == (seen["open"], seen["complete"], seen["cut"], seen["reset"])
    assert (1.0, 2.0) == (seen["end_p50"], seen["end_max"])
    assert "60 run_finished success; 40 custom" == seen["said"]


def test_the_way_a_process_has_ended() -> None:
    """A code is a number, a signal has its name."""
    assert ("0", "1", "SIGTERM") == (drain._exit(0), drain._exit(1), drain._exit(-15))


def test_a_drain_of_ours_without_all_ends_is_a_problem() -> None:
    """Ours has to give each open stream its end, and to leave with 0; peers are only shown."""
    row = {
        "server": OURS.name, "work": "ends", "open": 2, "complete": 2, "exit": "0", "failed": "none"
    }  # fmt: skip
    assert [] == list(drain._problems([row, row | {"server": "node", "complete": 0}]))
    ends = "agentsse, work that ends: expected 2 proper ends, got 1"
    assert [ends] == list(drain._problems([row | {"complete": 1}]))
    code = "agentsse, work that ends: expected exit code 0, got SIGKILL"
    assert [code] == list(drain._problems([row | {"exit": "SIGKILL"}]))


def test_servers_that_do_not_drain_are_named() -> None:
    """Whoever goes at the signal, without an end for its streams, has no drain in its program."""
    row = {"server": "node", "work": "ends", "gone": 0.01, "complete": 0}
    others = [
        row | {"server": "a", "gone": 3.0, "complete": 9},
        row | {"server": "b", "gone": "not in 40"},
        row | {"server": "c", "work": "goes on"},
    ]
    assert [] == list(drain._notes(others))
    (note,) = drain._notes([row, *others])
    assert note.startswith("node: the program ends at the signal")


STORM = reconnect.Storm(10, 1, Work(events=20, hold=60), after=11)
LIVE = reconnect.Storm(10, 1, Work(events=20, gap=0.5), after=4, away=2.0)


def test_when_a_reader_has_caught_up() -> None:
    """With the newest event: of a silent run its last, else what was made meanwhile."""
    assert (21, 8) == (STORM.until, LIVE.until)


def test_each_event_came_once() -> None:
    """No reader has a gap, and all together had what they missed, or the run to its end."""
    came = {"gaps": 0, "events": 100}
    assert reconnect._came_once(STORM, [came, came], None)
    assert not reconnect._came_once(STORM, [came, came | {"gaps": 1}], None)
    assert not reconnect._came_once(STORM, [came | {"events": 101}], None)
    ended = {"gaps": 0, "endings": [["complete", "run_finished success", 10]]}
    assert reconnect._came_once(LIVE, [came], ended)
    assert not reconnect._came_once(LIVE, [came], ended | {"gaps": 1})
    assert not reconnect._came_once(LIVE, [came], None)
    cut = ended | {"endings": [["complete", "run_finished success", 9], ["a reset", "custom", 1]]}
    assert not reconnect._came_once(LIVE, [came], cut)
