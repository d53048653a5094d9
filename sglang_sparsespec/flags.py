"""The plugin's flags: ``--sparsespec-*`` on the command line, and ``sglang.Engine(sparsespec_*=...)``.

Both are generated from the fields of ``settings.Settings``. SGLang's ``ServerArgs`` has no place for foreign fields: it
carries the settings beside them, which are taken out of what it is made from.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from sglang_sparsespec import ALGORITHM, ATTENTION_BACKEND
from sglang_sparsespec.hook_registry import add_hook
from sglang_sparsespec.settings import (
    FLAGS,
    Settings,
    attach_settings,
    flag_of,
    is_sparsespec,
    make_settings,
    settings_of,
)
from sglang_sparsespec.sglang_compat import DECLARES_RESOLUTION, in_force

logger = logging.getLogger(__name__)

#: What replaced each flag (value None) and each value of a flag that is gone, as it follows "was removed: ".
REMOVED: dict[tuple[str, str | None], str] = {
    ("late_launch", None): "leave it out; SGLang launches each round while the one before it runs.",
    ("lookahead", None): "leave it out; tokens are selected by their own scores.",
    ("draft_cost", None): "leave it out; --speculative-num-steps says how many tokens a round drafts.",
    ("draft_policy", "adaptive"): "use --sparsespec-draft-policy pillar, and --speculative-num-steps for shorter drafts.",
    ("draft_policy", "oracle"): "use --sparsespec-draft-policy pillar, or full for drafts that read the whole context.",
    ("kernels", "cuda"): "its new name is triton; use --sparsespec-kernels triton.",
}
REMOVED_FLAGS = tuple(name for name, value in REMOVED if value is None)

#: Settings of the command line that is being made into ``ServerArgs``.
_from_command_line: ContextVar[dict[str, Any]] = ContextVar("sparsespec_from_command_line")


def removal_of(name: str, value: Any) -> str | None:
    """One line that says what replaced the flag ``name``, or its ``value``; None if neither is gone."""
    if (name, None) in REMOVED:
        return f"{flag_of(name)} was removed: {REMOVED[name, None]}"
    if isinstance(value, str) and (name, value) in REMOVED:
        return f"{flag_of(name)} {value} was removed: {REMOVED[name, value]}"
    return None


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    """Add the ``--sparsespec-*`` flags to SGLang's parser. Those that are not given leave no trace in its result."""
    group = parser.add_argument_group(
        "SPARSESPEC", f"Sparse self-speculative decoding (--speculative-algorithm {ALGORITHM})"
    )
    for name, facts in FLAGS.items():
        group.add_argument(
            flag_of(name),
            type=_reader(parser, name, facts["parse"]),
            choices=facts["choices"],
            default=argparse.SUPPRESS,
            help=f"{facts['help']} Default: {facts['shown_default']}.",
        )
    for name in REMOVED_FLAGS:
        reader = _reader(parser, name, str)
        # argparse reads the constant of an option without a value as it reads a value.
        group.add_argument(
            flag_of(name), nargs="?", const="", type=reader, default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )


