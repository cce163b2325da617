"""Language-model prefixes: the same logits as without, however attention is computed, kept and carried on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import loadstone
from loadstone.artifact.context_errors import (
    ArchitectureMismatch,
    BaseMismatch,
    CorruptContext,
    FormatUnsupported,
    KindMismatch,
    RecipeMismatch,
    TokenizerMismatch,
    UnsafeContent,
)
from loadstone.artifact.context_file import digest
from loadstone.context.prefix.base import language_artifact, load_language_model
from loadstone.context.prefix.cache import PrefixCache
from loadstone.context.prefix.fit import encode_prompt, make_prefix, read_prompt, share_attention
from loadstone.context.prefix.store import load_prefix, save_prefix
from loadstone.errors import ArtifactError, MissingError, UsageError

P, T = 40, 24
_SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "gpt2": ("GPT2", {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "all sliding": ("Mistral", {"sliding_window": 12}),
    "gemma2": ("Gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 12}),
    "gemma3": ("Gemma3", {
        "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }),
    "moe": (
        "Qwen3Moe",
        {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "convolutions": ("Lfm2", {"full_attn_idxs": [1, 3], "block_auto_adjust_ff_dim": False}),
    "linear attention": (
        "Qwen3Next",
        {
            "head_dim": 16, "layer_types": ["linear_attention", "full_attention"] * 2, "linear_num_value_heads": 4,
            "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "num_experts": 0,
            "mlp_only_layers": [0, 1, 2, 3],
        },
    ),
}  # fmt: skip


def build(family: str) -> Any:
    import transformers

    name, options = FAMILIES[family]
    torch.manual_seed(0)
    kind = "Gemma3Text" if name == "Gemma3" else name
    config = getattr(transformers, f"{kind}Config")(**(_SIZES | options))
    model = getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")(config)
    return model.eval().requires_grad_(False)


@pytest.fixture(params=sorted(FAMILIES), scope="module")
def family(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, build(request.param)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    found = torch.randint(3, 256, (3, P + T), generator=torch.Generator().manual_seed(1))
    found[:, :P] = found[0, :P]
    return found


@pytest.mark.parametrize("share", [True, False])
def test_logits_are_those_without_a_cache(family: tuple[str, Any], ids: torch.Tensor, share: bool) -> None:
    name, model = family
    before = model.config._attn_implementation
    whole = model(ids).logits
    cache = make_prefix(model, ids[:1, :P], share=share)
    # Recurrences are summed chunk by chunk, and chunks begin elsewhere after a prefix.
    close = (5e-5 if name == "linear attention" else 1e-5) * whole.abs().max()
    shares = before == "sdpa" and name not in ("all sliding", "linear attention")
    assert cache.shares == (share and shares)
    assert (cache.prefix.logits - whole[:1, P - 1]).abs().max() < close
    for steps in ((P, P + T), (P, P + 9, P + 10, P + T)):
        fork = cache.fork(batch=3)
        parts = [model(ids[:, a:b], past_key_values=fork).logits for a, b in pairwise(steps)]
        assert (torch.cat(parts, 1) - whole[:, P:]).abs().max() < close
    model.set_attn_implementation(before)


def test_concatenated_has_the_bits_of_transformers_cache(family: tuple[str, Any], ids: torch.Tensor) -> None:
    from transformers import DynamicCache

    _, model = family
    stock = DynamicCache(config=model.config)
    model(ids[:, :P][:1], past_key_values=stock)
    theirs = model(ids[:1, P:], past_key_values=stock).logits
    cache = make_prefix(model, ids[:1, :P], share=False)
    assert torch.equal(model(ids[:1, P:], past_key_values=cache.fork()).logits, theirs)


def test_requests_leave_the_prefix_alone(family: tuple[str, Any], ids: torch.Tensor) -> None:
    _, model = family
    cache = make_prefix(model, ids[:1, :P], share=False)
    before = [t.clone() for layer in cache.prefix.layers for t in layer.tensors().values()]
    first = cache.fork(batch=3)
    a = model(ids[:, P:], past_key_values=first).logits
    b = model(ids[:, P:], past_key_values=cache.fork(batch=3)).logits
    assert torch.equal(a, b)
    assert first.get_seq_length() == P + T and cache.get_seq_length() == P
    after = [t for layer in cache.prefix.layers for t in layer.tensors().values()]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    # Forks hold the very same tensors.
    assert {t.data_ptr() for t in after} == {
        t.data_ptr() for layer in cache.fork().prefix.layers for t in layer.tensors().values()
    }


@pytest.mark.parametrize("share", [True, False])
def test_generation_with_left_padding_and_beams(
    family: tuple[str, Any], ids: torch.Tensor, share: bool
) -> None:
    name, model = family
    before = model.config._attn_implementation
    cache = make_prefix(model, ids[:1, :P], share=share)
    mask = torch.ones_like(ids)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    alone = ids[1:2]
    assert cache.takes_padding == (name in ("llama", "gpt2", "qwen3", "moe"))
    if cache.takes_padding:
        mask[1, P : P + 7] = 0
        alone = torch.cat([ids[1:2, :P], ids[1:2, P + 7 :]], 1)
    beams = {} if name in ("convolutions", "linear attention") else {"num_beams": 3}
    for more in ({}, beams):
        forks = cache.fork(batch=3)
        found = model.generate(input_ids=ids, attention_mask=mask, past_key_values=forks, **options, **more)
        for row, prompt in ((0, ids[:1]), (1, alone)):
            expected = model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), **options, **more
            )
            assert found[row, P + T :].tolist() == expected[0, prompt.shape[1] :].tolist()
    model.set_attn_implementation(before)


def test_forgetting_and_cropping(ids: torch.Tensor) -> None:
    model = build("llama")
    cache = make_prefix(model, ids[:1, :P])
    fork = cache.fork()
    expected = model(ids[:1, P:], past_key_values=fork).logits
    fork.crop(-(T - 5))
    assert fork.get_seq_length() == P + 5
    again = model(ids[:1, P + 5 :], past_key_values=fork).logits
    assert torch.allclose(again, expected[:, 5:], atol=1e-5)
    with pytest.raises(UsageError, match="frozen"):
        fork.crop(-(T + 1))
    fork.reset()
    assert fork.get_seq_length() == P
    assert torch.equal(model(ids[:1, P:], past_key_values=fork).logits, expected)
    once = cache.fork(keeps=False)
    assert torch.equal(model(ids[:1, P:], past_key_values=once).logits, expected)
    assert once.get_seq_length() == P


def test_layers_that_cannot_be_kept_are_named(ids: torch.Tensor) -> None:
    from transformers import FalconMambaConfig, FalconMambaForCausalLM

    config = FalconMambaConfig(
        vocab_size=256,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=8,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = FalconMambaForCausalLM(config).eval()
    with pytest.raises(ArtifactError, match=r"of its own|cannot hold"):
        make_prefix(model, ids[:1, :8])


@pytest.mark.parametrize("kind, apart", [
    ("bfloat16", 4e-3), ("float16", 5e-4), ("int8", 4e-3), ("fp8", 0.07), ("hqq8", 0.01), ("hqq4", 0.15),
    ("quanto4", 0.15), ("quanto2", 0.6),
])  # fmt: skip
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_quantized_caches(kind: str, apart: float, name: str, ids: torch.Tensor, tmp_path: Path) -> None:
    if kind.startswith("hqq"):
        pytest.importorskip("hqq")
    if kind.startswith("quanto"):
        pytest.importorskip("optimum.quanto")
    model = build(name)
    plain = make_prefix(model, ids[:1, :P])
    cache = make_prefix(model, ids[:1, :P], cache_kind=kind)
    assert cache.nbytes < 0.6 * plain.nbytes
    for exact, rough in zip(plain.prefix.layers, cache.prefix.layers, strict=True):
        for a, b in ((exact.keys, rough.keys), (exact.values, rough.values)):
            assert a is not None and b is not None
            wanted, kept = a.read(torch.float32), b.read(torch.float32)
            assert 0 < (kept - wanted).abs().max() / wanted.abs().max() < apart
    found = model(ids[:, P:], past_key_values=cache.fork(batch=3)).logits
    save_prefix(cache, tmp_path / "prefix")
    loaded = load_prefix(tmp_path / "prefix", model)
    assert torch.equal(model(ids[:, P:], past_key_values=loaded.fork(batch=3)).logits, found)
    for a, b in zip(cache.prefix.layers, loaded.prefix.layers, strict=True):
        ours, theirs = a.tensors(), b.tensors()
        assert ours.keys() == theirs.keys()
        # As bytes: fp8 has no comparison.
        assert all(torch.equal(t.view(torch.uint8), theirs[n].view(torch.uint8)) for n, t in ours.items())


def test_fp8_is_transformers_own(ids: torch.Tensor) -> None:
    cache_utils = pytest.importorskip("transformers.cache_utils")
    if not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this transformers has no fp8 cache")
    from loadstone.context.prefix.stored_states import keep

    keys = torch.randn(1, 2, 9, 16)
    layer = cache_utils.Fp8QuantizedLayer()
    layer.update(keys, keys)
    assert torch.equal(
        layer._dequantize(layer._quantized_keys), keep(keys, "fp8", values=False).read(keys.dtype)
    )


@pytest.mark.parametrize("kind, compiled", [
    ("hqq1", False), ("hqq2", False), ("hqq3", False), ("hqq4", False), ("hqq8", False), ("quanto2", False),
    ("quanto4", False),
    # Compiles quanto's unpacking first, for minutes.
    pytest.param("quanto2", True, marks=pytest.mark.slow), pytest.param("quanto4", True, marks=pytest.mark.slow),
])  # fmt: skip
def test_quantized_caches_are_transformers_own(
    kind: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same values, bit for bit, as transformers' quantized cache keeps of a prompt."""
    pytest.importorskip("hqq" if kind.startswith("hqq") else "optimum.quanto")
    from transformers.cache_utils import HQQQuantizedLayer, QuantoQuantizedLayer

    from loadstone.context.prefix.stored_states import keep

    layer = (HQQQuantizedLayer if kind.startswith("hqq") else QuantoQuantizedLayer)(nbits=int(kind[-1]))
    if kind.startswith("quanto") and not compiled:
        from optimum.quanto.tensor.packed import PackedTensor

        def unpack(packed: Any) -> torch.Tensor:
            codes = [packed._data >> shift & 2**packed._bits - 1 for shift in range(0, 8, packed._bits)]
            return torch.cat(codes)[: packed.shape[0]]

        monkeypatch.setattr(PackedTensor, "unpack", unpack)
    keys, values = torch.randn(2, 1, 2, 97, 32).unbind()
    layer.update(keys, values)
    for theirs, tensor in ((layer._quantized_keys, keys), (layer._quantized_values, values)):
        wanted = layer._dequantize(theirs)
        assert torch.equal(keep(tensor, kind, values=False).read(tensor.dtype), wanted)
        assert not torch.equal(wanted, tensor)


