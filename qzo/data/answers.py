"""Exact match and F1 of a generated answer, with SQuAD's normalisation as MeZO uses it (arXiv 2305.17333)."""

import re
import string
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(answer: str) -> str:
    """Lower case, no ASCII punctuation, no articles (a, an, the), single spaces."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", answer.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1.0 if the normalised answer equals one of the normalised references, else 0.0."""
    return float(normalize(answer) in map(normalize, references))


def f1(answer: str, references: Sequence[str]) -> float:
    """The best F1 over the references of the bags of normalised words; 0 to 1."""
    return max(_f1(normalize(answer).split(), normalize(reference).split()) for reference in references)


def _f1(answer: list[str], reference: list[str]) -> float:
    same = sum((Counter(answer) & Counter(reference)).values())
    return 2 * same / (len(answer) + len(reference)) if same else 0.0
