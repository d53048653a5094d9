"""Hooks on SGLang's functions, with a check that they are in force and fit.

SGLang logs a hook that cannot be applied and goes on (``sglang.srt.plugins.hook_registry.HookRegistry.apply_hooks``), and it
applies one to a function that has changed. :func:`assert_hooks_applied` makes both an error where SPARSESPEC is used.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sglang_sparsespec.sglang_compat import UNNECESSARY_HOOKS, VERSION

#: Parameters of every hooked function, by version and target; ``scripts/record_targets.py`` writes it.
RECORDED_TARGETS = Path(__file__).with_name("hook_targets.json")
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


def parameters_of(target: str) -> str:
    """The parameters of SGLang's own function at ``target``, without annotations: ``"(self, batch, *, out=None)"``.

    Of a very long list (that of ``ServerArgs``) its hash.
    """
    owner, _, name = target.rpartition(".")
    signature = inspect.signature(inspect.unwrap(getattr(pkgutil.resolve_name(owner), name)))
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    text = str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    return text if len(text) < 500 else hashlib.sha256(text.encode()).hexdigest()


def recorded_targets() -> dict[str, dict[str, str]]:
    """The parameters of hooked functions as recorded, by version and target."""
    return json.loads(RECORDED_TARGETS.read_text(encoding="utf-8"))


def assert_hooks_applied() -> None:
    """Check that SGLang has applied every hook in this process, to functions with the parameters that were recorded.

    Raises:
        RuntimeError: a hook is not in force or does not fit, or none was registered.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry

    missing = [target for target in _TARGETS if target not in HookRegistry._patched]
    if not _TARGETS or missing:
        raise RuntimeError(
            f"sglang-sparsespec is only partly loaded (hooks not applied: {missing or 'all'}); see the plugin errors logged "
            f"above, and reinstall sglang=={VERSION} if its files were changed."
        )
    recorded = recorded_targets()[VERSION]
    changed = [target for target in dict.fromkeys(_TARGETS) if recorded.get(target) != parameters_of(target)]
    if changed:
        raise RuntimeError(
            f"sglang-sparsespec does not fit this sglang {VERSION} (functions with other parameters: {changed}); reinstall "
            f"sglang=={VERSION}, and remove other plugins that change it."
        )
