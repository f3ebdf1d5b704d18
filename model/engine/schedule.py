"""Length and steps of training given in epochs, turned into iterations."""

from model.config import TrainConfig


def in_iterations(train: TrainConfig, batches_per_epoch: int) -> TrainConfig:
    """The same training with `max_iters` and `lr_steps` alone; unchanged if these were given.

    Where `iters_range` limits the length, `lr_epochs` are stretched or shortened with it.
    """
    if not train.epochs:
        return train
    lowest, highest = train.iters_range or (1, None)
    max_iters = max(round(train.epochs * batches_per_epoch), lowest)
    max_iters = max_iters if highest is None else min(max_iters, highest)
    iters_per_epoch = max_iters / train.epochs
    lr_steps = sorted({max(round(epoch * iters_per_epoch), 1) for epoch in train.lr_epochs})
    own = {"max_iters": max_iters, "lr_steps": tuple(lr_steps), "epochs": 0.0, "lr_epochs": (), "iters_range": ()}
    return train.model_copy(update=own)
