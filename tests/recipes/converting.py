"""A training of another tool, written and converted."""

from pathlib import Path

from sfumato.interop.recipes import convert

TEDDY = Path(__file__).resolve().parents[2] / "datasets/teddy-bear"
BASE = "--pretrained_model_name_or_path"


def written(path, text):
    path.write_text(text)
    return path


def converted(home, text, name="train.sh"):
    """(told, usual, notes) of a file with this text: the options of its two parts."""
    training = convert(written(home / name, text), home / "mine-images.toml")
    return training.recipe.told, training.recipe.usual, training.notes
