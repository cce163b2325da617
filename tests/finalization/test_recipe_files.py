"""Recipe files: read with line numbers, resolved by module, reloaded bit for bit by stock transformers."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.helpers import logits, run

import loadstone
from loadstone.artifact.hashing import sha256_file
from loadstone.errors import ArtifactError, UsageError
from loadstone.finalization.plan import make_plan
from loadstone.finalization.run import write_plan
from loadstone.quantization import MixedRecipe, parse_recipe, read_recipe

SHIPPED = Path(__file__).resolve().parents[2] / "recipes" / "mixed-8-4.yaml"
MIXED = """\
default: intx4-weight-only
rules:
  - {modules: self_attn.q_proj, scheme: skip}
  - {modules: 're:.*layers\\.0\\.mlp\\.down_proj', scheme: skip}
  - {modules: self_attn, scheme: int8-weight-only}
  - {modules: '*.up_proj', scheme: int8-dynamic-act-int4-weight}
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def stock(directory: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model


def quantized_classes(model: torch.nn.Module) -> dict[str, str]:
    found = {name: type(p.data).__name__ for name, p in model.named_parameters()}
    return {name: kind for name, kind in found.items() if kind not in ("Parameter", "Tensor")}


def test_the_shipped_file_parses() -> None:
    assert len(read_recipe(SHIPPED).recipes) == 4


def test_a_file_of_one_default_gives_the_same_bytes_as_the_name(
    tiny: Path, quantize_to: Callable[..., Path], tmp_path: Path
) -> None:
    name = "int8-dynamic-act-int4-weight"
    file = write(tmp_path / "r.yaml", f"default: {name}\n")
    write_plan(make_plan(loadstone.detect(tiny), read_recipe(file)), tmp_path / "out")
    for path in quantize_to(tiny, name).iterdir():
        assert sha256_file(path) == sha256_file(tmp_path / "out" / path.name), path.name


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("- a\n", ":1: a recipe file is a mapping"),
        ("rules: []\n", "no default"),
        ("default: int8-weight-only\nrule: []\n", ":2: unknown key 'rule'. Did you mean 'rules'"),
        (
            "default: int8-weight-only\n\nlm_head: int8-weight\n",
            ":3: unknown recipe 'int8-weight'. Did you mean",
        ),
        ("default: 8\n", ":1: a scheme is text, this is '8'"),
        ("default:\n", ":1: a scheme is text"),
        ("default: skip\n", "everything is skipped"),
        ("default: skip\ndefault: skip\n", ":2: 'default' is duplicated"),
        ("default: skip\nrules: {}\n", ":2: rules is a list"),
        ("default: skip\nrules:\n  - modules: mlp\n", ":3: the rule has no scheme"),
        ("default: skip\nrules:\n  - {modules: mlp, scheme: skip, x: 1}\n", ":3: unknown key 'x'"),
        (
            "default: skip\nrules:\n- scheme: skip\n  modules: 're:('\n",
            ":4: 're:\\(' is not a regular expression",
        ),
        (
            "default: skip\nrules:\n- modules: [mlp]\n  scheme: skip\n",
            ":3: modules is text, this is a sequence",
        ),
        ("default: skip\nembeddings: int8-weight-only\n", ":2: embeddings cannot take int8-weight-only"),
        ("default: {\n", ":2: "),
        ("default: intx4-weight-only:bits=11\n", ":1: recipe 'intx4-weight-only': bits=11"),
        ("default: &a [*a]\n", ":1: "),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, text: str, says: str) -> None:
    file = write(tmp_path / "r.yaml", text)
    with pytest.raises(UsageError, match=says.replace("?", r"\?")) as error:
        read_recipe(file)
    assert error.value.message.startswith(str(file)) and error.value.exit_code == 2


def test_patterns_that_are_no_regular_expression(tiny: Path) -> None:
    from loadstone.quantization import Rule, parse_recipe

    recipe, artifact = parse_recipe("int8-weight-only"), loadstone.detect(tiny)
    with pytest.raises(UsageError, match=r"--skip: 're:\(' is not a regular expression"):
        make_plan(artifact, recipe, skip=["re:("])
    with pytest.raises(UsageError, match=r"rule 're:\(': 're:\(' is not a regular expression"):
        make_plan(artifact, MixedRecipe(recipe, (Rule("re:(", None),)))


