"""What decides a result, and what sets two runs apart."""

from components.config import Config
from components.runs.identity import _DECIDING, _NOT_DECIDING


def test_keys_that_decide_nothing_exist() -> None:
    assert set(Config().flat()) >= _NOT_DECIDING
    assert all(key.startswith(_DECIDING) for key in _NOT_DECIDING)
