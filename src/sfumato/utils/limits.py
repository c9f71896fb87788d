"""What numbers may be, wherever they come from: a command, a config, an image's file, or a call. Imports no torch."""

from __future__ import annotations

from sfumato.errors import ConfigError

MAX_ADAPTER_GUIDANCE = 20.0
MAX_SIDE = 8192
"""Of a square image, in pixels."""
MAX_IMAGES_PER_SEED = 100_000
"""Images of --count."""
MAX_CHUNKS = 3
"""Of a prompt that are read, 75 tokens each: of two and of three in one batch there are six, which both go into."""


def checked_steps(steps: int) -> int:
    """Steps of a sampler. Raises ConfigError for none; how many the base takes is its own to say."""
    if steps < 1:
        raise ConfigError(f"{steps} steps; wanted at least 1.")
    return steps


def checked_seed(seed: int) -> int:
    """The seed of a picture's noise. Raises ConfigError for one that torch's generators do not take, and for -1, by
    which other programs mean another one each time."""
    if seed == -1:
        raise ConfigError("seed -1: no seed is drawn by lot here; give a number from 0 on, or leave it out for 0.")
    if not -(2**63) <= seed < 2**64:
        raise ConfigError(f"seed {seed}: wanted a whole number of 64 bits.")
    return seed


def checked_area(width: int, height: int) -> None:
    """The size of an image in pixels. Raises ConfigError for one that no machine draws: a CPU would begin, and end in a
    full memory after minutes."""
    if width * height > MAX_SIDE**2:
        raise ConfigError(
            f"{width}x{height} pixels: wanted at most as many as {MAX_SIDE}x{MAX_SIDE} has, of which 512 to 1024 a "
            "side is usual."
        )


def checked_guidance(guidance: float) -> float:
    """The CFG scale. Raises ConfigError for what cannot be meant."""
    if not 0 <= guidance <= 100:
        raise ConfigError(f"guidance {guidance:g}: wanted 0 to 100; 3 to 9 is usual.")
    return guidance


def checked_adapter_guidance(strength: float) -> float:
    """How often adapters count. Raises ConfigError for what cannot be meant."""
    if not 0 <= strength <= MAX_ADAPTER_GUIDANCE:
        raise ConfigError(
            f"adapter guidance {strength:g}: wanted 0 to {MAX_ADAPTER_GUIDANCE:g}; 2 is usual, 0 is in "
            "both predictions."
        )
    return strength


def checked_density(density: float) -> float:
    """The share of entries that a method of merging keeps. Raises ConfigError for what is no share."""
    if not 0 < density <= 1:
        raise ConfigError(f"density {density:g}: wanted the share of entries to keep, above 0 and at most 1.")
    return density


def truncation_hint(limit: int) -> str:
    """What to say after a text whose end is cut because so many of its tokens are read; nothing where that is most."""
    most = 75 * MAX_CHUNKS
    return f"; --max-tokens {most} reads up to {most}" if limit < most else ""
