"""`loadstone inspect`: what it shows, the JSON it promises, and the exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "artifact"))

from builders import CONFIG, INTX, dense, edit_header, edit_json, torchao, write_safetensors

from loadstone.artifact.hashing import sha256_file
from loadstone.artifact.manifest import MANIFEST
from loadstone.cli import main


@pytest.fixture
def inspect(capsys):
    """Runs ``loadstone inspect`` and returns (exit code, stdout, stderr)."""

    def run(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(["inspect", *map(str, args)])
        return caught.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture
def inspect_json(inspect):
    def run(*args: object) -> tuple[int, dict]:
        code, out, _ = inspect(*args, "--json")
        return code, json.loads(out)

    return run


KEYS = [
    "schema", "path", "root", "loadable", "problems", "notes", "kind", "evidence", "plan", "model_type",
    "architectures", "parameters", "bytes", "file_bytes", "dtypes", "quantization", "serving", "unquantized", "tied",
    "sidecars", "weights", "manifest", "verified",
]  # fmt: skip


def test_dense_as_json(tmp_path: Path, inspect_json) -> None:
    code, found = inspect_json(dense(tmp_path / "m"))
    assert code == 0 and list(found) == KEYS
    assert found["loadable"] and found["problems"] == [] and found["kind"] == "dense"
    assert found["parameters"] == 32 * 64 + 2 * (64 * 64 + 64) and found["bytes"] == 2 * found["parameters"]
    assert found["dtypes"] == {"BF16": {"tensors": 5, "bytes": found["bytes"]}}
    assert found["plan"]["load_path"] == "native" and found["plan"]["messages"] == []
    assert found["quantization"] is None and found["manifest"] is None and found["verified"] is None
    assert found["tied"] == [["model.embed_tokens.weight", "lm_head.weight"]]
    assert found["weights"] == {"format": "safetensors", "files": ["model.safetensors"], "index": None}
    assert found["sidecars"]["tokenizer"] is None
    assert found["unquantized"][0] == {
        "pattern": "model.layers.*.mlp.up_proj.weight",
        "count": 2,
        "type": "BF16",
        "parameters": 8192,
        "bytes": 16384,
        "stored_bits_per_weight": 16.0,
        "note": "",
    }


def test_quantized_as_json(tmp_path: Path, inspect_json) -> None:
    code, found = inspect_json(torchao(tmp_path / "m", shards=2))
    assert code == 0 and found["kind"] == "torchao" and found["plan"]["load_path"] == "native-quantized"
    assert found["parameters"] == 32 * 64 + 2 * (64 * 64 + 64)
    quantization = found["quantization"]
    assert quantization["method"] == "torchao" and quantization["recipe"] == "int8-dynamic-act-int4-weight"
    assert quantization["nominal_bits_per_weight"] == 4 and quantization["stored_bits_per_weight"] == 8.75
    assert quantization["parameters"] == 8192 and quantization["bytes"] == 8960
    (group,) = quantization["groups"]
    assert (group["pattern"], group["count"]) == ("model.layers.*.mlp.up_proj.weight", 2)
    assert {g["pattern"]: g["note"] for g in found["unquantized"]} == {
        "model.embed_tokens.weight": "embedding",
        "model.layers.*.input_layernorm.weight": "",
    }
    assert found["weights"]["index"] == "model.safetensors.index.json" and len(found["weights"]["files"]) == 2


def test_text(tmp_path: Path, inspect) -> None:
    code, out, err = inspect(torchao(tmp_path / "m"))
    assert code == 0 and err == ""
    lines = {line.split("  ")[0]: line for line in out.splitlines()}
    assert lines["bits/weight"].startswith(
        "bits/weight  4 nominal, 8.75 stored (a value of 4 bits takes a whole byte"
    )
    assert "native-quantized" in lines["would load"] and "int8-dynamic-act-int4-weight" in lines["recipe"]
    assert "note: no tokenizer: text cannot be given to this model" in out
    assert "\x1b[" not in out and all(line == line.rstrip() for line in out.splitlines())


def test_fused_experts_are_pointed_out(tmp_path: Path, inspect_json) -> None:
    directory = torchao(tmp_path / "m")
    extra = {
        "model.layers.0.mlp.experts.gate_up_proj": ("BF16", (4, 64, 64)),
        "model.norm.weight": ("BF16", (64,)),
    }
    index = {}
    for name, tensors in (
        ("model-00001-of-00002.safetensors", None),
        ("model-00002-of-00002.safetensors", extra),
    ):
        if tensors is None:
            (directory / "model.safetensors").rename(directory / name)
            from loadstone.artifact.formats.safetensors import read_header

            index |= dict.fromkeys(read_header(directory / name).tensors, name)
        else:
            write_safetensors(directory / name, tensors, {"format": "pt"})
            index |= dict.fromkeys(tensors, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    _, found = inspect_json(directory)
    notes = {g["pattern"]: g["note"] for g in found["unquantized"]}
    assert notes["model.layers.*.mlp.experts.gate_up_proj"] == "fused experts, left unquantized"


def test_every_problem_is_listed_and_what_is_known_is_shown(tmp_path: Path, inspect, inspect_json) -> None:
    directory = torchao(tmp_path / "m", shards=2)
    edit_json(
        directory / "model.safetensors.index.json", lambda i: i["weight_map"].update(ghost="gone.safetensors")
    )
    second = directory / "model-00002-of-00002.safetensors"
    with second.open("r+b") as file:
        file.truncate(second.stat().st_size - 1)
    first = directory / "model-00001-of-00002.safetensors"
    edit_header(
        first, lambda h: h["__metadata__"].update({"model.layers.0.mlp.up_proj.weight": json.dumps(INTX)})
    )
    code, found = inspect_json(directory)
    assert code == 3 and found["loadable"] is False and found["plan"] is None
    messages = "\n".join(p["message"] for p in found["problems"])
    assert "'gone.safetensors', which is not there" in messages and f"{second.name}: truncated" in messages
    assert all(p["exit_code"] == 3 and p["remedy"] for p in found["problems"])
    assert found["parameters"] > 0 and found["kind"] == "torchao"
    code, out, err = inspect(directory)
    assert code == 3 and out.count("problem: ") == len(found["problems"]) and err == ""
    assert f"Cannot be loaded: {len(found['problems'])} problems" in out


def test_what_is_no_model_still_gives_json(tmp_path: Path, inspect_json) -> None:
    code, found = inspect_json(tmp_path)
    assert code == 3 and list(found) == KEYS and found["kind"] == "unknown"
    assert "it has no config.json" in found["problems"][0]["message"]


@pytest.mark.parametrize("make", [dense, torchao])
def test_an_index_whose_shards_are_all_absent(tmp_path: Path, make, inspect_json) -> None:
    directory = make(tmp_path / "m", shards=2)
    for shard in directory.glob("model-*.safetensors"):
        shard.unlink()
    code, found = inspect_json(directory)
    assert code == 3 and sum("which is not there" in p["message"] for p in found["problems"]) == 2


def test_usage_errors(tmp_path: Path, inspect) -> None:
    code, out, err = inspect(tmp_path / "absent", "--json")
    assert code == 2 and out == "" and "there is no directory" in err


def test_an_untied_model_without_a_head_is_a_problem(tmp_path: Path, inspect_json) -> None:
    code, found = inspect_json(dense(tmp_path / "m", config=CONFIG | {"tie_word_embeddings": False}))
    assert code == 3 and "no output head is stored" in found["problems"][0]["message"]


def test_remote_code_is_refused_as_the_plan_refuses_it(tmp_path: Path, inspect_json) -> None:
    code, found = inspect_json(
        dense(tmp_path / "m", config=CONFIG | {"auto_map": {"AutoModel": "m.M"}, "architectures": ["M"]})
    )
    assert code == 3 and "auto_map" in found["problems"][0]["message"]


def test_sidecars(tmp_path: Path, inspect_json) -> None:
    directory = dense(tmp_path / "m")
    (directory / "tokenizer.model").write_bytes(b"x")
    (directory / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    (directory / "preprocessor_config.json").write_text("{}")
    _, found = inspect_json(directory)
    assert found["sidecars"] == {
        "tokenizer": "tokenizer.model",
        "tokenizer_config": "tokenizer_config.json",
        "chat_template": "tokenizer_config.json",
        "generation_config": None,
        "processor": "preprocessor_config.json",
    }
    assert found["notes"] == []


def test_total_size_that_is_wrong_is_a_note(tmp_path: Path, inspect_json) -> None:
    directory = dense(tmp_path / "m", shards=2)
    edit_json(directory / "model.safetensors.index.json", lambda i: i["metadata"].update(total_size=7))
    code, found = inspect_json(directory)
    assert code == 0 and any("total_size says 7 bytes" in note for note in found["notes"])


def test_training_run(tmp_path: Path, inspect_json) -> None:
    for step in (1, 2):
        dense(tmp_path / "run" / f"checkpoint-{step}")
    _, found = inspect_json(tmp_path / "run")
    assert found["path"].endswith("checkpoint-2") and found["root"].endswith("run")
    _, found = inspect_json(tmp_path / "run", "--checkpoint", "1")
    assert found["path"].endswith("checkpoint-1")


def test_verify(tmp_path: Path, inspect, inspect_json) -> None:
    directory = dense(tmp_path / "m")
    code, found = inspect_json(directory, "--verify")
    assert code == 3 and found["verified"] is False and "no loadstone.json" in found["problems"][0]["message"]
    files = {p.name: sha256_file(p) for p in directory.iterdir()}
    manifest = {"format_version": 1, "recipe": None, "files": files, "versions": {"loadstone": "0.1.0"}}
    (directory / MANIFEST).write_text(json.dumps(manifest))
    code, found = inspect_json(directory, "--verify")
    assert code == 0 and found["verified"] is True and found["manifest"]["versions"] == {"loadstone": "0.1.0"}
    with (directory / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\1")
    code, out, _ = inspect(directory, "--verify")
    assert code == 3 and "model.safetensors: content differs from the sha256" in out
    assert inspect(directory)[0] == 0


def test_names_cannot_write_to_the_terminal(tmp_path: Path, inspect) -> None:
    config = CONFIG | {
        "architectures": ["\x1b[2J[bold]Evil[/]"],
        "quantization_config": {"quant_method": "[red]x"},
    }
    _, out, _ = inspect(dense(tmp_path / "m", config=config))
    assert "\x1b" not in out and "[bold]Evil[/]" in out and "[red]x" in out


def test_a_model_of_tables_misses_no_tokenizer(inspect) -> None:
    _, out, _ = inspect("builtin:tiny-pfn")
    assert "would load  in-context" in out and "tokenizer" not in out


def test_a_flood_of_problems_is_counted(tmp_path: Path, inspect_json) -> None:
    directory = dense(tmp_path / "m")
    broken = {f"t{n}": {"dtype": "U8", "shape": [1], "data_offsets": [0, 0]} for n in range(300)}
    edit_header(directory / "model.safetensors", lambda h: h.update(broken))
    code, found = inspect_json(directory)
    assert code == 3 and len(found["problems"]) == 201
    assert found["problems"][-1]["message"] == "and 100 more problems"
