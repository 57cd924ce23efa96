"""placeholder"""
def demo() -> None:
    """."""
