"""Quote values and name places of a config in error sentences."""

import difflib
import re
from collections.abc import Iterable
from typing import Any

LONGEST = 200  # largest number of quoted characters of a value
# two lines of huggingface_hub's messages
VALIDATION = re.compile(r"Class validation error for validator '\w+':\s+\w+: ")
KINDS = {"number": "a number", "integer": "a whole number", "boolean": "true or false", "string": "a text"}
KINDS |= {"array": "a list", "object": "a mapping", "null": "null"}
LIMITS = {"minimum": "at least", "maximum": "at most", "exclusiveMinimum": "above", "exclusiveMaximum": "below"}
COUNTS = {"minItems": "at least", "minProperties": "at least", "maxItems": "at most", "maxProperties": "at most"}
KEYS = {"properties", "patternProperties"}  # what in a schema names keys
PLAIN_KEY = re.compile(r"[\w.:-]{1,100}")


def brief(text: str, longest: int = LONGEST) -> str:
    """The text in one line; a long text is cut to its beginning and its end, which usually gives the expected value."""
    text = text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text if len(text) <= longest else f"{text[: longest // 2]}...{text[-longest // 2 :]}"


def reason(error: Exception) -> str:
    """The first sentence of a library's message, without its full stop."""
    # A KeyError's text is the repr of the key, or a sentence in quotes.
    text = str(error.args[0]) if isinstance(error, KeyError) and " " in str(error) else str(error)
    lines = [line.strip() for line in VALIDATION.sub("", text).splitlines() if line.strip()]
    return brief((lines[0].split(". ")[0] if lines else type(error).__name__).rstrip(".:!"))


def schema_fault(error: Any) -> str:
    """The rest of a sentence that begins with a place, for an error of jsonschema."""
    validator, expected, instance = error.validator, error.validator_value, error.instance
    if validator == "type":
        wanted = f"be {' or '.join(KINDS[kind] for kind in ([expected] if isinstance(expected, str) else expected))}"
    elif validator in LIMITS:
        wanted = f"be {LIMITS[validator]} {expected}"
    elif validator == "enum":
        wanted = f"be {'one of ' if len(expected) > 1 else ''}{', '.join(map(str, expected))}"
    elif validator in COUNTS:
        wanted = f"have {COUNTS[validator]} {expected} {'entry' if expected == 1 else 'entries'}"
    elif validator == "uniqueItems":
        wanted = "have no entry twice"
    elif validator == "required":
        lacking = next(key for key in expected if key not in instance)
        return f"must have the key {lacking}. Got {brief(', '.join(map(str, instance))) or 'nothing'} instead"
    elif validator == "additionalProperties" and expected is False and set(error.schema) & KEYS == {"properties"}:
        unknown = next(key for key in instance if key not in error.schema["properties"])
        return f"has no key {brief(repr(unknown))}; its keys are {', '.join(error.schema['properties'])}"
    else:
        return f"is wrong: {brief(error.message.splitlines()[0])}"
    return f"must {wanted}. Got {brief(repr(instance))} instead"


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """Words behind a wrong name: the known name that is most like it, if one is."""
    near = difflib.get_close_matches(str(name), list(known), 1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def place(path: Iterable[Any]) -> str:
    """The name of a place in a document for sentences: targets.0.sparsity."""
    parts = (part if PLAIN_KEY.fullmatch(part) else brief(repr(part), 60) for part in map(str, path))
    return ".".join(parts) or "the study"
