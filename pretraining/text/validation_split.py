"""Which documents are kept back for validation."""

import hashlib
import itertools
import random
from collections.abc import Iterable, Iterator


def split_documents(documents: Iterable[str], percentage: int, seed: int) -> Iterator[tuple[str, str]]:
    """
    Yield (split, document) for each document: one at random out of every 100 / percentage, wherever in the corpus,
    is for validation. It depends on the document's place and the seed alone, so it is the same on every reading.

    Of a corpus with fewer documents than that, such as a single book, the last `percentage` of the text is for
    validation, cut at the end of a line.
    """
    documents = iter(documents)
    one_stratum = -(-100 // percentage)  # rounded up
    first = list(itertools.islice(documents, one_stratum))
    if len(first) < one_stratum:
        yield from _split_at_the_tail(first, percentage)
        return
    documents = itertools.chain(first, documents)
    start = 0
    for stratum in itertools.count():
        stop = -(-(stratum + 1) * 100 // percentage)
        chosen = random.Random(f"{seed}-{stratum}").randrange(start, stop)
        index = start
        for index, document in enumerate(itertools.islice(documents, stop - start), start):
            yield ("validation" if index == chosen else "train"), document
        if index < stop - 1:
            return
        start = stop


def _split_at_the_tail(documents: list[str], percentage: int) -> Iterator[tuple[str, str]]:
    """
    The last `percentage` of the characters is for validation; the document in which they begin is cut. They come
    first, so that whoever stops reading after some training text has all of them.
    """
    boundary = sum(map(len, documents)) * (100 - percentage) // 100
    parts = []
    for document in documents:
        if boundary >= len(document):
            parts.append(("train", document))
        elif boundary <= 0:
            parts.append(("validation", document))
        else:
            cut = document.rfind("\n", 0, boundary) + 1 or boundary
            parts += [("train", document[:cut]), ("validation", document[cut:])]
        boundary -= len(document)
    yield from sorted(parts, key=lambda part: part[0] == "train")


def is_for_validation(document: str, percentage: int) -> bool:
    """
    Whether a document of a stream is kept back, `percentage` of them all. It depends on the text alone, as a document
    in a stream that many processes share has no number; so copies of a document are on the same side.
    """
    digest = hashlib.blake2b(document.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 100 < percentage
