"""SentencePiece BPE tokenizers as a `tokenizers` object: from pieces, scores and types."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # sentencepiece_model.proto, and GGUF

SPACE = "\u2581"  # how SentencePiece writes a space


def build_sentencepiece(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    added: Sequence[AddedToken],
    add_space_prefix: bool,
) -> Tokenizer:
    """A tokenizer that merges as SentencePiece's BPE does, with bytes for what is not in the vocabulary.

    SentencePiece joins the two neighbours whose union has the highest score; with the merges in the order of those
    scores, ordinary BPE does the same. With `add_space_prefix`, a space is put before the text and before what
    follows a special token. Raises ValueError when there is no unknown token.
    """
    vocabulary: dict[str, int] = {}
    for index, piece in enumerate(pieces):
        vocabulary.setdefault(piece, index)
    unknown = next((piece for piece, kind in zip(pieces, types, strict=True) if kind == UNKNOWN), None)
    if unknown is None:
        raise ValueError("the tokenizer has no unknown token")
    model = models.BPE(
        vocab=vocabulary,
        merges=_merges(pieces, scores, types),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=BYTE in types,
    )
    tokenizer = Tokenizer(model)
    normal = [normalizers.Replace(" ", SPACE)]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), *normal] if add_space_prefix else normal)
    decode = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*decode, decoders.Strip(" ", 1, 0)] if add_space_prefix else decode)
    tokenizer.add_tokens(list(added))
    return tokenizer


def _merges(pieces: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """Every way to make a normal piece out of two others, best score first."""
    normal = {piece for piece, kind in zip(pieces, types, strict=True) if kind == NORMAL}
    ranked: list[tuple[float, int, str, str]] = []
    for index, (piece, score) in enumerate(zip(pieces, scores, strict=True)):
        if piece not in normal:
            continue
        halves = ((piece[:cut], piece[cut:]) for cut in range(len(piece) - 1, 0, -1))
        ranked.extend((-score, index, left, right) for left, right in halves if left in normal and right in normal)
    ranked.sort(key=lambda merge: merge[:2])
    return [(left, right) for *_, left, right in ranked]
