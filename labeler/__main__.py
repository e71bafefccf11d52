"""Where does the process that computes start? `python -m labeler JOB`; child.py says what it does."""

import faulthandler
import gc
import sys

gc.disable()  # what is imported stays: to look through it for garbage takes a tenth of the time

from labeler.child import main  # noqa: E402

gc.freeze()
gc.enable()
faulthandler.enable()
main(sys.argv[1])
