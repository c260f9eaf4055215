"""`parity.md` tells the truth: every test that it names is there, and nothing is left out.

The table says which of our tests shows each feature of the four systems, and which covers each of
the cases that they test themselves. What does not apply says why.
"""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
TABLE = (TESTS / "parity.md").read_text()
LATER = {51, 60, 64}  # checkpoints, a durable log, authentication
SYSTEMS = ("agentlang", "lightspeed-stack", "kilroy", "hive")
REFERENCE = re.compile(r"`(test_\w+\.py)::(test_\w+)`")


def section(title):
    """The rows of a section's table, each a list of its cells."""
    text = TABLE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows[2:]]


def defined():
    """Every test function there is, as the table names it."""
    found = set()
    for path in TESTS.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found.add((path.name, node.name))
    return found


def test_every_test_that_is_named_is_there():
    """Who renames a test mends the table."""
    named = set(REFERENCE.findall(TABLE))
    assert named
    assert set() == named - defined()


def test_every_feature_is_shown():
    """75 rows in their order; each is shown by a test, or marked as later, or says why not."""
    rows = section("Features")
    assert list(range(1, 76)) == [int(number) for number, *_ in rows]
    for number, feature, shown in rows:
        assert feature
        if int(number) in LATER:
            assert shown.startswith("*later*")
        else:
            assert REFERENCE.search(shown), f"row {number} names no test"


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_case_of_a_system_is_covered_or_explained(system):
    """A case without a test of ours says why it does not apply."""
    rows = section(system)
    assert rows
    for case, shown in rows:
        assert case
        assert REFERENCE.search(shown) or len(shown) > 20, f"{case!r} is neither"
