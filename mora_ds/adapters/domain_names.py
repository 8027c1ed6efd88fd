"""How domains may be called, and which squares of a run with domains are not trained."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from mora_ds.errors import UserError, nearest

SHARED = "shared"
"""Stands for the shared square alone where a domain is named, so that no domain may be called that."""


class Freeze(str, Enum):
    """Which squares of a run with domains are kept as they are."""

    NONE = "none"
    SHARED = "shared"
    DOMAINS = "domains"


def check_domains(domains: Sequence[str], freeze: str) -> None:
    """Raises `UserError` for names that are not one a domain, and for what is not to be frozen."""
    if len(set(domains)) < len(domains) or SHARED in domains:
        raise UserError(
            f"--domain_adapters: each domain needs a name of its own, and {SHARED!r} is the shared square's; "
            f"got {', '.join(domains)}"
        )
    if unfit := {".", ".."} & set(domains):
        raise UserError(f"--domain_adapters: {min(unfit)!r} is no name of a domain: each has its model's folder")
    kinds = [kind.value for kind in Freeze]
    if freeze not in kinds:
        raise UserError(f"unknown --freeze {freeze!r}; known: {', '.join(kinds)}.{nearest(freeze, kinds)}")
    if freeze != Freeze.NONE.value and not domains:
        raise UserError(f"--freeze {freeze} is for --domain_adapters")
