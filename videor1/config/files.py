"""Finding YAML files of options and shipped recipes, and reading them into checked values."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from videor1.config.fields import SHORTHANDS, Option, type_error, unknown_option
from videor1.errors import ConfigError

RECIPES = Path(__file__).parents[1] / "configs"


def flat_tree(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of each option in the parsed contents of a YAML file, without checking them."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat_tree(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def find_config(name: str, options: dict[str, Option]) -> Path:
    """Return the path of a YAML file, or of the shipped recipe of this name.

    Raises:
        ConfigError: there is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    recipe = RECIPES / f"{name.removesuffix('.yaml')}.yaml"
    if Path(name).name == name and recipe.is_file():
        return recipe
    reason = "it is a folder" if path.is_dir() else "no such file"
    recipes = recipe_names(options)
    names = f" or a recipe's name ({', '.join(recipes)})" if recipes else ""
    raise ConfigError(f"--config {name}: {reason}; give a YAML file{names}")


def compat_recipe(compat: str) -> Path:
    """Return the path of the shipped recipe that a value of ``compat`` stands for."""
    return RECIPES / f"{compat.replace('-', '_')}.yaml"


def recipe_names(options: Iterable[str]) -> list[str]:
    """Return the sorted names of the shipped recipes that use only these options."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml") if _recipe_options(path) <= set(options))


@functools.cache
def _recipe_options(path: Path) -> set[str]:
    """Return the dotted names of the options that a recipe sets."""
    return {name for name, _ in flat_tree(yaml.safe_load(path.read_text(encoding="utf-8")))}


def read_yaml(path: Path, parser: ArgumentParser, options: dict[str, Option]) -> dict[str, Any]:
    """Read a YAML file of options into checked values by dotted name.

    Raises:
        ConfigError: the file cannot be read or is not valid YAML, or an option in it is unknown, given twice or of
            another type; the message names the line.
    """
    values: dict[str, Any] = {}
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if root is None or _is_null(root):
        return values
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: expected options as name: value lines, got {_source(loader, root)!r:.60}")
    sections = {option.section for option in options.values()} - {""}
    for name, node in _leaves(loader, root, "", sections):
        where = f"{path}:{node.start_mark.line + 1}"
        name = SHORTHANDS[name] if SHORTHANDS.get(name) in options else name
        if name in sections:
            raise ConfigError(f"{where}: {name}: expected a mapping of its options, got {_source(loader, node)}")
        if name not in options:
            raise ConfigError(f"{where}: {unknown_option(name, options)}")
        if name in values:
            raise ConfigError(f"{where}: {name} is given twice")
        try:
            values[name] = _yaml_value(loader, node, options[name], parser)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
    return values


def _leaves(
    loader: yaml.SafeLoader, mapping: yaml.MappingNode, prefix: str, sections: set[str]
) -> Iterator[tuple[str, yaml.Node]]:
    """Yield (dotted name, node) of each value in a mapping and in the mappings of its sections."""
    loader.flatten_mapping(mapping)  # resolve YAML's << merge keys
    for key, value in mapping.value:
        name = prefix + str(key.value)
        if name in sections and isinstance(value, yaml.MappingNode):
            yield from _leaves(loader, value, f"{name}.", sections)
        elif not (name in sections and _is_null(value)):  # an empty section, its lines commented out, is allowed
            yield name, value


def _yaml_value(loader: yaml.SafeLoader, node: yaml.Node, option: Option, parser: ArgumentParser) -> Any:
    """Return the value of a YAML node as an option's type. Raises ConfigError for a value of another type."""
    if _is_null(node):
        if not option.nullable:
            raise ConfigError(type_error(option, "null"))
        return None
    if isinstance(node, yaml.ScalarNode) and option.takes_text and not option.choices:
        return node.value  # text stays as written: YAML would read "run_name: 2024" as a number
    value = node.value if isinstance(node, yaml.ScalarNode) and option.choices else _construct(loader, node)
    if isinstance(node, yaml.ScalarNode) and option.is_list:
        value = [part.strip() for part in node.value.split(",") if part.strip()]
    try:
        return parser.parse_object({option.name: value}, defaults=False)[option.name]
    except argparse.ArgumentError:
        raise ConfigError(type_error(option, _source(loader, node))) from None


def _construct(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    """Return the Python value of a YAML node. Raises ConfigError where it has none."""
    try:
        return loader.construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"not valid YAML: {getattr(error, 'problem', None) or error}") from None


def _source(loader: yaml.SafeLoader, node: yaml.Node) -> str:
    """Return the text of a YAML node for an error message."""
    return node.value if isinstance(node, yaml.ScalarNode) else str(_construct(loader, node))


def _is_null(node: yaml.Node) -> bool:
    return node.tag == "tag:yaml.org,2002:null"
