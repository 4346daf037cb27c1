"""What requests for embeddings may hold: OpenAI's, and Ollama's."""

from __future__ import annotations

from svdengine.scheduling.embedding import POOLINGS
from svdengine.server.body_schema import choice, either, flag, listing, number, record, text, whole
from svdengine.server.ollama_fields import OPTIONS

MAX_TEXTS = 2048  # of one request, as at OpenAI
MAX_NUMBERS = 1 << 22  # of one answer, which is built in memory: about 200 MB

_TOKEN = whole(0, 1 << 31)
_TOKENS = listing(_TOKEN, 1)

EMBEDDINGS = record(
    {
        "input": either(text(1), listing(either(text(1), _TOKENS, _TOKEN), 1)),
        "model": text(),
        "encoding_format": choice("float", "base64"),
        "dimensions": whole(1, 1 << 31),
        "pooling": choice(*POOLINGS),
        "user": text(),
    },
    ["input"],
)

OLLAMA_EMBED = record(
    {
        "model": text(1),
        "input": either(text(), listing(text())),
        "truncate": flag(),
        "dimensions": whole(0, 1 << 31),  # 0: as many as there are
        "options": OPTIONS,
        "keep_alive": either(text(), number(-1e9, 1e9)),
    },
    ["model", "input"],
)
