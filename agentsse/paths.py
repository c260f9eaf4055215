"""Which route a request's path belongs to, and that no two routes claim one path.

Knows: paths, `<name>` for one of their segments, and which dialects are not loaded yet. Must never
know what a route does.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Self

import attrs

from .dialects import AnyDialect, Dialect, LazyDialect, Route
from .errors import ConfigError

LIVE, READY, METRICS = "/health/live", "/health/ready", "/metrics"
OPENAPI = "/openapi.json"
OWN = (LIVE, READY, METRICS, OPENAPI)

Claim = tuple[str, Dialect, Route]


@attrs.frozen
class Found:
    """A route, and what stands in its path's `<name>` places."""

    dialect: Dialect
    route: Route
    parameters: Mapping[str, str]


@attrs.define(eq=False)
class _Place:
    """A tree of segments: one that is named goes before one that may be anything."""

    named: dict[str, "_Place"] = attrs.field(factory=dict)
    any: "_Place | None" = None
    claims: dict[str, Claim] = attrs.field(factory=dict)  # by method, of the path that ends here

    def below(self, segment: str) -> "_Place":
        if not segment.startswith("<"):
            return self.named.setdefault(segment, _Place())
        if self.any is None:
            self.any = _Place()
        return self.any

    def find(self, method: str, segments: list[str], at: int) -> Claim | None:
        if at == len(segments):
            return self.claims.get(method)
        segment = segments[at]
        found = None
        if (named := self.named.get(segment)) is not None:
            found = named.find(method, segments, at + 1)
        if found is None and self.any is not None and segment:
            found = self.any.find(method, segments, at + 1)
        return found

    def methods(self, segments: list[str], at: int = 0) -> Iterator[str]:
        if at == len(segments):
            yield from self.claims
            return
        segment = segments[at]
        for inner in (self.named.get(segment), self.any if segment else None):
            if inner is not None:
                yield from inner.methods(segments, at + 1)


@attrs.define(eq=False)
class Paths:
    """The routes of all dialects; a lazy one is loaded by the first request for a path of it.

    That holds the loop up for 2 to 10 ms, once for each dialect. A thread would take as long, by
    turns with the loop, and whoever asks meanwhile would have to wait for it.
    """

    _root: _Place = attrs.field(factory=_Place)
    _lazy: dict[str, LazyDialect] = attrs.field(factory=dict)  # by what their paths begin with

    @classmethod
    def claimed_by(cls, dialects: Iterable[AnyDialect]) -> Self:
        """Find out where the routes of dialects are.

        Raises:
            ConfigError: Two of them claim one path, or one what operators ask for.
        """
        paths, loaded = cls(), []
        known = [(dialect, dialect.prefixes) for dialect in dialects]
        for dialect, own in known:
            others = {each for other, theirs in known if other is not dialect for each in theirs}
            if isinstance(dialect, LazyDialect) and _are_apart(own, others.union(OWN)):
                paths._lazy |= dict.fromkeys(own, dialect)
            else:
                loaded.append(dialect.load())
        paths._take(claim_paths(loaded))
        return paths

    def find(self, method: str, path: str) -> Found | None:
        """The route of a path, for HEAD that of GET; None where nobody claims it."""
        segments = _segments(path)
        method = "GET" if method == "HEAD" else method
        claim = self._root.find(method, segments, 0)
        if claim is None and self._load_for(path):
            claim = self._root.find(method, segments, 0)
        if claim is None:
            return None
        pattern, dialect, route = claim
        places = zip(_segments(pattern), segments, strict=True)
        parameters = {name[1:-1]: given for name, given in places if name.startswith("<")}
        return Found(dialect, route, parameters)

    def methods(self, path: str) -> tuple[str, ...]:
        """Those by which a path can be asked for, sorted; none where nobody claims it."""
        self._load_for(path)
        found = set(self._root.methods(_segments(path)))
        if path in OWN:
            found.add("GET")
        if "GET" in found:
            found.add("HEAD")
        return tuple(sorted({*found, "OPTIONS"})) if found else ()

    def _load_for(self, path: str) -> bool:
        """Load the dialect that the path may be of, if there is one that is not loaded."""
        for prefix, dialect in self._lazy.items():
            if _is_within(path, prefix):
                self._take(claim_paths([dialect.load()]))
                self._lazy = {p: each for p, each in self._lazy.items() if each is not dialect}
                return True
        return False

    def _take(self, claimed: Iterable[Claim]) -> None:
        for claim in claimed:
            place = self._root
            for segment in _segments(claim[0]):
                place = place.below(segment)
            place.claims[claim[2].method] = claim


def _segments(path: str) -> list[str]:
    return path.split("/")[1:]


def _is_within(path: str, prefix: str) -> bool:
    return f"{path}/".startswith(f"{prefix}/")


def _are_apart(some: Collection[str], others: Collection[str]) -> bool:
    """Whether no path below some prefixes can be below others as well."""
    return not any(
        _is_within(one, other) or _is_within(other, one) for one in some for other in others
    )


def claim_paths(dialects: Iterable[Dialect]) -> list[Claim]:
    """Where each route of each dialect is.

    Raises:
        ConfigError: Two of them claim one path, or one what operators ask for.
    """
    owners = {("GET", path): "the server itself" for path in OWN}
    claimed = []
    for dialect in dialects:
        for route in dialect.routes:
            path = dialect.path(route)
            pattern = "/".join("<>" if each.startswith("<") else each for each in path.split("/"))
            owner = owners.setdefault((route.method, pattern), dialect.name)
            if owner != dialect.name:
                raise ConfigError(
                    f"expected one dialect for {route.method} {path}, got {owner!r} and "
                    f"{dialect.name!r}: give one of them another mount, in "
                    f"[dialects.{dialect.name}]"
                )
            claimed.append((path, dialect, route))
    return claimed
