"""Which array is the target: by its name, by codes beside strings, by its values, and whether it holds classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from dtrain_cli.survey.roles import SAMPLE, ArrayFacts, Contents, has_word, is_channel, is_time, space_of, words
from dtrain_cli.survey.values import Look, Values

EXACT = ("label", "labels", "target", "targets", "class", "classes", "y")
"""Names of targets; the first that is there is taken."""
LABEL_WORDS = {"label", "labels", "target", "targets", "class", "classes", "truth", "gt", "outcome", "response"}
CLASS_WORDS = {"label", "labels", "class", "classes"}
MASK_WORDS = {"mask", "masks", "segmentation", "segmentations", "seg", "annotation", "annotations"}
MASK_WORDS |= {"instance", "instances", "nuclei"}
CODE_WORDS = {"code", "codes", "type", "types", "category", "categories", "cluster", "clusters", "species", "diagnosis"}
CODE_WORDS |= {"leiden", "louvain", "celltype"}
ROW_NUMBERS = {"id", "index", "idx", "uuid", "rownames", "rowid", "unnamed"}
"""Names of columns that number the rows."""
BESIDE_STRINGS = "integer codes beside strings"
AS_FLOATS = "floats are a number; store integers to train classes"

MOST_CLASSES, MOST_NAMED_CLASSES = 100, 10_000
"""Integers are classes up to so many; if the name says that they are, up to more."""
FEW_CLASSES = 20
"""More classes need two values each in the sample, or they are numbers of rows."""
MOST_MASK_CLASSES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """An array to predict."""

    array: ArrayFacts
    why: str
    """Why it is taken."""
    classes: int = 0
    """0: it is a number."""
    why_classes: str = ""
    transform: str = ""
    """A function of the model's file that turns stored values into classes."""
    why_transform: str = ""


def find_target(contents: Contents, look: Look, *, guess: bool = True) -> Target | None:
    """Return the array to predict; None if no array is likely to be one, or nothing shares a dimension with it.

    Parameters
    ----------
    contents : Contents
    look : Look
    guess : bool
        Take the last column of a table where nothing says which one is the target.
    """
    for array, why, is_named in _candidates(contents, look):
        others = [other for other in contents.arrays.values() if other is not array and not other.is_coordinate]
        if sample_dim(array, others, contents) or is_one_image(array, others, contents):
            return _with_classes(array, why, contents, look, is_named=is_named)
    last = _last(contents, look) if guess else None
    return (
        None
        if last is None
        else _with_classes(last, "a guess: the last column of numbers", contents, look, is_named=False)
    )


def _candidates(contents: Contents, look: Look) -> Iterator[tuple[ArrayFacts, str, bool]]:
    """Yield arrays that may be the target, likely ones first, why, and True if their names say so."""
    arrays = list(contents.arrays.values())
    by_name = {array.name.lower(): array for array in arrays}
    for name in EXACT:
        if name in by_name:
            yield by_name[name], "chosen by its name", True
    for wanted in (LABEL_WORDS, MASK_WORDS):
        yield from ((array, "chosen by its name", True) for array in arrays if has_word(array.name, wanted))
    yield from ((array, BESIDE_STRINGS, True) for array in arrays if _has_strings(array, contents))
    for array in arrays:
        if array.is_integer and len(array.dims) == 1 and has_word(array.name, CODE_WORDS):
            yield array, "chosen by its name", True
    plain = [array for array in arrays if not array.is_coordinate and not is_row_number(array)]
    yield from ((array, "it has the fewest distinct values", False) for array in _flattest(plain, contents, look))
    for array in plain:
        beside = any(set(array.dims) < set(other.dims) and len(other.dims) > 1 for other in plain)
        is_column = array.is_integer and len(array.dims) == 1 and beside
        if is_column and classes_of(array, look(array.name, closely=True), is_named=False):
            yield array, "integers that look like classes", False


def _last(contents: Contents, look: Look) -> ArrayFacts | None:
    """Return the last of the arrays along the dimension that most of them have: floats without gaps are preferred."""
    plain = [array for array in contents.arrays.values() if not array.is_coordinate and not is_row_number(array)]
    counts = Counter(dim for array in plain for dim in array.dims)
    if not counts:
        return None
    along = max(counts, key=lambda dim: (words(dim)[:1] in [[name] for name in SAMPLE], counts[dim]))
    arrays = [array for array in plain if along in array.dims]
    if len(arrays) < 2:
        return None
    columns = [array for array in arrays if len(array.dims) == 1] or arrays
    numbers = [array for array in columns if array.kind == "f"]
    sound = next((array for array in reversed(numbers) if not look(array.name).missing), None)
    return sound or (numbers or columns)[-1]


def _has_strings(array: ArrayFacts, contents: Contents) -> bool:
    """Return True if integers carry the name of a variable of strings, and a word for codes or nothing more."""
    own = words(array.name)
    codes = {"code", "codes", "id", "ids", "idx", "int", "number", "num", "encoded"}
    pairs = (words(name) for name in contents.strings)
    return (
        array.is_integer
        and len(array.dims) == 1
        and any(set(own) - codes == set(text) - codes and own != text for text in pairs)
    )


def _flattest(plain: list[ArrayFacts], contents: Contents, look: Look) -> list[ArrayFacts]:
    """Return the integers with the fewest distinct values among arrays over the same places: masks of images."""
    images = [array for array in plain if space_of(array, contents)]
    for array in images:
        alike = [other for other in images if space_of(other, contents) == space_of(array, contents)]
        whole = [other for other in alike if other.is_integer]
        if len(alike) > 1 and whole:
            counts = {other.name: len(look(other.name).distinct) for other in whole}
            flattest = min(whole, key=lambda other: counts[other.name])
            if counts[flattest.name] <= MOST_MASK_CLASSES:
                return [flattest]
    return []


