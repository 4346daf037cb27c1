"""A sequence: its tokens, how many of them the KV cache holds, and the blocks that hold them."""

from __future__ import annotations

from collections.abc import Sequence as TokenIds

from svdengine.kernels.batch import BLOCK_SIZE
from svdengine.kernels.executor import FfnMode


def blocks_for(token_count: int, block_size: int = BLOCK_SIZE) -> int:
    """KV blocks of so many tokens that hold `token_count` tokens."""
    return -(-token_count // block_size)


class Sequence:
    """Owns its tokens and its block table. Positions 0..cached-1 are in the KV cache, the others are pending."""

    def __init__(
        self,
        tokens: TokenIds[int],
        *,
        all_logits: bool = False,
        hidden: bool = False,
        sparsity_bias: float = 0.0,
        ffn: FfnMode | None = None,
        priority: int = 0,
        most_tokens: int | None = None,
    ) -> None:
        if not tokens:
            raise ValueError("a sequence needs at least one token")
        self.tokens = list(tokens)
        self.given = len(self.tokens)  # of them, those that it began with
        self.all_logits = all_logits  # logits of every token are wanted, not only of the last
        self.hidden = hidden  # hidden states of every token are wanted, and no logits
        self.sparsity_bias = sparsity_bias  # shifts the predictor's thresholds for all of its tokens
        self.ffn = ffn  # the path of its FFNs; None: that of the model
        self.priority = priority  # lower numbers go first
        self.most_tokens = most_tokens  # that it may become; None: not said
        self.draft: list[int] = []  # tokens that the step at hand tries after the last one
        self.arrival = 0  # place in the order of arrival, from the scheduler
        self.block_table: list[int] = []  # block i holds positions i * (size of a block) and on
        self.digests: list[bytes] = []  # of its leading blocks that the prefix cache knows
        self.cached = 0  # leading tokens whose keys and values are in the blocks
        self.reused = 0  # of those, tokens that came from the prefix cache

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def pending(self) -> int:
        """Tokens that a forward pass has yet to read."""
        return len(self.tokens) - self.cached

    @property
    def every_row(self) -> bool:
        """Whether all of its tokens must be computed: what they give is wanted, and not only what they leave behind."""
        return self.all_logits or self.hidden

    def append(self, token: int) -> None:
        """Add a sampled token."""
        self.tokens.append(token)

    def drop_oldest(self, keep: int, block_size: int = BLOCK_SIZE) -> None:
        """Forget the older half of what follows the first `keep` tokens; what remains after them is pending again.

        The caller releases the blocks past `cached`, which falls to a block boundary: the block behind it may be
        shared.
        """
        keep = min(keep, len(self.tokens))
        dropped = (len(self.tokens) - keep + 1) // 2
        del self.tokens[keep : keep + dropped]
        self.cached = min(self.cached, keep) // block_size * block_size
        del self.digests[self.cached // block_size :]
