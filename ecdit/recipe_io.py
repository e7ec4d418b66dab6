"""Reads recipes from YAML: `extends`, `key=value` overrides, and errors that name the key."""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ecdit.errors import UserError
from ecdit.recipe import Recipe


def _resolvers() -> Iterator[tuple[str, list[tuple[str, re.Pattern]]]]:
    """YAML's, by the first letter of what they know, but for dates, and numbers with colons."""
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items():
        known = [(tag, pattern) for tag, pattern in known if not tag.endswith(":timestamp")]
        yield first, [(tag, re.compile(rf"(?!.*:)(?:{pattern.pattern})", pattern.flags)) for tag, pattern in known]


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-4 is a number, 2026-11-25 a name, 12:30:00 a time and not 45000, and a key that
    stands twice is a mistake."""

    yaml_implicit_resolvers: ClassVar = dict(_resolvers())

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file, what it extends, and `key=value` overrides such as `train.steps=100`.

    Raises UserError for a file, key or value that is wrong, naming it and what would be valid.
    """
    if isinstance(overrides, str):
        raise UserError(f"overrides: {overrides!r} is no list; valid: [{overrides!r}]")
    values = _read(Path(path), ())
    for override in overrides:
        _override(values, override)
    recipe = parse_recipe(values, str(path))
    if recipe.train.precision == "fp64":
        raise UserError(
            f"{path}: train.precision: fp64 is for `ecdit sample` and `ecdit evaluate` on a run; try fp32 or bf16"
        )
    return recipe


def change_recipe(recipe: Recipe, overrides: Sequence[str], source: str) -> Recipe:
    """The recipe with `key=value` overrides. Raises UserError as `load_recipe` does."""
    values = recipe.model_dump(mode="json")
    for override in overrides:
        _override(values, override)
    return parse_recipe(values, source)


def parse_recipe(values: dict[str, Any], source: str) -> Recipe:
    """Checks plain values against the schema. Raises UserError with one line for each mistake."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        lines = [_explain(detail) for detail in error.errors()]
        raise UserError("\n".join([f"{source} is no valid recipe:", *(f"  {line}" for line in lines)])) from None


def dump_recipe(recipe: Recipe) -> str:
    """The recipe, every key resolved, as YAML that `load_recipe` reads back to the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=100)


def keys(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a recipe, sections included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{prefix}{name}.")


def _read(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in chain:
        raise UserError(f"{path}: extends itself, through {' -> '.join(str(p) for p in chain)}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        near = _recipes_near(path) if isinstance(error, FileNotFoundError | IsADirectoryError) else ""
        where = f", which {chain[-1]} extends" if chain else ""
        raise UserError(f"{path}: cannot read this recipe{where}: {error.strerror}{near}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys to values, found {type(values).__name__}")
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise UserError(f"{path}: extends: {base!r} is no file name")
    return _merge(_read(path.parent / base, (*chain, path.resolve())), values)


def _recipes_near(path: Path) -> str:
    """What may have been meant: the recipe of a run's folder, or files with nearly this name."""
    if path.is_dir():
        return f"; valid: a file, such as {_example(path)}"
    names = [file.name for file in sorted(path.parent.glob("*.yaml"))]
    near = difflib.get_close_matches(path.with_suffix(".yaml").name, names, n=3)
    return f"; did you mean {' or '.join(str(path.parent / name) for name in near)}?" if near else ""


def _example(folder: Path) -> Path:
    return next(iter(sorted(folder.glob("*.yaml"))), Path("recipes/quickstart.yaml"))


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both else value
    return merged


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override!r}: an override has the form key=value, such as train.steps=100")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise UserError(f"{override!r}: the value is not valid YAML") from None
    if value is not None and not isinstance(value, str) and _is_text(key):
        value = text  # run=007 names a run
    *sections, last = key.split(".")
    here: Any = values
    for section in sections:
        here = _descend(here, section, override)
    if isinstance(here, list):
        here[_index(here, last, override)] = value
    else:
        here[last] = value


def _descend(here: Any, section: str, override: str) -> Any:
    if isinstance(here, list):
        return here[_index(here, section, override)]
    if not isinstance(here.setdefault(section, {}), dict | list):
        raise UserError(f"{override!r}: {section} is a value, not a section")
    return here[section]


def _index(items: list, text: str, override: str) -> int:
    if not text.isdecimal() or int(text) >= len(items):
        raise UserError(f"{override!r}: {text} is no place in a list of {len(items)}; valid: 0 to {len(items) - 1}")
    return int(text)


def _explain(detail: dict[str, Any]) -> str:
    """One pydantic error as a sentence. Rules of ours say `@key: ...`, relative to the section they stand in."""
    place = [str(part) for part in detail["loc"] if not str(part).startswith(("list[", "float", "constrained-"))]
    path = ".".join(place)
    message = detail["msg"].removeprefix("Value error, ")
    if message.startswith("@"):
        return ".".join([*place, message[1:]])
    if detail["type"] == "extra_forbidden":
        return f"{path}: unknown key{_nearest(path)}"
    if detail["type"] == "missing":
        return f"{path}: this key is needed{_description(place)}"
    if detail["type"] == "string_type" and isinstance(detail["input"], bool | int | float):
        return f"{path}: {detail['input']} is no text here; put it in quotes{_description(place)}"
    return f"{path}: {detail['input']!r} is not valid: {message[0].lower()}{message[1:]}{_description(place)}"


def _nearest(path: str) -> str:
    known = list(keys())
    near = difflib.get_close_matches(path, known, n=1, cutoff=0.75)
    last = path.rsplit(".", 1)[-1]
    near = near or [key for key in known if key.rsplit(".", 1)[-1] == last][:1]
    near = near or difflib.get_close_matches(path, known, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]}?"
    section = path.rpartition(".")[0]
    siblings = [key for key in known if key.rpartition(".")[0] == section]
    return f"; valid here: {', '.join(siblings)}" if siblings else ""


def _field(place: list[str]) -> FieldInfo | None:
    model: Any = Recipe
    field = None
    for part in place:
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            return None
        model = field.annotation
    return field


def _description(place: list[str]) -> str:
    field = _field(place)
    return f" ({field.description.rstrip('.')})" if field else ""


def _is_text(key: str) -> bool:
    field = _field(key.split("."))
    kind = field.annotation if field else None
    return kind is str or (isinstance(kind, UnionType) and str in get_args(kind))