def _reader(parser: argparse.ArgumentParser, name: str, parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """``parse``, after the process was ended with one line if the flag or its value is gone."""

    def read(text: str) -> Any:
        if (removal := removal_of(name, text)) is not None:
            parser.exit(2, f"error: {removal}\n")
        return parse(text)

    read.__name__ = parse.__name__  # argparse names it where a value cannot be read
    return read


def after_add_cli_args(result: Any, parser: argparse.ArgumentParser) -> None:
    """``ServerArgs.add_cli_args``: SGLang knows no flags of plugins."""
    add_cli_args(parser)


def around_from_cli_args(original: Callable[..., Any], cls: type, args: argparse.Namespace) -> Any:
    """``ServerArgs.from_cli_args``: SGLang hands over its own flags alone."""
    asked = vars(args)
    given = {name: asked[f"sparsespec_{name}"] for name in FLAGS if f"sparsespec_{name}" in asked}
    if DECLARES_RESOLUTION:
        return _with_settings(original(cls, args), given)
    token = _from_command_line.set(given)
    try:
        return original(cls, args)
    finally:
        _from_command_line.reset(token)


def around_init(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """``ServerArgs.__init__``: SGLang takes an unknown keyword for an error, and resolves all others at once.

    Raises:
        ValueError: a flag or value that is gone was asked for, or another attention backend.
    """
    given = {**_from_command_line.get({}), **_taken_from(kwargs)}
    settings = _settings_given(given, kwargs.get("speculative_algorithm"))
    if str(kwargs.get("speculative_algorithm") or "").upper() == ALGORITHM:
        claimed, settings = claim_attention_backend(kwargs.get, settings)
        kwargs.update(claimed)
    attach_settings(self, settings)
    original(self, *args, **kwargs)


def server_args_of_keywords(**kwargs: Any) -> Any:
    """``Engine.server_args_class``: ``ServerArgs`` of an engine's keywords, which SGLang takes for an error if unknown.

    Raises:
        ValueError: a flag or value that is gone was asked for.
    """
    from sglang.srt.server_args import ServerArgs

    given = _taken_from(kwargs)
    return _with_settings(ServerArgs(**kwargs), given)


def claim_before(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Resolution step ``handle_hardware_runtime_validation``, the last one before SGLang looks for an attention backend.

    Raises:
        ValueError: another attention backend was asked for.
    """
    from sglang.srt.arg_groups.overrides import declare_resolution

    if is_sparsespec(server_args):
        view = in_force(server_args)
        claimed, settings = claim_attention_backend(lambda name: getattr(view, name), settings_of(server_args))
        attach_settings(server_args, settings)
        declare_resolution(server_args, ALGORITHM, **claimed)
    previous(server_args)


def _taken_from(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The plugin's settings, taken out of ``kwargs``."""
    names = (*FLAGS, *REMOVED_FLAGS)
    return {name: kwargs.pop(f"sparsespec_{name}") for name in names if f"sparsespec_{name}" in kwargs}


def _with_settings(server_args: Any, given: dict[str, Any]) -> Any:
    attach_settings(server_args, _settings_given(given, server_args.speculative_algorithm))
    return server_args


def _settings_given(given: dict[str, Any], algorithm: Any) -> Settings:
    """The settings of what was asked for by name, with a warning if the server has another ``algorithm``.

    Raises:
        ValueError: a flag or value that is gone was asked for.
    """
    for name, value in given.items():
        if (removal := removal_of(name, value)) is not None:
            raise ValueError(removal)
    if given and str(algorithm or "").upper() != ALGORITHM:
        logger.warning("sparsespec_* settings have no effect without speculative_algorithm=%r.", ALGORITHM)
    return make_settings(**given)


def claim_attention_backend(asked_for: Callable[[str], Any], settings: Settings) -> tuple[dict[str, Any], Settings]:
    """Make ``sparsespec`` the attention backend, and keep the user's choice as the prefill one.

    This comes before SGLang resolves backends, so that it sees an explicit one and does not pick another.

    Args:
        asked_for: the value that the user gave to an argument of SGLang, None if he gave none.

    Returns:
        SGLang's arguments to set, and the settings.

    Raises:
        ValueError: two different backends were asked for, or a split one.
    """
    for name in ("prefill_attention_backend", "decode_attention_backend"):
        if (value := asked_for(name)) not in (None, ATTENTION_BACKEND):
            raise ValueError(
                f"--{name.replace('_', '-')} {value} cannot be combined with --speculative-algorithm {ALGORITHM}, "
                f"whose own backend runs draft and verify; use --sparsespec-base-attention-backend {value} to choose "
                "the prefill backend."
            )
    asked = asked_for("attention_backend")
    if asked not in (None, ATTENTION_BACKEND):
        if settings.base_attention_backend not in (None, asked):
            raise ValueError(
                f"--attention-backend {asked} and --sparsespec-base-attention-backend {settings.base_attention_backend} "
                "contradict each other; give one of them."
            )
        settings = dataclasses.replace(settings, base_attention_backend=asked)
    return {"attention_backend": ATTENTION_BACKEND}, settings


def register_flags() -> None:
    """Let SGLang's command line and ``sglang.Engine`` take the plugin's flags."""
    prefix = "sglang.srt.server_args.ServerArgs."
    add_hook(prefix + "add_cli_args", after_add_cli_args, "after")
    add_hook(prefix + "from_cli_args", around_from_cli_args, "around")
    if DECLARES_RESOLUTION:
        from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
        from sglang.srt.entrypoints.engine import Engine

        Engine.server_args_class = staticmethod(server_args_of_keywords)
        register_resolution_hook("handle_hardware_runtime_validation")(claim_before)
    else:
        add_hook(prefix + "__init__", around_init, "around")
