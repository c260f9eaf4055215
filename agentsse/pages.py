"""What is no dialect's: the pages that operators ask for, preflights, and paths that nobody knows.

Knows: Quart, and its own few paths. The only importer of quart and quart_trio. Must never know
what a dialect's route does, nor runs. It is imported when somebody asks for one of its pages, for a
server that only runs agents needs none of it.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence

import trio
from quart import Response, request
from quart_trio import QuartTrio
from werkzeug.exceptions import HTTPException

from .errors import AgentsseError, NotAllowed, NotFound
from .events import Problem
from .exchange import Answer, allow_origin, answer_error, answer_problem, see_stranger

Page = Callable[[], Awaitable[Answer]]


class Pages(QuartTrio):
    """An ASGI application for all that the dialects' routes leave over.

    Args:
        pages: By path, for GET.
        methods: Those of a path, none where nobody claims it; told to who asks by a wrong one.
        allowed_hosts: Names in the Host header beside those of loopback.
        crash: Called with the method, the target, and an exception that nobody expected; makes its
            answer.
    """

    def __init__(
        self,
        pages: Mapping[str, Page],
        methods: Callable[[str], Sequence[str]],
        *,
        allowed_hosts: tuple[str, ...],
        crash: Callable[[str, bytes, Exception], Answer],
    ) -> None:
        super().__init__("agentsse", static_folder=None)
        self.url_map.merge_slashes = False  # `/threads//messages` is no thread named "messages"
        self._methods, self._allowed_hosts, self._crash = methods, allowed_hosts, crash
        self.before_request(self._guard)
        self.after_request(self._allow_origin)
        self.register_error_handler(Exception, self._answer_error)
        for path, page in pages.items():
            self.add_url_rule(path, path, self._viewing(page), methods=["GET"])

    def _viewing(self, page: Page) -> Callable[[], Awaitable[Response]]:
        async def view() -> Response:
            return _response(await page())

        return view

    async def _guard(self) -> Response | None:
        """Refuse strangers, and answer the preflights of others.

        Async, though it waits for nothing: Quart runs sync functions in a worker thread.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        origin = see_stranger(
            {name.lower(): value for name, value in request.headers.items()}, self._allowed_hosts
        )
        if request.method == "OPTIONS" and origin is not None:
            return Response(
                b"",
                204,
                {
                    "Access-Control-Allow-Methods": "GET, HEAD, POST, PUT, DELETE, OPTIONS",
                    "Access-Control-Allow-Headers": request.headers.get(
                        "Access-Control-Request-Headers", "*"
                    ),
                    "Access-Control-Max-Age": "600",
                },
            )
        return None

    async def _allow_origin(self, response: Response) -> Response:
        await trio.lowlevel.checkpoint_if_cancelled()
        for name, value in allow_origin(request.headers.get("Origin")).items():
            response.headers[name] = value
        return response

    async def _answer_error(self, error: Exception) -> Response:
        await trio.lowlevel.checkpoint_if_cancelled()
        match error:
            case AgentsseError():
                return _response(answer_error(error))
            case HTTPException(code=404 | 405) if methods := tuple(self._methods(request.path)):
                if request.method == "OPTIONS":
                    return Response(b"", 200, {"Allow": ", ".join(methods)})
                expected = f"expected one of {', '.join(methods)} for this path"
                refused = NotAllowed(f"{expected}, got {request.method}", methods)
                return _response(answer_error(refused))
            case HTTPException(code=404):
                unknown = NotFound(
                    "expected a path that this server knows, got "
                    f"{request.path[:80]!r}; GET /agents lists what can be run"
                )
                return _response(answer_error(unknown))
            case HTTPException():
                code = (error.name or "error").lower().replace(" ", "_")
                message = error.description or code
                status = error.code or 500
                return _response(answer_problem(Problem(code=code, message=message, status=status)))
            case _:
                return _response(self._crash(request.method, request.scope["raw_path"], error))


def _response(answer: Answer) -> Response:
    assert isinstance(answer.body, bytes)
    return Response(answer.body, answer.status, dict(answer.headers))
