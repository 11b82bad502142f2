"""Draw captioned images of simple scenes, in Flickr8k's original layout, and labelled ones as an image folder.

A scene is a few coloured, textured shapes in a spatial relation on a background. Every image comes with five
sentences in different words, each of which says enough to tell it from the others. Image n depends on (seed, n)
alone, so that any number of processes writes the same bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from clipdist.datasets.pool import in_order

SCENES_VERSION = 2  # of the drawing and the sentences: the same seed and version give the same bytes
SCENE_SIDE, LABELLED_SIDE = 96, 32  # pixels
OVERSAMPLING = 4  # outlines are drawn larger by this factor, then averaged down: smooth edges
JPEG_QUALITY = 90
SPLITS = ("train", "dev", "test")
CAPTIONS = 5  # per image

SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "moon", "diamond", "flower")
COLOURS = {
    "red": (214, 39, 40),
    "orange": (247, 129, 25),
    "yellow": (247, 213, 40),
    "green": (46, 148, 62),
    "blue": (38, 98, 212),
    "purple": (128, 58, 168),
    "pink": (246, 122, 178),
    "brown": (126, 78, 42),
    "white": (250, 250, 250),
    "black": (28, 28, 32),
}
BACKGROUNDS = {
    "white": (244, 244, 242),
    "gray": (158, 160, 164),
    "black": (38, 38, 42),
    "beige": (232, 216, 184),
    "light blue": (176, 214, 240),
    "light green": (190, 228, 188),
    "lavender": (212, 200, 238),
    "dark blue": (32, 46, 92),
}
TEXTURES = ("plain", "plain", "striped", "dotted")  # one in two is plain
RELATIONS = {"left": 0.17, "right": 0.17, "above": 0.17, "below": 0.17, "inside": 0.08, "row": 0.07, "column": 0.05}
RELATIONS |= {"alone": 0.12}  # share of the images
HOLDERS = ("circle", "square", "diamond", "heart")  # shapes with room inside
MIN_CONTRAST = 105.0  # Euclidean distance in RGB below which two colours are not put on one another

_SHADOW = [value * 2 // 5 for value in range(256)]
# The third part of an image's seed: the two sets share no image.
_SCENE_STREAM, _LABELLED_STREAM = 0, 1
# Radii are shares of the image's side.
RADIUS = {
    "small": (0.1, 0.115),
    "medium": (0.14, 0.155),
    "large": (0.19, 0.215),
    "free": (0.22, 0.32),
    "any": (0.12, 0.3),
}
RADIUS_OF_HOLDER = (0.36, 0.4)
REACH_ALONE, REACH_LABELLED = 0.12, 0.22  # how far from the middle a single shape may be


@dataclass(frozen=True)
class Thing:
    """One shape, or `count` equal ones."""

    shape: str
    colour: str
    texture: str
    size: str
    count: int = 1


@dataclass(frozen=True)
class Scene:
    """`things[0]` stands in `relation` to `things[1]`; in a row (column) they go from left to right (top to bottom)."""

    things: tuple[Thing, ...]
    relation: str
    background: str
    checkered: bool


def sample_scene(rng: np.random.Generator) -> Scene:
    """Sample a scene whose things have different colours, each well visible on what is behind it."""
    relation = str(rng.choice(list(RELATIONS), p=list(RELATIONS.values())))
    background = _pick(rng, tuple(BACKGROUNDS))
    colours = [str(name) for name in rng.permutation(_visible_on(background))]
    if relation == "alone":
        things: tuple[Thing, ...] = (Thing(_pick(rng, SHAPES), colours[0], _pick(rng, TEXTURES), "free"),)
    elif relation == "inside":
        inner = next(name for name in colours[1:] if _contrast(COLOURS[name], COLOURS[colours[0]]) >= MIN_CONTRAST)
        holder = Thing(_pick(rng, HOLDERS), colours[0], "plain", "large")
        things = (Thing(_pick(rng, SHAPES), inner, _pick(rng, TEXTURES), "small"), holder)
    elif relation in ("row", "column"):
        things = tuple(Thing(_pick(rng, SHAPES), colour, _pick(rng, TEXTURES), "medium") for colour in colours[:3])
    else:
        things = tuple(_sample_thing(rng, colour) for colour in colours[:2])
    return Scene(things, relation, background, checkered=bool(rng.random() < 0.35))


def _sample_thing(rng: np.random.Generator, colour: str) -> Thing:
    size = _pick(rng, ("small", "large"))
    count = int(rng.integers(2, 5)) if size == "small" and rng.random() < 0.6 else 1
    return Thing(_pick(rng, SHAPES), colour, _pick(rng, TEXTURES), size, count)


def _pick(rng: np.random.Generator, names: tuple[str, ...]) -> str:
    return names[int(rng.integers(len(names)))]


def _visible_on(background: str) -> list[str]:
    """Return the colours that stand out from a background."""
    return [name for name in COLOURS if _contrast(COLOURS[name], BACKGROUNDS[background]) >= MIN_CONTRAST]


def _contrast(one: tuple[int, int, int], other: tuple[int, int, int]) -> float:
    return math.dist(one, other)


# ---------------------------------------------------------------------------------------------------- drawing


def render_scene(scene: Scene, rng: np.random.Generator, side: int = SCENE_SIDE) -> Image.Image:
    """Draw the scene, RGB, side x side pixels; `rng` gives what no sentence tells (tilt, shade, exact places)."""
    canvas = _draw_background(BACKGROUNDS[scene.background], scene.checkered, rng, side)
    for thing, (x, y) in _places(scene, rng):
        _draw_shape(canvas, thing, (x * side, y * side), _radius(scene, thing, rng) * side, rng)
    return _with_grain(canvas, rng)


def _places(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[Thing, tuple[float, float]]]:
    """Yield (thing, centre of one of its shapes), back to front, in shares of the side."""
    if scene.relation in ("inside", "alone"):
        reach = 0.05 if scene.relation == "inside" else REACH_ALONE
        centre = (0.5 + _spread(rng, reach), 0.5 + _spread(rng, reach))
        for thing in reversed(scene.things):  # what holds is behind what it holds
            yield thing, centre
        return
    along = 0 if scene.relation in ("left", "right", "row") else 1
    order = scene.things[::-1] if scene.relation in ("right", "below") else scene.things
    slots = (0.25, 0.75) if len(order) == 2 else (0.19, 0.5, 0.81)
    for slot, thing in zip(slots, order, strict=True):
        middle = [0.5 + _spread(rng, 0.12), 0.5 + _spread(rng, 0.12)]
        middle[along] = slot + _spread(rng, 0.015)
        if thing.count > 1:
            middle[1 - along] = 0.5 + _spread(rng, 0.03)
        for x, y in _group_offsets(thing.count, along):
            yield thing, (middle[0] + x, middle[1] + y)


def _group_offsets(count: int, along: int) -> list[tuple[float, float]]:
    """Return offsets of equal shapes around their common middle: a line across the relation, or two by two."""
    step = 0.26
    if count == 4:
        return [(x * step / 2, y * step / 2) for y in (-1, 1) for x in (-1, 1)]
    line = [(i - (count - 1) / 2) * step for i in range(count)]
    return [(0.0, offset) if along == 0 else (offset, 0.0) for offset in line]


def _radius(scene: Scene, thing: Thing, rng: np.random.Generator) -> float:
    holds = scene.relation == "inside" and thing is scene.things[1]
    low, high = RADIUS_OF_HOLDER if holds else RADIUS[thing.size]
    return float(rng.uniform(low, high))


def _spread(rng: np.random.Generator, reach: float) -> float:
    return float(rng.uniform(-reach, reach))


def _draw_background(colour: tuple[int, int, int], checkered: bool, rng: np.random.Generator, side: int) -> Image.Image:
    """Draw a wall that is a little brighter on one side, with two tones of squares where it is checkered."""
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / side
    angle = rng.uniform(0, 2 * math.pi)
    shade = 1 + 0.14 * ((x - 0.5) * math.cos(angle) + (y - 0.5) * math.sin(angle))
    if checkered:
        cells = int(rng.integers(6, 9))
        shade *= np.where((np.floor(x * cells) + np.floor(y * cells)) % 2 == 0, 1.04, 0.84)
    return _to_image(_jitter(colour, rng, 5) * shade[..., None])


def _draw_shape(
    canvas: Image.Image, thing: Thing, centre: tuple[float, float], radius: float, rng: np.random.Generator
) -> None:
    """Draw one shape with its soft shadow onto the canvas, in place. `centre`, `radius`: pixels."""
    half = math.ceil(radius * 1.25) + 2  # of the tile: room for the shadow's soft edge
    corner = (math.floor(centre[0]) - half, math.floor(centre[1]) - half)
    within = (centre[0] - corner[0], centre[1] - corner[1])
    mask = _shape_mask(thing.shape, 2 * half, within, radius, math.radians(_spread(rng, 14)))
    drop = max(1, canvas.width // 64)
    shadow = mask.filter(ImageFilter.BoxBlur(drop)).point(_SHADOW)
    canvas.paste((16, 16, 24), (corner[0] + drop // 2, corner[1] + drop), shadow)
    canvas.paste(_fill(thing, 2 * half, radius, max(0.55 * radius, 0.075 * canvas.width), rng), corner, mask)


def _shape_mask(shape: str, side: int, centre: tuple[float, float], radius: float, tilt: float) -> Image.Image:
    mask = Image.new("L", (side * OVERSAMPLING, side * OVERSAMPLING), 0)
    draw = ImageDraw.Draw(mask)
    turn = np.array([[math.cos(tilt), math.sin(tilt)], [-math.sin(tilt), math.cos(tilt)]])
    for level, outline in zip((255, 0), _outlines(shape)):  # the second outline, if any, is a hole
        points = (outline @ turn * radius + centre) * OVERSAMPLING
        draw.polygon(points.ravel().tolist(), fill=level)
    return mask.reduce(OVERSAMPLING)


def _fill(thing: Thing, side: int, radius: float, period: float, rng: np.random.Generator) -> Image.Image:
    """Draw the tile that shows through the shape: its colour, lit from above, with light stripes or dots."""
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) - side / 2
    base = _jitter(COLOURS[thing.colour], rng, 8)
    light = (1.04 - 0.08 * y / radius)[..., None]
    if thing.texture == "plain":
        return _to_image(base * light)
    second = base * 0.72 if base.mean() > 200 else base * 0.35 + 255 * 0.65  # white shapes take gray marks
    angle = rng.uniform(0, math.pi)
    u = (x * math.cos(angle) + y * math.sin(angle) + rng.uniform(0, period)) % period - period / 2
    v = (y * math.cos(angle) - x * math.sin(angle) + rng.uniform(0, period)) % period - period / 2
    inside = 0.22 * period - np.abs(u) if thing.texture == "striped" else 0.3 * period - np.hypot(u, v)  # pixels
    marked = np.clip(inside + 0.5, 0, 1)[..., None]
    return _to_image((base + (second - base) * marked) * light)


def _jitter(colour: tuple[int, int, int], rng: np.random.Generator, reach: float) -> np.ndarray:
    return np.asarray(colour, dtype=np.float32) + rng.uniform(-reach, reach, 3).astype(np.float32)


def _with_grain(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    grain = rng.standard_normal((image.height, image.width, 1), dtype=np.float32)
    return _to_image(np.asarray(image, dtype=np.float32) + 2 * grain)


def _to_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


@cache
def _outlines(shape: str) -> tuple[np.ndarray, ...]:
    """Return closed outlines float64 [points, 2] within the unit circle, y down; the second one is a hole."""
    around = np.linspace(0, 2 * math.pi, 73)[:-1]
    match shape:
        case "circle":
            return (_polar(around, 0.92),)
        case "ring":
            return (_polar(around, 0.96), _polar(around, 0.52))
        case "square":
            return (_polar(np.arange(4) * math.pi / 2 + math.pi / 4, 1.1),)
        case "diamond":
            return (np.array([(0, -1.08), (0.66, 0), (0, 1.08), (-0.66, 0)]),)
        case "triangle":
            return (_polar(np.arange(3) * 2 * math.pi / 3 - math.pi / 2, 1.12) + (0, 0.18),)
        case "star":
            return (_polar(np.arange(10) * math.pi / 5 - math.pi / 2, np.tile((1.1, 0.46), 5)),)
        case "flower":
            return (_polar(around, 0.78 + 0.26 * np.cos(6 * around)), _polar(around, 0.2))
        case "cross":
            corner = np.array([(-0.34, -1), (0.34, -1), (0.34, -0.34)])
            turns = [np.array([[0, 1], [-1, 0]]), np.array([[-1, 0], [0, -1]]), np.array([[0, -1], [1, 0]])]
            return (np.concatenate([corner, *(corner @ turn for turn in turns)]),)
        case "heart":
            x = 16 * np.sin(around) ** 3
            y = 13 * np.cos(around) - 5 * np.cos(2 * around) - 2 * np.cos(3 * around) - np.cos(4 * around)
            return (np.stack([x, -y - 2.5], axis=1) / 15.5,)
        case "moon":
            outer = np.linspace(0.25 * math.pi, 1.75 * math.pi, 48)
            inner = np.linspace(1.66 * math.pi, 0.34 * math.pi, 48)
            return (np.concatenate([_polar(outer, 1.0), _polar(inner, 0.8) + (0.33, 0)]) + (0.15, 0),)
    raise ValueError(f"unknown shape {shape!r}")


def _polar(angle: np.ndarray, radius: float | np.ndarray) -> np.ndarray:
    return np.stack([np.cos(angle) * radius, np.sin(angle) * radius], axis=1)


# -------------------------------------------------------------------------------------------------- sentences

_SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big")}
_TEXTURE_WORDS = {"striped": ("striped", "stripy"), "dotted": ("dotted", "spotted")}
_TEXTURE_TAILS = {"striped": "with stripes", "dotted": "with dots"}
_NUMBERS = {2: "two", 3: "three", 4: "four"}
_BESIDE = {
    "left": ("to the left of", "on the left of"),
    "right": ("to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
    "inside": ("inside", "in the middle of"),
}
_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
_PLACE = {"left": "on the left", "right": "on the right", "above": "at the top", "below": "at the bottom"}


# Of every relation, five sentences. {0}, {1}, {2}: the things, without their size where a - follows.
_SENTENCES = {
    "pair": (
        "{0} {beside} {1} on a {bright} background",
        "{1} {opposite} {0} in front of a {bright} wall",
        "there {is} {0} {place} and {1} {other place} , all on {bright}",
        "{bright} picture with {1-} {other place} and {0-}",
        "{0} can be seen {beside} {1}",
    ),
    "inside": (
        "{0} {beside} {1} on a {bright} background",
        "{1} with {0} inside it in front of a {bright} wall",
        "there is {1} that holds {0} , all on {bright}",
        "{bright} picture with {0-} within {1-}",
        "{0} can be seen {beside} {1}",
    ),
    "alone": (
        "{0} on a {bright} background",
        "in front of a {bright} wall there is {0}",
        "just {0} , all on {bright}",
        "{bright} picture with nothing but {0}",
        "a {bright} background with {0} on it",
    ),
    "row": (
        "{0} , {1} and {2} in a row on a {bright} background",
        "from right to left : {2} , {1} , {0} before a {bright} wall",
        "{1} between {0} and {2} , all on {bright}",
        "{bright} picture with {0} at the left , then {1} , then {2}",
        "side by side : {0} , {1} and {2}",
    ),
    "column": (
        "{0} , {1} and {2} in a column on a {bright} background",
        "from bottom to top : {2} , {1} , {0} before a {bright} wall",
        "{1} between {0} and {2} , all on {bright}",
        "{bright} picture with {0} at the top , then {1} , then {2}",
        "stacked : {0} , {1} and {2}",
    ),
}


def write_captions(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Return five sentences about the scene, all different, in the manner of Flickr8k (a full stop after a space)."""
    opposite = _OPPOSITE.get(scene.relation, "")
    words = {
        "bright": f"{'checkered ' if scene.checkered else ''}{scene.background}",
        "is": "are" if scene.things[0].count > 1 else "is",
        "place": _PLACE.get(scene.relation, ""),
        "other place": _PLACE.get(opposite, ""),
    }
    choices = {"beside": _BESIDE.get(scene.relation, ()), "opposite": _BESIDE.get(opposite, ())}

    def fill(gap: re.Match[str]) -> str:
        name = gap[1]
        if name[0].isdigit():
            return _phrase(scene.things[int(name[0])], rng, sized=not name.endswith("-"))
        return words[name] if name in words else _pick(rng, choices[name])

    sentences = _SENTENCES["pair" if opposite else scene.relation]
    filled = [re.sub(r"{(.+?)}", fill, sentence) for sentence in sentences]
    return [f"{text[0].upper()}{text[1:]} ." for text in filled]


