"""Settings and result of one measurement."""

from typing import Literal

import torch

from model.config import ModelConfig, Section

NUM_CLASSES = 80  # COCO's

# torchvision's network is measured in both memory formats (NHWC: channels-last); the faster depends on device and
# dtype.
Name = Literal["ours", "torchvision", "torchvision NHWC"]
MEMORY_FORMATS: dict[Name, torch.memory_format] = {
    "torchvision": torch.contiguous_format,
    "torchvision NHWC": torch.channels_last,
}


class Case(Section):
    """Settings of one measurement."""

    mode: Literal["train", "inference"]
    networks: tuple[Name, ...]  # they take steps in turn
    dtype: Literal["float32", "tf32", "bfloat16", "float16"]
    batch: int
    height: int
    width: int
    warmup: int
    steps: int
    steps_per_wait: int = 1
    device: str
    model: ModelConfig
    compile: bool = False  # train.compile, for our network
    cuda_graph: bool = False  # train.cuda_graph, for our network
    deterministic: bool = False  # train.deterministic, for our network's training
    processes: int = 1  # number of processes that train together, each on its own batch


class Measurement(Section):
    """Result of one measurement."""

    step_s: dict[str, list[float]]  # network → times, each the mean of steps_per_wait steps
    peak_memory_mib: float | None  # see PeakMemory
