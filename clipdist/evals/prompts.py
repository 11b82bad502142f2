"""Find class names and prompt templates, and write the prompts. No model, no images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from clipdist.errors import UserError

SLOT = "{}"  # of a template: where the class name goes
WRITTEN_SLOT = "{c}"  # the same in CLIP_benchmark's files
DEFAULT_TEMPLATE = "a photo of a {}."
# The eighteen of the CLIP paper for CIFAR-10 and CIFAR-100: nine ways to look at it, "a" thing and "the" thing.
_VIEWS = ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")
CIFAR10_TEMPLATES = tuple(
    template
    for article in ("a", "the")
    for template in (
        *(f"a {view}photo of {article} {SLOT}." for view in _VIEWS),
        *(f"a photo of {article} {size} {SLOT}." for size in ("small", "big")),
    )
)
NAMED_TEMPLATES = ("cifar10", "imagenet", "simple")


def find_templates(wanted: str, own: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the prompt templates, each with one or more slots "{}", that `wanted` means.

    Args:
        wanted: "cifar10" (the 18 of the CLIP paper), "imagenet" (its 80, as open_clip ships them), "simple" (the 7 of
            them that do nearly as well), a template itself, or a text file with a template per line; "": the set's
            own, or DEFAULT_TEMPLATE where it has none.
        own: the set's own, with "{c}" or "{}" in them.

    Raises:
        UserError: neither a known name, nor a file, nor a template; a file without templates, or a line without "{}".
    """
    if not wanted:
        return _with_slots(own, "the set's own templates") or (DEFAULT_TEMPLATE,)
    if wanted == "cifar10":
        return CIFAR10_TEMPLATES
    if wanted in ("imagenet", "simple"):
        from open_clip import zero_shot_metadata as metadata

        chosen = metadata.OPENAI_IMAGENET_TEMPLATES if wanted == "imagenet" else metadata.SIMPLE_IMAGENET_TEMPLATES
        return tuple(template(SLOT) for template in chosen)
    if SLOT in wanted or WRITTEN_SLOT in wanted:
        return _with_slots([wanted], "templates")
    if not Path(wanted).is_file():
        raise UserError(
            f"templates {wanted!r}: neither {', '.join(NAMED_TEMPLATES)}, nor a file, nor a template with {SLOT} in it"
        )
    return _with_slots(_lines(Path(wanted), "template"), wanted)


def _with_slots(templates: Sequence[str], where: str) -> tuple[str, ...]:
    """Return templates with "{}" where the class goes.

    Raises:
        UserError: one without a slot.
    """
    found = tuple(template.replace(WRITTEN_SLOT, SLOT) for template in templates)
    for template in found:
        if SLOT not in template:
            raise UserError(f"{where}: the template {template!r} has no {SLOT} for the class name")
    return found


def find_classes(wanted: str, own: Sequence[str], listed: bool = False) -> tuple[str, ...]:
    """Return the names that stand for the classes in prompts, in the order of the labels.

    Args:
        wanted: "" for the data's own names, "imagenet" for the names that open_clip ships, or a text file with a name
            per line, in the order of the labels.
        own: the data's own class names, as they stand in prompts.
        listed: whether these are published for prompts, and taken as they are.

    Raises:
        UserError: no such file, an empty or repeated name, or not as many names as the data has classes.
    """
    if not wanted:
        names, where = tuple(own), "the data"
    elif wanted == "imagenet":
        from open_clip import zero_shot_metadata as metadata

        names, where = tuple(metadata.IMAGENET_CLASSNAMES), "--classes imagenet"
    elif Path(wanted).is_file():
        names, where = _lines(Path(wanted), "class name"), wanted
    else:
        raise UserError(f"classes {wanted!r}: no such file; it names one class per line, in the order of the labels")
    if len(names) != len(own):
        few = ", ".join(own[:3]) + (", ..." if len(own) > 3 else "")
        raise UserError(f"{where}: {len(names)} class names, but the data has {len(own)} classes ({few})")
    if not all(name.strip() for name in names):
        raise UserError(f"{where}: a class name is empty; give the names with --classes FILE, one per line")
    repeated = [name for name, count in Counter(names).items() if count > 1]
    published = wanted == "imagenet" or (listed and not wanted)
    if repeated and not published:  # those are kept as they are: two of ImageNet's 1000 names come twice
        raise UserError(
            f"{where}: the class name {repeated[0]!r} stands for two classes; no prompt can tell them apart"
        )
    return names


def write_prompts(classes: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Return every class in every template, class by class: len(classes) * len(templates) sentences.

    Raises:
        UserError: there are no classes, or no templates.
    """
    if not classes or not templates:
        raise UserError(f"zero-shot needs classes and templates; got {len(classes)} and {len(templates)}")
    return [template.replace(SLOT, name) for name in classes for template in templates]


def _lines(path: Path, what: str) -> tuple[str, ...]:
    """Return the lines of a text file that are not blank."""
    try:
        lines = tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a text file with one {what} per line ({error})") from None
    if not lines:
        raise UserError(f"{path}: holds no {what}; expected one per line")
    return lines
