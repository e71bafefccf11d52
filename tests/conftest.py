"""Which tests share a process when several run at a time: those of a file, and all that share the Slurm cluster."""

import pytest

SLURM = "slurm"


@pytest.hookimpl(tryfirst=True)  # before the plug-in looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        group = SLURM if item.path.parent.name == SLURM else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))
