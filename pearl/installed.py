"""Versions of the packages that are installed."""

DISTRIBUTION = "pearl-engine"


def installed_version(package: str) -> str | None:
    """None: it is not installed, as PEARL is not where it runs from a checkout alone."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
