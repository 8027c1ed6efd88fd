"""Names of domains: what the adapter's config says of them."""

from collections.abc import Iterator, Sequence

from mora_ds.common.errors import validation_errors_of
from mora_ds.common.untrusted import file_name

SHARED = "shared"
"""Name of the MoRA matrix that all domains share; no domain may have it."""


def domain_validation_errors(domains: Sequence[str]) -> Iterator[str]:
    """One message for each thing that is wrong with the names."""
    if len(set(domains)) < len(domains) or SHARED in domains:
        yield (
            f"research.domain_adapters: each domain needs a different name, and {SHARED!r} stands for the shared MoRA "
            f"matrix; got {', '.join(domains)}"
        )
    if unfit := [name for name in domains if validation_errors_of(file_name, name)]:
        yield f"research.domain_adapters: {unfit[0]!r} cannot be a domain's name, which is also the name of a folder"
