"""ai-toolkit's two sliders: `slider`, with targets, and its window's `concept_slider`, with one concept and its images.

Names and defaults are those of SliderConfig and SliderTargetConfig in toolkit/config_modules.py and of
extensions_built_in/concept_slider there.
"""

from __future__ import annotations

import math
from typing import Any

from sfumato.errors import ConfigError
from sfumato.recipes.asked import Asked, Recipe

KINDS = frozenset(("slider", "concept_slider"))
"""Types of its processes that train a slider."""
_STRENGTH = 3.0
"""Of a concept_slider that says none."""
_IDLE = frozenset(("batch_full_slide", "low_ram", "resolutions"))


def ends(asked: Asked, recipe: Recipe) -> None:
    """What the slider moves, and between which ends. Raises ConfigError for one without ends."""
    if asked.text("type") == "concept_slider":
        _of_one(asked.part("slider"), recipe)
    else:
        _of_targets(asked, recipe)
    if not any(recipe.told.get("more", [])) and not any(recipe.told.get("less", [])):
        raise ConfigError(f"{asked.name}: slider: neither a positive nor a negative prompt is in it; write them.")


def leave_captions(recipe: Recipe) -> None:
    """Take back what is of captions and of text encoders, which a slider does not learn from or train."""
    for option in ("caption_dropout", "train_text_encoder", "text_learning_rate"):
        recipe.usual.pop(option, None)
        if recipe.told.pop(option, None):
            recipe.notes.append(f"{option}: `slider` has the concept as every caption, and trains the U-Net alone")


def _of_one(slider: Asked, recipe: Recipe) -> None:
    recipe.say("concept", [slider.text("target_class") or ""])
    recipe.say("more", [slider.text("positive_prompt") or ""])
    recipe.say("less", [slider.text("negative_prompt") or ""])
    recipe.say("strength", slider.number("guidance_strength"), _STRENGTH)
    if anchor := slider.text("anchor_class"):
        recipe.say("prior_prompts", [anchor])
        recipe.say("prior_weight", slider.number("anchor_strength", 1.0))
    recipe.notes.append(
        "concept_slider: there what is to be predicted gets the mean and deviation of the base's prediction; here it "
        "stays as it is, and a lower --strength keeps contrasts"
    )


def _of_targets(asked: Asked, recipe: Recipe) -> None:
    slider = asked.part("slider")
    targets = _parts(slider, "targets")
    recipe.say("concept", [str(each.get("target_class") or "") for each in targets])
    recipe.say("more", [str(each.get("positive") or "") for each in targets])
    recipe.say("less", [str(each.get("negative") or "") for each in targets])
    for key, usual in (("weight", 1), ("multiplier", 1), ("shuffle", False)):
        if any(each.get(key, usual) != usual for each in targets):
            recipe.notes.append(f"{key} of its targets: has no counterpart; all count alike, as they are written")
    anchors = _parts(slider, "anchors")
    recipe.say("prior_prompts", [str(each["prompt"]) for each in anchors if each.get("prompt")] or None)
    if any(each.get("neg_prompt") or each.get("multiplier", 1) != 1 for each in anchors):
        recipe.notes.append("anchors: their neg_prompt and multiplier have no counterpart; --prior-weight is of all")
    sizes = [each for each in slider.get("resolutions", []) if isinstance(each, list) and len(each) == 2]
    if sizes:
        sides = [slider.as_whole("resolutions", side) for side in sizes[0]]
        recipe.say("resolution", round(math.sqrt(sides[0] * sides[1])))
        if len(sizes) > 1 or sides[0] != sides[1]:
            recipe.notes.append(f"resolutions = {sizes}: images are squares with as many pixels as the first")
    slider.taken |= _IDLE
    asked.part("train").values.pop("max_denoising_steps", None)  # of drawing what it learns on


def _parts(slider: Asked, key: str) -> list[dict[str, Any]]:
    found = slider.get(key, [])
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []
