"""Names of domains, and which of their MoRA matrices are trained: what the adapter's config says of them."""

from collections.abc import Iterator, Sequence
from enum import Enum

from mora_ds.common.errors import refusal, unknown
from mora_ds.common.untrusted import file_name

SHARED = "shared"
"""Names the MoRA matrix that all domains share where a domain is asked for, so that no domain may have this name."""


class Freeze(str, Enum):
    """Which MoRA matrices are not trained in a run with domains."""

    NONE = "none"
    SHARED = "shared"
    DOMAINS = "domains"


def domain_complaints(domains: Sequence[str], freeze: str) -> Iterator[str]:
    """One message for each field of `MoRAConfig` on domains that is wrong."""
    if len(set(domains)) < len(domains) or SHARED in domains:
        yield (
            f"research.domain_adapters: each domain needs a different name, and {SHARED!r} stands for the shared MoRA "
            f"matrix; got {', '.join(domains)}"
        )
    if unfit := [name for name in domains if refusal(file_name, name, "")]:
        yield f"research.domain_adapters: {unfit[0]!r} cannot be a domain's name, which is also the name of a folder"
    kinds = [kind.value for kind in Freeze]
    if freeze not in kinds:
        yield unknown("research.freeze", freeze, kinds)
    elif freeze != Freeze.NONE.value and not domains:
        yield f"research.freeze {freeze} is for research.domain_adapters"
