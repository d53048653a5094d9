"""SGLang's HTTP application for a tokenizer worker (``--tokenizer-worker-num``): imported by name, in a new process.

Some hooks are read while the application is imported, so the plugins are loaded before.
"""

from sglang.srt.plugins import load_plugins

load_plugins()

from sglang.srt.entrypoints.http_server import app  # noqa: E402

__all__ = ["app"]
