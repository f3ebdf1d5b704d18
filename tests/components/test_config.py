"""The sections of the configuration: frozen, under the names of overrides, checked where they are declared."""

import pytest
from pydantic import ValidationError

from components.config import ClusterConfig, Config, StabilityConfig, canonical
from cuda_ops.operators.multilevel_roi_align import MAX_SAMPLES
from model.config import DataConfig, ModelConfig


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


def test_samples_of_a_bin_are_limited_as_in_the_operator() -> None:
    for ratio in (None, 0, 2, MAX_SAMPLES):
        assert ModelConfig(pool_sampling_ratio=ratio).pool_sampling_ratio == ratio
    for ratio in (-1, MAX_SAMPLES + 1):
        with pytest.raises(ValidationError, match="pool_sampling_ratio"):
            ModelConfig(pool_sampling_ratio=ratio)


def test_a_range_of_pixels_is_two_ascending_values() -> None:
    for allowed in ((), (0, 4095)):
        assert DataConfig(pixel_range=allowed).pixel_range == allowed
    for refused in ((7,), (5, 5), (5, 4)):
        with pytest.raises(ValidationError, match="pixel_range must be empty or two ascending values"):
            DataConfig(pixel_range=refused)


def test_quantities_have_the_form_that_kubernetes_gives_them():
    forms = {
        "1024Mi": "1Gi", "1Gi": "1Gi", "1536Mi": "1536Mi", "1.5Gi": "1536Mi", "1024Ti": "1Pi", "32G": "32G",
        "1000M": "1G",
        "1": "1", "1000": "1k", "34359738368": "34359738368", "2048Ki": "2Mi",
    }  # fmt: skip
    assert {text: canonical(text) for text in forms} == forms
    for text in ("", "0", "0Gi", "-1Gi", "32GB", "1gi", "1KI", "1m", "1.5", "1e9", "1 Gi", "9999999Ei", "１Gi", "Gi"):
        with pytest.raises(ValueError, match="must be whole bytes"):
            canonical(text)


def test_cores_are_whole_numbers_or_their_thousandths() -> None:
    for cores in (2, "2", "2000m"):
        assert ClusterConfig.model_validate({"cpu": cores}).cpu == 2
    for cores in (0, "0", "2500m", "m", "-1000m", 1.5):
        with pytest.raises(ValidationError, match="cpu"):
            ClusterConfig.model_validate({"cpu": cores})


def test_image_references_and_node_labels_are_those_that_kubernetes_takes() -> None:
    digest = "@sha256:" + 64 * "a"
    for image in ("", "a", "a/b:1", "localhost:5000/a/b_c:v1.0-rc", "[::1]:5000/a", "ghcr.io/a", f"a:1{digest}"):
        assert ClusterConfig(image=image).image == image
    for image in ("A", "A B", "a b", "a:", "a@", "http://a/b", "a//b", "/a", "a:1:2", "-a/b", "a\n", "a@sha256:12"):
        with pytest.raises(ValidationError, match="image"):
            ClusterConfig(image=image)
    for label in ("nvidia.com/gpu.product=NVIDIA-H100", "disk=ssd", "spot="):
        assert ClusterConfig(node_selector=(label,)).node_selector == (label,)
    for label in ("a b=c", "a=b c", "a/b/c=d", "=a", f"{'a' * 64}=b"):
        with pytest.raises(ValidationError, match="node_selector"):
            ClusterConfig(node_selector=(label,))
    for toleration in ("nvidia.com/gpu:NoSchedule", "a=b:NoExecute", "a=:PreferNoSchedule"):
        assert ClusterConfig(tolerations=(toleration,)).tolerations == (toleration,)
