"""One MoRA matrix for each domain, added to the shared one: which row of a batch uses
which, and their product.

    y_b = W0 x_b + decompress(M compress(x_b)) + decompress(M_k compress(x_b))      k: the domain of row b

The matrices of the rows are selected by a product with a one-hot matrix. That is exact,
and the gradient of M_k is the sum over its rows, zero where there is none, without
atomic additions, so that it has the same bits every time.

Shape legend:  K = domains, B = rows, D = d_in, O = d_out, R = r_hat.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mora_ds.adapters.layer import MoRALinear
from mora_ds.adapters.ops.index_tables import tables_of
from mora_ds.adapters.ops.linear import Compute
from mora_ds.adapters.ops.mora import OperatorSpec, compress, decompress
from mora_ds.common.errors import RunError, UserError, unknown

OWN = "domain_mora_matrices"
"""Name of the parameter (K, r_hat, r_hat) of the domains' matrices, in files too."""


class DomainLinear(MoRALinear):
    """`MoRALinear` with another tensor, `domain_mora_matrices` (K, r_hat, r_hat)."""

    domain_mora_matrices: nn.Parameter
    own_spec: OperatorSpec
    """The spec of `domain_mora_matrices`; `spec`, of the shared matrix, changes with
    merges."""

    def __init__(
        self,
        base: Any,
        spec: OperatorSpec,
        domains: Domains,
        dropout: float,
    ) -> None:
        """All matrices are zero at first."""
        super().__init__(base, spec, dropout, Compute.ACTIVATION)
        self.domains = domains
        self.own_spec = spec
        self._own_held: object = None
        mora_matrices = self.mora_matrix.data.new_zeros(
            len(domains.names), *self.mora_matrix.shape
        )
        self.register_parameter(OWN, nn.Parameter(mora_matrices))

    def forward(self, x: Tensor) -> Tensor:
        choice = self.domains.choice(x)
        if choice is None:
            if self.training:
                raise RunError(
                    "training needs the domain of each row: call mora_ds.domains_of(model).set([...]) first"
                )
            return super().forward(x)
        if not torch.compiler.is_compiling():
            self._own_held = tables_of(self.own_spec, x.device)
        row_mora_matrices = mora_matrices_of_rows(
            self.domain_mora_matrices.to(x.dtype), choice
        )
        rows = x.reshape(len(choice), -1, self.in_features)
        rows = nn.functional.dropout(rows, self.dropout, self.training)
        y = super().forward(x)
        return y + update_rows(self.own_spec, row_mora_matrices, rows).view(
            *x.shape[:-1], -1
        )


def domain_layers(model: nn.Module) -> dict[str, DomainLinear]:
    """Module name -> layer with domains, in the model's order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, DomainLinear)
    }


def domains_of(model: nn.Module) -> Domains:
    """The object that the layers of a model ask for domains; no names where it has
    none."""
    return next((layer.domains for layer in domain_layers(model).values()), Domains(()))


class Domains:
    """The domains of a model and of each row of its batch: one object for all layers.

    Not a context variable, as with gradient checkpointing layers ask again in backward,
    maybe on another thread. It is set before a forward, and must not change until the
    backward has ended.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._choice: Tensor | None = None
        self._same_for_all = False

    def set(self, rows: Sequence[str]) -> None:
        """Sets the domain of each of the B rows of the next batches. Raises `UserError`
        for an unknown domain."""
        self._choice = self._one_hot(rows)
        self._same_for_all = False

    def set_all(self, domain: str | None) -> None:
        """Sets one domain for all rows of any batch; None for none, so that the shared
        matrix acts alone. Raises `UserError` for an unknown domain."""
        self._choice = None if domain is None else self._one_hot([domain])
        self._same_for_all = True

    @contextmanager
    def using(self, domain: str | None) -> Iterator[None]:
        """`set_all` within the context; afterwards the setting from before."""
        before = self._choice, self._same_for_all
        self.set_all(domain)
        try:
            yield
        finally:
            self._choice, self._same_for_all = before

    @contextmanager
    def of_rows(self, rows: Sequence[str]) -> Iterator[None]:
        """`set` within the context, in which backward must end: gradient checkpointing
        reads the rows again. A model without domains reads none."""
        if self.names:
            self.set(rows)
        try:
            yield
        finally:
            self.set_all(None)

    def choice(self, x: Tensor) -> Tensor | None:
        """(B, K), 1 where a row of x (B, ..., D) belongs to a domain; (1, K) where all
        rows belong to one; None for no domain.

        Raises `RunError` where x does not have the rows whose domains are set.
        """
        if self._choice is None:
            return None
        if not self._same_for_all and (x.dim() < 3 or len(x) != len(self._choice)):
            raise RunError(
                f"domains are set for {len(self._choice)} rows, but a layer reads {tuple(x.shape)}: leave layers that "
                "do not see complete rows (experts, a head with --chunked_loss) out of --target_modules"
            )
        # Kept as moved: the next layer finds it on its device
        self._choice = self._choice.to(x.device, x.dtype, non_blocking=True)
        return self._choice

    def _one_hot(self, rows: Sequence[str]) -> Tensor:
        """(B, K) fp32."""
        for domain in rows:
            if domain not in self.names:
                raise UserError(unknown("domain", domain, self.names))
        one_hot = [[float(domain == name) for name in self.names] for domain in rows]
        return torch.tensor(one_hot)


def mora_matrices_of_rows(mora_matrices: Tensor, choice: Tensor) -> Tensor:
    """(K, R, R), (B, K) -> (B, R, R): the matrix of each row, or zeros."""
    return (choice @ mora_matrices.flatten(1)).unflatten(1, mora_matrices.shape[1:])


def update_rows(spec: OperatorSpec, mora_matrices: Tensor, x: Tensor) -> Tensor:
    """decompress(M_b compress(x_b)) with a matrix for each row: mora_matrices (B, R, R), x
    (B, ..., D) -> (B, ..., O)."""
    z = compress(spec, x)
    return decompress(spec, torch.bmm(z.flatten(1, -2), mora_matrices.mT).view(z.shape))
