"""Entry point of the plugin (group ``sglang.srt.plugins``).

SGLang loads every installed plugin at the start of each of its processes, and only logs a plugin that raises
(``sglang/srt/plugins/__init__.py``). A server that was asked for SPARSESPEC must not come up without it, so failures are
made loud here:

- If the process was started with SPARSESPEC on its command line, it ends with one sentence on stderr and exit status 1.
  (``SystemExit`` is not an ``Exception``, so SGLang's ``except Exception`` lets it through.)
- Otherwise (``sglang.Engine(...)``, or SPARSESPEC not wanted) the algorithm is registered as unavailable, and selecting it
  raises the same sentence.

The project's other modules import SGLang at the top, so :func:`register` imports them after it has checked the version.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

from sglang_sparsespec import ALGORITHM, sglang_compat

logger = logging.getLogger(__name__)


class PluginUnavailableError(RuntimeError):
    """The plugin cannot work in this environment; the message names the remedy."""


def check_environment() -> None:
    """Check the versions and libraries that the plugin needs.

    Raises:
        PluginUnavailableError: wrong SGLang version, or CUDA without FlashInfer.
    """
    if not sglang_compat.IS_SUPPORTED:
        found, (*others, newest) = sglang_compat.VERSION, sglang_compat.SUPPORTED
        raise PluginUnavailableError(
            f"sglang-sparsespec needs sglang {', '.join(others)} or {newest}, but sglang {found} is installed; "
            f"run `pip install sglang=={newest}`, or install the release of sglang-sparsespec that is made for {found}."
        )
    import torch

    if torch.version.cuda is not None and torch.cuda.is_available():
        from importlib.util import find_spec

        if find_spec("flashinfer") is None:
            raise PluginUnavailableError(
                "sglang-sparsespec needs FlashInfer on CUDA, but it is not installed; "
                f"run `pip install flashinfer-python=={sglang_compat.FLASHINFER}`."
            )


def asked_for_on_command_line(argv: list[str]) -> bool:
    """Whether ``argv`` selects SPARSESPEC (``--speculative-algorithm X`` or ``=X``)."""
    for i, arg in enumerate(argv):
        name, _, value = arg.partition("=")
        if name in ("--speculative-algorithm", "--speculative-algo"):
            value = value or (argv[i + 1] if i + 1 < len(argv) else "")
            if value.upper() == ALGORITHM:
                return True
    return False


def register() -> None:
    """Register the algorithm, the attention backend, the flags and the hooks.

    ``sglang.srt.plugins.load_plugins`` calls this once in each of SGLang's processes. SGLang applies the hooks right after
    all plugins ran.

    Raises:
        SystemExit: the plugin is unavailable and SPARSESPEC is on the command line.
    """
    try:
        check_environment()
        from sglang_sparsespec.algorithm import register_algorithm, register_attention_backend
        from sglang_sparsespec.flags import register_flags
        from sglang_sparsespec.scheduler_patch import register_all_hooks

        register_algorithm()
        register_attention_backend()
        register_flags()
        register_all_hooks()
    except Exception as error:
        expected = isinstance(error, PluginUnavailableError)
        reason = str(error) if expected else f"sglang-sparsespec failed to load: {type(error).__name__}: {error}"
        if asked_for_on_command_line(sys.argv):
            if not expected:
                logger.exception("%s", reason)
            print(reason, file=sys.stderr, flush=True)
            raise SystemExit(1) from error
        _register_unavailable(reason)
        raise


def _register_unavailable(reason: str) -> None:
    """Make ``speculative_algorithm="SPARSESPEC"`` raise ``reason`` in this process."""
    from sglang.srt.speculative import spec_registry

    def refuse(server_args: object) -> None:
        raise PluginUnavailableError(reason)

    def refusing_settings(make: Callable[..., Any]) -> Callable[..., Any]:
        def server_args(*args: Any, **kwargs: Any) -> Any:
            # ``sglang.Engine(sparsespec_min_budget=...)``: SGLang would call the keyword unexpected.
            if any(name.startswith("sparsespec_") for name in kwargs):
                raise PluginUnavailableError(reason)
            return make(*args, **kwargs)

        return server_args

    engine: Any = sys.modules.get("sglang.srt.entrypoints.engine")
    if engine is not None and hasattr(engine.Engine, "server_args_class"):
        engine.Engine.server_args_class = staticmethod(refusing_settings(engine.Engine.server_args_class))
    # Either the registration is what failed, or it succeeded before something else failed; then its validator is replaced.
    spec = spec_registry.get_spec(ALGORITHM)
    if spec is not None:
        spec.validate_server_args = refuse
    else:
        spec_registry.register_algorithm(
            ALGORITHM, supports_overlap=True, validate_server_args=refuse
        )(lambda server_args: refuse(server_args))
