import pytest

from reasonembed.run import STAGES
from tests.report.small_run import Builder


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    return Builder(tmp_path_factory.mktemp("whole")).make(*STAGES)
