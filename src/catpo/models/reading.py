"""Which samples are about the same pictures, and what they have in common to be read once."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from catpo.core.errors import UserError
from catpo.core.types import Sample
from catpo.models import memory
from catpo.models.attention.recorder import check_implementation
from catpo.models.branches import Branch, Writing, write
from catpo.models.forest import FIRST_PROMPT, Forest, Tree, tree_of
from catpo.models.views import View

if TYPE_CHECKING:
    from catpo.models.family import Family

Group = list[int]
"""Numbers of samples about the same pictures."""


def can_share(family: Family) -> bool:
    """Whether the family's prompts may share a beginning, and its attention takes the masks for it."""
    if not family.shares_prefix or family.needs_check:
        return False
    try:
        check_implementation(family.text_config._attn_implementation)
    except UserError:  # kernels without masks
        return False
    return True


def batches(samples: Sequence[Sample], most: int, texts: Sequence[str] = (), *, per_place: int = 1) -> Iterator[list[Group]]:
    """Groups of together at most `most` samples, in the order in which their pictures first come up.

    So many samples of one group as `per_place` says count as one. A group is kept in one batch where it fits. With `texts`,
    the groups with the longest come first, and of a group those with the same text stand together.
    """
    by_pictures: dict[Hashable, Group] = {}
    for number, sample in enumerate(samples):
        by_pictures.setdefault(_pictures(sample) or number, []).append(number)
    found: list[Group] = []
    for group in by_pictures.values():
        if texts:
            group.sort(key=lambda number: texts[number])  # stable
        count = -(-len(group) // most)
        size = -(-len(group) // count)
        found += [group[start : start + size] for start in range(0, len(group), size)]
    if texts:
        found.sort(key=lambda group: (-max(len(texts[number]) for number in group), group))
    batch: list[Group] = []
    for group in found:
        if batch and sum(-(-len(each) // per_place) for each in (*batch, group)) > most:
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch


def _pictures(sample: Sample) -> tuple[Hashable, ...]:
    """Equal for samples with the same pictures."""
    return tuple(picture.source for picture in sample.images)


@dataclass(frozen=True)
class Reading:
    """A group's prompts as a tree, and its answers."""

    group: Group
    tree: Tree
    branches: list[Branch]
    """Each sample's answer, which is still to be written."""
    beside: Tree | None = None
    """The tree with a view of the pictures."""


def forest_of(family: Family, readings: Sequence[Reading]) -> Forest:
    """The trees of groups, read."""
    return Forest(family, [each.tree for each in readings], [each.beside for each in readings if each.beside is not None])


def read(
    family: Family, samples: Sequence[Sample], texts: Sequence[str], group: Group, view: View | None = None
) -> Reading | None:
    """The group's prompts as a tree, or None if they cannot share their beginning.

    Raises:
        UserError: the processor refuses a picture, or a prompt is longer than what the model reads; names the sample.
    """
    first_with: dict[str, int] = {}
    for number in group:
        first_with.setdefault(texts[number], number)
    pictures = [picture.open() for picture in samples[group[0]].images]
    once = _looking_once(family)
    prompts = []
    for text, number in first_with.items():
        name = f"sample {samples[number].id}"
        prompts.append(once.encode_prompt(text, pictures, name=name))
        family.check_positions(len(prompts[-1].prompt_ids), name)
    tree = tree_of(family, prompts)
    if tree is None:
        return None
    places = {text: place for place, text in enumerate(first_with)}
    branches = []
    for number in group:
        place = places[texts[number]]
        branches.append(Branch(prompts[place].prompt_ids, number, FIRST_PROMPT + place))
    beside = None if view is None else _viewed(family, samples[group[0]], texts[group[0]], tree, view)
    return Reading(group, tree, branches, beside)


def _viewed(family: Family, sample: Sample, text: str, tree: Tree, view: View) -> Tree:
    """The tree with a view of the sample's pictures, which is the same wherever they are."""
    generator = view.generator(*(picture.digest() for picture in sample.images))
    first, *others = tree.prompts
    if view.acts_on == "pixels":
        seen = replace(first, pixels=view.of_pixels(first.pixels, generator))
    else:
        shown = [view.of_picture(picture.open(), generator) for picture in sample.images]
        seen = replace(first, pixels=family.encode_prompt(text, shown, name=f"sample {sample.id}").pixels)
    return replace(tree, prompts=[seen, *others])


def answer(family: Family, readings: Sequence[Reading], writing: Writing, seed: int) -> None:
    """Write the answers to all groups side by side."""
    branches = [each.branches for each in readings]
    doing = f"answering {sum(map(len, branches))} questions at once"
    with memory.explained(doing, family.model, advice=memory.ANSWERING), family.recordable_attention():
        write(forest_of(family, readings), branches, writing, seed)


def _looking_once(family: Family) -> Family:
    """The family with a processor that prepares the first pictures it sees, and gives the same tensors ever after."""
    once = copy.copy(family)
    once.processor = copy.copy(family.processor)
    once.processor.image_processor = _SeenOnce(family.processor.image_processor)
    return once


class _SeenOnce:
    def __init__(self, processor: Any) -> None:
        self._processor, self._made = processor, None

    def __call__(self, *args: Any, **options: Any) -> Any:
        if self._made is None:
            self._made = self._processor(*args, **options)
        return copy.copy(self._made)  # processors take entries out of it

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)
