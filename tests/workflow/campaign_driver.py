"""A driver in a process of its own, for tests that kill it: CONFIG RUN_DIR SITE."""

import sys
from pathlib import Path

from campaign.driver import run_campaign
from campaign.lease import LeaseError
from campaign.site import load_site

if __name__ == "__main__":
    config, run_dir, site = map(Path, sys.argv[1:])
    try:
        state = run_campaign(config, run_dir, load_site(site))
    except LeaseError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    print(state.finished)
    sys.exit(1 if state.failed else 0)
