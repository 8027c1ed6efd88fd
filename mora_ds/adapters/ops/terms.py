"""Updates of merged cycles that a frozen weight does not take up: they go on acting
through their adapter weights.

    W x = W0 x + sum over the terms of update(x)

An `AdditiveTerm` is in the dtype of the run here, and not trained. Over
activations it costs what the current cycle's matrix costs, without that one's gradient;
over the weight (`delta.merge_updates_`) a pass over W.

Shape legend:  O = d_out, D = d_in.
"""

from collections.abc import Iterable

from torch import Tensor

from mora_ds.adapters.ops.spec import AdditiveSpec, AdditiveTerm, Update, additive


def join(updates: Iterable[Update]) -> tuple[AdditiveTerm, ...]:
    """The fewest terms with the same sum, in fp32 (`AdditiveSpec.joined`)."""
    adapter_weights: dict[AdditiveSpec, list[Tensor]] = {}
    for spec, adapter_weight in updates:
        adapter_weights.setdefault(additive(spec), []).append(adapter_weight.float())
    return tuple(spec.joined(of_spec) for spec, of_spec in adapter_weights.items())


def add_terms_(y: Tensor, terms: Iterable[AdditiveTerm], x: Tensor) -> Tensor:
    """y (..., O) + the updates of x (..., D), in place. Without a backward."""
    for spec, adapter_weight in terms:
        spec.add_update_(y, adapter_weight.to(x.dtype), x)
    return y


def add_terms_gradient_(
    g_x: Tensor, terms: Iterable[AdditiveTerm], g: Tensor
) -> Tensor:
    """g_x (..., D) + the transpose of `add_terms_` of g (..., O), in place."""
    for spec, adapter_weight in terms:
        spec.add_input_gradient_(g_x, adapter_weight.to(g.dtype), g)
    return g_x
