"""Updates that are not finite are left out as if they had not been, in every ZeRO stage, precision
and optimizer.
"""

import pytest
from guard_worker import CASES, check

from sra_fast.zero.process_group import init_distributed


@pytest.mark.parametrize("name", CASES)
def test_a_bad_update_leaves_no_trace(name, tmp_path):
    init_distributed()
    check(name, tmp_path)
