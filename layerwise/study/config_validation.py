"""Validate a config by its schema, in sentences, and fill in the defaults."""

from collections.abc import Mapping
from typing import Any, cast

import jsonschema
import yaml

from layerwise.runtime.errors import InputError
from layerwise.runtime.project import ROOT
from layerwise.runtime.sentences import brief, place, schema_fault
from layerwise.study import config_file
from layerwise.study.cell import canonical, plain

SCHEMA = yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text("utf-8"))
TEXT_USERS = ("calibration", "evaluation")  # sections of the config whose entries name a text


def validate(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with defaults filled in; raises InputError with one sentence that names the place and the expected
    value."""
    config_file.check(config)
    errors = sorted(jsonschema.Draft202012Validator(SCHEMA).iter_errors(config), key=lambda e: list(map(str, e.path)))
    if errors:
        raise InputError(_sentence(errors[0]))
    full = _with_defaults(plain(config), SCHEMA)  # JSON Schema accepts 4.0 as an integer, labels do not
    for kind in TEXT_USERS:
        for name, entry in full[kind].items():
            if entry["text"] not in full["texts"]:
                known = ", ".join(full["texts"])
                raise InputError(f"config: {kind}.{name}.text names {entry['text']!r}; the texts are {known}.")
    return full


def _sentence(error: jsonschema.ValidationError) -> str:
    where, instance = place(error.absolute_path), cast(Any, error.instance)
    expected = cast(Any, error.validator_value)
    if "propertyNames" in error.absolute_schema_path:
        name = brief(repr(instance))
        return f"config: {where}: the name {name} is wrong; names are letters, digits, '.', '_', '-'."
    if error.validator == "oneOf" and "required" in canonical(expected):
        choices = " or ".join("+".join(choice["required"]) for choice in expected)
        return f"config: {where} must have either {choices}. Got {brief(', '.join(instance)) or 'nothing'} instead."
    if error.validator == "type" and isinstance(instance, str) and _is_number(instance):
        advice = f"; YAML reads {instance} as text: write {float(instance)!r}"
    elif error.validator == "type" and where.endswith(".pattern") and isinstance(instance, int):
        advice = '; YAML reads 2:4 without quotes as a number: write "2:4"'
    else:
        advice = ""
    return f"config: {where} {schema_fault(error)}{advice}."


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _with_defaults(value: Any, schema: Mapping[str, Any]) -> Any:
    if "$ref" in schema:
        return _with_defaults(value, SCHEMA["$defs"][schema["$ref"].rsplit("/", 1)[1]])
    if not isinstance(value, Mapping):
        return value
    properties = schema.get("properties", {})
    others = schema.get("additionalProperties") or {}
    full = {key: _with_defaults(item, properties.get(key, others)) for key, item in value.items()}
    return {**{key: sub["default"] for key, sub in properties.items() if "default" in sub and key not in full}, **full}
