import pytest

from tests.report.small_run import Builder


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    builder = Builder(tmp_path_factory.mktemp("whole"))
    return builder.make(*builder.run.stages)
