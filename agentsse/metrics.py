"""The counts of a server in Prometheus' text format, made when they are asked for.

Knows: metric names and help texts. Must never be on a hot path: the engine counts in plain
integers, and this turns them into samples, without a global registry.
"""

from collections.abc import Iterator, Mapping
from typing import Protocol, get_args

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from .events import Outcome
from .log import CloseReason
from .runs import RunStatistics


class _Streams(Protocol):
    open: int
    bytes: int

    @property
    def closed(self) -> Mapping[CloseReason, int]: ...


class _Connections(Protocol):
    open: int
    accepted: int
    refused: int
    crashed: int


class _Snapshot(Collector):
    def __init__(
        self,
        runs: RunStatistics,
        streams: _Streams,
        connections: _Connections,
        *,
        buckets: tuple[float, ...],
    ) -> None:
        self._runs, self._streams, self._connections = runs, streams, connections
        self._buckets = buckets

    def collect(self) -> Iterator[Metric]:
        """Give every metric there is."""
        runs, streams = self._runs, self._streams
        going = GaugeMetricFamily("agentsse_runs", "Runs by state.", labels=["state"])
        going.add_metric(["queued"], runs.queued)
        going.add_metric(["running"], runs.running)
        going.add_metric(["retained"], runs.retained)
        yield going
        yield GaugeMetricFamily(
            "agentsse_retained_bytes", "Bytes of events of finished runs.", runs.retained_bytes
        )
        finished = CounterMetricFamily(
            "agentsse_runs_finished", "Runs that have ended, by outcome.", labels=["outcome"]
        )
        for outcome in get_args(Outcome):
            finished.add_metric([outcome], runs.finished.get(outcome, 0))
        yield finished
        yield CounterMetricFamily("agentsse_events", "Events taken into logs.", runs.events)
        yield GaugeMetricFamily("agentsse_streams_open", "Event streams open now.", streams.open)
        yield CounterMetricFamily(
            "agentsse_stream_bytes", "Bytes of frames written to streams.", streams.bytes
        )
        closed = CounterMetricFamily(
            "agentsse_streams_closed", "Event streams that have ended.", labels=["reason"]
        )
        for reason in get_args(CloseReason):
            closed.add_metric([reason], streams.closed.get(reason, 0))
        yield closed
        connections = self._connections
        yield GaugeMetricFamily("agentsse_connections_open", "Open now.", connections.open)
        ended = CounterMetricFamily(
            "agentsse_connections", "Connections by what became of them.", labels=["how"]
        )
        ended.add_metric(["accepted"], connections.accepted)
        ended.add_metric(["refused"], connections.refused)
        ended.add_metric(["crashed"], connections.crashed)
        yield ended
        teardown = HistogramMetricFamily(
            "agentsse_teardown_seconds",
            "From the signal to cancel a run until its nursery had exited.",
        )
        total, buckets = 0, []
        for bound, count in zip((*self._buckets, float("inf")), runs.teardowns, strict=True):
            total += count
            buckets.append(("+Inf" if bound == float("inf") else str(bound), float(total)))
        teardown.add_metric([], buckets, sum_value=runs.teardown_seconds)
        yield teardown
        lag = GaugeMetricFamily(
            "agentsse_loop_lag_seconds",
            "How long one pass of the event loop took: the last one, and the worst so far.",
            labels=["which"],
        )
        lag.add_metric(["last"], runs.loop_lag)
        lag.add_metric(["worst"], runs.worst_loop_lag)
        yield lag


def render(
    runs: RunStatistics,
    streams: _Streams,
    connections: _Connections,
    *,
    buckets: tuple[float, ...],
) -> tuple[bytes, str]:
    """Render the counts; returns the text and its content type."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(runs, streams, connections, buckets=buckets))
    return generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4
