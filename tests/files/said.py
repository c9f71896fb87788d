"""What the tests of exact sentences share: the line that a call ends with, and the first module of `two_modules`."""

import pytest

from sfumato.errors import AdapterError, ConfigError, FileError

TO_K = ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k")


def said(work, *given, **more):
    """The line that the call ends with."""
    with pytest.raises((AdapterError, FileError, ConfigError)) as ended:
        work(*given, **more)
    return str(ended.value)
