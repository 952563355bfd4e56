"""Quote values and name places of a config in error sentences."""

import re
from collections.abc import Iterable
from typing import Any

LONGEST = 200  # largest number of quoted characters of a value
# two lines of huggingface_hub's messages
VALIDATION = re.compile(r"Class validation error for validator '\w+':\s+\w+: ")
KINDS = {"number": "a number", "integer": "a whole number", "boolean": "true or false", "string": "a text"}
KINDS |= {"array": "a list", "object": "a mapping", "null": "null"}
LIMITS = {"minimum": "at least", "maximum": "at most", "exclusiveMinimum": "above", "exclusiveMaximum": "below"}
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


def schema_fault(validator: str, expected: Any, instance: Any, message: str) -> str:
    """The rest of a sentence that begins with a place, for an error of JSON Schema; message: the library's own."""
    if validator == "type":
        wanted = " or ".join(KINDS[kind] for kind in ([expected] if isinstance(expected, str) else expected))
    elif validator in LIMITS:
        wanted = f"{LIMITS[validator]} {expected}"
    elif validator == "enum":
        wanted = f"{'one of ' if len(expected) > 1 else ''}{', '.join(map(str, expected))}"
    else:
        return f"is wrong: {brief(message)}"
    return f"must be {wanted}. Got {brief(repr(instance))} instead"


def place(path: Iterable[Any]) -> str:
    """The name of a place in a document for sentences: targets.0.sparsity."""
    parts = (part if PLAIN_KEY.fullmatch(part) else brief(repr(part), 60) for part in map(str, path))
    return ".".join(parts) or "the study"
