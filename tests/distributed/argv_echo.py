"""Started by the DeepSpeed launcher in a test: prints what a rank is given."""

import json
import os
import sys

if __name__ == "__main__":
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    found = {"argv": sys.argv[1:], "env": {name: os.environ.get(name) for name in names}}
    # One write, so that two ranks' lines do not mix.
    sys.stdout.write(f"ECHO {json.dumps(found)}\n")
    sys.stdout.flush()
