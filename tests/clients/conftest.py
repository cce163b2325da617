"""Artifacts for clients, and the table of what each client reads: ``--table docs/serving.md`` writes it there."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import loadstone
from loadstone.artifact.builtin import builtin_path

# Two recipes in torchao's layout, and one in that of servers.
ARTIFACTS = {
    "int8-weight-only": {"recipe": "int8-weight-only"},
    "int8-dynamic-act-int4-weight": {"recipe": "int8-dynamic-act-int4-weight"},
    "compressed-tensors": {"recipe": "intx4-weight-only", "layout": "compressed-tensors"},
}
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
_BEGIN, _END = "<!-- make test-clients writes this table -->\n", "<!-- end of the table -->\n"
_outcomes: dict[str, dict[str, str]] = {}


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model in the package, with a chat template."""
    path = tmp_path_factory.mktemp("clients") / "source"
    shutil.copytree(builtin_path("builtin:tiny-llama"), path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="session")
def make_artifact(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str], Path]:
    """``make_artifact(source, kind)``: the finalized directory, made once."""
    made: dict[tuple[Path, str], Path] = {}

    def make(source: Path, kind: str) -> Path:
        if (source, kind) not in made:
            out = tmp_path_factory.mktemp("artifact") / kind
            loadstone.finalize(source, out, **ARTIFACTS[kind])
            made[source, kind] = out
        return made[source, kind]

    return make


@pytest.fixture(params=ARTIFACTS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def artifact(source: Path, kind: str, make_artifact: Callable[[Path, str], Path]) -> Path:
    return make_artifact(source, kind)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--table", help="Markdown page whose table of clients is written.")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    outcome = yield
    report = outcome.get_result()
    client = item.get_closest_marker("clients")
    kind = getattr(item, "callspec", None) and item.callspec.params.get("kind")
    if client and client.args and kind and (report.when == "call" or report.outcome != "passed"):
        _outcomes.setdefault(client.args[0], {})[kind] = "yes" if report.passed else "no"


def pytest_sessionfinish(session: pytest.Session) -> None:
    page = session.config.getoption("--table", default=None)
    if page is None or not _outcomes:
        return
    lines = [f"| client | {' | '.join(f'`{k}`' for k in ARTIFACTS)} |", "|---" * (len(ARTIFACTS) + 1) + "|"]
    for client, found in _outcomes.items():
        lines.append(f"| {client} | {' | '.join(found.get(kind, '-') for kind in ARTIFACTS)} |")
    text = Path(page).read_text(encoding="utf-8")
    table = _BEGIN + "\n" + "\n".join(lines) + "\n\n" + _END
    new = re.sub(re.escape(_BEGIN) + ".*?" + re.escape(_END), lambda _: table, text, flags=re.S)
    Path(page).write_text(new, encoding="utf-8")
