"""Sources that finalize and export refuse before anything is published, and models that are no plain Llama."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.small_models import make_tokenizer

import loadstone
from loadstone.artifact.manifest import verify_files
from loadstone.errors import ArtifactError
from loadstone.loading.streamed import streamed

W8 = "int8-weight-only"
UP = "model.layers.0.mlp.up_proj.weight"
SMALL = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip

Tensors = dict[str, torch.Tensor]


def _without(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(name)


def _extra_layer(tensors: Tensors) -> None:
    tensors |= {k.replace("layers.1", "layers.2"): v.clone() for k, v in tensors.items() if "layers.1" in k}


def _zero3(tensors: Tensors) -> None:
    tensors |= {k: torch.empty(0, dtype=v.dtype) for k, v in tensors.items() if "layers" in k}


def _filled(name: str, value: float) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors[name][-1, :1].fill_(value)


def _edited(source: Path, to: Path, edit: Callable[[Tensors], Any], **config: object) -> Path:
    to.mkdir()
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    found = json.loads((source / "config.json").read_text()) | config
    (to / "config.json").write_text(json.dumps(found))
    return to


@pytest.mark.parametrize("recipe", [None, W8])
@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (_without(UP), f"{UP}' is missing"),
        (_extra_layer, "layers.2.* is not part of this model"),
        (_zero3, r"has shape \[0\], config.json asks for"),
        (_filled("model.embed_tokens.weight", float("nan")), "embed_tokens.weight' holds NaN"),
        (_filled(UP, float("inf")), f"{UP}' holds NaN or infinity"),
    ],
    ids=["missing", "extra", "zero3", "nan", "inf"],
)
def test_a_source_that_is_not_sound(
    make_model: Callable[..., Path],
    tmp_path: Path,
    edit: Callable[[Tensors], Any],
    says: str,
    recipe: str | None,
) -> None:
    source = _edited(make_model("llama-untied"), tmp_path / "source", edit)
    with pytest.raises(ArtifactError, match=says):
        loadstone.finalize(source, tmp_path / "out", recipe=recipe)
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == ["source"]


def _head_of_trl(tensors: Tensors) -> None:
    tensors["v_head.summary.weight"] = torch.rand(1, 64)


def _more_tokens(tensors: Tensors) -> None:
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name]] * 2)


@pytest.mark.parametrize(
    ("edit", "config", "generation", "says"),
    [
        (_head_of_trl, {}, None, "Remove TRL's value head"),
        (_more_tokens, {}, None, "with added tokens, set vocab_size to"),
        (dict, {"quantization_config": {"quant_method": "bitsandbytes"}}, None, "remove quantization_config"),
        (dict, {}, {"max_new_tokens": "x"}, r"generation_config\.json: transformers refuses it"),
    ],
    ids=["value head", "tokens", "merged", "generation"],
)
def test_advice(
    edit: Callable[[Tensors], Any],
    config: dict[str, Any],
    generation: dict[str, Any] | None,
    says: str,
    make_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    source = _edited(make_model("llama-untied"), tmp_path / "source", edit, **config)
    if generation is not None:
        (source / "generation_config.json").write_text(json.dumps(generation))
    with pytest.raises(ArtifactError, match=says):
        loadstone.finalize(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("half", ["mlp", "proj"])
def test_weights_of_another_dtype_than_the_model(
    half: str, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    """What is quantized in a dtype that nothing else has could not be loaded: those weights stay plain."""

    def cast(tensors: Tensors) -> None:
        tensors |= {k: v.bfloat16() if half in k else v.float() for k, v in tensors.items()}

    source = _edited(make_model("llama-untied"), tmp_path / "source", cast, dtype="float32")
    if half == "proj":
        with pytest.raises(ArtifactError, match=r"stored in BF16, unlike the rest(?s:.)*Pass --dtype"):
            loadstone.finalize(source, tmp_path / "out", recipe=W8)
        out = loadstone.finalize(source, tmp_path / "out", recipe=W8, dtype="float32").out
    else:
        done = loadstone.finalize(source, tmp_path / "out", recipe=W8)
        assert "stored in BF16 beside F32" in done.plan.unquantized
        out = done.out
    ids = torch.arange(3, 20)[None]
    with torch.inference_mode():
        stock = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
        assert torch.equal(stock(ids).logits, loadstone.load(out)(ids).logits)


def test_float64_is_not_quantized(make_model: Callable[..., Path], tmp_path: Path) -> None:
    def cast(tensors: Tensors) -> None:
        tensors |= {k: v.double() for k, v in tensors.items()}

    source = _edited(make_model("llama-untied"), tmp_path / "source", cast)
    with pytest.raises(ArtifactError, match=r"stored in F64, which torchao(?s:.)*Pass --dtype"):
        loadstone.finalize(source, tmp_path / "out", recipe=W8)


def test_an_export_of_a_source_that_misses_a_tensor(make_model: Callable[..., Path], tmp_path: Path) -> None:
    source = _edited(make_model("llama-untied"), tmp_path / "source", _without(UP))
    with pytest.raises(ArtifactError, match="is missing"):
        loadstone.export_fakequant(source, tmp_path / "out", format="fp8")


@pytest.mark.parametrize("recipe", [None, W8])
def test_values_beyond_float16(make_model: Callable[..., Path], tmp_path: Path, recipe: str | None) -> None:
    source = _edited(make_model("llama-untied"), tmp_path / "source", _filled(UP, 1e5))
    with pytest.raises(ArtifactError, match="up_proj"):
        loadstone.finalize(source, tmp_path / "out", recipe=recipe, dtype="float16")
    loadstone.finalize(source, tmp_path / "right", recipe=recipe)


def test_a_state_dict_inside_another(make_model: Callable[..., Path], tmp_path: Path) -> None:
    source = make_model("llama-untied")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text((source / "config.json").read_text())
    torch.save({"model": load_file(source / "model.safetensors")}, tmp_path / "source" / "pytorch_model.bin")
    with pytest.raises(ArtifactError):
        loadstone.finalize(tmp_path / "source", tmp_path / "out")


def test_keys_that_transformers_ignores(make_model: Callable[..., Path], tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(8)

    source = _edited(make_model("llama-untied"), tmp_path / "source", add)
    loadstone.finalize(source, tmp_path / "out", recipe=W8)
    loadstone.export_fakequant(source, tmp_path / "fq", format="fp8")
    assert loadstone.load(tmp_path / "out") and loadstone.load(tmp_path / "fq")
    with streamed(loadstone.plan(source), torch.device("cpu")) as model:
        assert model.layer(0)


def test_masks_that_old_checkpoints_hold(tmp_path: Path) -> None:
    config = transformers.GPTNeoConfig(
        vocab_size=400, hidden_size=32, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    source = _saved(transformers.GPTNeoForCausalLM(config), tmp_path / "source")
    clean = loadstone.load(source)(torch.arange(3, 20)[None]).logits

    def add(tensors: Tensors) -> None:
        for layer in range(2):
            attention = f"transformer.h.{layer}.attn.attention"
            tensors[f"{attention}.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
            tensors[f"{attention}.masked_bias"] = torch.tensor(-1e9)

    old = _edited(source, tmp_path / "old", add)
    make_tokenizer().save_pretrained(old)
    assert torch.equal(loadstone.load(old)(torch.arange(3, 20)[None]).logits, clean)
    text = ["One two three, four five six. " * 200]
    for number, options in enumerate(
        (
            {"dtype": "float16"},
            {"recipe": W8, "verify": True},
            {"recipe": "intx4-weight-only", "calibrate": text, "calibrate_tokens": 256},
        )
    ):
        out = loadstone.finalize(old, tmp_path / str(number), **options).out
        assert loadstone.load(out) and not [
            name for name in loadstone.detect(out).tensors if "masked" in name
        ]
    loadstone.export_fakequant(old, tmp_path / "fq", format="fp8")
    assert loadstone.load(tmp_path / "fq")
    losses = [
        loadstone.evaluate(old, limit=1, context_length=32, stream=stream).records[0]["loss"]
        for stream in (True, False)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    # A parameter of a layer is still one.
    wrong = _edited(
        source, tmp_path / "wrong", lambda t: t.update({"transformer.h.0.attn.bias": torch.ones(32)})
    )
    with pytest.raises(ArtifactError, match=r"'transformer\.h\.0\.attn\.bias' is not part of this model"):
        loadstone.finalize(wrong, tmp_path / "out")


def _saved(model: Any, directory: Path) -> Path:
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory


def _quantized(directory: Path) -> set[str]:
    return {name.removesuffix(".weight") for name in loadstone.detect(directory).quantized}


def test_a_name_without_a_dot(tmp_path: Path) -> None:
    config = transformers.BartConfig(
        vocab_size=256, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, max_position_embeddings=64,
    )  # fmt: skip
    source = _saved(transformers.BartForConditionalGeneration(config), tmp_path / "source")
    loadstone.finalize(source, tmp_path / "out", recipe=W8)
    assert "model.final_logits_bias" in loadstone.detect(tmp_path / "out").tensors
    stock = transformers.BartForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    ours = loadstone.load(tmp_path / "out")
    ids = torch.arange(3, 20)[None]
    with torch.inference_mode():
        assert torch.equal(stock(input_ids=ids).logits, ours(input_ids=ids).logits)


@pytest.mark.parametrize("recipe", [None, W8])
def test_a_model_without_input_embeddings(tmp_path: Path, recipe: str | None) -> None:
    part = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.CLIPConfig(
        text_config={**part, "vocab_size": 256, "max_position_embeddings": 32},
        vision_config={**part, "image_size": 32, "patch_size": 8}, projection_dim=64,
    )  # fmt: skip
    source = _saved(transformers.CLIPModel(config), tmp_path / "source")
    loadstone.finalize(source, tmp_path / "out", recipe=recipe)
    assert type(loadstone.load(tmp_path / "out")).__name__ == "CLIPModel"


def test_weights_that_a_model_reads_itself_stay_plain(tmp_path: Path) -> None:
    config = transformers.MambaConfig(
        vocab_size=256, hidden_size=64, state_size=16, num_hidden_layers=2, expand=2, time_step_rank=32
    )
    source = _saved(transformers.MambaForCausalLM(config), tmp_path / "source")
    plan = loadstone.plan_finalize(source, recipe=W8)
    reasons = {step.name: step.reason for step in plan.steps if "dt_proj.weight" in step.name}
    assert len(reasons) == 2 and all("reads it itself" in reason for reason in reasons.values())
    loadstone.finalize(source, tmp_path / "out", recipe=W8)
    with torch.inference_mode():
        loadstone.load(tmp_path / "out")(input_ids=torch.arange(3, 20)[None])


def test_task_heads_and_vision_towers_stay_plain(tmp_path: Path) -> None:
    classifier = transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, num_labels=64))
    loadstone.finalize(_saved(classifier, tmp_path / "bert"), tmp_path / "bert-w8", recipe=W8)
    assert "classifier" not in _quantized(tmp_path / "bert-w8")
    assert "bert.encoder.layer.0.output.dense" in _quantized(tmp_path / "bert-w8")
    text = {**SMALL, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 32}
    vision = {**SMALL, "image_size": 32, "patch_size": 8}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=5, boi_token_index=6,
        eoi_token_index=7,
    )  # fmt: skip
    source = _saved(transformers.Gemma3ForConditionalGeneration(config), tmp_path / "gemma3")
    loadstone.finalize(source, tmp_path / "gemma3-w8", recipe=W8)
    quantized = _quantized(tmp_path / "gemma3-w8")
    assert quantized and not any("vision" in name for name in quantized)
    rules = tmp_path / "rules.yaml"
    rules.write_text(f"default: {W8}\nrules:\n  - modules: vision_tower\n    scheme: {W8}\n")
    loadstone.finalize(source, tmp_path / "gemma3-all", recipe=rules)
    assert any("vision" in name for name in _quantized(tmp_path / "gemma3-all"))


def test_a_quantized_model_carries_what_stock_loading_sets(
    make_model: Callable[..., Path], quantize_to: Callable[..., Path]
) -> None:
    directory = quantize_to(make_model("llama-untied"), W8)
    ours, stock = loadstone.load(directory), transformers.AutoModelForCausalLM.from_pretrained(directory)
    assert set(vars(ours)) == set(vars(stock))
    for name in ("is_quantized", "quantization_method"):
        assert getattr(ours, name) == getattr(stock, name)
    assert ours.config._is_quantized and ours.model.config._is_quantized


def test_code_beside_a_class_that_transformers_has(make_model: Callable[..., Path], tmp_path: Path) -> None:
    code = {"AutoModelForCausalLM": "modeling_x.LlamaForCausalLM"}
    source = _edited(make_model("llama-untied"), tmp_path / "source", lambda tensors: None, auto_map=code)
    loadstone.finalize(source, tmp_path / "out", recipe=W8)
    assert loadstone.load(tmp_path / "out")


EXPERTS = "model.layers.0.block_sparse_moe.experts"


def _mixtral(directory: Path) -> Path:
    config = transformers.MixtralConfig(
        **SMALL, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False
    )
    return _saved(transformers.MixtralForCausalLM(config), directory)


def _rows_moved(tensors: Tensors) -> None:
    """Gate and up of one expert with rows moved from one to the other: as many values in all as before."""
    gate, up = tensors[f"{EXPERTS}.0.w1.weight"], tensors[f"{EXPERTS}.0.w3.weight"]
    tensors[f"{EXPERTS}.0.w1.weight"] = torch.cat([gate, up[:8]])
    tensors[f"{EXPERTS}.0.w3.weight"] = up[8:].clone()


def _transposed(*names: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update(
        {n: t.T.contiguous() for n, t in tensors.items() if n.endswith(names)}
    )


@pytest.mark.parametrize("layout", ["torchao", "compressed-tensors"])
@pytest.mark.parametrize(
    "edit",
    [
        _rows_moved,
        _transposed("experts.1.w1.weight"),
        _transposed("w1.weight", "w3.weight"),
        _without(f"{EXPERTS}.2.w3.weight"),
    ],
    ids=["rows moved", "one transposed", "all transposed", "missing"],
)
def test_experts_that_do_not_merge(tmp_path: Path, edit: Callable[[Tensors], Any], layout: str) -> None:
    source = _edited(_mixtral(tmp_path / "model"), tmp_path / "source", edit)
    says = "tensors that it is merged with"
    with pytest.raises(ArtifactError, match=says):
        loadstone.finalize(source, tmp_path / "out", recipe=W8, layout=layout)
    with pytest.raises(ArtifactError, match=says):
        loadstone.finalize(source, tmp_path / "out")
    with pytest.raises(ArtifactError, match=says):
        loadstone.export_fakequant(source, tmp_path / "out", format="fp8")
    left = {path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")}
    assert left == {"model", "source"}


@pytest.mark.parametrize("format", ["safetensors", "bin"])
@pytest.mark.parametrize("quantized", ["no weight", "layers", "head"])
def test_a_tied_head_that_is_stored_with_other_values(
    make_model: Callable[..., Path], tmp_path: Path, format: str, quantized: str
) -> None:
    """Stock transformers keeps the head as stored, and so must the artifact."""

    def other_head(tensors: Tensors) -> None:
        generator = torch.Generator().manual_seed(0)
        table = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = torch.randn(table.shape, generator=generator).to(table.dtype)

    source = _edited(make_model("llama-untied"), tmp_path / "source", other_head, tie_word_embeddings=True)
    head = load_file(source / "model.safetensors")["lm_head.weight"]
    if format == "bin":
        torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
        (source / "model.safetensors").unlink()
    rules = tmp_path / "head.yaml"
    rules.write_text(f"default: skip\nlm_head: {W8}\n")
    loadstone.finalize(
        source, tmp_path / "out", recipe={"no weight": None, "layers": W8, "head": rules}[quantized]
    )
    for model in (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
        loadstone.load(tmp_path / "out"),
    ):
        found = model.lm_head.weight
        if quantized == "head":
            assert torch.allclose(found.dequantize(), head, atol=0.05)
        else:
            assert torch.equal(found, head)


def test_a_bin_with_two_equal_copies_of_a_tied_tensor_stores_one(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    tensors = load_file(make_model("llama-untied") / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    torch.save(tensors, source / "pytorch_model.bin")
    config = json.loads((make_model("llama-untied") / "config.json").read_text()) | {
        "tie_word_embeddings": True
    }
    (source / "config.json").write_text(json.dumps(config))
    loadstone.finalize(source, tmp_path / "out")
    assert "lm_head.weight" not in loadstone.detect(tmp_path / "out").tensors


@pytest.mark.parametrize("command", ["finalize", "export"])
def test_files_with_the_names_of_the_working_directory(
    make_model: Callable[..., Path], tmp_path: Path, command: str
) -> None:
    """A source's own files are never taken for the notes of a run, also when the run is killed and resumed."""
    source = tmp_path / "source"
    shutil.copytree(make_model("llama-tied"), source)
    names = [
        "key.json", "journal", "output/key.json", "partial", "lock", "writing", "replaced", "calibrated",
        "tables/journal/model.safetensors.json", "tables/output/deep/key.json",
    ]  # fmt: skip
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)

    def write(on_progress: Any = None) -> Any:
        if command == "export":
            return loadstone.export_fakequant(source, tmp_path / "out", format="fp8", on_progress=on_progress)
        small = {"recipe": W8, "max_shard_size": 30_000}
        return loadstone.finalize(source, tmp_path / "out", **small, on_progress=on_progress)

    def stop(stage: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(stop)
    done = write()
    assert set(names) <= done.files.keys() and verify_files(tmp_path / "out") == []
    assert {name: (tmp_path / "out" / name).read_text() for name in names} == {name: name for name in names}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]
