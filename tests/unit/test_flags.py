"""Flags and keywords, and what is said of those that are gone."""

from __future__ import annotations

import argparse
import dataclasses
import pickle
import re
from collections.abc import Callable
from typing import Any

import make_docs
import pytest
from sglang_parts import resolved

from sglang_sparsespec import ALGORITHM
from sglang_sparsespec.flags import REMOVED, REMOVED_FLAGS, add_cli_args, removal_of
from sglang_sparsespec.settings import FLAGS, POLICIES, Settings, flag_of, make_settings, settings_of
from sglang_sparsespec.sglang_compat import in_force

pytestmark = pytest.mark.usefixtures("plugin")

#: A value other than the default for each setting.
OTHER_VALUES: dict[str, Any] = {
    "budget_ratio": 0.125,
    "min_budget": 96,
    "draft_policy": "streaming",
    "num_sinks": 7,
    "base_attention_backend": "torch_native",
    "kernels": "torch",
    "schedule": "unified",
    "host_kv_gb": 0.5,
    "speculate": "always",
    "draft_weights": "model",
}


def parse(*arguments: str) -> Any:
    """``ServerArgs`` of a command line."""
    from sglang.srt.server_args import prepare_server_args

    return prepare_server_args(list(arguments))


@pytest.fixture(scope="module")
def help_text() -> str:
    """The help of SGLang's server, with the plugin's flags at its end."""
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    text = " ".join(parser.format_help().split())
    return text[text.index("Sparse self-speculative decoding") :]


# --------------------------------------------------------------------------- settings


def test_every_setting_is_a_flag_in_help(help_text: str) -> None:
    settings = {field.name for field in dataclasses.fields(Settings)} - {"prefill_beside_decoding"}
    assert set(OTHER_VALUES) == set(FLAGS) == settings
    for setting in OTHER_VALUES:
        assert re.search(rf"{flag_of(setting)} \S+ [A-Z].*? Default: ", help_text), f"{flag_of(setting)} has no help"
    for policy in POLICIES:
        assert f"'{policy}'" in help_text
    assert "Default: 0.05 (0.07 with vegas)." in help_text


@pytest.mark.parametrize("setting", OTHER_VALUES)
def test_a_setting_is_accepted_on_the_command_line(setting: str, llama: str) -> None:
    asked = ["--model-path", llama, "--device", "cpu", "--speculative-algorithm", ALGORITHM]
    found = settings_of(resolved(parse(*asked, flag_of(setting), str(OTHER_VALUES[setting]))))
    assert getattr(found, setting) == OTHER_VALUES[setting]
    expected = dataclasses.replace(settings_of(resolved(parse(*asked))), **{setting: OTHER_VALUES[setting]})
    assert found == expected, "another setting changed with it"


@pytest.mark.parametrize("setting", OTHER_VALUES)
def test_a_setting_is_accepted_as_a_keyword(setting: str, resolve: Callable[..., Any]) -> None:
    found = settings_of(resolve(**{f"sparsespec_{setting}": OTHER_VALUES[setting]}))
    assert getattr(found, setting) == OTHER_VALUES[setting]
    assert found == dataclasses.replace(settings_of(resolve()), **{setting: OTHER_VALUES[setting]})


def test_a_setting_is_accepted_from_a_configuration_file(llama: str, tmp_path: Any) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(f"model-path: {llama}\ndevice: cpu\nsparsespec-min-budget: 96\nsparsespec-host-kv-gb: auto\n")
    found = settings_of(parse("--config", str(file)))
    assert (found.min_budget, found.host_kv_gb) == (96, "auto")