def is_row_number(array: ArrayFacts) -> bool:
    """Return True if a column numbers the rows."""
    return len(array.dims) == 1 and array.name.lower() in ROW_NUMBERS


# Classes ----------------------------------------------------------------------------------------------------


def _with_classes(array: ArrayFacts, why: str, contents: Contents, look: Look, *, is_named: bool) -> Target:
    if not array.is_integer:
        return Target(array=array, why=AS_FLOATS if has_word(array.name, CLASS_WORDS) else why)
    values = look(array.name, closely=True)
    if space_of(array, contents):
        return _mask(array, why, values)
    has_marks = why == BESIDE_STRINGS and values.minimum == -1  # as pandas codes a missing category
    classes = int(values.maximum) + 1 if has_marks else classes_of(array, values, is_named=is_named)
    if not classes:
        return Target(array=array, why=why)
    return Target(
        array=array,
        why=why,
        classes=classes,
        why_classes=_counted(array, values, classes),
        transform="model:classes" if has_marks else "",
        why_transform="turns -1, a missing code, into -100, which counts neither in the loss nor in metrics",
    )


def _mask(array: ArrayFacts, why: str, values: Values) -> Target:
    """Return a mask as a target: its values are classes, unless they number objects or say yes and no."""
    top = int(values.maximum) + 1 if values.count else 2
    if values.count and values.minimum < 0:
        return Target(array=array, why=why)
    is_yes_no = len(values.distinct) <= 2 and top > 2
    is_objects = top > MOST_MASK_CLASSES or has_word(array.name, {"instance", "instances"})
    if is_yes_no or is_objects:
        seen = f"values up to {top - 1:,} " + ("number objects" if is_objects else "say yes and no")
        return Target(
            array=array,
            why=why,
            classes=2,
            why_classes=f"{seen}: the class is value > 0",
            transform="model:foreground",
            why_transform="turns values above 0 into class 1",
        )
    top = max(2, top, _stated(array))
    return Target(array=array, why=why, classes=top, why_classes=_counted(array, values, top))


def classes_of(array: ArrayFacts, values: Values, *, is_named: bool) -> int:
    """Return the number of classes of integers: the largest and one; 0 if they are numbers.

    Parameters
    ----------
    array : ArrayFacts
    values : Values
        Of a sample.
    is_named : bool
        True if the name says that they are classes.
    """
    if array.stored == "b":
        return 2
    stated = _stated(array)
    if not array.is_integer or not values.count or values.minimum < 0:
        return 0
    top = max(int(values.maximum) + 1, stated)
    if top > (MOST_NAMED_CLASSES if is_named or stated else MOST_CLASSES):
        return 0
    is_rare = len(values.distinct) * 2 > values.count and top > FEW_CLASSES
    return 0 if is_rare and not stated else max(2, top)


def _stated(array: ArrayFacts) -> int:
    """Return the number of classes that attributes state; 0 if they state none."""
    for key in ("num_classes", "n_classes"):
        if isinstance(value := array.attributes.get(key), int):
            return value
    flags = array.attributes.get("flag_values", [])
    values = flags.tolist() if isinstance(flags, np.ndarray) else flags
    numbers = [value for value in values if isinstance(value, int)] if isinstance(values, list) else []
    return max(numbers) + 1 if numbers and min(numbers) >= 0 else 0


def _counted(array: ArrayFacts, values: Values, classes: int) -> str:
    if array.stored == "b":
        return "false and true"
    if classes == _stated(array):
        return "from its attributes"
    where = "values" if values.is_whole else f"{values.count:,} values that were read"
    return f"the largest of the {where} is {int(values.maximum)}" if values.count else "a guess: none could be read"


# The dimension of samples -----------------------------------------------------------------------------------


def is_one_image(target: ArrayFacts, others: Iterable[ArrayFacts], contents: Contents) -> bool:
    """Return True if a target and an input are single images: they have places, and else nothing but channels."""
    space = space_of(target, contents)
    pictures = [other for other in others if space and set(space) <= set(other.dims)]
    beside = [[dim for dim in picture.without(*space) if not is_channel(dim)] for picture in pictures]
    is_image = all(target.sizes[dim] == 1 for dim in target.without(*space))
    sizes = {dim: size for picture in pictures for dim, size in picture.sizes.items()}
    return is_image and any(all(sizes[dim] == 1 for dim in dims) for dims in beside)


def sample_dim(target: ArrayFacts, others: Iterable[ArrayFacts], contents: Contents) -> str:
    """Return the dimension of the target along which samples lie; empty if only places of an image are shared.

    Parameters
    ----------
    target : ArrayFacts
    others : iterable of ArrayFacts
        What may be inputs.
    contents : Contents
    """
    others = list(others)
    space = space_of(target, contents) if any(space_of(other, contents) for other in others) else ()
    shared = {dim: sum(dim in other.dims for other in others) for dim in target.dims if dim not in space}
    shared = {dim: count for dim, count in shared.items() if count and not (is_channel(dim) and len(target.dims) > 1)}
    if all(target.sizes[dim] == 1 for dim in shared) and is_one_image(target, others, contents):
        return ""
    if not shared:
        return ""

    def rank(dim: str) -> tuple[bool, int, bool, int]:
        named = words(dim)[:1] in [[name] for name in SAMPLE]
        return (named, shared[dim], is_time(dim, contents), -target.dims.index(dim))

    return max(shared, key=rank)
