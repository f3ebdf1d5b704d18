"""A split by fraction and seed: the same whatever the order, whole, and nearly the same with more images."""

import pytest

from model.data.splitting import val_part
from model.errors import UserError

KEYS = [str(i) for i in range(100)]


def test_a_fraction_of_the_keys_is_val_whatever_their_order():
    val = val_part(KEYS, 0.2, 0, where="a")
    assert len(val) == 20
    assert val_part(KEYS[::-1], 0.2, 0, where="a") == val
    assert sorted(val)[:3] == ["15", "18", "20"]  # on every machine, in every version


def test_another_seed_splits_otherwise_and_a_new_image_moves_one_other_at_most():
    val = val_part(KEYS, 0.2, 0, where="a")
    assert len(val_part(KEYS, 0.2, 1, where="a") & val) < 12
    assert len(val_part([*KEYS, "new"], 0.2, 0, where="a") ^ val) <= 2


@pytest.mark.parametrize(("fraction", "count"), [(0.01, 1), (0.5, 2), (0.99, 2)])
def test_each_part_gets_an_image(fraction: float, count: int):
    assert len(val_part(["a", "b", "c"], fraction, 0, where="a")) == count


def test_a_single_image_cannot_be_split():
    with pytest.raises(UserError, match=r"^my\.json: must have at least two images .*, got 1$"):
        val_part(["a"], 0.5, 0, where="my.json")