# On disk, bound to its base.


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> Path:
    # A copy: other tests share the original.
    return Path(
        shutil.copytree(make_model("llama-tied", "float32"), tmp_path_factory.mktemp("base") / "model")
    )


TEXT = "Answer with one word. The capital of France is Paris."


def made(base: Path, out: Path, prompt: Any = TEXT, **options: Any) -> Path:
    artifact = language_artifact(base)
    model, tokenizer = load_language_model(artifact, device="cpu", dtype="float32")
    tokens, text, template = encode_prompt(prompt, tokenizer)
    cache = make_prefix(model, tokens, text=text, template=template, tokenizer=tokenizer, **options)
    return save_prefix(cache, out, source=artifact)


@pytest.fixture(scope="module")
def prefix(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(base, tmp_path_factory.mktemp("prefix") / "prefix")


def test_round_trip_through_load_context(prefix: Path, base: Path) -> None:
    cache = loadstone.load_context(prefix, device="cpu")
    assert isinstance(cache, PrefixCache)
    assert cache.tokenizer.decode(cache.tokens[0]) == TEXT
    again = loadstone.load_context(prefix, device="cpu")
    assert again.model is cache.model
    texts = [" And of Spain?", " Of Italy, then"]
    inputs = cache.inputs(texts)
    found = cache.model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
    for row, text in enumerate(texts):
        plain = cache.tokenizer(TEXT + text, return_tensors="pt")
        expected = cache.model.generate(**plain, max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert (
            found[row, inputs["input_ids"].shape[1] :].tolist()
            == expected[0, plain["input_ids"].shape[1] :].tolist()
        )
    with pytest.raises(UsageError, match="nothing to go on with"):
        cache.inputs(["", "x"])


def test_a_context_holds_no_weights(prefix: Path, base: Path) -> None:
    from safetensors import safe_open

    with safe_open(base / "model.safetensors", framework="pt") as handle:
        names = set(handle.keys())
        rows = [handle.get_tensor(n).float().numpy().tobytes()[:64] for n in names if "norm" not in n]
    raw = (prefix / "context.safetensors").read_bytes()
    assert not any(row in raw for row in rows)
    with safe_open(prefix / "context.safetensors", framework="pt") as handle:
        assert not names & set(handle.keys())


def test_another_model_tokenizer_template_or_recipe_is_refused(
    prefix: Path,
    base: Path,
    tmp_path: Path,
    make_model: Callable[..., Path],
    quantize_to: Callable[..., Path],
) -> None:
    from safetensors.torch import load_file, save_file

    def copied(name: str) -> Path:
        return Path(shutil.copytree(base, tmp_path / name))

    retrained = copied("retrained")
    tensors = load_file(retrained / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(tensors, retrained / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseMismatch, match=r"other values in 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        loadstone.load_context(prefix, retrained, device="cpu")

    swapped = copied("tokenizer")
    raw = json.loads((swapped / "tokenizer.json").read_text())
    vocab = raw["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (swapped / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(TokenizerMismatch, match=r"the tokenizer of .*differ in content"):
        loadstone.load_context(prefix, swapped, device="cpu")

    template = copied("template")
    for file in (template / "chat_template.jinja", template / "tokenizer_config.json"):
        if file.exists():
            file.write_text(file.read_text().replace("m['content']", "m['content'] + ''"))
    with pytest.raises(TokenizerMismatch, match="chat template"):
        loadstone.load_context(prefix, template, device="cpu")

    quantized = quantize_to(base, "int8-weight-only")
    with pytest.raises(RecipeMismatch, match="quantized by int8-weight-only, the prefix was made with none"):
        loadstone.load_context(prefix, quantized, device="cpu")

    deeper = copied("rope")
    config = json.loads((deeper / "config.json").read_text())
    config["rms_norm_eps"] = 1e-3
    (deeper / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArchitectureMismatch, match="rms_norm_eps"):
        loadstone.load_context(prefix, deeper, device="cpu")
    with pytest.raises(ArchitectureMismatch):
        loadstone.load_context(prefix, build("llama"))


def test_quantized_bases(base: Path, quantize_to: Callable[..., Path], tmp_path: Path) -> None:
    quantized = quantize_to(base, "int8-weight-only")
    out = made(quantized, tmp_path / "prefix")
    cache = loadstone.load_context(out, device="cpu")
    ids = torch.cat([cache.tokens, cache.tokens[:, :6]], 1)
    whole = cache.model(ids).logits[:, -6:]
    found = cache.model(ids[:, -6:], past_key_values=cache.fork()).logits
    assert (found - whole).abs().max() < 1e-5 * whole.abs().max()
    with pytest.raises(RecipeMismatch, match="quantized by none, the prefix was made with int8-weight-only"):
        loadstone.load_context(out, base, device="cpu")


def test_a_missing_base_is_named(prefix: Path, tmp_path: Path) -> None:
    lost = Path(shutil.copytree(prefix, tmp_path / "lost"))
    rewrite(lost, lambda facts: facts["base"].update(source="/nowhere"))
    with pytest.raises(MissingError, match="/nowhere"):
        loadstone.load_context(lost, device="cpu")


def rewrite(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    facts = json.loads((directory / "context.json").read_text())
    change(facts)
    facts["digest"] = digest(facts)
    (directory / "context.json").write_text(json.dumps(facts))


@pytest.mark.parametrize("change, error", [
    (lambda f: f["layers"].pop(), CorruptContext),
    (lambda f: f["layers"][0].update(kind="other"), CorruptContext),
    (lambda f: f["layers"][0].update(rows=3), CorruptContext),
    (lambda f: f["layers"][0].update(kind="sliding"), CorruptContext),
    (lambda f: f["prompt"].update(tokens=7), CorruptContext),
    (lambda f: f["prompt"].update(sha256="0"), CorruptContext),
    (lambda f: f["cache"].update(dtype="int3"), FormatUnsupported),
    (lambda f: f["numerics"].update(dtype="int8"), FormatUnsupported),
    (lambda f: f.update(kind="tale"), FormatUnsupported),
    (lambda f: f.update(kind="pfn"), CorruptContext),
    (lambda f: f.pop("tokenizer"), CorruptContext),
    (lambda f: f["files"].update({"../x": {}}), UnsafeContent),
    (lambda f: f["base"]["architecture"].update(hidden_size=1), ArchitectureMismatch),
])  # fmt: skip
def test_a_changed_description_is_refused(
    prefix: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], error: type[Exception]
) -> None:
    broken = Path(shutil.copytree(prefix, tmp_path / "broken"))
    rewrite(broken, change)
    with pytest.raises(error):
        loadstone.load_context(broken, device="cpu")


def test_a_flipped_bit_is_found(prefix: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(prefix, tmp_path / "broken"))
    raw = bytearray((broken / "context.safetensors").read_bytes())
    raw[-100] ^= 1
    (broken / "context.safetensors").write_bytes(raw)
    with pytest.raises(CorruptContext, match="sha256 differs"):
        loadstone.load_context(broken, device="cpu")
    (broken / "planted.pkl").write_bytes(b"x")
    with pytest.raises(UnsafeContent):
        loadstone.load_context(broken, device="cpu")


def test_nothing_half_written_stays(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no")

    monkeypatch.setattr("loadstone.writing.contexts.sha256_file", broken)
    with pytest.raises(RuntimeError):
        made(base, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_prompts(tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    (tmp_path / "chat.json").write_text(json.dumps(messages))
    out = made(base, tmp_path / "chat", read_prompt(tmp_path / "chat.json"))
    cache = loadstone.load_context(out, device="cpu")
    assert cache.prefix.template and cache.tokenizer.decode(cache.tokens[0]) == "Be brief.Hello"
    (tmp_path / "empty.txt").write_text("  \n")
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe")
    for name, said in (
        ("empty.txt", "empty"),
        ("bad.json", "not a list"),
        ("binary.txt", "UTF-8"),
        ("none", "no file"),
    ):
        with pytest.raises(UsageError, match=said):
            read_prompt(tmp_path / name)
    # Rotary positions are computed: a warning, and no error.
    (tmp_path / "long.txt").write_text("x" * 200)
    loadstone.fit(base, tmp_path / "long", prompt=tmp_path / "long.txt", dtype="float32")
    assert "more than the model was made for" in caplog.text


def test_one_kind_given_to_another(prefix: Path, base: Path, tmp_path: Path) -> None:
    from loadstone.context.pfn.store import load_table_context

    with pytest.raises(KindMismatch, match="language-model prefix"):
        load_table_context(prefix)
    table = tmp_path / "table"
    from loadstone.context import fit_context

    model = loadstone.load("builtin:tiny-pfn")
    fit_context(model, torch.randn(6, 2), torch.randn(6)).save(table)
    with pytest.raises(KindMismatch, match="fitted table"):
        load_prefix(table, base)
    with pytest.raises(UsageError, match="a context"):
        language_artifact(prefix)
    with pytest.raises(UsageError, match="in-context"):
        language_artifact("builtin:tiny-pfn")


def test_attention_that_cannot_be_shared_is_left_as_it_is(
    ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    import loadstone.context.prefix.attention as attention

    model = build("llama")
    cache = make_prefix(model, ids[:1, :P], share=False)
    real = attention.attend_shared

    def wrong(*arguments: Any) -> Any:
        out, total = real(*arguments)
        return out * 1.5, total

    monkeypatch.setattr(attention, "attend_shared", wrong)
    assert not share_attention(cache)
    assert model.config._attn_implementation == "sdpa" and not cache.shares


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_beyond_the_tolerance_the_noise_of_plain_attentions_decides(
    factor: float, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    import loadstone.context.prefix.attention as attention
    from loadstone.context.prefix import fit as prefix_fit

    model = build("llama").to(torch.bfloat16)
    cache = make_prefix(model, ids[:1, :P], share=False)
    real = attention.attend_shared
    monkeypatch.setattr(attention, "attend_shared", lambda *a: (real(*a)[0] * factor, real(*a)[1]))
    monkeypatch.setitem(prefix_fit._TOLERANCE, torch.bfloat16, 0.0)
    assert share_attention(cache) == (factor == 1.0)
    assert model.config._attn_implementation == (attention.NAME if factor == 1.0 else "sdpa")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size, value_size", [(16, 16), (16, 8)])
def test_joined_attention_is_the_plain_softmax(masked: bool, size: int, value_size: int) -> None:
    from loadstone.context.prefix.attention import MARK, prefix_attention_forward

    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    query, key, value = draw(3, 4, 5, size), draw(3, 2, 5, size), draw(3, 2, 5, value_size)
    keys, values = draw(1, 2, 11, size), draw(1, 2, 11, value_size)
    own = torch.ones(5, 5, dtype=torch.bool).tril().expand(3, 1, 5, 5).clone()
    if masked:
        own[1, :, :, :3] = False
    everything = torch.cat([own.new_ones(3, 1, 5, 11), own], -1)
    whole = torch.nn.functional.scaled_dot_product_attention(
        query,
        torch.cat([keys.expand(3, -1, -1, -1), key], 2).repeat_interleave(2, 1),
        torch.cat([values.expand(3, -1, -1, -1), value], 2).repeat_interleave(2, 1),
        attn_mask=everything,
    )
    setattr(key, MARK, (keys, values))
    found, _ = prefix_attention_forward(torch.nn.Module(), query, key, value, own if masked else None)
    assert (found.transpose(1, 2) - whole).abs().max() < 1e-6
