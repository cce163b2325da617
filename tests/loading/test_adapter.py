"""LoRA adapters merged into their base as it streams in, held to peft's formulas in plain torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import packed
from tests.helpers import run, stock
from tests.small_models import make_model

import loadstone
from loadstone.artifact.builtin import builtin_path
from loadstone.errors import ArtifactError, UsageError

PREFIX = "base_model.model."
Q, EMBED, HEAD = "model.layers.0.self_attn.q_proj", "model.embed_tokens", "lm_head"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tied model in bfloat16, with a tokenizer."""
    return Path(shutil.copytree(builtin_path("builtin:tiny-llama"), tmp_path / "base"))


def saved(path: Path, **options: Any) -> Path:
    make_model(**options).save_pretrained(path)
    return path


def adapter(folder: Path, base: Path, tensors: Tensors, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "base_model_name_or_path": str(base)} | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {PREFIX + k: v.clone().contiguous() for k, v in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return folder


def stored(base: Path) -> Tensors:
    return {k: v for file in base.glob("*.safetensors") for k, v in load_file(file).items()}


def pair(weight: torch.Tensor, rank: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(rank)
    return torch.randn(rank, weight.shape[1]) / 9, torch.randn(weight.shape[0], rank) / 9


def factors(module: str, a: torch.Tensor, b: torch.Tensor) -> Tensors:
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


def table_factors(module: str, weight: torch.Tensor) -> Tensors:
    b, a = (t.t() for t in pair(weight))
    return {f"{module}.lora_embedding_A": a, f"{module}.lora_embedding_B": b}


@pytest.mark.parametrize(
    ("rank", "changes", "scale"),
    [
        (4, {}, 6 / 4),
        (4, {"use_rslora": True}, 6 / 2),
        (4, {"alpha_pattern": {"q_proj": 3}}, 3 / 4),
        (2, {"rank_pattern": {r"layers\.0\.self_attn\.q_proj": 2}}, 6 / 2),
        # peft sets it by the last layer that it wraps: this one is a Linear.
        (4, {"fan_in_fan_out": True}, 6 / 4),
    ],
)
def test_scales(base: Path, tmp_path: Path, rank: int, changes: dict[str, Any], scale: float) -> None:
    weights = stored(base)
    weight = weights[f"{Q}.weight"]
    a, b = pair(weight, rank)
    expected = weight.clone().add_((b @ a) * scale)
    folder = adapter(tmp_path / "adapter", base, factors(Q, a, b), **changes)
    found = loadstone.load(folder).state_dict()
    assert not torch.equal(expected, weight) and torch.equal(found[f"{Q}.weight"], expected)
    assert all(torch.equal(found[k], v) for k, v in weights.items() if k != f"{Q}.weight")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dora_bias_and_rows(tmp_path: Path, dtype: str) -> None:
    base = tmp_path / "base"
    make_model(family="gpt2").to(getattr(torch, dtype)).save_pretrained(base)
    weights, module, table = stored(base), "transformer.h.0.attn.c_attn", "transformer.wte"
    weight, bias = weights[f"{module}.weight"], weights[f"{module}.bias"]
    # GPT-2 stores its layers (in, out); whatever the flag says, which is of the last layer that was wrapped.
    a, b = pair(weight.t().float())
    magnitude, added, rows = torch.rand(96), torch.randn(96), torch.randn(2, 32)
    tensors = factors(module, a, b) | {
        f"{module}.lora_magnitude_vector": magnitude,
        f"{module}.lora_B.bias": added,
        f"{table}.token_adapter.trainable_tokens_delta": rows,
    }
    folder = adapter(
        tmp_path / "adapter", base, tensors, use_dora=True, lora_bias=True, trainable_token_indices={"wte": [7, 3]}
    )  # fmt: skip
    whole = weight + (b @ a).t() * 1.5
    expected = ((magnitude / torch.linalg.norm(whole.t(), dim=1)).view(1, -1) * whole).to(weight.dtype)
    found = loadstone.load(folder).state_dict()
    assert torch.equal(found[f"{module}.weight"], expected)
    assert torch.equal(found[f"{module}.bias"], bias.clone().add_(added * 1.5))
    expected = weights[f"{table}.weight"].clone()
    expected[[7, 3]] = rows.to(expected.dtype)
    # Tied, as peft ties trained rows.
    assert torch.equal(found[f"{table}.weight"], expected)
    assert found["lm_head.weight"].data_ptr() == found[f"{table}.weight"].data_ptr()


def test_square_weights_that_are_stored_transposed(tmp_path: Path) -> None:
    base, module = saved(tmp_path / "base", family="gpt2"), "transformer.h.1.attn.c_proj"
    weight = stored(base)[f"{module}.weight"]
    a, b = pair(weight)
    folder = adapter(tmp_path / "adapter", base, factors(module, a, b), fan_in_fan_out=False)
    assert torch.equal(loadstone.load(folder).state_dict()[f"{module}.weight"], weight + (b @ a).t() * 1.5)


def test_finalize_merges_and_says_so(base: Path, tmp_path: Path) -> None:
    weights = stored(base)
    weight = weights[f"{Q}.weight"]
    a, b = pair(weight)
    norm = torch.rand_like(weights["model.norm.weight"])
    folder = adapter(tmp_path / "run" / "checkpoint-5", base, factors(Q, a, b) | {"model.norm.weight": norm})
    (folder / "tokenizer_config.json").write_text('{"of": "the adapter"}')
    done = loadstone.finalize(folder.parent, tmp_path / "out", verify=True)
    found = stored(done.out)
    assert torch.equal(found[f"{Q}.weight"], weight.clone().add_(b @ a * 1.5))
    assert torch.equal(found["model.norm.weight"], norm) and found.keys() == weights.keys()
    assert not list(done.out.glob("adapter*")) and (done.out / "tokenizer.json").exists()
    assert json.loads((done.out / "tokenizer_config.json").read_text()) == {"of": "the adapter"}
    manifest = json.loads((done.out / "loadstone.json").read_text())
    assert manifest["source"]["adapter"]["merged"] == "LoRA of 1 weight and 1 trained tensor"
    quantized = loadstone.finalize(folder, tmp_path / "q", recipe="int8-weight-only")
    again = loadstone.finalize(done.out, tmp_path / "q2", recipe="int8-weight-only")
    names = [n for n in quantized.files if n.endswith(".safetensors")]
    assert names and all(quantized.files[n] == again.files[n] for n in names)


def test_every_command_takes_an_adapter(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = pair(stored(base)[f"{Q}.weight"])
    folder = adapter(tmp_path / "adapter", Path("not/here"), factors(Q, a, b))
    merged = loadstone.finalize(folder, tmp_path / "merged", base=base).out
    given = ("--base", base)
    asked = ("--limit", 1, "--context-length", 32, "--json", "-")
    losses = []
    for model in ((folder, *given), (folder, *given, "--stream"), (merged,)):
        code, out, err = run(capsys, "eval", "-M", *model, *asked)
        assert code == 0, err
        losses.append(json.loads(out)["models"][0]["loss"])
    assert len(set(losses)) == 1
    for name, model in (("one", (folder, *given)), ("two", (merged,))):
        code, _, err = run(capsys, "export-fakequant", "-M", *model, "--format", "fp8", "-o", tmp_path / name)
        assert code == 0, err
    ours, theirs = stored(tmp_path / "one"), stored(tmp_path / "two")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert not list((tmp_path / "one").glob("adapter*"))
    manifest = json.loads((tmp_path / "one" / "loadstone.json").read_text())
    assert manifest["source"]["adapter"]["path"] == str(folder)
    code, out, _ = run(capsys, "inspect", folder, *given)
    assert code == 0 and "LoRA of 1 weight, merged into" in " ".join(out.split())
    code, out, _ = run(capsys, "finalize", "-M", folder, *given, "--dry-run")
    assert code == 0 and "merged into" in " ".join(out.split())


def test_what_was_tied_and_is_trained_apart(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", tie_word_embeddings=True)
    table = stored(base)[f"{EMBED}.weight"]
    a, b = pair(table)
    head = table - b @ a * 1.5
    embed = table_factors(EMBED, table)
    moved = table + (embed[f"{EMBED}.lora_embedding_B"] @ embed[f"{EMBED}.lora_embedding_A"]).t() * 1.5
    other = torch.randn_like(table)
    cases: list[tuple[Tensors, torch.Tensor, torch.Tensor]] = [
        (embed, moved, table),
        (embed | {f"{EMBED}.base_layer.weight": table}, moved, table),
        (factors(HEAD, a, -b), table, head),
        (factors(HEAD, a, -b) | embed, moved, head),
        ({f"{EMBED}.weight": other}, other, table),
        ({f"{HEAD}.modules_to_save.weight": other, f"{HEAD}.original_module.weight": table}, table, other),
        ({f"{HEAD}.weight": other, f"{EMBED}.weight": other}, other, other),
    ]
    for number, (tensors, expected_table, expected_head) in enumerate(cases):
        folder = adapter(tmp_path / f"adapter{number}", base, tensors)
        out = loadstone.finalize(folder, tmp_path / f"out{number}", verify=True).out
        for model in (loadstone.load(folder), stock(out)):
            state = model.state_dict()
            assert torch.equal(state[f"{EMBED}.weight"], expected_table), number
            assert torch.equal(state[f"{HEAD}.weight"], expected_head), number
        tied = torch.equal(expected_table, expected_head)
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is tied
        assert (f"{HEAD}.weight" in stored(out)) is not tied
    # Tied by peft too: one change is stored twice.
    folder = adapter(tmp_path / "both", base, factors(HEAD, a, b) | embed, ensure_weight_tying=True)
    state = loadstone.load(folder).state_dict()
    assert torch.equal(state[f"{HEAD}.weight"], moved) and torch.equal(state[f"{EMBED}.weight"], moved)


@pytest.mark.parametrize("tied", [True, False])
def test_added_tokens(tmp_path: Path, tied: bool) -> None:
    base = saved(tmp_path / "base", tie_word_embeddings=tied)
    table = torch.randn(408, 32)
    head = table if tied else torch.randn(408, 32)
    a, b = pair(stored(base)[f"{Q}.weight"])
    tensors = factors(Q, a, b) | {f"{EMBED}.weight": table, f"{HEAD}.weight": head}
    folder = adapter(tmp_path / "adapter", base, tensors)
    out = loadstone.finalize(folder, tmp_path / "out", verify=True).out
    model = stock(out)
    assert model.config.vocab_size == 408 and (f"{HEAD}.weight" in stored(out)) is not tied
    state = model.state_dict()
    assert torch.equal(state[f"{EMBED}.weight"], table) and torch.equal(state[f"{HEAD}.weight"], head)
    assert loadstone.load(folder).config.vocab_size == 408
    if not tied:
        short = adapter(tmp_path / "short", base, factors(Q, a, b) | {f"{EMBED}.weight": table})
        with pytest.raises(ArtifactError, match=r"whole LlamaForCausalLM.*lm_head(?s:.)*modules_to_save"):
            loadstone.finalize(short, tmp_path / "no")
        assert not (tmp_path / "no").exists()


def test_a_head_that_the_base_lacks(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    base = saved(tmp_path / "base")
    a, b = pair(stored(base)[f"{Q}.weight"])
    score = torch.randn(3, 32)
    tensors = factors(Q, a, b) | {"score.weight": score}
    folder = adapter(tmp_path / "adapter", base, tensors, task_type="SEQ_CLS")
    out = loadstone.finalize(folder, tmp_path / "out", verify=True).out
    model, info = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert type(model).__name__ == "LlamaForSequenceClassification" and model.config.num_labels == 3
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(model.score.weight, score)
    assert torch.equal(model.state_dict()[f"{Q}.weight"], stored(base)[f"{Q}.weight"] + b @ a * 1.5)
    with pytest.raises(ArtifactError, match=r"'base_model.model.score.weight' changes no tensor of the base"):
        loadstone.load(adapter(tmp_path / "untold", base, tensors))


def test_names_of_the_model_in_memory(tmp_path: Path) -> None:
    """The base's files have other names: transformers keeps those of the first release, or a base model has none."""
    import transformers as t

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    vision = {k: v for k, v in sizes.items() if k != "vocab_size"} | {
        "num_attention_heads": 2,
        "image_size": 16,
    }
    config = t.Gemma3Config(
        text_config=sizes | heads, vision_config=vision | {"patch_size": 8}, mm_tokens_per_image=4
    )
    model = t.Gemma3ForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "gemma")
    name = "model.language_model.layers.0.self_attn.q_proj"
    assert f"{name}.weight" not in stored(tmp_path / "gemma")
    weight = model.state_dict()[f"{name}.weight"]
    a, b = pair(weight)
    folder = adapter(tmp_path / "gemma-adapter", tmp_path / "gemma", factors(name, a, b))
    out = loadstone.finalize(folder, tmp_path / "gemma-out").out
    assert stored(out).keys() == stored(tmp_path / "gemma").keys()
    for found in (loadstone.load(folder), t.Gemma3ForConditionalGeneration.from_pretrained(out)):
        assert torch.equal(found.state_dict()[f"{name}.weight"], weight + b @ a * 1.5)
    # Trained on AutoModel, which has no prefix before the layers.
    base = saved(tmp_path / "llama")
    weight = stored(base)[f"{Q}.weight"]
    folder = adapter(tmp_path / "features", base, factors(Q.removeprefix("model."), *pair(weight)))
    assert torch.equal(
        loadstone.load(folder).state_dict()[f"{Q}.weight"], weight + pair(weight)[1] @ pair(weight)[0] * 1.5
    )


def test_what_is_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair(stored(base)[f"{Q}.weight"])
    good = factors(Q, a, b)
    for number, (tensors, changes, match) in enumerate(
        [
            (good, {"use_dora": True}, "use_dora"),
            (good, {"peft_type": "IA3"}, r"IA3(?s:.)*peft \(merge"),
            (good, {"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING computes beside the model"),
            (good, {"target_parameters": ["experts.down_proj"]}, "target_parameters"),
            (good, {"an_option_of_tomorrow": 1}, "an_option_of_tomorrow"),
            (good, {"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4(?s:.)*changed the base"),
            (good, {"r": 8}, "rank 8"),
            (good, {"alpha_pattern": {"(": 1}}, "is not a regular expression"),
            (good, {"rank_pattern": {"(a+)+b": 1}}, "could take for ever"),
            (good | {f"{Q}.lora_magnitude_vector": b.clone()}, {}, "lora_magnitude_vector"),
            (good | {f"{EMBED}.token_adapter.trainable_tokens_delta": b.clone()}, {}, "trainable_token_indices"),
            ({f"{Q}.lora_A.weight": a}, {}, "missing"),
            (good | {f"{Q}.lora_E": a}, {}, "changes no tensor"),
            (factors("model.layers.99.q_proj", a, b), {}, "changes no tensor"),
            (factors(Q, a[:, :3], b), {}, "shape"),
            ({f"{Q}.weight": a}, {}, "shape"),
            (factors(Q, a * float("nan"), b), {}, r"adapter_model.safetensors: (?s:.)*q_proj.lora_A.weight' holds NaN"),
        ]
    ):  # fmt: skip
        folder = adapter(tmp_path / str(number), base, tensors, **changes)
        with pytest.raises(ArtifactError, match=match):
            loadstone.finalize(folder, tmp_path / "out")
        assert not [p for p in tmp_path.iterdir() if "out" in p.name]
    folder = adapter(tmp_path / "away", Path("org/name"), good)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match=r"org/name(?s:.)*--base(?s:.)*hf download org/name"):
        loadstone.detect(folder)
    (tmp_path / "models--org--name").mkdir()
    with pytest.raises(UsageError, match=r"org/name(?s:.)*in the cache: --base (?s:.)*models--org--name"):
        loadstone.detect(folder)
    assert loadstone.detect(folder, base=base).kind == "adapter"
    with pytest.raises(UsageError, match="not an adapter"):
        loadstone.detect(base, base=base)
    for path in base.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    with pytest.raises(ArtifactError, match="full weights and an adapter"):
        loadstone.detect(folder, base=base)


def test_an_adapter_of_a_base_in_4_bits(tmp_path: Path) -> None:
    """As QLoRA trains them: the base is decoded first, and merged into."""
    source = packed.nf4(packed.save_model("llama", tmp_path / "plain"), tmp_path / "nf4")
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 256, generator=generator), torch.randn(256, 4, generator=generator)
    tensors = {f"{Q}.lora_A.weight": a, f"{Q}.lora_B.weight": b}
    folder = adapter(
        tmp_path / "adapter", source, tensors, target_modules=["q_proj"], layers_to_transform=[0]
    )
    with pytest.raises(ArtifactError, match=r"decode this one \(loadstone finalize -M"):
        loadstone.load(folder, device="cpu")
    loadstone.finalize(source, tmp_path / "decoded")
    found = loadstone.load(folder, base=tmp_path / "decoded", device="cpu").state_dict()[f"{Q}.weight"]
    weight = loadstone.load(source, device="cpu").state_dict()[f"{Q}.weight"]
    torch.testing.assert_close(found.float(), weight.float() + (b @ a) * 1.5, rtol=1e-2, atol=1e-2)
