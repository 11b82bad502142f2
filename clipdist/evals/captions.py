"""Score captions of images against references: BLEU-1 to 4, ROUGE-L, CIDEr-D and METEOR, by pycocoevalcap.

These are COCO's caption metrics (Chen et al., arXiv:1504.00325). Both sides are first divided into tokens by Stanford's
PTB tokenizer, lower-cased and without punctuation. It needs Java, as METEOR does. Without Java a tokenizer of this file
stands in, which agrees on plain English sentences, and METEOR is left out.
"""

from __future__ import annotations

import json
import posixpath
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clipdist.data.bad_sample import BadSample
from clipdist.data.catalog import Catalog
from clipdist.data.reader import open_reader
from clipdist.errors import Fault, UserError

METRICS = {
    "bleu1": "BLEU-1",
    "bleu2": "BLEU-2",
    "bleu3": "BLEU-3",
    "bleu4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "cider_d": "CIDEr-D",
    "meteor": "METEOR",
}
PTB, PLAIN = "PTB", "plain"
_AMBIGUOUS = -1
_KEYS = ("key", "image", "image_id")  # of an object in a list of predictions; COCO's results have the last
# What pycocoevalcap leaves out of the PTB tokenizer's lower-cased tokens; it keeps brackets, which are "-lrb-" there.
_PUNCTUATION = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_QUOTES = str.maketrans({"\u2019": "'", "\u2018": "'", "\u201c": '"', "\u201d": '"'})
_PLAIN = re.compile(
    r"(?:\w\.){2,}"  # d.c.
    r"|\w+(?=n't\b)|n't\b|'(?:s|m|d|re|ve|ll)\b"  # do n't, dog 's
    r"|\w+(?:[.'&/-]\w+(?!'t\b))*?(?='(?:s|m|d|re|ve|ll)\b)"
    r"|\w+(?:[.&/-]\w+)*|[^\w\s]"
)


@dataclass(frozen=True)
class References:
    """Captions of images.

    Attributes:
        captions: by the number of the sample.
        names: numbers of samples by key, file name, and file name without its ending; -1: of several samples.
    """

    captions: dict[int, list[str]]
    names: dict[str, int]


