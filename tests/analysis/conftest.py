"""One MLflow store for all tests here: making one takes seconds."""

import pytest

from analysis.load import Comparison, load_comparison
from analysis.summary import Block, summarise
from tests.analysis.synthetic import Store, small_cells


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("mlflow"))


@pytest.fixture(scope="session")
def small(store: Store) -> str:
    """The name of the small comparison."""
    store.comparison("small", small_cells())
    return "small"


@pytest.fixture(scope="session")
def comparison(store: Store, small: str) -> Comparison:
    return load_comparison(store.uri, small)


@pytest.fixture(scope="session")
def block(comparison: Comparison) -> Block:
    (only,) = summarise(comparison)
    return only