def _phrase(thing: Thing, rng: np.random.Generator, sized: bool = True) -> str:
    """Return a noun phrase, such as "three small red stars with dots"; in other words at every call."""
    words = [_NUMBERS[thing.count]] if thing.count > 1 else ["a"]
    if sized and thing.size in _SIZE_WORDS:
        words.append(_pick(rng, _SIZE_WORDS[thing.size]))
    tail = []
    if thing.texture != "plain":
        if rng.random() < 0.4:
            tail.append(_TEXTURE_TAILS[thing.texture])
        else:
            words.append(_pick(rng, _TEXTURE_WORDS[thing.texture]))
    words.append(thing.colour)
    words.append(_plural(thing.shape) if thing.count > 1 else thing.shape)
    if words[0] == "a" and words[1][0] in "aeiou":
        words[0] = "an"
    return " ".join(words + tail)


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


# ---------------------------------------------------------------------------------------------------- writing


def write_scenes(
    folder: Path,
    seed: int,
    counts: dict[str, int],
    processes: int = 1,
    progress: Callable[[int], object] = lambda done: None,
) -> None:
    """Write captioned images in Flickr8k's original layout. The same arguments give the same bytes.

    Args:
        folder: gets Flicker8k_Dataset/ (sic), Flickr8k.token.txt and Flickr_8k.{train,dev,test}Images.txt.
        counts: images per split, by the names in SPLITS.
        progress: is told how many images were written since it was last told.
    """
    images = folder / "Flicker8k_Dataset"
    images.mkdir(parents=True, exist_ok=True)
    numbers = range(sum(counts[split] for split in SPLITS))
    lines: list[str] = []
    for number, captions in zip(numbers, in_order(partial(_write_scene, images, seed), numbers, processes)):
        lines.extend(f"{_scene_name(number)}#{i}\t{caption}\n" for i, caption in enumerate(captions))
        progress(1)
    _write_text(folder / "Flickr8k.token.txt", lines)
    first = 0
    for split in SPLITS:
        names = [_scene_name(number) + "\n" for number in range(first, first + counts[split])]
        _write_text(folder / f"Flickr_8k.{split}Images.txt", names)
        first += counts[split]


