"""Words <-> ids: the most frequent word has id 0."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from multilstm.errors import UserError, check_whole
from multilstm.files import read_json, read_or_explain, write_text

END_OF_SENTENCE = "<eos>"
UNKNOWN = "<unk>"
SCHEMA = "multilstm-vocabulary-1"

UnknownWords = Literal["error", "drop"]


class Vocabulary:
    """The words a model knows, each with its id.

    A word that is not in the vocabulary becomes `<unk>` where the vocabulary
    has that word. Where it has not, `encode` refuses it, unless asked to drop
    such words, which is what the classic Keras tutorial does without a word.

    Args:
        words: Distinct words; the place of a word is its id.

    Raises:
        UserError: If there is no word at all or a word stands there twice.

    Example:
    >>> vocabulary = Vocabulary.from_words("a rose is a rose".split())
    >>> vocabulary.words
    ('a', 'rose', 'is')
    >>> vocabulary.encode(["is", "a"]).tolist()
    [2, 0]
    >>> vocabulary.decode([1, 2])
    ['rose', 'is']
    """

    def __init__(self, words: Iterable[str]) -> None:
        self.words: tuple[str, ...] = tuple(words)
        self._ids = {word: i for i, word in enumerate(self.words)}
        if not self.words:
            raise UserError(
                "A vocabulary needs at least one word; received none. "
                "Is the training text empty?"
            )
        if len(self._ids) < len(self.words):
            repeated = [w for w, n in Counter(self.words).items() if n > 1]
            raise UserError(
                "The words of a vocabulary must be distinct; "
                f"{len(repeated)} stand there more than once: "
                f"{name_a_few(repeated)}. Remove the repetitions."
            )

    @classmethod
    def from_words(cls, words: Iterable[str]) -> "Vocabulary":
        """Counts `words` and keeps all of them, sorted by (-count, word)."""
        return cls.from_counts(Counter(words))

    @classmethod
    def from_counts(
        cls,
        counts: Mapping[str, int],
        *,
        min_count: int = 1,
        max_size: int | None = None,
    ) -> "Vocabulary":
        """Sorts counted words by (-count, word) and keeps the frequent ones.

        Args:
            counts: How often each word stands in the training text.
            min_count: Rarer words are left out.
            max_size: Keep at most so many words.

        Returns:
            The vocabulary. Where words were left out, it has `<unk>` for
            them (inside `max_size`), counted as often as all of them.

        Raises:
            UserError: If a number is no whole one from 1 on, or no word is
                left.
        """
        for name, number in (("min_count", min_count), ("max_size", max_size)):
            if number is not None:
                check_whole(name, number, 1)
        kept = dict(counts)
        ranked = sorted(kept, key=lambda word: (-kept[word], word))
        room = len(ranked) if max_size is None else max_size
        rare = [w for w in ranked if kept[w] < min_count and w != UNKNOWN]
        if rare or room < len(ranked):
            frequent = [
                w for w in ranked if kept[w] >= min_count and w != UNKNOWN
            ][: room - 1]
            unknown_count = sum(kept.values()) - sum(kept[w] for w in frequent)
            kept = {w: kept[w] for w in frequent} | {UNKNOWN: unknown_count}
        return cls(sorted(kept, key=lambda word: (-kept[word], word)))

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: object) -> bool:
        return word in self._ids

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.words == other.words

    def __hash__(self) -> int:
        return hash(self.words)

    def __repr__(self) -> str:
        return f"<Vocabulary of {len(self):,}: {name_a_few(self.words)}>"

    @property
    def unknown_id(self) -> int | None:
        """The id of `<unk>`, or None where the vocabulary lacks it."""
        return self._ids.get(UNKNOWN)

    def unknown_words(self, counts: Mapping[str, int]) -> dict[str, int]:
        """The counted words that are not in the vocabulary."""
        return {w: n for w, n in counts.items() if w not in self._ids}

    def encode(
        self, words: Iterable[str], unknown: UnknownWords = "error"
    ) -> NDArray[np.int32]:
        """Turns words into ids.

        Args:
            words: Words, for instance a text that was split.
            unknown: What to do with a word that is neither known nor can be
                `<unk>`: `"error"`, or `"drop"` to leave it out.

        Returns:
            int32 array of shape `(num_words,)`.

        Raises:
            UserError: Counts the unknown words and names the first few; or a
                text was given that is not split.
        """
        if isinstance(words, str):
            raise UserError(
                "`words` must be words, not a text in one piece; received "
                f"{words[:40]!r}. Split it: words.split()"
            )
        words = words if isinstance(words, Sequence) else list(words)
        stand_in = -1 if self.unknown_id is None else self.unknown_id
        get = self._ids.get
        ids = np.fromiter(
            (get(word, stand_in) for word in words), np.int32, len(words)
        )
        missing = ids < 0
        if not missing.any():
            return ids
        if unknown == "drop":
            return ids[~missing]
        raise UserError(
            describe_unknown(Counter(w for w in words if w not in self._ids))
        )

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Turns ids into words.

        Raises:
            UserError: If an id is not in `range(len(vocabulary))`.
        """
        ids = [int(i) for i in ids]
        outside = [i for i in ids if not 0 <= i < len(self)]
        if outside:
            raise UserError(
                f"Ids must lie in 0..{len(self) - 1}, the vocabulary's size "
                f"less one; received {name_a_few(map(str, outside))}. "
                "Is this the vocabulary that the ids were made with?"
            )
        return [self.words[i] for i in ids]

    def save(self, path: Path | str) -> None:
        """Writes the vocabulary as JSON, whole or not at all."""
        content = {"schema": SCHEMA, "words": self.words}
        write_text(
            Path(path), json.dumps(content, ensure_ascii=False, indent=0)
        )

    @classmethod
    def load(cls, path: Path | str) -> "Vocabulary":
        """Reads what `save` wrote.

        Raises:
            UserError: If the file is missing or is no vocabulary of ours.
        """
        path = Path(path)
        content = read_json(path, schema=SCHEMA)
        words = content.get("words")
        if not isinstance(words, list) or not all(
            isinstance(word, str) for word in words
        ):
            raise UserError(
                f"{path} must hold a list of words under 'words'; it holds "
                f"{type(words).__name__}. Write it with Vocabulary.save."
            )
        # JSON may name half a character, which no text file can hold.
        read_or_explain(path, lambda: "".join(words).encode())
        # Names the file where its words are none or repeat.
        vocabulary: Vocabulary = read_or_explain(path, lambda: cls(words))
        return vocabulary


def name_a_few(words: Iterable[str]) -> str:
    """Quotes the first five words of many."""
    words = list(words)
    return ", ".join(map(repr, words[:5])) + ", ..." * (len(words) > 5)


def describe_unknown(counts: Mapping[str, int]) -> str:
    """The error for words that are unknown where `<unk>` is not there."""
    return (
        f"{sum(counts.values()):,} words ({len(counts):,} distinct) are not "
        f"in the vocabulary, which has no {UNKNOWN!r} to stand for them: "
        f"{name_a_few(counts)}. Put {UNKNOWN!r} for rare words into the "
        "training text, limit the vocabulary (--max-vocabulary, or "
        "max_vocabulary and min_count), or leave such words out (--unknown "
        "drop, unknown='drop')."
    )
