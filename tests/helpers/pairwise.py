"""Combinations in which every two values of different parameters meet, in place of the
complete product.

    @pairwise({"stage": [0, 1, 2, 3], "dtype": ["fp32", "bf16"], "offload": [False, True]})
    def test_it(stage, dtype, offload): ...

8 tests where the product has 16. Which ones, and their order, depends on the argument
alone.
"""

import itertools

import pytest


def pairwise(parameters, valid=lambda **case: True):
    """Parametrize a test with cases that hold every pair of values, of all that
    `valid(**case)` accepts.
    """
    return pytest.mark.parametrize(
        list(parameters),
        [
            pytest.param(*case.values(), id=_name(case))
            for case in pairwise_cases(parameters, valid)
        ],
    )


def pairwise_cases(parameters, valid=lambda **case: True):
    """The same cases, as dicts.

    Greedy: the next case is the one of the product with the most pairs that no earlier case
    has; the first of equals.
    """
    product = [
        dict(zip(parameters, values, strict=True))
        for values in itertools.product(*parameters.values())
    ]
    candidates = [case for case in product if valid(**case)]
    pairs_of = [_pairs(case, parameters) for case in candidates]
    missing = set().union(*pairs_of)
    chosen = []
    while missing:
        best = max(
            range(len(candidates)), key=lambda number: len(pairs_of[number] & missing)
        )
        chosen.append(candidates[best])
        missing -= pairs_of[best]
    return chosen


def _pairs(case, parameters):
    """Every two (parameter, position of its value); the single one, where there is one
    parameter.

    Positions, as a value need not be hashable.
    """
    settings = [
        (name, list(parameters[name]).index(value)) for name, value in case.items()
    ]
    return set(itertools.combinations(settings, min(2, len(settings))))


def _name(case):
    """A test id such as "stage=3-bf16-offload": a string stands for itself, True for
    its parameter, False for nothing."""
    words = []
    for name, value in case.items():
        if isinstance(value, bool):
            words += [name] if value else []
        elif isinstance(value, str):
            words.append(value)
        else:
            words.append(f"{name}={getattr(value, '__name__', value)}")
    return "-".join(words) or "none"
