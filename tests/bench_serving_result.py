"""What SGLang's bench_serving writes of two requests, as far as every test of its results needs it."""

from __future__ import annotations

from typing import Any

TWO_REQUESTS: dict[str, Any] = {
    "completed": 2,
    "errors": ["", ""],
    "duration": 2.0,
    "total_input_tokens": 100,
    "total_output_tokens": 64,
    "output_throughput": 32.0,
}
