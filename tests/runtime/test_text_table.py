"""Tables in plain text."""

from layerwise.runtime.text_table import aligned


def test_columns_align_at_their_left_or_right_and_no_line_ends_in_spaces():
    rows = [["name", "count", "note"], ["a", "7", "first"], ["longer", "1000", ""]]
    assert aligned(rows, right=[1]) == ["name    count  note", "a           7  first", "longer   1000"]
    assert aligned(rows)[1] == "a       7      first"
