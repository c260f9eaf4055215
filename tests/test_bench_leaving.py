"""The pure parts of the benchmark of leaving: ranks, times, sockets, the stall, the slope.

No sockets and no servers: `python -m bench disconnect --quick` shows that the rest works.
"""

import fcntl
import os
import sys

import pytest

from bench.clients.leaving import (
    Descriptors,
    Probe,
    Stream,
    accepted,
    at,
    line,
    longest_stall,
    matched,
    numbered,
    quantile,
    summary,
)
from bench.scenarios.disconnect import FIN, HALF, Storm
from bench.scenarios.leak import slope

MS = 1_000_000
TABLE = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  0  0 100 1 0 20 4 0 -1
   1: 0100007F:1F90 0100007F:C350 01 00000000:00000000 00:00000000 00000000  0  0 101 1 0 20 4 0 -1
   2: 0100007F:C350 0100007F:1F90 01 00000000:00000000 00:00000000 00000000  0  0 102 1 0 20 4 0 -1
   3: 0100007F:1F90 0100007F:C351 08 00000000:00000000 00:00000000 00000000  0  0 103 1 0 20 4 0 -1
   4: 0100007F:1F91 0100007F:C352 01 00000000:00000000 00:00000000 00000000  0  0 104 1 0 20 4 0 -1
"""


class Sock:
    """A socket that is never used."""


def test_quantile_is_of_the_nearest_rank() -> None:
    """A percentile is a time that was measured: the first that so many are not later than."""
    ordered = [float(n) for n in range(1, 101)]

    assert 50.0 == quantile(ordered, 50, 100)
    assert 99.0 == quantile(ordered, 99, 100)
    assert 100.0 == quantile(ordered, 100, 100)
    assert 1.0 == quantile(ordered, 0, 100)
    assert 7.0 == quantile([7.0], 50, 1)
    assert 7.0 == quantile(ordered, 7, 100)  # 0.07 * 100 is a little more than 7


def test_what_never_came_is_later_than_all_others() -> None:
    """A percentile that falls among those that never came is none."""
    ordered = [float(n) for n in range(1, 99)]

    assert 50.0 == quantile(ordered, 50, 100)
    assert 98.0 == quantile(ordered, 98, 100)
    assert None is quantile(ordered, 99, 100)
    assert None is quantile([], 50, 0)


def test_summary_measures_from_the_leaving_of_the_same_stream() -> None:
    """Each time is that of its own stream; those who did not leave are not in it."""
    left = {1: 10 * MS, 2: 20 * MS, 3: 30 * MS}
    came = {1: 15 * MS, 3: 31 * MS, 4: 99 * MS}

    expected = {"never": 1, "p50": 5.0, "p99": None, "max": 5.0}
    assert expected == summary(left, came)
    assert {"never": 0, "p50": None, "p99": None, "max": None} == summary({}, came)


def test_line_ends_where_no_more_came() -> None:
    """A line rises to the share of those that came, not to 1."""
    left = dict.fromkeys(range(10), 0)
    came = {number: (number + 1) * MS for number in range(5)}

    points = line(left, came)

    assert (1.0, 0.0) == points[0]
    assert (5.0, 0.5) == points[-1]


def test_stall_is_the_longest_wait_for_a_token_less_its_gap() -> None:
    """A stall counts if any of it was in the span; waits outside do not."""
    tokens = [0, 100 * MS, 110 * MS, 120 * MS, 180 * MS, 190 * MS, 900 * MS]

    assert 50.0 == longest_stall(tokens, 0.01, 105 * MS, 185 * MS)
    assert 90.0 == longest_stall(tokens, 0.01, 50 * MS, 105 * MS)
    assert 700.0 == longest_stall(tokens, 0.01, 195 * MS, 200 * MS)
    assert 0.0 == longest_stall([0, 5 * MS], 0.01, 0, 5 * MS)
    assert None is longest_stall([], 0.01, 0, MS)
    assert None is longest_stall(tokens, 0.01, 901 * MS, 902 * MS)


def test_table_of_the_kernel_tells_who_is_connected_to_a_port() -> None:
    """Established sockets whose own port is the server's: the other end's port, by inode."""
    assert {"101": 50000} == accepted(TABLE, 8080)
    assert {"104": 50002} == accepted(TABLE, 8081)
    assert {} == accepted(TABLE, 8082)


def test_descriptors_are_matched_by_their_inodes() -> None:
    """A descriptor leads to a stream if its socket's other end is the stream's; no other does."""
    links = {"3": "socket:[101]", "4": "socket:[7]", "5": "/dev/null", "6": "anon_inode:[epoll]"}

    assert {"3": 50000} == matched(links, accepted(TABLE, 8080))


@pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc")
def test_descriptor_that_is_missing_has_been_closed() -> None:
    """The look that misses a descriptor tells its time; others stay open."""
    pipe = os.pipe()
    # High ones: the look itself takes the lowest that is free, if it is our own process.
    kept, freed = (fcntl.fcntl(end, fcntl.F_DUPFD, 200) for end in pipe)
    watched = Descriptors(os.getpid(), 1)
    watched.open = {str(kept): 1, str(freed): 2}

    watched.look()
    assert {} == watched.closed
    os.close(freed)
    watched.look()
    for descriptor in (*pipe, kept):
        os.close(descriptor)

    assert [2] == list(watched.closed)
    assert {str(kept): 1} == watched.open
    assert 1 == len(watched.pauses)


def test_process_that_is_over_has_closed_everything() -> None:
    """What cannot be looked at any more is not open."""
    watched = Descriptors(-1, 1)
    watched.open = {"3": 1}

    watched.look()

    assert [1] == list(watched.closed)


def test_figure_at_an_instant_is_the_next_one_noted() -> None:
    """Between two notes the later one counts; behind the last there is none."""
    notes = [(10, 1.0), (20, 2.0)]

    assert 1.0 == at(notes, 10)
    assert 2.0 == at(notes, 11)
    assert None is at(notes, 21)


def test_stream_is_open_from_the_event_of_its_agent_on() -> None:
    """Neither the head nor an event of the server's own is one; cuts do not matter."""
    data = b'HTTP/1.1 200 OK\r\n\r\n{"type":"run_started"}\n\n{"type":"custom","name":"tick"}\n\n'
    for size in (1, 7, len(data)):
        stream = Stream(1, Sock(), FIN)
        opened = []
        for start in range(0, len(data), size):
            stream.feed(data[start : start + size])
            opened.append(stream.is_open)

        assert opened[-1]
        assert opened == sorted(opened)
        assert opened.count(True) <= 1 + len(b"}\n\n") // size
        assert stream.head.startswith(b"HTTP/1.1 200 OK")


