"""The sections of the configuration: frozen, under the names of overrides, checked where they are declared."""

import pytest

from components.config import Config, StabilityConfig


def test_sections_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().train.base_lr = 1.0  # type: ignore[misc]


def test_flat_names_are_the_names_of_overrides() -> None:
    flat = Config().flat()
    assert flat["data.shapes.seed"] == 0
    assert flat["train.output_dir"] == "runs/default"
    assert not any(isinstance(value, dict) for value in flat.values())


def test_a_configuration_names_each_seed_once() -> None:
    with pytest.raises(ValueError, match="seeds must differ"):
        StabilityConfig(seeds=(1, 2, 1))
