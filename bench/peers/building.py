"""Peers that are compiled: once for each version of their source and of the compiler.

Knows: the Go command, and where a cache belongs. Must never know what the program does.
"""

import hashlib
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

PATIENCE = 180.0  # seconds for a build; the first one compiles the standard library, too
_OFFLINE = {"GOFLAGS": "-mod=mod", "GOPROXY": "off", "GOTOOLCHAIN": "local", "CGO_ENABLED": "0"}


class BuildError(Exception):
    """A program could not be built; the message says why."""


@cache
def build_go(source: Path) -> tuple[str, ...]:
    """Build the Go program in a folder, unless that was done before, without any network.

    Returns:
        The command that runs it.

    Raises:
        BuildError: The compiler refused, or took too long; or there is no place for the program.
    """
    digest = hashlib.sha256(_go("version", folder=source))
    for file in sorted(source.iterdir()):
        digest.update(b"\0%b\0%b" % (file.name.encode(), file.read_bytes()))
    folder = _cache_folder()
    program = folder / f"{source.name}-{digest.hexdigest()[:16]}"
    try:
        if not program.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as beside:
                made = Path(beside) / program.name
                _go("build", "-o", str(made), ".", folder=source)
                made.replace(program)  # whole or not at all: two benches may build at once
    except OSError as error:
        raise BuildError(
            f"expected a folder that can be written at {folder}, got: {error}; set XDG_CACHE_HOME"
        ) from error
    return (str(program),)


def _cache_folder() -> Path:
    given = os.environ.get("XDG_CACHE_HOME")
    return (Path(given) if given else Path.home() / ".cache") / "agentsse-bench"


def _go(*arguments: str, folder: Path) -> bytes:
    try:
        done = subprocess.run(
            ["go", *arguments],
            cwd=folder,
            env={**os.environ, **_OFFLINE},
            capture_output=True,
            timeout=PATIENCE,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip()
        raise BuildError(f"go {arguments[0]}: expected success, got: {said[-500:]}") from error
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"go {arguments[0]}: expected an end within {PATIENCE:g} s") from error
    return done.stdout
