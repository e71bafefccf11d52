"""In which order do the files of tests run? The longest first, so that none is begun when the others end."""

import gc

LONGEST = (
    "slurm/test_jobs.py",
    "workflow/test_campaign_kill.py",
    "parallel/test_trainer_stage.py",
    "workflow/test_labeler_gpaw.py",
    "workflow/test_campaign_levels.py",
    "unit/test_kernels_gpu.py",
    "parallel/test_trainer_transfer.py",
    "slurm/test_campaign.py",
    "slurm/test_allocation.py",
)


def pytest_collection_modifyitems(items):
    def place(item):
        path = item.path.as_posix()
        return next((number for number, name in enumerate(LONGEST) if path.endswith(name)), len(LONGEST))

    items.sort(key=place)


# What is imported for all tests stays until the end: to look through it for garbage takes seconds in every process.
gc.disable()


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


def pytest_unconfigure():
    gc.freeze()
