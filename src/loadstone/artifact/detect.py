"""What a directory is, and the evidence for it. Headers only: no torch, no weights read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadstone.artifact.builtin import PREFIX, builtin_path
from loadstone.artifact.context_file import CONTEXT_JSON, CONTEXT_TENSORS, is_context, read_context
from loadstone.artifact.files import (
    MAX_CONFIG_BYTES,
    Sink,
    check_inside,
    is_file,
    links_followed,
    read_json,
    refuse,
)
from loadstone.artifact.formats.safetensors import TensorInfo
from loadstone.artifact.formats.weights import (
    BIN,
    SAFETENSORS,
    TensorTable,
    WeightFiles,
    find_weights,
)
from loadstone.artifact.hashing import sha256_file
from loadstone.artifact.hints import MODEL_FILES, file_hint, hub_cache, is_hub_name, nearest, no_config_hint
from loadstone.artifact.kinds import (
    ADAPTER,
    ADAPTER_CONFIG,
    COMPRESSED_TENSORS,
    CONTEXT,
    DENSE,
    FAKEQUANT,
    OTHER_QUANTIZER,
    PFN,
    QAT,
    QAT_KEY,
    TORCHAO,
    TORCHAO_UNMARKED,
    UNKNOWN,
    classify,
    is_adapter,
    quantization_block,
)
from loadstone.artifact.manifest import MANIFEST, recorded_digests
from loadstone.artifact.packed import Packed, modelopt_block, read_packed
from loadstone.artifact.source import SafetensorsSource, Source, open_source
from loadstone.artifact.torchao.checks import FlatTensor
from loadstone.artifact.training_run import choose_checkpoint, is_checkpoint_name
from loadstone.artifact.unchanged import Stamp, read_at_once, stamp_of
from loadstone.errors import ArtifactError, UsageError

if TYPE_CHECKING:
    from loadstone.artifact.adapter import Adapter

CONFIG = "config.json"
# A fake-quant export's, beside its weights.
QUANTIZER_FILES = ("fakequant_manifest.json", "fakequant_state.safetensors")

__all__ = [
    "ADAPTER",
    "COMPRESSED_TENSORS",
    "CONFIG",
    "CONTEXT",
    "DENSE",
    "FAKEQUANT",
    "OTHER_QUANTIZER",
    "PFN",
    "QAT",
    "QAT_KEY",
    "TORCHAO",
    "TORCHAO_UNMARKED",
    "UNKNOWN",
    "Artifact",
    "detect",
    "examine",
    "read_config",
]


@dataclass(frozen=True)
class Artifact:
    """Facts about a model directory. ``root`` is what the user named.

    ``path`` holds the weights (a checkpoint in it).
    """

    path: Path
    root: Path
    kind: str
    evidence: tuple[str, ...]
    config: dict[str, Any] = field(repr=False)
    weights: WeightFiles
    source: Source = field(repr=False)
    packed: Mapping[str, Packed] = field(repr=False, default_factory=dict)
    quant_method: str | None = None
    notes: tuple[str, ...] = ()
    adapter: Adapter | None = field(repr=False, default=None)
    # Number formats that its weights were stored in before they were decoded, oldest first; empty for others.
    decoded: tuple[str, ...] = ()
    # Whether its files may be links out of the directory (see `following_links`).
    follow_links: bool = field(repr=False, default_factory=links_followed)
    # Of config.json and the weights in ``path``, and of an adapter's files, when they were looked at.
    stamp: Stamp = field(repr=False, compare=False, default=())

    @property
    def own_path(self) -> Path:
        """The directory that means these weights and no others: of an adapter its own, else ``path``."""
        return self.path if self.adapter is None else self.adapter.directory

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every stored tensor by name, the parts of quantized ones among them."""
        return self.source.tensors

    @property
    def quantized(self) -> dict[str, FlatTensor]:
        """torchao's quantized tensors by name."""
        return self.source.quantized

    @property
    def quantization_config(self) -> dict[str, Any] | None:
        """The block of ``config.json``, None when there is none."""
        return quantization_block(self.config)

    @property
    def is_torchao(self) -> bool:
        return self.kind in (TORCHAO, TORCHAO_UNMARKED)

    @property
    def weight_files(self) -> tuple[str, ...]:
        """The files that hold the weights' bytes, relative to ``path`` (of a distributed checkpoint its slices)."""
        return self.source.files

    @property
    def needs_remote_code(self) -> bool:
        """Whether config.json says that the model's code lies in the directory (``auto_map``)."""
        return bool(self.config.get("auto_map"))

    @property
    def config_dir(self) -> Path:
        """Where config.json is: ``path``, or the run's root when the checkpoint has none."""
        folders = self.sidecar_dirs if self.adapter is None else _sidecar_dirs(self.path, self.path)
        return next((d for d in folders if is_file(d / CONFIG)), self.path)

    @property
    def sidecar_dirs(self) -> tuple[Path, ...]:
        """Where config, tokenizer and the like may lie, in search order.

        With the weights, then in the run's root.
        """
        if self.adapter is not None:
            # An adapter is saved with the tokenizer it was trained with.
            return tuple(
                dict.fromkeys((self.adapter.directory, self.root, *_sidecar_dirs(self.path, self.path)))
            )
        return _sidecar_dirs(self.path, self.root)

    def digests(self, part: int = 0, parts: int = 1) -> dict[str, str]:
        """The sha256, by name, of config.json, every weight file and a fake-quant export's quantizers; of several
        ``parts`` those of one."""
        import os
        from concurrent.futures import ThreadPoolExecutor

        files = self._hashed
        names = list(files)[part::parts]
        # Half the cores: the others work on the same files.
        with ThreadPoolExecutor(min(max((os.cpu_count() or 1) // (2 * parts), 1), 8)) as pool:
            return dict(zip(names, pool.map(sha256_file, map(files.__getitem__, names)), strict=True))

    def fingerprint(self, digests: Mapping[str, str] | None = None, *, check: bool = False) -> str:
        """sha256 over all `digests`, which are computed where they are not given.

        ``check``: raise `ArtifactError` for a weight file whose content is not what is recorded of it.
        """
        import hashlib

        found = self.digests() if digests is None else digests
        recorded = recorded_digests(self.path, self.weight_files) if check else {}
        total = hashlib.sha256()
        for name in self._hashed:
            if recorded.get(name, found[name]) != found[name]:
                raise ArtifactError(
                    f"{name}: content differs from the sha256 that is recorded of it",
                    f"Copy or download the file again, or remove {MANIFEST} if it was changed on purpose",
                )
            total.update(f"{name}\0{found[name]}\n".encode())
        return total.hexdigest()

    @property
    def _hashed(self) -> dict[str, Path]:
        """The files that `digests` covers."""
        names = dict.fromkeys((*self.weights.files, *self.weight_files))
        paths = [self.config_dir / CONFIG, *(self.path / name for name in names)]
        # Quantizers of inputs change what is computed with the same weights.
        paths += [self.path / name for name in QUANTIZER_FILES if is_file(self.path / name)]
        return {
            str(path.relative_to(self.path)) if path.is_relative_to(self.path) else path.name: path
            for path in paths
        }


def detect(path: str | Path, *, checkpoint: str | None = None, base: str | Path | None = None) -> Artifact:
    """Recognise a model directory.

    ``path`` may be a Hugging Face cache's folder of a repository, whose newest snapshot is meant.

    ``checkpoint`` chooses within a training run: ``newest`` (default), ``best``, a step number, a folder name
    or a path. ``base``: of an adapter, the model it was trained on, if it is not where the adapter says. Raises
    `UsageError` when ``path`` is not a directory, `ArtifactError` when it is not a model or is
    damaged.
    """
    return read_at_once(Path(path), lambda: examine(path, checkpoint=checkpoint, base=base))


def examine(
    path: str | Path, *, checkpoint: str | None = None, base: str | Path | None = None, sink: Sink = refuse
) -> Artifact:
    """`detect`, with each problem given to ``sink``.

    If ``sink`` does not raise, fields that could not be determined are empty.
    """
    root = _directory(path)
    directory, chosen = root, tuple[str, ...]()
    try:
        directory, chosen = choose_checkpoint(root, checkpoint)
        if is_context(directory):
            return _context(directory, root, sink)
        if is_adapter(directory):
            return _adapter(directory, root, base, chosen, sink)
        if base is not None:
            raise UsageError(f"'{root}' is not an adapter, so it has no base", "Leave out --base")
    except ArtifactError as error:
        sink(error)
    except OSError as error:
        sink(ArtifactError(f"'{root}' cannot be read ({error.strerror})", "Check its permissions"))
    config = _or_empty(sink, lambda: _find_config(directory, root), ({}, ()))
    weights = _or_empty(
        sink,
        lambda: find_weights(directory, sink, config[0].get("transformers_weights")),
        WeightFiles("none", ()),
    )
    if weights is None:
        weights = WeightFiles("none", ())
        sink(_no_weights(directory))
    source = open_source(directory, weights, sink)
    packed: Mapping[str, Packed] = {}
    if quantization_block(config[0]) is None and (
        block := _or_empty(sink, lambda: modelopt_block(directory), None)
    ):
        config = config[0] | {"quantization_config": block}, (*config[1], "hf_quant_config.json")
    if weights.files and source.streamable:
        block = quantization_block(config[0])
        packed = _or_empty(sink, lambda: read_packed(directory, block, source.tensors, sink), {})
    kind, evidence, method = classify(directory, config[0], weights, source, sink, packed)
    return Artifact(
        path=directory,
        root=root,
        kind=kind,
        evidence=(*chosen, *config[1], *evidence),
        config=config[0],
        weights=weights,
        source=source,
        packed=packed,
        quant_method=method,
        notes=weights.notes,
        stamp=stamp_of(directory, (CONFIG, *source.files)),
    )


def _adapter(
    directory: Path, root: Path, base: str | Path | None, chosen: tuple[str, ...], sink: Sink
) -> Artifact:
    """An adapter: its base's facts, with the adapter's changes merged into the tensors as they are read."""
    # Imported where there is one: `inspect` of any other directory answers sooner.
    from loadstone.artifact.adapter import read_adapter, read_adapter_config
    from loadstone.artifact.merged import MergedSource

    if find_weights(directory) is not None:
        raise ArtifactError(
            f"'{directory}' holds full weights and an adapter: it does not say whether they are merged",
            f"Move the adapter ({ADAPTER_CONFIG}, adapter_model.*) to a directory of its own, or remove it",
        )
    recorded = read_adapter_config(directory).get("base_model_name_or_path")
    named = base if base is not None else recorded
    if base is None and (
        not isinstance(recorded, str) or not recorded.isprintable() or not is_directory(recorded)
    ):
        what = (
            f"its base ({ascii(recorded)[:200]}) is not a directory here" if recorded else "it names no base"
        )
        raise UsageError(f"'{root}' is an adapter, and {what}", _base_remedy(recorded))
    if is_adapter(_directory(str(named))):
        raise ArtifactError(
            f"the base '{named}' is an adapter itself", "Merge that one first, by loadstone finalize"
        )
    below = examine(str(named), sink=sink)
    if below.kind not in (DENSE, QAT):
        raise ArtifactError(
            f"the base '{named}' is quantized ({below.kind}): an adapter is merged into unquantized weights",
            "Name the unquantized base by --base"
            + (
                f", or decode this one (loadstone finalize -M {named} -o OUT) and name OUT"
                if below.packed
                else ""
            ),
        )
    adapter = read_adapter(directory, sink)
    # Its names are those of the model in memory: what they are in the files is asked of the model before they are read.
    merged: Any = MergedSource(below.source, adapter, below.tensors)
    return replace(
        below,
        root=root,
        kind=ADAPTER,
        evidence=(*chosen, f"{ADAPTER_CONFIG}: {adapter}, merged into {below.root}"),
        source=merged,
        adapter=adapter,
        stamp=below.stamp + stamp_of(directory.resolve(), (ADAPTER_CONFIG, *adapter.files), absolute=True),
    )


def _base_remedy(recorded: Any) -> str:
    cached = (
        Path(hub_cache()) / f"models--{recorded.replace('/', '--')}" if isinstance(recorded, str) else None
    )
    if cached is not None and is_hub_name(str(recorded)) and cached.is_dir():
        return f"Name the base model's directory; one of that name is in the cache: --base {cached}"
    download = f", after hf download {recorded} --local-dir DIR" if is_hub_name(str(recorded)) else ""
    return f"Name the base model's directory: --base DIR (base=DIR){download}"


def is_directory(name: str) -> bool:
    """Whether a recorded name is a directory here, or a model in the package."""
    try:
        return name.startswith(PREFIX) or Path(name).is_dir()
    except (OSError, ValueError):
        return False


def _context(directory: Path, root: Path, sink: Sink) -> Artifact:
    """A fitted context: no weights of a model's, so neither config nor plain weight files are looked for."""
    context = _or_empty(sink, lambda: read_context(directory), None)
    stored = (CONTEXT_TENSORS,) if context else ()
    return Artifact(
        path=directory,
        root=root,
        kind=CONTEXT,
        evidence=(f"{CONTEXT_JSON} describes a fitted context",),
        config=context.facts if context else {},
        weights=WeightFiles("safetensors", stored),
        source=SafetensorsSource(directory, stored, TensorTable(context.tensors if context else {}, {})),
    )


def _or_empty(sink: Sink, work: Any, empty: Any) -> Any:
    try:
        return work()
    except ArtifactError as error:
        sink(error)
        return empty


def _directory(path: str | Path) -> Path:
    if path == "":
        # `Path` makes it the current directory.
        raise UsageError("the model's directory is an empty text", "Name a directory")
    root = builtin_path(str(path)) if str(path).startswith(PREFIX) else Path(path)
    try:
        exists, is_directory = root.exists(), root.is_dir()
    except (OSError, ValueError) as error:
        raise UsageError(
            f"'{ascii(str(path))[1:-1][:200]}' is not a path ({error})", "Check the path"
        ) from None
    if not exists:
        raise UsageError(f"there is no directory '{root}'", nearest(root))
    if not is_directory:
        raise UsageError(f"'{root}' is a file, not a model directory", file_hint(root))
    return snapshot_of(root)


def snapshot_of(root: Path) -> Path:
    """The snapshot that a Hugging Face cache's folder of a repository (``models--org--name``) has as its newest.

    Any other directory as it is. Raises `UsageError` when the folder holds no snapshot, or several and none is named.
    """
    if not root.absolute().name.startswith("models--") or not (root / "snapshots").is_dir():
        return root
    try:
        names = sorted(p.name for p in (root / "snapshots").iterdir() if p.is_dir())
        main = root / "refs" / "main"
        named = main.read_text().strip() if is_file(main) and main.stat().st_size < 200 else ""
    except (OSError, ValueError):
        names, named = [], ""
    if named in names or len(names) == 1:
        return root / "snapshots" / (named if named in names else names[0])
    listed = f"Name one of {', '.join(f'snapshots/{n}' for n in names[:5])}" if names else "Download it again"
    raise UsageError(f"'{root}' is a Hugging Face cache, and refs/main names no snapshot in it", listed)


def _sidecar_dirs(path: Path, root: Path) -> tuple[Path, ...]:
    # Trainers that write only weights into a checkpoint leave config and tokenizer in the run's root.
    run = [path.parent] if is_checkpoint_name(path.resolve().name) else []
    return tuple(dict.fromkeys((path, root, *run)))


def _find_config(directory: Path, root: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    for folder in _sidecar_dirs(directory, root):
        if is_file(folder / CONFIG):
            note = () if folder == directory else (f"{CONFIG} is the run's, {folder.name}/{CONFIG}",)
            return read_config(folder, root), note
    return read_config(directory, root), ()


def read_config(directory: Path, root: Path) -> dict[str, Any]:
    """``config.json`` of a model directory.

    Raises `ArtifactError` when it is missing or no model's config.
    """
    file = directory / CONFIG
    if not is_file(file):
        raise ArtifactError(f"'{root}' is not a model directory: it has no {CONFIG}", no_config_hint(root))
    check_inside(directory, CONFIG)
    config = read_json(file, MAX_CONFIG_BYTES)
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ArtifactError(f"{CONFIG}: architectures is not a list of names", "Restore it from the source")
    if not isinstance(config.get("model_type"), str) and not names:
        raise ArtifactError(f"{CONFIG} has no model_type", "Restore it from the source")
    return config


def _no_weights(directory: Path) -> ArtifactError:
    for name in (SAFETENSORS, BIN):
        if (directory / name).is_symlink() or (directory / name).exists():
            return ArtifactError(
                f"'{directory}' holds no weights: {name} is not a regular file", "Copy the file itself"
            )
    for pattern, what, remedy in MODEL_FILES:
        if next(directory.glob(pattern), None) is not None:
            return ArtifactError(f"'{directory}' holds {what} and no model weights", remedy)
    return ArtifactError(
        f"'{directory}' holds no weights (model.safetensors, pytorch_model.bin or their index)",
        "Copy the weight files, or name the directory that has them",
    )
