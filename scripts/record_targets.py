"""Record the parameters of SGLang's functions that the plugin hooks, for the version in this environment.

Run it in an environment of each supported version after hooks were added or moved, and read the difference: a hook must fit
each function that it is put on.
"""

from __future__ import annotations

import json

from sglang.srt.plugins import load_plugins

from sglang_sparsespec import hook_registry
from sglang_sparsespec.sglang_compat import VERSION


def main() -> None:
    """See the module's docstring."""
    load_plugins()
    recorded = hook_registry.recorded_targets() if hook_registry.RECORDED_TARGETS.exists() else {}
    recorded[VERSION] = {target: hook_registry.parameters_of(target) for target in sorted(set(hook_registry._TARGETS))}
    text = json.dumps(dict(sorted(recorded.items())), indent=1)
    hook_registry.RECORDED_TARGETS.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
