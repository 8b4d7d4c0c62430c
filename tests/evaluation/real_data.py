"""Where the public data lie that some tests need: REASONEMBED_TEST_DATA, or beside the project."""

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("REASONEMBED_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="REASONEMBED_TEST_DATA is not set")
