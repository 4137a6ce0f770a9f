"""Who judges results: what ``assert_no_worse`` lets pass, and what happens to the rest."""

from __future__ import annotations

import pytest
import torch
from helpers import TooFar, assert_no_worse, not_by_luck

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_errors_that_pass_and_errors_that_do_not(dtype: torch.dtype) -> None:
    exact = {"y": torch.linspace(-1, 1, 101, dtype=torch.float64)}
    ulp = torch.finfo(dtype).eps
    theirs = {"y": (exact["y"] + 10 * ulp).to(dtype)}
    for error, expected in ((18, None), (40, TooFar), (200, AssertionError)):
        ours = {"y": (exact["y"] + error * ulp).to(dtype)}
        if expected is None:
            assert_no_worse(ours, theirs, exact, terms=1)
        else:
            with pytest.raises(expected) as raised:
                assert_no_worse(ours, theirs, exact, terms=1)
            assert type(raised.value) is expected, raised.value


def test_the_worst_of_several_counts() -> None:
    exact = {name: torch.zeros(20, dtype=torch.float64) for name in "abc"}
    theirs = {name: torch.full((20,), 1e-3) for name in "abc"}
    ours = {
        name: torch.full((20,), value) for name, value in zip("abc", (1e-3, 4e-3, 1.0), strict=True)
    }
    with pytest.raises(AssertionError, match="^c: off") as raised:
        assert_no_worse(ours, theirs, exact, terms=1)
    assert type(raised.value) is AssertionError


@pytest.mark.parametrize("off", [{1}, {1, 3}, {1, 3, 4}, {1, 2, 3, 4, 5}], ids=str)
def test_what_is_off_by_little_has_to_be_so_again(off: set[int]) -> None:
    """In two of four more calls, with other numbers."""
    numbers: list[float] = []

    @not_by_luck
    def call(argument: int) -> None:
        numbers.append(torch.rand(()).item())
        if argument in off and len(numbers) in off:
            raise TooFar("y")

    if len(off) > 2:
        with pytest.raises(TooFar):
            call(1)
    else:
        with pytest.warns(UserWarning, match="call, by luck: y"):
            call(argument=1)
    assert len(set(numbers)) == len(numbers) == 5


def test_what_is_wrong_is_not_tried_again() -> None:
    @not_by_luck
    def call() -> None:
        numbers.append(torch.rand(()).item())
        assert len(numbers) != wrong, "wrong"
        raise TooFar("y")

    for wrong in (1, 2):
        numbers: list[float] = []
        with pytest.raises(AssertionError, match="wrong"):
            call()
        assert len(numbers) == wrong
