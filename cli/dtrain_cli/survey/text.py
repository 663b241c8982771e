"""Text: an array of token numbers, and a model that predicts the next one."""

from __future__ import annotations

from dtrain_cli.survey.draft import Draft, unused
from dtrain_cli.survey.roles import ArrayFacts, Contents, has_word, is_time
from dtrain_cli.survey.target import LABEL_WORDS
from dtrain_cli.survey.values import Look, Values

TOKEN_WORDS = {"token", "tokens", "text", "byte", "bytes", "ids", "corpus", "document", "documents"}
SIZE_KEYS = ("vocab_size", "vocabulary_size", "vocabulary", "n_vocab", "num_tokens")
"""Attributes in which a store may keep the number of tokens."""

LONGEST = 128
"""Tokens of a sample, if there are enough."""
SHORTEST = 4
CONTEXTS = 40
"""An array has at least so many samples."""
MOST_TOKENS = 1 << 18
ROUNDED = 1024
"""A number of tokens that was counted in a sample is rounded up to a multiple of it."""


def text(contents: Contents, look: Look) -> Draft | None:
    """Return a draft for the longest array of tokens; None if there is none."""
    candidates = [a for a in contents.arrays.values() if _may_be_tokens(a, contents) and not a.is_coordinate]
    named = [a for a in candidates if has_word(a.name, TOKEN_WORDS)]
    alone = [a for a in candidates if _is_alone(a, contents) and _looks_like_tokens(a, look(a.name, closely=True))]
    tokens = max(named or alone, key=lambda a: a.shape[0], default=None)
    if tokens is None:
        return _rows_of_text(contents, look)
    if look(tokens.name, closely=True).minimum < 0:
        return None
    context = context_of(tokens.shape[0])
    if not context:
        return None
    vocabulary, why = vocabulary_of(tokens, look(tokens.name, closely=True), contents)
    (dim,) = tokens.dims
    return Draft(
        template="text",
        title=f"Text: the next token of {tokens.name}, from the {context} tokens before it.",
        inputs=(tokens.name,),
        target=tokens.name,
        sample_dim=dim,
        vocabulary=vocabulary,
        classes=vocabulary,
        input_offsets={"start": 0, "stop": context},
        target_offsets={"start": 1, "stop": context + 1},
        stride=context,
        others=unused(contents, tokens.name),
        notes={
            "model_args.vocabulary": why,
            "data.input_offsets": f"a sample is {context} tokens ...",
            "data.target_offsets": "... and for each of them the next one",
        },
    )


def _rows_of_text(contents: Contents, look: Look) -> Draft | None:
    """Return a draft for texts of one length, a row each; None if there are none, or they have labels."""
    arrays = [a for a in contents.arrays.values() if not a.is_coordinate]
    if any(has_word(a.name, LABEL_WORDS) for a in arrays):
        return None
    rows = [a for a in arrays if len(a.dims) == 2 and _are_integers(a) and has_word(a.name, TOKEN_WORDS)]
    rows = [a for a in rows if look(a.name, closely=True).minimum >= 0 and a.shape[1] >= SHORTEST]
    if not rows:
        return None
    tokens = rows[0]
    vocabulary, why = vocabulary_of(tokens, look(tokens.name, closely=True), contents)
    return Draft(
        template="text",
        title=f"Text: the next token of {tokens.name}, from those before it in its row.",
        inputs=(tokens.name,),
        target=tokens.name,
        sample_dim=tokens.dims[0],
        vocabulary=vocabulary,
        classes=vocabulary,
        loss="model:next_token",
        others=unused(contents, tokens.name),
        notes={"model_args.vocabulary": why, "train.loss": "each output is compared with the token after it"},
    )


def context_of(length: int) -> int:
    """Return the tokens of a sample, a power of two; 0 if the array is too short.

    >>> context_of(1_000_000), context_of(1000), context_of(100)
    (128, 16, 0)
    """
    context = LONGEST
    while context >= SHORTEST and context * CONTEXTS > length:
        context //= 2
    return context if context >= SHORTEST else 0


def vocabulary_of(tokens: ArrayFacts, values: Values, contents: Contents) -> tuple[int, str]:
    """Return the number of tokens, and where it comes from."""
    seen = int(values.maximum) + 1 if values.count else 0
    for given in (tokens.attributes, contents.attributes):
        for key in SIZE_KEYS:
            if isinstance(given.get(key), int) and given[key] >= seen:
                return int(given[key]), f"from the attribute {key}"
    if tokens.itemsize == 1:
        return 256, "all values of a byte"
    if values.is_whole:
        return seen, "the largest token is one less"
    rounded = -(-seen // ROUNDED) * ROUNDED
    return rounded, f"the largest token in a sample is {seen - 1:,}; give your tokenizer's number"


def _may_be_tokens(array: ArrayFacts, contents: Contents) -> bool:
    return _are_integers(array) and len(array.dims) == 1 and not is_time(array.dims[0], contents)


def _are_integers(array: ArrayFacts) -> bool:
    return array.stored in "iu" and array.kind in "iu" and array.encoding is None


def _is_alone(array: ArrayFacts, contents: Contents) -> bool:
    """Return True if no other array has its dimension: it is no column of a table."""
    return not any(set(array.dims) & set(other.dims) for other in contents.arrays.values() if other is not array)


def _looks_like_tokens(array: ArrayFacts, values: Values) -> bool:
    is_small = values.count > 0 and values.minimum >= 0 and values.maximum < MOST_TOKENS
    return is_small and 2 <= len(values.distinct) <= values.count // 4
