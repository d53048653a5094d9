"""The settings: their ranges, their defaults by policy, and what server arguments carry."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_sparsespec import settings as settings_module
from sglang_sparsespec.settings import (
    ALWAYS,
    AUTO,
    FLAGS,
    NEVER,
    POLICIES,
    Settings,
    attach_settings,
    check_speculate,
    draft_steps,
    is_sparsespec,
    make_settings,
    settings_of,
)


def arguments(**given: Any) -> Any:
    """What stands in for ``ServerArgs``."""
    nothing = {"speculative_algorithm": None, "speculative_num_steps": None, "speculative_num_draft_tokens": None}
    return SimpleNamespace(**{**nothing, **given})


@pytest.mark.parametrize(
    ("length", "budget"), [(0, 0), (100, 100), (128, 128), (2560, 128), (2561, 129), (10_000, 500)]
)
def test_budget(length: int, budget: int) -> None:
    assert Settings().budget(length) == budget


def test_every_setting_but_one_is_a_flag_with_help_and_a_good_default() -> None:
    names = {field.name for field in dataclasses.fields(Settings)}
    assert names - set(FLAGS) == {"prefill_beside_decoding"}, "it is set by a flag of SGLang's"
    for name, facts in FLAGS.items():
        assert facts["help"].endswith("."), name
        assert "%" not in facts["help"], f"argparse would fill in {name}'s help"
    Settings().check()
    for policy in POLICIES:
        make_settings(draft_policy=policy).check()


#: A value out of range, and what the message says of it.
OUT_OF_RANGE: dict[str, tuple[dict[str, Any], str]] = {
    "budget ratio 0": ({"budget_ratio": 0.0}, "--sparsespec-budget-ratio must be in (0, 1], got 0.0; 0.05 is the default."),
    "budget ratio 2": ({"budget_ratio": 2.0}, "--sparsespec-budget-ratio must be in (0, 1], got 2.0"),
    "budget ratio by name": ({"budget_ratio": "half"}, "--sparsespec-budget-ratio must be in (0, 1], got 'half'"),
    "min budget 0": ({"min_budget": 0}, "--sparsespec-min-budget must be at least 1 token, got 0; 128 is the default."),
    "min budget of half a token": ({"min_budget": 0.5}, "--sparsespec-min-budget must be at least 1 token, got 0.5"),
    "sinks": ({"num_sinks": -1}, "--sparsespec-num-sinks must not be negative, got -1; 4 is the default."),
    "policy": (
        {"draft_policy": "x"},
        "--sparsespec-draft-policy must be one of pillar, window, streaming, vegas, triforce, full, got 'x'",
    ),
    "kernels": ({"kernels": "x"}, "--sparsespec-kernels must be one of auto, torch, triton, flashinfer, got 'x'"),
    "schedule": ({"schedule": "x"}, "--sparsespec-schedule must be one of lockstep, unified, got 'x'"),
    "speculate": ({"speculate": "x"}, "--sparsespec-speculate must be one of always, auto, never, got 'x'"),
    "negative host tier": (
        {"host_kv_gb": -1.0},
        "--sparsespec-host-kv-gb must be a size in GB, 0 for no host tier, or 'auto', got -1.0",
    ),
    "host tier by name": ({"host_kv_gb": "all"}, "or 'auto', got 'all'; 0.0 is the default."),
}


@pytest.mark.parametrize("case", OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_with_flag_and_default(case: str) -> None:
    given, message = OUT_OF_RANGE[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        make_settings(**given).check()


@pytest.mark.parametrize("name", ["min_budget", "num_sinks", "host_kv_gb", "budget_ratio"])
def test_a_value_at_the_end_of_the_range_is_accepted(name: str) -> None:
    least: dict[str, Any] = {"min_budget": 1, "num_sinks": 0, "host_kv_gb": 0, "budget_ratio": 1}
    make_settings(**{name: least[name]}).check()


def test_policies_have_defaults_of_their_own() -> None:
    assert make_settings() == Settings() == Settings(0.05, 128, "pillar", 4, None, "auto", "lockstep", 0.0, "auto", "auto")
    vegas = make_settings(draft_policy="vegas")
    assert (vegas.budget_ratio, vegas.speculate) == (0.07, AUTO)
    assert make_settings(draft_policy="vegas", budget_ratio=0.05).budget_ratio == 0.05
    assert {name for name in POLICIES if make_settings(draft_policy=name).speculate == ALWAYS} == {"triforce", "full"}
    assert make_settings(draft_policy="full", speculate=NEVER).speculate == NEVER


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("speculate", [AUTO, NEVER, ALWAYS])
def test_policies_for_study_speculate_always(policy: str, speculate: str) -> None:
    settings = make_settings(draft_policy=policy, speculate=speculate)
    if speculate != ALWAYS and policy in ("triforce", "full"):
        named = f"--sparsespec-speculate {speculate} together with --sparsespec-draft-policy {policy}"
        with pytest.raises(ValueError, match=f"{named}.*use --sparsespec-speculate always or another policy"):
            check_speculate(settings)
    else:
        check_speculate(settings)


def test_the_draft_length_is_the_given_one_or_the_policys() -> None:
    assert draft_steps(arguments()) == 8
    assert draft_steps(arguments(speculative_num_steps=3)) == 3
    assert draft_steps(arguments(speculative_num_draft_tokens=4)) == 3
    assert draft_steps(arguments(_sparsespec_settings=make_settings(draft_policy="vegas"))) == 6


def test_server_arguments_carry_settings_into_another_process() -> None:
    args = arguments()
    assert settings_of(args) == Settings()
    attach_settings(args, Settings(min_budget=77))
    for copied in (args, copy.deepcopy(args), pickle.loads(pickle.dumps(args))):
        assert settings_of(copied).min_budget == 77


def test_the_algorithm_is_recognised() -> None:
    assert is_sparsespec(arguments(speculative_algorithm="SPARSESPEC"))
    assert is_sparsespec(arguments(speculative_algorithm="SparseSpec"))
    assert not is_sparsespec(arguments(speculative_algorithm="NGRAM"))
    assert not is_sparsespec(arguments()) and not is_sparsespec(None)


def test_a_host_tier_is_there_if_it_has_a_size() -> None:
    assert not Settings().has_host_tier and not Settings(host_kv_gb=0).has_host_tier
    assert Settings(host_kv_gb=0.5).has_host_tier and Settings(host_kv_gb="auto").has_host_tier


def test_settings_need_no_other_module() -> None:
    """Every layer reads them, so they may need neither SGLang nor torch."""
    source = open(settings_module.__file__, encoding="utf-8").read()
    imported = set(re.findall(r"^(?:from|import) ([\w.]+)", source, re.MULTILINE))
    bare = {"sglang_sparsespec", "sglang_sparsespec.sglang_compat"}
    assert imported - bare <= {*sys.stdlib_module_names, "collections.abc"}