def write_labelled(
    folder: Path,
    seed: int,
    train: int,
    test: int,
    processes: int = 1,
    progress: Callable[[int], object] = lambda done: None,
) -> None:
    """Write images of one shape each, by their colour: FOLDER/train/COLOUR/00000.png and FOLDER/test/COLOUR/...

    All colours come equally often. Shape, texture, size and place tell nothing about the class, and the background
    tells only which colour it is not.
    """
    for split in ("train", "test"):
        for colour in COLOURS:
            (folder / split / colour).mkdir(parents=True, exist_ok=True)
    for _ in in_order(partial(_write_labelled, folder, seed, train), range(train + test), processes):
        progress(1)


def _write_scene(images: Path, seed: int, number: int) -> list[str]:
    """Write image `number` and return its captions."""
    rng = np.random.default_rng((seed, number, _SCENE_STREAM))
    scene = sample_scene(rng)
    render_scene(scene, rng).save(images / _scene_name(number), "JPEG", quality=JPEG_QUALITY)
    return write_captions(scene, rng)


def _write_labelled(folder: Path, seed: int, train: int, number: int) -> None:
    """Write image `number` of the labelled set, of which the first `train` are for training."""
    rng = np.random.default_rng((seed, number, _LABELLED_STREAM))
    colour = tuple(COLOURS)[number % len(COLOURS)]
    background = _pick(rng, tuple(name for name in BACKGROUNDS if colour in _visible_on(name)))
    thing = Thing(_pick(rng, SHAPES), colour, _pick(rng, TEXTURES), "any")
    canvas = _draw_background(BACKGROUNDS[background], bool(rng.random() < 0.35), rng, LABELLED_SIDE)
    x, y = ((0.5 + _spread(rng, REACH_LABELLED)) * LABELLED_SIDE for _ in "xy")
    _draw_shape(canvas, thing, (x, y), float(rng.uniform(*RADIUS["any"])) * LABELLED_SIDE, rng)
    split = "train" if number < train else "test"
    _with_grain(canvas, rng).save(folder / split / colour / f"{number:05d}.png")


def _scene_name(number: int) -> str:
    return f"scene_{number:05d}.jpg"


def _write_text(path: Path, lines: list[str]) -> None:
    path.write_text("".join(lines), encoding="utf-8", newline="\n")
