"""A server on loopback with a tiny model, whose steps a test can hold up."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from patience import PATIENCE
from tiny_model import write_tiny_model
from tiny_predictor import write_sparse_model

import svdengine
from svdengine import LLM
from svdengine.kernels.batch import Batch
from svdengine.kernels.executor import Logits
from svdengine.server.http_server import HttpServer, listen, url_of
from svdengine.server.service import Service
from svdengine.server.settings import Settings


class GatedExecutor:
    """Passes everything on to another executor; while it is held, steps wait to be allowed."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._held = False
        self._allowed = threading.Semaphore(0)
        self.fail = False

    def hold(self) -> None:
        self._held = True

    def allow(self, steps: int) -> None:
        self._allowed.release(steps)

    def let_go(self) -> None:
        self._held = False
        self._allowed.release()

    def forward(self, batch: Batch) -> Logits:
        if self._held:
            self._allowed.acquire()
        if self.fail:
            raise RuntimeError("the device is on fire")
        logits: Logits = self._inner.forward(batch)
        return logits

    @property
    def ffn(self) -> Any:
        return self._inner.ffn

    @ffn.setter
    def ffn(self, ffn: Any) -> None:
        self._inner.ffn = ffn

    def hidden_states(self) -> Any:
        """Written out, as `isinstance` asks for it."""
        return self._inner.hidden_states()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class LiveServer:
    """A running server and what is behind it."""

    def __init__(self, llm: LLM, named: str = "tiny", **settings: Any) -> None:
        self.llm = llm
        self.gate = GatedExecutor(llm._engine.executor)
        llm._engine.executor = self.gate  # type: ignore[assignment]
        self.settings = Settings(name=named, port=0, **settings)
        self.service = Service(llm, self.settings)
        self._listening = listen(self.settings)
        self.url = url_of(self._listening)
        self.address = self._listening.getsockname()[:2]
        self.http = HttpServer(self.service)
        self.thread = threading.Thread(target=self.http.run, args=(self._listening,))
        self.thread.start()

    def close(self) -> None:
        self.gate.let_go()
        self.http.stop()
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        self._listening.close()

    def blocks_in_use(self) -> int:
        """KV blocks that neither a request nor the prefix cache gave back; when no request runs."""
        self.llm._engine.prefix_cache.clear()
        return self.llm._engine.pool.block_count - self.llm._engine.pool.free_count


@contextmanager
def live_server(folder: Path, context: int = 256, sparse: bool = False, **settings: Any) -> Iterator[LiveServer]:
    """`sparse`: its model has a predictor, and runs by it."""
    path = folder / ("sparse.svdp" if sparse else "tiny.svdp")
    if not path.exists():
        (write_sparse_model if sparse else write_tiny_model)(path)
    ffn: Any = "sparse" if sparse else "auto"
    with svdengine.load(path, device="reference", context=context, sequences=4, ffn=ffn) as llm:
        server = LiveServer(llm, **settings)
        try:
            yield server
        finally:
            server.close()
