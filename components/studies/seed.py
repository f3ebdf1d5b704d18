"""One seed of a study: the run that it is. Light, for those who only need its configuration or folder."""

from pathlib import Path

from components.config import Config, StabilityConfig


def seed_dir(study: StabilityConfig, seed: int) -> Path:
    """Folder of one seed's run."""
    return study.output_dir / f"seed_{seed}"


def seed_config(config: Config, seed: int) -> Config:
    """Configuration of one seed's run."""
    own = {"seed": seed, "output_dir": seed_dir(config.stability, seed)}
    return config.model_copy(update={"train": config.train.model_copy(update=own)})
