"""Errors: names and statuses that programs may rely on, and log lines that hold no secret."""

import pytest

from agentsse import errors
from agentsse.errors import (
    MAX_MESSAGE,
    AgentError,
    AgentsseError,
    NotAllowed,
    Overloaded,
    Unencodable,
    redact,
)

CANARY = "cAn4ry-9f8e7d6c"

ALL = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, AgentsseError)
]


def test_codes_are_unique():
    """A program can tell every error from every other by its code."""
    codes = [kind("why").code for kind in ALL]

    assert sorted(set(codes)) == sorted(codes)


def test_statuses_are_unique():
    """But for 500, which says nothing, no two errors share a status unless one is the other."""
    own = [kind for kind in ALL if kind.status != getattr(kind.__base__, "status", None)]
    statuses = [kind.status for kind in own if kind.status != 500]

    assert sorted(set(statuses)) == sorted(statuses)
    assert all(400 <= status <= 503 for status in statuses)


@pytest.mark.parametrize("kind", ALL)
def test_the_message_is_the_sentence_given(kind):
    """What was said when it was raised is what may be shown."""
    assert "say why" == kind("say why").message
    assert "say why" == str(kind("say why"))


def test_without_a_sentence_the_code_stands_in():
    """An error is never shown without a word."""
    assert "internal" == AgentsseError().message
    assert "not_found" == errors.NotFound().message


def test_a_message_is_no_echo():
    """What is quoted in it may be long; what is shown is not."""
    assert "x" * MAX_MESSAGE == AgentsseError("x" * MAX_MESSAGE).message
    assert "x" * MAX_MESSAGE + "..." == AgentsseError("x" * (MAX_MESSAGE + 1)).message
    assert "5" == AgentError(5).message


def test_errors_carry_what_their_answer_needs():
    """The methods a path knows, the seconds to wait, an agent's own code and status."""
    assert ("GET", "HEAD") == NotAllowed("no", ("GET", "HEAD")).allow
    assert () == NotAllowed("no").allow
    assert 7 == Overloaded("later", 7).retry_after
    assert 1 == Overloaded("later").retry_after

    chosen = AgentError("sold out", code="sold_out", status=410)
    assert ("sold_out", 410) == (chosen.code, chosen.status)
    assert ("agent_error", 500) == (AgentError("no").code, AgentError("no").status)


def test_unencodable_is_a_value_error():
    """Code that knows nothing of us catches it as what it is."""
    assert issubclass(Unencodable, ValueError)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"Authorization: Bearer {CANARY}", "Authorization: [redacted]"),
        (f"authorization: Token {CANARY}\r\nhost: x", "authorization: [redacted]\r\nhost: x"),
        (f"proxy-Authorization=basic {CANARY}", "proxy-Authorization=[redacted]"),
        (f"Cookie: a={CANARY}; b={CANARY}\nHost: x", "Cookie: [redacted]\nHost: x"),
        (f'{{"authorization": "Bearer {CANARY}", "n": 1}}',
         '{"authorization": "[redacted]", "n": 1}'),
        (f"{{'x-api-key': '{CANARY}', 'n': 1}}", "{'x-api-key': '[redacted]', 'n': 1}"),
        (f"[(b'x-api-key', b'{CANARY}')]", "[(b'x-api-key', b'[redacted]')]"),
        (f"[('cookie', 'sid={CANARY}; b={CANARY}')]", "[('cookie', '[redacted]')]"),
        (rf'"{{\"token\": \"{CANARY}\", \"n\": 1}}"', r'"{\"token\": \"[redacted]\", \"n\": 1}"'),
        (f'password = "two {CANARY}"', 'password = "[redacted]"'),
        (f"client_secret={CANARY}&state=1", "client_secret=[redacted]&state=1"),
        (f"GET /v1?key={CANARY}&alt=sse", "GET /v1?key=[redacted]&alt=sse"),
        (f"redis://user:{CANARY}@host:6379/0", "redis://user:[redacted]@host:6379/0"),
        (f"redis://:p@{CANARY}@host", "redis://:[redacted]@host"),
        (f"it said bearer {CANARY}, twice", "it said bearer [redacted], twice"),
        (f"APIKEY={CANARY} next", "APIKEY=[redacted] next"),
        (f"Incorrect key provided: sk-proj-{CANARY}.", "Incorrect key provided: [redacted]."),
    ],
)  # fmt: skip
def test_credentials_are_blanked(text, expected):
    """Headers, fields, queries, URLs and vendors' keys lose their values, and nothing else."""
    assert expected == redact(text)
    assert CANARY not in redact(text)
    assert expected == redact(redact(text))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "connect to http://localhost:8000/runs failed",
        "expected at most 50 tokens, got 51",
        "max_tokens=5, input_tokens: 7",
        "the risk-averse desk-top",
        "tokenizer: none",
    ],
)
def test_what_is_no_credential_stays(text):
    """Ports, counts and words that only look alike can still be read."""
    assert text == redact(text)
