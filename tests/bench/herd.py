"""x."""


def main(argv: list[str]) -> None:
    """x."""
