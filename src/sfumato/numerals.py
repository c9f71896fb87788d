"""Numbers as text that is read back as the same number."""


def exact(number: float) -> str:
    """The shortest such text: 7, 0.8, 0.1234567."""
    return repr(float(number)).removesuffix(".0")
