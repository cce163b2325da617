"""Options that commands share: one meaning everywhere, and none that is silently ignored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.helpers import run

from loadstone.cli.app import COMMANDS


@pytest.mark.parametrize("target", [["--json"], ["--json", "-"]], ids=["alone", "dash"])
@pytest.mark.parametrize("before", [True, False], ids=["first", "last"])
def test_json_to_stdout(
    tiny: Path, capsys: pytest.CaptureFixture[str], target: list[str], before: bool
) -> None:
    rest = ["-M", tiny, "--format", "int8", "--dry-run"]
    args = [*target, *rest] if before else [*rest, *target]
    code, stdout, _ = run(capsys, "export-fakequant", *args)
    assert code == 0 and json.loads(stdout)["dry_run"] is True


@pytest.mark.parametrize(
    "command",
    [["inspect", "{tiny}"], ["export-fakequant", "-M", "{tiny}", "--format", "int8", "--dry-run"]],
    ids=lambda command: command[0],
)
def test_json_to_a_file_leaves_the_text_on_stdout(
    command: list[str], tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [word.format(tiny=tiny) for word in command]
    text = run(capsys, *args)[1]
    code, stdout, _ = run(capsys, *args, "--json", tmp_path / "result.json")
    assert (code, stdout) == (0, text) and json.loads((tmp_path / "result.json").read_text())
    code, stdout, stderr = run(capsys, *args, "--json", tmp_path / "no" / "result.json")
    assert (code, stdout) == (2, "") and "its directory does not exist" in stderr


def test_every_command_takes_json_the_same_way(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        code, stdout, _ = run(capsys, command, "--help")
        lines = [line for line in stdout.splitlines() if "--json " in line]
        assert code == 0 and any("[FILE|-]" in line for line in lines), command


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (
            [
                "export-fakequant",
                "-M",
                "{tiny}",
                "--format",
                "int8",
                "-o",
                "{tmp}/o",
                "--calibrate-limit",
                "3",
            ],
            "--calibrate-limit has no effect without --calibrate",
        ),
        (
            ["finalize", "-M", "{tiny}", "-o", "{tmp}/o", "--calibrate-tokens", "600"],
            "--calibrate-tokens has no effect without --calibrate",
        ),
        (["finalize", "--list-recipes", "-M", "{tiny}"], "--model has no effect with --list-recipes"),
        (["eval", "-M", "{tiny}", "--worst", "2"], "--worst has no effect without --kl"),
        (["eval", "-M", "{tiny}", "--task-path", "{tmp}"], "--task-path has no effect without --tasks"),
        (["inspect", "{context}", "--checkpoint", "best"], "--checkpoint has no effect on a fitted context"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_option_without_effect_is_refused(
    args: list[str],
    says: str,
    tiny: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    context = tmp_path_factory.mktemp("context")
    (context / "context.json").write_text("{}")
    code, stdout, stderr = run(
        capsys, *[word.format(tiny=tiny, tmp=tmp_path, context=context) for word in args]
    )
    assert (code, stdout) == (2, "") and says in stderr and not any(tmp_path.iterdir())
