"""The kind of every directory, told right or refused with a reason."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from builders import CONFIG, INTX, TORCHAO_BLOCK, dense, edit_header, edit_json, torchao, write_safetensors

from loadstone import detect
from loadstone.artifact.detect import Artifact, examine
from loadstone.artifact.hashing import sha256_file
from loadstone.artifact.manifest import MANIFEST, read_manifest, verify_files
from loadstone.errors import ArtifactError, UsageError

UP = "model.layers.0.mlp.up_proj"


def config(**changes: object) -> dict:
    return copy.deepcopy(CONFIG) | changes


def test_dense(tmp_path: Path) -> None:
    artifact = detect(dense(tmp_path / "m"))
    assert (artifact.kind, artifact.is_torchao, artifact.quant_method) == ("dense", False, None)
    assert artifact.evidence == ("model.safetensors holds plain tensors",)
    assert len(artifact.tensors) == 5


@pytest.mark.parametrize("shards", [1, 2])
def test_torchao(tmp_path: Path, shards: int) -> None:
    artifact = detect(torchao(tmp_path / "m", shards))
    assert artifact.kind == "torchao" and artifact.is_torchao and artifact.quant_method == "torchao"
    assert set(artifact.quantized) == {f"model.layers.{n}.mlp.up_proj.weight" for n in (0, 1)}
    assert artifact.quantization_config == TORCHAO_BLOCK


@pytest.mark.parametrize("block", ["absent", "null"])
def test_torchao_without_its_block(tmp_path: Path, block: str) -> None:
    given = config() if block == "absent" else config(quantization_config=None)
    artifact = detect(torchao(tmp_path / "m", config=given))
    assert artifact.kind == "torchao-unmarked" and artifact.is_torchao
    assert artifact.evidence == ("safetensors metadata describes 2 tensors of IntxUnpackedToInt8Tensor",)


def test_a_block_within_the_language_model_counts(tmp_path: Path) -> None:
    nested = {"model_type": "llava", "text_config": config(quantization_config=TORCHAO_BLOCK)}
    artifact = detect(torchao(tmp_path / "m", config=nested))
    assert artifact.kind == "torchao" and artifact.quantization_config == TORCHAO_BLOCK
    with pytest.raises(ArtifactError, match="holds no quantized tensor"):
        detect(dense(tmp_path / "d", config=nested))


def test_the_config_may_name_the_weights(tmp_path: Path) -> None:
    directory = dense(tmp_path / "m", config=config(transformers_weights="other.safetensors"))
    with pytest.raises(ArtifactError, match=r"names the weights 'other\.safetensors', which are not there"):
        detect(directory)
    write_safetensors(directory / "other.safetensors", {"w": ("BF16", (2, 2))}, {"format": "pt"})
    artifact = detect(directory)
    assert artifact.weights.files == ("other.safetensors",)
    assert set(artifact.tensors) == {"w"}
    for bad in ("../m/other.safetensors", "pytorch_model.bin", 7, "/etc/passwd.safetensors"):
        edit_json(directory / "config.json", lambda c, bad=bad: c.update(transformers_weights=bad))
        with pytest.raises(ArtifactError, match=r"leaves the directory|not a safetensors file"):
            detect(directory)
    sharded = dense(tmp_path / "s", shards=2, config=config(transformers_weights="w.safetensors.index.json"))
    (sharded / "model.safetensors.index.json").rename(sharded / "w.safetensors.index.json")
    assert len(detect(sharded).weights.files) == 2


def test_a_null_block_is_no_block(tmp_path: Path) -> None:
    assert detect(dense(tmp_path / "m", config=config(quantization_config=None))).kind == "dense"


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "mxfp4"])
def test_a_block_without_its_weights(tmp_path: Path, method: str) -> None:
    block = {"quant_method": method, "bits": 4}
    with pytest.raises(ArtifactError, match=f"says {method}, and no tensor is quantized"):
        detect(dense(tmp_path / "m", config=config(quantization_config=block)))


@pytest.mark.parametrize("method", ["aqlm", "never-heard-of"])
def test_other_quantizers(tmp_path: Path, method: str) -> None:
    artifact = detect(dense(tmp_path / "m", config=config(quantization_config={"quant_method": method})))
    assert (artifact.kind, artifact.quant_method) == ("other-quantizer", method)


def test_qat_and_fakequant(tmp_path: Path) -> None:
    assert detect(dense(tmp_path / "q", config=config(loadstone_qat={"recipe": "int4"}))).kind == "qat"
    directory = dense(tmp_path / "f")
    (directory / "fakequant_manifest.json").write_text("{}")
    assert detect(directory).kind == "fakequant"


def other_block(block: object) -> dict:
    return config(quantization_config=block)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: dense(p, config=other_block("int8")), "has no quant_method"),
        (lambda p: dense(p, config=other_block({})), "has no quant_method"),
        (lambda p: dense(p, config=other_block({"quant_method": "x\ny"})), "has no quant_method"),
        (lambda p: dense(p, config=other_block(TORCHAO_BLOCK)), "holds no quantized tensor"),
        (
            lambda p: torchao(p, config=other_block({"quant_method": "gptq"})),
            "says gptq, and 'model.layers.0",
        ),
        (lambda p: dense(p, config={"dtype": "bfloat16"}), "has no model_type"),
        (lambda p: dense(p, config={"model_type": 7}), "has no model_type"),
        (lambda p: dense(p, config={}), "has no model_type"),
    ],
)
def test_configs_that_do_not_fit(tmp_path: Path, make, words: str) -> None:
    with pytest.raises(ArtifactError, match=words):
        detect(make(tmp_path / "m"))


@pytest.mark.parametrize(
    ("extra", "owner"),
    [
        ({f"{UP}.qweight": ("I32", (8, 64))}, "gptq or awq"),
        ({f"{UP}.weight_packed": ("I32", (64, 8))}, "compressed-tensors"),
        ({f"{UP}.weight_scale": ("BF16", (64, 1))}, "compressed-tensors or fp8"),
        ({f"{UP}.weight.absmax": ("U8", (64,))}, "bitsandbytes"),
        ({f"{UP}.extra.weight": ("I8", (64, 64))}, "an unknown quantizer"),
        ({f"{UP}.extra.weight": ("F8_E4M3", (64, 64))}, "an unknown quantizer"),
    ],
)
def test_tensors_of_other_quantizers_without_their_block(tmp_path: Path, extra: dict, owner: str) -> None:
    directory = dense(tmp_path / "m")
    write_safetensors(directory / "model.safetensors", {"model.norm.weight": ("BF16", (64,))} | extra)
    with pytest.raises(
        ArtifactError, match=f"was written by {owner}, and config.json has no quantization_config"
    ):
        detect(directory)


def set_dtype(name: str, dtype: str):
    def change(header: dict) -> None:
        description = json.loads(header["__metadata__"][name])
        description["_data"]["dtype"]["_data"] = dtype
        header["__metadata__"][name] = json.dumps(description)

    return change


def test_one_tensor_of_another_dtype_is_refused(tmp_path: Path) -> None:
    directory = torchao(tmp_path / "m")
    edit_header(directory / "model.safetensors", set_dtype(f"{UP}.weight", "float16"))
    with pytest.raises(
        ArtifactError, match=r"'model.layers.\d.mlp.up_proj.weight' dequantizes to (b?float16), the others"
    ):
        detect(directory)


def test_all_tensors_of_a_dtype_the_model_does_not_use_are_refused(tmp_path: Path) -> None:
    directory = torchao(tmp_path / "m")
    for number in (0, 1):
        edit_header(
            directory / "model.safetensors", set_dtype(f"model.layers.{number}.mlp.up_proj.weight", "float16")
        )
    with pytest.raises(ArtifactError, match="dequantize to float16, the model computes in bfloat16"):
        detect(directory)


def test_wrong_paths(tmp_path: Path) -> None:
    dense(tmp_path / "tiny-w4")
    with pytest.raises(UsageError, match=r"no directory.*Did you mean '.*tiny-w4'"):
        detect(tmp_path / "tiny-w5")
    with pytest.raises(UsageError, match="is a file"):
        detect(tmp_path / "tiny-w4" / "config.json")
    with pytest.raises(UsageError, match="hf download"):
        detect("meta-llama/Llama-3")
    for odd in ("x\0y", "n" * 5000, "\ud800"):
        with pytest.raises(UsageError):
            detect(odd)
    with pytest.raises(ArtifactError, match=r"Did you mean '.*tiny-w4'"):
        detect(tmp_path)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "only LORA"),
        (["model.gguf"], "GGUF"),
        (["pytorch_model_fsdp_rank0.bin"], "FSDP shards of single ranks"),
        (["global_step9/mp_rank_00_model_states.pt"], "DeepSpeed"),
        (["model_index.json"], "diffusers"),
    ],
)
def test_what_is_no_model_is_told_what_it_is(tmp_path: Path, files: list[str], words: str) -> None:
    for with_config in (False, True):
        for name in files:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(b"{}")
        if with_config:
            (tmp_path / "config.json").write_text(json.dumps(CONFIG))
        with pytest.raises(ArtifactError) as caught:
            detect(tmp_path)
        assert words in str(caught.value)


def test_a_context_is_named(tmp_path: Path) -> None:
    (tmp_path / "context.json").write_text("{}")
    with pytest.raises(ArtifactError, match="fitted context"):
        detect(tmp_path)


def test_vision_configs_and_remote_code(tmp_path: Path) -> None:
    vision = {"model_type": "siglip_vision_model", "hidden_size": 8}
    assert detect(dense(tmp_path / "v", config=vision)).kind == "dense"
    artifact = detect(dense(tmp_path / "r", config=config(auto_map={"AutoModel": "modeling.Evil"})))
    assert artifact.needs_remote_code


def test_examine_goes_on_past_every_problem(tmp_path: Path) -> None:
    directory = torchao(tmp_path / "m", shards=2)
    (directory / "config.json").unlink()
    edit_json(
        directory / "model.safetensors.index.json", lambda i: i["weight_map"].update(ghost="gone.safetensors")
    )
    edit_header(
        directory / "model-00001-of-00002.safetensors",
        lambda h: h["__metadata__"].update({f"{UP}.weight": json.dumps(INTX | {"_type": "Odd"})}),
    )
    problems: list[ArtifactError] = []
    artifact = examine(directory, sink=problems.append)
    text = "\n".join(p.message for p in problems)
    assert all(words in text for words in ("no config.json", "gone.safetensors", "differs between shards"))
    assert isinstance(artifact, Artifact) and len(artifact.quantized) >= 1


def manifest_of(directory: Path) -> None:
    files = {p.name: sha256_file(p) for p in directory.iterdir() if p.name != MANIFEST}
    (directory / MANIFEST).write_text(json.dumps({"format_version": 1, "files": files}))


def test_manifest(tmp_path: Path) -> None:
    directory = dense(tmp_path / "m")
    assert read_manifest(directory) is None
    with pytest.raises(ArtifactError, match=r"no loadstone\.json to verify"):
        verify_files(directory)
    manifest_of(directory)
    assert verify_files(directory) == []
    edit_json(directory / "config.json", lambda c: c.update(vocab_size=33))
    (directory / "model.safetensors").unlink()
    assert sorted(verify_files(directory)) == [
        "config.json: content differs from the sha256 in loadstone.json",
        "model.safetensors: missing",
    ]
    manifest_of(directory)
    (directory / "pytorch_model.bin").write_bytes(b"foreign")
    assert verify_files(directory) == [
        "pytorch_model.bin: not listed in loadstone.json, and a load would read it"
    ]
    (directory / MANIFEST).write_text('{"files": {}}')
    assert verify_files(directory)[0] == "loadstone.json lists no files: nothing can be verified"
    (directory / MANIFEST).write_text(json.dumps({"files": {"../../etc/passwd": "0"}}))
    assert "leaves the directory" in verify_files(directory)[0]
    (directory / MANIFEST).write_text("[]")
    with pytest.raises(ArtifactError, match=r"loadstone\.json: not a valid JSON object"):
        read_manifest(directory)


def test_fingerprints_follow_content(tmp_path: Path) -> None:
    one, two = detect(dense(tmp_path / "one")), detect(dense(tmp_path / "two"))
    assert one.fingerprint() == two.fingerprint()
    with (tmp_path / "two" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\1")
    assert one.fingerprint() != detect(tmp_path / "two").fingerprint()