def test_a_rule_that_names_nothing_is_an_error(tiny: Path, tmp_path: Path) -> None:
    for pattern, says in (("up_prj", ":3: 'up_prj' matches no Linear"), ("lm_head", "rules leave alone")):
        text = f"default: int8-weight-only\nrules:\n- {{modules: {pattern}, scheme: skip}}\n"
        with pytest.raises(UsageError, match=says):
            make_plan(loadstone.detect(tiny), read_recipe(write(tmp_path / "r.yaml", text)))


@pytest.mark.parametrize("arch", ["llama-tied", "llama-untied", "qwen3-moe", "gemma2"])
def test_mixed_schemes_reload_in_stock_transformers(
    make_model: Callable[..., Path], tmp_path: Path, arch: str
) -> None:
    from torchao.quantization import quantize_

    from loadstone.quantization import to_torchao

    text = MIXED
    if "moe" in arch:
        text = "\n".join(x for x in MIXED.splitlines() if "mlp" not in x and "up_" not in x).replace(
            "modules: self_attn,", "modules: k_proj,"
        )
    source = make_model(arch)
    plan = make_plan(loadstone.detect(source), read_recipe(write(tmp_path / "r.yaml", text)))
    block = plan.config["quantization_config"]
    assert block["quant_type"]["default"]["_type"] == "FqnToConfig"
    assert "model.layers.0.self_attn.q_proj" in block["modules_to_not_convert"]
    write_plan(plan, tmp_path / "out")
    ours, theirs = loadstone.load(tmp_path / "out"), stock(tmp_path / "out")
    assert torch.equal(logits(ours), logits(theirs))
    assert quantized_classes(ours) == quantized_classes(theirs)
    classes = quantized_classes(ours)
    assert "model.layers.0.self_attn.q_proj.weight" not in classes and "lm_head.weight" not in classes
    assert classes["model.layers.1.self_attn.k_proj.weight"] == "Int8Tensor"
    # The same as torchao on the whole model, scheme by scheme.
    whole = loadstone.load(source)
    chosen = {s.name.removesuffix(".weight"): s.scheme for s in plan.steps if s.scheme}
    for scheme in set(chosen.values()):
        quantize_(whole, to_torchao(scheme), filter_fn=lambda m, n, s=scheme: chosen.get(n) == s)
    assert torch.equal(logits(ours), logits(whole))


