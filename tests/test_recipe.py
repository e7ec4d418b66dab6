"""Recipes: every resolved one is golden, and every mistake is answered with its key and what would be valid."""

import warnings
from pathlib import Path

import pytest
import yaml

from ecdit import UserError, load_recipe
from ecdit.model.sizes import SIZES, table_rows
from ecdit.recipe_io import dump_recipe, keys

ROOT = Path(__file__).parents[1]
RECIPES = sorted(p for p in (ROOT / "recipes").rglob("*.yaml") if p.name not in ("base.yaml", "study.yaml"))
GOLDEN = Path(__file__).parent / "golden"
QUICKSTART = ROOT / "recipes/quickstart.yaml"


def name_of(path):
    return str(path.relative_to(ROOT / "recipes").with_suffix(""))


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_resolved_recipes_are_golden(path, request):
    """`pytest --update-golden` writes them anew; the diff shows which setting moved."""
    text = dump_recipe(load_recipe(path))
    golden = GOLDEN / f"{name_of(path)}.yaml"
    if request.config.getoption("--update-golden"):
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_dump_reads_back(path, tmp_path):
    recipe = load_recipe(path)
    (tmp_path / "dump.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "dump.yaml") == recipe
    assert recipe.run == path.stem


def test_every_model_of_table_1_has_a_recipe():
    found = {(r.model.size, r.model.routing, r.model.experts) for r in map(load_recipe, RECIPES) if r.model.size}
    for _, size, experts in table_rows():
        assert (size, "expert_choice", experts) in found or any(f[:2] == (size, "dense") for f in found if not experts)
    token_choice = {(size, experts) for size, routing, experts in found if routing == "token_choice"}
    assert token_choice == {(size, experts) for size in ("XL", "XXL") for experts in (8, 16, 32)}
    m = load_recipe(ROOT / "recipes/m_64e.yaml").model
    assert (m.layers, m.width, m.heads, m.kv_heads) == (38, 3072, 48, 12) and SIZES["M"].layers == 46


def test_the_quickstart_model_can_be_spread_out():
    recipe = load_recipe(QUICKSTART)
    model = recipe.model
    for number in (model.layers, model.heads, model.kv_heads, model.experts, recipe.train.batch):
        assert number % 4 == 0


def test_every_key_is_described():
    assert all(description for _, description in described())
    assert len(list(keys())) > 60


def described():
    from ecdit.recipe import Recipe

    def walk(model, prefix=""):
        for name, field in model.model_fields.items():
            yield prefix + name, field.description
            if hasattr(field.annotation, "model_fields"):
                yield from walk(field.annotation, f"{prefix}{name}.")

    return walk(Recipe)


MISTAKES = {
    "modle.experts=8": "modle: unknown key; did you mean model?",
    "model.exprets=8": "model.exprets: unknown key; did you mean model.experts?",
    "lr=1e-3": "lr: unknown key; did you mean optimizer.lr?",
    "model.heads=5": "model.heads: 5 does not divide width: 128; try one of 1, 2, 4, 8",
    "model.kv_heads=3": "model.kv_heads: 3 does not divide heads: 4; try one of 1, 2, 4",
    "model.patch=3": "model.patch: 3 does not divide side: 32",
    "model.experts=7": "model.experts: 7 gives no whole capacity",
    "model.capacity_factor=9": "model.capacity_factor: 9 is over experts: 8",
    "model.group_tokens=96": "model.group_tokens: 96 is no whole number of images",
    "model.side=64": "model.side: 64 does not fit data.autoencoder: pixels",
    "model.channels=4": "model.channels: 4 does not fit data.autoencoder: pixels",
    "model.size=XL": "model.layers: 4 contradicts size: XL",
    "model.layers=many": "model.layers: 'many' is not valid: input should be a valid integer",
    "model.routing=hash": "model.routing: 'hash' is not valid",
    "model.decoder.layers=2": "model.decoder.layers: 2 decoder layers, but masking.ratio masks nothing",
    "train.micro_batch=2": "train.micro_batch: 2 images of 64 tokens",
    "train.batch=63": "does not divide train.batch: 63",
    "train.precision=fp8": "train.precision: 'fp8' is not valid: input should be 'bf16', 'fp32' or 'fp64'",
    "train.precision=fp64": "train.precision: fp64 is for `ecdit sample` and `ecdit evaluate` on a run; try fp32",
    "masking.ratio=1.0": "masking.ratio: 1.0 is not valid",
    "masking.ratio=[[1,0.5]]": "begin with 0",
    "masking.ratio=[[0,0.5],[9,0.0],[5,0.5]]": "the steps ascend",
    "masking.ratio=0.999": "masking.ratio: 0.999 leaves no token of 64",
    "diffusion.time.mean=.nan": "diffusion.time.mean: nan is not valid: input should be a finite number",
    "sample.guidance=.inf": "sample.guidance: inf is not valid: input should be a finite number",
    "optimizer.lr=-1": "optimizer.lr: -1 is not valid: input should be greater than 0",
    "data.streams=[]": "data.streams: [] is not valid",
    "data.streams.4.path=x": "4 is no place in a list of 1",
    "parallel.tensor=3": "parallel.tensor: 3 does not divide model.heads: 4; try one of 1, 2, 4",
    "parallel.expert=3": "parallel.expert: 3 does not divide model.experts: 8; try one of 1, 2, 4, 8",
    "parallel.expert_tensor=3": "parallel.expert_tensor: 3 does not divide an expert's hidden width",
    "parallel.pipeline=3": "parallel.pipeline: 3 does not divide model.layers: 4; try one of 1, 2, 4",
    "parallel.dispatch_chunks=3": "parallel.dispatch_chunks: 3 does not divide the experts of a rank: 8",
    "run=a/b": "run: 'a/b' is not valid",
    "run=..": "run: '..' is not valid",
    "run=.": "run: '.' is not valid",
    f"run={'a' * 300}": "is not valid: string should match",
    "parallel.timeout_minutes=1e30": "parallel.timeout_minutes: 1e+30 is not valid: input should be less than",
    "cluster.environment={A B: x}": "cluster.environment.A B",
    "data.streams.².path=x": "² is no place in a list of 1",
    "data.streams=[{path: 16}]": "data.streams.0.path: 16 is no text here; put it in quotes",
    "log.held_out={path: x, pictures: 100}": "log.held_out.pictures: 100 is no multiple of",
    "nonsense": "an override has the form key=value",
    "train=3": "train: 3 is not valid",
    "train.steps.more=3": "steps is a value, not a section",
}


TOGETHER = {
    ("model.kv_heads=2", "parallel.tensor=4"): "parallel.tensor: 4 does not divide model.kv_heads: 2; try one of 1, 2",
    ("model.routing=dense", "parallel.expert=2"): "parallel.expert: 2, but model.routing: dense has no experts",
    ("train.micro_batch=4", "model.heads=8", "model.kv_heads=8", "parallel.tensor=8"):
        "parallel.tensor: 8 does not divide train.micro_batch: 4; try one of 1, 2, 4",
    ("train.graph=true", "parallel.pipeline=2"): "train.graph: true does not go with parallel.pipeline: 2",
    ("train.graph=true", "model.routing=megatron_topk"): "train.graph: true does not go with model.routing: megatron",
    ("train.compile=true", "train.linears=transformer_engine"):
        "train.compile: true does not go with train.linears: transformer_engine; set it to false, or train.linears to",
    ("train.compile=true", "train.precision=bf16", "precision.fp8=current"):
        "train.compile: true does not go with precision.fp8: current",
    ("model.routing=megatron_topk", "model.router_input=unmodulated"):
        "model.router_input: unmodulated does not go with routing: megatron_topk",
    ("log.held_out.path=x", "masking.ratio=0.25", "model.experts=4", "model.group_tokens=24", "model.patch=8",
     "train.micro_batch=2"):
        "log.held_out.path: x, whose pictures enter with all 16 tokens",
    ("precision.fp8=block",): "precision.fp8: block goes with train.precision: bf16, not fp32",
    ("train.precision=bf16", "precision.fp8=delayed", "train.recompute=moe"):
        "precision.fp8: delayed does not go with train.recompute: moe; try current or block",
    ("train.precision=bf16", "precision.fp8=current", "model.width=40", "model.kv_heads=4"):
        "precision.where: experts have a width of 40 on a rank; FP8 needs a multiple of 16",
    ("train.precision=bf16", "precision.fp8=current", "train.micro_batch=1", "model.group_tokens=64",
     "model.experts=16"):
        "train.micro_batch: 1 images of 64 tokens",
}  # fmt: skip


@pytest.mark.parametrize("overrides", TOGETHER)
def test_keys_that_do_not_go_together_are_named(overrides):
    with pytest.raises(UserError) as error:
        load_recipe(QUICKSTART, overrides)
    assert TOGETHER[overrides] in str(error.value)


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_is_named(override):
    with pytest.raises(UserError) as error:
        load_recipe(QUICKSTART, [override])
    assert MISTAKES[override] in str(error.value)


def test_overrides_take_yaml_and_reach_into_lists():
    recipe = load_recipe(
        QUICKSTART, ["optimizer.lr=1e-3", "data.streams.0.path=elsewhere", "masking.ratio=[[0, 0.5], [9, 0.0]]"]
    )
    assert recipe.optimizer.lr == 1e-3
    assert recipe.data.streams[0].path == "elsewhere"
    assert recipe.masking.schedule == [(0, 0.5), (9, 0.0)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # pydantic warns of values that it did not expect
        assert yaml.safe_load(dump_recipe(recipe))["masking"]["ratio"] == [[0, 0.5], [9, 0.0]]


def test_names_and_times_are_text_whatever_they_look_like(tmp_path):
    """YAML would make a date, a number of base 8 and a number of base 60 of them."""
    file = tmp_path / "dated.yaml"
    file.write_text(f"extends: {QUICKSTART.resolve()}\nrun: 2026-11-25\ncluster: {{time: 2:30:00}}\n")
    assert (load_recipe(file).run, load_recipe(file).cluster.time) == ("2026-11-25", "2:30:00")
    typed = load_recipe(
        file, ["run=007", "cluster.time=1:30:00", "cluster.account=1234", "init_from=null", "cluster.setup=[a b]"]
    )
    assert (typed.run, typed.cluster.time, typed.cluster.account, typed.init_from) == ("007", "1:30:00", "1234", None)
    assert typed.cluster.setup == ["a b"]  # no text, though made of it
    file.write_text(dump_recipe(typed))
    assert load_recipe(file) == typed


def test_one_override_is_no_list_of_them():
    with pytest.raises(UserError, match=r"overrides: 'train.steps=3' is no list; valid: \['train.steps=3'\]"):
        load_recipe(QUICKSTART, "train.steps=3")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("extends: absent.yaml", "cannot read this recipe, which"),
        ("extends: bad.yaml", "extends itself"),
        ("a: [1", "not valid YAML"),
        ("run: a\nrun: b", "'run' stands twice"),
        ("- 1", "a recipe is a mapping"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, text, expected):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=expected) as error:
        load_recipe(tmp_path / "bad.yaml")
    assert "bad.yaml" in str(error.value)


def test_recipes_near_a_wrong_path_are_told(tmp_path):
    for path, told in (
        (ROOT / "recipes/quickstrat", f"did you mean {QUICKSTART}?"),
        (ROOT / "recipes", f"valid: a file, such as {ROOT}/recipes/3xl_16e.yaml"),
        (tmp_path, "valid: a file, such as recipes/quickstart.yaml"),
    ):
        with pytest.raises(UserError) as error:
            load_recipe(path)
        assert str(error.value).endswith(told)
