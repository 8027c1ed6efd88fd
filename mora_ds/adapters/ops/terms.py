"""Updates of merged cycles that a frozen weight does not take up: they go on acting
through their values.

    W x = W0 x + sum over the terms of update(x)

An `AdditiveTerm` is in the dtype of the run here, and not trained. Over
activations it costs what the current cycle's matrix costs, without that one's gradient;
over the weight (`delta.merge_updates_`) a pass over W.

Shape legend:  O = d_out, D = d_in.
"""

from collections.abc import Iterable

from torch import Tensor

from mora_ds.adapters.ops.spec import AdditiveSpec, AdditiveTerm, Delta, additive


def join(updates: Iterable[Delta]) -> tuple[AdditiveTerm, ...]:
    """The fewest terms with the same sum, in fp32 (`AdditiveSpec.joined`)."""
    values: dict[AdditiveSpec, list[Tensor]] = {}
    for spec, value in updates:
        values.setdefault(additive(spec), []).append(value.float())
    return tuple(spec.joined(of_spec) for spec, of_spec in values.items())


def add_terms_(y: Tensor, terms: Iterable[AdditiveTerm], x: Tensor) -> Tensor:
    """y (..., O) + the updates of x (..., D), in place. Without a backward."""
    for spec, value in terms:
        spec.add_update_(y, value.to(x.dtype), x)
    return y


def add_terms_gradient_(
    g_x: Tensor, terms: Iterable[AdditiveTerm], g: Tensor
) -> Tensor:
    """g_x (..., D) + the transpose of `add_terms_` of g (..., O), in place."""
    for spec, value in terms:
        spec.add_input_gradient_(g_x, value.to(g.dtype), g)
    return g_x
