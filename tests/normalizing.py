"""What tests of normalizers share: the same bytes make the same events, however they are cut."""

from agentsse.errors import ProviderError


def play(make, chunks):
    """Feed a new machine these chunks, and close it.

    Returns:
        What it produced, and the error that ended it or None.
    """
    machine, produced = make(), []
    try:
        for chunk in chunks:
            collect(machine.feed(chunk), produced)
        collect(machine.close(), produced)
    except ProviderError as error:
        return produced, error
    return produced, None


def collect(lazy, produced):
    """Take what a machine produces as it comes: it may raise after the first pieces."""
    for one in lazy:
        produced.append(one)


def however_cut(make, data, *, every=1):
    """Feed bytes whole, byte by byte, and in two at every position; all must give the same.

    Args:
        make: Makes a new machine.
        data: The bytes of a stream.
        every: Take only every so many positions, where a stream is long.

    Returns:
        What was produced, and the error or None.
    """
    produced, error = play(make, [data])
    expected = produced, error and (error.code, error.message)
    ways = [[data[n : n + 1] for n in range(len(data))]]
    ways += [[data[:n], data[n:]] for n in range(1, len(data), every)]
    for way in ways:
        got, failed = play(make, way)
        assert expected == (got, failed and (failed.code, failed.message))
    return produced, error
