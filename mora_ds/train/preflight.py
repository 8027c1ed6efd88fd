"""Can every row of a batch have a domain of its own in this model? Asked before the first step, by a forward."""

from __future__ import annotations

from typing import Any

import torch

from mora_ds.adapters.domain_layer import domains_of
from mora_ds.errors import RunError, UserError
from mora_ds.models.losses import token_nll


@torch.no_grad()
def check_rows(engine: Any, vocab_size: int) -> None:
    """Raises `UserError` for a model in which an adapted layer does not see whole rows, as `token_nll` runs it.
    Collective: a forward of three short rows on every rank."""
    domains = domains_of(engine.module)
    ids = torch.randint(vocab_size, (3, 8), generator=torch.Generator().manual_seed(0)).to(engine.device)
    engine.eval()
    domains.set([domains.names[0], domains.names[1], domains.names[0]])
    try:
        token_nll(engine, {"input_ids": ids, "position_ids": torch.arange(8).expand_as(ids).to(ids), "labels": ids})
    except RunError as error:
        raise UserError(f"--domain_adapters: {error}") from error
    finally:
        domains.set_all(None)
        engine.train()
