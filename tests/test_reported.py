"""The papers' figures: each with its source, in one piece, and where they were read twice, the same."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from scrimp.reported import PERPLEXITY, REPORTED, TOKENS, reported


def test_every_figure_has_a_source_and_is_a_number() -> None:
    assert len(REPORTED) > 100
    for entry in REPORTED:
        assert entry.source, entry
        assert entry.method == entry.method.lower(), entry
        assert math.isfinite(entry.value) and entry.value > 0, entry
        assert entry.model and entry.metric, entry


@pytest.mark.parametrize(
    ("method", "model", "value", "memory"),
    [
        ("adamw", "60M", 34.06, "0.36G"),
        ("galore", "60M", 34.88, "0.24G"),
        ("galore", "1B", 15.64, "4.38G"),
        ("fira", "350M", 16.85, None),
        ("apollo-mini", "130M", 23.53, "0.25G"),
        ("galore-8bit", "7B", 14.65, "18G"),
    ],
)
def test_a_method_s_first_perplexity_of_a_size_is_its_main_table_s(
    method: str, model: str, value: float, memory: str | None
) -> None:
    first = next(e for e in reported(method) if e.metric == PERPLEXITY and e.model == model)
    assert (first.value, first.memory) == (value, memory)
    assert first.tokens == TOKENS[model]


def test_no_figure_stands_there_twice() -> None:
    keys = Counter((e.method, e.model, e.metric, e.setup, e.source) for e in REPORTED)
    assert [key for key, count in keys.items() if count > 1] == []


def test_a_perplexity_and_its_logarithm_are_not_mixed_up() -> None:
    for entry in REPORTED:
        if "perplexity" in entry.metric:
            assert (entry.value < 5) == ("log" in entry.metric), entry


def test_what_no_paper_was_read_on_is_absent() -> None:
    assert reported("frugal") == ()
    assert reported("no such method") == ()


def test_as_plain_data_it_is_what_a_suite_s_document_holds() -> None:
    plain = reported("galore")[0].plain()
    assert list(plain) == ["model", "metric", "value", "memory", "tokens", "device", "setup", "source"]
