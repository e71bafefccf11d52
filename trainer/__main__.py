"""Where does a rank start? `python -m trainer JOB.json`; rank.py says what it does."""

import gc
import sys

gc.disable()  # what is imported stays: to look through it for garbage takes a fifth of the time

from trainer.rank import main  # noqa: E402

gc.freeze()
gc.enable()
sys.exit(main(sys.argv[1:]))
