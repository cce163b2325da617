"""The options of an export, checked before any work. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loadstone.errors import UsageError
from loadstone.fakequant.formats.spec import Format, parse_format
from loadstone.fakequant.rules import RuleSet, read_rules

KV_FORMATS = ("fp8",)


@dataclass(frozen=True)
class Options:
    """How to export; the fields are the command's options (docs/export-fakequant.md). ``calibrate`` holds the
    documents themselves: texts, or token tensors."""

    rules: RuleSet
    activations: bool = False
    calibrate: tuple[Any, ...] | None = None
    kv_cache: str | None = None
    untie: bool = False
    remote_code: str = "strip"
    emit_modelopt: bool = False
    device: str = "auto"
    overwrite: bool = False
    resume: bool = True
    trust_remote_code: bool = False

    @property
    def calibrates(self) -> bool:
        """Whether the model has to run."""
        needed = self.activations and any(f.needs_calibration for f in self.rules.formats)
        return needed or self.kv_cache is not None


def make_options(
    *,
    format: str | Format | None = None,
    rules: str | Path | RuleSet | None = None,
    activations: bool = False,
    calibrate: Sequence[Any] | None = None,
    kv_cache: str | None = None,
    untie: bool = False,
    remote_code: str = "strip",
    emit: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
    resume: bool = True,
    trust_remote_code: bool = False,
) -> Options:
    """`Options` from what a user gives; `UsageError` for what does not exist or does not fit together."""
    chosen = parse_format(format) if isinstance(format, str) else format
    if isinstance(rules, RuleSet):
        rule_set = replace(rules, default=chosen or rules.default)
    else:
        rule_set = read_rules(Path(rules), chosen) if rules is not None else RuleSet(chosen)
    if remote_code not in ("strip", "copy"):
        raise UsageError(f"--remote-code {remote_code} is not known", "One of strip, copy")
    if emit not in (None, "modelopt"):
        raise UsageError(f"--emit {emit} is not known", "The one choice is modelopt")
    if kv_cache is not None and kv_cache not in KV_FORMATS:
        raise UsageError(f"--kv-cache {kv_cache} is not known", f"One of {', '.join(KV_FORMATS)}")
    options = Options(
        rules=rule_set,
        activations=activations or (calibrate is not None and kv_cache is None),
        calibrate=tuple(calibrate) if calibrate is not None else None,
        kv_cache=kv_cache,
        untie=untie,
        remote_code=remote_code,
        emit_modelopt=emit is not None,
        device=device,
        overwrite=overwrite,
        resume=resume,
        trust_remote_code=trust_remote_code,
    )
    if options.activations and not any(f.inputs for f in rule_set.formats):
        raise UsageError(
            f"{rule_set} leaves layer inputs as they are", "Leave out --activations and --calibrate"
        )
    if options.calibrates and calibrate is None:
        what = "--kv-cache" if kv_cache else f"the layer inputs of {rule_set}"
        raise UsageError(f"{what}: ranges have to be measured on text", "Pass --calibrate FILE (or sample)")
    if calibrate is not None and not options.calibrates:
        raise UsageError(f"the layer inputs of {rule_set} need no calibration", "Pass --activations instead")
    return options