def test_eight_bit_attention_four_bit_mlp_two_layers_skipped(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    file = write(
        tmp_path / "r.yaml",
        "default: skip\nrules:\n"
        "  - {modules: layers.0.mlp.up_proj, scheme: skip}\n  - {modules: layers.1.self_attn.o_proj, scheme: skip}\n"
        "  - {modules: self_attn, scheme: int8-dynamic-act-int8-weight}\n"
        "  - {modules: mlp, scheme: int8-dynamic-act-int4-weight}\n",
    )
    write_plan(make_plan(loadstone.detect(make_model("llama-tied")), read_recipe(file)), tmp_path / "out")
    assert torch.equal(logits(loadstone.load(tmp_path / "out")), logits(stock(tmp_path / "out")))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize("arch", ["llama-tied", "llama-untied", "qwen2", "gemma2"])
@pytest.mark.parametrize(
    "tables",
    [
        "lm_head: int8-weight-only",
        "embeddings: intx4-weight-only:bits=8,group_size=0",
        "lm_head: int8-dynamic-act-int4-weight\nembeddings: intx4-weight-only",
    ],
    ids=["head", "embeddings", "both"],
)
def test_embeddings_and_head_reload_in_stock_transformers(
    make_model: Callable[..., Path], tmp_path: Path, arch: str, tables: str
) -> None:
    source = make_model(arch)
    recipe = read_recipe(write(tmp_path / "r.yaml", f"default: int8-weight-only\n{tables}\n"))
    if arch == "gemma2" and "embeddings" in tables:
        # Stock transformers reloads these with the embeddings' scale at 0, so they are refused.
        with pytest.raises(UsageError, match="lose the scale that Gemma2TextScaledWordEmbedding"):
            make_plan(loadstone.detect(source), recipe)
        return
    write_plan(make_plan(loadstone.detect(source), recipe), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["quantization_config"]["include_input_output_embeddings"] is True
    ours, theirs = loadstone.load(tmp_path / "out"), stock(tmp_path / "out")
    assert torch.equal(logits(ours), logits(theirs))
    assert quantized_classes(ours) == quantized_classes(theirs)
    assert ("lm_head.weight" in quantized_classes(ours)) == ("lm_head" in tables)
    assert ("model.embed_tokens.weight" in quantized_classes(ours)) == ("embeddings" in tables)
    # What is not quantized keeps the source's values, untied or not.
    if "lm_head" not in tables:
        assert torch.equal(ours.lm_head.weight, loadstone.load(source).lm_head.weight)


def test_one_class_two_schemes(tiny: Path, tmp_path: Path) -> None:
    """Layers of one tensor class, with and without activation quantization, are no damage when the config says so."""
    text = "default: int8-dynamic-act-int4-weight\nrules: [{modules: layers.1, scheme: intx4-weight-only}]\n"
    out = tmp_path / "out"
    write_plan(make_plan(loadstone.detect(tiny), read_recipe(write(tmp_path / "r.yaml", text))), out)
    assert torch.equal(logits(loadstone.load(out)), logits(stock(out)))
    config = json.loads((out / "config.json").read_text())
    table = config["quantization_config"]["quant_type"]["default"]["_data"]["fqn_to_config"]
    for key in ("fqn_to_config", "module_fqn_to_config"):
        config["quantization_config"]["quant_type"]["default"]["_data"][key] = table | {
            "model.layers.1.mlp.up_proj": table["model.layers.0.mlp.up_proj"]
        }
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=r"layers.1.mlp.up_proj.weight' does not quantize activations"):
        loadstone.detect(out)


def test_skip_goes_before_the_rules(tiny: Path, tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path / "r.yaml", MIXED))
    plan = make_plan(loadstone.detect(tiny), recipe, skip=["layers.1"])
    assert not [s.name for s in plan.steps if s.scheme and ".layers.1." in s.name]


def test_the_command_shows_every_module(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "r.yaml", MIXED)
    code, out, _ = run(capsys, "finalize", "-M", tiny, "--recipe", file, "--dry-run", "--json")
    modules = {m["module"]: m["recipe"] for m in json.loads(out)["modules"]}
    assert code == 0 and modules["model.layers.0.self_attn.q_proj"] is None
    assert modules["model.layers.1.mlp.up_proj"] == "int8-dynamic-act-int4-weight"
    assert modules["model.layers.1.mlp.down_proj"] == "intx4-weight-only"
    code, out, _ = run(capsys, "finalize", "-M", tiny, "--recipe", file, "--dry-run")
    row = next(line.split() for line in out.splitlines() if "self_attn.k_proj" in line)
    assert code == 0 and row[:3] == ["model.layers.*.self_attn.k_proj", "0-1", "int8-weight-only"]
    assert "FqnToConfig" in out and list(tmp_path.iterdir()) == [file]


def test_the_command_refuses(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "r.yaml", "default: int8-weight-only\nrule: []\n")
    start = ["finalize", "-M", tiny, "-o", tmp_path / "out"]
    for extra, says in (
        (["--recipe", file], "r.yaml:2: unknown key 'rule'"),
        (["--recipe", file, "--quantize", "int8-weight-only"], "exclude each other"),
        (["--recipe", tmp_path / "none.yaml"], "there is no recipe file"),
        (["--algorithm", "hqq"], "--algorithm is about quantization"),
        (["--calibrate", "sample"], "--calibrate is about quantization"),
    ):
        code, out, err = run(capsys, *start, *extra)
        assert code == 2 and says in err and out == ""


def test_text_of_a_recipe_holds_all_of_it(tmp_path: Path) -> None:
    a = read_recipe(write(tmp_path / "a.yaml", MIXED + "lm_head: int8-weight-only\n"))
    b = read_recipe(write(tmp_path / "b.yaml", "# other\n" + MIXED.replace("'*.up_proj'", '"*.up_proj"')))
    assert str(a) == str(b) + "; lm_head = int8-weight-only"
    assert len(a.recipes) == 3 and re.match("self_attn.q_proj = skip; ", str(a))
    assert parse_recipe("int8-weight-only") in a.recipes
