"""One seed of a study: the run that it is. Light, for those who only need its configuration or folder."""

from components.config import Config


def seed_config(config: Config, seed: int) -> Config:
    """Configuration of one seed's run."""
    own = {"seed": seed, "output_dir": config.stability.output_dir / f"seed_{seed}"}
    return config.model_copy(update={"train": config.train.model_copy(update=own)})
