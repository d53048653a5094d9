"""Hooks on SGLang's functions, with a check that they are in force.

SGLang logs a hook that cannot be applied and goes on (``sglang.srt.plugins.hook_registry.HookRegistry.apply_hooks``).
:func:`assert_hooks_applied` makes that an error where SPARSESPEC is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_sparsespec.sglang_compat import UNNECESSARY_HOOKS, VERSION

_TARGETS: list[str] = []


def add_hook(target: str, hook: Callable[..., Any], kind: str) -> None:
    """Register ``hook`` on the dotted path ``target`` and remember it for the check, unless this SGLang does without it.

    Args:
        target: module path, class and attribute, as ``HookRegistry.register`` wants it.
        hook: see ``HookRegistry.register`` for its signature by kind.
        kind: ``before``, ``after``, ``around`` or ``replace``.
    """
    if hook.__name__ in UNNECESSARY_HOOKS:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(target, hook, HookType(kind))
    _TARGETS.append(target)


def assert_hooks_applied() -> None:
    """Check that SGLang has applied every hook in this process.

    Raises:
        RuntimeError: a hook is not in force, or none was registered.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry

    missing = [target for target in _TARGETS if target not in HookRegistry._patched]
    if not _TARGETS or missing:
        raise RuntimeError(
            f"sglang-sparsespec is only partly loaded (hooks not applied: {missing or 'all'}); see the plugin errors logged "
            f"above, and reinstall sglang=={VERSION} if its files were changed."
        )