def test_probe_reads_tokens_that_are_joined_or_cut() -> None:
    """Each token counts once, however many are in a frame, and wherever a read ends."""
    frames = b'data: {"delta":"10;20;"}\n\ndata: {"delta": "30;"}\n\ndata: {"text":"10;20;30;"}\n\n'
    for size in (1, 5, len(frames)):
        probe = Probe(Sock())
        for start in range(0, len(frames), size):
            probe.feed(frames[start : start + size], start)

        assert [10, 20, 30] == probe.made
        assert 3 == len(probe.came)


def test_key_is_the_number_of_a_stream() -> None:
    """All numbers have one length, so all requests do."""
    assert "fin-000042" == numbered("fin-KEY", 42)


def test_storm_is_named_for_its_way_and_not_busier_than_it_may_be() -> None:
    """Few streams have an event per second; many share 2,000 per second."""
    assert ("fin", 1.0) == (Storm(100, (FIN,)).name, Storm(100, (FIN,)).gap)
    assert ("mixed", 4.0) == (Storm(8_000, (FIN, HALF)).name, Storm(8_000, (FIN, HALF)).gap)


def test_slope_is_that_of_the_nearest_line() -> None:
    """A straight line has its own; fewer than three points, or one place, have none."""
    assert 2.0 == slope([(0, 1), (1, 3), (2, 5)])
    assert 0.0 == slope([(0, 1), (1, 4), (2, 1)])
    assert None is slope([(0, 1), (1, 3)])
    assert None is slope([(1, 1), (1, 2), (1, 3)])
