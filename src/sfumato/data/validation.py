"""Pictures that are not learned from, so that the loss on them says what the learning is worth on others.

Imports no torch.
"""

import hashlib
from dataclasses import replace
from os.path import realpath

from sfumato.data.folder import ExampleSet
from sfumato.data.listing import some
from sfumato.errors import DataError
from sfumato.numerals import pluralize


def hold_out(examples: ExampleSet, share: float) -> ExampleSet:
    """The set with this share of the subject's pictures, at least one unless it is 0, in the group "validation".

    Which ones depends on the names of their files alone, so that another picture changes few of them. A picture that
    several sources name is held out of all. Raises DataError where none would be left to learn from, and
    for a picture that is both learned and held out.
    """
    learned = {realpath(each.path): each.path.name for each in examples if each.group == "instance"}
    held = {realpath(each.path) for each in examples if each.group == "validation"}
    if both := [learned[path] for path in learned if path in held]:
        raise DataError(
            f"{some(both)}: in a source with validation = true and in one that is learned; what is learned says "
            "nothing of others. Name it in one of them."
        )
    if not share:
        return examples
    count = max(1, round(share * len(learned)))
    if count >= len(learned):
        raise DataError(
            f"--validation-split {share:g} of {pluralize(len(learned), 'picture')} leaves none to learn from; give "
            "more pictures, or a smaller share."
        )
    by_lot = sorted(learned, key=lambda path: hashlib.sha256(learned[path].encode("utf-8", "surrogateescape")).digest())
    chosen = set(by_lot[:count])
    moved = tuple(
        replace(each, group="validation") if each.group == "instance" and realpath(each.path) in chosen else each
        for each in examples
    )
    return replace(examples, examples=moved)