def test_settings_are_accepted_by_the_engine(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``sglang.Engine`` hands its keywords to ``ServerArgs``; no process is started here."""
    import sglang

    class Launched(Exception):
        pass

    def launch(engine: Any, server_args: Any, **kwargs: Any) -> None:
        found.append(server_args)
        raise Launched

    from sglang.srt.entrypoints.engine import Engine

    found: list[Any] = []
    monkeypatch.setattr("atexit.register", lambda function: None)  # the engine's own shutdown
    monkeypatch.setattr(Engine, "_launch_subprocesses", launch)
    settings = {f"sparsespec_{name}": value for name, value in OTHER_VALUES.items()}
    with pytest.raises(Launched):
        sglang.Engine(model_path=llama, device="cpu", speculative_algorithm=ALGORITHM, **settings)
    assert settings_of(found[0]) == Settings(**OTHER_VALUES)


def test_settings_of_a_command_line_do_not_leak_into_the_next_arguments(
    llama: str, resolve: Callable[..., Any]
) -> None:
    parse("--model-path", llama, "--device", "cpu", "--sparsespec-min-budget", "77")
    assert settings_of(resolve()).min_budget == Settings.min_budget


def test_settings_travel_to_another_process(resolve: Callable[..., Any]) -> None:
    """The scheduler process gets a pickled copy."""
    import copy

    args = resolve(sparsespec_min_budget=77)
    assert settings_of(pickle.loads(pickle.dumps(args))).min_budget == 77
    assert settings_of(copy.deepcopy(args)).min_budget == 77


def test_an_unknown_setting_is_an_error(resolve: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="sparsespec_min_budgets"):
        resolve(sparsespec_min_budgets=1)


def test_a_value_that_cannot_be_read_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    for flag, value, said in (
        ("--sparsespec-min-budget", "many", "invalid int value: 'many'"),
        ("--sparsespec-host-kv-gb", "all", "invalid size_or_auto value: 'all'"),
        ("--sparsespec-kernels", "x", "invalid choice: 'x'"),
    ):
        parser = argparse.ArgumentParser()
        add_cli_args(parser)
        with pytest.raises(SystemExit):
            parser.parse_args([flag, value])
        assert f"argument {flag}: {said}" in capsys.readouterr().err


def test_settings_without_the_algorithm_are_named(
    llama: str, resolve: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    said = "no effect without speculative_algorithm='SPARSESPEC'"
    resolve(speculative_algorithm=None)
    assert said not in caplog.text
    resolve(speculative_algorithm=None, sparsespec_min_budget=64)
    assert said in caplog.text


def test_vegas_has_a_draft_length_and_ratio_of_its_own(llama: str, resolve: Callable[..., Any]) -> None:
    for args in (
        resolve(sparsespec_draft_policy="vegas"),
        parse("--model-path", llama, "--device", "cpu", "--speculative-algorithm", ALGORITHM,
              "--sparsespec-draft-policy", "vegas"),
    ):  # fmt: skip
        args = in_force(resolved(args))
        assert (args.speculative_num_steps, args.speculative_num_draft_tokens) == (6, 7)
        assert settings_of(args).budget_ratio == 0.07


def test_a_given_draft_length_and_ratio_are_kept_with_vegas(resolve: Callable[..., Any]) -> None:
    args = resolve(sparsespec_draft_policy="vegas", speculative_num_steps=8, sparsespec_budget_ratio=0.05)
    assert in_force(args).speculative_num_steps == 8 and settings_of(args).budget_ratio == 0.05


# ----------------------------------------------------------------------------- removed

#: What the line must name: the flag, its value, and what to use instead.
SAID = {
    ("late_launch", None): ("--sparsespec-late-launch was removed", "leave it out"),
    ("lookahead", None): ("--sparsespec-lookahead was removed", "leave it out"),
    ("draft_cost", None): ("--sparsespec-draft-cost was removed", "--speculative-num-steps"),
    ("draft_policy", "adaptive"): ("--sparsespec-draft-policy adaptive was removed", "--sparsespec-draft-policy pillar"),
    ("draft_policy", "oracle"): ("--sparsespec-draft-policy oracle was removed", "--sparsespec-draft-policy pillar"),
    ("kernels", "cuda"): ("--sparsespec-kernels cuda was removed", "--sparsespec-kernels triton"),
}


def test_every_removed_flag_has_a_line() -> None:
    assert set(SAID) == set(REMOVED)
    assert set(REMOVED_FLAGS) == {"late_launch", "lookahead", "draft_cost"}


@pytest.mark.parametrize("as_one_word", [True, False])
@pytest.mark.parametrize("removed", SAID)
def test_a_removed_flag_on_the_command_line_ends_it_with_one_line(
    removed: tuple[str, str | None], as_one_word: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    name, value = removed
    given = {"late_launch": None, "lookahead": "4", "draft_cost": "0.2"}.get(name, value)
    command = [flag_of(name)]
    if given is not None:
        command = [f"{flag_of(name)}={given}"] if as_one_word else [flag_of(name), given]
    with pytest.raises(SystemExit) as stopped:
        parse("--model-path", "x", *command, "--speculative-algorithm", ALGORITHM)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    said, instead = SAID[removed]
    assert line.startswith(f"error: {said}: ") and instead in line


@pytest.mark.parametrize("algorithm", [ALGORITHM, None])
@pytest.mark.parametrize("removed", SAID)
def test_a_removed_flag_as_a_keyword_is_an_error_of_one_line(
    removed: tuple[str, str | None], algorithm: str | None, resolve: Callable[..., Any]
) -> None:
    name, value = removed
    given = {"late_launch": True, "lookahead": 4, "draft_cost": 0.2}.get(name, value)
    with pytest.raises(ValueError) as stopped:
        resolve(**{f"sparsespec_{name}": given}, speculative_algorithm=algorithm)
    (line,) = str(stopped.value).splitlines()
    said, instead = SAID[removed]
    assert line.startswith(f"{said}: ") and instead in line


def test_a_removed_flag_in_a_configuration_file_ends_the_server(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("model-path: x\nsparsespec-late-launch: true\n")
    with pytest.raises(SystemExit):
        parse("--config", str(file))
    assert capsys.readouterr().err.startswith("error: --sparsespec-late-launch was removed: ")


def test_removed_flags_are_not_in_help(help_text: str) -> None:
    for name in REMOVED_FLAGS:
        assert flag_of(name) not in help_text
    words = set(re.findall(r"\w+", help_text))
    assert "torch" in words and not words & {"adaptive", "oracle", "cuda", "lookahead", "late"}


def test_what_is_not_removed_is_left_alone() -> None:
    assert removal_of("kernels", "triton") is None
    assert removal_of("min_budget", 128) is None
    assert removal_of("draft_policy", ["adaptive"]) is None, "Settings.check refuses it"
    for policy in POLICIES:
        make_settings(draft_policy=policy).check()


# -------------------------------------------------------------------------------- docs


def test_the_page_of_flags_and_metrics_is_current() -> None:
    text = make_docs.PAGE.read_text(encoding="utf-8")
    assert make_docs.filled(text) == text, "run python scripts/make_docs.py"


def test_the_table_of_flags_has_every_flag_with_its_default() -> None:
    rows = {}
    for line in make_docs.flag_table().splitlines():
        if line.startswith("| `--"):
            flag, default, meaning = line.strip("| ").split(" | ")
            rows[flag.strip("`")] = default
            assert len(meaning) > 10
    assert rows["--speculative-num-steps"] == "8 (6 with vegas)"
    for name, facts in FLAGS.items():
        assert rows[flag_of(name)] == facts["shown_default"]
        assert str(getattr(Settings, name)) in rows[flag_of(name)] or getattr(Settings, name) is None
    assert not {flag_of(name) for name in REMOVED_FLAGS} & set(rows)


PAGE = "a\n<!-- flags -->\nold\n<!-- /flags -->\nb\n<!-- metrics --><!-- /metrics -->\nc\n"


def test_the_generated_tables_stand_between_their_marks() -> None:
    text = make_docs.filled(PAGE)
    assert text.startswith("a\n<!-- flags -->\n| flag |") and text.endswith("|\n<!-- /metrics -->\nc\n")
    assert "\nold\n" not in text and "\n<!-- /flags -->\nb\n" in text
    assert make_docs.filled(text) == text


def test_a_page_without_the_marks_is_an_error() -> None:
    with pytest.raises(ValueError, match="<!-- metrics -->.*0 times"):
        make_docs.filled(PAGE.replace("metrics", "other"))
    with pytest.raises(ValueError, match="<!-- flags -->.*2 times"):
        make_docs.filled(PAGE + PAGE)


def test_the_program_writes_and_checks_the_page(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "operations.md"
    page.write_text(PAGE)
    monkeypatch.setattr(make_docs, "PAGE", page)
    assert make_docs.main(["--check"]) == 1 and page.read_text() == PAGE
    assert "run python scripts/make_docs.py" in capsys.readouterr().err
    assert make_docs.main([]) == 0 and page.read_text() == make_docs.filled(PAGE)
    assert make_docs.main(["--check"]) == 0
