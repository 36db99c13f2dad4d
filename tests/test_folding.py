"""Rows of modules that differ in a number are one row."""

from nnsight_eager.folding import folded


def test_numbers_that_follow_one_another_are_folded_where_the_first_was():
    rows = [("embed", "x"), ("h.0", "x"), ("h.0.mlp", "y"), ("h.1", "x"), ("h.1.mlp", "y"), ("head", "x")]
    assert folded(rows) == [("embed", "x"), ("h.0…1", "x"), ("h.0…1.mlp", "y"), ("head", "x")]


def test_a_gap_and_a_difference_are_kept():
    rows = [("h.0", "x"), ("h.1", "x"), ("h.2", "other"), ("h.3", "x"), ("h.5", "x")]
    assert folded(rows) == [("h.0…1", "x"), ("h.2", "other"), ("h.3", "x"), ("h.5", "x")]


def test_numbers_in_two_places_are_folded_where_every_combination_is_there():
    experts = [(f"h.{layer}.experts.{expert}", "x") for layer in range(4) for expert in range(3)]
    assert folded(experts) == [("h.0…3.experts.0…2", "x")]
    assert folded(experts[:-1]) == [("h.0…2.experts.0…2", "x"), ("h.3.experts.0…1", "x")]


def test_the_order_of_the_rows_is_kept_and_the_root_is_a_row():
    assert folded([("1", "x"), ("0", "x"), ("", "x")]) == [("1", "x"), ("0", "x"), ("", "x")]
    assert folded([]) == []
