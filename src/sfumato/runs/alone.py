"""The one process of a training that `accelerate launch` did not start: what `Processes` is to several."""


class Alone:
    """Has nobody to wait for, or to ask."""

    is_main, count = True, 1

    def wait(self) -> None:
        """Everybody is here."""

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers."""
        return number