def read_predictions(path: Path) -> dict[str, str]:
    """Read one caption for each image, by the image's key or file name.

    Args:
        path: .json of {"IMAGE": "CAPTION", ...}, or of [{"image_id": IMAGE, "caption": "CAPTION"}, ...], as COCO's
            results are; .jsonl of such objects, one a line. "key" and "image" are read like "image_id".

    Raises:
        UserError: the file cannot be read, has another form, or two captions of an image.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        lines = text.splitlines() if path.suffix == ".jsonl" else [text]
        found: Any = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as {path.suffix[1:].upper()}: {error}") from None
    if path.suffix == ".json":
        found = found[0] if found else {}
    pairs = list(found.items()) if isinstance(found, dict) else [_pair(path, one) for one in found]
    captions: dict[str, str] = {}
    for name, caption in pairs:
        if not isinstance(caption, str):
            raise UserError(f"{path}: {name}: {str(caption)[:60]!r} is no caption; expected one text for each image")
        if name in captions:
            raise UserError(f"{path}: {name}: has two captions; leave one")
        captions[name] = caption
    if not captions:
        raise UserError(f"{path}: holds no caption")
    return captions


def _pair(path: Path, one: Any) -> tuple[str, Any]:
    name = next((one[key] for key in _KEYS if key in one), None) if isinstance(one, dict) else None
    if name is None or "caption" not in one:
        raise UserError(f'{path}: {str(one)[:60]!r}: expected {{"key": IMAGE, "caption": "TEXT"}}')
    return str(name), one["caption"]


def read_references(catalog: Catalog, samples: Iterable[int] | None = None) -> References:
    """Read the captions of samples, of all by default. Samples without any are left out."""
    captions: dict[int, list[str]] = {}
    names: dict[str, int] = {}
    reader = open_reader(catalog)
    try:
        wanted = range(len(catalog)) if samples is None else list(samples)
        for sample_id in tqdm(wanted, desc="read the captions", unit="sample", disable=None):
            sample = reader.sample(sample_id)
            try:
                captions[sample_id] = sample.captions()
                file = sample.metadata().get("filename")
            except BadSample:
                continue
            file = posixpath.basename(file) if isinstance(file, str) else ""
            for name in {reader.key(sample_id), file, posixpath.splitext(file)[0]} - {""}:
                names[name] = _AMBIGUOUS if names.get(name, sample_id) != sample_id else sample_id
    finally:
        reader.close()
    return References(captions, names)


def match(predictions: dict[str, str], references: References, where: str, shards: str) -> dict[int, str]:
    """Return the captions by the number of the sample.

    Raises:
        UserError: an image has no reference, is named twice, or the name is that of several.
    """
    unknown = [name for name in predictions if name not in references.names]
    if unknown:
        shown = ", ".join(unknown[:3]) + (", ..." if unknown[3:] else "")
        raise UserError(
            f"{where}: {len(unknown)} of {len(predictions)} images have no reference, no image of this key or file name"
            f" with a caption being in {shards}: {shown}"
        )
    found: dict[int, str] = {}
    for name, caption in predictions.items():
        sample_id = references.names[name]
        if sample_id == _AMBIGUOUS:
            raise UserError(f"{where}: {name}: several samples of {shards} have this name; give one that is unique")
        if sample_id in found:
            raise UserError(f"{where}: {name}: has a second caption under another name; leave one")
        found[sample_id] = caption
    return found


def constant_caption(captions: Iterable[str]) -> str:
    """Return the most frequent caption, of equally frequent ones the first; case, spaces and an end point aside."""
    counts: Counter[str] = Counter(" ".join(caption.lower().split()).rstrip(" .") for caption in captions)
    return counts.most_common(1)[0][0]


def has_java() -> bool:
    return shutil.which("java") is not None


def tokenised(captions: Sequence[str], tokenizer: str) -> list[str]:
    """Return the captions as tokens with a space between each, lower-cased, without punctuation.

    Args:
        tokenizer: PTB, which needs Java, or PLAIN.

    Raises:
        Fault: Java failed.
    """
    lines = [" ".join(caption.split()) for caption in captions]  # no line breaks within
    if tokenizer == PTB:
        divided = [line.split() for line in _ptb_lines(lines)]
    else:
        divided = [_plain_tokens(line) for line in lines]
    return [" ".join(token for token in tokens if token not in _PUNCTUATION) for tokens in divided]


def _plain_tokens(line: str) -> list[str]:
    return [_BRACKETS.get(token, token) for token in _PLAIN.findall(line.translate(_QUOTES).lower()) if token != '"']


def _ptb_lines(lines: list[str]) -> list[str]:
    import pycocoevalcap.tokenizer.ptbtokenizer as theirs

    jar = Path(theirs.__file__).with_name(theirs.STANFORD_CORENLP_3_4_1_JAR)
    words = ["java", "-Dfile.encoding=UTF-8", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    sent = "\n".join(lines) + "\n"
    ended = subprocess.run([*words, "-preserveLines", "-lowerCase"], input=sent.encode(), capture_output=True)
    found = ended.stdout.decode().split("\n")[:-1]
    if ended.returncode or len(found) != len(lines):
        told = ended.stderr.decode(errors="replace").strip().splitlines()
        raise Fault(f"java: the PTB tokenizer failed: {told[-1] if told else f'{len(found)} lines of {len(lines)}'}")
    return found


def caption_scores(
    references: Sequence[Sequence[str]], captions: Sequence[str], meteor: bool = False
) -> dict[str, float]:
    """Return the metrics by the keys of METRICS, percent, as papers print them.

    CIDEr-D weighs n-grams by how few of these images have them in their references.

    Args:
        references: of every image one or more, as `tokenised` gives them.
        captions: one of every image, likewise.
        meteor: METEOR too, which needs Java.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    wanted = {number: list(own) for number, own in enumerate(references)}
    found = {number: [caption] for number, caption in enumerate(captions)}
    scores = list(Bleu(4).compute_score(wanted, found, verbose=0)[0])
    scores += [Rouge().compute_score(wanted, found)[0], Cider().compute_score(wanted, found)[0]]
    if meteor:
        scores.append(_meteor(wanted, found))
    return {name: 100 * float(score) for name, score in zip(METRICS, scores)}


def _meteor(references: dict[int, list[str]], captions: dict[int, list[str]]) -> float:
    from pycocoevalcap.meteor.meteor import Meteor

    plain = {number: [text.replace("|||", " ") for text in own] for number, own in references.items()}
    try:
        return Meteor().compute_score(plain, captions)[0]
    except (OSError, ValueError) as error:
        raise Fault(f"java: METEOR failed: {error}") from None
