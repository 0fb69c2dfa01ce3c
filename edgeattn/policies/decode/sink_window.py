"""Read the first pages and the most recent ones (StreamingLLM, arXiv 2309.17453)."""
from dataclasses import dataclass


@dataclass(frozen=True)
class SinkWindow:
    sink_pages: int = 1
    window_pages: int = 32

    def __post_init__(self):
        if self.sink_pages < 0 or self.window_pages < 1:
            raise ValueError(f"need sink_pages >= 0 and window_pages >= 1, got {self.sink_pages=} {self.window_pages=}")

    def capacity(self, max_pages):
        return min(max_pages, self.sink_pages + self.window_pages)

    def before_attention(self, layer):
        return [("select_sink_window", {"sink_pages": self.sink_pages, "window_pages": self.window_pages})]
