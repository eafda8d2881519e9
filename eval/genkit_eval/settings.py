"""Options from a YAML file and from a preset, beneath those of the command line."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import typer

from genkit_eval.errors import InputError
from genkit_eval.presets import find_preset

FILE, PRESET = "genkit_eval.config", "genkit_eval.preset"


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; InputError when it cannot be read or is something else."""
    import yaml  # type: ignore[import-untyped]

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError("--config", f"{path} cannot be read ({error.strerror or error})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError("--config", f"{path} is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise InputError("--config", f"{path} holds no mapping of option names to values, such as 'num_samples: 50000'")
    return found


def parameters_of(context: typer.Context) -> dict[str, Any]:
    """Parameters of a command by the key that they have in a file: the long option with underscores, or the argument's name."""
    found = {}
    for parameter in context.command.params:
        long = [opt for opt in parameter.opts if opt.startswith("--")]
        found[long[0][2:].replace("-", "_") if long else str(parameter.name)] = parameter
    return {key: parameter for key, parameter in found.items() if key not in ("help", "config")}


def as_given(path: Path, key: str, value: Any, parameter: Any) -> Any:
    """A value of a file as the command line would have it: a list where an option may be repeated."""
    several = bool(getattr(parameter, "multiple", False)) or parameter.nargs == -1
    values = value if isinstance(value, list) else [value]
    if not getattr(parameter, "is_flag", False) and any(isinstance(one, bool) for one in values):
        raise InputError("--config", f"{path}: {key} is {value!r}, which YAML makes of yes, no, on and off; put it into quotes")
    plain = all(isinstance(one, str | int | float | bool) for one in values)
    if not plain or (isinstance(value, list) and not several):
        wanted = "one value or a list of values" if several else "one value"
        raise InputError("--config", f"{path}: {key} is {value!r}; {wanted} works")
    return values if several else value


def options_of_file(context: typer.Context, path: Path) -> dict[str, Any]:
    """Values by parameter name. InputError for a key that is no option of the command, naming the nearest one."""
    known, found = parameters_of(context), {}
    for key, value in read_yaml(path).items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"it knows {', '.join(known)}"
            raise InputError("--config", f"{path}: {context.info_name} has no option {key!r}; {hint}")
        if value is not None:
            found[str(known[key].name)] = as_given(path, key, value, known[key])
    return found


def _layer(context: typer.Context) -> None:
    """What the command line does not say comes from the file, then from the preset, then from the command's own defaults."""
    known = {parameter.name for parameter in context.command.params}
    preset = {name: value for name, value in context.meta.get(PRESET, {}).items() if name in known}
    context.default_map = {**preset, **context.meta.get(FILE, {})}


def use_file(context: typer.Context, path: Path | None) -> Path | None:
    """Callback of ``--config``, which is looked at before the other options."""
    if path is not None:
        context.meta[FILE] = options_of_file(context, path)
        _layer(context)
    return path


def use_extractor(context: typer.Context, name: str) -> str:
    """Callback of ``--extractor``, which stands before ``--resize``: a preset's resize rules are for its own networks."""
    preset = context.meta.get(PRESET, {})
    if preset.get("extractor", name) != name:
        context.meta[PRESET] = {key: value for key, value in preset.items() if key != "resize"}
        _layer(context)
    return name


def use_preset(context: typer.Context, name: str | None) -> str | None:
    """Callback of ``--preset``, which is looked at after ``--config`` (it may stand in the file) and before the other options."""
    if name is not None:
        context.meta[PRESET] = find_preset(name).options()
        _layer(context)
    return name
